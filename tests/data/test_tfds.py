"""TFDS: data sets prepared on this machine, ImageNet's own builder among them."""

import io
import json
import pickle
import shutil
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.data.loader import Loader, Stream
from relay_jax.data.source import open_source
from relay_jax.data.tfds import TfdsSource
from relay_jax.runtime.files import digest
from tests.conftest import error_of
from tests.data.pictures import dataset_keys, read_all


@pytest.fixture(scope="module")
def tfds_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two versions of `tiny_img` with labels (20 images), and `plain_img/small` without;
    prepared as array_record."""
    tfds = pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")

    def prepare(
        name: str,
        version: str,
        labels: bool,
        count: int,
        config: str = "",
        file_format: str = "array_record",
    ) -> None:
        features = {"image": tfds.features.Image(shape=(None, None, 3))}
        if labels:
            features["label"] = tfds.features.ClassLabel(names=["left", "right"])

        def info(self: object) -> object:
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def examples() -> object:
            for i in range(count):
                record = {"image": Image.fromarray(np.full((20, 24, 3), i, np.uint8))}
                yield i, record | ({"label": i % 2} if labels else {})

        body = {
            "__module__": __name__,
            "VERSION": tfds.core.Version(version),
            "_info": info,
            "_split_generators": lambda self, manager: {"train": examples()},
            "_generate_examples": lambda self: examples(),
        }
        if config:
            body["BUILDER_CONFIGS"] = [tfds.core.BuilderConfig(name=config)]
        with tfds.core.registered.skip_registration():
            builder = type(name, (tfds.core.GeneratorBasedBuilder,), body)
        builder(data_dir=str(root), file_format=file_format).download_and_prepare()

    prepare("TinyImg", "1.0.0", labels=True, count=4)
    prepare("TinyImg", "1.10.0", labels=True, count=20)
    prepare("PlainImg", "1.0.0", labels=False, count=3, config="small")
    return root


def test_a_tfds_source_reads_the_newest_prepared_version(tfds_dir: Path) -> None:
    already_imported = "tensorflow" in sys.modules
    source = TfdsSource("tiny_img", "train", str(tfds_dir))
    assert (len(source), source.num_classes, source.class_names) == (20, 2, ("left", "right"))
    values = read_all(source)
    assert sorted(level for level, _ in values) == list(range(20))
    assert all(label == level % 2 for level, label in values)
    assert source[0][0].shape == (20, 24, 3)
    assert already_imported or "tensorflow" not in sys.modules


def test_a_tfds_version_configuration_or_slice_can_be_named(tfds_dir: Path) -> None:
    root = str(tfds_dir)
    assert len(TfdsSource("tiny_img:1.0.0", "train", root)) == 4
    assert len(TfdsSource("tiny_img", "train[:25%]", root)) == 5
    for name in ("plain_img", "plain_img/small", "plain_img/small:1.0.0"):
        source = TfdsSource(name, "train", root)
        assert (len(source), source.num_classes, source[0][1]) == (3, 0, 0)


def test_a_tfds_source_still_reads_after_pickling(tfds_dir: Path) -> None:
    source = TfdsSource("tiny_img", "train", str(tfds_dir))
    before = read_all(source)
    assert read_all(pickle.loads(pickle.dumps(source))) == before


def test_the_fingerprint_is_of_what_the_configuration_says(tfds_dir: Path) -> None:
    root = str(tfds_dir)
    about = {"source": "tfds", "name": "tiny_img", "split": "train", "data_dir": root}
    assert TfdsSource("tiny_img", "train", root).fingerprint() == digest([about, 20])
    assert "needs the name" in error_of(lambda: TfdsSource("", "train", root))
    assert TfdsSource("tiny_img", "train", root).where(3).endswith("tiny_img/1.10.0:train[3]")


def test_tfds_defects_are_one_line_that_says_what_to_run(tfds_dir: Path, tmp_path: Path) -> None:
    message = error_of(lambda: TfdsSource("mnist", "train", str(tfds_dir)))
    assert "download_and_prepare" in message and "'mnist'" in message and str(tfds_dir) in message
    assert "download_and_prepare" in error_of(
        lambda: TfdsSource("tiny_img:9.9.9", "train", str(tfds_dir))
    )
    message = error_of(lambda: TfdsSource("tiny_img", "valid", str(tfds_dir)))
    assert "'valid'" in message and message.endswith("it has train")
    broken = tmp_path / "tiny_img" / "1.0.0"
    broken.mkdir(parents=True)
    (broken / "dataset_info.json").write_text("{")
    assert f"{broken}: cannot be read as a TFDS data set" in error_of(
        lambda: TfdsSource("tiny_img", "train", str(tmp_path))
    )


def test_tfds_files_that_need_tensorflow_are_refused_in_one_line(
    tfds_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "tiny_img" / "1.0.0"
    folder.mkdir(parents=True)
    for file in (tfds_dir / "tiny_img" / "1.0.0").iterdir():
        text = file.read_bytes().replace(b"array_record", b"tfrecord")
        (folder / file.name.replace("array_record", "tfrecord")).write_bytes(text)
    message = error_of(lambda: TfdsSource("tiny_img", "train", str(tmp_path)))
    assert "tfrecord" in message and "file_format='array_record'" in message


@pytest.mark.parametrize(
    "place", ["pythonClassName", "type", "nested"], ids=["proto", "legacy", "in a text"]
)
def test_features_of_other_packages_are_refused_and_nothing_of_them_runs(
    tfds_dir: Path, tmp_path: Path, place: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "tiny_img" / "1.0.0"
    shutil.copytree(tfds_dir / "tiny_img" / "1.0.0", folder)
    (tmp_path / "hostile_features.py").write_text("raise SystemExit('it ran')")
    monkeypatch.syspath_prepend(tmp_path)
    name = "hostile_features.Image"
    features = json.loads((folder / "features.json").read_text())
    if place == "nested":
        features["featuresDict"]["features"]["x"] = {
            "pythonClassName": "tensorflow_datasets.core.features.sequence_feature.Sequence",
            "json": {"json": json.dumps({"feature": {"type": name, "content": {}}})},
        }
    else:
        features["featuresDict"]["features"]["image"] = {place: name, "content": {}}
    (folder / "features.json").write_text(json.dumps(features))
    message = error_of(lambda: TfdsSource("tiny_img", "train", str(tmp_path)))
    assert name in message and "not TFDS's own" in message and "hostile_features" not in sys.modules


# ImageNet as TFDS prepares it, on archives like the real ones.

SYNSETS = ("n01440764", "n02085620", "n15075141")
CLASSES = (0, 151, 999)  # their places among the thousand


def jpeg(level: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((30, 40, 3), level, np.uint8)).save(file, "jpeg", quality=95)
    return file.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return file.getvalue()


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tfds = pytest.importorskip("tensorflow_datasets")
    root = tmp_path_factory.mktemp("tfds")
    archives = {
        "train": tar(
            {
                f"{synset}.tar": tar({f"{synset}_{i}.JPEG": jpeg(50 * n + i) for i in range(2)})
                for n, synset in enumerate(SYNSETS)
            }
        ),
        "validation": tar({f"ILSVRC2012_val_{i + 1:08d}.JPEG": jpeg(100 + i) for i in range(3)}),
        "test": tar({"ILSVRC2012_test_00000001.JPEG": jpeg(200)}),
    }
    options = {
        "train": {},
        "validation": {
            "validation_labels": {f"ILSVRC2012_val_{i + 1:08d}.JPEG": SYNSETS[i] for i in range(3)}
        },
        "test": {"labels_exist": False},
    }

    def split_generators(
        self: object, _: object
    ) -> dict[str, object]:  # the original opens files by TensorFlow
        return {
            split: self._generate_examples(
                tfds.download.iter_archive(  # type: ignore[attr-defined]
                    io.BytesIO(content), tfds.download.ExtractMethod.TAR_STREAM
                ),
                **options[split],
            )
            for split, content in archives.items()
        }

    real = tfds.builder_cls("imagenet2012")
    with tfds.core.registered.skip_registration():
        builder = type(
            "Imagenet2012",
            (real,),
            {
                "__module__": __name__,
                "_split_generators": split_generators,
                "pkg_dir_path": real.pkg_dir_path,
            },
        )
    builder(data_dir=str(root), file_format="array_record").download_and_prepare()
    assert "tensorflow" not in sys.modules
    return root


def test_the_training_split_has_a_thousand_classes_and_the_images(prepared: Path) -> None:
    source = TfdsSource("imagenet2012", "train", str(prepared))
    assert len(source) == 6 and source.num_classes == 1000
    assert [source.class_names[c] for c in CLASSES] == list(SYNSETS)
    images = sorted((int(image.mean()), label) for image, label in (source[i] for i in range(6)))
    assert images == [(50 * n + i, c) for n, c in enumerate(CLASSES) for i in range(2)]


def test_splits_without_labels_are_refused_when_read(prepared: Path) -> None:
    assert len(TfdsSource("imagenet2012", "validation", str(prepared))) == 3
    test = TfdsSource("imagenet2012", "test", str(prepared))
    assert "label -1" in error_of(lambda: test[0])


def test_a_configuration_reads_it_batch_by_batch(prepared: Path) -> None:
    keys = dataset_keys("tfds", name="imagenet2012", data_dir=str(prepared), num_classes=1000)
    source = open_source(keys, [8, 16], 0)
    with Loader(source, Stream(resolution=8, batch_size=6, seed=0, x_flip=True)) as loader:
        batch = next(loader)
    assert sorted(batch["label"].tolist()) == sorted(2 * CLASSES)
    assert (
        batch["image"].shape == (6, 8, 8, 3)
        and len(np.unique(batch["image"].mean(axis=(1, 2, 3)))) == 6
    )

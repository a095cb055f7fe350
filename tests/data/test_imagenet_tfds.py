"""ImageNet as TFDS prepares it: features and reading of its own builder, on archives like the
real ones."""

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import build, open_source
from relay_jax.data.loader import Loader
from relay_jax.data.source import TfdsSource
from tests.conftest import error_of, tiny_relay

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
    found = sorted((int(image.mean()), label) for image, label in (source[i] for i in range(6)))
    assert found == [(50 * n + i, c) for n, c in enumerate(CLASSES) for i in range(2)]


def test_splits_without_labels_are_refused_when_read(prepared: Path) -> None:
    assert len(TfdsSource("imagenet2012", "validation", str(prepared))) == 3
    test = TfdsSource("imagenet2012", "test", str(prepared))
    assert "label -1" in error_of(lambda: test[0])


def test_a_configuration_reads_it_batch_by_batch(prepared: Path) -> None:
    config = tiny_relay()
    config.dataset.update(
        source="tfds", name="imagenet2012", data_dir=str(prepared), num_classes=1000
    )
    source = open_source(config, build(config))
    with Loader(source, resolution=8, batch_size=6, seed=0, x_flip=True) as loader:
        batch = next(loader)
    assert sorted(batch["label"].tolist()) == sorted(2 * CLASSES)
    assert (
        batch["image"].shape == (6, 8, 8, 3)
        and len(np.unique(batch["image"].mean(axis=(1, 2, 3)))) == 6
    )

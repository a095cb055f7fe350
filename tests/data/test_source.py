"""Every source gives the right image and label at every position, and every defect is one clear
line."""

import io
import json
import pickle
import sys
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.data.source import (
    EdmZip,
    ImageFolder,
    Source,
    SyntheticShapes,
    TfdsSource,
    make_source,
)
from tests.conftest import error_of

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def colour(level: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_zip(path: Path, images: dict[str, bytes], index: object = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in images.items():
            archive.writestr(name, data)
        if index is not None:
            archive.writestr("dataset.json", index if isinstance(index, str) else json.dumps(index))
    return path


def read_all(source: Source) -> list[tuple[int, int]]:
    return [(int(source[i][0][0, 0, 0]), source[i][1]) for i in range(len(source))]


# The synthetic set.


def test_a_synthetic_image_is_a_pure_function_of_seed_and_position() -> None:
    one, other = SyntheticShapes(32, 100, 5), SyntheticShapes(32, 1000, 5)
    for position in (99, 0, 42):
        image, label = one[position]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and label == position % 8
        np.testing.assert_array_equal(image, other[position][0])


def test_synthetic_images_differ_between_positions_and_seeds() -> None:
    images = {SyntheticShapes(16, 64, seed)[i][0].tobytes() for seed in (0, 1) for i in range(64)}
    assert len(images) == 128


def test_synthetic_classes_are_named_and_balanced() -> None:
    source = SyntheticShapes(8, 80, 0)
    assert source.num_classes == 8 == len(set(source.class_names))
    assert np.bincount([source[i][1] for i in range(80)]).tolist() == [10] * 8
    assert source.class_names[0] == "stripes disc" and source.class_names[7] == "checks cross"


@pytest.mark.parametrize("label", range(8))
def test_a_box_average_over_four_pixels_erases_the_texture(label: int) -> None:
    """The texture is a strong wave at 32 px; what the box leaves of it is a few levels of 255."""
    fine, coarse = [], []
    source = SyntheticShapes(32, 400, 3)
    for position in range(label, 400, 8):
        image = source[position][0].astype(np.float64)
        boxes = image.reshape(8, 4, 8, 4, 3)
        mean = boxes.mean((1, 3))
        # Boxes inside the shape: their four neighbours are of the shape too, so that they look
        # alike when averaged.
        for y in range(1, 7):
            for x in range(1, 7):
                around = mean[[y - 1, y + 1, y, y], [x, x, x - 1, x + 1]]
                # The shape is saturated, the background pastel.
                if (np.ptp(around, axis=1) > 90).all() and np.ptp(mean[y, x]) > 90:
                    fine.append(boxes[y, :, x].std((0, 1)).max())
                    coarse.append(np.abs(mean[y, x] - around.mean(0)).max())
    assert len(fine) > 20
    assert np.mean(fine) > 40
    assert np.mean(coarse) < 6


def test_stripes_and_checks_have_a_period_of_four_pixels() -> None:
    for label, expected in (
        (0, 1),
        (4, 2),
    ):  # a disc with stripes: one line of the spectrum; with checks: two
        image = SyntheticShapes(64, 8, 1)[label][0].astype(np.float64).mean(-1)
        spectrum = np.abs(np.fft.fft2(image))[:33]
        frequency = np.hypot(np.fft.fftfreq(64)[:33, None], np.fft.fftfreq(64)[None])
        spectrum[frequency < 0.15] = 0
        top = frequency[np.unravel_index(spectrum.argmax(), spectrum.shape)]
        assert top == pytest.approx(0.25 * np.sqrt(expected), abs=0.03)


def test_the_shape_stands_out_from_the_background_in_brightness() -> None:
    source = SyntheticShapes(8 * 4, 64, 9)
    for position in range(64):
        mean = source[position][0].reshape(8, 4, 8, 4, 3).astype(np.float64).mean((1, 3))
        brightness = mean.mean(-1)
        assert brightness.max() - brightness.min() > 60


def test_a_synthetic_position_out_of_range_is_an_index_error() -> None:
    for position in (-1, 10):
        with pytest.raises(IndexError):
            SyntheticShapes(8, 10, 0)[position]


# Folders.


def test_a_folder_of_folders_has_one_class_per_sub_folder(tmp_path: Path) -> None:
    for name, level in (
        ("dog/b.PNG", 30),
        ("dog/a.png", 20),
        ("cat/deep/x.png", 10),
        ("cat/note.txt", 0),
        ("dog/._a.png", 0),
    ):
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(colour(level)))
    (tmp_path / "empty").mkdir()
    (tmp_path / ".hidden").mkdir()
    (tmp_path / ".hidden" / "z.png").write_bytes(b"")
    source = ImageFolder(tmp_path)
    assert (source.num_classes, source.class_names) == (2, ("cat", "dog"))
    assert read_all(source) == [(10, 0), (20, 1), (30, 1)]


def test_a_flat_folder_has_no_labels_and_is_sorted(tmp_path: Path) -> None:
    for name, level in (("b.jpg", 200), ("a.bmp", 100)):
        Image.fromarray(colour(level)).save(tmp_path / name)
    source = ImageFolder(str(tmp_path))
    assert (source.num_classes, source.class_names) == (0, ())
    assert read_all(source) == [(100, 0), (200, 0)]


@pytest.mark.parametrize("mode", ["L", "P", "CMYK", "RGBA", "1"])
def test_every_pixel_format_becomes_rgb(tmp_path: Path, mode: str) -> None:
    Image.fromarray(colour(255)).convert(mode).save(
        tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    )
    image, _ = ImageFolder(tmp_path)[0]
    assert image.shape == (8, 8, 3) and image.dtype == np.uint8 and (image > 250).all()


def test_a_link_to_a_parent_folder_is_not_followed_for_ever(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(colour(1)))
    (tmp_path / "cat" / "loop").symlink_to(tmp_path / "cat")
    assert len(ImageFolder(tmp_path)) == 1


def test_folder_defects_are_one_line_that_names_the_place(tmp_path: Path) -> None:
    assert "absent: no such folder" in error_of(lambda: ImageFolder(tmp_path / "absent"))
    assert f"{tmp_path}: no images found" in error_of(lambda: ImageFolder(tmp_path))
    (tmp_path / "cat").mkdir()
    (tmp_path / "cat" / "a.png").write_bytes(png(colour(1)))
    (tmp_path / "top.png").write_bytes(png(colour(1)))
    assert "top.png" in error_of(lambda: ImageFolder(tmp_path)) and "cat" in error_of(
        lambda: ImageFolder(tmp_path)
    )


def test_a_damaged_image_file_is_named(tmp_path: Path) -> None:
    whole = png(np.random.default_rng(0).integers(0, 256, (32, 32, 3), np.uint8))
    defects = {
        "a.png": whole[: len(whole) // 2],
        "b.png": b"",
        "c.jpg": b"text",
        "d.png": whole[:60] + b"x" * 50,
    }
    for name, data in defects.items():
        (tmp_path / name).write_bytes(data)
    source = ImageFolder(tmp_path)
    for position, name in enumerate(defects):
        message = error_of(lambda position=position: source[position])
        assert f"{tmp_path / name}: cannot decode" in message and "0x" not in message
    (tmp_path / "a.png").unlink()
    assert "a.png: cannot be read (No such file" in error_of(lambda: source[0])


# EDM zips.


def test_a_zip_gives_images_by_name_with_the_labels_of_its_index(tmp_path: Path) -> None:
    images = {f"00000/img{i}.png": png(colour(10 * i)) for i in (2, 0, 1)}
    labels = [["00000/img1.png", 4], ["00000\\img0.png", 2], ["00000/img2.png", 0]]
    source = EdmZip(write_zip(tmp_path / "set.zip", images, {"labels": labels}))
    assert (source.num_classes, source.resolution, len(source)) == (5, 8, 3)
    assert source.class_names == ("0", "1", "2", "3", "4")
    assert read_all(source) == [(0, 2), (10, 4), (20, 0)]


@pytest.mark.parametrize("index", [None, {"labels": None}, {}])
def test_a_zip_without_labels_has_none(tmp_path: Path, index: object) -> None:
    source = EdmZip(write_zip(tmp_path / "set.zip", {"a.png": png(colour(7))}, index))
    assert (source.num_classes, source.class_names) == (0, ())
    assert read_all(source) == [(7, 0)]


def test_a_zip_can_be_read_by_many_threads_and_after_pickling(tmp_path: Path) -> None:
    images = {f"{i:03d}.png": png(colour(i)) for i in range(100)}
    source = EdmZip(
        write_zip(
            tmp_path / "set.zip", images, {"labels": [[f"{i:03d}.png", i % 3] for i in range(100)]}
        )
    )
    expected = [(i, i % 3) for i in range(100)]
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for reader in (source, copy):
            values = pool.map(
                lambda i, reader=reader: (int(reader[i][0][0, 0, 0]), reader[i][1]), range(100)
            )
            assert list(values) == expected


def test_zip_defects_are_one_line_that_names_the_file(tmp_path: Path) -> None:
    good = {"a.png": png(colour(1)), "b.png": png(colour(2))}
    path = tmp_path / "set.zip"

    def error(images: dict[str, bytes], index: object = None) -> str:
        return error_of(lambda: EdmZip(write_zip(path, images, index)))

    assert "absent.zip: no such file" in error_of(lambda: EdmZip(tmp_path / "absent.zip"))
    (tmp_path / "text.zip").write_text("hello")
    assert "text.zip: not a readable zip file" in error_of(lambda: EdmZip(tmp_path / "text.zip"))
    assert "set.zip: no images" in error({"a.txt": b""})
    assert "set.zip:dataset.json: no label for b.png" in error(good, {"labels": [["a.png", 0]]})
    for bad in (1.5, "1", [0, 1], -1, True):
        assert "the label of a.png is" in error(good, {"labels": [["a.png", bad], ["b.png", 0]]})
    for broken in ("{", "[]", {"labels": 3}, {"labels": [["a.png"]]}):
        assert "set.zip:dataset.json: not an EDM label list" in error(good, broken)
    assert "set.zip:a.png: wrong image size 4x8" in error({"a.png": png(colour(1)[:, :4])})


def test_a_damaged_or_odd_sized_member_is_named_when_it_is_read(tmp_path: Path) -> None:
    images = {
        "a.png": png(colour(1)),
        "b.png": b"junk",
        "c.png": png(colour(1, 16)),
        "d.png": png(colour(9)),
    }
    path = write_zip(tmp_path / "set.zip", images)
    source = EdmZip(path)
    assert f"{path}:b.png: cannot decode" in error_of(lambda: source[1])
    assert f"{path}:c.png: wrong image size 16x16" in error_of(lambda: source[2])
    raw = path.read_bytes()
    start = raw.index(images["d.png"])
    path.write_bytes(raw[: start + 20] + b"\xff" * 10 + raw[start + 30 :])
    assert f"{path}:d.png: cannot be read (Bad CRC" in error_of(lambda: EdmZip(path)[3])


def test_the_cifar10_zip_reads_as_fifty_thousand_labelled_squares() -> None:
    path = SHARED / "cifar10-train-32x32.zip"
    if not path.exists():
        pytest.skip("the CIFAR-10 zip is not here")
    source = EdmZip(path)
    assert (len(source), source.num_classes, source.resolution) == (50000, 10, 32)
    image, label = source[49999]
    assert image.shape == (32, 32, 3) and 0 <= label < 10


def test_real_photographs_all_decode_to_rgb() -> None:
    path = SHARED / "imagenet-sample"
    if not path.exists():
        pytest.skip("the photographs are not here")
    source = ImageFolder(path)
    assert len(source) == 120 and source.num_classes == 0
    for position in range(0, 120, 10):
        image, _ = source[position]
        assert image.ndim == 3 and image.shape[2] == 3 and image.std() > 5


# TFDS.


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


# The choice between them.


def test_make_source_builds_each_kind(tmp_path: Path, tfds_dir: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(colour(1)))
    packed = write_zip(tmp_path / "set.zip", {"a.png": png(colour(1))})
    common = {"resolution": 16, "size": 10, "seed": 3}
    synthetic = make_source("synthetic", **common)
    np.testing.assert_array_equal(synthetic[4][0], SyntheticShapes(16, 10, 3)[4][0])
    assert isinstance(make_source("folder", path=str(tmp_path), **common), ImageFolder)
    assert isinstance(make_source("zip", path=str(packed), **common), EdmZip)
    assert isinstance(
        make_source("tfds", name="tiny_img", data_dir=str(tfds_dir), **common), TfdsSource
    )


def test_make_source_says_what_is_missing() -> None:
    common = {"resolution": 16, "size": 10, "seed": 3}
    assert "choose synthetic, folder, zip or tfds" in error_of(
        lambda: make_source("lmdb", **common)
    )
    for source in ("folder", "zip"):
        assert "needs a path" in error_of(lambda source=source: make_source(source, **common))
    assert "needs the name" in error_of(lambda: make_source("tfds", **common))
    assert "resolution" in error_of(lambda: make_source("synthetic", resolution=16, size=0, seed=0))

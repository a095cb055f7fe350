"""A packed set hands out the very pixels that the loader makes of the originals, and every
defect is one line."""

import io
import json
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from relay_jax.data.folder import ImageFolder
from relay_jax.data.loader import Loader, Stream, read
from relay_jax.data.packed import PackedDataset, decode_record, encode_record, record_file
from relay_jax.data.prepare import prepare
from relay_jax.data.source import ImageSource, open_source
from relay_jax.runtime.files import digest
from tests.conftest import content, error_of
from tests.data.pictures import dataset_keys

COUNT = 23


@pytest.fixture(scope="module")
def photographs(tmp_path_factory: pytest.TempPathFactory) -> ImageFolder:
    """Images of all sizes and shapes in two classes, as JPEG and PNG."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for n in range(COUNT):
        size = tuple(rng.integers(20, 90, 2))
        pixels = rng.integers(0, 256, (9, 9, 3), np.uint8)
        image = Image.fromarray(pixels).resize(
            (int(size[0]), int(size[1])), Image.Resampling.BICUBIC
        )
        folder = root / ("cat" if n < 9 else "dog")
        folder.mkdir(exist_ok=True)
        image.save(folder / f"{n:02d}.{'png' if n % 2 else 'jpg'}")
    return ImageFolder(root)


@pytest.fixture
def packed(photographs: ImageFolder, tmp_path: Path) -> Path:
    """Packed at 8 and 32 px in shards of 5: the last one holds 3."""
    prepare(
        photographs,
        [8, 32],
        tmp_path / "packed",
        description={"source": "test"},
        shard_images=5,
        threads=2,
    )
    return tmp_path / "packed"


@pytest.mark.parametrize("shape", [(1, 1), (7, 5), (64, 64)])
def test_a_record_gives_back_every_pixel_and_the_label(shape: tuple[int, int]) -> None:
    image = np.random.default_rng(1).integers(0, 256, (*shape, 3), np.uint8)
    before = image.copy()
    decoded, label = decode_record(encode_record(image, 70000))
    np.testing.assert_array_equal(decoded, image)
    assert decoded.dtype == np.uint8 and label == 70000
    np.testing.assert_array_equal(image, before)


def test_what_is_no_record_is_a_value_error() -> None:
    record = encode_record(np.zeros((4, 4, 3), np.uint8), 0)
    for bad in (b"", b"PNG" + record, record[:-1], record + b"x"):
        with pytest.raises(ValueError):
            decode_record(bad)


@pytest.mark.parametrize("resolution", [8, 32])
def test_packed_pixels_are_those_of_the_originals_cropped_by_the_loader(
    photographs: ImageFolder, packed: Path, resolution: int
) -> None:
    source = PackedDataset(packed, resolution)
    assert (len(source), source.num_classes, source.class_names) == (COUNT, 2, ("cat", "dog"))
    assert source.resolution == resolution
    positions = [22, 0, 5, 4, 13, 0]
    for unpacked, expected in zip(
        read(source, positions, resolution), read(photographs, positions, resolution), strict=True
    ):
        np.testing.assert_array_equal(unpacked, expected)


@pytest.mark.parametrize("workers", [0, 1])
def test_the_loader_gives_every_stage_the_batches_of_the_originals(
    photographs: ImageFolder, packed: Path, workers: int
) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    opened = open_source(dataset_keys("packed", path=str(packed)), [8, 32], 0)
    for resolution in (8, 32):
        batches = []
        for source in (photographs, opened):
            with Loader(
                source,
                Stream(resolution=resolution, batch_size=6, seed=3, x_flip=True),
                start=2,
                workers=workers,
            ) as loader:
                batches.append([next(loader) for _ in range(4)])
                assert loader.state["length"] == COUNT
        for one, other in zip(*batches, strict=True):
            np.testing.assert_array_equal(one["image"], other["image"])
            np.testing.assert_array_equal(one["label"], other["label"])


def test_a_set_without_classes_has_no_labels(tmp_path: Path) -> None:
    Image.fromarray(np.full((40, 30, 3), 9, np.uint8)).save(tmp_path / "a.png")
    prepare(ImageFolder(tmp_path), [8], tmp_path / "out", description={}, threads=1)
    source = PackedDataset(tmp_path / "out", 8)
    assert (len(source), source.num_classes, source.class_names, source[0][1]) == (1, 0, (), 0)


def test_it_can_be_read_by_many_threads_and_after_pickling(
    photographs: ImageFolder, packed: Path
) -> None:
    source = PackedDataset(packed, 8)
    expected, labels = read(photographs, range(COUNT), 8)
    copy = pickle.loads(pickle.dumps(source))
    with ThreadPoolExecutor(8) as pool:
        for reader in (source, copy, pickle.loads(pickle.dumps(source.at(32))).at(8)):
            records = list(pool.map(reader.__getitem__, [n % COUNT for n in range(200)]))
            for n, (image, label) in enumerate(records):
                np.testing.assert_array_equal(image, expected[n % COUNT])
                assert label == labels[n % COUNT]


def test_a_position_out_of_range_is_an_index_error(packed: Path) -> None:
    for position in (-1, COUNT):
        with pytest.raises(IndexError):
            PackedDataset(packed, 8)[position]


def test_another_resolution_is_refused_naming_those_there_are(packed: Path) -> None:
    stream = Stream(resolution=16, batch_size=1, seed=0, x_flip=False)
    for action in (
        lambda: PackedDataset(packed, 16),
        lambda: PackedDataset(packed, 8).at(16),
        lambda: Loader(PackedDataset(packed, 8), stream),
        lambda: read(PackedDataset(packed, 8), [0], 16),
    ):
        assert f"{packed}: packed at 8, 32 px, not at 16" in error_of(action)


def test_verify_reads_every_file(packed: Path) -> None:
    PackedDataset(packed, 8).verify()
    file = packed / "8" / "00003-of-00005.array_record"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1  # in the padding: no image shows it
    file.write_bytes(raw)
    assert f"{file}: damaged (its checksum differs)" in error_of(PackedDataset(packed, 8).verify)
    PackedDataset(packed, 32).verify()


def test_a_missing_or_truncated_file_is_named_when_the_set_is_opened(packed: Path) -> None:
    file = packed / "8" / "00002-of-00005.array_record"
    raw = file.read_bytes()
    file.write_bytes(raw[: len(raw) // 2])
    assert f"{file}: has {len(raw) // 2} bytes instead of {len(raw)}" in error_of(
        lambda: PackedDataset(packed, 8)
    )
    assert "start the preparation again" in error_of(lambda: PackedDataset(packed, 32).at(8))
    file.unlink()
    assert f"{file}: cannot be read (No such file or directory)" in error_of(
        lambda: PackedDataset(packed, 8)
    )
    assert len(PackedDataset(packed, 32)) == COUNT


def test_the_fingerprint_is_of_the_description(packed: Path) -> None:
    manifest = json.loads((packed / "dataset.json").read_text())
    assert PackedDataset(packed, 8).fingerprint() == digest(manifest)
    assert PackedDataset(packed, 8).where(7) == f"{packed}/8/00001-of-00005.array_record[2]"


def test_a_record_file_is_whole_or_not_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.array_record"
    with pytest.raises(KeyboardInterrupt), record_file(path) as write:
        write(b"record")
        raise KeyboardInterrupt
    assert content(tmp_path) == {}
    with record_file(path) as write:
        write(b"record")
        assert not path.exists()
    assert list(content(tmp_path)) == ["new/a.array_record"]


@pytest.mark.parametrize("kind", ["junk", "shorter", "flipped", "smaller"])
def test_a_damaged_or_foreign_file_is_named_when_it_is_read(packed: Path, kind: str) -> None:
    """All of the right size, as an open set finds them changed under it."""
    file = packed / "32" / "00001-of-00005.array_record"
    source, raw = PackedDataset(packed, 32), bytearray(file.read_bytes())
    if kind == "junk":
        raw = bytearray(len(raw))
    elif kind == "shorter":
        raw = bytearray((packed / "32" / "00004-of-00005.array_record").read_bytes())
    elif kind == "flipped":
        raw[300] ^= 255
    else:
        raw = bytearray((packed / "8" / "00001-of-00005.array_record").read_bytes())
    file.write_bytes(raw)
    assert str(file) in error_of(lambda: [source[n] for n in range(5, 10)])
    assert source[0][0].shape == (32, 32, 3)


def test_the_loader_reports_a_damaged_file_in_one_line(packed: Path) -> None:
    source = PackedDataset(packed, 8)
    for file in (packed / "8").glob("*.array_record"):
        file.write_bytes(bytes(file.stat().st_size))
    with Loader(source, Stream(resolution=8, batch_size=2, seed=0, x_flip=True)) as loader:
        assert "start the preparation again" in error_of(lambda: next(loader))


def test_what_is_no_packed_set_is_one_line_that_names_it(packed: Path, tmp_path: Path) -> None:
    assert "absent: no packed data set (dataset.json is missing)" in error_of(
        lambda: PackedDataset(tmp_path / "absent", 8)
    )
    manifest = json.loads((packed / "dataset.json").read_text())
    for text, expected in (
        ("{", "cannot be read"),
        ("[]", "not a description"),
        ('{"labels": []}', "not a description"),
        ('{"labels": []}', "in EDM's format; use --config.dataset.source=folder"),
        ("[" * 100_000, "cannot be read"),
        *(
            (json.dumps(manifest | {key: value}), f"damaged ({key} is not what")
            for key in ("images", "class_names", "resolutions", "shards", "source", "complete")
            for value in (None, "x", [[]], -1)
        ),
        *(
            (json.dumps(manifest | {"shards": {"8": [shard | change]}}), "damaged (")
            for shard in manifest["shards"]["8"][:1]
            for change in ({"file": "../a"}, {"file": "/etc/passwd"}, {"images": 2**70}, {})
        ),
        (json.dumps(manifest | {"version": 2}), "format 2, this program reads 1"),
        (json.dumps(manifest | {"complete": False}), "has not finished"),
    ):
        (packed / "dataset.json").write_text(text)
        message = error_of(lambda: PackedDataset(packed, 8))
        assert expected in message and str(packed) in message
    assert "needs a path" in error_of(lambda: PackedDataset("", 8))
    for path in ("s3://bucket/set", Path("gs://bucket/set")):
        assert "gs://BUCKET/PATH" in error_of(lambda path=path: PackedDataset(path, 8))


class Repeated(ImageSource):
    """Images in memory."""

    def __init__(self, images: list[np.ndarray]) -> None:
        self._images = images

    def __len__(self) -> int:
        return len(self._images)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return self._images[position], 0

    def fingerprint(self) -> str:
        return ""


def test_packing_photographs_is_worth_it(packed: Path) -> None:
    """The format's reason to be: lossless, about as small as PNG."""
    x = np.linspace(0, 250, 256)
    smooth = np.broadcast_to(
        (x[:, None, None] * 0.5 + x[None, :, None] * 0.5).astype(np.uint8), (256, 256, 3)
    )
    noisy = smooth + np.random.default_rng(0).integers(0, 6, smooth.shape, np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(noisy).save(buffer, "png")
    image = [noisy] * 20

    prepare(Repeated(image), [256], packed.parent / "large", description={}, threads=1)
    size = sum(
        file.stat().st_size for file in (packed.parent / "large" / "256").glob("*.array_record")
    ) / len(image)
    assert size < 1.2 * len(buffer.getvalue()) < 0.8 * noisy.size

"""ADM's npz: read image by image, trained on and scored alike, and every defect is one line."""

import hashlib
import pickle
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from relay_jax.data.loader import Loader, Stream
from relay_jax.data.npz import NpzImages
from relay_jax.data.source import open_source
from relay_jax.evaluation.images import open_images
from relay_jax.runtime.files import digest
from tests.conftest import error_of
from tests.data.pictures import dataset_keys

IMAGES = np.random.default_rng(0).integers(0, 256, (13, 8, 8, 3), np.uint8)
LABELS = np.arange(13) % 5


def write(path: Path, save: Callable[..., None] = np.savez, first: int = 0, end: int = 13) -> Path:
    save(path, IMAGES[first:end], LABELS[first:end])
    return path


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_every_image_is_at_its_position_for_threads_and_after_pickling(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    source = NpzImages(write(tmp_path / "a.npz", save))
    assert (len(source), source.num_classes, source.resolution) == (13, 5, 8)
    assert source.class_names == ("0", "1", "2", "3", "4")
    source[3]
    copy = pickle.loads(pickle.dumps(source))
    assert len(pickle.dumps(source)) < IMAGES.nbytes
    positions = [12, 0, 7, 7, 3] * 10
    with ThreadPoolExecutor(8) as pool:
        for reader in (source, copy):
            for position, (image, label) in zip(
                positions, pool.map(reader.__getitem__, positions), strict=True
            ):
                np.testing.assert_array_equal(image, IMAGES[position])
                assert label == LABELS[position]
    for position in (-1, 13):
        with pytest.raises(IndexError):
            source[position]


def test_one_image_is_read_without_the_others(tmp_path: Path) -> None:
    """The rest of the file may be anything: only the bytes of the image are looked at."""
    path = write(tmp_path / "a.npz")
    source = NpzImages(path)
    raw = bytearray(path.read_bytes())
    start = raw.index(IMAGES[5].tobytes())
    raw[:start] = bytes(start)
    path.write_bytes(raw)
    np.testing.assert_array_equal(source[5][0], IMAGES[5])


def test_the_files_of_a_sampling_run_are_one_set_in_the_order_of_their_seeds(
    tmp_path: Path,
) -> None:
    write(tmp_path / "1000000-1000002.npz", first=10)
    write(tmp_path / "000000-000003.npz", end=4)
    write(tmp_path / "999994-999999.npz", np.savez_compressed, first=4, end=10)
    write(tmp_path / "samples_13x8x8x3.npz")
    source = NpzImages(tmp_path)
    np.testing.assert_array_equal(np.stack([source[i][0] for i in range(13)]), IMAGES)
    assert [source[i][1] for i in range(13)] == LABELS.tolist()
    assert source.where(11) == f"{tmp_path}/1000000-1000002.npz[1]"
    source.verify()


def test_images_without_classes_have_no_labels(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", arr_0=IMAGES, mu=np.zeros(3))
    source = NpzImages(tmp_path / "a.npz")
    assert (source.num_classes, source.class_names, source[4][1]) == (0, (), 0)


def test_the_same_npz_is_trained_on_and_scored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.npz")
    source = open_source(dataset_keys("npz", path=str(path), num_classes=5), [4, 8], 0)
    with Loader(source, Stream(resolution=8, batch_size=13, seed=1, x_flip=False)) as loader:
        batch = next(loader)
    trained = sorted((image.tobytes(), label) for image, label in zip(*batch.values(), strict=True))
    scored = np.concatenate([pixels for _, pixels in open_images(path, 1).share(0, 1, 4)])
    assert trained == sorted(
        (image.tobytes(), label) for image, label in zip(scored, LABELS, strict=True)
    )
    assert source.fingerprint() == open_images(path, 1).identity["sha256"]


def test_the_fingerprint_is_of_the_bytes_of_all_files(tmp_path: Path) -> None:
    files = [write(tmp_path / f"{name}.npz", first=first) for name, first in (("a", 0), ("b", 4))]
    sums = [hashlib.sha256(file.read_bytes()).hexdigest() for file in files]
    assert NpzImages(files[1]).fingerprint() == sums[1]
    assert NpzImages(tmp_path).fingerprint() == digest(sums)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"images": IMAGES}, "arr_0 is missing, it holds images"),
        ({"arr_0": IMAGES.astype(np.float32)}, "arr_0 must be uint8 in C order, not float32"),
        ({"arr_0": np.asfortranarray(IMAGES)}, "it is in Fortran order; save numpy.ascontiguous"),
        ({"arr_0": IMAGES, "arr_1": LABELS + 2**62}, "and all below 1,048,576"),
        ({f"x{n}": LABELS for n in range(3000)}, "x1, x10, x100, x1000 ... (3,000 in all)"),
        ({"arr_0": IMAGES[..., :2]}, "must be images [n, h, w, 3], not [13, 8, 8, 2]"),
        ({"arr_0": IMAGES[:0]}, "arr_0 holds no images"),
        ({"arr_0": IMAGES, "arr_1": LABELS[:5]}, "arr_1 must be 13 classes"),
        ({"arr_0": IMAGES, "arr_1": LABELS - 1}, "arr_1 must be 13 classes"),
        ({"arr_0": IMAGES, "arr_1": LABELS / 2}, "whole numbers from 0, not float64"),
        ({"arr_0": IMAGES, "arr_1": LABELS.astype(object)}, "not a readable npz file"),
    ],
)
def test_another_content_is_one_line(
    tmp_path: Path, arrays: dict[str, np.ndarray], message: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)
    assert error_of(lambda: NpzImages(path)).startswith(f"{path}: ")
    assert message in error_of(lambda: NpzImages(path))


@pytest.mark.parametrize("name", ["samples_26x8x8x3", "everything"])
def test_parts_beside_their_sum_are_refused(tmp_path: Path, name: str) -> None:
    """By its name, or as it begins with an image of a part and has as many as all."""
    for part, labels in enumerate((LABELS, LABELS)):
        np.savez(tmp_path / f"part_{part}.npz", np.roll(IMAGES, part), labels)
    assert len(NpzImages(tmp_path)) == 26
    both = np.concatenate([IMAGES, np.roll(IMAGES, 1)])
    np.savez(tmp_path / f"{name}.npz", both, np.tile(LABELS, 2))
    assert f"{name}.npz" in error_of(lambda: NpzImages(tmp_path))
    np.savez(tmp_path / f"{name}.npz", both ^ 1, np.tile(LABELS, 2))
    if name == "everything":
        assert len(NpzImages(tmp_path)) == 52


def test_other_files_beside_those_of_seeds_are_not_left_out_silently(tmp_path: Path) -> None:
    for name in ("000000-000012", "old_run"):
        write(tmp_path / f"{name}.npz")
    message = error_of(lambda: NpzImages(tmp_path))
    assert "old_run.npz" in message and "000000-000012.npz" in message


def test_the_size_of_an_array_is_looked_at_before_it_is_read(tmp_path: Path) -> None:
    """Headers that claim terabytes, or another number of bytes than there are."""
    write(tmp_path / "a.npz", np.savez_compressed)
    with zipfile.ZipFile(tmp_path / "a.npz") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    for name, shape in (("arr_0.npy", b"(13, 9, 9, 3)"), ("arr_1.npy", b"(99999999999,)")):
        head = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }\n"
        with zipfile.ZipFile(tmp_path / "b.npz", "w") as archive:
            for member, data in members.items():
                text = b"\x93NUMPY\1\0" + len(head).to_bytes(2, "little") + head
                archive.writestr(member, text if member == name else data)
        message = error_of(lambda: NpzImages(tmp_path / "b.npz"))
        assert f"{name[:5]} has another size than it says" in message


def test_missing_foreign_and_mixed_files_are_named(tmp_path: Path) -> None:
    assert "needs a path" in error_of(lambda: NpzImages(""))
    assert "absent: no such folder or npz file" in error_of(lambda: NpzImages(tmp_path / "absent"))
    assert f"{tmp_path}: no npz files" in error_of(lambda: NpzImages(tmp_path))
    whole = write(tmp_path / "a.npz").read_bytes()
    for text in (b"", b"hello", whole[:-30], whole[: len(whole) // 2]):
        (tmp_path / "b.npz").write_bytes(text)
        assert "b.npz: not a readable npz file" in error_of(lambda: NpzImages(tmp_path))
    np.savez(tmp_path / "b.npz", IMAGES)
    assert "one has classes (arr_1), the other has none" in error_of(lambda: NpzImages(tmp_path))
    np.savez(tmp_path / "b.npz", IMAGES[:, :4, :4], LABELS)
    assert "different sizes" in error_of(lambda: NpzImages(tmp_path))


@pytest.mark.parametrize("save", [np.savez, np.savez_compressed])
def test_a_file_damaged_under_an_open_set_is_named(
    tmp_path: Path, save: Callable[..., None]
) -> None:
    path = write(tmp_path / "a.npz", save)
    source = NpzImages(path)
    with zipfile.ZipFile(path) as archive:
        member = archive.getinfo("arr_0.npy")
    raw = bytearray(path.read_bytes())
    middle = member.header_offset + member.compress_size // 2
    raw[middle : middle + 8] = bytes(8)
    path.write_bytes(raw)
    assert error_of(source.verify).startswith(f"{path}: damaged (")
    path.write_bytes(raw[:200])
    assert error_of(lambda: source[12]).startswith(f"{path}: damaged (")
    path.unlink()
    fresh = pickle.loads(pickle.dumps(source))
    assert str(path) in error_of(lambda: fresh[0])

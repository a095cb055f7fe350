"""Folders of images: the right image and label at every position, every defect one clear line;
a listing from the index is the listing that a scan would give now."""

import json
import os
import shutil
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.data import folder as index
from relay_jax.data.folder import ImageFolder, Listing, cache_file, list_images
from relay_jax.data.zip import EdmZip
from relay_jax.runtime.files import digest, write_png
from relay_jax.sampling.folder import image_path
from tests.conftest import error_of
from tests.data.pictures import SHARED, colour, png, read_all, write_zip


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
    assert "needs a path" in error_of(lambda: ImageFolder(""))
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


def test_real_photographs_all_decode_to_rgb() -> None:
    path = SHARED / "imagenet-sample"
    if not path.exists():
        pytest.skip("the photographs are not here")
    source = ImageFolder(path)
    assert len(source) == 120 and source.num_classes == 0
    for position in range(0, 120, 10):
        image, _ = source[position]
        assert image.ndim == 3 and image.shape[2] == 3 and image.std() > 5


def test_the_fingerprint_is_of_paths_sizes_and_times(tmp_path: Path) -> None:
    for name in ("dog/a.png", "cat/b.png"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(png(colour(3)))
    rows = [
        [name, (tmp_path / name).stat().st_size, (tmp_path / name).stat().st_mtime_ns]
        for name in ("cat/b.png", "dog/a.png")
    ]
    source = ImageFolder(tmp_path)
    assert source.fingerprint() == digest(rows) and source.where(1) == f"{tmp_path}/dog/a.png"
    (tmp_path / "cat" / "b.png").write_bytes(b"another")
    assert ImageFolder(tmp_path).fingerprint() != digest(rows)


def test_class_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    for name in ("10", "2", "0", "007"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.png").write_bytes(png(colour(int(name))))
    assert ImageFolder(tmp_path).class_names == ("0", "2", "007", "10")
    assert read_all(ImageFolder(tmp_path)) == [(0, 0), (2, 1), (7, 2), (10, 3)]
    (tmp_path / "2").rename(tmp_path / "b")
    assert ImageFolder(tmp_path).class_names == ("0", "007", "10", "b")


def test_edms_dataset_json_gives_the_labels_of_an_unpacked_zip(tmp_path: Path) -> None:
    names = [f"{i // 4:05d}/img{i:08d}.png" for i in range(8)]
    images = {name: png(colour(i)) for i, name in enumerate(names)}
    index = {"labels": [[name, i % 3] for i, name in enumerate(names)]}
    zipped = EdmZip(write_zip(tmp_path / "set.zip", images, index))
    with zipfile.ZipFile(tmp_path / "set.zip") as archive:
        archive.extractall(tmp_path / "set")
    source = ImageFolder(tmp_path / "set")
    assert (source.class_names, source.unused) == (zipped.class_names, {})
    assert read_all(source) == read_all(zipped) == [(i, i % 3) for i in range(8)]
    assert source.where(5) == f"{tmp_path}/set/{names[5]}" and source.file_name(5) == names[5]
    assert "set, with their dataset.json; name that one" in error_of(lambda: ImageFolder(tmp_path))
    file = tmp_path / "set" / "dataset.json"
    for labels, message in (
        (index["labels"][1:], f"no label for {names[0]}"),
        ([*index["labels"], [names[3], 2]], f"{names[3]} is listed twice, with the labels 0 and 2"),
    ):
        file.write_text(json.dumps({"labels": labels}))
        assert f"{file}: {message}" in error_of(lambda: ImageFolder(tmp_path / "set"))
    file.write_text('{"version": 1, "shards": {}}')
    assert "source=packed" in error_of(lambda: ImageFolder(tmp_path / "set"))
    file.write_text('{"labels": null}')
    assert ImageFolder(tmp_path / "set").num_classes == 0


def test_samples_have_no_classes(tmp_path: Path) -> None:
    folder = tmp_path / "samples"
    for seed in (3, 1004):
        write_png(image_path(folder, seed), colour(seed % 256))
    for _ in range(2):
        assert read_all(ImageFolder(folder)) == [(3, 0), (236, 0)]
        assert ImageFolder(folder).num_classes == 0 and ImageFolder(folder).unused == {}
        (folder / "samples.json").write_text("{}")


def test_what_is_not_used_is_counted_by_ending(tmp_path: Path) -> None:
    for name in ("a.png", "b.HEIC", "c/d.heic", "c/e.txt", "noend", ".h.png", ".i/f.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(png(colour(1)))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "lost.png").symlink_to(tmp_path / "absent")
    (tmp_path / "loop.png").symlink_to(tmp_path / "loop.png")
    source = ImageFolder(tmp_path)
    assert source.unused == {".heic": 2, ".txt": 1, "": 1, "not a regular file": 3}
    assert len(source) == 1


def test_a_file_that_becomes_a_pipe_or_is_far_too_large_is_named(tmp_path: Path) -> None:
    file = tmp_path / "a.png"
    file.write_bytes(png(colour(1)))
    source = ImageFolder(tmp_path)
    os.truncate(file, 2**40)
    assert f"{file}: cannot be read (1,099,511,627,776 bytes are more" in error_of(
        lambda: source[0]
    )
    file.unlink()
    os.mkfifo(file)
    assert f"{file}: cannot be read (Not a regular file)" in error_of(lambda: source[0])


@pytest.mark.parametrize("name", ["set.zip", "set.npz", "a.png"])
def test_a_file_in_place_of_the_folder_says_which_source_reads_it(
    tmp_path: Path, name: str
) -> None:
    (tmp_path / name).write_bytes(b"")
    cure = name.partition(".")[2]
    cure = "name the folder it is in" if cure == "png" else f"--config.dataset.source={cure}"
    assert cure in error_of(lambda: ImageFolder(tmp_path / name))


# The index of a folder.


@pytest.fixture(autouse=True)
def small_and_hasty(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Folders of any size and age are kept, in a cache folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(index, "CACHED_IMAGES", 1)
    monkeypatch.setattr(index, "SETTLED_SECONDS", 0)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    for name in (
        "a/1.jpg",
        "a/deep/2.PNG",
        "a/deep/er/3.jpg",
        "a-b/4.jpg",
        "b/5.jpg",
        "b/note.txt",
        "b/._5.jpg",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "empty").mkdir()
    (folder / ".hidden").mkdir()
    (folder / ".hidden" / "6.jpg").touch()
    settle()
    return folder


def settle() -> None:
    """Until the clock of the file system has moved on."""
    time.sleep(0.03)


def scans(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Grows by the folders that are read from now on."""
    seen: list[str] = []
    scandir = os.scandir

    def counting(path: str) -> object:
        seen.append(os.fspath(path))
        return scandir(path)

    monkeypatch.setattr(index.os, "scandir", counting)
    return seen


def test_the_listing_is_sorted_by_class_and_path(root: Path) -> None:
    listing = list_images(str(root))
    assert listing == Listing(
        [],
        {"a": ["1.jpg", "deep/2.PNG", "deep/er/3.jpg"], "a-b": ["4.jpg"], "b": ["5.jpg"]},
        {".txt": 1},
    )
    assert list(listing.classes) == ["a", "a-b", "b"] and len(listing) == 5


def test_a_second_start_reads_no_folder_and_finds_the_same(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = ImageFolder(root)
    seen = scans(monkeypatch)
    second = ImageFolder(root)
    assert not seen
    assert (second.class_names, second._files) == (first.class_names, first._files)
    assert second._labels.tolist() == first._labels.tolist() == [0, 0, 0, 1, 2]
    assert list(list_images(str(root)).classes) == ["a", "a-b", "b"]


CHANGES: dict[str, Callable[[Path], object]] = {
    "add": lambda root: (root / "a" / "0.jpg").touch(),
    "add deep": lambda root: (root / "a" / "deep" / "er" / "9.jpg").touch(),
    "add to an empty folder": lambda root: (root / "empty" / "9.jpg").touch(),
    "remove": lambda root: (root / "a-b" / "4.jpg").unlink(),
    "rename": lambda root: (root / "b" / "5.jpg").rename(root / "b" / "0.jpg"),
    "new class": lambda root: shutil.copytree(root / "b", root / "c"),
    "remove class": lambda root: shutil.rmtree(root / "b"),
    "rename class": lambda root: (root / "b").rename(root / "z"),
    "swap": lambda root: ((root / "b" / "5.jpg").unlink(), (root / "b" / "6.jpg").touch()),
    "flat": lambda root: (root / "0.jpg").touch(),
    "link": lambda root: (root / "c").symlink_to(root / "b"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_any_change_is_seen(root: Path, change: str) -> None:
    before = list_images(str(root))
    assert cache_file(str(root)).exists()
    CHANGES[change](root)
    after = list_images(str(root))
    cache_file(str(root)).unlink(missing_ok=True)
    assert after == list_images(str(root)) != before


def test_a_change_with_its_time_set_back_is_seen(root: Path) -> None:
    """As tools do that copy folders with their times."""
    list_images(str(root))
    times = os.stat(root / "b")
    (root / "b" / "7.jpg").touch()
    os.utime(root / "b", ns=(times.st_atime_ns, times.st_mtime_ns))
    assert "7.jpg" in list_images(str(root)).classes["b"]


def test_a_flat_folder_is_indexed_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "flat"
    folder.mkdir()
    for name in ("b.jpg", "a.jpg"):
        (folder / name).touch()
    settle()
    assert list_images(str(folder)).flat == ["a.jpg", "b.jpg"]
    seen = scans(monkeypatch)
    assert list_images(str(folder)).flat == ["a.jpg", "b.jpg"] and not seen
    (folder / "c.jpg").touch()
    assert list_images(str(folder)).flat == ["a.jpg", "b.jpg", "c.jpg"] and seen


def test_names_that_are_not_utf8_survive(root: Path) -> None:
    name = os.fsdecode(b"caf\xe9.jpg")
    try:
        (root / "b" / name).touch()
    except OSError:
        pytest.skip("this file system takes UTF-8 alone")
    settle()
    assert list_images(str(root)) == list_images(str(root))
    assert name in list_images(str(root)).classes["b"]


def test_a_folder_that_changed_just_now_is_not_kept(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A further file within the same tick of the clock would not show."""
    monkeypatch.setattr(index, "SETTLED_SECONDS", 60)
    list_images(str(root))
    assert not cache_file(str(root)).exists()


def test_small_folders_are_not_kept(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index, "CACHED_IMAGES", 6)
    list_images(str(root))
    assert not cache_file(str(root)).exists()


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"version": 0}', "version", "root", "folders", "listing"]
)
def test_a_damaged_index_is_scanned_over(root: Path, text: str) -> None:
    expected = list_images(str(root))
    file = cache_file(str(root))
    kept = json.loads(file.read_text())
    file.write_text(json.dumps(kept | {text: None}) if text in kept else text)
    assert list_images(str(root)) == expected
    assert json.loads(file.read_text()) == kept


def test_the_folder_itself_is_not_written_to(root: Path) -> None:
    before = sorted(root.rglob("*"))
    list_images(str(root))
    assert sorted(root.rglob("*")) == before


def test_without_a_place_for_the_index_every_start_scans(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert list_images(str(root)) == list_images(str(root))
    assert (tmp_path / "file").read_bytes() == b""


def test_the_cache_is_below_the_home_folder_by_default(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    list_images(str(root))
    assert cache_file(str(root)).parent == tmp_path / "home" / ".cache" / "relay_jax"
    assert len(list((tmp_path / "home" / ".cache" / "relay_jax").iterdir())) == 1
    assert cache_file(str(root)) != cache_file(str(root / "a"))

"""EDM's zips: images by name, labels by their index, and every defect is one clear line."""

import json
import pickle
import warnings
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from relay_jax.data.folder import ImageFolder
from relay_jax.data.zip import EdmZip
from relay_jax.runtime.files import digest
from tests.conftest import error_of
from tests.data.pictures import SHARED, colour, png, read_all, write_zip


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

    assert "needs a path" in error_of(lambda: EdmZip(""))
    assert "use --config.dataset.source=folder" in error_of(lambda: EdmZip(tmp_path))
    assert "absent.zip: no such file" in error_of(lambda: EdmZip(tmp_path / "absent.zip"))
    (tmp_path / "text.zip").write_text("hello")
    assert "text.zip: not a readable zip file" in error_of(lambda: EdmZip(tmp_path / "text.zip"))
    assert "set.zip: no images" in error({"a.txt": b""})
    assert "set.zip:dataset.json: no label for b.png" in error(good, {"labels": [["a.png", 0]]})
    for bad in (1.5, "1", [0, 1], -1, True):
        assert "the label of a.png is" in error(good, {"labels": [["a.png", bad], ["b.png", 0]]})
    for broken in ("{", "[]", {"labels": 3}, {"labels": [["a.png"]]}):
        assert "set.zip:dataset.json: not an EDM label list" in error(good, broken)
    oblong, index = {"a.png": png(colour(1)[:, :4])}, {"labels": [["a.png", 0]]}
    assert EdmZip(write_zip(path, oblong, index)).resolution == (8, 4)
    other = {"a.png": oblong["a.png"], "b.png": good["b.png"]}
    mixed = EdmZip(write_zip(path, other, {"labels": [["a.png", 0], ["b.png", 0]]}))
    assert mixed[0][0].shape == (8, 4, 3)
    assert "wrong image size 8x8; the first image of this zip is 4x8" in error_of(lambda: mixed[1])


def test_a_damaged_or_odd_sized_member_is_named_when_it_is_read(tmp_path: Path) -> None:
    images = {
        "a.png": png(colour(1)),
        "b.png": b"junk",
        "c.png": png(colour(1, 16)),
        "d.png": png(colour(9)),
    }
    path = write_zip(tmp_path / "set.zip", images, {"labels": [[name, 0] for name in images]})
    source = EdmZip(path)
    assert f"{path}:b.png: cannot decode" in error_of(lambda: source[1])
    assert f"{path}:c.png: wrong image size 16x16" in error_of(lambda: source[2])
    raw = path.read_bytes()
    start = raw.index(images["d.png"])
    path.write_bytes(raw[: start + 20] + b"\xff" * 10 + raw[start + 30 :])
    assert f"{path}:d.png: cannot be read (Bad CRC" in error_of(lambda: EdmZip(path)[3])


def test_an_image_that_is_listed_or_there_twice_is_named(tmp_path: Path) -> None:
    path, good = tmp_path / "set.zip", {"a.png": png(colour(1)), "b/c.png": png(colour(2))}
    for twice in (["a.png", 2], ["a.png", 0], ["./a.png", 1]):
        write_zip(path, good, {"labels": [["a.png", 0], ["b/c.png", 1], twice]})
        assert f"{twice[0]} is listed twice, with the labels 0 and" in error_of(
            lambda: EdmZip(path)
        )
    write_zip(path, good, {"labels": [["a.png", 0], ["b/c.png", 1], ["b\\c.png", 1]]})
    assert "is listed twice" in error_of(lambda: EdmZip(path))
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(path, "a") as archive:
        archive.writestr("a.png", png(colour(3)))
    assert f"{path}: a.png is there twice" in error_of(lambda: EdmZip(path))
    write_zip(path, good | {"b\\c.png": png(colour(5))})
    assert "is there twice, also as b/c.png" in error_of(lambda: EdmZip(path))


def test_a_zip_of_class_folders_is_what_the_unpacked_folder_is(tmp_path: Path) -> None:
    images = {
        f"{name}/{i}.{end}": png(colour(10 * n + i, 8 + n))
        for n, name in enumerate(("cat", "dog", ".hidden", "cat/.ipynb"))
        for i, end in enumerate(("png", "PNG", "txt", "heic"))
    }
    write_zip(tmp_path / "set.zip", images)
    # As the Finder or a file manager packs a folder.
    write_zip(
        tmp_path / "folder.zip",
        {f"photos/{name}": data for name, data in images.items()}
        | {"__MACOSX/photos/cat/._0.png": b"", "photos/": b""},
    )
    for name, data in images.items():
        (tmp_path / "folder" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "folder" / name).write_bytes(data)
    sources = [
        EdmZip(tmp_path / "set.zip"),
        EdmZip(tmp_path / "folder.zip"),
        ImageFolder(tmp_path / "folder"),
    ]
    for source in sources:
        assert source.class_names == ("cat", "dog") and source.num_classes == 2
        assert read_all(source) == [(0, 0), (1, 0), (10, 1), (11, 1)]
        assert source.unused == {".txt": 2, ".heic": 2} and source.resolution is None
        assert source[3][0].shape == (9, 9, 3)


def test_labels_below_the_folder_that_was_packed_are_read(tmp_path: Path) -> None:
    images = {f"set/00000/{i}.png": png(colour(i)) for i in range(4)}
    index = json.dumps({"labels": [[f"00000/{i}.png", i % 2] for i in range(4)]}).encode()
    path = write_zip(tmp_path / "set.zip", images | {"set/dataset.json": index})
    assert read_all(EdmZip(path)) == [(0, 0), (1, 1), (2, 0), (3, 1)]
    write_zip(path, images | {"a.png": png(colour(9)), "set/dataset.json": index})
    assert "set/dataset.json is below" in error_of(lambda: EdmZip(path))


def test_folders_of_a_running_number_are_no_classes(tmp_path: Path) -> None:
    for names in (["00000/img00000001.png", "00001/img00001000.png"], ["005000/005999.png"]):
        source = EdmZip(write_zip(tmp_path / "set.zip", {n: png(colour(1)) for n in names}))
        assert source.num_classes == 0 and len(source) == len(names)
    names = ["00000/img00000001.png", "00001/img00000002.png"]
    source = EdmZip(write_zip(tmp_path / "set.zip", {n: png(colour(1)) for n in names}))
    assert source.class_names == ("00000", "00001")


def test_what_would_fill_the_memory_is_refused_unread(tmp_path: Path) -> None:
    path, images = tmp_path / "set.zip", {"a.png": png(colour(1)), "b.png": png(colour(2))}
    for label in (2**20, 2**62):
        write_zip(path, images, {"labels": [["a.png", 0], ["b.png", label]]})
        assert "below 1,048,576" in error_of(lambda: EdmZip(path))
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.png", bytes(1 << 20), zipfile.ZIP_LZMA)
    assert f"{path}:a.png: cannot be read (compressed by LZMA" in error_of(lambda: EdmZip(path))
    write_zip(path, images)
    with zipfile.ZipFile(path) as archive:
        directory = archive.start_dir
    raw = bytearray(path.read_bytes())
    raw[directory + 24 : directory + 28] = (0xFFFFFFF0).to_bytes(4, "little")
    path.write_bytes(raw)
    message = error_of(lambda: EdmZip(path))
    assert f"{path}:a.png: cannot be read (4,294,967,280 bytes are more than" in message


def test_the_cifar10_zip_reads_as_fifty_thousand_labelled_squares() -> None:
    path = SHARED / "cifar10-train-32x32.zip"
    if not path.exists():
        pytest.skip("the CIFAR-10 zip is not here")
    source = EdmZip(path)
    assert (len(source), source.num_classes, source.resolution) == (50000, 10, 32)
    image, label = source[49999]
    assert image.shape == (32, 32, 3) and 0 <= label < 10


def test_the_fingerprint_is_of_the_names_checksums_and_sizes(tmp_path: Path) -> None:
    images = {"a.png": png(colour(1)), "b.png": png(colour(2))}
    path = write_zip(tmp_path / "set.zip", images)
    rows = [[name, zlib.crc32(data), len(data)] for name, data in images.items()]
    assert EdmZip(path).fingerprint() == digest(rows)

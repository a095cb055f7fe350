"""A data set is described in a few lines that say what a user would want to know first."""

import shutil
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from relay_jax.data import description
from relay_jax.data.description import Description, describe, unused_files
from relay_jax.data.source import open_source
from relay_jax.errors import UserError
from tests.conftest import error_of
from tests.data.pictures import colour, dataset_keys, png, write_zip


def described(folder: Path, resolutions: tuple[int, ...] = (4, 8), **keys: Any) -> Description:
    kind = "zip" if folder.suffix == ".zip" else "folder"
    dataset = dataset_keys(kind, path=str(folder), **keys)
    return describe(open_source(dataset, resolutions, 0), dataset, resolutions, 0)


def picture(path: Path, width: int, height: int, mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, (width, height)).save(path)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    folder = tmp_path / "pets"
    picture(folder / "cat" / "0.png", 8, 8)
    picture(folder / "cat" / "1.png", 30, 9)
    picture(folder / "dog" / "0.png", 16, 20, "RGBA")
    (folder / "dog" / "0.heic").write_bytes(b"x")
    return folder


def test_the_block_says_what_is_there_and_what_is_done_to_it(pets: Path) -> None:
    block = described(pets, num_classes=2, x_flip=True)
    assert block.lines() == [
        f"folder {pets}: 3 images, 2 classes",
        "classes: 0 cat (2), 1 dog (1)",
        "sizes: 8 x 8 to 16 x 20 px",
        "not used: 1 .heic",
        "done to them: laid on white where transparent (1 of 3), centre crop, resized to 4 and 8 "
        "px, half of them mirrored while training",
    ]
    assert not block.doubts and block.class_names == ["cat", "dog"]
    kept = block.plain()
    assert kept["sizes"]["smallest"] == [8, 8] and kept["identity"]["images"] == 3


def test_what_looks_at_many_files_says_how_far_it_is(
    pets: Path, tmp_path: Path, tasks: dict[str, list[float | None]]
) -> None:
    described(pets, num_classes=2)
    assert tasks == {
        "listing pets, images": [None, 3],
        "measuring the images, images": [3, 3],
        "looking at the data, files": [6, 6],  # sizes, and first bytes
    }
    tasks.clear()
    described(pets, num_classes=2, identity="contents")
    assert tasks["looking at the data, files"] == [9, 9]
    tasks.clear()
    open_source(dataset_keys("folder", path=str(pets), num_classes=2), (4,), 0).fingerprint()
    assert tasks["looking at pets, files"] == [3, 3]
    tasks.clear()
    archive = tmp_path / "pets.zip"
    write_zip(archive, {f"cat/{n}.png": png(colour(n)) for n in range(2)})
    described(archive)
    assert tasks["listing pets.zip, files"] == [None, 0]


def test_a_photograph_on_its_side_is_counted_as_it_is_shown(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    block = described(tmp_path)
    assert block.sizes.smallest == [10, 20]
    assert block.done[0] == "turned as their EXIF says (1 of 1)"
    assert "EXIF" not in str(described(tmp_path, exif=False).done)


def test_smaller_images_are_warned_of_and_a_set_of_them_is_refused(pets: Path) -> None:
    block = described(pets, (4, 9))
    assert block.doubts == [
        "1 of 3 images are smaller than the 9 px of the largest stage and are enlarged"
    ]
    message = error_of(lambda: described(pets, (17, 34)))
    assert message == (
        f"{pets} has images of at most 16 x 20 px, the largest stage needs 34 px; use larger "
        "images or a smaller stage"
    )


def test_folder_and_zip_have_one_rule_for_small_images(tmp_path: Path) -> None:
    (tmp_path / "set").mkdir()
    (tmp_path / "set" / "a.png").write_bytes(png(colour(1)))
    archive = write_zip(tmp_path / "set.zip", {"a.png": png(colour(1))})
    for place in (tmp_path / "set", archive):
        with pytest.raises(UserError, match="the largest stage needs 16 px; use larger images"):
            described(place, (16,))


def test_headers_of_a_large_set_are_drawn_and_it_is_said(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(description, "HEADERS", 2)
    block = described(pets)
    assert block.sizes.read == 2
    assert block.lines()[2].endswith("(of 2 images, drawn at random by the seed)")


def test_many_classes_are_named_at_both_ends(tmp_path: Path) -> None:
    for number in range(12):
        picture(tmp_path / str(number) / "a.png", 8, 8)
    picture(tmp_path / "11" / "b.png", 8, 8)
    picture(tmp_path / "11" / "c.png", 8, 8)
    block = described(tmp_path, num_classes=12)
    assert block.lines()[1] == (
        "classes: 0 (1), 1 (1), 2 (1), 3 (1), 4 (1), 5 (1) ... 3 more ... 9 (1), 10 (1), 11 (3); "
        "1 to 3 images each"
    )


def test_doubts_are_said_although_the_numbers_agree(pets: Path, tmp_path: Path) -> None:
    (pets / "bee").mkdir()
    assert described(pets, num_classes=2).doubts == [
        "no images that can be used are in bee: no class, and no number"
    ]
    for split in ("train", "val"):
        shutil.copytree(pets, tmp_path / "splits" / split)
    doubt = described(tmp_path / "splits", num_classes=2).doubts[0]
    # A long path is cut in its middle.
    assert "names of splits" in doubt and "--config.dataset.path=" in doubt
    assert doubt.endswith("/splits/train")


def test_classes_that_a_list_of_labels_leaves_out_are_said(tmp_path: Path) -> None:
    labels = {"labels": [["a.png", 0], ["b.png", 2]]}
    path = write_zip(tmp_path / "set.zip", {n: png(colour(1)) for n in ("a.png", "b.png")}, labels)
    assert described(path, num_classes=3).doubts == ["no image has the class 1"]
    assert not described(path).doubts


def test_an_image_that_cannot_be_read_is_named_at_once(pets: Path) -> None:
    (pets / "cat" / "2.png").write_bytes(b"no image")
    assert error_of(lambda: described(pets)).startswith(f"{pets}/cat/2.png: cannot decode")


def test_a_set_without_files_needs_no_headers() -> None:
    keys = dataset_keys("synthetic", size=16, num_classes=8)
    block = describe(open_source(keys, [8], 0), keys, [8], 0)
    assert block.lines()[0] == "synthetic: 16 images, 8 classes"
    assert block.lines()[1].startswith("classes: 0 stripes disc (2), 1 stripes square (2)")
    assert block.sizes.smallest == [8, 8] and block.done == ["as they are, 8 px"]


def test_files_that_are_not_used_are_counted_the_most_frequent_first() -> None:
    unused = {".heic": 1, "": 3000, **{f".{n}": 2 for n in range(6)}}
    text = "3,000 without an ending, 2 .0, 2 .1, 2 .2, 2 .3, 2 .4, 3 others"
    assert unused_files(unused) == text


def test_the_bytes_are_hashed_where_the_configuration_says_so(pets: Path) -> None:
    parts = described(pets, identity="contents").identity["parts"]
    assert all(part["contents"] for part in parts)
    assert "must be listing or contents" in error_of(lambda: described(pets, identity="md5"))

"""A data set is recognised wherever it lies, and what has changed is named."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from relay_jax.data import identity
from relay_jax.data.folder import ImageFolder
from relay_jax.data.identity import changes, from_summary, identify, summary
from relay_jax.data.npz import NpzImages
from relay_jax.data.source import Source
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.data.zip import EdmZip
from tests.data.pictures import colour, png, write_zip


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """cat and dog, two images each."""
    for number, name in enumerate(("cat/0", "cat/1", "dog/0", "dog/1")):
        file = tmp_path / "pets" / f"{name}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(png(colour(number)))
    return tmp_path / "pets"


def known(folder: Path) -> dict:
    return identify(ImageFolder(folder))


def test_the_same_files_elsewhere_with_other_times_are_the_same(pets: Path, tmp_path: Path) -> None:
    before = known(pets)
    shutil.copytree(pets, tmp_path / "copy", copy_function=shutil.copyfile)
    os.utime(tmp_path / "copy" / "cat" / "0.png", (1, 1))
    assert known(tmp_path / "copy") == before and changes(before, before) == ""
    assert [(part["name"], part["images"]) for part in before["parts"]] == [("cat", 2), ("dog", 2)]


def rename(pets: Path) -> None:
    (pets / "cat").rename(pets / "zebra")


def add_class(pets: Path) -> None:
    shutil.copytree(pets / "dog", pets / "ant")
    (pets / "ant" / "0.png").write_bytes(png(colour(9, 9)))


def more(pets: Path) -> None:
    shutil.copy(pets / "cat" / "0.png", pets / "cat" / "9.png")


def other_name(pets: Path) -> None:
    (pets / "dog" / "1.png").rename(pets / "dog" / "2.png")


def other_size(pets: Path) -> None:
    (pets / "dog" / "1.png").write_bytes(png(colour(9, 90)))


def other_bytes(pets: Path) -> None:
    file = pets / "dog" / "1.png"
    data = bytearray(file.read_bytes())
    data[-20] ^= 1
    file.write_bytes(data)


def no_classes(pets: Path) -> None:
    for name in ("cat", "dog"):
        for file in (pets / name).iterdir():
            file.rename(pets / f"{name}{file.name}")
        (pets / name).rmdir()


@pytest.mark.parametrize(
    ("change", "difference"),
    [
        (
            rename,
            "class 'cat' is called 'zebra' now; class 'dog' was number 1 and is 0",
        ),
        (
            add_class,
            "class 'ant' (2 images) is new; class 'cat' was number 0 and is 1; "
            "class 'dog' was number 1 and is 2",
        ),
        (more, "class 'cat' has 3 images instead of 2"),
        (other_name, "class 'dog' has images of other names"),
        (other_size, "class 'dog' has files of other sizes"),
        (other_bytes, "class 'dog' has files of other contents"),
        (no_classes, "it has 0 classes instead of 2"),
    ],
)
def test_what_has_changed_is_named(
    pets: Path, change: Callable[[Path], None], difference: str
) -> None:
    before = known(pets)
    change(pets)
    assert changes(before, known(pets)) == difference
    # A checkpoint keeps less: enough to see that something has.
    assert changes(from_summary(summary(before)), known(pets))


def test_many_differences_are_counted() -> None:
    old = {"images": 9, "parts": [{"name": f"c{n}"} for n in range(9)], "content": "a"}
    new = old | {"parts": [{"name": f"d{n}" * 50} for n in range(9)]}
    difference = changes(old, new)
    assert difference.startswith("class 'c0' is gone; ") and len(difference) < 150
    assert difference.endswith(", and 15 more differences")


def test_the_bytes_of_all_files_are_compared_where_that_is_asked_for(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "HEAD", 8)  # those of every PNG
    before, listed = identify(ImageFolder(pets), contents=True), known(pets)
    other_bytes(pets)
    assert changes(listed, known(pets)) == ""
    after = identify(ImageFolder(pets), contents=True)
    assert changes(before, after) == "class 'dog' has files of other contents"
    # What only one side knows is not compared, and both are the same set.
    assert changes(listed, before) == "" and listed["content"] == before["content"]


def test_a_zip_is_known_by_the_checksums_of_its_members(tmp_path: Path) -> None:
    images = {f"0/{n}.png": png(colour(n)) for n in range(3)}
    index = {"labels": [[name, n % 2] for n, name in enumerate(images)]}
    one = identify(EdmZip(write_zip(tmp_path / "a.zip", images, index)))
    assert identify(EdmZip(write_zip(tmp_path / "b.zip", images, index))) == one
    images["0/2.png"] = png(colour(77))
    other = identify(EdmZip(write_zip(tmp_path / "c.zip", images, index)))
    assert changes(one, other) == "class '0' has files of other sizes"
    index["labels"][0][1] = 1
    swapped = identify(EdmZip(write_zip(tmp_path / "d.zip", images, index)))
    assert changes(other, swapped).startswith("class '0' has 1 images instead of 2")


def test_sources_without_files_are_known_by_their_fingerprint(tmp_path: Path) -> None:
    with (tmp_path / "a.npz").open("wb") as file:
        np.savez(file, np.stack([colour(n) for n in range(4)]), np.array([0, 1, 1, 1]))
    sources: list[Source] = [
        NpzImages(tmp_path / "a.npz"),
        SyntheticShapes(8, 16, 0),
        SyntheticShapes(8, 16, 1),
    ]
    npz, one, other = map(identify, sources)
    assert npz["parts"] == [{"name": "0", "images": 1}, {"name": "1", "images": 3}]
    assert one["parts"][0] == {"name": "stripes disc", "images": 2}
    assert changes(one, other) == "its images are others"
    assert summary(one)["class_names"] == list(SyntheticShapes.class_names)


def test_of_a_huge_set_the_same_files_are_looked_at_each_time(
    pets: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "SIZES", 2)  # one for each class
    looked: list[int] = []
    monkeypatch.setattr(
        ImageFolder, "file_stamp", lambda self, position: looked.append(position) or 7
    )
    assert known(pets) == known(pets) and len(looked) == 4 and len(set(looked)) == 2

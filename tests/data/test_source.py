"""A configuration opens the source that it names, or says in one line what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relay_jax.data.packed import PackedDataset
from relay_jax.data.prepare import prepare
from relay_jax.data.source import (
    SOURCES,
    ImageSource,
    Source,
    describe_source,
    draw,
    draw_balanced,
    open_source,
)
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import UserError
from tests.conftest import error_of
from tests.data.pictures import colour, dataset_keys, png, read_all, write_zip


class Grey(ImageSource):
    """A source of the user's: one grey level per image, named in config.dataset.path."""

    num_classes, class_names, resolution = 1, ("grey",), 8

    def __init__(self, path: str) -> None:
        self.levels = [int(level) for level in path.split(",")]

    def __len__(self) -> int:
        return len(self.levels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return colour(self.levels[position]), 0

    def fingerprint(self) -> str:
        return str(self.levels)


GREY = "tests.data.test_source:Grey"


@pytest.fixture
def places(tmp_path: Path) -> dict[str, str]:
    """One image of 8 px, in every layout that is a file or a folder."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "a.png").write_bytes(png(colour(7)))
    write_zip(tmp_path / "zip", {"a.png": png(colour(7))})
    with (tmp_path / "npz").open("wb") as file:
        np.savez(file, colour(7)[None])
    prepare(Grey("7"), [4, 8], tmp_path / "packed", description={}, threads=1)
    return {kind: str(tmp_path / kind) for kind in ("folder", "zip", "npz", "packed")}


@pytest.mark.parametrize("kind", ["folder", "zip", "npz", "packed"])
def test_each_kind_is_opened_by_its_own_keys(places: dict[str, str], kind: str) -> None:
    source = open_source(dataset_keys(kind, path=places[kind]), [4, 8], 0)
    assert type(source) is SOURCES[kind] and read_all(source) == [(7, 0)]
    assert source.at(4).picture(0)[1] == 0 and len(source.fingerprint()) == 64
    about = describe_source(dataset_keys(kind, path=places[kind]), 8, 0)
    # Encoded pictures may be shown in several ways.
    shown = {"exif": True, "background": [255] * 3} if kind in ("folder", "zip") else {}
    assert about == {"source": kind, "path": places[kind], **shown}


def test_the_synthetic_set_is_made_at_the_size_of_the_largest_stage() -> None:
    keys = dataset_keys("synthetic")
    source = open_source(keys, [16, 4], 3)
    np.testing.assert_array_equal(source[4][0], SyntheticShapes(16, 10, 3)[4][0])
    about = {"source": "synthetic", "size": 10, "resolution": 16, "seed": 3}
    assert list(describe_source(keys, 16, 3).items()) == list(about.items())


def test_a_class_of_the_user_needs_no_line_elsewhere() -> None:
    keys = dataset_keys(GREY, path="3,5", num_classes=1)
    source: Source = open_source(keys, [4, 8], 0)
    assert read_all(source) == [(3, 0), (5, 0)] and source.where(1) == "image 1"
    assert describe_source(keys, 8, 0) == {"source": GREY, "path": "3,5"}


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"source": "lmdb"}, "choose synthetic, folder, zip, npz, packed, tfds, or name a class"),
        ({"source": "zip", "path": "absent.zip"}, "absent.zip: no such file"),
        ({"source": "folder"}, "needs a path"),
        ({"source": "tfds"}, "needs the name"),
        ({"source": "synthetic", "size": 0}, "size >= 1"),
        ({"source": "no.module:Set"}, "cannot be imported (No module named 'no')"),
        ({"source": "relay_jax.errors:Absent"}, "cannot be imported (module"),
        ({"source": "relay_jax.errors:one_line"}, "derive it from relay_jax.data.source"),
        (
            {"source": "synthetic", "num_classes": 5},
            "has 8 classes (stripes disc, stripes square, stripes triangle ... checks square, "
            "checks triangle, checks cross), the configuration dataset.num_classes=5; set "
            "--config.dataset.num_classes=8",
        ),
        ({"source": GREY, "path": "1"}, "1 has images of 8 px, the largest stage needs 16"),
    ],
)
def test_what_is_wrong_is_one_line(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(dataset_keys(**keys), [4, 16], 0)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_the_hint_is_about_originals_and_added_to_what_is_missing(places: dict[str, str]) -> None:
    hint = "download it from example.org"
    for kind in ("folder", "zip", "npz"):
        keys = dataset_keys(kind, path="absent", hint=hint)
        assert error_of(lambda keys=keys: open_source(keys, [8], 0)).endswith(f"; {hint}")
    keys = dataset_keys("packed", path=places["packed"], hint=hint)
    assert error_of(lambda: open_source(keys, [4, 16], 0)).endswith("prepare it for this relay")
    assert error_of(lambda: open_source(keys, [2, 8], 0)).endswith("prepare it for this relay")
    assert PackedDataset(places["packed"], 8).prepared


class Sorted(Grey):
    """Nine images of three classes one after the other, of which the last has five."""

    num_classes, class_names = 3, ("a", "b", "c")

    def known_labels(self) -> np.ndarray:
        return np.array([0, 0, 1, 1, 2, 2, 2, 2, 2])


def test_a_part_of_a_set_is_drawn_and_a_longer_draw_begins_with_it() -> None:
    part = draw(100, 10, 3)
    assert len(set(part.tolist())) == 10 and sorted(part) != list(range(10))
    np.testing.assert_array_equal(draw(100, 30, 3)[:10], part)
    assert (draw(100, 10, 4) != part).any() and len(draw(4, 10, 0)) == 4


def test_a_balanced_draw_has_every_class_as_often_as_there_are_images() -> None:
    source = Sorted("1,2,3,4,5,6,7,8,9")
    positions = draw_balanced(source, 9, 0)
    assert sorted(positions.tolist()) == list(range(9))
    classes = source.known_labels()[positions]
    assert sorted(classes[:3]) == [0, 1, 2] and sorted(classes[3:6]) == [0, 1, 2]
    assert classes[6:].tolist() == [2, 2, 2]
    np.testing.assert_array_equal(draw_balanced(source, 5, 0), positions[:5])
    others = {tuple(source.known_labels()[draw_balanced(source, 3, seed)]) for seed in range(20)}
    assert len(others) > 1
    # Without labels at hand the draw is at random alone.
    np.testing.assert_array_equal(draw_balanced(Grey("1,2,3,4"), 2, 5), draw(4, 2, 5))


def make(root: Path, *files: str) -> str:
    """A folder of images, and of empty folders where a name ends in a slash."""
    for file in files:
        folder = root / file if file.endswith("/") else (root / file).parent
        folder.mkdir(parents=True, exist_ok=True)
        if not file.endswith("/"):
            (root / file).write_bytes(png(colour(1)))
    return str(root)


@pytest.mark.parametrize(
    ("files", "number", "fact", "cause", "cure"),
    [
        (
            ["train/cat/a.png", "val/cat/a.png"],
            10,
            "2 classes (train, val)",
            "names of splits, not of classes: name one of them, such as --config.dataset.path=",
            "num_classes=2",
        ),
        (["a.png"], 2, "no classes", "all images lie in one folder", "num_classes=0"),
        (
            ["ant/a.png", "bee/", "bee/x/", "cow/a.png"],
            3,
            "2 classes (ant, cow)",
            "no images that can be used are in bee",
            "num_classes=2",
        ),
        (
            [f"{n}/a.png" for n in range(12)],
            10,
            "12 classes (0, 1, 2 ... 9, 10, 11)",
            "",
            "num_classes=12",
        ),
    ],
)
def test_another_number_of_classes_is_explained_before_a_cure(
    tmp_path: Path, files: list[str], number: int, fact: str, cause: str, cure: str
) -> None:
    path = make(tmp_path, *files)
    with pytest.raises(UserError) as caught:
        open_source(dataset_keys("folder", path=path, num_classes=number), [8], 0)
    message = str(caught.value)
    places = [message.index(text) for text in (fact, f"num_classes={number}", cause, cure) if text]
    assert places == sorted(places) and len(message) < 400 and "\n" not in message


def test_a_zip_without_labels_says_where_they_may_be(tmp_path: Path) -> None:
    path = str(write_zip(tmp_path / "a.zip", {"a.png": png(colour(1))}, {"labels": None}))
    with pytest.raises(UserError, match=r"its dataset\.json holds no labels"):
        open_source(dataset_keys("zip", path=path, num_classes=2), [8], 0)
    path = str(write_zip(tmp_path / "b.zip", {"00000/img00000000.png": png(colour(1))}))
    with pytest.raises(UserError, match=r"it has no dataset\.json, which would name the classes"):
        open_source(dataset_keys("zip", path=path, num_classes=2), [8], 0)

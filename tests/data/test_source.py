"""A configuration opens the source that it names, or says in one line what is missing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from relay_jax.data.packed import PackedDataset
from relay_jax.data.prepare import prepare
from relay_jax.data.source import SOURCES, ImageSource, Source, describe_source, open_source
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
    assert describe_source(dataset_keys(kind, path=places[kind]), 8, 0) == {
        "source": kind,
        "path": places[kind],
    }


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
            "has 8 classes, the configuration dataset.num_classes=5; set "
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

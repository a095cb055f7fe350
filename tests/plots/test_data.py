"""The picture of real images shows every class by its name, and images of that class."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import settings_of
from relay_jax.data.images import ImageSource
from relay_jax.data.loader import read
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.plots.data import choose, data_figure, shown_classes
from relay_jax.plots.inputs import PlotSettings
from relay_jax.plots.plot import plot
from tests.conftest import tiny_relay
from tests.data.pictures import colour


class Unread(ImageSource):
    """Images of two classes whose labels are stored with them, the first class first."""

    num_classes, class_names, resolution = 2, ("$a", "b"), 8

    def __len__(self) -> int:
        return 40

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return colour(position), int(position >= 20)

    def fingerprint(self) -> str:
        return ""


class Unlabelled(Unread):
    num_classes, class_names = 0, ()


def test_a_row_has_images_of_its_class_drawn_from_all() -> None:
    source = SyntheticShapes(8, 800, 0)
    rows = choose(source, 0, columns=5)
    assert [row.name for row in rows][:2] == ["0 stripes disc", "1 stripes square"]
    for label, row in enumerate(rows):
        assert {position % 8 for position in row.positions} == {label} and len(row.positions) == 5
        assert max(row.positions) > 100


@pytest.mark.parametrize(
    ("source", "names"), [(Unread(), ["0 $a", "1 b"]), (Unlabelled(), ["", "", ""])]
)
def test_labels_that_are_not_at_hand_are_read(source: ImageSource, names: list[str]) -> None:
    rows = choose(source, 0, rows=3, columns=4)
    assert [row.name for row in rows] == names
    if source.num_classes:
        labels = [read(source, row.positions, 8)[1].tolist() for row in rows]
        assert labels == [[0] * len(rows[0].positions), [1] * len(rows[1].positions)]
    images = [read(source, row.positions, 8)[0] for row in rows]
    assert len(data_figure(rows, images, "two classes").axes) == sum(map(len, images))


def test_of_many_classes_the_first_and_the_last_are_among_those_shown() -> None:
    assert shown_classes(3, 12) == [0, 1, 2]
    some = shown_classes(1000, 12)
    assert len(some) == 12 and (some[0], some[-1]) == (0, 999)


def test_the_picture_and_the_description_of_the_set(tmp_path: Path) -> None:
    request = PlotSettings(names=["data"], seeds=[0])
    plot(settings_of(tiny_relay()), {}, request, tmp_path)
    numbers = json.loads((tmp_path / "data.json").read_text())
    assert numbers["images"] == 64 and len(numbers["shown"]["7 checks cross"]) == 8
    with Image.open(tmp_path / "data.png") as image:
        assert min(image.size) > 300

"""Pictures: sizes and pixels of grids and panels, loss curves from whole and half-written files."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import build
from relay_jax.data.loader import read
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.plots.finished import COLUMNS, ROWS, in_columns, real_positions
from relay_jax.plots.grids import grid, loss_curves, panels, relay_picture
from relay_jax.sampling.chain import initial_state
from relay_jax.sampling.pixels import to_uint8
from tests.conftest import tiny_relay


def images(count: int, side: int = 8) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1.2, 1, (count, side, side, 3)).astype(np.float32)


def test_a_grid_shows_every_image_enlarged_on_white() -> None:
    x = images(5)
    picture = grid(x, columns=3, side=24)
    assert picture.shape == (2 * 24 + 2, 3 * 24 + 2 * 2, 3) and picture.dtype == np.uint8
    paper = np.ones(picture.shape[:2], bool)
    for i, pixels in enumerate(to_uint8(x)):
        y, x0 = (i // 3) * 26, (i % 3) * 26
        cell = picture[y : y + 24, x0 : x0 + 24]
        np.testing.assert_array_equal(cell, np.kron(pixels, np.ones((3, 3, 1), np.uint8)))
        paper[y : y + 24, x0 : x0 + 24] = False
    assert np.all(picture[paper] == 255)  # the gaps and the empty sixth cell


@pytest.mark.parametrize(
    "resolution, side, shown", [(8, 96, 96), (64, 96, 128), (100, 96, 100), (256, 96, 256)]
)
def test_images_are_enlarged_by_whole_factors_and_never_shrunk(
    resolution: int, side: int, shown: int
) -> None:
    assert grid(images(1, resolution), columns=4, side=side).shape == (shown, 4 * shown + 6, 3)


def test_panels_stand_side_by_side_under_their_captions() -> None:
    first, second = to_uint8(images(1, 40))[0], to_uint8(images(1, 60))[0]
    picture = panels([("base", first), ("relay", second)])
    assert picture.shape == (28 + 60, 40 + 16 + 60, 3) and picture.dtype == np.uint8
    np.testing.assert_array_equal(picture[28:68, :40], first)
    np.testing.assert_array_equal(picture[28:, 56:], second)
    assert np.all(picture[68:, :40] == 255) and np.all(picture[28:, 40:56] == 255)
    for columns in (slice(0, 40), slice(56, 116)):
        assert picture[:28, columns].min() < 100  # ink
    assert np.any(picture[:28] != panels([("", first), ("relay", second)])[:28])


def test_a_relay_is_shown_with_its_hand_off_and_a_row_for_each_class() -> None:
    stages, seeds = build(tiny_relay()), np.arange(12)
    classes = np.array([1, 0, 1, 0, 2, 1, 0, 1, 0, 1, 2, 2])  # class 2 has too few for a row
    rows = [1, 3, 6, 8, 0, 2, 5, 7]
    samples = {"base": images(12, 8), "relay": images(12, 16)}
    picture = relay_picture(stages, samples, seeds, classes)
    start = np.asarray(initial_state(stages[1], seeds[rows], samples["base"][rows]))
    shown = [grid(x, 4, side=48) for x in (samples["base"][rows], start, samples["relay"][rows])]
    captions = ("base, 8 px", "hand-off to relay", "relay, 16 px")
    np.testing.assert_array_equal(picture, panels(list(zip(captions, shown, strict=True))))


def metrics(folder: Path, losses: list[float], end: str = "") -> Path:
    folder.mkdir()
    lines = [json.dumps({"images": 64 * (n + 1), "loss": loss}) for n, loss in enumerate(losses)]
    (folder / "metrics.jsonl").write_text("".join(line + "\n" for line in lines) + end)
    return folder / "metrics.jsonl"


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image)


def test_loss_curves_show_the_losses_and_forgive_half_a_line(tmp_path: Path) -> None:
    losses = [1.0, 0.5, 0.3, 0.28]
    whole, half = (
        metrics(tmp_path / "a", losses),
        metrics(tmp_path / "b", losses, end='{"images": 320, "lo'),
    )
    skipped = metrics(tmp_path / "c", losses, end='{"images": 320, "steps_skipped": 9}\n')
    other = metrics(tmp_path / "d", [*losses, 0.2])
    pictures = []
    for name, path in (("whole", whole), ("half", half), ("skipped", skipped), ("other", other)):
        loss_curves([("base", path)], tmp_path / f"{name}.png")
        pictures.append(pixels(tmp_path / f"{name}.png"))
    assert pictures[0].shape == (400, 550, 3)
    blue = np.all(np.abs(pictures[0].astype(int) - (0x1F, 0x77, 0xB4)) < 20, axis=-1)
    assert blue.any(axis=0).sum() > 300  # the curve crosses the panel
    np.testing.assert_array_equal(pictures[1], pictures[0])
    np.testing.assert_array_equal(pictures[2], pictures[0])
    assert np.any(pictures[3] != pictures[0])


def test_each_stage_has_a_panel_even_before_its_first_line(tmp_path: Path) -> None:
    loss_curves(
        [("base", metrics(tmp_path / "a", [1.0, 0.5])), ("relay", tmp_path / "none.jsonl")],
        tmp_path / "x.png",
    )
    assert pixels(tmp_path / "x.png").shape == (400, 1100, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "x.png"]


class Stored(SyntheticShapes):
    """Labels that are known of images that were read alone."""

    def known_labels(self) -> None:  # type: ignore[override]
        return None


@pytest.mark.parametrize("source", [SyntheticShapes(8, 400, 0), Stored(8, 400, 0)])
def test_real_images_are_as_many_and_of_the_same_classes(source: SyntheticShapes) -> None:
    last = build(tiny_relay())[-1]
    for count in (12, 100):
        classes = np.arange(count) % 8
        wanted = classes[in_columns(classes, 8)]
        assert len(wanted) == min(count, ROWS * COLUMNS)
        positions = real_positions(source, wanted, last, seed=0)
        np.testing.assert_array_equal(read(source, positions, 8)[1], wanted)
        assert len(set(positions)) == len(positions)
    # A class of which there are not enough is filled up with others.
    few = SyntheticShapes(8, 24, 0)
    positions = real_positions(few, np.zeros(20, int), last, seed=0)
    assert len(set(positions)) == 20 and read(few, positions[:1], 8)[1] == [0]
    assert len(real_positions(few, np.zeros(32, int), last, seed=0)) == 24

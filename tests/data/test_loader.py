"""A batch depends on the seed and its number alone: not on threads, processes, hosts or
interruptions."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import flags
from PIL import Image

from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import center_crop_resize
from relay_jax.data.loader import Batch, Loader, Stream, read
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import DataError
from tests.conftest import error_of

RESOLUTION = 8
SET = SyntheticShapes(16, 22, 1)
STREAM = Stream(resolution=RESOLUTION, batch_size=6, seed=4, x_flip=True)


def batches(count: int, **options: Any) -> list[Batch]:
    """The first batches of SET; options are those of the stream and of the loader."""
    changes = {key: options.pop(key) for key in STREAM.__dict__ if key in options}
    with Loader(SET, replace(STREAM, **changes), **options) as loader:
        return [next(loader) for _ in range(count)]


def assert_same(one: list[Batch], other: list[Batch]) -> None:
    assert len(one) == len(other)
    for a, b in zip(one, other, strict=True):
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["label"], b["label"])


def positions(images: np.ndarray) -> list[tuple[int, bool]]:
    """For each image the position in SET it shows, and whether it is mirrored."""
    places = {}
    for position in range(len(SET)):
        image = center_crop_resize(SET[position][0], RESOLUTION)
        places[image.tobytes()] = (position, False)
        places[image[:, ::-1].tobytes()] = (position, True)
    assert len(places) == 2 * len(SET)
    return [places[image.tobytes()] for image in images]


def images_of(taken: list[Batch]) -> np.ndarray:
    return np.concatenate([batch["image"] for batch in taken])


def test_a_batch_is_uint8_images_and_int32_labels() -> None:
    (batch,) = batches(1)
    assert batch["image"].shape == (6, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["label"].shape == (6,) and batch["label"].dtype == np.int32
    assert [position % 8 for position, _ in positions(batch["image"])] == batch["label"].tolist()


@pytest.mark.parametrize("threads", [0, 1, 2, 3])
def test_a_resumed_loader_gives_the_batches_of_an_uninterrupted_one(threads: int) -> None:
    whole = batches(9)
    loader = Loader(SET, STREAM, threads=threads)
    first = [next(loader) for _ in range(5)]
    state = json.loads(json.dumps(loader.state))
    loader.close()
    assert state == {"next_batch": 5, "seed": 4, "length": 22, "batch_size": 6, "x_flip": True}
    assert_same(first + batches(4, start=state["next_batch"], threads=threads), whole)


def test_worker_processes_give_the_same_batches_and_the_same_errors(tmp_path: Path) -> None:
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
    assert_same(batches(3, start=4, workers=1, threads=1, rows=range(6)), batches(7)[4:])
    (tmp_path / "bad.png").write_bytes(b"junk")
    with (
        Loader(ImageFolder(tmp_path), replace(STREAM, batch_size=2), workers=1) as loader,
        pytest.raises(
            DataError,
            match=r"^\S*bad\.png: cannot decode this image \(not an image\); replace or remove it$",
        ),
    ):
        next(loader)


@pytest.mark.parametrize("rows", [[0, 1, 2], [1, 4], [5], [2, 3, 4, 5], [0, 1, 2, 3, 4, 5]])
@pytest.mark.parametrize("threads", [0, 2])
def test_a_host_loads_its_rows_of_every_batch(rows: list[int], threads: int) -> None:
    whole = batches(9)
    for n, batch in enumerate(batches(6, rows=rows, start=3, threads=threads), start=3):
        np.testing.assert_array_equal(batch["image"], whole[n]["image"][rows])
        np.testing.assert_array_equal(batch["label"], whole[n]["label"][rows])


def test_a_host_reads_no_image_of_another(tmp_path: Path) -> None:
    """Every other image is damaged, and in rows of another host."""
    for n in range(6):
        Image.fromarray(SET[n][0]).save(tmp_path / f"{n}.png")
    first = [position for position, _ in positions(batches_of(tmp_path)["image"])]
    for row, position in enumerate(first):
        if row % 2:
            (tmp_path / f"{position}.png").write_bytes(b"junk")
    assert [
        position for position, _ in positions(batches_of(tmp_path, rows=[0, 2, 4])["image"])
    ] == first[::2]
    assert "cannot decode" in error_of(lambda: batches_of(tmp_path, rows=[0, 1]))


def batches_of(folder: Path, **options: object) -> Batch:
    """The first batch of six images in a folder."""
    with Loader(ImageFolder(folder), STREAM, **options) as loader:
        return next(loader)


def test_each_epoch_covers_every_position_once_in_a_new_order() -> None:
    order = [
        position for position, _ in positions(images_of(batches(11)))
    ]  # 66 images: three epochs of 22
    epochs = [order[n : n + 22] for n in (0, 22, 44)]
    assert all(sorted(epoch) == list(range(22)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(22))


def test_the_order_depends_on_the_seed_and_not_on_flipping() -> None:
    def order(**options: object) -> list[int]:
        return [position for position, _ in positions(images_of(batches(4, **options)))]

    assert order() == order(x_flip=False)
    assert order() != order(seed=5)


def test_half_of_the_images_are_flipped_and_anew_in_each_epoch() -> None:
    taken = positions(images_of(batches(44)))  # twelve epochs
    mirrored = np.array([flip for _, flip in taken])
    assert 0.35 < mirrored.mean() < 0.65
    by_position = [{flip for shown, flip in taken if shown == position} for position in range(22)]
    assert all(seen == {False, True} for seen in by_position)
    assert not any(flip for _, flip in positions(images_of(batches(11, x_flip=False))))


def test_a_batch_may_be_larger_than_the_set() -> None:
    (batch,) = batches(1, batch_size=50)
    shown = [position for position, _ in positions(batch["image"])]
    assert np.bincount(shown[:44]).tolist() == [2] * 22


def test_a_set_of_one_image_is_enough() -> None:
    with Loader(SyntheticShapes(8, 1, 0), STREAM) as loader:
        assert next(loader)["image"].shape == (6, 8, 8, 3)


@pytest.mark.parametrize("threads", [0, 2])
def test_a_damaged_image_comes_out_of_next_as_one_line_and_closes_the_loader(
    tmp_path: Path, threads: int
) -> None:
    for n in range(5):
        Image.fromarray(SET[n][0]).save(tmp_path / f"{n}.png")
    (tmp_path / "3.png").write_bytes(b"junk")
    loader = Loader(ImageFolder(tmp_path), replace(STREAM, batch_size=5), threads=threads)
    with pytest.raises(
        DataError,
        match=r"^\S*3\.png: cannot decode this image \(not an image\); replace or remove it$",
    ):
        next(loader)
    assert loader.state["next_batch"] == 0
    with pytest.raises(ValueError, match="closed"):
        next(loader)
    loader.close()


@pytest.mark.parametrize(
    "options",
    [
        {"batch_size": 0},
        {"rows": []},
        {"rows": [6]},
        {"rows": [-1, 0]},
        {"start": -1},
        {"threads": -1},
        {"seed": -1},
        {"seed": 2**32},
    ],
)
def test_impossible_arguments_are_a_value_error(options: dict[str, int]) -> None:
    with pytest.raises(ValueError):
        batches(1, **options)


def test_read_gives_the_named_positions_in_order() -> None:
    images, labels = read(SET, [5, 0, 5], RESOLUTION)
    assert images.dtype == np.uint8 and labels.dtype == np.int32
    assert positions(images) == [(5, False), (0, False), (5, False)]
    assert labels.tolist() == [5, 0, 5]
    assert read(SET, [], RESOLUTION)[0].shape == (0, 8, 8, 3)

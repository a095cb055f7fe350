"""Numbered images: seed lists, paths, what is missing, reading back."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import ConfigError
from relay_jax.sampling.pixels import edit_pixels, to_uint8
from relay_jax.sampling.writer import image_path, missing, parse_seeds, read_images, write_images


def images(count: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


# Seeds

@pytest.mark.parametrize("text, seeds", [
    ("0-3", [0, 1, 2, 3]), ("7", [7]), ("5-5", [5]), ("1,5,10-12", [1, 5, 10, 11, 12]), (" 4 , 2 ", [4, 2]),
    ("3,1-3,3", [3, 1, 2]), ("007", [7]), ("4294967294-4294967295", [2**32 - 2, 2**32 - 1])])
def test_seed_lists_are_read_in_order_without_repeats(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize("text, part", [
    ("", "''"), ("a", "'a'"), ("1,,2", "''"), ("1-", "'1-'"), ("-3", "'-3'"), ("1-2-3", "'1-2-3'"), ("1.5", "'1.5'"),
    ("0-x", "'0-x'"), ("0..3", "'0..3'"), ("5-2", "'5-2'"), ("4294967296", "'4294967296'"),
    ("0-3,4294967290-4294967296", "'4294967290-4294967296'")])
def test_bad_seed_lists_are_refused_with_one_line_that_names_the_part(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_seeds(text)
    message = str(error.value)
    assert f"--seeds={text}" in message and part in message and "\n" not in message


# Files

@pytest.mark.parametrize("seed, name", [(12, "000000/000012.png"), (999, "000000/000999.png"),
                                        (1000, "001000/001000.png"), (59_999, "059000/059999.png"),
                                        (1_234_567, "1234000/1234567.png")])
def test_images_lie_in_folders_of_a_thousand_seeds(seed: int, name: str) -> None:
    assert image_path(Path("out"), seed) == Path("out") / name


def test_only_what_is_missing_is_made_and_nothing_else_is_left(tmp_path: Path) -> None:
    x = images(4)
    seeds = [2, 0, 1000, 12]
    assert missing(tmp_path / "new", seeds) == seeds
    write_images(tmp_path, [0, 1000], x[:2])
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in tmp_path.rglob("*.png")}
    left = missing(tmp_path, seeds)
    assert left == [2, 12]
    write_images(tmp_path, left, x[2:])
    assert missing(tmp_path, seeds) == []
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in before} == before
    files = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert files == [os.path.join(*parts) for parts in (("000000", "000000.png"), ("000000", "000002.png"),
                                                        ("000000", "000012.png"), ("001000", "001000.png"))]


def test_a_file_is_the_lossless_image_of_its_seed(tmp_path: Path) -> None:
    x = images(3)
    write_images(tmp_path, [5, 3, 4], x)
    for seed, image in zip([5, 3, 4], x, strict=True):
        with Image.open(image_path(tmp_path, seed)) as file:
            assert file.format == "PNG" and file.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(file), to_uint8(image))


def test_as_many_seeds_as_images_are_needed(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        write_images(tmp_path, [0, 1], images(3))


def test_reading_back_is_exact_to_half_a_level_and_in_the_order_asked_for(tmp_path: Path) -> None:
    x = images(3)
    write_images(tmp_path, [0, 1, 2], x)
    got = read_images(tmp_path, [2, 0, 1], 6)
    assert got.dtype == np.float32
    assert np.abs(got - x[[2, 0, 1]]).max() <= 0.5 / 127.5 + 1e-6
    np.testing.assert_array_equal(to_uint8(got), to_uint8(x[[2, 0, 1]]))


def test_grey_images_are_read_as_three_equal_channels(tmp_path: Path) -> None:
    path = image_path(tmp_path, 0)
    path.parent.mkdir()
    Image.fromarray(np.full((6, 6), 51, np.uint8)).save(path)
    np.testing.assert_allclose(read_images(tmp_path, [0], 6), np.full((1, 6, 6, 3), -0.6), atol=1e-6)


def test_unusable_images_are_refused_with_one_line_that_names_the_file(tmp_path: Path) -> None:
    write_images(tmp_path, [0, 1], images(2))
    image_path(tmp_path, 1).write_bytes(image_path(tmp_path, 1).read_bytes()[:60])
    image_path(tmp_path, 2).write_text("no image")
    for seed, resolution, reason in ((0, 8, "6 x 6 pixels.*8 x 8"), (1, 6, "cannot be decoded"),
                                     (2, 6, "cannot be decoded"), (3, 6, "missing")):
        with pytest.raises(ConfigError, match=reason) as error:
            read_images(tmp_path, [seed], resolution)
        assert str(image_path(tmp_path, seed)) in str(error.value) and "\n" not in str(error.value)


def test_edited_pixels_are_written_where_asked_for(tmp_path: Path) -> None:
    write_images(tmp_path, [5], images(1), "imagenet")
    with Image.open(image_path(tmp_path, 5)) as file:
        np.testing.assert_array_equal(np.asarray(file), edit_pixels(to_uint8(images(1)), "imagenet")[0])

"""Pixels: clipping and truncation, and the official colour edits against their formulas."""

import jax
import numpy as np
import pytest

from relay_jax.sampling.pixels import PIXEL_EDITS, edit_pixels, to_uint8, to_uint8_on_device


def pixels(
    count: int = 3, height: int = 6, width: int = 8, channels: int = 3, seed: int = 0
) -> np.ndarray:
    """Random colours, black and white among them; every image has its own mean."""
    x = np.random.default_rng(seed).integers(0, 256, (count, height, width, channels))
    x[:, 0, 0], x[:, 0, 1] = 0, 255
    return (x // np.arange(1, count + 1)[:, None, None, None]).astype(np.uint8)


def grey(x: np.ndarray) -> np.ndarray:
    """ITU-R 601 luma in 16-bit fixed point; uint8 [n, h, w, 3] -> int [n, h, w, 1]."""
    r, g, b = np.moveaxis(x.astype(np.int64), -1, 0)
    return ((19595 * r + 38470 * g + 7471 * b + 32768) >> 16)[..., None]


def blend(low: np.ndarray | int, x: np.ndarray, factor: float) -> np.ndarray:
    low, x = np.asarray(low, np.float32), x.astype(np.float32)
    return np.clip(low + np.float32(factor) * (x - low), 0, 255).astype(np.uint8)


def by_hand(x: np.ndarray, edit: str) -> np.ndarray:
    if edit == "imagenet":
        return blend(0, x, 1.06)
    if edit == "celebahq":
        mean = np.floor(grey(x).mean(axis=(1, 2, 3)) + 0.5)
        x = blend(0, blend(mean[:, None, None, None], x, 0.9), 1.05)
        return blend(grey(x), x, 0.99)
    return x


# Bytes.


@pytest.mark.parametrize(
    "value, byte",
    [
        (-1, 0),
        (1, 255),
        (0, 128),
        (-5, 0),
        (5, 255),
        (-1.01, 0),
        (1.01, 255),
        (0.9 / 127.5, 128),
        (1.1 / 127.5, 129),
        (-0.1 / 127.5, 127),
    ],
)
def test_pixels_are_clipped_and_truncated_not_rounded(value: float, byte: int) -> None:
    got = to_uint8(np.full((1, 2, 2, 3), value, np.float32))
    assert got.dtype == np.uint8 and got.shape == (1, 2, 2, 3)
    assert np.all(got == byte)


def test_every_byte_survives_its_own_float() -> None:
    levels = np.arange(256, dtype=np.uint8)
    np.testing.assert_array_equal(to_uint8(levels.astype(np.float32) / 127.5 - 1), levels)


def test_devices_make_the_same_bytes_to_the_last_one() -> None:
    """Around every step of `to_uint8`, where a sum rounded once instead of twice gives another
    level."""
    on_device = jax.jit(to_uint8_on_device)
    step = np.float32((np.arange(1, 256) - 128) / 127.5)
    near = step.view(np.int32)[:, None] + np.arange(-40, 41, dtype=np.int32)
    x = np.concatenate(
        [
            near.view(np.float32).ravel(),
            np.random.default_rng(0).uniform(-1.3, 1.3, 10**6),
            [-np.inf, np.inf, 0.0, -0.0, -3e-8, -1e-8, 1e30, -1e30],
        ]
    ).astype(np.float32)
    x = np.resize(x[~np.isnan(x)], (4, len(x) // 48, 4, 3))
    assert len(np.unique(to_uint8(x))) == 256
    got = on_device(x)
    assert got.dtype == np.uint8
    np.testing.assert_array_equal(got, to_uint8(x))


# Edits.


def test_the_edits_are_the_official_ones_and_none() -> None:
    assert PIXEL_EDITS == ("none", "imagenet", "celebahq")


@pytest.mark.parametrize("edit", PIXEL_EDITS)
def test_edits_equal_their_formulas_to_the_bit(edit: str) -> None:
    x = pixels(8, 40, 56)
    before = x.copy()
    got = edit_pixels(x, edit)
    assert got.dtype == np.uint8 and got.shape == x.shape
    np.testing.assert_array_equal(got, by_hand(x, edit))
    np.testing.assert_array_equal(x, before)
    assert (edit == "none") == np.array_equal(got, x)


@pytest.mark.parametrize("edit", PIXEL_EDITS)
def test_a_grey_image_is_edited_as_three_equal_channels(edit: str) -> None:
    x = pixels(channels=1)
    got = edit_pixels(x, edit)
    assert got.shape == x.shape
    np.testing.assert_array_equal(got.repeat(3, axis=-1), edit_pixels(x.repeat(3, axis=-1), edit))


@pytest.mark.parametrize("edit", PIXEL_EDITS)
def test_every_image_is_edited_by_itself(edit: str) -> None:
    x = pixels()
    np.testing.assert_array_equal(
        np.concatenate([edit_pixels(image[None], edit) for image in x]), edit_pixels(x, edit)
    )


@pytest.mark.parametrize("edit", PIXEL_EDITS)
def test_no_images_stay_no_images(edit: str) -> None:
    assert edit_pixels(np.zeros((0, 4, 4, 3), np.uint8), edit).shape == (0, 4, 4, 3)


@pytest.mark.parametrize("edit", ["ImageNet", "", "bright"])
def test_an_unknown_edit_is_refused_with_the_known_ones(edit: str) -> None:
    with pytest.raises(
        ValueError, match=rf"unknown pixel_edit '{edit}'; there are none, imagenet, celebahq"
    ):
        edit_pixels(pixels(), edit)


@pytest.mark.parametrize(
    "bad",
    [
        np.zeros((2, 4, 4, 3), np.float32),
        np.zeros((4, 4, 3), np.uint8),
        np.zeros((2, 4, 4, 4), np.uint8),
    ],
)
def test_other_types_and_shapes_are_refused(bad: np.ndarray) -> None:
    with pytest.raises(ValueError, match="pixels must be uint8"):
        edit_pixels(bad, "imagenet")

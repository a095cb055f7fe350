"""Known answers for the pixel operations between a source and a batch."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import center_crop_resize, flip_x, to_float
from relay_jax.data.synthetic import SyntheticShapes


def noise(height: int, width: int) -> np.ndarray:
    return np.random.default_rng([height, width]).integers(0, 256, (height, width, 3), np.uint8)


def adm_reference(image: np.ndarray, size: int) -> np.ndarray:
    """`center_crop_arr` of ADM's image_datasets.py, as published."""
    picture = Image.fromarray(image)
    while min(*picture.size) >= 2 * size:
        picture = picture.resize(tuple(x // 2 for x in picture.size), resample=Image.Resampling.BOX)
    scale = size / min(*picture.size)
    picture = picture.resize(
        tuple(round(x * scale) for x in picture.size), resample=Image.Resampling.BICUBIC
    )
    array = np.array(picture)
    y, x = (array.shape[0] - size) // 2, (array.shape[1] - size) // 2
    return array[y : y + size, x : x + size]


def test_an_image_that_fits_is_returned_unchanged() -> None:
    image = noise(32, 32)
    assert center_crop_resize(image, 32) is image


@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_power_of_two_reduction_is_a_box_average(factor: int) -> None:
    image = noise(64, 64)
    size = 64 // factor
    average = image.reshape(size, factor, size, factor, 3).mean((1, 3))
    error = center_crop_resize(image, size) - average
    # Pillow rounds halves up after each axis: from 0 to 1 levels for each halving.
    halvings = np.log2(factor)
    assert error.min() >= 0 and error.max() <= halvings
    assert error.mean() == pytest.approx(0.5 * halvings, abs=0.05)
    smooth = np.repeat(np.repeat(noise(size, size), factor, 0), factor, 1)
    np.testing.assert_array_equal(center_crop_resize(smooth, size), smooth[::factor, ::factor])


@pytest.mark.parametrize(
    ("height", "width"), [(375, 500), (500, 333), (70, 64), (63, 40), (64, 1000), (20, 31)]
)
def test_the_result_equals_the_published_adm_procedure(height: int, width: int) -> None:
    image = noise(height, width)
    result = center_crop_resize(image, 64)
    assert result.shape == (64, 64, 3) and result.dtype == np.uint8
    np.testing.assert_array_equal(result, adm_reference(image, 64))


def test_the_crop_keeps_the_centre_of_the_longer_side() -> None:
    image = np.zeros((8, 24, 3), np.uint8)
    image[:, 8:16] = 200
    assert (center_crop_resize(image, 8) == 200).all()


def test_flipping_mirrors_columns_and_twice_is_the_identity() -> None:
    image = noise(4, 6)
    np.testing.assert_array_equal(flip_x(image)[:, 0], image[:, -1])
    np.testing.assert_array_equal(flip_x(flip_x(image)), image)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "CMYK", "RGBA"])
@pytest.mark.parametrize("size", [(50, 37), (16, 16), (40, 90)])
def test_a_picture_is_cropped_as_the_array_of_it(
    tmp_path: Path, mode: str, size: tuple[int, int]
) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (size[1], size[0], 3), np.uint8)
    name = "a.jpg" if mode == "CMYK" else "a.png"
    Image.fromarray(pixels).convert(mode).save(tmp_path / name)
    source = ImageFolder(tmp_path)
    picture, label = source.picture(0)
    assert isinstance(picture, Image.Image) and label == 0
    cropped = center_crop_resize(picture, 16)
    assert cropped.shape == (16, 16, 3) and cropped.dtype == np.uint8
    np.testing.assert_array_equal(cropped, center_crop_resize(source[0][0], 16))


def test_a_source_of_arrays_gives_arrays() -> None:
    source = SyntheticShapes(16, 3, 0)
    np.testing.assert_array_equal(source.picture(2)[0], source[2][0])
    assert source.where(2) == "image 2" and source.at(8) is source


def test_bytes_to_floats_span_minus_one_to_one() -> None:
    pixels = to_float(np.array([0, 127, 255], np.uint8))
    np.testing.assert_allclose(pixels, [-1, -1 / 255, 1], atol=1e-7)
    assert pixels.dtype == np.float32

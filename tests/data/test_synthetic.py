"""The synthetic set: pure in (seed, position), and made of what each stage of a relay can see."""

import numpy as np
import pytest

from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.runtime.files import digest
from tests.conftest import error_of


def test_a_synthetic_image_is_a_pure_function_of_seed_and_position() -> None:
    one, other = SyntheticShapes(32, 100, 5), SyntheticShapes(32, 1000, 5)
    for position in (99, 0, 42):
        image, label = one[position]
        assert image.shape == (32, 32, 3) and image.dtype == np.uint8 and label == position % 8
        np.testing.assert_array_equal(image, other[position][0])


def test_synthetic_images_differ_between_positions_and_seeds() -> None:
    images = {SyntheticShapes(16, 64, seed)[i][0].tobytes() for seed in (0, 1) for i in range(64)}
    assert len(images) == 128


def test_synthetic_classes_are_named_and_balanced() -> None:
    source = SyntheticShapes(8, 80, 0)
    assert source.num_classes == 8 == len(set(source.class_names))
    assert np.bincount([source[i][1] for i in range(80)]).tolist() == [10] * 8
    assert source.class_names[0] == "stripes disc" and source.class_names[7] == "checks cross"


@pytest.mark.parametrize("label", range(8))
def test_a_box_average_over_four_pixels_erases_the_texture(label: int) -> None:
    """The texture is a strong wave at 32 px; what the box leaves of it is a few levels of 255."""
    fine, coarse = [], []
    source = SyntheticShapes(32, 400, 3)
    for position in range(label, 400, 8):
        image = source[position][0].astype(np.float64)
        boxes = image.reshape(8, 4, 8, 4, 3)
        mean = boxes.mean((1, 3))
        # Boxes inside the shape: their four neighbours are of the shape too, so that they look
        # alike when averaged.
        for y in range(1, 7):
            for x in range(1, 7):
                around = mean[[y - 1, y + 1, y, y], [x, x, x - 1, x + 1]]
                # The shape is saturated, the background pastel.
                if (np.ptp(around, axis=1) > 90).all() and np.ptp(mean[y, x]) > 90:
                    fine.append(boxes[y, :, x].std((0, 1)).max())
                    coarse.append(np.abs(mean[y, x] - around.mean(0)).max())
    assert len(fine) > 20
    assert np.mean(fine) > 40
    assert np.mean(coarse) < 6


def test_stripes_and_checks_have_a_period_of_four_pixels() -> None:
    for label, expected in (
        (0, 1),
        (4, 2),
    ):  # a disc with stripes: one line of the spectrum; with checks: two
        image = SyntheticShapes(64, 8, 1)[label][0].astype(np.float64).mean(-1)
        spectrum = np.abs(np.fft.fft2(image))[:33]
        frequency = np.hypot(np.fft.fftfreq(64)[:33, None], np.fft.fftfreq(64)[None])
        spectrum[frequency < 0.15] = 0
        top = frequency[np.unravel_index(spectrum.argmax(), spectrum.shape)]
        assert top == pytest.approx(0.25 * np.sqrt(expected), abs=0.03)


def test_the_shape_stands_out_from_the_background_in_brightness() -> None:
    source = SyntheticShapes(8 * 4, 64, 9)
    for position in range(64):
        mean = source[position][0].reshape(8, 4, 8, 4, 3).astype(np.float64).mean((1, 3))
        brightness = mean.mean(-1)
        assert brightness.max() - brightness.min() > 60


def test_a_synthetic_position_out_of_range_is_an_index_error() -> None:
    for position in (-1, 10):
        with pytest.raises(IndexError):
            SyntheticShapes(8, 10, 0)[position]


def test_the_fingerprint_follows_from_every_parameter() -> None:
    sets = [SyntheticShapes(*values) for values in ((8, 9, 0), (8, 8, 0), (4, 9, 0), (8, 9, 1))]
    assert len({source.fingerprint() for source in sets}) == 4
    about = {"source": "synthetic", "size": 9, "resolution": 8, "seed": 0}
    assert sets[0].fingerprint() == digest([about, 9])


def test_impossible_arguments_are_one_line() -> None:
    assert "resolution, size >= 1" in error_of(lambda: SyntheticShapes(16, 0, 0))

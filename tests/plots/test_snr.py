"""Signal over noise at two resolutions, against closed forms."""

import math

import numpy as np

from relay_jax.diffusion.dct import dct_matrix
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.plots.snr import ratio, resolution_ratios
from tests.plots.images import box, white


def test_white_images_in_white_noise_have_a_flat_ratio() -> None:
    curve = ratio("", 3 * white(64, 32, 32, 3), np.full((32, 32), 0.25))
    np.testing.assert_allclose(curve.decibels, 10 * math.log10(9 / 0.25), atol=0.6)
    np.testing.assert_allclose(curve.decibels[3:], 10 * math.log10(9 / 0.25), atol=0.2)


def test_low_frequencies_are_patch_squared_stronger_in_white_noise_and_not_in_block_noise() -> None:
    c = dct_matrix(256)[:5].astype(np.float32)
    high = np.einsum("ky,nklc,lx->nyxc", c, white(4, 5, 5, 3), c, optimize=True)
    noise = RelayProcess(patch=4, block_noise_scale=0.15).noise_power(256)
    curves = resolution_ratios(box(high, 4), high, sigma=0.7, stage_noise=noise)
    low, white_high, block_high, relay_high = (curve.decibels[:3] for curve in curves)
    np.testing.assert_allclose(white_high - low, 10 * math.log10(16), atol=0.02)
    np.testing.assert_allclose(block_high - low, 0, atol=0.2)
    expected = -10 * math.log10(1 + 0.15**2 * 16)
    np.testing.assert_allclose(relay_high - white_high, expected, atol=0.05)
    np.testing.assert_allclose(curves[0].frequency[:3], curves[1].frequency[:3])


def test_a_stage_of_white_noise_has_no_curve_of_it_twice() -> None:
    images, noise = white(2, 8, 8, 3), EdmProcess().noise_power(8)
    names = [curve.name for curve in resolution_ratios(box(images, 2), images, 1.0, noise)]
    assert names == ["4 px, white noise", "8 px, white noise", "8 px, block noise of 2 px"]

"""Powers by DCT frequency and their bands, against closed forms."""

import math

import numpy as np
import pytest

from relay_jax.diffusion.dct import dct_matrix
from relay_jax.plots.spectra import dct_power, frequencies, radial_bands, square_bands
from tests.plots.images import box


def test_a_wave_keeps_its_frequency_and_is_patch_times_stronger_at_the_higher_resolution() -> None:
    n, p, (row, column) = 32, 4, (1, 3)
    c = dct_matrix(n)
    high = (c[row][:, None] * c[column][None, :])[None, :, :, None]
    # A cosine averaged over p pixels: Dirichlet's kernel.
    averaged = [
        math.sin(math.pi * k * p / (2 * n)) / (p * math.sin(math.pi * k / (2 * n)))
        for k in (row, column)
    ]
    power_high, power_low = dct_power(high), dct_power(box(high, p))
    assert power_high[row, column] == pytest.approx(1, rel=1e-5)
    assert power_high.sum() == pytest.approx(1, rel=1e-5)
    assert power_low[row, column] == pytest.approx(math.prod(averaged) ** 2 / p**2, rel=1e-5)
    assert frequencies(n)[row, column] == frequencies(n // p)[row, column] == math.sqrt(10) / 2


def test_bands_hold_every_coefficient_once() -> None:
    for bands, outside in ((radial_bands(16), 1), (square_bands(16), 0)):
        assert bands.count.min() > 0
        assert bands.count.sum() == 256 - outside == np.sum(bands.label >= 0)
        means = bands.mean(bands.label.astype(float))
        np.testing.assert_allclose(means, np.arange(len(bands.count)))
    assert radial_bands(16).label[0, 0] == -1
    label = square_bands(16).label
    assert np.sum(label == label[0, 0]) == 1 and label[9, 0] != label[0, 9] != label[6, 6]

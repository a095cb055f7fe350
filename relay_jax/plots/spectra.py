"""Power of images by DCT frequency, in bands; for the pictures `snr` and `handoff`.

With C the orthonormal DCT-II matrix over a whole image of h x w pixels and U = C X C^T:
(1)  f[k, l] = sqrt((k w/h)^2 + l^2) / 2    cycles per image width: equal structure has equal f at
                                            every resolution
(2)  SNR(f) = mean |U|^2 / mean |noise|^2   over the coefficients of a band around f, images and
                                            channels (RDM, section 2.2)

Repeating pixels p x p multiplies U by p at low f and leaves the power of
white noise as it is: the SNR grows by p^2 (12 dB for p = 4). The power of
block noise is about p^2 there, which takes it back
(diffusion/block_noise.py, equation 4).
"""

from dataclasses import dataclass

import numpy as np
from scipy import fft

from relay_jax.resolution import Resolution, height_width

BANDS_PER_OCTAVE = 3
BATCH = 32  # images transformed at a time


def _lines(resolution: Resolution) -> tuple[np.ndarray, np.ndarray]:
    """Vertical and horizontal frequencies, [h] and [w], cycles per image width."""
    height, width = height_width(resolution)
    return np.arange(height) / 2 * (width / height), np.arange(width) / 2


def frequencies(resolution: Resolution) -> np.ndarray:
    """Equation (1): float64 [h, w], cycles per image width."""
    vertical, horizontal = _lines(resolution)
    return np.hypot(vertical[:, None], horizontal[None, :])


def dct_power(images: np.ndarray) -> np.ndarray:
    """Mean |U|^2 over images and channels. images: [n, h, w, c]. Returns float64 [h, w]."""
    total = np.zeros(images.shape[1:3])
    # Transformed in float32 and in parts, as coefficients of
    # all images at once would take twice the memory of the
    # images; summed in float64, as high frequencies are a
    # millionth of low ones.
    for start in range(0, len(images), BATCH):
        part = np.asarray(images[start : start + BATCH], np.float32)
        coefficients = fft.dctn(part, axes=(1, 2), norm="ortho")
        total += np.square(coefficients, dtype=np.float64).sum(axis=(0, 3))
    return total / (len(images) * images.shape[-1])


@dataclass(frozen=True)
class Bands:
    """Groups of the coefficients of h x w images.

    label: int [h, w], -1 outside all; count: coefficients of each.
    """

    label: np.ndarray
    count: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of values [h, w] over each band, [bands]."""
        inside = self.label >= 0
        return np.bincount(self.label[inside], values[inside], len(self.count)) / self.count


def _numbered(label: np.ndarray) -> Bands:
    """Bands of equal label, numbered in rising order without those that hold nothing."""
    present, dense = np.unique(label, return_inverse=True)
    dense = dense.reshape(label.shape) - (present[0] < 0)
    return Bands(dense, np.bincount(dense[dense >= 0]))


def _octave(frequency: np.ndarray) -> np.ndarray:
    """Which logarithmic band a frequency lies in, -1 for frequency 0. The same edges at every
    resolution."""
    with np.errstate(divide="ignore"):
        position = np.floor(BANDS_PER_OCTAVE * np.log2(frequency / 0.5) + 0.5)
    # The first band holds all below 0.79, which is three
    # coefficients: one alone says little.
    return np.where(frequency > 0, np.maximum(position, 2), -1).astype(int)


def radial_bands(resolution: Resolution) -> Bands:
    """Rings of equal f, without f = 0."""
    return _numbered(_octave(frequencies(resolution)))


def square_bands(resolution: Resolution) -> Bands:
    """Bands of equal vertical and of equal horizontal frequency."""
    # Unlike rings, they distinguish lines from diagonals: the blocks
    # of an up-sampled image are lines, and in rings they would be
    # averaged away.
    vertical, horizontal = (_octave(line) + 1 for line in _lines(resolution))
    return _numbered(vertical[:, None] * (horizontal.max() + 1) + horizontal[None, :])

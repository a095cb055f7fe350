"""Power of images by DCT frequency, in bands; for the pictures `snr` and `handoff`.

With C the orthonormal DCT-II matrix over a whole image of r x r pixels and U = C X C^T:
(1)  f[k, l] = sqrt(k^2 + l^2) / 2          cycles per image width: equal structure has equal f at
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

BANDS_PER_OCTAVE = 3
BATCH = 32  # images transformed at a time


def frequencies(resolution: int) -> np.ndarray:
    """Equation (1): float64 [r, r], cycles per image width."""
    k = np.arange(resolution) / 2
    return np.hypot(k[:, None], k[None, :])


def dct_power(images: np.ndarray) -> np.ndarray:
    """Mean |U|^2 over images and channels. images: [n, r, r, c]. Returns float64 [r, r]."""
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
    """Groups of the coefficients of r x r images.

    label: int [r, r], -1 outside all; count: coefficients of each.
    """

    label: np.ndarray
    count: np.ndarray

    def mean(self, values: np.ndarray) -> np.ndarray:
        """Mean of values [r, r] over each band, [bands]."""
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


def radial_bands(resolution: int) -> Bands:
    """Rings of equal f, without f = 0."""
    return _numbered(_octave(frequencies(resolution)))


def square_bands(resolution: int) -> Bands:
    """Bands of equal vertical and of equal horizontal frequency."""
    # Unlike rings, they distinguish lines from diagonals: the blocks
    # of an up-sampled image are lines, and in rings they would be
    # averaged away.
    line = _octave(np.arange(resolution) / 2) + 1
    return _numbered(line[:, None] * (line.max() + 1) + line[None, :])

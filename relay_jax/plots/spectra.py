"""Power of images and of noise by DCT frequency, and their ratio at two resolutions (RDM,
section 2.2 and figure 2).

With C the orthonormal DCT-II matrix over a whole image of r x r pixels and U = C X C^T:
(1)  f[k, l] = sqrt(k^2 + l^2) / 2          cycles per image width: equal structure has equal f at every resolution
(2)  SNR(f) = mean |U|^2 / mean |noise|^2   over the coefficients of a band around f, images and channels
(3)  white noise: E|noise[k, l]|^2 = sigma^2
(4)  block noise: E|noise[k, l]|^2 = sigma^2 P[k] P[l],   P = diag(C T C^T),   T[i, j] = max(0, p - |i - j|)/p, circular

Repeating pixels p x p multiplies U by p at low f and leaves (3) as it is: the SNR grows by p^2
(12 dB for p = 4). P is about p there, so that block noise takes the p^2 back.
"""

from dataclasses import dataclass

import numpy as np
from scipy import fft

from relay_jax.diffusion.dct import dct_matrix

BANDS_PER_OCTAVE = 3
BATCH = 32  # images transformed at a time


def frequencies(resolution: int) -> np.ndarray:
    """Equation (1): float64 [r, r], cycles per image width."""
    k = np.arange(resolution) / 2
    return np.hypot(k[:, None], k[None, :])


def dct_power(images: np.ndarray) -> np.ndarray:
    """Mean |U|^2 over images and channels. images: [n, r, r, c]. Returns float64 [r, r]."""
    total = np.zeros(images.shape[1:3])
    for start in range(0, len(images), BATCH):
        part = np.asarray(images[start : start + BATCH], np.float32)
        total += np.square(fft.dctn(part, axes=(1, 2), norm="ortho"), dtype=np.float64).sum(
            axis=(0, 3)
        )
    return total / (len(images) * images.shape[-1])


def block_noise_power(resolution: int, patch: int) -> np.ndarray:
    """Equation (4) at sigma 1: float64 [r, r]. Exact, as the covariance of block noise is a
    product (SPEC section 3).

    Raises ValueError where resolution is not divisible by patch.
    """
    if patch < 1 or resolution % patch:
        raise ValueError(f"{resolution} pixels are not divisible into patches of {patch}")
    distance = np.abs(np.subtract.outer(np.arange(resolution), np.arange(resolution)))
    triangle = sum(
        np.maximum(0, patch - np.abs(distance - turn)) / patch for turn in (0, resolution)
    )
    c = dct_matrix(resolution)
    line = np.einsum("ki,ij,kj->k", c, triangle, c, optimize=True)
    return line[:, None] * line[None, :]


def relay_noise_power(resolution: int, patch: int, block_noise_scale: float) -> np.ndarray:
    """Power of a relay stage's noise at sigma 1, white plus block noise: float64 [r, r]."""
    return 1 + block_noise_scale**2 * block_noise_power(resolution, patch)


@dataclass(frozen=True)
class Bands:
    """Groups of the coefficients of r x r images. label: int [r, r], -1 outside all; count:
    coefficients of each."""

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
    resolution.

    The first band holds all below 0.79, which is three coefficients: one alone says little.
    """
    with np.errstate(divide="ignore"):
        position = np.floor(BANDS_PER_OCTAVE * np.log2(frequency / 0.5) + 0.5)
    return np.where(frequency > 0, np.maximum(position, 2), -1).astype(int)


def radial_bands(resolution: int) -> Bands:
    """Rings of equal f, without f = 0."""
    return _numbered(_octave(frequencies(resolution)))


def square_bands(resolution: int) -> Bands:
    """Bands of equal vertical and of equal horizontal frequency: unlike rings, they tell lines
    from diagonals."""
    line = _octave(np.arange(resolution) / 2) + 1
    return _numbered(line[:, None] * (line.max() + 1) + line[None, :])


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One curve of the figure: SNR in decibels by frequency in cycles per image width."""

    name: str
    resolution: int
    frequency: np.ndarray
    decibels: np.ndarray


def ratio(name: str, images: np.ndarray, noise: np.ndarray) -> Ratio:
    """Equation (2). images: [n, r, r, c]; noise: its power [r, r]."""
    resolution = images.shape[1]
    bands = radial_bands(resolution)
    values = bands.mean(dct_power(images)) / bands.mean(noise)
    with np.errstate(divide="ignore"):
        return Ratio(
            name=name,
            resolution=resolution,
            frequency=bands.mean(frequencies(resolution)),
            decibels=10 * np.log10(values),
        )


def resolution_ratios(
    low: np.ndarray, high: np.ndarray, sigma: float, block_noise_scale: float
) -> list[Ratio]:
    """The paper's figure: the same noise on the same images at two resolutions, white, and as
    block noise.

    low: [n, r, r, c], high: [n, p r, p r, c], real images; sigma: level of all noises.
    """
    small, large = low.shape[1], high.shape[1]
    patch = large // small
    white_low, white_high = np.full((small, small), sigma**2), np.full((large, large), sigma**2)
    curves = [
        ratio(f"{small} px, white noise", low, white_low),
        ratio(f"{large} px, white noise", high, white_high),
        ratio(
            f"{large} px, block noise of {patch} px",
            high,
            sigma**2 * block_noise_power(large, patch),
        ),
    ]
    if block_noise_scale > 0:
        curves.append(
            ratio(
                f"{large} px, the relay's noise: white + {block_noise_scale:g} block",
                high,
                sigma**2 * relay_noise_power(large, patch, block_noise_scale),
            )
        )
    return curves

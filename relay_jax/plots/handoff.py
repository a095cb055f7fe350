"""Does a relay stage's first state look like what its network was trained on? (SPEC sections 4
and 5.2.)

At a level sigma, with s = s(u(sigma)) of the training schedule and n the stage's noise:
(1)  start    = up-sampled image of the stage before + sigma n       what sampling begins with at the hand-off
(2)  forward  = B_s x0 + sigma n,  x0 real                           what the network has seen at that sigma
(3)  E|U|^2 of a state = E|U|^2 of its images + sigma^2 N,           N = power of n (spectra.relay_noise_power)
(4)  discrepancy = sum over DCT coefficients of (q - 1 - ln q) / 2,  q = E|U_start|^2 /
E|U_forward|^2

The noise enters by its expectation, not by draws. (4) is the Kullback-Leibler divergence in
nats per image of two
gaussians with these powers: how much a best observer of spectra learns from one state about
where it comes from. It falls with sigma, as the blur grows and the noise covers what is left; a
higher hand-off costs more steps, and more of what the stage before has made. Powers are means
over bands (spectra.square_bands); DCT coefficients of images are about
uncorrelated, channels are taken as independent.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.diffusion.blur import blur
from relay_jax.diffusion.process import RelayProcess
from relay_jax.plots.spectra import (
    Bands,
    dct_power,
    frequencies,
    radial_bands,
    relay_noise_power,
    square_bands,
)

SIGMA_LIMIT = 5.0  # where the schedule itself sets no end (cdf_max 1)
BATCH = 32


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Start and forward states at one sigma. Powers by frequency [bands]; moments by channel
    [c], of whole states."""

    sigma: float
    blur_sigma: float
    frequency: np.ndarray
    start: np.ndarray
    forward: np.ndarray
    noise: np.ndarray
    start_mean: np.ndarray
    forward_mean: np.ndarray
    start_std: np.ndarray
    forward_std: np.ndarray
    nats: float
    floor: float  # what two sets of forward states of these sizes would give by chance

    @property
    def decibels(self) -> np.ndarray:
        """Power of the start over that of the forward process, [bands]."""
        return 10 * np.log10(self.start / self.forward)


def candidates(process: RelayProcess, handoff_sigma: float, count: int = 12) -> np.ndarray:
    """Levels to compare at, rising, [count + 1]: logarithmic from a fifth of the hand-off to
    where training ends, and the hand-off itself."""
    end = min(process.sigma_full_blur, SIGMA_LIMIT)
    return np.unique(
        np.append(np.geomspace(min(handoff_sigma, end) / 5, 0.9999 * end, count), handoff_sigma)
    )


def divergence(start: np.ndarray, forward: np.ndarray, bands: Bands, channels: int) -> float:
    """Equation (4). start, forward: powers [r, r] of whole states."""
    quotient = bands.mean(start) / bands.mean(forward)
    return float(0.5 * channels * np.sum(bands.count * (quotient - 1 - np.log(quotient))))


def _blurrer(process: RelayProcess) -> Callable[[np.ndarray, float], np.ndarray]:
    """(images [n, r, r, c], blur sigma) -> B_s x0 on the host."""
    compiled = jax.jit(lambda x, s: blur(x, s, process.patch, process.min_scale))

    def apply(images: np.ndarray, blur_sigma: float) -> np.ndarray:
        parts = [
            compiled(images[i : i + BATCH], jnp.float32(blur_sigma))
            for i in range(0, len(images), BATCH)
        ]
        return np.concatenate([np.asarray(part) for part in parts])

    return apply


def compare(
    process: RelayProcess,
    low_res: np.ndarray,
    real: np.ndarray,
    sigmas: Sequence[float] | np.ndarray,
) -> list[Comparison]:
    """Equations (1) to (4) at each sigma.

    process: the stage's, as trained; low_res: [m, r/p, r/p, c], images of the stage before;
    real: [n, r, r, c], n > 1; all float32 in [-1, 1]. Raises ValueError for a sigma that
    training does not reach.
    """
    resolution, channels = real.shape[1], real.shape[-1]
    fine, rings = square_bands(resolution), radial_bands(resolution)
    unit = relay_noise_power(resolution, process.patch, process.block_noise_scale)
    variance = 1 + process.block_noise_scale**2
    low_mean, low_var = low_res.mean((0, 1, 2), np.float64), low_res.var((0, 1, 2), np.float64)
    center = real.mean((0, 1, 2), np.float64)  # kept by the blur; powers are around it
    up_power = dct_power(
        (low_res - center).repeat(process.patch, axis=1).repeat(process.patch, axis=2)
    )
    chance = (1 / len(low_res) + 1 / len(real)) / (4 / len(real))
    blurred, found = _blurrer(process), []
    for sigma in sigmas:
        u = process.u_from_sigma(sigma)
        if not 0 < u <= 1:
            raise ValueError(
                f"sigma {sigma:g} is beyond what this stage is trained on, "
                f"{process.sigma_full_blur:g}"
            )
        blur_sigma = float(process.blur_sigma(u))
        images = blurred(real, blur_sigma)
        noise = sigma**2 * unit
        halves = [dct_power(images[part::2] - center) for part in (0, 1)]
        power = np.average(halves, axis=0, weights=[len(images[part::2]) for part in (0, 1)])
        start, forward = up_power + noise, power + noise
        found.append(
            Comparison(
                sigma=float(sigma),
                blur_sigma=blur_sigma,
                frequency=rings.mean(frequencies(resolution)),
                start=rings.mean(start),
                forward=rings.mean(forward),
                noise=rings.mean(noise),
                start_mean=low_mean,
                forward_mean=images.mean((0, 1, 2), np.float64),
                start_std=np.sqrt(low_var + sigma**2 * variance),
                forward_std=np.sqrt(images.var((0, 1, 2), np.float64) + sigma**2 * variance),
                nats=divergence(start, forward, fine, channels),
                floor=chance * divergence(halves[0] + noise, halves[1] + noise, fine, channels),
            )
        )
    return found

"""What all samplers share: the grids of noise levels, and what a sampler gives back.

Grids are float64 on the host, falling (docs/math.md section 4):
(1)  sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho,  i < n
(2)  the part of (1) below a hand-off, for a stage that continues images
(3)  (1) from a top level to one that is not 0, where a state is handed over as it is
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from relay_jax.diffusion.limits import check_grid, check_steps
from relay_jax.diffusion.process import EdmProcess, NoiseFn, Purpose

BoundDenoiser = Callable[[jax.Array, jax.Array], jax.Array]  # (x [b, h, w, c], scalar sigma) -> x0


class Samples(NamedTuple):
    """Result of a sampler.

    final: images [b, h, w, c], not clipped; of a sampler that stops
    early, the state at its last level. states: on request
    [steps, b, h, w, c], the state at the start of every step, before
    churn.
    """

    final: jax.Array
    states: jax.Array | None


def edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """The sampling grid, equation (1): float64 [num_steps + 1], falling, closing 0.

    Raises ValueError for a grid that is empty, rises or is not
    finite.
    """
    check_steps(num_steps)
    if not 0 < sigma_min < sigma_max < math.inf:
        raise ValueError(f"need 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}")
    if not 0 < rho < math.inf:
        raise ValueError(f"rho must be positive, not {rho}")
    fraction = np.arange(num_steps, dtype=np.float64) / max(num_steps - 1, 1)
    # Where they overflow they are infinite, which the check refuses.
    with np.errstate(all="ignore"):
        low, high = (np.float64(sigma) ** (1 / rho) for sigma in (sigma_min, sigma_max))
        sigmas = np.append((high + fraction * (low - high)) ** rho, 0.0)
    check_grid(sigmas, sigma_min, sigma_max, rho)
    return sigmas


def relay_sigmas(
    num_steps: int,
    sigma_min: float,
    sigma_max: float,
    rho: float,
    handoff_sigma: float,
) -> np.ndarray:
    """The part of the grid below the hand-off, equation (2): float64 [kept + 1], closing 0.

    Raises ValueError if no level of
    the grid lies below handoff_sigma.
    """
    sigmas = edm_sigmas(num_steps, sigma_min, sigma_max, rho)
    kept = sigmas[sigmas < handoff_sigma]
    if len(kept) < 2:
        raise ValueError(
            f"no step of the grid lies below handoff_sigma {handoff_sigma}; raise it or num_steps"
        )
    return kept


def stopped_sigmas(num_steps: int, stop: float, top: float, rho: float) -> np.ndarray:
    """The grid that ends at a level above 0, equation (3): float64 [num_steps + 1], no 0.

    num_steps steps from `top` to `stop`, so as many calls for
    a sampler with one call a step. Raises ValueError for an
    empty or rising grid.
    """
    check_steps(num_steps)
    sigmas = edm_sigmas(num_steps + 1, stop, top, rho)[:-1]
    # Exactly the level that the next stage reckons with: powers and
    # roots leave the last digit open.
    sigmas[-1] = stop
    return sigmas


def check_ends(process: EdmProcess, handoff_sigma: float, stop_sigma: float) -> None:
    """Raises ValueError unless sampling can start and stop there with this process.

    handoff_sigma: infinite for a stage that starts from noise;
    stop_sigma: 0 for one that makes images.
    """
    if process.has_handoff:
        process.check_start(handoff_sigma)
    elif math.isfinite(handoff_sigma):
        raise ValueError("handoff_sigma is for a stage that continues images; leave it out")
    if process.starts_from_images and stop_sigma:
        raise ValueError("stop_sigma is for a stage that starts from noise; leave it out")


def fields(
    process: EdmProcess,
    noise_fn: NoiseFn,
    step: jax.Array | int,
    white: Purpose,
    block: Purpose,
) -> list[jax.Array]:
    """The white fields that the noise of a process is made of: one, or two with block noise.

    white, block: their purposes. Each is float32 [b, h, w, c].
    """
    return [noise_fn(step, p) for p in ((white, block) if process.has_block_noise else (white,))]

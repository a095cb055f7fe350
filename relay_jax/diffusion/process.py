"""The two forward processes and the sampling grid (SPEC sections 1, 4 and 5).

First stage (EDM, arXiv 2206.00364, table 1):
(1)  ln sigma ~ N(P_mean, P_std^2)
(2)  noisy = x0 + sigma g
Relay stage (RDM, arXiv 2309.03350, section 3.2):
(3)  u ~ U(0, 1), clamped from below at u_min = cdf_max Phi((ln sigma_floor - P_mean) / P_std)
(4)  sigma(u) = exp(P_mean + P_std Phi^-1(cdf_max u)),     u(sigma) = Phi((ln sigma - P_mean) / P_std) / cdf_max
(5)  s(u) = blur_sigma_max sin^2(pi u / 2)
(6)  noisy = B_s x0 + sigma (g + block_noise_scale block_noise(g'))
Both:
(7)  w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2     (relay: at most weight_max)
(8)  sigma_i = (sigma_max^(1/rho) + i/(n-1) (sigma_min^(1/rho) - sigma_max^(1/rho)))^rho, i < n,
then 0

Losses draw sigma on the device (float32); samplers use the grid and u(sigma) computed on the
host in float64.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri as device_ndtri
from scipy.special import ndtr, ndtri

from relay_jax.diffusion.blur import MIN_SCALE


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)


@dataclass(frozen=True, kw_only=True)
class EdmProcess:
    """First stage: gaussian noise alone. All sigmas in units of images in [-1, 1]."""

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5
    weight_max: float = math.inf

    def __post_init__(self) -> None:
        _require(self.P_std > 0, f"P_std must be positive, not {self.P_std}")
        _require(self.sigma_data > 0, f"sigma_data must be positive, not {self.sigma_data}")

    def weight(self, sigma: jax.Array) -> jax.Array:
        """Loss weight, equation (7), of the shape of sigma."""
        weight = (jnp.square(sigma) + self.sigma_data**2) / jnp.square(sigma * self.sigma_data)
        return jnp.minimum(weight, self.weight_max)

    def sigma_from_normal(self, normal: jax.Array) -> jax.Array:
        """Equation (1): standard normal draws to noise levels, same shape."""
        return jnp.exp(self.P_mean + self.P_std * normal)


@dataclass(frozen=True, kw_only=True)
class RelayProcess(EdmProcess):
    """Relay stage: patch-wise blur plus white and block noise.

    `cdf_max` may exceed 1 in sampling (CelebA-HQ: 1.05), which only slows the blur schedule;
    training needs at most 1. `blur_sigma_max` is in pixels of the stage's own images.
    """

    weight_max: float = 1e5
    patch: int = 4
    block_noise_scale: float = 0.15
    cdf_max: float = 0.93
    blur_sigma_max: float = 3.0
    min_scale: float = MIN_SCALE
    sigma_floor: float = 0.0075

    def __post_init__(self) -> None:
        super().__post_init__()
        _require(self.patch >= 1, f"patch must be at least 1, not {self.patch}")
        _require(self.cdf_max > 0, f"cdf_max must be positive, not {self.cdf_max}")
        _require(
            self.block_noise_scale >= 0,
            f"block_noise_scale must not be negative ({self.block_noise_scale})",
        )
        _require(
            self.blur_sigma_max >= 0, f"blur_sigma_max must not be negative ({self.blur_sigma_max})"
        )
        _require(0 <= self.min_scale <= 1, f"min_scale must lie in [0, 1], not {self.min_scale}")
        _require(self.sigma_floor > 0, f"sigma_floor must be positive, not {self.sigma_floor}")

    @property
    def u_min(self) -> float:
        """Smallest u that training sees, equation (3)."""
        return float(self.cdf_max * ndtr((math.log(self.sigma_floor) - self.P_mean) / self.P_std))

    @property
    def sigma_full_blur(self) -> float:
        """The sigma at which u = 1 and the blur is complete; infinite where cdf_max >= 1."""
        return float(np.exp(self.P_mean + self.P_std * ndtri(min(self.cdf_max, 1.0))))

    def clamp(self, uniform: jax.Array) -> jax.Array:
        """Raw uniform draws to u, equation (3), same shape.

        The official code multiplies the floor by cdf_max here and again in sigma(u), so that
        the smallest sigma is 0.00712 rather than sigma_floor = 0.0075; the published weights
        saw that.
        """
        return jnp.maximum(uniform, self.u_min)

    def sigma_from_u(self, u: jax.Array) -> jax.Array:
        """Equation (4), left: noise level of the (clamped) u in (0, 1], same shape. Needs
        cdf_max <= 1."""
        return jnp.exp(self.P_mean + self.P_std * device_ndtri(self.cdf_max * u))

    def u_from_sigma(self, sigma: np.ndarray | float) -> np.ndarray:
        """Equation (4), right, in float64 on the host; 0 at sigma 0. Not clamped at 1 (SPEC
        section 4)."""
        with np.errstate(divide="ignore"):
            return (
                ndtr((np.log(np.asarray(sigma, np.float64)) - self.P_mean) / self.P_std)
                / self.cdf_max
            )

    def blur_sigma(self, u: jax.Array) -> jax.Array:
        """Equation (5): blur sigma in pixels, same shape and same array library as u."""
        xp = np if isinstance(u, np.ndarray | float) else jnp
        return self.blur_sigma_max * xp.square(xp.sin(0.5 * np.pi * u))


def edm_sigmas(num_steps: int, sigma_min: float, sigma_max: float, rho: float) -> np.ndarray:
    """The sampling grid, equation (8): float64 [num_steps + 1], falling, with the closing 0.

    Raises ValueError for an empty or rising grid.
    """
    _require(num_steps >= 1, f"num_steps must be at least 1, not {num_steps}")
    _require(
        0 < sigma_min < sigma_max,
        f"need 0 < sigma_min < sigma_max, not {sigma_min} and {sigma_max}",
    )
    _require(rho > 0, f"rho must be positive, not {rho}")
    fraction = np.arange(num_steps, dtype=np.float64) / max(num_steps - 1, 1)
    low, high = sigma_min ** (1 / rho), sigma_max ** (1 / rho)
    return np.append((high + fraction * (low - high)) ** rho, 0.0)


def relay_sigmas(
    num_steps: int, sigma_min: float, sigma_max: float, rho: float, handoff_sigma: float
) -> np.ndarray:
    """The part of the grid below the hand-off: float64 [kept + 1], with the closing 0 (SPEC
    section 5.3).

    Raises ValueError if no level of the grid lies below handoff_sigma.
    """
    sigmas = edm_sigmas(num_steps, sigma_min, sigma_max, rho)
    kept = sigmas[sigmas < handoff_sigma]
    _require(
        len(kept) > 1,
        f"no step of the grid lies below handoff_sigma {handoff_sigma}; raise it or num_steps",
    )
    return kept


def check_handoff(process: RelayProcess, handoff_sigma: float) -> None:
    """Raises ValueError where sampling would start in the part of the schedule whose blur
    weakens again."""
    _require(handoff_sigma > 0, f"handoff_sigma must be positive, not {handoff_sigma}")
    _require(
        handoff_sigma <= process.sigma_full_blur,
        f"handoff_sigma {handoff_sigma} lies above {process.sigma_full_blur:.4g}, the sigma "
        "where the blur of "
        f"cdf_max {process.cdf_max} is complete; lower it",
    )

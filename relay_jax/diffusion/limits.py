"""What numbers a process and a sampler can have: finite on the devices too, and grids that fall.

Settings are float64 on the host, and float32 where images are. A
value that is no number there gives images that are none, often only
after days of training.
"""

import math
from collections.abc import Iterable, Mapping

import numpy as np

MAX_STEPS = 100_000  # of a grid: beyond it float32 has too few levels to tell them apart


def is_finite(value: float) -> bool:
    """Whether a number is finite, as float32 too."""
    with np.errstate(over="ignore"):
        return bool(np.isfinite(np.float32(value)))


def require(condition: bool, message: str) -> None:
    """Raises ValueError with the message unless the condition holds."""
    if not condition:
        raise ValueError(message)


def check_finite(owner: object, names: Iterable[str]) -> None:
    """Raises ValueError for the first of the fields that is no finite number."""
    for name in names:
        if not is_finite(getattr(owner, name)):
            raise ValueError(f"{name} must be a finite number, not {getattr(owner, name)}")


def check_steps(num_steps: int) -> None:
    """Raises ValueError for a number of steps that no grid has."""
    if not 1 <= num_steps <= MAX_STEPS:
        limit = "at least 1" if num_steps < 1 else f"at most {MAX_STEPS:,}"
        raise ValueError(f"num_steps must be {limit}, not {num_steps}")


def check_grid(sigmas: np.ndarray, low: float, high: float, rho: float) -> None:
    """Raises ValueError unless the levels fall from `high` to `low`, then to 0, as float32 too.

    sigmas: float64 [num_steps + 1] with the closing 0.
    """
    with np.errstate(all="ignore"):
        single = sigmas.astype(np.float32)
        falls = all(np.all(np.diff(levels) < 0) for levels in (sigmas, single))
        # A huge rho rounds its roots to so few
        # numbers that the ends are missed.
        ends = math.isclose(sigmas[0], high, rel_tol=1e-3) and (
            len(sigmas) == 2 or math.isclose(sigmas[-2], low, rel_tol=1e-3)
        )
    if not (np.isfinite(single).all() and falls and ends):
        raise ValueError(
            f"rho {rho} with sigma_min {low}, sigma_max {high} and {len(sigmas) - 1} steps gives "
            "no falling grid of finite levels; rho is 7 in most samplers"
        )


def check_tables(tables: Mapping[str, np.ndarray]) -> None:
    """Raises ValueError for a column of a sampler's tables with values that are not finite."""
    for name, column in tables.items():
        with np.errstate(all="ignore"):
            if not np.isfinite(np.asarray(column, np.float64).astype(np.float32)).all():
                raise ValueError(f"{name} of the sampler's steps is not finite with these settings")


def check_levels(log_sigmas: tuple[float, float], sigma_data: float, weight_max: float) -> None:
    """Raises ValueError if training would draw levels that have no finite loss in float32.

    log_sigmas: of the least and the largest level.
    """
    with np.errstate(all="ignore"):
        sigma = np.exp(np.asarray(log_sigmas, np.float64)).astype(np.float32)
        data = np.float32(sigma_data)
        weight = np.minimum((sigma**2 + data**2) / (sigma * data) ** 2, np.float32(weight_max))
        good = np.isfinite(sigma) & (sigma > 0) & np.isfinite(weight) & (weight > 0)
    if not good.all():
        raise ValueError(
            f"P_mean, P_std and sigma_data give levels from {sigma[0]:.3g} to {sigma[1]:.3g}, "
            "whose loss is no finite number; they are -1.2, 1.2 and 0.5 in most configurations"
        )

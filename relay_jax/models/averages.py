"""Averages of a network's weights over a training, and averages of any length from kept ones.

Sources: Karras et al. 2024, arXiv 2312.02696, section 3 and appendix
C; docs/math.md section 8. After step t = 1, 2, ... of the training,
with the weights theta(t),

(1)  average(t) = average(t - 1) + a (theta(t) - average(t - 1)),   a = 1 - (1 - 1/t)^(gamma + 1)
(2)  average(t) = sum_i w_i theta(i),   w_i = (i^(gamma + 1) - (i - 1)^(gamma + 1)) / t^(gamma + 1)
(3)  width = sqrt(gamma + 1) / ((gamma + 2) sqrt(gamma + 3))

The relative width is the standard deviation of the profile (2) as a
share of t: the average grows with the training, without a ramp.
Profiles of several t and gamma span others: `combination` finds the
sum of kept averages that is nearest to one that nobody has kept.

An average has a name, which is its number in train.ema: '0.05' for a
relative width, '2000000' for a half-life in images. The one of
train.ema_halflife_images has the name ''.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

# Below that of gamma = 0, the mean of all steps, 1 / sqrt(12): only
# then do the weights grow with the step.
MAX_WIDTH = 0.28
MIN_WIDTH = 0.001
MAX_AVERAGES = 8
DEFAULT = "ema"  # its item in a checkpoint; what people may call the average named ''
_AT_ONCE = 2**20  # steps whose profiles are in memory together


def is_width(value: float) -> bool:
    """Whether an entry of train.ema is a relative width; otherwise it is a half-life in images."""
    return value < 1


def check_averages(values: Sequence[float]) -> None:
    """Raises ValueError for entries of train.ema that cannot be, or that stand twice."""
    for value in values:
        if not (MIN_WIDTH <= value <= MAX_WIDTH or 1 <= value < math.inf):
            raise ValueError(
                f"train.ema has {value}: relative widths lie in [{MIN_WIDTH}, {MAX_WIDTH}], and "
                "half-lives are images, at least 1"
            )
    if len({name_of(value) for value in values}) < len(values):
        raise ValueError(f"train.ema has an average twice: {tuple(values)}")
    if len(values) > MAX_AVERAGES:
        raise ValueError(f"train.ema has {len(values)} averages; {MAX_AVERAGES} are the most")


def name_of(value: float) -> str:
    """The name of an entry of train.ema: 0.05 -> '0.05', 2e6 -> '2000000'."""
    return f"{value:.12g}"


def parse_name(text: str | float) -> str:
    """The name of an average as people write it: 0.10 -> '0.1', 'ema' and '' -> ''.

    Raises ValueError for what is no such number.
    """
    if text in ("", DEFAULT):
        return ""
    try:
        value = float("nan" if isinstance(text, bool) else text)
        check_averages([value])
    except (ValueError, TypeError, OverflowError):
        raise ValueError(
            f"{text!r:.40} names no average of the weights; give a relative width such as 0.08, a "
            "half-life in images of train.ema, or ema for the one of train.ema_halflife_images"
        ) from None
    return name_of(value)


def item_of(name: str) -> str:
    """The item of a checkpoint that holds the average of a name."""
    return f"{DEFAULT}_{name}" if name else DEFAULT


def width_of(gamma: float) -> float:
    """Relative width of the power function with exponent gamma: equation (3)."""
    return math.sqrt(gamma + 1) / ((gamma + 2) * math.sqrt(gamma + 3))


def gamma_of(width: float) -> float:
    """The exponent gamma > 0 of a relative width below 1 / sqrt(12): equation (3) inverted."""
    # (gamma + 2)^2 (gamma + 3) = (gamma + 1) / width^2, a cubic.
    inverse = width**-2
    roots = np.roots([1.0, 7.0, 16.0 - inverse, 12.0 - inverse])
    return float(max(roots[np.abs(roots.imag) < 1e-6 * np.abs(roots)].real))


def power_share(step: jax.Array, width: float) -> jax.Array:
    """The share a of the new weights in equation (1), float32.

    step: number of this one, from 1, any shape; returns the same
    shape. At step 1 it is 1: a copy.
    """
    # 1 - 1/t in float32 would lose the share
    # of a long training: 1e-6 is 17 roundings.
    exponent = gamma_of(width) + 1
    return -jnp.expm1(exponent * jnp.log1p(-1.0 / jnp.asarray(step, jnp.float32)))


class Profile(NamedTuple):
    """The weights (2) of an average, from step 1 to `step`."""

    step: int
    width: float


def profile_weights(profile: Profile) -> np.ndarray:
    """Equation (2): float64 [step], the weight of the parameters after each step."""
    places = np.arange(profile.step + 1) / profile.step
    return np.diff(places ** (gamma_of(profile.width) + 1))


def combination(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Weights [n] of kept averages whose sum is nearest to a wanted one, and how near it is.

    Least squares over the profiles (2), step by step, in float64;
    the weights sum to 1, so that parameters which never moved stay
    as they are. The error is the norm of the difference of the two
    profiles, as a share of that of the wanted one. Kept averages of
    steps after the wanted one are allowed, and of little use.
    Source: arXiv 2312.02696, appendix C, with sums over steps in
    place of integrals, which are their limit for many steps.
    """
    products = _products([*kept, wanted])
    gram, target, square = products[:-1, :-1], products[:-1, -1], products[-1, -1]
    # Each average in units of its own length, or those of early
    # steps, which are long, would decide what is small.
    length = np.sqrt(np.diag(gram))
    row = 1 / length
    scale = np.linalg.norm(row)
    system = np.block(
        [
            [gram / np.outer(length, length), row[:, None] / scale],
            [row[None, :] / scale, np.zeros((1, 1))],
        ]
    )
    right = np.append(target / length, 1 / scale)
    # Averages that are nearly alike make it nearly singular.
    weights = np.linalg.lstsq(system, right, rcond=1e-13)[0][:-1] / length
    error = square - 2 * weights @ target + weights @ gram @ weights
    return weights, float(np.sqrt(max(error, 0.0) / square))


def _products(profiles: Sequence[Profile]) -> np.ndarray:
    """Scalar products of profiles over all steps, float64 [n, n]."""
    steps = np.asarray([profile.step for profile in profiles])
    widths = sorted({profile.width for profile in profiles})
    exponents = np.asarray([gamma_of(width) + 1 for width in widths])
    which = np.asarray([widths.index(profile.width) for profile in profiles])
    ends, place = np.unique(steps, return_inverse=True)
    # [ends, widths, widths]: of profiles that end at the same step.
    sums, total, before = [], np.zeros((len(widths), len(widths))), 0
    for end in ends.tolist():
        # What was summed so far, in the units of the new end: powers
        # of the step itself overflow.
        total = total * (before / end) ** (exponents[:, None] + exponents)
        for first in range(before, end, _AT_ONCE):
            places = np.arange(first, min(first + _AT_ONCE, end) + 1) / end
            weights = np.diff(places ** exponents[:, None], axis=1)
            total = total + weights @ weights.T
        sums.append(total)
        before = end
    # Up to the step where the shorter one ends, of which the longer
    # one is a multiple.
    shorter = np.minimum(steps[:, None], steps)
    shrink = (shorter / steps[:, None]) ** exponents[which][:, None]
    earlier = np.minimum(place[:, None], place)
    return np.asarray(sums)[earlier, which[:, None], which] * shrink * shrink.T

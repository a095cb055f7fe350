"""Classifier-free guidance and autoguidance (docs/math.md section 5).

Sources: arXiv 2207.12598; limited interval: arXiv 2404.07724;
autoguidance: arXiv 2406.02507, equation 3.

(1)  D = w D(x, labels) - (w - 1) D(x, no label),     applied only if w > 1
(2)  D = w D(x, labels) - (w - 1) D_guide(x, labels)

"No label" is a zero class vector: the network must have been trained
with label dropout. The guide of (2) is a worse network for the same
task, shorter trained or smaller, which needs none.
"""

import math
from dataclasses import dataclass
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.precondition import Denoiser


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Guidance of a stage: weight w of equation (1), and the sigmas [low, high] where it acts.

    A weight of at most 1 is off. Raises ValueError for a negative
    weight or an empty interval.
    """

    weight: float = 1.0
    interval: tuple[float, float] = (0.0, math.inf)

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"guidance must not be negative, not {self.weight}")
        if len(self.interval) != 2 or not self.interval[0] < self.interval[1]:
            raise ValueError(f"guidance_interval must be two rising sigmas, not {self.interval}")

    def evaluations(self, sigmas: np.ndarray) -> int:
        """Images that the network sees per image in calls at these sigmas: two where it acts."""
        return len(sigmas) + (_inside(self.interval, sigmas) if self.weight > 1 else 0)


@dataclass(frozen=True, kw_only=True)
class Guide:
    """Other weights that guide a stage: equation (2), within the sigmas [low, high].

    weights: their folder, FOLDER@STEP for one checkpoint, or
    STAGE@STEP for an earlier one of the stage itself. ema: which
    average of them, '' for that of train.ema_halflife_images.
    Raises ValueError, naming the key, for values that cannot be.
    """

    weights: str
    weight: float = 2.0
    interval: tuple[float, float] = (0.0, math.inf)
    ema: str = ""

    def __post_init__(self) -> None:
        if not 1 <= self.weight < math.inf:
            raise ValueError(f"guide_weight must be at least 1 (off), not {self.weight}")
        if len(self.interval) != 2 or not self.interval[0] < self.interval[1]:
            raise ValueError(f"guide_interval must be two rising sigmas, not {self.interval}")

    def evaluations(self, sigmas: np.ndarray) -> int:
        """Images that the guide sees per image in calls at these sigmas."""
        return _inside(self.interval, sigmas)


class Guided(NamedTuple):
    """The parameters of a stage that other weights guide: its own, and those of the guide."""

    network: dict
    guide: dict


def own(params: dict | Guided) -> dict:
    """The parameters of a stage's own network."""
    return params.network if isinstance(params, Guided) else params


def _inside(interval: tuple[float, float], sigmas: np.ndarray) -> int:
    low, high = interval
    return int(np.sum((low <= sigmas) & (sigmas <= high)))


def classifier_free(
    denoise: Denoiser, class_labels: jax.Array | None, guidance: Guidance
) -> Denoiser:
    """Binds the labels: (x, sigma, labels) -> x0 becomes (x, sigma) -> x0, guided by equation (1).

    denoise: takes x [b, h, w, c], scalar sigma, class_labels
    [b, classes] or None. Both branches run in one batch of 2b:
    one call of the network. Outside the interval only the
    conditional branch is computed. Raises ValueError for a weight
    above 1 without labels.
    """
    weight = guidance.weight

    def conditional(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return denoise(x, sigma, class_labels)

    if weight <= 1:
        return conditional
    if class_labels is None:
        raise ValueError(f"guidance {weight} needs a class-conditional network; use guidance 1")
    chex.assert_rank(class_labels, 2, custom_message="class_labels must be [b, classes]")
    # One batch of both branches: the
    # weights of the network are read once.
    both_labels = jnp.concatenate([class_labels, jnp.zeros_like(class_labels)])

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        message = "x and class_labels must hold equally many images"
        chex.assert_equal_shape_prefix([x, class_labels], 1, custom_message=message)
        both = denoise(jnp.concatenate([x, x]), sigma, both_labels)
        with_label, without = jnp.split(both, 2)
        return weight * with_label - (weight - 1) * without

    return _limited(guided, conditional, guidance.interval)


def autoguided(
    denoise: Denoiser, guide_denoise: Denoiser, class_labels: jax.Array | None, guide: Guide
) -> Denoiser:
    """Binds the labels: (x, sigma) -> x0, guided by a worse denoiser as in equation (2).

    denoise, guide_denoise: take x [b, h, w, c], scalar sigma,
    class_labels [b, classes] or None. Outside the interval the guide
    is not called.
    """

    def unguided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return denoise(x, sigma, class_labels)

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        worse = guide_denoise(x, sigma, class_labels)
        return guide.weight * unguided(x, sigma) - (guide.weight - 1) * worse

    return _limited(guided, unguided, guide.interval)


def _limited(guided: Denoiser, plain: Denoiser, interval: tuple[float, float]) -> Denoiser:
    """`guided` within the interval of sigma, `plain` outside."""
    low, high = interval
    # Where guidance always acts, the program needs neither the
    # condition nor the other branch.
    if low <= 0 and math.isinf(high):
        return guided

    def limited(x: jax.Array, sigma: jax.Array) -> jax.Array:
        inside = (low <= sigma) & (sigma <= high)
        return lax.cond(inside, guided, plain, x, sigma)

    return limited


def drop_labels(
    class_labels: jax.Array, probability: float, key: jax.Array, index: jax.Array
) -> jax.Array:
    """Sets whole rows of [b, classes] to zero ("no label") with the given probability.

    index: int [b], places in the whole batch: what a row draws
    depends on the key and its place.
    """
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(index)
    keep = jax.vmap(jax.random.uniform)(keys) >= probability
    return jnp.where(keep[:, None], class_labels, 0.0)

"""Classifier-free guidance (SPEC section 5.4; arXiv 2207.12598; limited interval: arXiv
2404.07724).

(1)  D = w D(x, labels) - (w - 1) D(x, no label),     applied only if w > 1

"No label" is a zero class vector: the network must have been trained with label dropout.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from relay_jax.diffusion.precondition import Denoiser


def classifier_free(
    denoise: Denoiser,
    class_labels: jax.Array | None,
    guidance: float,
    interval: tuple[float, float] = (0.0, math.inf),
) -> Denoiser:
    """Binds the labels: (x, sigma, labels) -> x0 becomes (x, sigma) -> x0, guided by equation (1).

    denoise: takes x [b, h, w, c], scalar sigma, class_labels [b, classes] or None.
    guidance: w; at most 1 means the plain conditional denoiser.
    interval: sigmas [low, high] where the guidance acts; outside, only the conditional branch
    is computed.
    Both branches run in one batch of 2b: one call of the network.
    Raises ValueError for w > 1 without labels, or an empty interval.
    """
    low, high = interval
    if not low < high:
        raise ValueError(f"the guidance interval must rise, not {interval}")

    def conditional(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return denoise(x, sigma, class_labels)

    if guidance <= 1:
        return conditional
    if class_labels is None:
        raise ValueError(f"guidance {guidance} needs a class-conditional network; use guidance 1")
    both_labels = jnp.concatenate([class_labels, jnp.zeros_like(class_labels)])

    def guided(x: jax.Array, sigma: jax.Array) -> jax.Array:
        with_label, without = jnp.split(denoise(jnp.concatenate([x, x]), sigma, both_labels), 2)
        return guidance * with_label - (guidance - 1) * without

    if low <= 0 and math.isinf(high):
        return guided

    def limited(x: jax.Array, sigma: jax.Array) -> jax.Array:
        inside = (low <= sigma) & (sigma <= high)
        return lax.cond(inside, guided, conditional, x, sigma)

    return limited

"""Exponential moving average of the parameters with a half-life in images (SPEC section 7; EDM
appendix F.2)."""

import jax
import jax.numpy as jnp


def ema_decay(
    images_seen: jax.Array, batch: int, halflife_images: float, rampup: float
) -> jax.Array:
    """beta = 0.5^(batch / halflife), halflife = min(halflife_images, rampup * images_seen); 0
    at the first step.

    images_seen: images before this step, any shape; returns the same shape. rampup 0 switches
    the ramp off.
    """
    halflife = (
        jnp.minimum(halflife_images, rampup * images_seen)
        if rampup > 0
        else jnp.asarray(halflife_images)
    )
    return 0.5 ** (batch / jnp.maximum(halflife, 1e-8))


def update_ema(ema: dict, params: dict, decay: jax.Array) -> dict:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)

"""Block noise: unit-variance gaussian noise correlated over p x p pixels (SPEC section 3; RDM
section 3.2).

(1)  block_noise(g)[y, x] = (1/p) sum_{i,j < p} g[y - i, x - j]      circular
(2)  cov(dy, dx) = max(0, p - |dy|)/p * max(0, p - |dx|)/p           dy, dx on the circle (h, w >= 2p - 1)
(3)  relay noise = g + block_noise_scale * block_noise(g')

White noise of level sigma has the same power at every frequency; after up-sampling by p the
image's low
frequencies are p times stronger against it. Block noise gives them back the noise they had at low
resolution. It is neither constant inside a block nor aligned to blocks.
"""

import jax
import jax.numpy as jnp
from jax import lax


def block_noise(gaussian: jax.Array, patch: int) -> jax.Array:
    """Equation (1): the box filter separates into one sum along each axis.

    gaussian: white unit noise [b, h, w, c]. Returns [b, h, w, c] of variance 1 and covariance (2).
    """
    for axis in (1, 2):
        size = gaussian.shape[axis]
        before = [(patch - 1 if a == axis else 0, 0) for a in range(4)]
        around = jnp.pad(gaussian, before, mode="wrap")
        gaussian = sum(
            lax.slice_in_dim(around, i, i + size, axis=axis) for i in reversed(range(patch))
        )
    return gaussian / patch


def relay_noise(
    gaussian: jax.Array, block_gaussian: jax.Array | None, patch: int, block_noise_scale: float
) -> jax.Array:
    """Equation (3): the noise of a relay stage per unit of sigma, variance 1 + block_noise_scale^2.

    gaussian, block_gaussian: independent white unit noise [b, h, w, c]; the second may be None if
    block_noise_scale is 0, else ValueError. Not renormalised on purpose: the network is told
    sigma (SPEC section 3).
    """
    if block_noise_scale == 0:
        return gaussian
    if block_gaussian is None:
        raise ValueError(f"block_noise_scale {block_noise_scale} needs a field for the block noise")
    return gaussian + block_noise_scale * block_noise(block_gaussian, patch)

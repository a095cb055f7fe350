"""Block noise: unit gaussian noise correlated over p x p pixels (docs/math.md section 3).

Source: Relay Diffusion, arXiv 2309.03350, section 3.2.

(1)  block_noise(g)[y, x] = (1/p) sum_{i,j < p} g[y - i, x - j]      circular
(2)  cov(dy, dx) = max(0, p - |dy|)/p * max(0, p - |dx|)/p
                                    dy, dx on the circle (h, w >= 2p - 1)
(3)  relay noise = g + block_noise_scale * block_noise(g')
(4)  power of (1) at DCT coefficient (k, l) of the whole image: P[k] P[l],
     P = diag(C T C^T),  T[i, j] = max(0, p - |i - j|)/p, circular

White noise of level sigma has the same power at every frequency;
after up-sampling by p the image's low frequencies are p times
stronger against it. Block noise gives them back the noise they had
at low resolution. It is neither constant inside a block nor
aligned to blocks.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.dct import check_patch, dct_matrix
from relay_jax.resolution import Resolution, height_width


def block_noise(gaussian: jax.Array, patch: int) -> jax.Array:
    """Equation (1): the box filter separates into one sum along each axis.

    gaussian: white unit noise [b, h, w, c]. Returns [b, h, w, c] of
    variance 1 and covariance (2).
    """
    chex.assert_rank(gaussian, 4, custom_message="gaussian must be [b, h, w, c]")
    for axis in (1, 2):
        size = gaussian.shape[axis]
        before = [(patch - 1 if a == axis else 0, 0) for a in range(4)]
        around = jnp.pad(gaussian, before, mode="wrap")
        # The order of the terms decides the
        # last bit of every image: leave it.
        gaussian = sum(
            lax.slice_in_dim(around, i, i + size, axis=axis) for i in reversed(range(patch))
        )
    return gaussian / patch


def relay_noise(
    gaussian: jax.Array,
    block_gaussian: jax.Array | None,
    patch: int,
    block_noise_scale: float,
) -> jax.Array:
    """Equation (3): the noise of a relay stage per unit of sigma, variance 1 + block_noise_scale^2.

    gaussian, block_gaussian: independent white unit noise
    [b, h, w, c]; the second may be None if block_noise_scale is 0,
    else ValueError. Not renormalised on purpose: the network is told
    sigma, as in the published training (docs/math.md section 3).
    """
    if block_noise_scale == 0:
        return gaussian
    if block_gaussian is None:
        raise ValueError(f"block_noise_scale {block_noise_scale} needs a field for the block noise")
    message = "gaussian and block_gaussian must have one shape"
    chex.assert_equal_shape([gaussian, block_gaussian], custom_message=message)
    return gaussian + block_noise_scale * block_noise(block_gaussian, patch)


def block_noise_power(resolution: Resolution, patch: int) -> np.ndarray:
    """Equation (4): float64 [h, w]. Exact, as the covariance of block noise is a product.

    Raises ValueError where resolution is not divisible by patch.
    """
    height, width = height_width(resolution)
    check_patch(height, width, patch)
    return _line_power(height, patch)[:, None] * _line_power(width, patch)[None, :]


def _line_power(size: int, patch: int) -> np.ndarray:
    """P of equation (4), float64 [size]."""
    distance = np.abs(np.subtract.outer(np.arange(size), np.arange(size)))
    # On a circle the distance to a pixel is taken both ways round.
    triangle = sum(np.maximum(0, patch - np.abs(distance - turn)) / patch for turn in (0, size))
    c = dct_matrix(size)
    return np.einsum("ki,ij,kj->k", c, triangle, c, optimize=True)

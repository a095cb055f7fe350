"""Patch-wise blur: every DCT frequency of a patch is attenuated (docs/math.md section 2).

Source: Relay Diffusion, arXiv 2309.03350, section 3.2.

(1)  a[k, l](s) = (1 - m) exp(-(f_k^2 + f_l^2) s^2 / 2) + m,    f_k = pi k / p,  m = min_scale
(2)  B_s X = C^T (a(s) * (C X C^T)) C    per p x p patch X
(3)        = m X + (1 - m) A X A^T,      A = C^T diag(exp(-f^2 s^2 / 2)) C

(3) holds because the exponential in (1) separates; it is what the code computes. Patches never mix
and patch means are untouched, so an infinite blur leaves (almost) the nearest-neighbour up-sampled
image.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.dct import apply_per_patch, check_patch, dct_matrix

MIN_SCALE = 0.001


def _decay(blur_sigma: jax.Array, patch: int) -> jax.Array:
    """exp(-f^2 s^2 / 2) for the p frequencies of one axis: [...] -> [..., p]."""
    frequency = jnp.asarray(np.pi * np.arange(patch) / patch, jnp.float32)
    return jnp.exp(-0.5 * jnp.square(frequency * blur_sigma[..., None]))


def attenuation(blur_sigma: jax.Array, patch: int, min_scale: float = MIN_SCALE) -> jax.Array:
    """The factors of equation (1).

    blur_sigma: [...] in pixels. Returns [..., p, p], by (row,
    column) frequency.
    """
    decay = _decay(jnp.asarray(blur_sigma, jnp.float32), patch)
    return (1 - min_scale) * decay[..., :, None] * decay[..., None, :] + min_scale


def attenuation_table(
    blur_sigma: np.ndarray, patch: int, min_scale: float = MIN_SCALE
) -> np.ndarray:
    """Equation (1) in float64 on the host, for tables; as `attenuation`, and 1 for patch 1."""
    frequency = np.pi * np.arange(patch) / patch
    decay = np.exp(-0.5 * np.square(frequency * np.asarray(blur_sigma, np.float64)[..., None]))
    return (1 - min_scale) * decay[..., :, None] * decay[..., None, :] + min_scale


def blur_matrix(blur_sigma: jax.Array, patch: int) -> jax.Array:
    """The matrix A of equation (3).

    blur_sigma: [...] in pixels. Returns [..., p, p], symmetric.
    """
    c = dct_matrix(patch)
    outer = jnp.asarray((c[:, :, None] * c[:, None, :]).reshape(patch, patch * patch), jnp.float32)
    decay = _decay(jnp.asarray(blur_sigma, jnp.float32), patch)
    # A product, not a sum over an axis: XLA for CPU (jax 0.10, 0.11)
    # gets that wrong for 64 or more equal blur_sigma.
    return jnp.matmul(decay, outer, precision=lax.Precision.HIGHEST).reshape(*decay.shape, patch)


def blur(
    x: jax.Array, blur_sigma: jax.Array, patch: int, min_scale: float = MIN_SCALE
) -> jax.Array:
    """B_s x, equation (3).

    x: [b, h, w, c]; blur_sigma: scalar or [b], in pixels of x; 0
    changes nothing, and neither does patch 1. Returns [b, h, w, c].
    Raises ValueError where h or w is not divisible by patch.
    """
    chex.assert_rank(x, 4, custom_message="x must be [b, h, w, c]")
    chex.assert_rank(blur_sigma, {0, 1}, custom_message="blur_sigma must be a scalar or [b]")
    check_patch(x.shape[1], x.shape[2], patch)
    # A patch of one pixel has its mean alone, which no blur changes.
    if patch == 1:
        return x
    return min_scale * x + (1 - min_scale) * apply_per_patch(x, blur_matrix(blur_sigma, patch))


def upsample(low_res: jax.Array, patch: int) -> jax.Array:
    """Nearest neighbour: every pixel of [b, h, w, c] becomes patch x patch pixels."""
    chex.assert_rank(low_res, 4, custom_message="low_res must be [b, h, w, c]")
    return jnp.repeat(jnp.repeat(low_res, patch, axis=1), patch, axis=2)


def mean_blur(x: jax.Array, patch: int) -> jax.Array:
    """E x, the mean of every patch in all its pixels, [b, h, w, c]: up(down(x)), no blur beyond.

    Raises ValueError where h or w is not divisible by patch.
    """
    if patch == 1:
        return x
    chex.assert_rank(x, 4, custom_message="x must be [b, h, w, c]")
    b, h, w, c = x.shape
    check_patch(h, w, patch)
    return upsample(x.reshape(b, h // patch, patch, w // patch, patch, c).mean((2, 4)), patch)

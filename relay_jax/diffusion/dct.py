"""Orthonormal DCT-II over patches of p x p pixels (docs/math.md section 1).

(1)  C[k, i] = sqrt((1 if k == 0 else 2) / p) cos(pi k (2i + 1) / (2p))
(2)  U = C X C^T      per patch X
(3)  X = C^T U C

Coefficient (k, l) of a patch is stored at pixel (k, l) of that
patch, so a coefficient image has the shape of the image.
"""

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def dct_matrix(patch: int) -> np.ndarray:
    """The matrix C of equation (1), float64 [patch, patch], rows are frequencies."""
    k, i = np.arange(patch)[:, None], np.arange(patch)[None, :]
    scale = np.sqrt(np.where(k == 0, 1.0, 2.0) / patch)
    return scale * np.cos(np.pi * k * (2 * i + 1) / (2 * patch))


def check_patch(height: int, width: int, patch: int) -> None:
    """Raises ValueError unless images of height x width are made of whole patches."""
    if patch < 1:
        raise ValueError(f"patch must be at least 1, not {patch}")
    if height % patch or width % patch:
        raise ValueError(
            f"an image of {height} x {width} pixels is not divisible into patches of {patch} x "
            f"{patch}"
        )


def apply_per_patch(x: jax.Array, matrix: jax.Array) -> jax.Array:
    """M X M^T for every patch X of floating-point images.

    x: [b, h, w, c]; matrix: [p, p], or [b, p, p] for one matrix per
    image. Returns [b, h, w, c]. Raises ValueError where h or w is
    not divisible by p.
    """
    chex.assert_rank(x, 4, custom_message="x must be [b, h, w, c]")
    # The matrix is cast to the type of x: of whole numbers nothing
    # would be left.
    chex.assert_type(x, float, custom_message="x must be of floating-point numbers")
    chex.assert_rank(matrix, {2, 3}, custom_message="matrix must be [p, p] or [b, p, p]")
    b, h, w, c = x.shape
    p = matrix.shape[-1]
    check_patch(h, w, p)
    m = jnp.broadcast_to(matrix, (b, p, p)).astype(x.dtype)
    # Two products of p terms each, rows then columns: nothing of the
    # size of a transform of the whole image is stored. HIGHEST, as
    # accelerators would otherwise round the factors to bfloat16 or
    # TF32; the cost is negligible.
    rows = jnp.einsum(
        "bki,bnim->bnkm",
        m,
        x.reshape(b, h // p, p, w * c),
        precision=lax.Precision.HIGHEST,
    )
    columns = jnp.einsum(
        "bki,bnic->bnkc",
        m,
        rows.reshape(b, h * w // p, p, c),
        precision=lax.Precision.HIGHEST,
    )
    return columns.reshape(b, h, w, c)


def patch_dct(x: jax.Array, patch: int) -> jax.Array:
    """DCT-II of every patch, equation (2).

    x: [b, h, w, c]. Returns coefficients [b, h, w, c].
    Raises ValueError where h or w is not divisible by patch.
    """
    return apply_per_patch(x, jnp.asarray(dct_matrix(patch), x.dtype))


def patch_idct(u: jax.Array, patch: int) -> jax.Array:
    """The inverse of `patch_dct`, equation (3).

    u: coefficients [b, h, w, c]. Returns pixels [b, h, w, c]. Raises
    ValueError where h or w is not divisible by patch.
    """
    return apply_per_patch(u, jnp.asarray(dct_matrix(patch).T, u.dtype))

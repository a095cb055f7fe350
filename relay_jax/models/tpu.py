"""An operation of the U-Net that TPUs want written differently; the plain one elsewhere.

The choice is made where the program is compiled for its platform (lax.platform_dependent). tests/models/test_tpu.py
holds the two formulations against each other.
"""

import jax
import jax.numpy as jnp
from jax import lax


def attend(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of each head, softmax in float32. [b, n, heads, d] each, and the result."""
    return lax.platform_dependent(q, k, v, tpu=attend_by_head, default=jax.nn.dot_product_attention)


def attend_by_head(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """The same, one head after the other: its scores fit a TPU core's fast memory; the backward pass makes them again.

    The ones beside v make the sum of the weights part of the product, in columns of the matrix unit that would idle.
    """
    def attend_one(head: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        q, k, v = head
        d = v.shape[-1]
        scores = jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32) / d**0.5
        largest = lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True))
        weights = jnp.exp(scores - largest).astype(v.dtype)
        out = jnp.einsum("bqk,bkd->bqd", weights, jnp.concatenate([v, jnp.ones_like(v)], axis=-1),
                         preferred_element_type=jnp.float32)
        return (out[..., :d] / out[..., d:d + 1]).astype(v.dtype)

    heads = lax.map(jax.checkpoint(attend_one), tuple(jnp.moveaxis(x, 2, 0) for x in (q, k, v)))
    return jnp.moveaxis(heads, 0, 2)

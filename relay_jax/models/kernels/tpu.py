"""Operations of the U-Net that TPUs want written differently; the plain ones elsewhere.

The choice is made where the program is compiled for its platform (lax.platform_dependent).
tests/kernels/test_tpu.py holds the two formulations against each other; docs/benchmarks.md says
what it gains.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

_MANY = 512  # pixels; the scores of fewer are small enough for all heads at once


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias of the last axis, summed in float32, in the precision of x. On TPU the bias's
    gradient, a sum over all
    pixels, is a product with ones: the matrix unit adds up 16-bit numbers faster than the
    vector unit converts them."""
    return (x + bias).astype(x.dtype)


def _summed(x: jax.Array) -> jax.Array:
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)


def summed_by_product(x: jax.Array) -> jax.Array:
    """Sum of [..., c] over all but the last axis, in float32. -> [c]."""
    if x.dtype == jnp.float32:
        return _summed(x)  # a product would round it
    ones = jnp.ones((*x.shape[:-1], 8), x.dtype)  # 8: the fewest rows of the matrix unit
    return jnp.einsum("...k,...c->kc", ones, x, preferred_element_type=jnp.float32)[0]


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), None),
    lambda _, cotangent: (
        cotangent,
        lax.platform_dependent(cotangent, tpu=summed_by_product, default=_summed),
    ),
)


def attend(qkv: jax.Array, heads: int) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of each head, softmax in float32.

    qkv: [b, n, 3 c], the channels of q, then of k and of v, each head by head. -> [b, n, c].
    """
    many = qkv.shape[1] >= _MANY
    return lax.platform_dependent(
        qkv,
        tpu=partial(attend_by_head if many else attend_at_once, heads=heads),
        default=partial(attend_at_once, heads=heads),
    )


def attend_at_once(qkv: jax.Array, heads: int) -> jax.Array:
    """All heads together, by jax.nn."""
    b, n, channels = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)
    return jax.nn.dot_product_attention(q, k, v).reshape(b, n, channels // 3)


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend_by_head(qkv: jax.Array, heads: int) -> jax.Array:
    """One head after the other, so that scores never leave a TPU core's fast memory.

    The backward pass makes the weights again from the logarithmic sums of the scores (arXiv
    2205.14135, appendix B).
    """
    return _forward(qkv, heads)[0]


def _forward(
    qkv: jax.Array, heads: int
) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
    channels = qkv.shape[-1] // 3
    width = channels // heads

    def attend_one(out: jax.Array, head: jax.Array) -> tuple[jax.Array, jax.Array]:
        q, k, v = (_part(qkv, part * heads + head, width) for part in range(3))
        scores = _scores(q, k)
        largest = jnp.max(scores, axis=-1, keepdims=True)
        # The ones beside v make the sum of the weights part of the product, in columns of the
        # matrix unit that would idle.
        summed = jnp.einsum(
            "bqk,bkd->bqd",
            jnp.exp(scores - largest).astype(v.dtype),
            jnp.concatenate([v, jnp.ones_like(v)], axis=-1),
            preferred_element_type=jnp.float32,
        )
        total = summed[..., width : width + 1]
        mean = (summed[..., :width] / total).astype(v.dtype)
        return lax.dynamic_update_slice_in_dim(out, mean, head * width, axis=2), largest + jnp.log(
            total
        )

    out, log_sums = lax.scan(
        attend_one, qkv[..., :channels], jnp.arange(heads)
    )  # all of it is overwritten
    return out, (qkv, out, log_sums)


def _backward(
    heads: int, saved: tuple[jax.Array, jax.Array, jax.Array], cotangent: jax.Array
) -> tuple[jax.Array]:
    """With w = softmax(s): ds = w (dw - sum w dw), and sum w dw = sum out dout. The gradient
    overwrites qkv."""
    qkv, out, log_sums = saved
    width = out.shape[-1] // heads

    def differentiate_one(
        x: jax.Array, inputs: tuple[jax.Array, jax.Array]
    ) -> tuple[jax.Array, None]:
        head, log_sum = inputs
        q, k, v = (_part(x, part * heads + head, width) for part in range(3))
        by_mean, mean = _part(cotangent, head, width), _part(out, head, width)
        weights = jnp.exp(_scores(q, k) - log_sum)
        by_weights = jnp.einsum("bqd,bkd->bqk", by_mean, v, preferred_element_type=jnp.float32)
        inner = jnp.sum(
            by_mean.astype(jnp.float32) * mean.astype(jnp.float32), axis=-1, keepdims=True
        )
        by_scores = (weights * (by_weights - inner) / width**0.5).astype(x.dtype)
        gradients = (
            jnp.einsum("bqk,bkd->bqd", by_scores, k),
            jnp.einsum("bqk,bqd->bkd", by_scores, q),
            jnp.einsum("bqk,bqd->bkd", weights.astype(x.dtype), by_mean),
        )
        for part, gradient in enumerate(gradients):
            x = lax.dynamic_update_slice_in_dim(x, gradient, (part * heads + head) * width, axis=2)
        return x, None

    return lax.scan(differentiate_one, qkv, (jnp.arange(heads), log_sums))[:1]


attend_by_head.defvjp(_forward, _backward)


def _part(x: jax.Array, index: int | jax.Array, width: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(x, index * width, width, axis=2)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    return jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5

"""Operations of the U-Net as TPUs compute them fastest; models/ops.py chooses where.

Each function equals the one of plain.py in its docstring but
for rounding (tests/kernels/test_tpu.py); docs/lab/tpu.md
says what it gains.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from relay_jax.models.kernels.plain import sum_pixels

# The scores of fewer pixels are small enough for all heads at once.
_MANY = 512

Saved = tuple[jax.Array, jax.Array, jax.Array]  # qkv, out, logarithmic sums of the scores


def sum_by_product(x: jax.Array) -> jax.Array:
    """plain.sum_pixels as a product with ones: [..., c] -> [c], float32."""
    # The matrix unit adds up 16-bit numbers faster than the
    # vector unit converts them. float32 stays a sum: a
    # product would round it.
    if x.dtype == jnp.float32:
        return sum_pixels(x)
    ones = jnp.ones((*x.shape[:-1], 8), x.dtype)  # 8: the fewest rows of the matrix unit
    return jnp.einsum("...k,...c->kc", ones, x, preferred_element_type=jnp.float32)[0]


def pays_by_head(qkv: jax.Array) -> bool:
    """Whether `attend_by_head` is the faster one for [b, n, 3c]."""
    return qkv.shape[1] >= _MANY


@partial(jax.custom_vjp, nondiff_argnums=(1,))
def attend_by_head(qkv: jax.Array, heads: int) -> jax.Array:
    """plain.attend, one head after the other: [b, n, 3c] -> [b, n, c].

    The scores of one head never leave the fast memory of a core. The
    backward pass makes the weights again from the logarithmic sums
    of the scores (arXiv 2205.14135, appendix B).
    """
    return _forward(qkv, heads)[0]


def _forward(qkv: jax.Array, heads: int) -> tuple[jax.Array, Saved]:
    channels = qkv.shape[-1] // 3
    # Where the loop starts is of no importance, as every head
    # overwrites its part.
    start = qkv[..., :channels]
    out, log_sums = lax.scan(partial(_attend_one, qkv, heads), start, jnp.arange(heads))
    return out, (qkv, out, log_sums)


def _attend_one(
    qkv: jax.Array, heads: int, out: jax.Array, head: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Writes one head into out [b, n, c]; its logarithmic sums [b, n, 1]."""
    width = out.shape[-1] // heads
    q, k, v = (_part(qkv, part * heads + head, width) for part in range(3))
    scores = _scores(q, k)
    # Without their largest, as exponentials
    # of large scores overflow.
    largest = jnp.max(scores, axis=-1, keepdims=True)
    # The ones beside v make the sum of the weights part of the
    # product, in columns of the matrix unit that would idle.
    summed = jnp.einsum(
        "bqk,bkd->bqd",
        jnp.exp(scores - largest).astype(v.dtype),
        jnp.concatenate([v, jnp.ones_like(v)], axis=-1),
        preferred_element_type=jnp.float32,
    )
    total = summed[..., width : width + 1]
    mean = (summed[..., :width] / total).astype(v.dtype)
    out = lax.dynamic_update_slice_in_dim(out, mean, head * width, axis=2)
    return out, largest + jnp.log(total)


def _backward(heads: int, saved: Saved, cotangent: jax.Array) -> tuple[jax.Array]:
    qkv, out, log_sums = saved
    one = partial(_differentiate_one, cotangent, out, heads)
    # The gradient overwrites qkv, whose
    # head is read once and then free.
    return lax.scan(one, qkv, (jnp.arange(heads), log_sums))[:1]


def _differentiate_one(
    cotangent: jax.Array,
    out: jax.Array,
    heads: int,
    x: jax.Array,
    inputs: tuple[jax.Array, jax.Array],
) -> tuple[jax.Array, None]:
    """Replaces q, k and v of one head in x [b, n, 3c] by their gradients.

    With weights w = softmax(s): ds = w (dw - sum w dw), and
    sum w dw = sum out dout.
    """
    head, log_sum = inputs
    width = out.shape[-1] // heads
    q, k, v = (_part(x, part * heads + head, width) for part in range(3))
    by_mean, mean = _part(cotangent, head, width), _part(out, head, width)
    weights = jnp.exp(_scores(q, k) - log_sum)
    by_weights = jnp.einsum("bqd,bkd->bqk", by_mean, v, preferred_element_type=jnp.float32)
    inner = jnp.sum(
        by_mean.astype(jnp.float32) * mean.astype(jnp.float32),
        axis=-1,
        keepdims=True,
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


attend_by_head.defvjp(_forward, _backward)


def _part(x: jax.Array, index: int | jax.Array, width: int) -> jax.Array:
    """Channels of one of q, k and v of one head: [b, n, width]."""
    return lax.dynamic_slice_in_dim(x, index * width, width, axis=2)


def _scores(q: jax.Array, k: jax.Array) -> jax.Array:
    """q k^T / sqrt(d) in float32: [b, n, n]."""
    return jnp.einsum("bqd,bkd->bqk", q, k, preferred_element_type=jnp.float32) / q.shape[-1] ** 0.5

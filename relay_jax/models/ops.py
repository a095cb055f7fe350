"""Operations of the U-Net on images [b, h, w, c], or [b, n, c] for attention.

What each computes is in kernels/plain.py, in a few lines of JAX.
Some have another formulation for CPUs, GPUs or TPUs, equal but for
rounding (kernels/{cpu,gpu,tpu}.py; docs/lab says what each gains).
lax.platform_dependent chooses where the program is compiled, so that
one traced function serves every platform.
"""

from functools import partial

import chex
import jax
from jax import lax

from relay_jax.models.kernels import cpu, gpu, plain, tpu
from relay_jax.models.kernels.plain import conv, downsample, upsample

__all__ = [
    "add_bias",
    "attend",
    "conv",
    "conv1x1",
    "conv3x3",
    "downsample",
    "gradient_once",
    "up_conv3x3",
    "upsample",
]

# The choice stands inside of custom derivatives: JAX then
# differentiates one operation, and each platform gets the gradient
# that suits its formulation.


@jax.custom_vjp
def conv1x1(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """1 x 1 convolution: [b, h, w, c] @ [c, features] -> [b, h, w, features]."""
    return plain.product(x, kernel)


conv1x1.defvjp(
    lambda x, kernel: (conv1x1(x, kernel), (x, kernel)),
    lambda inputs, cotangent: lax.platform_dependent(
        *inputs,
        cotangent,
        cpu=cpu.narrow_product_gradients,
        default=plain.product_gradients,
    ),
)


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """3 x 3 convolution with zeros outside: [b, h, w, c] -> [b, h, w, features].

    kernel: [3, 3, c, features].
    """
    return lax.platform_dependent(x, kernel, cpu=cpu.winograd_conv, default=plain.conv)


conv3x3.defvjp(
    lambda x, kernel: (conv3x3(x, kernel), (x, kernel)),
    lambda inputs, cotangent: lax.platform_dependent(
        *inputs, cotangent, cpu=cpu.winograd_gradients, default=plain.conv_gradients
    ),
)


@jax.custom_vjp
def up_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv3x3(upsample(x), kernel): [b, h, w, c] -> [b, 2h, 2w, features]."""
    return lax.platform_dependent(x, kernel, cpu=cpu.three_rows_up_conv, default=plain.up_conv)


up_conv3x3.defvjp(
    lambda x, kernel: (up_conv3x3(x, kernel), (x, kernel)),
    lambda inputs, cotangent: lax.platform_dependent(
        *inputs,
        cotangent,
        cpu=cpu.three_rows_up_gradients,
        default=plain.up_conv_gradients,
    ),
)


@jax.custom_vjp
def add_bias(x: jax.Array, bias: jax.Array) -> jax.Array:
    """x + bias of the last axis, summed in float32, in the precision of x.

    x: [..., c]; bias: [c], float32, and so is its gradient.
    """
    return (x + bias).astype(x.dtype)


add_bias.defvjp(
    lambda x, bias: (add_bias(x, bias), None),
    lambda _, cotangent: (
        cotangent,
        lax.platform_dependent(cotangent, tpu=tpu.sum_by_product, default=plain.sum_pixels),
    ),
)


@jax.custom_vjp
def gradient_once(x: jax.Array) -> jax.Array:
    """x itself, of any shape, for a value that is used several times."""
    return x


# Its gradient is a sum over all uses. XLA for CPU would compute
# that sum again wherever it is needed; other platforms compute it
# once of themselves.
gradient_once.defvjp(
    lambda x: (x, None),
    lambda _, cotangent: (
        lax.platform_dependent(cotangent, cpu=cpu.computed_once, default=lambda same: same),
    ),
)


def attend(qkv: jax.Array, heads: int) -> jax.Array:
    """softmax(q k^T / sqrt(d)) v of each head, softmax in float32: [b, n, 3c] -> [b, n, c].

    qkv: the channels of q, then of k and
    of v, each head by head; d = c / heads.
    """
    chex.assert_shape(qkv, (None, None, None), custom_message="qkv must be [b, n, 3c]")
    all_heads = partial(plain.attend, heads=heads)
    by_head = partial(tpu.attend_by_head if tpu.pays_by_head(qkv) else plain.attend, heads=heads)
    fused = partial(gpu.fused_attend if gpu.pays_fused(qkv, heads) else plain.attend, heads=heads)
    return lax.platform_dependent(qkv, cuda=fused, tpu=by_head, default=all_heads)

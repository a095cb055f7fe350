"""The operations of the U-Net by their definitions, as every platform can compute them.

x: [b, h, w, c]; kernel: [height, width, c, features],
stride 1. tests/kernels hold the formulations of cpu.py and
tpu.py against these.
"""

import jax
import jax.numpy as jnp
from jax import lax


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Convolution with zeros outside of the image: [b, h, w, c] -> [b, h, w, features]."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `conv` by x and by kernel."""
    # By transposition, as it is linear in both: jax.vjp would
    # compute the convolution once more.
    return (
        *jax.linear_transpose(lambda of_x: conv(of_x, kernel), x)(cotangent),
        *jax.linear_transpose(lambda of_kernel: conv(x, of_kernel), kernel)(cotangent),
    )


def product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """A 1 x 1 convolution: [b, h, w, c] @ [c, features]."""
    return x @ kernel


def product_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `product` by x and by kernel."""
    return (
        *jax.linear_transpose(lambda of_x: product(of_x, kernel), x)(cotangent),
        *jax.linear_transpose(lambda of_kernel: product(x, of_kernel), kernel)(cotangent),
    )


def sum_fours(x: jax.Array) -> jax.Array:
    """Sum over 2 x 2 pixels in float32: [b, h, w, c] -> [b, h/2, w/2, c]."""
    # Of slices: a reduction of the reshaped image is several times
    # slower on TPU.
    x = x.astype(jnp.float32)
    rows = x[:, ::2] + x[:, 1::2]
    return rows[:, :, ::2] + rows[:, :, 1::2]


def downsample(x: jax.Array) -> jax.Array:
    """Mean over 2 x 2 pixels: [b, h, w, c] -> [b, h/2, w/2, c]."""
    return (sum_fours(x) / 4).astype(x.dtype)


@jax.custom_vjp
def upsample(x: jax.Array) -> jax.Array:
    """Every pixel becomes 2 x 2 pixels: [b, h, w, c] -> [b, 2h, 2w, c]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(
        b, 2 * h, 2 * w, c
    )


# The gradient that JAX would find sums
# over axes of length 2, see `sum_fours`.
upsample.defvjp(
    lambda x: (upsample(x), None),
    lambda _, cotangent: (sum_fours(cotangent).astype(cotangent.dtype),),
)


def up_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """`conv` of the upsampled image: [b, h, w, c] -> [b, 2h, 2w, features]."""
    return conv(upsample(x), kernel)


def up_conv_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Gradients of `up_conv` by x and by kernel."""
    by_x, by_kernel = conv_gradients(upsample(x), kernel, cotangent)
    return sum_fours(by_x).astype(x.dtype), by_kernel


def sum_pixels(x: jax.Array) -> jax.Array:
    """Sum of [..., c] over all but the last axis, in float32: [c]."""
    return jnp.sum(x, axis=tuple(range(x.ndim - 1)), dtype=jnp.float32)


def attend(qkv: jax.Array, heads: int) -> jax.Array:
    """Attention of all heads at once: [b, n, 3c], see `ops.attend`, -> [b, n, c]."""
    b, n, channels = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)
    return jax.nn.dot_product_attention(q, k, v).reshape(b, n, channels // 3)

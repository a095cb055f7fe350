"""The convolution of the U-Net that CPUs want written differently; the plain one elsewhere.

The choice is made where a program is compiled for its platform (lax.platform_dependent), inside a custom derivative, so
that differentiation sees one operation of (x, kernel). tests/models/test_cpu.py holds the two against each other;
docs/benchmarks.md says what it gains. x: [b, h, w, c]; kernel: [height, width, c, features], stride 1.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

Convolution = Callable[[jax.Array, jax.Array], jax.Array]


def by_platform(cpu: Convolution, default: Convolution) -> Convolution:
    """Two formulations of one function as one differentiable function."""
    def choose(*inputs: jax.Array, of: Callable) -> Any:
        return lax.platform_dependent(*inputs, cpu=of(cpu), default=of(default))

    def gradient(formulation: Convolution) -> Callable:
        """By transposition, as a convolution is linear in both: jax.vjp would compute it once more."""
        return lambda x, kernel, cotangent: (
            *jax.linear_transpose(lambda of_x: formulation(of_x, kernel), x)(cotangent),
            *jax.linear_transpose(lambda of_kernel: formulation(x, of_kernel), kernel)(cotangent))

    function = jax.custom_vjp(lambda x, kernel: choose(x, kernel, of=lambda formulation: formulation))
    function.defvjp(lambda x, kernel: (function(x, kernel), (x, kernel)),
                    lambda saved, cotangent: choose(*saved, cotangent, of=gradient))
    return function


def conv(x: jax.Array, kernel: jax.Array, padding: str | tuple[tuple[int, int], tuple[int, int]] = "SAME") -> jax.Array:
    """Zeros outside of the image; by default a result of the same size."""
    return lax.conv_general_dilated(x, kernel, (1, 1), padding, dimension_numbers=("NHWC", "HWIO", "NHWC"))


def upsample(x: jax.Array) -> jax.Array:
    """Every pixel becomes 2 x 2 pixels. [b, h, w, c] -> [b, 2h, 2w, c]."""
    b, h, w, c = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None, :], (b, h, 2, w, 2, c)).reshape(b, 2 * h, 2 * w, c)


def phased_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv(upsample(x), kernel) for a 3 x 3 kernel, from four convolutions of x itself: 4/9 of the multiplications.

    A pixel of the large image sees 2 x 2 pixels of the small one; the taps that fall on the same pixel are summed. Which
    ones depends on whether its row and column are even (-1 | 0, 1) or odd (-1, 0 | 1). Sums in less than float32 would
    cost precision: there it is the plain formulation.
    """
    if x.dtype != jnp.float32:
        return conv(upsample(x), kernel)

    def pairs(k: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Sums over the first axis of length 3, for even and for odd places: [2, ...] each."""
        return jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])

    b, h, w, _ = x.shape
    rows = []
    for down, part in enumerate(pairs(kernel)):
        columns = [conv(x, both.swapaxes(0, 1), ((1 - down, down), (1 - right, right)))
                   for right, both in enumerate(pairs(part.swapaxes(0, 1)))]
        rows.append(jnp.stack(columns, axis=3))
    return jnp.stack(rows, axis=2).reshape(b, 2 * h, 2 * w, kernel.shape[-1])


conv3x3_upsampled = by_platform(phased_conv, lambda x, kernel: conv(upsample(x), kernel))

"""Operations of the U-Net as CPUs compute them fastest; models/ops.py chooses where.

XLA for CPU multiplies matrices at a higher rate than it convolves,
so each 3 x 3 convolution becomes matrix products that need fewer
multiplications. Each function equals the one of plain.py in its
docstring but for rounding (tests/kernels/test_cpu.py);
docs/lab/cpu.md says what it gains. x: [b, h, w, c]; kernel:
[height, width, c, features], stride 1.
"""

from collections.abc import Callable, Sequence
from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.models.kernels.plain import (
    conv,
    conv_gradients,
    up_conv,
    up_conv_gradients,
)

# Winograd's F(4, 3): four outputs of three taps from six inputs with
# six products instead of twelve (arXiv 1509.09308).
_INPUT = np.array(
    [
        [4, 0, -5, 0, 1, 0],
        [0, -4, -4, 1, 1, 0],
        [0, 4, -4, -1, 1, 0],
        [0, -2, -1, 2, 1, 0],
        [0, 2, -1, -2, 1, 0],
        [0, 4, 0, -5, 0, 1],
    ]
)
_TAPS = np.array([[6, 0, 0], [-4, -4, -4], [-4, 4, -4], [1, 2, 4], [1, -2, 4], [0, 0, 24]]) / 24
_OUTPUT = np.array(
    [
        [1, 1, 1, 1, 1, 0],
        [0, 1, -1, 2, -2, 0],
        [0, 1, 1, 4, 4, 0],
        [0, 1, -1, 8, -8, 1],
    ]
)
# The same idea where every row stands twice: with s = k0 + k1 + k2,
# two rows of outputs are k0 (x[i-1] - x[i]) + s x[i] and s x[i] + k2
# (x[i+1] - x[i]), three products instead of six.
_TWICE_INPUT = np.array([[1, -1, 0], [0, 1, 0], [0, -1, 1]])
_TWICE_TAPS = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]])
_TWICE_OUTPUT = np.array([[1, 1, 0], [0, 1, 1]])
# Of fewer channels, all nine pixels are
# gathered into one product instead.
_FEW = 16
# An image of fewer rows gains too little
# for what its program costs to compile.
_SMALL = 16


# The functions under jax.jit are traced once per shape instead of
# once per layer.


@jax.jit
def narrow_product_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """plain.product_gradients, of inputs in the order in which they lie."""
    by_x = cotangent @ kernel.T
    # With the fewer channels as rows, no
    # input has to be transposed in memory.
    if x.shape[-1] <= cotangent.shape[-1]:
        return by_x, _sum_apart(_narrow_by_wide, x, cotangent)
    return by_x, _sum_apart(_narrow_by_wide, cotangent, x).T


def _narrow_by_wide(narrow: jax.Array, wide: jax.Array) -> jax.Array:
    """Sum over all pixels of the products of channels: [rows, columns]."""
    rows, columns = (x.reshape(-1, x.shape[-1]) for x in (narrow, wide))
    return jnp.einsum("nr,nc->rc", rows, columns)


def computed_once(x: jax.Array) -> jax.Array:
    """x, which XLA then does not compute again in each of its uses."""
    return _apart(_same, x)


def _same(x: jax.Array) -> jax.Array:
    return x


@jax.jit
def winograd_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """plain.conv of a 3 x 3 kernel: half of the multiplications for a tall image of float32."""
    if x.dtype != jnp.float32:
        return conv(x, kernel)  # sums in less than float32 would cost precision
    if x.shape[-1] < _FEW:
        return _gathered_conv(x, kernel)
    if not _tall(x):
        return conv(x, kernel)
    return _apart(_winograd, x, kernel)


def _winograd(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Four rows at a time as six products; h must be a multiple of 4."""
    b, h, w, c = x.shape
    # The three taps along a row are columns of one product, added
    # where they belong afterwards. Winograd along both axes
    # multiplies less, but is slower for few features and takes twice
    # the time to compile with twice the error.
    taps = jnp.stack(_combine(_TAPS, kernel.swapaxes(1, 2))).reshape(6, c, -1)
    products = jnp.einsum("tnc,tcf->tnf", jnp.stack(_six(x)).reshape(6, -1, c), taps).reshape(
        6, b, h // 4, w, 3, -1
    )
    four = [
        reduce(
            add,
            [_moved(tap, i - 1, axis=2) for i, tap in enumerate(jnp.moveaxis(row, 3, 0))],
        )
        for row in _combine(_OUTPUT, products)
    ]
    return jnp.stack(four, axis=2).reshape(b, h, w, -1)


@jax.jit
def winograd_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """plain.conv_gradients of a 3 x 3 kernel, by the transposed products."""
    if x.dtype != jnp.float32:
        return conv_gradients(x, kernel, cotangent)
    # By x it is a convolution too, with
    # the kernel turned by half a circle.
    by_x = winograd_conv(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))
    if x.shape[-1] < _FEW:
        (by_kernel,) = jax.linear_transpose(partial(_gathered_conv, x), kernel)(cotangent)
    elif _tall(x):
        by_kernel = _sum_apart(_winograd_by_kernel, x, cotangent)
    else:
        by_kernel = conv_gradients(x, kernel, cotangent)[1]
    return by_x, by_kernel


def _winograd_by_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient of `_winograd` by its kernel: [3, 3, c, features]."""
    b, h, w, c = x.shape
    four = [cotangent[:, i::4] for i in range(4)]
    six = jnp.stack(
        [
            jnp.stack([_moved(rows, 1 - i, axis=2) for i in range(3)], axis=3)
            for rows in _combine(_OUTPUT.T, four)
        ]
    )
    products = jnp.einsum(
        "tnc,tnf->tcf",
        jnp.stack(_six(x)).reshape(6, -1, c),
        six.reshape(6, b * h // 4 * w, -1),
    )
    return jnp.stack(_combine(_TAPS.T, products.reshape(6, c, 3, -1))).swapaxes(1, 2)


@jax.jit
def three_rows_up_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """plain.up_conv of a 3 x 3 kernel: a quarter of the multiplications, for float32."""
    if x.dtype != jnp.float32:
        return up_conv(x, kernel)
    return _apart(_three_rows, x, kernel)


def _three_rows(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Two rows of outputs as three products, [b, 2h, 2w, features]."""
    b, h, w, c = x.shape
    # The taps along a row, k0, s and k2, are columns of one
    # product, so that each input is read once; their differences
    # are taken of the results.
    products = jnp.einsum("tnc,tcf->tnf", _three(x).reshape(3, -1, c), _three_taps(kernel))
    two = []
    for row in _combine(_TWICE_OUTPUT, products.reshape(3, b, h, w, 3, -1)):
        before, same, after = jnp.moveaxis(row, 3, 0)
        left = _moved(before, -1, axis=2) - before + same
        right = same + _moved(after, 1, axis=2) - after
        two.append(jnp.stack([left, right], 3))
    return jnp.stack(two, axis=2).reshape(b, 2 * h, 2 * w, -1)


@jax.jit
def three_rows_up_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """plain.up_conv_gradients of a 3 x 3 kernel, by the transposed products."""
    if x.dtype != jnp.float32:
        return up_conv_gradients(x, kernel, cotangent)
    return (
        _apart(_three_rows_by_x, kernel, cotangent),
        _sum_apart(_three_rows_by_kernel, x, cotangent),
    )


def _three_rows_by_products(cotangent: jax.Array) -> jax.Array:
    """The gradient of `_three_rows` by its products: [3, b h w, 3 features]."""
    b, h, w, _ = cotangent.shape
    columns = []
    for i in range(2):
        left, right = cotangent[:, i::2, ::2], cotangent[:, i::2, 1::2]
        columns.append(
            jnp.stack(
                [
                    _moved(left, 1, 2) - left,
                    left + right,
                    _moved(right, -1, 2) - right,
                ],
                axis=3,
            )
        )
    return jnp.stack(_combine(_TWICE_OUTPUT.T, columns)).reshape(3, b * h * w // 4, -1)


def _three_rows_by_x(kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient of `_three_rows` by x: [b, h, w, c]."""
    b, h, w, _ = cotangent.shape
    by_rows = jnp.einsum("tnf,tcf->tnc", _three_rows_by_products(cotangent), _three_taps(kernel))
    rows = by_rows.reshape(3, b, h // 2, w // 2, kernel.shape[2])
    return _moved(rows[0], 1, axis=1) - rows[0] + rows[1] - rows[2] + _moved(rows[2], -1, axis=1)


def _three_rows_by_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
    """The gradient of `_three_rows` by its kernel: [3, 3, c, features]."""
    c = x.shape[-1]
    by_taps = jnp.einsum(
        "tnc,tnf->tcf",
        _three(x).reshape(3, -1, c),
        _three_rows_by_products(cotangent),
    )
    taps = by_taps.reshape(3, c, 3, -1)
    columns = jnp.moveaxis(jnp.stack(_combine(_TWICE_TAPS.T, taps)), 2, 0)
    return jnp.stack(_combine(_TWICE_TAPS.T, columns), axis=1)


def _tall(x: jax.Array) -> bool:
    return x.shape[1] >= _SMALL and x.shape[1] % 4 == 0


def _gathered_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv(x, kernel) as one product of what each pixel sees."""
    seen = jnp.stack(
        [_moved(_moved(x, i - 1, axis=1), j - 1, axis=2) for i in range(3) for j in range(3)],
        axis=3,
    )
    return seen.reshape(*x.shape[:3], -1) @ kernel.reshape(-1, kernel.shape[-1])


def _six(x: jax.Array) -> list[jax.Array]:
    """What Winograd multiplies instead of the rows: six of [b, h / 4, w, c]."""
    four = [x[:, i::4] for i in range(4)]
    return _combine(_INPUT, [_moved(four[3], -1, axis=1), *four, _moved(four[0], 1, axis=1)])


def _three(x: jax.Array) -> jax.Array:
    """What stands for two equal rows: [3, b, h, w, c]."""
    return jnp.stack(_combine(_TWICE_INPUT, [_moved(x, -1, axis=1), x, _moved(x, 1, axis=1)]))


def _three_taps(kernel: jax.Array) -> jax.Array:
    """The taps k0, s and k2 along both axes: [3, c, 3 features]."""
    rows = jnp.stack(_combine(_TWICE_TAPS, kernel))
    return jnp.concatenate(_combine(_TWICE_TAPS, jnp.moveaxis(rows, 1, 0)), axis=-1)


def _combine(matrix: np.ndarray, parts: Sequence[jax.Array] | jax.Array) -> list[jax.Array]:
    """matrix @ parts, without the zeros."""
    return [
        reduce(
            add,
            [
                part if factor == 1 else float(factor) * part
                for factor, part in zip(row, parts, strict=True)
                if factor
            ],
        )
        for row in matrix
    ]


def _moved(x: jax.Array, by: int, axis: int) -> jax.Array:
    """Place i of the result is place i + by (-1, 0 or 1) of x; zeros outside of the image."""
    edge = jnp.zeros_like(lax.slice_in_dim(x, 0, 1, axis=axis))
    inside = lax.slice_in_dim(x, max(by, 0), x.shape[axis] + min(by, 0), axis=axis)
    return jnp.concatenate([edge] * (by < 0) + [inside] + [edge] * (by > 0), axis=axis)


def _apart(function: Callable[..., jax.Array], *inputs: jax.Array) -> jax.Array:
    """function(*inputs) behind a condition, where XLA does not merge it with what stands around.

    The condition fails for NaN alone, and gives NaN.
    """
    # Merged, the inputs would be computed again in each of the six
    # parts, and the parts in each use of the result; XLA for CPU
    # drops optimization_barrier too early to prevent it. Not with
    # several processes: an exchange between them that stands in a
    # condition may meet another one, and ends the run.
    if jax.distributed.is_initialized():
        return function(*inputs)
    function = jax.jit(function)  # traced once for both uses
    one, result = inputs[-1].ravel()[0], jax.eval_shape(function, *inputs)
    return lax.cond(
        one == one,
        function,
        lambda *_: jnp.full(result.shape, jnp.nan, result.dtype),
        *inputs,
    )


def _sum_apart(function: Callable[..., jax.Array], *inputs: jax.Array) -> jax.Array:
    """_apart for a sum over the batch, which several devices may share (training/step.py)."""
    # Their exchange would stand in the condition, and devices that
    # reach two of them in different orders wait for ever.
    mesh = jax.sharding.get_abstract_mesh()
    if not mesh.empty and mesh.size > 1:
        return function(*inputs)
    return _apart(function, *inputs)

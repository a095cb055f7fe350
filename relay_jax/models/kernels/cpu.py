"""Operations of the U-Net that CPUs want written differently; the plain ones elsewhere.

The choice is made where a program is compiled for its platform (lax.platform_dependent), inside
a custom derivative, so that differentiation sees one operation. tests/kernels/test_cpu.py holds
the two against each other; docs/benchmarks.md
says what it gains. x: [b, h, w, c]; kernel: [height, width, c, features], stride 1.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.models.resample import sum_fours, upsample

# Winograd's F(4, 3): four outputs of three taps from six inputs with six products instead of
# twelve (arXiv 1509.09308).
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
    [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
)
# The same idea where every row stands twice: with s = k0 + k1 + k2, two rows of outputs are k0
# (x[i-1] - x[i]) + s x[i] and s x[i] + k2 (x[i+1] - x[i]), three products instead of six.
_TWICE_INPUT = np.array([[1, -1, 0], [0, 1, 0], [0, -1, 1]])
_TWICE_TAPS = np.array([[1, 0, 0], [1, 1, 1], [0, 0, 1]])
_TWICE_OUTPUT = np.array([[1, 1, 0], [0, 1, 1]])
_FEW = 16  # channels: fewer are gathered from all nine pixels
_SMALL = 16  # rows: an image of fewer gains too little for what its program costs to compile


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Zeros outside of the image, a result of the same size."""
    return lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def conv_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of conv by x and by kernel: by transposition, as it is linear in both. jax.vjp would
    compute it once more."""
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
    """Of product by x and by kernel."""
    return (
        *jax.linear_transpose(lambda of_x: product(of_x, kernel), x)(cotangent),
        *jax.linear_transpose(lambda of_kernel: product(x, of_kernel), kernel)(cotangent),
    )


@jax.jit
def narrow_product_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """product_gradients, the second with the fewer channels as rows, from inputs in the order
    in which they lie."""

    def narrow_by_wide(narrow: jax.Array, wide: jax.Array) -> jax.Array:
        return jnp.einsum(
            "nr,nc->rc", narrow.reshape(-1, narrow.shape[-1]), wide.reshape(-1, wide.shape[-1])
        )

    by_x = cotangent @ kernel.T
    if x.shape[-1] <= cotangent.shape[-1]:
        return by_x, _apart(narrow_by_wide, x, cotangent)
    return by_x, _apart(narrow_by_wide, cotangent, x).T


@jax.custom_vjp
def conv1x1(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """[b, h, w, c] @ [c, features]"""
    return product(x, kernel)


conv1x1.defvjp(
    lambda x, kernel: (conv1x1(x, kernel), (x, kernel)),
    lambda inputs, cotangent: lax.platform_dependent(
        *inputs, cotangent, cpu=narrow_product_gradients, default=product_gradients
    ),
)


@jax.custom_vjp
def gradient_once(x: jax.Array) -> jax.Array:
    """x. On CPU its gradient, a sum over all uses of x, is computed once instead of again
    wherever it is needed."""
    return x


gradient_once.defvjp(
    lambda x: (x, None),
    lambda _, cotangent: (
        lax.platform_dependent(
            cotangent,
            cpu=lambda gradient: _apart(lambda same: same, gradient),
            default=lambda gradient: gradient,
        ),
    ),
)


@jax.jit
def winograd_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv(x, kernel) as matrix products: half of the multiplications for a tall image of float32.

    Four rows at a time. The three taps along a row are columns of one product, added where they
    belong.
    """
    if x.dtype != jnp.float32:
        return conv(x, kernel)  # sums in less than float32 would cost precision
    if x.shape[-1] < _FEW:
        return _gathered_conv(x, kernel)
    if not _tall(x):
        return conv(x, kernel)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        taps = jnp.stack(_combine(_TAPS, kernel.swapaxes(1, 2))).reshape(6, c, -1)
        products = jnp.einsum("tnc,tcf->tnf", jnp.stack(_six(x)).reshape(6, -1, c), taps).reshape(
            6, b, h // 4, w, 3, -1
        )
        four = [
            reduce(
                add, [_moved(tap, i - 1, axis=2) for i, tap in enumerate(jnp.moveaxis(row, 3, 0))]
            )
            for row in _combine(_OUTPUT, products)
        ]
        return jnp.stack(four, axis=2).reshape(b, h, w, -1)

    return _apart(convolve, x, kernel)


@jax.jit
def winograd_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """conv_gradients, the same way."""

    def by_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        four = [cotangent[:, i::4] for i in range(4)]
        six = jnp.stack(
            [
                jnp.stack([_moved(rows, 1 - i, axis=2) for i in range(3)], axis=3)
                for rows in _combine(_OUTPUT.T, four)
            ]
        )
        products = jnp.einsum(
            "tnc,tnf->tcf", jnp.stack(_six(x)).reshape(6, -1, c), six.reshape(6, b * h // 4 * w, -1)
        )
        return jnp.stack(_combine(_TAPS.T, products.reshape(6, c, 3, -1))).swapaxes(1, 2)

    if x.dtype != jnp.float32:
        return conv_gradients(x, kernel, cotangent)
    by_x = winograd_conv(cotangent, kernel[::-1, ::-1].swapaxes(2, 3))
    if x.shape[-1] < _FEW:
        return by_x, *jax.linear_transpose(lambda of_kernel: _gathered_conv(x, of_kernel), kernel)(
            cotangent
        )
    return by_x, _apart(by_kernel, x, cotangent) if _tall(x) else conv_gradients(
        x, kernel, cotangent
    )[1]


@jax.custom_vjp
def conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv(x, kernel) for a 3 x 3 kernel."""
    return lax.platform_dependent(x, kernel, cpu=winograd_conv, default=conv)


conv3x3.defvjp(
    lambda x, kernel: (conv3x3(x, kernel), (x, kernel)),
    lambda inputs, cotangent: lax.platform_dependent(
        *inputs, cotangent, cpu=winograd_gradients, default=conv_gradients
    ),
)


def up_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """conv of the image with every pixel as 2 x 2 pixels: [b, h, w, c] -> [b, 2h, 2w, features]."""
    return conv(upsample(x), kernel)


def up_conv_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Of up_conv by x and by kernel."""
    by_x, by_kernel = conv_gradients(upsample(x), kernel, cotangent)
    return sum_fours(by_x).astype(x.dtype), by_kernel


@jax.jit
def three_rows_up_conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """up_conv(x, kernel) as matrix products, a quarter of the multiplications, for float32.

    The taps along a row, k0, s and k2, are columns of one product; their differences are taken
    of the results.
    """
    if x.dtype != jnp.float32:
        return up_conv(x, kernel)

    def convolve(x: jax.Array, kernel: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        products = jnp.einsum(
            "tnc,tcf->tnf", _three(x).reshape(3, -1, c), _three_taps(kernel)
        ).reshape(3, b, h, w, 3, -1)
        two = []
        for row in _combine(_TWICE_OUTPUT, products):
            before, same, after = jnp.moveaxis(row, 3, 0)
            two.append(
                jnp.stack(
                    [
                        _moved(before, -1, axis=2) - before + same,
                        same + _moved(after, 1, axis=2) - after,
                    ],
                    3,
                )
            )
        return jnp.stack(two, axis=2).reshape(b, 2 * h, 2 * w, -1)

    return _apart(convolve, x, kernel)


@jax.jit
def three_rows_up_gradients(
    x: jax.Array, kernel: jax.Array, cotangent: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """up_conv_gradients, the same way."""
    if x.dtype != jnp.float32:
        return up_conv_gradients(x, kernel, cotangent)
    b, h, w, c = x.shape

    def of_products(cotangent: jax.Array) -> jax.Array:
        columns = []
        for i in range(2):
            left, right = cotangent[:, i::2, ::2], cotangent[:, i::2, 1::2]
            columns.append(
                jnp.stack(
                    [_moved(left, 1, 2) - left, left + right, _moved(right, -1, 2) - right], axis=3
                )
            )
        return jnp.stack(_combine(_TWICE_OUTPUT.T, columns)).reshape(3, b * h * w, -1)

    def by_x(kernel: jax.Array, cotangent: jax.Array) -> jax.Array:
        rows = jnp.einsum("tnf,tcf->tnc", of_products(cotangent), _three_taps(kernel)).reshape(
            3, b, h, w, c
        )
        return (
            _moved(rows[0], 1, axis=1) - rows[0] + rows[1] - rows[2] + _moved(rows[2], -1, axis=1)
        )

    def by_kernel(x: jax.Array, cotangent: jax.Array) -> jax.Array:
        taps = jnp.einsum(
            "tnc,tnf->tcf", _three(x).reshape(3, -1, c), of_products(cotangent)
        ).reshape(3, c, 3, -1)
        columns = jnp.moveaxis(jnp.stack(_combine(_TWICE_TAPS.T, taps)), 2, 0)
        return jnp.stack(_combine(_TWICE_TAPS.T, columns), axis=1)

    return _apart(by_x, kernel, cotangent), _apart(by_kernel, x, cotangent)


@jax.custom_vjp
def up_conv3x3(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """up_conv(x, kernel) for a 3 x 3 kernel."""
    return lax.platform_dependent(x, kernel, cpu=three_rows_up_conv, default=up_conv)


up_conv3x3.defvjp(
    lambda x, kernel: (up_conv3x3(x, kernel), (x, kernel)),
    lambda inputs, cotangent: lax.platform_dependent(
        *inputs, cotangent, cpu=three_rows_up_gradients, default=up_conv_gradients
    ),
)


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
    """[3, c, 3 features]"""
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
    """function(*inputs) behind a condition, where XLA for CPU does not merge it with what comes
    before and after.

    Merged, the inputs would be computed again in each of the six parts, and the parts in each
    use of the result; XLA for
    CPU drops optimization_barrier too early to prevent it. The condition fails for NaN alone,
    and gives NaN. Not with
    several processes: an exchange between them that stands in a condition may meet another one,
    and ends the run.
    """
    if jax.distributed.is_initialized():
        return function(*inputs)
    function = jax.jit(function)  # traced once for both uses
    one, result = inputs[-1].ravel()[0], jax.eval_shape(function, *inputs)
    return lax.cond(
        one == one, function, lambda *_: jnp.full(result.shape, jnp.nan, result.dtype), *inputs
    )

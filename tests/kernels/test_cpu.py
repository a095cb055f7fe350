"""The formulations for CPUs against the plain ones: values, gradients, and where each is used."""

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import use_abstract_mesh

from relay_jax.models.blocks import UNetBlock
from relay_jax.models.kernels.cpu import (
    three_rows_up_conv,
    three_rows_up_gradients,
    winograd_conv,
    winograd_gradients,
)
from relay_jax.models.kernels.plain import conv_gradients, up_conv, up_conv_gradients
from relay_jax.models.ops import conv, conv1x1, conv3x3, gradient_once, up_conv3x3, upsample
from relay_jax.runtime.sharding import batch_sharding, replicated
from tests.conftest import mesh_of

SHAPES = {
    "tall": (2, 16, 6, 16, 5),
    "as published": (1, 32, 32, 32, 32),
    "one column": (1, 20, 1, 17, 3),
    "few channels": (2, 16, 4, 3, 7),
    "one pixel": (1, 1, 1, 3, 2),
    "few rows": (2, 8, 8, 16, 16),
    "rows that fours leave": (1, 18, 4, 16, 3),
}


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def inputs(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x, kernel and the gradient of the result."""
    *pixels, channels, features = shape
    return (
        normal(*pixels, channels),
        normal(3, 3, channels, features, seed=1),
        normal(*pixels, features, seed=2),
    )


def fused(function: Callable) -> Callable:
    return jax.jit(lambda x, kernel: function(jax.nn.silu(x), kernel) + 1)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_winograd_is_the_convolution(shape: tuple[int, ...]) -> None:
    x, kernel, _ = inputs(shape)
    np.testing.assert_allclose(
        fused(winograd_conv)(x, kernel), fused(conv)(x, kernel), atol=3e-5 * shape[3] ** 0.5
    )


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_its_gradients_are_those_of_the_convolution(shape: tuple[int, ...]) -> None:
    for got, want in zip(
        *(jax.jit(f)(*inputs(shape)) for f in (winograd_gradients, conv_gradients)), strict=True
    ):
        np.testing.assert_allclose(got, want, atol=2e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_three_rows_are_the_convolution_of_the_enlarged_image_and_its_gradients(
    shape: tuple[int, ...],
) -> None:
    x, kernel, _ = inputs(shape)
    np.testing.assert_allclose(
        fused(three_rows_up_conv)(x, kernel), fused(up_conv)(x, kernel), atol=3e-5 * shape[3] ** 0.5
    )
    cotangent = normal(shape[0], 2 * shape[1], 2 * shape[2], shape[4], seed=2)
    plain = jax.jit(lambda x, k, d: jax.vjp(lambda x, k: conv(upsample(x), k), x, k)[1](d))(
        x, kernel, cotangent
    )
    for function in (three_rows_up_gradients, up_conv_gradients):
        for got, want in zip(jax.jit(function)(x, kernel, cotangent), plain, strict=True):
            np.testing.assert_allclose(got, want, atol=2e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("channels, features", [(24, 5), (5, 24), (7, 7)])
def test_gradients_of_a_1x1_convolution_are_those_of_the_product(
    channels: int, features: int
) -> None:
    x, kernel, cotangent = (
        normal(2, 6, 5, channels),
        normal(channels, features, seed=1),
        normal(2, 6, 5, features, seed=2),
    )
    got = jax.jit(lambda x, k, d: jax.vjp(conv1x1, x, k)[1](d))(x, kernel, cotangent)
    np.testing.assert_allclose(got[0], cotangent @ kernel.T, atol=1e-5)
    np.testing.assert_allclose(got[1], np.einsum("bhwc,bhwf->cf", x, cotangent), atol=3e-5)


def test_the_error_of_winograd_is_a_few_roundings() -> None:
    """Against float64: within ten times the error of the plain convolution in float32."""
    x, kernel, _ = inputs((1, 32, 32, 64, 64))
    with jax.enable_x64():
        exact = np.asarray(conv(jnp.asarray(x, jnp.float64), jnp.asarray(kernel, jnp.float64)))
    plain, quick = (
        np.sqrt(np.mean(np.square(jax.jit(f)(x, kernel) - exact))) for f in (conv, winograd_conv)
    )
    assert quick < 10 * plain and quick < 3e-6 * exact.std()


@pytest.mark.parametrize(("function", "plain"), [(conv3x3, conv), (up_conv3x3, up_conv)])
def test_differentiation_of_a_3x3_convolution_is_that_of_the_plain_one(
    function: Callable, plain: Callable
) -> None:
    x, kernel, cotangent = inputs(SHAPES["tall"])
    cotangent = upsample(cotangent) if plain is up_conv else cotangent
    for got, want in zip(
        *(
            jax.jit(lambda x, k, d, f=f: jax.vjp(f, x, k)[1](d))(x, kernel, cotangent)
            for f in (function, plain)
        ),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-3)


def test_nan_stays_nan() -> None:
    x, kernel, _ = inputs(SHAPES["tall"])
    assert np.isnan(winograd_conv(x, np.full_like(kernel, np.nan))).all()
    x[1, 3, 2, 1] = np.nan
    got, want = (np.isnan(f(x, kernel)) for f in (winograd_conv, conv))
    assert got[want].all() and not got[0].any()


def test_bfloat16_is_not_rounded_more_than_in_the_plain_formulation() -> None:
    x, kernel, cotangent = (jnp.asarray(array, jnp.bfloat16) for array in inputs(SHAPES["tall"]))
    np.testing.assert_array_equal(conv3x3(x, kernel), conv(x, kernel))
    np.testing.assert_array_equal(up_conv3x3(x, kernel), conv(upsample(x), kernel))
    for got, want in zip(
        winograd_gradients(x, kernel, cotangent), conv_gradients(x, kernel, cotangent), strict=True
    ):
        np.testing.assert_array_equal(got, want)


def test_other_platforms_get_the_plain_formulation() -> None:
    """A product in a program for CPUs, a convolution for TPUs and GPUs, lowered on any host."""
    shapes = tuple(
        jax.ShapeDtypeStruct(array.shape, array.dtype) for array in inputs(SHAPES["tall"])
    )

    def differentiated(x: jax.Array, kernel: jax.Array, cotangent: jax.Array) -> object:
        y, backward = jax.vjp(conv3x3, gradient_once(x), kernel)
        enlarged, backward_enlarged = jax.vjp(up_conv3x3, x, kernel)
        _, backward_product = jax.vjp(conv1x1, y, y[0, 0, : y.shape[-1]])
        return backward(cotangent), backward_enlarged(enlarged), backward_product(y)

    text = {
        platform: export.export(jax.jit(differentiated), platforms=[platform])(
            *shapes
        ).mlir_module()
        for platform in ("cpu", "tpu", "cuda")
    }
    assert {
        platform: module.count("stablehlo.convolution") for platform, module in text.items()
    } == {"cpu": 0, "tpu": 6, "cuda": 6}
    assert {platform for platform, module in text.items() if "0x7FC00000" in module} == {
        "cpu"
    }  # a condition's NaN


def test_a_gradient_taken_once_is_the_gradient() -> None:
    x = normal(3, 4)
    got, want = (
        jax.jit(jax.grad(lambda x, f=f: jnp.sum(jnp.sin(f(x)) * jnp.exp(f(x)))))(x)
        for f in (gradient_once, lambda x: x)
    )
    np.testing.assert_allclose(got, want, rtol=1e-6)


@pytest.mark.parametrize("resample", ["", "up"])
def test_a_block_of_the_network_uses_them(resample: str) -> None:
    """One condition for each of two tall convolutions; in the gradient two more for each, and
    one of the block's input."""
    block, x, embedding = UNetBlock(16, resample), normal(1, 16, 16, 16), normal(1, 8)
    params = jax.eval_shape(lambda: block.init(jax.random.key(0), x, embedding, False))

    def count(function: Callable) -> int:
        return jax.jit(function).lower(params, x).compile().as_text().count(" conditional(")

    def forward(params: dict, x: jax.Array) -> jax.Array:
        return jnp.sum(block.apply(params, x, embedding, False) ** 2)

    assert count(forward) == 2
    assert count(jax.grad(forward, (0, 1))) == 2 + 4 + 1


def test_devices_that_share_a_batch_exchange_nothing_inside_of_conditions() -> None:
    """Else they reach two exchanges in different orders and wait for each other for ever."""
    mesh, block = mesh_of(2), UNetBlock(16, "")
    x, embedding = normal(2, 16, 16, 16), normal(2, 8)
    params = jax.eval_shape(lambda: block.init(jax.random.key(0), x, embedding, False))
    shardings = (replicated(mesh), batch_sharding(mesh), batch_sharding(mesh))

    def gradient(params: dict, x: jax.Array, embedding: jax.Array) -> dict:
        return jax.grad(lambda p: jnp.sum(block.apply(p, x, embedding, False) ** 2))(params)

    def inside(function: Callable) -> int:
        compiled = jax.jit(function, in_shardings=shardings).lower(params, x, embedding).compile()
        text = compiled.as_text()
        names = re.findall(r"(?:true|false)_computation=(%[\w.-]+)", text)
        for group in re.findall(r"branch_computations=\{([^}]*)\}", text):
            names += group.split(", ")
        assert names, "the program has no conditions"
        parts = {part.split(" ")[0]: part for part in re.split(r"\n(?=%|ENTRY)", text)}
        return sum(" all-reduce" in parts[name] for name in names)

    def in_a_step(*inputs: Any) -> dict:
        with use_abstract_mesh(mesh.abstract_mesh):  # as training/step.py
            return gradient(*inputs)

    assert inside(gradient) > 0 == inside(in_a_step)

"""The formulations for TPUs against definitions in float64: attention by head, sums of biases."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.models.kernels import plain
from relay_jax.models.kernels.tpu import attend_by_head, sum_by_product
from relay_jax.models.ops import add_bias, attend

IMAGES, PIXELS, HEADS, WIDTH = 2, 6, 3, 4


def softmax_attention(qkv: np.ndarray) -> np.ndarray:
    q, k, v = np.moveaxis(qkv.reshape(IMAGES, PIXELS, 3, HEADS, WIDTH), 2, 0)
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(WIDTH)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v).reshape(
        IMAGES, PIXELS, -1
    )


def inputs(scale: float = 1.0) -> np.ndarray:
    return scale * np.random.default_rng(0).normal(size=(IMAGES, PIXELS, 3 * HEADS * WIDTH))


def gradient(attention: Callable, qkv: jax.Array) -> jax.Array:
    cotangent = jnp.asarray(
        np.random.default_rng(1).normal(size=(IMAGES, PIXELS, HEADS * WIDTH)), qkv.dtype
    )
    return jax.jit(lambda x: jax.vjp(lambda y: attention(y, HEADS), x)[1](cotangent)[0])(qkv)


# Scores of some hundreds would overflow an exponential alone.
@pytest.mark.parametrize("scale", [1.0, 30.0])
@pytest.mark.parametrize("attention", [attend_by_head, plain.attend])
def test_attention_equals_its_definition(attention: Callable, scale: float) -> None:
    qkv = inputs(scale)
    got = jax.jit(attention, static_argnums=1)(jnp.asarray(qkv, jnp.float32), HEADS)
    np.testing.assert_allclose(got, softmax_attention(qkv), atol=2e-5 * scale)


@pytest.mark.parametrize("scale", [1.0, 30.0])
def test_attention_by_head_has_the_gradient_of_the_plain_one(scale: float) -> None:
    got, want = (
        gradient(f, jnp.asarray(inputs(scale), jnp.float32)) for f in (attend_by_head, plain.attend)
    )
    np.testing.assert_allclose(got, want, atol=1e-5 * scale)


def test_attention_by_head_rounds_bfloat16_no_more_than_the_plain_one() -> None:
    qkv = jnp.asarray(inputs(), jnp.bfloat16)
    want = softmax_attention(np.asarray(qkv, np.float64))
    error, usual = (
        np.abs(np.asarray(jax.jit(f, static_argnums=1)(qkv, HEADS), np.float64) - want).max()
        for f in (attend_by_head, plain.attend)
    )
    assert error < 1.5 * usual and error < 0.02


def test_its_gradient_rounds_bfloat16_no_more_than_that_of_the_plain_one() -> None:
    qkv = jnp.asarray(inputs(), jnp.bfloat16)
    want = np.asarray(gradient(plain.attend, qkv.astype(jnp.float32)))
    error, usual = (
        np.sqrt(np.mean(np.square(np.asarray(gradient(f, qkv), np.float32) - want)))
        for f in (attend_by_head, plain.attend)
    )
    assert error < 1.5 * usual and error < 0.02


def test_only_the_attention_of_many_pixels_on_tpu_goes_by_head() -> None:
    def loops(platform: str, pixels: int) -> bool:
        qkv = jax.ShapeDtypeStruct((IMAGES, pixels, 3 * HEADS * WIDTH), jnp.float32)
        program = (
            jax.jit(attend, static_argnums=1)
            .trace(qkv, HEADS)
            .lower(lowering_platforms=(platform,))
        )
        return "while" in program.as_text()

    assert [loops(platform, 1024) for platform in ("tpu", "cpu", "cuda")] == [True, False, False]
    assert not loops("tpu", 256)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_gradient_of_a_bias_is_the_sum_over_all_pixels_on_every_platform(dtype: str) -> None:
    rng = np.random.default_rng(0)
    x, cotangent = (jnp.asarray(rng.normal(size=(2, 32, 32, 4)), dtype) for _ in range(2))
    y, backward = jax.vjp(add_bias, x, jnp.ones(4))
    by_x, by_bias = backward(cotangent)
    np.testing.assert_array_equal(y, (x.astype(jnp.float32) + 1).astype(dtype))
    np.testing.assert_array_equal(by_x, cotangent)
    want = np.asarray(cotangent, np.float64).sum((0, 1, 2))
    np.testing.assert_allclose(by_bias, want, atol=1e-4)
    np.testing.assert_allclose(sum_by_product(cotangent), want, atol=1e-4)


def test_only_16_bit_gradients_of_a_bias_on_tpu_are_products() -> None:
    def products(platform: str, dtype: str) -> bool:
        x = jax.ShapeDtypeStruct((2, 4, 4, 8), dtype)
        program = jax.jit(lambda x, bias: jax.vjp(add_bias, x, bias)[1](x)).trace(x, jnp.ones(8))
        return "dot_general" in program.lower(lowering_platforms=(platform,)).as_text()

    assert [products(platform, "bfloat16") for platform in ("tpu", "cpu", "cuda")] == [
        True,
        False,
        False,
    ]
    assert not products("tpu", "float32")

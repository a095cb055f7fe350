"""The CPU's formulation of an operation against the plain one: values, gradients, and where each is used."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from relay_jax.models.blocks import Conv
from relay_jax.models.cpu import conv, conv3x3_upsampled, phased_conv, upsample


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def plain(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return conv(upsample(x), kernel)


@pytest.mark.parametrize("shape", [(2, 4, 6, 5), (1, 1, 1, 3), (1, 3, 1, 2)])
def test_phases_are_the_convolution_of_the_large_image(shape: tuple[int, ...]) -> None:
    x, kernel = normal(*shape), normal(3, 3, shape[-1], 7, seed=1)
    np.testing.assert_allclose(jax.jit(phased_conv)(x, kernel), plain(x, kernel), atol=2e-5)


def test_the_gradient_of_both_inputs_is_that_of_the_plain_formulation() -> None:
    x, kernel, cotangent = normal(2, 4, 6, 5), normal(3, 3, 5, 7, seed=1), normal(2, 8, 12, 7, seed=2)
    for got, want in zip(*(jax.jit(lambda x, k, d, f=f: jax.vjp(f, x, k)[1](d))(x, kernel, cotangent)
                           for f in (conv3x3_upsampled, plain)), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)


def test_a_constant_image_far_from_the_edge_is_multiplied_by_the_sum_of_the_taps() -> None:
    kernel = normal(3, 3, 1, 1)
    got = conv3x3_upsampled(jnp.full((1, 4, 4, 1), 2.0), kernel)[0, 1:-1, 1:-1, 0]
    np.testing.assert_allclose(got, np.full((6, 6), 2 * kernel.sum()), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_not_rounded_more_than_in_the_plain_formulation() -> None:
    x, kernel = jnp.asarray(normal(1, 4, 4, 8), jnp.bfloat16), jnp.asarray(normal(3, 3, 8, 8, seed=1), jnp.bfloat16)
    np.testing.assert_array_equal(conv3x3_upsampled(x, kernel), plain(x, kernel))


def test_other_platforms_get_the_plain_formulation() -> None:
    """Four convolutions in a program for CPUs; one on the repeated image for TPUs and GPUs, lowered on any host."""
    shapes = jax.ShapeDtypeStruct((1, 4, 4, 3), jnp.float32), jax.ShapeDtypeStruct((3, 3, 3, 5), jnp.float32)
    count = {platform: export.export(jax.jit(conv3x3_upsampled), platforms=[platform])(*shapes).mlir_module().count(
        "stablehlo.convolution") for platform in ("cpu", "tpu", "cuda")}
    assert count == {"cpu": 4, "tpu": 1, "cuda": 1}


def test_a_layer_of_the_network_uses_it_with_the_same_parameters() -> None:
    x = normal(2, 4, 4, 8)
    layer, on_large = Conv(6, upsampled=True), Conv(6)
    params = jax.jit(lambda key: on_large.init(key, upsample(x)))(jax.random.key(0))
    np.testing.assert_allclose(layer.apply(params, x), on_large.apply(params, upsample(x)), atol=1e-5)

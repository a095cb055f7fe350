"""Operations of the U-Net by their definitions; tests/kernels compares their formulations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.models import ops
from relay_jax.models.ops import downsample, upsample


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def test_downsampling_is_the_mean_of_two_by_two_pixels() -> None:
    x = np.arange(4 * 6, dtype=np.float32).reshape(1, 4, 6, 1)
    np.testing.assert_array_equal(downsample(x)[0, ..., 0], [[3.5, 5.5, 7.5], [15.5, 17.5, 19.5]])


def test_upsampling_repeats_pixels_and_downsampling_undoes_it() -> None:
    x = normal(2, 3, 5, 4)
    up = upsample(x)
    np.testing.assert_array_equal(up, x.repeat(2, axis=1).repeat(2, axis=2))
    np.testing.assert_array_equal(downsample(up), x)


def test_upsampling_is_the_transpose_of_the_sum_over_fours() -> None:
    """<up(x), y> = <x, sum(y)>, of which its gradient makes use."""
    x, y = normal(2, 3, 2, 4), normal(2, 6, 4, 4, seed=1)
    (gradient,) = jax.vjp(upsample, x)[1](y)
    np.testing.assert_allclose(jnp.vdot(upsample(x), y), jnp.vdot(x, gradient), rtol=1e-5)
    np.testing.assert_allclose(gradient, 4 * downsample(y), rtol=1e-6)


def test_the_convolution_of_an_upsampled_image_is_one_operation() -> None:
    x, kernel = normal(1, 4, 6, 3), normal(3, 3, 3, 2, seed=1)
    got = jax.jit(ops.up_conv3x3)(x, kernel)
    np.testing.assert_allclose(got, ops.conv(upsample(x), kernel), atol=1e-5)


def test_a_1x1_convolution_is_a_product_of_channels() -> None:
    x, kernel = normal(1, 4, 6, 3), normal(3, 2, seed=1)
    np.testing.assert_allclose(ops.conv1x1(x, kernel), x @ kernel, atol=1e-6)
    np.testing.assert_allclose(ops.conv(x, kernel[None, None]), x @ kernel, atol=1e-6)


def test_attention_refuses_images_by_the_name_of_its_argument() -> None:
    with pytest.raises(AssertionError, match=r"qkv must be \[b, n, 3c\]"):
        ops.attend(jnp.zeros((1, 4, 4, 12)), 2)

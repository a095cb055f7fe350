"""Block noise: the double sum, its exact covariance from unit impulses, unit variance, the
noise of a relay stage."""

import jax
import numpy as np
import pytest
from scipy import fft

from relay_jax.diffusion.block_noise import block_noise, block_noise_power, relay_noise
from relay_jax.diffusion.process import RelayProcess

make = jax.jit(block_noise, static_argnums=1)
make_relay = jax.jit(relay_noise, static_argnums=(2, 3))


def white(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def impulses(height: int, width: int) -> np.ndarray:
    """One image per pixel with a 1 there: [h w, h, w, 1]."""
    return np.eye(height * width, dtype=np.float32).reshape(-1, height, width, 1)


def triangle(size: int, patch: int) -> np.ndarray:
    """Triangles over the offsets of a circle of `size` pixels, summed over all windings: [size,
    size]."""
    offset = np.arange(size)[:, None] - np.arange(size)[None, :]
    return sum(np.maximum(0, patch - np.abs(offset + k * size)) / patch for k in range(-2, 3))


@pytest.mark.parametrize("patch, height, width", [(2, 4, 6), (3, 6, 3), (4, 8, 12), (4, 2, 1)])
def test_every_pixel_is_the_sum_over_the_patch_above_and_left_of_it(
    patch: int, height: int, width: int
) -> None:
    g = white(2, height, width, 2)
    want = np.zeros(g.shape)
    for y in range(height):
        for x in range(width):
            for i in range(patch):
                for j in range(patch):
                    want[:, y, x] += g[:, (y - i) % height, (x - j) % width] / patch
    np.testing.assert_allclose(make(g, patch), want, atol=1e-5)


@pytest.mark.parametrize("patch, height, width", [(2, 4, 6), (4, 8, 12), (4, 4, 8)])
def test_variance_is_one_and_covariance_a_product_of_triangles(
    patch: int, height: int, width: int
) -> None:
    response = np.asarray(make(impulses(height, width), patch), np.float64).reshape(
        height * width, -1
    )
    covariance = response.T @ response
    np.testing.assert_allclose(np.diag(covariance), 1, atol=1e-6)
    np.testing.assert_allclose(
        covariance, np.kron(triangle(height, patch), triangle(width, patch)), atol=1e-6
    )


def test_sampled_fields_have_the_covariance_too() -> None:
    height, width, patch, count = 4, 8, 2, 20_000
    field = np.asarray(make(white(count, height, width, 1, seed=1), patch)).reshape(count, -1)
    want = np.kron(triangle(height, patch), triangle(width, patch))
    # The standard error of a sampled covariance is at most sqrt(2 / count) = 0.01.
    np.testing.assert_allclose(field.T @ field / count, want, atol=0.05)


def test_patch_one_is_white_noise_itself() -> None:
    g = white(2, 3, 5, 1)
    np.testing.assert_array_equal(make(g, 1), g)


def test_relay_noise_adds_the_scaled_field_without_renormalising() -> None:
    height, width, patch, scale = 4, 8, 4, 0.3
    pulse = impulses(height, width)
    nothing = np.zeros_like(pulse)
    response = np.concatenate(
        [make_relay(pulse, nothing, patch, scale), make_relay(nothing, pulse, patch, scale)]
    )
    response = response.astype(np.float64).reshape(2 * height * width, -1)
    covariance = response.T @ response
    np.testing.assert_allclose(np.diag(covariance), 1 + scale**2, atol=1e-6)
    block = np.kron(triangle(height, patch), triangle(width, patch))
    np.testing.assert_allclose(covariance, np.eye(height * width) + scale**2 * block, atol=1e-6)


def test_relay_noise_of_scale_zero_is_white_and_needs_no_second_field() -> None:
    g = white(1, 4, 4, 1)
    np.testing.assert_array_equal(relay_noise(g, None, 4, 0.0), g)
    np.testing.assert_array_equal(relay_noise(g, white(1, 4, 4, 1, seed=1), 4, 0.0), g)


@pytest.mark.parametrize("patch", [1, 2, 4, 16])
def test_the_power_is_that_of_drawn_noise(patch: int) -> None:
    power = block_noise_power(16, patch)
    assert power[0, 0] == pytest.approx(patch**2) and power.sum() == pytest.approx(16**2)
    noise = np.asarray(make(white(4096, 16, 16, 3), patch))
    coefficients = fft.dctn(noise, axes=(1, 2), norm="ortho")
    np.testing.assert_allclose(np.square(coefficients).mean((0, 3)), power, rtol=0.08, atol=1e-6)


def test_the_power_of_a_relays_noise_is_that_of_drawn_noise() -> None:
    noise = make_relay(white(4096, 8, 8, 3), white(4096, 8, 8, 3, seed=1), 4, 0.5)
    coefficients = fft.dctn(np.asarray(noise), axes=(1, 2), norm="ortho")
    power = RelayProcess(patch=4, block_noise_scale=0.5).noise_power(8)
    np.testing.assert_allclose(np.square(coefficients).mean((0, 3)), power, rtol=0.08)

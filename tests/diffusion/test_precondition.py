"""Preconditioning: unit variance in and out, the ideal denoiser of gaussian data, what the
network is handed."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.diffusion.precondition import coefficients, per_image, precondition
from relay_jax.diffusion.process import EdmProcess

SIGMAS = np.array([0.002, 0.1, 0.5, 3.0, 80.0])


def images(batch: int = 2) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(batch, 2, 3, 3)).astype(np.float32)


def zero(
    x: jax.Array,
    c_noise: jax.Array,
    class_labels: jax.Array | None,
    augment_labels: jax.Array | None,
) -> jax.Array:
    return jnp.zeros_like(x)


@pytest.mark.parametrize("sigma_data", [0.5, 1.3])
def test_input_and_target_of_the_network_have_unit_variance_and_are_uncorrelated(
    sigma_data: float,
) -> None:
    c = coefficients(jnp.asarray(SIGMAS, jnp.float32), sigma_data)
    # noisy = x0 + sigma n with x0 ~ N(0, sigma_data^2); the network's target is (x0 - c_skip
    # noisy) / c_out.
    np.testing.assert_allclose(np.square(c.c_in) * (sigma_data**2 + SIGMAS**2), 1, rtol=1e-5)
    x0_share, noise_share = (1 - np.asarray(c.c_skip, np.float64)) / c.c_out, c.c_skip / c.c_out
    inside = SIGMAS > 0.01  # 1 - c_skip keeps too few digits of float32 below
    variance = x0_share**2 * sigma_data**2 + noise_share**2 * SIGMAS**2
    np.testing.assert_allclose(variance[inside], 1, rtol=1e-4)
    np.testing.assert_allclose(
        (x0_share * sigma_data**2)[inside], (noise_share * SIGMAS**2)[inside], rtol=1e-4
    )
    np.testing.assert_allclose(c.c_noise, np.log(SIGMAS) / 4, rtol=1e-6)


def test_the_loss_weight_undoes_the_output_scale() -> None:
    sigma = jnp.asarray(SIGMAS, jnp.float32)
    weight = EdmProcess(sigma_data=0.7).weight(sigma)
    np.testing.assert_allclose(weight * np.square(coefficients(sigma, 0.7).c_out), 1, rtol=1e-5)


def test_a_silent_network_is_the_ideal_denoiser_of_gaussian_data() -> None:
    x, sigma_data = images(len(SIGMAS)), 0.8
    got = jax.jit(precondition(zero, sigma_data))(x, jnp.asarray(SIGMAS, jnp.float32))
    posterior_mean = x * (1 / (1 + np.square(SIGMAS / sigma_data)))[:, None, None, None]
    np.testing.assert_allclose(got, posterior_mean, rtol=1e-5)


def test_the_network_sees_scaled_images_log_sigma_and_the_labels() -> None:
    x, sigma, seen = images(), np.array([0.2, 5.0]), {}

    def network(
        x: jax.Array, c_noise: jax.Array, class_labels: jax.Array, augment_labels: jax.Array
    ) -> jax.Array:
        seen.update(x=x, c_noise=c_noise, class_labels=class_labels, augment_labels=augment_labels)
        return jnp.ones_like(x, jnp.bfloat16)

    got = precondition(network)(x, jnp.asarray(sigma, jnp.float32), "classes", "augmentation")
    scale = np.sqrt(sigma**2 + 0.25)[:, None, None, None]
    np.testing.assert_allclose(seen["x"], x / scale, rtol=1e-5)
    np.testing.assert_allclose(seen["c_noise"], np.log(sigma) / 4, rtol=1e-5)
    assert seen["c_noise"].shape == (2,)
    assert (seen["class_labels"], seen["augment_labels"]) == ("classes", "augmentation")
    column = sigma[:, None, None, None]
    np.testing.assert_allclose(got, 0.25 / scale**2 * x + column * 0.5 / scale, rtol=1e-5)
    assert got.dtype == jnp.float32


def test_one_sigma_for_all_equals_one_per_image() -> None:
    def network(x: jax.Array, c_noise: jax.Array, *labels: None) -> jax.Array:
        return jnp.tanh(x) + c_noise[:, None, None, None]

    denoise, x = jax.jit(precondition(network)), images(3)
    want = denoise(x, jnp.full(3, 0.3))
    np.testing.assert_array_equal(denoise(x, jnp.float32(0.3)), want)
    np.testing.assert_array_equal(
        precondition(network)(x.astype(jnp.bfloat16), 0.3).dtype, jnp.float32
    )


def test_per_image_makes_a_column_of_either() -> None:
    x = images(3)
    np.testing.assert_array_equal(per_image(2.0, x), np.full((3, 1, 1, 1), 2, np.float32))
    np.testing.assert_array_equal(per_image(np.arange(3), x)[:, 0, 0, 0], [0, 1, 2])


def test_other_arrays_are_refused_by_name() -> None:
    denoise = precondition(zero)
    with pytest.raises(AssertionError, match=r"x must be \[b, h, w, c\]"):
        denoise(images()[0], 0.3)
    with pytest.raises(AssertionError, match=r"sigma must be a scalar or \[b\]"):
        denoise(images(), jnp.ones((2, 1)))

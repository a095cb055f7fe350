"""Blur: equal to attenuated DCT coefficients, means kept, patches apart, symmetric, identity at
both ends."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from relay_jax.diffusion.blur import MIN_SCALE, attenuation, blur, blur_matrix

fast_blur = jax.jit(blur, static_argnames=("patch", "min_scale"))
SIGMAS = np.array([0.0, 0.3, 1.5], np.float32)


def images(height: int = 8, width: int = 12, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(3, height, width, 3)).astype(np.float32)


def factors(sigma: float, patch: int, min_scale: float) -> np.ndarray:
    """The attenuation of every frequency pair, from its definition, float64 [p, p]."""
    squares = np.square(np.pi * np.arange(patch) / patch)
    return (1 - min_scale) * np.exp(
        -(squares[:, None] + squares[None, :]) * sigma**2 / 2
    ) + min_scale


def reference(x: np.ndarray, sigmas: np.ndarray, patch: int, min_scale: float) -> np.ndarray:
    """DCT per patch, attenuation, inverse DCT, in float64."""
    b, h, w, c = x.shape
    u = scipy.fft.dctn(
        x.astype(np.float64).reshape(b, h // patch, patch, w // patch, patch, c),
        axes=(2, 4),
        norm="ortho",
    )
    a = np.stack([factors(float(s), patch, min_scale) for s in sigmas])
    return scipy.fft.idctn(u * a[:, None, :, None, :, None], axes=(2, 4), norm="ortho").reshape(
        x.shape
    )


@pytest.mark.parametrize(
    "patch, height, width, min_scale",
    [(2, 4, 6, 0.1), (3, 9, 3, 0.0), (4, 8, 12, MIN_SCALE), (8, 8, 16, 0.001)],
)
def test_separable_form_equals_dct_attenuation_inverse_dct(
    patch: int, height: int, width: int, min_scale: float
) -> None:
    x = images(height, width)
    got = fast_blur(x, SIGMAS, patch=patch, min_scale=min_scale)
    np.testing.assert_allclose(got, reference(x, SIGMAS, patch, min_scale), atol=5e-6)


def test_default_floor_is_a_thousandth() -> None:
    x = images()
    np.testing.assert_allclose(
        fast_blur(x, SIGMAS, patch=4), reference(x, SIGMAS, 4, 0.001), atol=5e-6
    )


def test_attenuation_is_the_formula_and_keeps_the_shape_of_sigma() -> None:
    sigmas = np.array([[0.0, 0.5], [1.0, 3.0]], np.float32)
    got = attenuation(sigmas, 4, 0.05)
    assert got.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(
        got, [[factors(float(s), 4, 0.05) for s in row] for row in sigmas], rtol=1e-5
    )
    matrix = blur_matrix(sigmas, 4)
    assert matrix.shape == (2, 2, 4, 4)
    np.testing.assert_allclose(matrix, np.swapaxes(matrix, -1, -2), atol=1e-7)


def test_patch_means_are_untouched_by_the_blur() -> None:
    x = images()
    got = np.asarray(fast_blur(x, np.array([0.4, 2.0, 50.0], np.float32), patch=4))
    means = [v.reshape(3, 2, 4, 3, 4, 3).mean(axis=(2, 4)) for v in (got, x)]
    np.testing.assert_allclose(*means, atol=1e-6)


def test_no_blur_and_patch_one_are_identities() -> None:
    x = images()
    np.testing.assert_allclose(fast_blur(x, np.zeros(3, np.float32), patch=4), x, atol=2e-6)
    np.testing.assert_array_equal(fast_blur(x, np.float32(2.0), patch=1), x)


def test_huge_blur_leaves_patch_means_and_the_floor_of_the_rest() -> None:
    x = images()
    means = x.reshape(3, 2, 4, 3, 4, 3).mean(axis=(2, 4)).repeat(4, 1).repeat(4, 2)
    got = fast_blur(x, np.full(3, 1e3, np.float32), patch=4)
    np.testing.assert_allclose(got, means + MIN_SCALE * (x - means), atol=2e-6)


def test_a_patch_changes_nothing_in_its_neighbours() -> None:
    x = images()
    changed = x.copy()
    changed[:, 4:8, 4:8] += 100
    before, after = (np.asarray(fast_blur(v, SIGMAS, patch=4)) for v in (x, changed))
    outside = np.ones(x.shape, bool)
    outside[:, 4:8, 4:8] = False
    np.testing.assert_array_equal(after[outside], before[outside])
    np.testing.assert_allclose(after[~outside], before[~outside] + 100, atol=2e-4)


def test_one_sigma_per_image_and_one_for_all() -> None:
    x = np.repeat(images()[:1], 3, axis=0)
    each = fast_blur(x, SIGMAS, patch=4)
    for i, sigma in enumerate(SIGMAS):
        np.testing.assert_allclose(each[i], fast_blur(x, sigma, patch=4)[i], atol=1e-6)


def test_one_sigma_repeated_for_many_images_inside_a_compiled_program() -> None:
    """XLA for CPU computes a sum over an axis wrongly here, from 64 repetitions on."""
    repeated = jax.jit(lambda sigma: blur_matrix(jnp.full(64, sigma), 4))(np.float32(0.7))
    np.testing.assert_allclose(
        repeated, np.repeat(blur_matrix(np.float32([0.7]), 4), 64, axis=0), atol=1e-6
    )


def test_the_blur_is_symmetric_and_is_its_own_gradient() -> None:
    x, y = images(seed=1), images(seed=2)
    blurred, pull = jax.vjp(lambda v: fast_blur(v, SIGMAS, patch=4), x)
    (gradient,) = pull(y)
    np.testing.assert_allclose(gradient, fast_blur(y, SIGMAS, patch=4), atol=5e-6)
    left, right = np.vdot(blurred, y), np.vdot(x, gradient)
    assert abs(left) > 1
    np.testing.assert_allclose(left, right, rtol=1e-4)


@pytest.mark.parametrize("height, width", [(6, 8), (8, 6)])
def test_images_of_broken_patches_are_refused_with_their_size(height: int, width: int) -> None:
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels .* 4 x 4"):
        blur(images(height, width), 1.0, 4)


def test_other_arrays_are_refused_by_name_also_while_traced() -> None:
    with pytest.raises(AssertionError, match=r"x must be \[b, h, w, c\]"):
        fast_blur(images()[0], 1.0, patch=4)
    with pytest.raises(AssertionError, match=r"blur_sigma must be a scalar or \[b\]"):
        fast_blur(images(), SIGMAS[:, None], patch=4)


def test_the_blur_of_a_mapped_batch_is_that_of_the_batch() -> None:
    x = images()
    one_by_one = jax.vmap(lambda image, sigma: blur(image[None], sigma, 4)[0])(x, SIGMAS)
    np.testing.assert_allclose(one_by_one, fast_blur(x, SIGMAS, patch=4), atol=1e-6)

"""Patch DCT: the same numbers as scipy, an inverse pair, energy preserved, whole patches only."""

from collections.abc import Callable

import jax
import numpy as np
import pytest
import scipy.fft

from relay_jax.diffusion.dct import apply_per_patch, dct_matrix, patch_dct, patch_idct

forward, inverse = jax.jit(patch_dct, static_argnums=1), jax.jit(patch_idct, static_argnums=1)


def images(height: int, width: int) -> np.ndarray:
    return np.random.default_rng(0).normal(size=(2, height, width, 3)).astype(np.float32)


def patches(x: np.ndarray, patch: int) -> np.ndarray:
    """[b, h, w, c] to a view [b, h / p, p, w / p, p, c]."""
    b, h, w, c = x.shape
    return x.reshape(b, h // patch, patch, w // patch, patch, c)


@pytest.mark.parametrize("patch, height, width", [(1, 2, 3), (3, 6, 9), (4, 8, 4), (8, 8, 16)])
def test_patch_dct_equals_scipy_and_is_undone_by_its_inverse(
    patch: int, height: int, width: int
) -> None:
    x = images(height, width)
    got = np.asarray(forward(x, patch))
    want = scipy.fft.dctn(patches(x.astype(np.float64), patch), axes=(2, 4), norm="ortho").reshape(
        x.shape
    )
    np.testing.assert_allclose(got, want, atol=1e-5)
    np.testing.assert_allclose(inverse(got, patch), x, atol=1e-5)
    energy_per_patch = [np.square(patches(v, patch)).sum(axis=(2, 4)) for v in (x, got)]
    np.testing.assert_allclose(*energy_per_patch, rtol=1e-5)


@pytest.mark.parametrize("patch", [1, 2, 3, 4, 8, 16])
def test_the_matrix_is_orthonormal_and_its_first_row_is_the_scaled_mean(patch: int) -> None:
    c = dct_matrix(patch)
    assert c.shape == (patch, patch) and c.dtype == np.float64
    np.testing.assert_allclose(c @ c.T, np.eye(patch), atol=1e-14)
    np.testing.assert_allclose(c[0], patch**-0.5, atol=1e-15)


def test_a_constant_patch_has_one_coefficient_of_patch_times_its_value() -> None:
    x = np.full((1, 4, 8, 1), 0.25, np.float32)
    want = np.zeros_like(x)
    want[0, 0, ::4, 0] = 4 * 0.25
    np.testing.assert_allclose(forward(x, 4), want, atol=1e-6)


def test_one_matrix_per_image_acts_on_rows_then_columns() -> None:
    x, m = images(4, 6), np.random.default_rng(1).normal(size=(2, 2, 2)).astype(np.float32)
    got = jax.jit(apply_per_patch)(x, m)
    want = np.einsum("bki,bniwjc,blj->bnkwlc", m, patches(x, 2), m).reshape(x.shape)
    np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("transform", [patch_dct, patch_idct])
@pytest.mark.parametrize("height, width", [(6, 8), (8, 6)])
def test_images_of_broken_patches_are_refused_with_their_size(
    transform: Callable, height: int, width: int
) -> None:
    with pytest.raises(ValueError, match=rf"{height} x {width} pixels .* 4 x 4"):
        transform(images(height, width), 4)


def test_patch_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="at least 1, not 0"):
        patch_dct(images(4, 4), 0)


@pytest.mark.parametrize(
    "x, matrix, message",
    [
        (images(4, 4)[0], np.eye(2), r"x must be \[b, h, w, c\]"),
        (images(4, 4).astype(int), np.eye(2), "x must be of floating-point numbers"),
        (images(4, 4), np.ones(2), r"matrix must be \[p, p\] or \[b, p, p\]"),
    ],
)
def test_other_arrays_are_refused_by_name_also_while_traced(
    x: np.ndarray, matrix: np.ndarray, message: str
) -> None:
    with pytest.raises(AssertionError, match=message):
        jax.eval_shape(apply_per_patch, x, matrix)

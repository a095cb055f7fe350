"""The sampling grid: published numbers, even in the root of sigma, refusals."""

import numpy as np
import pytest

from relay_jax.diffusion.grid import edm_sigmas, relay_sigmas, stopped_sigmas


@pytest.mark.parametrize(
    "num_steps, rho, handoff_sigma, kept, first",
    [(200, 100, 0.9, 100, 0.8691227), (150, 7, 0.95, 54, 0.9219127)],
    ids=["imagenet", "celeba"],
)
def test_published_relay_grids(
    num_steps: int, rho: float, handoff_sigma: float, kept: int, first: float
) -> None:
    sigmas = relay_sigmas(num_steps, 0.008, 80.0, rho, handoff_sigma)
    assert sigmas.dtype == np.float64 and sigmas.shape == (kept + 1,)
    assert sigmas[0] == pytest.approx(first, abs=5e-8)
    assert sigmas[-2] == pytest.approx(0.008, rel=1e-9) and sigmas[-1] == 0
    np.testing.assert_array_equal(sigmas, edm_sigmas(num_steps, 0.008, 80.0, rho)[-kept - 1 :])


@pytest.mark.parametrize(
    "num_steps, low, high, rho",
    [(256, 0.002, 80, 7), (200, 0.008, 80, 100), (5, 1, 3, 1), (2, 0.1, 1, 2)],
)
def test_the_grid_is_even_in_the_root_of_sigma_falls_and_ends_at_zero(
    num_steps: int, low: float, high: float, rho: float
) -> None:
    sigmas = edm_sigmas(num_steps, low, high, rho)
    assert sigmas.dtype == np.float64 and sigmas.shape == (num_steps + 1,)
    assert np.all(np.diff(sigmas) < 0) and sigmas[-1] == 0
    np.testing.assert_allclose(
        sigmas[:-1] ** (1 / rho),
        np.linspace(high ** (1 / rho), low ** (1 / rho), num_steps),
        rtol=1e-12,
    )
    np.testing.assert_allclose(sigmas[[0, -2]], [high, low], rtol=1e-10)


def test_a_grid_that_stops_ends_exactly_at_its_level_and_is_even_as_well() -> None:
    sigmas = stopped_sigmas(7, 0.217281, 80.0, 7.0)
    assert sigmas.dtype == np.float64 and sigmas.shape == (8,) and sigmas[-1] == 0.217281
    root = sigmas ** (1 / 7)
    np.testing.assert_allclose(root, np.linspace(root[0], root[-1], 8), rtol=1e-12)
    assert sigmas[0] == pytest.approx(80)
    for bad in (0, -1):
        with pytest.raises(ValueError, match=f"num_steps must be at least 1, not {bad}"):
            stopped_sigmas(bad, 0.2, 80, 7)


def test_a_grid_of_one_step_goes_from_the_top_to_zero() -> None:
    np.testing.assert_allclose(edm_sigmas(1, 0.002, 80, 7), [80, 0])


@pytest.mark.parametrize(
    "num_steps, low, high, rho, name",
    [
        (0, 0.002, 80, 7, "num_steps"),
        (10, 80, 0.002, 7, "sigma_min"),
        (10, 0, 80, 7, "sigma_min"),
        (10, 0.002, 80, 0, "rho"),
    ],
)
def test_impossible_grids_are_refused_by_name(
    num_steps: int, low: float, high: float, rho: float, name: str
) -> None:
    with pytest.raises(ValueError, match=name):
        edm_sigmas(num_steps, low, high, rho)


def test_a_grid_without_a_level_below_the_handoff_is_refused() -> None:
    with pytest.raises(ValueError, match=r"handoff_sigma 0\.005"):
        relay_sigmas(10, 0.008, 80, 7, 0.005)

"""Schedules: the published numbers, u and sigma as inverse maps, the grid, the laws of the
draws, refusals."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.diffusion.process import (
    EdmProcess,
    RelayProcess,
    check_handoff,
    edm_sigmas,
    relay_sigmas,
)

IMAGENET = RelayProcess(cdf_max=0.93, blur_sigma_max=3.0)
CELEBA = RelayProcess(cdf_max=0.89, blur_sigma_max=2.0)
BOTH = pytest.mark.parametrize("process", [IMAGENET, CELEBA], ids=["imagenet", "celeba"])


def phi(z: np.ndarray) -> np.ndarray:
    """The standard normal CDF."""
    return np.vectorize(NormalDist().cdf)(z)


def largest_gap(draws: np.ndarray, cdf_at_sorted: np.ndarray) -> float:
    """Kolmogorov's distance between draws and the CDF evaluated at the sorted draws."""
    steps = np.arange(len(draws) + 1) / len(draws)
    return float(max(np.max(steps[1:] - cdf_at_sorted), np.max(cdf_at_sorted - steps[:-1])))


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
    "process, full_blur, smallest",
    [(IMAGENET, 1.770, 0.00712), (CELEBA, 1.312, 0.00691)],
    ids=["imagenet", "celeba"],
)
def test_published_ends_of_the_blur_schedule(
    process: RelayProcess, full_blur: float, smallest: float
) -> None:
    assert process.sigma_full_blur == pytest.approx(full_blur, abs=5e-4)
    assert float(process.u_from_sigma(process.sigma_full_blur)) == pytest.approx(1, abs=1e-12)
    u = process.clamp(jnp.array([0.0, process.u_min / 2, 0.5]))
    np.testing.assert_allclose(u, [process.u_min, process.u_min, 0.5], rtol=1e-6)
    assert float(process.sigma_from_u(u)[0]) == pytest.approx(smallest, abs=5e-6)


@BOTH
def test_the_floor_of_u_is_the_share_of_sigmas_below_it_times_cdf_max_twice(
    process: RelayProcess,
) -> None:
    share = NormalDist(-1.2, 1.2).cdf(math.log(0.0075))
    assert process.u_min == pytest.approx(process.cdf_max * share, rel=1e-9)
    smallest = float(process.sigma_from_u(jnp.float32(process.u_min)))
    assert NormalDist(-1.2, 1.2).cdf(math.log(smallest)) == pytest.approx(
        process.cdf_max**2 * share, rel=1e-4
    )


@BOTH
def test_sigma_and_u_are_inverse_maps_through_the_normal_cdf(process: RelayProcess) -> None:
    u = np.linspace(process.u_min, 1, 50)
    sigma = np.asarray(process.sigma_from_u(jnp.asarray(u, jnp.float32)))
    assert np.all(np.diff(sigma) > 0)
    np.testing.assert_allclose(process.u_from_sigma(sigma), u, rtol=2e-5)
    np.testing.assert_allclose(
        process.u_from_sigma(sigma), phi((np.log(sigma) + 1.2) / 1.2) / process.cdf_max, rtol=1e-6
    )


def test_u_is_zero_at_sigma_zero_and_not_clamped_above() -> None:
    np.testing.assert_allclose(
        IMAGENET.u_from_sigma(np.array([0.0, 1e9])), [0, 1 / 0.93], atol=1e-12
    )
    assert float(IMAGENET.u_from_sigma(math.exp(-1.2))) == pytest.approx(0.5 / 0.93)


def test_blur_grows_as_a_squared_sine_alike_on_host_and_device() -> None:
    u = np.array([0, 1 / 3, 0.5, 1])
    want = 3.0 * np.array([0, 0.25, 0.5, 1])
    host = IMAGENET.blur_sigma(u)
    assert isinstance(host, np.ndarray) and host.dtype == np.float64
    np.testing.assert_allclose(host, want, atol=1e-12)
    np.testing.assert_allclose(IMAGENET.blur_sigma(jnp.asarray(u, jnp.float32)), want, atol=1e-6)
    assert IMAGENET.blur_sigma(0.5) == pytest.approx(1.5)


def test_the_weight_is_the_sum_of_both_precisions_and_capped_in_the_relay_only() -> None:
    sigma = np.array([1e-3, 0.01, 0.5, 80])
    precisions = 1 / 0.5**2 + 1 / sigma**2
    np.testing.assert_allclose(EdmProcess().weight(jnp.asarray(sigma)), precisions, rtol=1e-5)
    np.testing.assert_allclose(
        IMAGENET.weight(jnp.asarray(sigma)), np.minimum(precisions, 1e5), rtol=1e-5
    )
    assert float(IMAGENET.weight(jnp.float32(1e-3))) == 1e5


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


def test_a_grid_of_one_step_goes_from_the_top_to_zero() -> None:
    np.testing.assert_allclose(edm_sigmas(1, 0.002, 80, 7), [80, 0])


@BOTH
def test_relay_training_draws_follow_the_truncated_log_normal(process: RelayProcess) -> None:
    uniform = jax.random.uniform(jax.random.key(0), (20_000,))
    sigma = np.sort(np.asarray(process.sigma_from_u(process.clamp(uniform)), np.float64))
    assert sigma[-1] <= process.sigma_full_blur * (1 + 1e-5)
    # A distance of 1.95 / sqrt(n) is exceeded once in a thousand samples; the clamp adds an
    # atom of 0.001.
    gap = largest_gap(sigma, phi((np.log(sigma) + 1.2) / 1.2) / process.cdf_max)
    assert gap < 1.95 / math.sqrt(20_000) + 0.001


def test_edm_training_draws_follow_the_log_normal() -> None:
    normal = jax.random.normal(jax.random.key(1), (20_000,))
    process = EdmProcess(P_mean=-0.5, P_std=0.8)
    sigma = np.sort(np.asarray(process.sigma_from_normal(normal), np.float64))
    assert largest_gap(sigma, phi((np.log(sigma) + 0.5) / 0.8)) < 1.95 / math.sqrt(20_000)


@pytest.mark.parametrize(
    "process, accepted, refused",
    [
        (IMAGENET, [0.9, 1.769], [1.771, 80.0, 0.0, -1.0]),
        (CELEBA, [0.95, 1.311], [1.313]),
        (RelayProcess(cdf_max=1.05), [0.95, 80.0], [0.0]),
        (RelayProcess(cdf_max=1.0), [80.0], []),
    ],
)
def test_handoff_is_accepted_up_to_the_sigma_of_full_blur(
    process: RelayProcess, accepted: list[float], refused: list[float]
) -> None:
    for sigma in accepted:
        check_handoff(process, sigma)
    for sigma in refused:
        with pytest.raises(ValueError, match=f"handoff_sigma .*{sigma}"):
            check_handoff(process, sigma)


def test_the_blur_never_weakens_up_to_an_accepted_handoff_and_does_beyond() -> None:
    accepted = IMAGENET.blur_sigma(
        IMAGENET.u_from_sigma(np.linspace(0, IMAGENET.sigma_full_blur, 1000))
    )
    assert np.all(np.diff(accepted) >= 0) and accepted[-1] == pytest.approx(3.0)
    assert np.all(
        np.diff(IMAGENET.blur_sigma(IMAGENET.u_from_sigma(np.linspace(1.8, 80, 1000)))) < 0
    )


@pytest.mark.parametrize(
    "setting",
    [
        {"P_std": 0.0},
        {"sigma_data": -0.5},
        {"patch": 0},
        {"cdf_max": 0.0},
        {"block_noise_scale": -0.1},
        {"blur_sigma_max": -1.0},
        {"min_scale": 1.5},
        {"min_scale": -0.1},
        {"sigma_floor": 0.0},
    ],
)
def test_impossible_processes_are_refused_by_name(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        RelayProcess(**setting)


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

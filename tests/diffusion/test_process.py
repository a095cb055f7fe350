"""Processes: published numbers, u and sigma as inverse maps, laws of draws, starts, refusals."""

import math
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.diffusion.process import EdmProcess, Purpose, RelayProcess

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
    sigma = np.sort(np.asarray(process.level(normal).sigma, np.float64))
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
        process.check_start(sigma)
    for sigma in refused:
        with pytest.raises(ValueError, match=f"handoff_sigma .*{sigma}"):
            process.check_start(sigma)


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


# Starts.


def test_handoff_is_the_repeated_image_plus_white_and_block_noise_of_the_first_level() -> None:
    process, pixels = RelayProcess(block_noise_scale=0.5), 8 * 12
    sigma = 0.9219127
    low = np.broadcast_to(
        np.random.default_rng(0).normal(size=(1, 2, 3, 1)).astype(np.float32),
        (1 + 2 * pixels, 2, 3, 1),
    )
    pulses = np.zeros(
        (2, 1 + 2 * pixels, 8, 12, 1), np.float32
    )  # row 0: no noise; then one pixel of one field
    pulses[0, 1 : 1 + pixels] = pulses[1, 1 + pixels :] = np.eye(pixels).reshape(-1, 8, 12, 1)
    fields = dict(zip([Purpose.INITIAL_GAUSS, Purpose.INITIAL_BLOCK], pulses, strict=True))
    start = process.initial_state(sigma, lambda step, purpose: fields[purpose], low)
    got = np.asarray(start, np.float64)
    np.testing.assert_array_equal(
        got[0].reshape(2, 4, 3, 4, 1), low[0][:, None, :, None] * np.ones((1, 4, 1, 4, 1))
    )

    response = (got[1:] - got[:1]).reshape(2 * pixels, pixels)
    offsets = [np.subtract.outer(np.arange(n), np.arange(n)) for n in (8, 12)]
    offsets = [np.minimum(np.abs(o), n - np.abs(o)) for o, n in zip(offsets, (8, 12), strict=True)]
    triangles = np.kron(*(np.maximum(0, 4 - o) / 4 for o in offsets))
    want = sigma**2 * (np.eye(pixels) + 0.25 * triangles)
    np.testing.assert_allclose(np.diag(want), sigma**2 * 1.25)
    np.testing.assert_allclose(response.T @ response, want, atol=1e-5)


def test_a_first_stage_starts_from_latents_of_the_first_level_alone() -> None:
    latents = jnp.ones((2, 4, 4, 3))
    purposes = []
    start = EdmProcess().initial_state(80.0, lambda step, p: purposes.append(p) or latents)
    np.testing.assert_array_equal(start, 80 * latents)
    assert purposes == [Purpose.LATENTS]
    with pytest.raises(ValueError, match="starts from the images of the stage before"):
        IMAGENET.initial_state(0.9, lambda step, p: latents)


def test_the_numbers_of_purposes_which_every_image_depends_on() -> None:
    assert [purpose.name for purpose in sorted(Purpose)] == [
        "LATENTS", "INITIAL_GAUSS", "INITIAL_BLOCK", "CHURN_GAUSS",
        "EULER_GAUSS", "EULER_BLOCK", "HEUN_GAUSS", "HEUN_BLOCK",
    ]  # fmt: skip
    assert sorted(Purpose) == list(range(8))


@pytest.mark.parametrize("process", [EdmProcess(), IMAGENET, CELEBA])
def test_draws_at_a_level_undo_its_levels_and_the_cdf_is_their_law(process: EdmProcess) -> None:
    draws = np.linspace(0.05, 0.95, 7)
    levels = process.level(jnp.asarray(draws, jnp.float32))
    sigma = np.asarray(levels.sigma, np.float64)
    np.testing.assert_allclose(process.draw_at(sigma), draws, rtol=1e-4, atol=1e-5)
    law = draws if process.starts_from_images else phi(draws)
    np.testing.assert_allclose(process.cdf(sigma), law, rtol=1e-4)
    np.testing.assert_allclose(process.blur_sigma_at(sigma), levels.blur_sigma, rtol=1e-4)
    low, high = process.sigma_range(0.01)
    assert low < sigma[0] < sigma[-1] < high


def test_training_refuses_what_only_sampling_may_have() -> None:
    EdmProcess().check_training()
    IMAGENET.check_training()
    with pytest.raises(ValueError, match=r"cdf_max must be at most 1, not 1\.05"):
        RelayProcess(cdf_max=1.05).check_training()
    with pytest.raises(ValueError, match="patches of 4 x 4"):
        IMAGENET.check_resolution(30)

"""Start and forward states of a relay stage, against closed forms and draws."""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.diffusion.block_noise import relay_noise
from relay_jax.diffusion.loss import Draws, corrupt
from relay_jax.diffusion.process import EdmProcess, NoiseFn, RelayProcess, upsample
from relay_jax.plots.handoff import candidates, compare, divergence
from relay_jax.plots.spectra import dct_power, radial_bands, square_bands
from tests.plots.images import RNG, box, up, white

PROCESS = RelayProcess(patch=2, block_noise_scale=0.5)


def test_images_without_detail_start_exactly_as_trained() -> None:
    low = white(6, 8, 8, 3)
    for comparison in compare(PROCESS, low, up(low, 2), [0.2, 0.9]):
        assert abs(comparison.nats) < 1e-6 and comparison.floor > 1e-2
        np.testing.assert_allclose(comparison.decibels, 0, atol=1e-5)
        np.testing.assert_allclose(comparison.start_std, comparison.forward_std, rtol=1e-6)
        np.testing.assert_allclose(comparison.start_mean, comparison.forward_mean, atol=1e-6)


def test_powers_and_moments_of_the_states_are_those_of_states_with_drawn_noise() -> None:
    n, sigma = 1000, 0.4
    real, low = 0.5 * white(n, 8, 8, 3) + np.float32(0.3), 0.7 * white(n, 4, 4, 3)
    comparison = compare(PROCESS, low, real, [sigma])[0]
    level = jnp.full(n, float(PROCESS.draw_at(np.asarray(sigma))))
    fields = [jnp.asarray(white(n, 8, 8, 3)) for _ in range(4)]
    forward = np.asarray(corrupt(PROCESS, jnp.asarray(real), Draws(level, *fields[:2])).noisy)
    start = up(low, 2) + sigma * np.asarray(relay_noise(fields[2], fields[3], 2, 0.5))
    bands = radial_bands(8)
    np.testing.assert_allclose(comparison.forward, bands.mean(dct_power(forward)), rtol=0.05)
    np.testing.assert_allclose(comparison.start, bands.mean(dct_power(start)), rtol=0.05)
    for state, mean, std in (
        (forward, comparison.forward_mean, comparison.forward_std),
        (start, comparison.start_mean, comparison.start_std),
    ):
        np.testing.assert_allclose(mean, state.mean((0, 1, 2)), atol=0.01)
        np.testing.assert_allclose(std, state.std((0, 1, 2)), rtol=0.01)


def test_the_divergence_is_that_of_gaussians() -> None:
    power = 1 + RNG.random((8, 8))
    assert divergence(power, power, square_bands(8), 3) == 0
    expected = 3 * 64 * 0.5 * (1 - math.log(2))
    assert divergence(2 * power, power, square_bands(8), 3) == pytest.approx(expected)


def test_the_discrepancy_falls_with_sigma_and_ends_where_training_does() -> None:
    real = white(16, 16, 16, 3)
    sigmas = candidates(PROCESS, 0.9, 6)
    assert len(sigmas) == 7 and 0.9 in sigmas and sigmas[-1] <= PROCESS.sigma_full_blur
    nats = [comparison.nats for comparison in compare(PROCESS, box(real, 2), real, sigmas)]
    assert np.all(np.diff(nats) < 0) and nats[0] > 10 * nats[-1]
    with pytest.raises(ValueError, match="beyond"):
        compare(PROCESS, box(real, 2), real, [1.01 * PROCESS.sigma_full_blur])


def test_a_schedule_without_end_is_compared_up_to_a_limit() -> None:
    sigmas = candidates(RelayProcess(cdf_max=1.0), 0.9)
    assert np.all(np.diff(sigmas) > 0) and 4.9 < sigmas[-1] < 5


@pytest.mark.parametrize("others", [30, 120])
def test_the_floor_is_what_another_set_of_the_same_kind_gives(others: int) -> None:
    pairs = [
        compare(PROCESS, white(others, 8, 8, 3), up(white(60, 8, 8, 3), 2), [0.5])[0]
        for _ in range(6)
    ]
    nats, floor = np.mean([pair.nats for pair in pairs]), np.mean([pair.floor for pair in pairs])
    assert 0.7 < nats / floor < 1.4


@dataclass(frozen=True, kw_only=True)
class Unblurred(EdmProcess):
    """Another process that continues images: white noise alone, and no blur."""

    starts_from_images: ClassVar[bool] = True
    patch: ClassVar[int] = 2

    def initial_state(
        self, sigma: float, noise_fn: NoiseFn, low_res: jax.Array | None = None
    ) -> jax.Array:
        assert low_res is not None
        return upsample(low_res, 2) + super().initial_state(sigma, noise_fn)


def test_any_process_that_starts_from_images_is_compared() -> None:
    low = white(6, 4, 4, 3)
    same, other = (compare(Unblurred(), low, x, [0.5])[0] for x in (up(low, 2), white(6, 8, 8, 3)))
    assert abs(same.nats) < 1e-6 and same.blur_sigma == 0 and other.nats > 10
    np.testing.assert_allclose(same.noise, 0.25)

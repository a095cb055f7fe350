"""The loss by noise level of a network whose loss is known, and the levels of each process."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import ndtri

from relay_jax.config import build
from relay_jax.diffusion.loss import draw
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.plots.loss import level_draws, loss_by_sigma, shares
from tests.conftest import mesh_of, tiny_relay


class Silent:
    """A network that always answers 0: the denoiser is c_skip x."""

    num_classes = 0

    def apply(self, variables: dict, x: jax.Array, *_: object) -> jax.Array:
        return jnp.zeros_like(x)


@pytest.mark.parametrize("number", [0, 1])
def test_the_loss_of_a_silent_network_by_sigma(number: int) -> None:
    stage = replace(build(tiny_relay())[number], network=Silent())  # type: ignore[arg-type]
    count = 64  # of white images: blur changes nothing
    pixels, labels = np.full((count, 16, 16, 3), 255, np.uint8), np.zeros(count, np.int32)
    result = loss_by_sigma(stage, {}, mesh_of(1), (pixels, labels), images_seen=96, batch=count)
    s2, d2, noise = result.sigma**2, 0.25, stage.process.noise_power(16).mean()
    skip = d2 / (s2 + d2)
    expected = (s2 + d2) / (s2 * d2) * ((1 - skip) ** 2 + skip**2 * s2 * noise)
    np.testing.assert_allclose(result.mean, expected, rtol=0.03)
    assert result.losses.shape == (len(result.sigma), count)
    assert np.all(np.diff(result.quartiles, axis=0) >= 0)
    assert result.expected == pytest.approx(float(result.share @ expected), rel=0.03)
    # Another batch size, on other devices, with a last batch that is filled up.
    some = pixels[:20], labels[:20]
    parts = loss_by_sigma(stage, {}, mesh_of(8), some, images_seen=96, batch=8)
    np.testing.assert_allclose(parts.losses, result.losses[:, :20], rtol=2e-4)


@pytest.mark.parametrize("process", [EdmProcess(), RelayProcess(), RelayProcess(cdf_max=1.0)])
def test_shares_are_how_often_training_draws_a_level(process: EdmProcess) -> None:
    sigma, level = level_draws(process)
    share = shares(process, sigma)
    np.testing.assert_allclose(process.level(jnp.float32(level)).sigma, sigma, rtol=1e-3)
    draws = draw(process, jax.random.key(0), (20_000, 1, 1, 1)).level
    values = np.asarray(process.level(draws).sigma)
    nearest_level = np.abs(np.log(values)[:, None] - np.log(sigma)).argmin(axis=1)
    frequency = np.bincount(nearest_level, minlength=len(sigma)) / len(values)
    np.testing.assert_allclose(share, frequency, atol=0.01)
    assert share.sum() == pytest.approx(1)


def test_an_unbounded_schedule_is_shown_without_a_thousandth_at_each_end() -> None:
    process = EdmProcess()
    sigma, level = level_draws(process, 5)
    np.testing.assert_allclose(
        level, np.linspace(ndtri(1e-3), -ndtri(1e-3), 5), rtol=1e-12, atol=1e-12
    )
    np.testing.assert_allclose(sigma, np.exp(-1.2 + 1.2 * level), rtol=1e-12)

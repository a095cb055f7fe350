"""The line from an image to its patch means: closed forms, the hand-off, known laws, refusals."""

import math
from statistics import NormalDist

import jax.numpy as jnp
import numpy as np
import pytest
from relay_jax.configs.default import PRESETS

from relay_jax.config import load_config, settings_of
from relay_jax.diffusion.blur import upsample
from relay_jax.diffusion.linear import LinearRelay
from relay_jax.diffusion.loss import Draws, corrupt
from relay_jax.diffusion.multistep import Multistep, exact_weights
from relay_jax.diffusion.noise import Purpose
from relay_jax.diffusion.sampler import Heun
from relay_jax.presets import with_preset
from tests.diffusion.test_multistep import (
    RATES,
    TOP,
    by_definition,
    factors_at,
    handoff_covariance,
    mean_only,
    normal,
    scaled,
    wrong_laws,
)

LINE = LinearRelay()
SMALL = LinearRelay(patch=2, block_noise_scale=0.4)


def below(sigma: float) -> float:
    """Share of the levels of EDM's training below a sigma."""
    return NormalDist(-1.2, 1.2).cdf(math.log(sigma))


def test_the_blur_goes_straight_from_the_image_to_its_patch_means() -> None:
    x = normal(3, 8, 12, 3)
    tau = np.array([0.0, 0.3, 1.0], np.float32)
    means = scaled(x, mean_only(4))
    got = np.asarray(LINE.blur(jnp.asarray(x), jnp.asarray(tau)))
    np.testing.assert_array_equal(got[0], x[0])
    np.testing.assert_array_equal(got[2], LINE.mean_blur(jnp.asarray(x))[2])
    np.testing.assert_allclose(got[1], 0.7 * x[1] + 0.3 * means[1], atol=1e-6)
    factors = LINE.attenuation(np.asarray(0.3))
    np.testing.assert_allclose(factors, 0.7 + 0.3 * mean_only(4))
    assert LINE.attenuation(np.zeros((2, 5))).shape == (2, 5, 4, 4) and LINE.has_factors
    assert LinearRelay(patch=1).attenuation(np.asarray(0.3)).tolist() == [[1.0]]


@pytest.mark.parametrize("cdf_max", [0.89, 0.93, 1.0])
def test_the_line_is_straight_in_the_share_of_levels_below_and_ends_at_sigma_full(
    cdf_max: float,
) -> None:
    process = LinearRelay(cdf_max=cdf_max)
    sigma = np.array([0.0, 0.02, 0.3, 0.6, 0.9, 1.3])
    want = [0.0, below(0.02) / below(0.6), below(0.3) / below(0.6), 1.0, 1.0, 1.0]
    np.testing.assert_allclose(process.blur_sigma_at(sigma), want, atol=1e-12)
    # The share, from above of what training clamps: on the device as on the host.
    level = process.level(jnp.asarray([0.2, 0.5, 0.9], jnp.float32))
    np.testing.assert_allclose(
        level.blur_sigma, process.blur_sigma_at(np.asarray(level.sigma, np.float64)), rtol=2e-5
    )


def test_training_images_lie_on_the_line_and_the_target_is_sharp() -> None:
    x = jnp.asarray(normal(3, 8, 8, 3))
    fields = [jnp.asarray(normal(3, 8, 8, 3, seed=seed)) for seed in (1, 2)]
    got = corrupt(LINE, x, Draws(jnp.asarray([0.0, 0.4, 0.95]), *fields))
    tau = np.asarray(LINE.blur_sigma_at(np.asarray(got.sigma, np.float64)))[:, None, None, None]
    assert 0 < tau[0] < 0.01 < tau[1] < 1 == tau[2]
    blurred = (1 - tau) * x + tau * scaled(x, mean_only(4))
    noise = LINE.noise(*fields)
    np.testing.assert_allclose(
        got.noisy, blurred + np.asarray(got.sigma)[:, None, None, None] * noise, atol=3e-6
    )
    assert got.condition is None


# The hand-off


@pytest.mark.parametrize("sigma", [0.6, 0.9, 1.5])
def test_a_handoff_is_what_training_has_at_its_level(sigma: float) -> None:
    x = jnp.asarray(normal(2, 8, 8, 3))
    fields = dict(
        zip(
            (Purpose.INITIAL_GAUSS, Purpose.INITIAL_BLOCK),
            (jnp.asarray(normal(2, 8, 8, 3, seed=seed)) for seed in (1, 2)),
            strict=True,
        )
    )
    draw = jnp.full(2, float(LINE.u_from_sigma(sigma)), jnp.float32)
    trained = corrupt(LINE, x, Draws(draw, *fields.values()))
    low = x.reshape(2, 2, 4, 2, 4, 3).mean((2, 4))
    start = LINE.initial_state(sigma, lambda step, purpose: fields[purpose], low)
    np.testing.assert_allclose(start, trained.noisy, atol=3e-5)
    np.testing.assert_array_equal(
        LINE.blur(x, jnp.float32(LINE.blur_sigma_at(np.asarray(sigma)))), upsample(low, 4)
    )


@pytest.mark.parametrize("name", ["demo", "cifar10", "imagenet256", "celebahq256"])
def test_named_in_a_configuration_no_sampler_of_it_leaves_a_residual(name: str) -> None:
    config = load_config(name)
    config.stages.relay.process.kind = "relay_linear"
    settings = settings_of(config)
    for preset in PRESETS:
        stage = with_preset(settings, preset).stages[1]
        assert type(stage.process) is LinearRelay
        assert stage.sample_process.blur_sigma_at(stage.sampler.levels()[:1]) == 1, preset


def test_a_noisy_state_is_handed_over_with_the_same_law() -> None:
    assert LINE.continues_noise
    np.testing.assert_allclose(
        *(handoff_covariance(SMALL, TOP, from_noise) for from_noise in (True, False)), atol=1e-6
    )


# Samplers


@pytest.mark.parametrize("eta", RATES)
@pytest.mark.parametrize("nodes", [[0.7], [0.7, 0.9], [0.5, 0.7, 0.9]])
def test_exact_weights_are_the_integral_also_across_the_end_of_the_line(
    nodes: list[float], eta: float
) -> None:
    weights = exact_weights(LINE, nodes, 0.7, 0.5, eta)
    np.testing.assert_allclose(weights, by_definition(LINE, nodes, 0.7, 0.5, eta), atol=1e-7)
    change = factors_at(LINE, 0.5) - (0.5 / 0.7) ** (1 + eta) * factors_at(LINE, 0.7)
    np.testing.assert_allclose(weights.sum(0), change, atol=1e-13)


GRID = {"sigma_min": 0.02, "handoff_sigma": 0.8}


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_multistep_carries_gaussian_data_from_its_patch_means(eta: float, corrector: bool) -> None:
    coarse, fine = (
        wrong_laws(
            Multistep(num_steps=steps, corrector=corrector, fresh_noise_rate=eta, **GRID),
            SMALL,
            low_res=True,
        )
        for steps in (28, 112)
    )
    assert fine[0] < 4e-4 and coarse[0] > 8 * fine[0]
    assert (fine[1] > 0.02) == (eta > 0), "noise that is added must matter"


@pytest.mark.parametrize("correction, order", [("official", 1), ("second_order", 2)])
def test_heun_carries_gaussian_data_from_its_patch_means(correction: str, order: int) -> None:
    coarse, fine = (
        wrong_laws(
            Heun(
                num_steps=steps,
                sigma_min=0.02,
                sigma_max=0.8,
                handoff_sigma=0.9,
                correction=correction,
            ),
            SMALL,
            low_res=True,
        )[0]
        for steps in (28, 112)
    )
    assert math.log(coarse / fine, 4) == pytest.approx(order, abs=0.3)
    assert fine < (2e-2 if order == 1 else 1e-3)


# Refusals


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"sigma_full": 0.0}, "sigma_full must be positive, not 0.0"),
        ({"sigma_full": math.inf}, "sigma_full must be a finite number"),
        ({"sigma_full": 1.8}, "sigma_full 1.8 lies outside of the levels of training"),
        ({"sigma_full": 0.007}, "sigma_full 0.007 lies outside of the levels of training"),
    ],
)
def test_impossible_lines_are_refused(settings: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LinearRelay(**settings).check_training()


def test_a_handoff_below_the_end_of_the_line_is_refused() -> None:
    for sampler in (Heun(num_steps=9, handoff_sigma=0.5), Multistep(num_steps=9, **GRID)):
        process = LinearRelay(sigma_full=0.85)
        with pytest.raises(ValueError, match=r"handoff_sigma 0\.\d lies below sigma_full 0\.85"):
            sampler.check(process)
    Multistep(num_steps=9, corrector=True, **GRID).check(LINE)
    with pytest.raises(ValueError, match=r"handoff_sigma 1\.8 lies above"):
        Multistep(num_steps=9, handoff_sigma=1.8).check(LINE)

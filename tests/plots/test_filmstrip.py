"""The filmstrip is the sampler's: its frames are states of the chain, its end the sample."""

import jax
import numpy as np
import pytest

from relay_jax.config import build
from relay_jax.plots.filmstrip import filmstrip, filmstrip_figure, spread
from relay_jax.sampling.chain import Chain, initial_state
from relay_jax.stage import Stage
from tests.conftest import mesh_of, tiny_relay


def random_params(stage: Stage) -> dict:
    """Parameters that do something everywhere: no layer is left at zero."""
    rng = np.random.default_rng(stage.index)
    return jax.tree.map(
        lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), stage.shapes()
    )


def test_the_filmstrip_ends_in_the_samplers_images() -> None:
    config = tiny_relay()
    config.stages.base.sample.s_churn = 2.0
    stages = build(config)
    params = {stage.name: random_params(stage) for stage in stages}
    seeds, classes = [5, 9], np.array([1, 6])
    pairs = [(stage, params[stage.name]) for stage in stages]
    base, relay = filmstrip(pairs, seeds, classes, columns=3)
    images = Chain(stages, params, mesh_of(1), 2).images(seeds, classes)
    low, high = images["base"], images["relay"]
    np.testing.assert_allclose(base.final, low, atol=2e-5)
    np.testing.assert_allclose(relay.final, high, atol=2e-5)
    assert low.std() > 0.1 and np.abs(high[0] - high[1]).max() > 0.1
    # The first state is the start, and the last denoised image the sample: nothing follows it.
    start = initial_state(stages[1], np.array(seeds), base.final)
    np.testing.assert_allclose(relay.states[0], start, atol=1e-5)
    np.testing.assert_allclose(relay.denoised[-1], relay.final, atol=1e-5)
    assert base.states[0].std() == pytest.approx(base.sigmas[0], rel=0.15)
    assert base.steps.tolist() == [0, 2, 3] and base.total_steps == 4
    assert relay.steps[-1] == relay.total_steps - 1
    np.testing.assert_array_equal(relay.sigmas, stages[1].sampler.levels()[relay.steps])


def test_a_state_that_is_handed_over_is_the_last_frame_and_shows_its_denoised_image() -> None:
    config = tiny_relay()
    config.stages.base.sample.update(kind="multistep", num_steps=4)
    config.stages.relay.sample.handoff = "noise"
    stages = build(config)
    params = {stage.name: random_params(stage) for stage in stages}
    seeds, classes = [5, 9], np.array([1, 6])
    base, relay = filmstrip([(s, params[s.name]) for s in stages], seeds, classes, columns=3)
    images = Chain(stages, params, mesh_of(1), 2).images(seeds, classes)
    np.testing.assert_allclose(base.final, images["base"], atol=2e-5)
    np.testing.assert_allclose(relay.final, images["relay"], atol=2e-5)
    assert base.steps.tolist() == [0, 2, 4] and base.total_steps == 4
    assert base.sigmas[-1] == pytest.approx(relay.sigmas[0] / 2)
    np.testing.assert_array_equal(base.states[-1], base.handed)
    np.testing.assert_array_equal(base.denoised[-1], base.final)
    assert base.describe()["denoised_rms_to_final"][-1].max() == 0
    start = initial_state(stages[1], np.array(seeds), base.handed)
    np.testing.assert_allclose(relay.states[0], start, atol=1e-5)
    strip = filmstrip_figure([base, relay], ["a", "b"], 0.5, "title")
    assert any("handed over" in axes.get_title(loc="left") for axes in strip.axes)


def test_steps_are_spread_over_the_whole_sampling() -> None:
    assert spread(18, 7).tolist() == [0, 3, 6, 8, 11, 14, 17]
    assert spread(2, 7).tolist() == [0, 1] and spread(1, 3).tolist() == [0]
    with pytest.raises(ValueError, match="at least 2"):
        filmstrip([], [0], np.zeros(1, int), columns=1)

"""State: what a training begins with, the warm-up counted in images, Adam's steps by hand."""

from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from relay_jax.stage import TrainSettings
from relay_jax.training.state import init_state, make_optimizer, warmup_rate
from tests.test_stage import STAGE


def test_warm_up_is_zero_at_first_linear_in_images_and_then_constant() -> None:
    rate = partial(warmup_rate, learning_rate=2e-4, batch=4096, warmup_images=10_000_000)
    steps = np.array([0, 1, 1000, 2441, 2442, 100_000])
    want = 2e-4 * np.minimum(steps * 4096 / 1e7, 1)
    np.testing.assert_allclose([rate(step) for step in steps], want, rtol=1e-6)
    assert rate(0) == 0 and want[-2] == want[-1] == 2e-4


def test_half_the_batch_warms_up_in_twice_the_steps() -> None:
    small, large = (
        partial(warmup_rate, learning_rate=1e-4, batch=batch, warmup_images=10_000)
        for batch in (32, 64)
    )
    np.testing.assert_allclose(
        [small(2 * n) for n in (10, 100, 1000)], [large(n) for n in (10, 100, 1000)]
    )


@pytest.mark.parametrize("warmup_images", [0, 1])
def test_without_warm_up_the_second_step_has_the_full_rate(warmup_images: int) -> None:
    rate = partial(warmup_rate, learning_rate=1e-3, batch=8, warmup_images=warmup_images)
    assert rate(0) == 0
    np.testing.assert_allclose(rate(1), 1e-3, rtol=1e-6)


def test_steps_are_those_of_adam_with_bias_correction() -> None:
    beta1, beta2, epsilon = 0.8, 0.99, 1e-3
    settings = TrainSettings(
        images=100,
        batch=10,
        learning_rate=0.1,
        warmup_images=30,
        adam_beta1=beta1,
        adam_beta2=beta2,
        adam_epsilon=epsilon,
    )
    optimizer = make_optimizer(settings)
    gradients = np.random.default_rng(0).normal(size=(5, 6)) * np.array([1, 1e-2, 1e-4, 10, 0, 1])

    @jax.jit
    def step(
        x: jax.Array, state: optax.OptState, gradient: jax.Array
    ) -> tuple[jax.Array, optax.OptState]:
        updates, state = optimizer.update(gradient, state, x)
        return optax.apply_updates(x, updates), state

    x = jnp.ones(6)
    state = optimizer.init(x)
    by_hand, mean, square = np.ones(6), np.zeros(6), np.zeros(6)
    for n, gradient in enumerate(gradients):
        x, state = step(x, state, gradient.astype(np.float32))
        mean = beta1 * mean + (1 - beta1) * gradient
        square = beta2 * square + (1 - beta2) * gradient**2
        rate = 0.1 * min(10 * n / 30, 1)
        by_hand -= (
            rate
            * (mean / (1 - beta1 ** (n + 1)))
            / (np.sqrt(square / (1 - beta2 ** (n + 1))) + epsilon)
        )
        np.testing.assert_allclose(x, by_hand, rtol=1e-5)
        if n == 0:
            np.testing.assert_array_equal(x, np.ones(6))  # only the moments have moved


def test_a_training_begins_with_the_stage_s_parameters_and_a_copy_of_them_as_average() -> None:
    key = jax.random.key(3)
    state = jax.jit(partial(init_state, STAGE))(key)
    chex.assert_trees_all_equal(state.params, jax.jit(STAGE.init)(key), state.ema)
    assert (state.step, state.nonfinite_row, state.nonfinite_total) == (0, 0, 0)
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.opt_state))


def test_without_further_averages_the_state_has_the_arrays_that_it_always_had() -> None:
    """Old checkpoints fit, and a step costs what it did: train.ema adds copies alone."""
    key = jax.random.key(0)
    plain, more = (
        jax.eval_shape(partial(init_state, replace(STAGE, train=train)), key)
        for train in (STAGE.train, replace(STAGE.train, ema=(0.05, 2e6)))
    )
    assert plain.averages == {} and set(more.averages) == {"0.05", "2000000"}
    chex.assert_trees_all_equal_structs(plain, more._replace(averages={}))
    counts = [len(jax.tree.leaves(tree)) for tree in (plain, plain.params)]
    assert counts[0] == 4 * counts[1] + 5  # params, ema, two moments; step, two counts of Adam, ...

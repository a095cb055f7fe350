"""Average of the parameters: the official decays, what a half-life means, the ramp."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.training.ema import ema_decay, update_ema

decay_of = jax.jit(ema_decay, static_argnums=(1, 2, 3))


@pytest.mark.parametrize(
    "batch, halflife, images, decay",
    [
        (4096, 50e6, 1e6, 0.94479943),
        (4096, 50e6, 1e7, 0.99433783),
        (4096, 50e6, 1e8, 0.99943234),
        (4096, 50e6, 1e9, 0.99994322),
        (4096, 50e6, 5e9, 0.99994322),
        (1024, 0.5e6, 1e6, 0.98590463),
        (1024, 0.5e6, 1e7, 0.99858144),
        (1024, 0.5e6, 1e8, 0.99858144),
    ],
)
def test_decays_are_those_of_the_official_training(
    batch: int, halflife: float, images: float, decay: float
) -> None:
    np.testing.assert_allclose(
        decay_of(jnp.float32(images), batch, halflife, 0.05), decay, atol=1.5e-7, rtol=0
    )


def test_the_first_step_copies_the_parameters() -> None:
    decay = decay_of(jnp.float32(0), 64, 500.0, 0.05)
    assert decay == 0
    ema, params = {"a": jnp.full(3, 7.0)}, {"a": jnp.array([1.5, -2.25, 1e-7])}
    chex.assert_trees_all_equal(update_ema(ema, params, decay), params)


def test_after_a_half_life_the_old_parameters_weigh_one_half() -> None:
    weight = {"old": jnp.ones(())}
    for _ in range(8):
        weight = update_ema(
            weight, {"old": jnp.zeros(())}, decay_of(jnp.float32(1e9), 125, 1000.0, 0.05)
        )
    np.testing.assert_allclose(weight["old"], 0.5, rtol=1e-5)


def test_the_ramp_limits_the_half_life_to_a_share_of_the_images_seen() -> None:
    images = jnp.array([100.0, 1000.0, 10_000.0, 1e6])
    half_lives = np.minimum(800, 0.1 * np.asarray(images))
    np.testing.assert_allclose(
        decay_of(images, 50, 800.0, 0.1), 0.5 ** (50 / half_lives), rtol=1e-5
    )


def test_without_a_ramp_the_half_life_is_constant_from_the_first_image() -> None:
    for images in (0.0, 100.0, 1e6):
        np.testing.assert_allclose(
            decay_of(jnp.float32(images), 50, 100.0, 0.0), 0.5**0.5, rtol=1e-6
        )

"""Noise of the sampler: it belongs to its image, none is drawn in vain; impossible settings."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relay_jax.diffusion.process import EdmProcess, Purpose, RelayProcess
from relay_jax.diffusion.sampler import Heun, seeded_noise
from tests.diffusion.test_sampler import (
    CELEBA_EDM,
    IMAGENET_EDM,
    PLAIN_RELAY,
    RELAY,
    device_bumpy,
    normal,
    relay_heun,
    sample_edm,
    sample_relay,
)

SHAPE = (4, 8, 3)


@partial(jax.jit, static_argnums=1)
def all_noise(
    keys: jax.Array, purposes: tuple[Purpose, ...] = (Purpose.LATENTS, Purpose.HEUN_BLOCK)
) -> jax.Array:
    """[purposes, steps, b, h, w, c] of seeded noise, with traced steps as in a sampler."""
    noise_fn = seeded_noise(keys, SHAPE)
    return jnp.stack(
        [jax.lax.map(lambda step, p=p: noise_fn(step, p), jnp.arange(3)) for p in purposes]
    )


def seeds(count: int) -> jax.Array:
    return jax.vmap(jax.random.key)(jnp.arange(100, 100 + count))


def test_noise_of_an_image_depends_on_its_key_alone() -> None:
    eight = np.asarray(all_noise(seeds(8)))
    for count in (1, 3):
        np.testing.assert_array_equal(all_noise(seeds(count)), eight[:, :, :count])
    np.testing.assert_array_equal(all_noise(seeds(8)[::-1]), eight[:, :, ::-1])


def test_noise_is_unit_white_and_new_for_every_key_step_and_purpose() -> None:
    fields = np.asarray(all_noise(seeds(8), tuple(Purpose))).reshape(8 * 3 * 8, -1)
    # 192 fields of 96 numbers: each correlation has standard error 0.1, and 18,336 pairs reach
    # 4 or 5 of them.
    assert np.abs(np.corrcoef(fields) - np.eye(192)).max() < 0.55
    assert abs(fields.mean()) < 0.03 and abs(fields.var() - 1) < 0.05  # 4 and 5 standard errors


def test_noise_takes_steps_as_numbers_too() -> None:
    noise_fn = seeded_noise(seeds(1), SHAPE)
    np.testing.assert_array_equal(
        noise_fn(2, Purpose.EULER_BLOCK), noise_fn(jnp.int32(2), Purpose.EULER_BLOCK)
    )


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_noise_sharded_over_devices_is_the_same() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    keys = jax.device_put(seeds(8), NamedSharding(mesh, PartitionSpec("data")))
    got = all_noise(keys)
    np.testing.assert_array_equal(got, all_noise(seeds(8)))


def test_a_whole_relay_run_gives_the_same_image_alone_and_in_a_batch() -> None:
    sampler, low = relay_heun(14), normal(3, 1, 2, 3)

    def run(low: jax.Array, keys: jax.Array) -> jax.Array:
        return sample_relay(device_bumpy, low, seeded_noise(keys, SHAPE), RELAY, sampler).final

    together, alone = jax.jit(run)(low, seeds(3)), jax.jit(run)(low[1:2], seeds(3)[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(
    "options, process, purposes",
    [
        ({"fresh_noise": 0.0}, RELAY, {Purpose.INITIAL_GAUSS, Purpose.INITIAL_BLOCK}),
        (
            {},
            RELAY,
            {
                Purpose.INITIAL_GAUSS,
                Purpose.INITIAL_BLOCK,
                Purpose.EULER_GAUSS,
                Purpose.EULER_BLOCK,
                Purpose.HEUN_GAUSS,
                Purpose.HEUN_BLOCK,
            },
        ),
        ({}, PLAIN_RELAY, {Purpose.INITIAL_GAUSS, Purpose.EULER_GAUSS, Purpose.HEUN_GAUSS}),
    ],
)
def test_relay_draws_no_noise_without_effect(
    options: dict[str, float], process: RelayProcess, purposes: set[Purpose]
) -> None:
    used = set()

    def noise_fn(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        used.add(purpose)
        return jnp.zeros((1, 4, 4, 1))

    sampler = relay_heun(14, **options)
    jax.eval_shape(
        lambda low: sample_relay(device_bumpy, low, noise_fn, process, sampler),
        jnp.zeros((1, 1, 1, 1)),
    )
    assert used == purposes


@pytest.mark.parametrize(
    "options, purposes",
    [
        ({}, set()),
        ({"s_churn": 1.0}, {Purpose.CHURN_GAUSS}),
        ({"fresh_noise": 0.1}, {Purpose.EULER_GAUSS, Purpose.HEUN_GAUSS}),
    ],
)
def test_edm_draws_no_noise_without_effect(
    options: dict[str, float], purposes: set[Purpose]
) -> None:
    used = set()

    def noise_fn(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        used.add(purpose)
        return jnp.zeros((1, 4, 4, 1))

    sampler = Heun(num_steps=3, **options)
    jax.eval_shape(
        lambda z: sample_edm(device_bumpy, z, noise_fn, sampler), jnp.zeros((1, 4, 4, 1))
    )
    assert used == purposes


# Refusals.


@pytest.mark.parametrize(
    "setting",
    [
        {"s_churn": -1.0},
        {"s_noise": -1.0},
        {"fresh_noise": 1.1},
        {"fresh_noise": -0.1},
        {"num_steps": 0},
        {"sigma_min": 90.0},
        {"rho": 0.0},
        {"handoff_sigma": 0.001},
    ],
)
def test_impossible_samplers_are_refused_by_name(setting: dict[str, float]) -> None:
    (name,) = setting
    with pytest.raises(ValueError, match=name):
        Heun(**{"num_steps": 10} | setting)


@pytest.mark.parametrize(
    "sampler, process, message",
    [
        (relay_heun(14, 1.5), RelayProcess(cdf_max=0.89), r"handoff_sigma 1\.5 lies above 1\.31"),
        (relay_heun(14, s_churn=1.0), RELAY, "has no churn"),
        (IMAGENET_EDM, RELAY, "handoff_sigma must be positive and finite"),
        (relay_heun(14), EdmProcess(), "handoff_sigma is for a stage that continues images"),
    ],
)
def test_a_sampler_refuses_a_process_that_it_does_not_fit(
    sampler: Heun, process: EdmProcess, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sampler.check(process)
    CELEBA_EDM.check(EdmProcess())
    relay_heun(14).check(RELAY)

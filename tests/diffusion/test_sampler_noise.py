"""Samplers: noise belongs to its image, nothing is drawn in vain, impossible settings are
refused."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from relay_jax.diffusion.process import RelayProcess
from relay_jax.diffusion.sampler import (
    NOISE_PURPOSES,
    EdmSampler,
    RelaySampler,
    sample_edm,
    sample_relay,
    seeded_noise,
)
from tests.diffusion.test_sampler import PLAIN_RELAY, RELAY, device_bumpy, normal, silence

SHAPE = (4, 8, 3)


@partial(jax.jit, static_argnums=1)
def all_noise(keys: jax.Array, purposes: tuple[str, ...] = ("latents", "heun_block")) -> jax.Array:
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
    fields = np.asarray(all_noise(seeds(8), NOISE_PURPOSES)).reshape(8 * 3 * 8, -1)
    # 192 fields of 96 numbers: each correlation has standard error 0.1, and 18,336 pairs reach
    # 4 or 5 of them.
    assert np.abs(np.corrcoef(fields) - np.eye(192)).max() < 0.55
    assert abs(fields.mean()) < 0.03 and abs(fields.var() - 1) < 0.05  # 4 and 5 standard errors


def test_noise_takes_steps_as_numbers_too() -> None:
    noise_fn = seeded_noise(seeds(1), SHAPE)
    np.testing.assert_array_equal(noise_fn(2, "euler_block"), noise_fn(jnp.int32(2), "euler_block"))


@pytest.mark.skipif(jax.device_count() < 8, reason="needs eight devices")
def test_noise_sharded_over_devices_is_the_same() -> None:
    mesh = Mesh(np.array(jax.devices()[:8]), ("data",))
    keys = jax.device_put(seeds(8), NamedSharding(mesh, PartitionSpec("data")))
    got = all_noise(keys)
    np.testing.assert_array_equal(got, all_noise(seeds(8)))


def test_a_whole_relay_run_gives_the_same_image_alone_and_in_a_batch() -> None:
    sampler, low = RelaySampler(num_steps=14, handoff_sigma=0.9), normal(3, 1, 2, 3)

    def run(low: jax.Array, keys: jax.Array) -> jax.Array:
        return sample_relay(device_bumpy, low, seeded_noise(keys, SHAPE), RELAY, sampler).final

    together, alone = jax.jit(run)(low, seeds(3)), jax.jit(run)(low[1:2], seeds(3)[1:2])
    np.testing.assert_allclose(alone[0], together[1], atol=1e-6)
    assert np.abs(together[0] - together[1]).max() > 0.1


@pytest.mark.parametrize(
    "options, process, purposes",
    [
        ({"fresh_noise": 0.0}, RELAY, {"initial_gauss", "initial_block"}),
        (
            {},
            RELAY,
            {
                "initial_gauss",
                "initial_block",
                "euler_gauss",
                "euler_block",
                "heun_gauss",
                "heun_block",
            },
        ),
        ({}, PLAIN_RELAY, {"initial_gauss", "euler_gauss", "heun_gauss"}),
    ],
)
def test_relay_draws_no_noise_without_effect(
    options: dict[str, float], process: RelayProcess, purposes: set[str]
) -> None:
    drawn = set()

    def noise_fn(step: jax.Array | int, purpose: str) -> jax.Array:
        drawn.add(purpose)
        return jnp.zeros((1, 4, 4, 1))

    sampler = RelaySampler(num_steps=14, handoff_sigma=0.9, **options)
    jax.eval_shape(
        lambda low: sample_relay(device_bumpy, low, noise_fn, process, sampler),
        jnp.zeros((1, 1, 1, 1)),
    )
    assert drawn == purposes


@pytest.mark.parametrize(
    "options, purposes",
    [
        ({}, set()),
        ({"s_churn": 1.0}, {"churn_gauss"}),
        ({"sde_scale": 0.1}, {"euler_gauss", "heun_gauss"}),
    ],
)
def test_edm_draws_no_noise_without_effect(options: dict[str, float], purposes: set[str]) -> None:
    drawn = set()

    def noise_fn(step: jax.Array | int, purpose: str) -> jax.Array:
        drawn.add(purpose)
        return jnp.zeros((1, 4, 4, 1))

    sampler = EdmSampler(num_steps=3, **options)
    jax.eval_shape(
        lambda z: sample_edm(device_bumpy, z, noise_fn, sampler), jnp.zeros((1, 4, 4, 1))
    )
    assert drawn == purposes


# Refusals.


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"s_churn": -1.0}, "s_churn"),
        ({"s_noise": -1.0}, "s_noise"),
        ({"sde_scale": 1.0}, "sde_scale"),
        ({"sde_scale": -0.1}, "sde_scale"),
        ({"num_steps": 0}, "num_steps"),
        ({"sigma_min": 90.0}, "sigma_min"),
        ({"rho": 0.0}, "rho"),
    ],
)
def test_impossible_edm_samplers_are_refused_by_name(
    setting: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        EdmSampler(**{"num_steps": 10} | setting)


@pytest.mark.parametrize(
    "setting, message",
    [
        ({"fresh_noise": -0.1}, "fresh_noise"),
        ({"fresh_noise": 1.1}, "fresh_noise"),
        ({"num_steps": 0}, "num_steps"),
        ({"handoff_sigma": 0.001}, "handoff_sigma"),
    ],
)
def test_impossible_relay_samplers_are_refused_by_name(
    setting: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        RelaySampler(**{"num_steps": 10, "handoff_sigma": 0.9} | setting)


def test_a_handoff_above_full_blur_is_refused_before_anything_runs() -> None:
    sampler = RelaySampler(num_steps=14, handoff_sigma=1.5)
    with pytest.raises(ValueError, match=r"handoff_sigma 1\.5 lies above 1\.31"):
        sample_relay(
            device_bumpy, jnp.zeros((1, 1, 1, 1)), silence, RelayProcess(cdf_max=0.89), sampler
        )

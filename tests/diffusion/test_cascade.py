"""The cascade stage: its condition, a known law with it, guidance, and what it refuses."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

import relay_jax as rx
from relay_jax.config import build
from relay_jax.diffusion.cascade import Cascade
from relay_jax.diffusion.guidance import Guidance, classifier_free
from relay_jax.diffusion.loss import corrupt, draw, loss_map
from relay_jax.diffusion.multistep import Multistep
from relay_jax.diffusion.noise import Purpose
from relay_jax.diffusion.precondition import Condition, precondition, with_condition
from relay_jax.diffusion.process import EdmProcess
from relay_jax.diffusion.sampler import Heun
from relay_jax.errors import UserError
from relay_jax.models.network import init_params
from relay_jax.models.unet import UNet
from relay_jax.sampling.chain import condition_of, initial_state, stage_noise
from tests.conftest import tiny_relay
from tests.diffusion.test_multistep import (
    PIXELS,
    as_matrix,
    gaussian_data,
    mean_only,
    normal,
    pixels,
    scaled,
    silence,
)

CASCADE = Cascade(patch=2)
TOP = 1000.0  # of a start without the image, whose share in the end is about 1/TOP of its contrast


def cascade_relay(**changes: object) -> ConfigDict:
    """The tiny relay, its second stage a cascade by the one override of its kind."""
    config = tiny_relay()
    config.stages.relay.process.kind = "cascade"
    config.stages.relay.process.update(changes)
    return config


# Training


def test_the_condition_is_the_up_sampled_image_with_noise_of_a_level_that_is_told() -> None:
    x = jnp.asarray(normal(400, 4, 4, 3))
    draws = draw(CASCADE, jax.random.key(0), x.shape)
    got = corrupt(CASCADE, x, draws)
    sigma = np.asarray(got.condition.sigma, np.float64)
    np.testing.assert_allclose(
        got.condition.image,
        scaled(x, mean_only(2)) + sigma[:, None, None, None] * draws.condition_gaussian,
        atol=1e-5,
    )
    # Even in ln sigma between its ends: 1.95 / sqrt(n) is exceeded once in a thousand samples.
    share = np.sort(np.log(sigma / 0.01) / math.log(0.5 / 0.01))
    assert np.abs(share - (np.arange(400) + 0.5) / 400).max() < 1.95 / 20
    # All else is a first stage: the same levels, noise and weights from the same draws.
    edm = corrupt(EdmProcess(), x, draw(EdmProcess(), jax.random.key(0), x.shape))
    for name in ("noisy", "sigma", "weight", "blurred"):
        np.testing.assert_array_equal(getattr(got, name), getattr(edm, name))
    both = np.stack([draws.gaussian, draws.condition_gaussian]).reshape(2, -1)
    assert abs(np.corrcoef(both)[0, 1]) < 0.03 and abs(both[1].std() - 1) < 0.03


def test_the_network_has_the_scaled_condition_and_the_loss_its_own() -> None:
    x = jnp.asarray(normal(3, 4, 4, 3))
    corrupted = corrupt(CASCADE, x, draw(CASCADE, jax.random.key(0), x.shape))
    seen = {}

    def network(
        scaled_x: jax.Array, c_noise: jax.Array, *labels: None, condition: tuple
    ) -> jax.Array:
        seen.update(x=scaled_x, c_noise=c_noise, image=condition[0], level=condition[1])
        return jnp.zeros_like(scaled_x)

    loss_map(precondition(network), x, corrupted)
    level = np.asarray(corrupted.condition.sigma)
    np.testing.assert_allclose(seen["level"], np.log(level) / 4, rtol=1e-6)
    want = corrupted.condition.image / np.sqrt(level**2 + 0.25)[:, None, None, None]
    np.testing.assert_allclose(seen["image"], want, rtol=1e-5)
    np.testing.assert_allclose(seen["c_noise"], np.log(corrupted.sigma) / 4, rtol=1e-6)


def test_guidance_gives_both_branches_the_condition_of_their_images() -> None:
    condition = Condition(jnp.asarray(normal(3, 2, 2, 1)), jnp.asarray([0.1, 0.2, 0.3]))

    def denoise(
        x: jax.Array, sigma: jax.Array, labels: jax.Array, *, condition: Condition
    ) -> float:
        return x + condition.image + (labels.sum(1) + condition.sigma)[:, None, None, None]

    x, labels = jnp.asarray(normal(3, 2, 2, 1, seed=1)), jnp.eye(3)
    bound = with_condition(denoise, condition)
    plain = x + condition.image + condition.sigma[:, None, None, None]
    np.testing.assert_allclose(bound(x, 1.0, labels), plain + 1, atol=1e-6)
    guided = classifier_free(bound, labels, Guidance(weight=3.0))
    np.testing.assert_allclose(guided(x, jnp.float32(1)), plain + 3, atol=1e-5)
    with pytest.raises(ValueError, match="as many images as the batch"):
        bound(x[:2], 1.0, labels[:2])


# Sampling


def test_a_cascade_starts_from_noise_and_gives_the_network_the_noisy_image_before() -> None:
    stage = build(cascade_relay())[1]
    seeds, low = jnp.asarray([3, 4], jnp.uint32), jnp.asarray(normal(2, 8, 8, 3))
    noise_fn = stage_noise(stage, seeds)
    assert stage.low_resolution == 8 and stage.sampler.levels()[0] == pytest.approx(80)
    np.testing.assert_allclose(
        initial_state(stage, seeds, low), 80 * noise_fn(0, Purpose.LATENTS), rtol=1e-6
    )
    got = condition_of(stage, seeds, low)
    up = np.repeat(np.repeat(low, 2, 1), 2, 2)
    np.testing.assert_allclose(got.image, up + 0.1 * noise_fn(0, Purpose.INITIAL_GAUSS), atol=1e-6)
    np.testing.assert_array_equal(got.sigma, np.float32([0.1, 0.1]))
    with pytest.raises(ValueError, match="continues the images"):
        condition_of(stage, seeds)
    assert condition_of(build(tiny_relay())[1], seeds, low) is None


@pytest.mark.parametrize(
    "sampler",
    [
        Heun(num_steps=160, sigma_min=0.01, sigma_max=TOP),
        Multistep(num_steps=160, sigma_min=0.01, sigma_max=TOP, corrector=True),
        Multistep(num_steps=300, sigma_min=0.01, sigma_max=TOP, fresh_noise_rate=0.5),
    ],
    ids=["heun", "multistep", "fresh noise"],
)
def test_gaussian_data_have_their_joint_law_with_the_image_before(sampler: object) -> None:
    """x0 and the condition c are jointly gaussian, so D is a matrix for x and one for c."""
    sampler.check(CASCADE)
    data, means = gaussian_data(), as_matrix(scaled(pixels(), mean_only(2)))
    level = CASCADE.condition_sigma
    # Of (x0, c): c has the patch means of x0, and noise of the level that the network is told.
    cross, given = data @ means.T, means @ data @ means.T + level**2 * np.eye(PIXELS)
    tables = []
    for sigma in sampler.levels()[:-1]:
        joint = np.block([[data + sigma**2 * np.eye(PIXELS), cross], [cross.T, given]])
        tables.append(np.concatenate([data, cross], 1) @ np.linalg.inv(joint))
    tables = jnp.asarray(np.stack(tables), jnp.float32)
    levels = jnp.asarray(sampler.levels()[:-1], jnp.float32)
    steps = len(levels)
    # One image for each number that is drawn: 16 of the low image, 16 of the noise of the
    # condition, 16 of the start and 16 of each step. The response is the covariance.
    rows = PIXELS * (3 + steps)

    def impulses(block: jax.Array | int) -> jax.Array:
        place = PIXELS * block + np.arange(PIXELS)
        return (jnp.arange(rows)[:, None] == place).astype(jnp.float32).reshape(rows, 4, 4, 1)

    def noise_fn(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        blocks = {Purpose.INITIAL_GAUSS: 1, Purpose.LATENTS: 2, Purpose.EULER_GAUSS: 3 + step}
        return impulses(blocks[purpose])

    root = np.zeros((rows, PIXELS), np.float32)
    # The eigenvalues of a law of patch means: 12 of the 16 are 0, so that Cholesky would fail.
    values, vectors = np.linalg.eigh(means @ data @ means.T)
    root[:PIXELS] = (vectors * np.sqrt(np.maximum(values, 0))).T
    low = root.reshape(rows, 4, 4, 1)[:, ::2, ::2]
    condition = CASCADE.sampling_condition(noise_fn, jnp.asarray(low))
    np.testing.assert_array_equal(condition.sigma, np.float32(level))

    def denoise(x: jax.Array, sigma: jax.Array, condition: Condition) -> jax.Array:
        matrix = tables[jnp.argmin(jnp.abs(levels - sigma))]
        both = jnp.concatenate([x, condition.image], 1).reshape(rows, 2 * PIXELS)
        return jnp.matmul(both, matrix.T, precision="highest").reshape(x.shape)

    start = CASCADE.initial_state(float(sampler.levels()[0]), noise_fn)
    run = jax.jit(
        lambda x, c: sampler(with_condition(denoise, c), x, CASCADE, noise_fn, True).states
    )
    last, seen = as_matrix(run(start, condition)[-1]), as_matrix(condition.image)
    small = sampler.levels()[-2] ** 2 * np.eye(PIXELS)
    size = np.linalg.norm(data)
    print(
        np.linalg.norm(last.T @ last - data - small) / size,
        np.linalg.norm(last.T @ seen - cross) / size,
    )
    assert np.linalg.norm(last.T @ last - data - small) < 1e-3 * size
    assert np.linalg.norm(last.T @ seen - cross) < 1e-3 * size
    # The condition matters: without it the image would not follow the one before.
    assert np.linalg.norm(cross) > 0.5 * size


# The network


def test_the_network_sees_the_images_and_the_level_of_its_condition() -> None:
    network = UNet(resolution=8, channels=8, multipliers=(1,), blocks=1, condition_channels=3)
    params = init_params(network, jax.random.key(0))
    params = jax.tree.map(lambda p: p + 0.05, params)
    x, c_noise = jnp.asarray(normal(2, 8, 8, 3)), jnp.zeros(2)
    image, level = jnp.asarray(normal(2, 8, 8, 3, seed=1)), jnp.asarray([-0.5, -0.5])
    apply = jax.jit(lambda *c: network.apply({"params": params}, x, c_noise, condition=c))
    first = apply(image, level)
    assert first.shape == x.shape
    assert np.abs(apply(image + 1, level) - first).max() > 1e-3
    other = np.abs(apply(image, level + jnp.asarray([0.0, 0.3])) - first).max((1, 2, 3))
    assert other[0] == 0 and other[1] > 1e-4
    with pytest.raises(ValueError, match="3 channels of a condition"):
        network.apply({"params": params}, x, c_noise)


# Configurations


def test_the_kind_alone_makes_a_cascade_of_a_relay() -> None:
    config = cascade_relay()
    config.stages.relay.sample.update(kind="multistep", exact_first_blur=True, handoff_sigma=0.7)
    stage = build(config)[1]
    assert type(stage.process) is rx.Cascade and stage.process.patch == 2
    assert stage.sampler.handoff_sigma == math.inf and not stage.sampler.exact_first_blur
    assert stage.network.condition_channels == 3 and not stage.process.has_handoff
    config.stages.relay.sample.condition_sigma = 0.25
    again = build(config)[1]
    assert again.sample_process.condition_sigma == 0.25 and again.process == stage.process


@pytest.mark.parametrize(
    "stage, section, changes, message",
    [
        ("relay", "sample", {"handoff": "noise"}, "cascade .*use sample.handoff 'image'"),
        ("relay", "sample", {"condition_sigma": 0.7}, "condition_sigma 0.7 lies outside"),
        ("relay", "process", {"condition_sigma_min": 0.6}, "need 0 < condition_sigma_min"),
        ("relay", "process", {"patch": 4}, "is not 4 "),
        ("base", "process", {"kind": "cascade"}, "the first stage has process.kind 'edm'"),
        ("relay", "model", {"kind": "examples.new_network:Transformer"}, "use model.kind 'unet'"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    stage: str, section: str, changes: dict[str, object], message: str
) -> None:
    config = cascade_relay()
    config.stages[stage][section].update(changes)
    with pytest.raises(UserError, match=message) as caught:
        build(config)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


def test_only_a_process_with_a_condition_may_have_a_network_with_one() -> None:
    config = tiny_relay()
    config.stages.relay.model.condition_channels = 3
    with pytest.raises(UserError, match="condition_channels 3 is for a process with a condition"):
        build(config)
    with pytest.raises(ValueError, match="handoff_sigma is for a stage that continues"):
        Heun(num_steps=4, handoff_sigma=0.9).check(CASCADE)
    Heun(num_steps=4, s_churn=2.0).check(CASCADE)
    assert not CASCADE.continues_noise
    with pytest.raises(ValueError, match="needs draws"):
        CASCADE.condition(jnp.zeros((1, 4, 4, 3)), None, None)
    with pytest.raises(AssertionError, match="drew noise"):
        CASCADE.sampling_condition(silence, jnp.zeros((1, 2, 2, 3)))

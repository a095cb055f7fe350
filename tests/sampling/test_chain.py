"""Image i depends on seed i alone; stages chain."""

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from configs import default
from relay_jax.config import Stage, build
from relay_jax.diffusion.sampler import upsample
from relay_jax.sampling.chain import StageSampler, generate, handoff_images
from tests.conftest import mesh_of, tiny_relay

SEEDS = np.array([3, 1_000_003, 12, 4_294_967_295, 5, 6])
CLASSES = np.array([3, 2, 5, 7, 0, 1])


def random_params(stage: Stage, seed: int = 0) -> dict:
    """Parameters without the zeros of the initialisation, so that the network says something."""
    net = stage.network
    shapes = jax.eval_shape(
        net.init, jax.random.key(0), np.zeros((1, net.resolution, net.resolution, 3)), np.zeros(1)
    )
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), shapes["params"]
    )


@pytest.fixture(scope="module")
def relay() -> list[tuple[StageSampler, dict]]:
    mesh = mesh_of(1)
    return [
        (StageSampler(stage, mesh, 4), random_params(stage, i))
        for i, stage in enumerate(build(tiny_relay()))
    ]


@pytest.fixture(scope="module")
def images(relay: list[tuple[StageSampler, dict]]) -> dict[str, np.ndarray]:
    return generate(relay, SEEDS, CLASSES)


def test_every_stage_gives_images_of_its_resolution(images: dict[str, np.ndarray]) -> None:
    assert {k: v.shape for k, v in images.items()} == {
        "base": (6, 8, 8, 3),
        "relay": (6, 16, 16, 3),
    }
    assert all(np.isfinite(v).all() and v.std() > 0.01 for v in images.values())


def test_an_image_depends_on_its_seed_and_not_on_its_batch(
    relay: list, images: dict[str, np.ndarray]
) -> None:
    order = np.array([4, 0, 5, 2])
    again = generate(relay, SEEDS[order], CLASSES[order])
    other_size = generate(
        [(StageSampler(s.stage, mesh_of(1), 3), p) for s, p in relay], SEEDS[:2], CLASSES[:2]
    )
    for name in images:
        np.testing.assert_allclose(again[name], images[name][order], atol=2e-5)
        np.testing.assert_allclose(other_size[name], images[name][:2], atol=2e-5)
    assert np.abs(images["base"][0] - images["base"][1]).max() > 0.1, (
        "different seeds gave the same image"
    )


def test_the_number_of_devices_does_not_change_an_image(
    relay: list, images: dict[str, np.ndarray]
) -> None:
    mesh = mesh_of(8)
    many = generate([(StageSampler(s.stage, mesh, 4), p) for s, p in relay], SEEDS, CLASSES)
    for name in images:
        np.testing.assert_allclose(many[name], images[name], atol=2e-5)


def test_the_handoff_noise_has_the_level_of_the_first_step() -> None:
    stage = build(tiny_relay())[1]
    noise = handoff_images(stage, np.arange(64), np.zeros((64, 8, 8, 3), np.float32))
    scale = stage.sampler.sigmas()[0] * np.sqrt(1 + stage.process.block_noise_scale**2)
    np.testing.assert_allclose(noise.std(), scale, rtol=0.02)
    assert np.abs(np.corrcoef(noise.reshape(64, -1)) - np.eye(64)).max() < 0.25, "seeds share noise"


def test_the_relay_starts_from_the_upsampled_images_of_the_stage_before() -> None:
    stage = build(tiny_relay())[1]
    low = np.random.default_rng(0).uniform(-1, 1, (2, 8, 8, 3)).astype(np.float32)
    noise = handoff_images(stage, SEEDS[:2], np.zeros_like(low))
    np.testing.assert_allclose(
        handoff_images(stage, SEEDS[:2], low) - noise, upsample(low, 2), atol=1e-6
    )


def test_three_stages_make_one_relay() -> None:
    config: ConfigDict = tiny_relay()
    third = default.relay_stage(32, patch=2)
    third.model.update(channels=8, head_width=8, multipliers=(1,), blocks=1, attention=())
    third.sample.num_steps = 8
    config.stages.last = third
    stages = build(config)
    assert [s.name for s in stages] == ["base", "relay", "last"]
    mesh = mesh_of(1)
    out = generate(
        [(StageSampler(s, mesh, 2), random_params(s)) for s in stages], SEEDS[:2], CLASSES[:2]
    )
    assert [v.shape[1] for v in out.values()] == [8, 16, 32]

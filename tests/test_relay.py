"""The library: a run opens itself, gives the command line's images, and has parts to replace."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

import relay_jax as rx
from relay_jax.data.loader import read
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import UserError
from relay_jax.sampling.folder import image_path
from relay_jax.sampling.pixels import to_uint8
from tests.conftest import command_line, run_main


@pytest.fixture(scope="module")
def workdir(tiny_run: Path) -> Path:
    return tiny_run


@pytest.fixture(scope="module")
def relay(workdir: Path) -> rx.Relay:
    return rx.load(workdir)


@pytest.fixture(scope="module")
def images(relay: rx.Relay) -> dict[str, np.ndarray]:
    return relay.sample(range(6))


def test_a_run_opens_itself(relay: rx.Relay, images: dict[str, np.ndarray]) -> None:
    assert [stage.name for stage in relay.stages] == ["base", "relay"]
    assert relay.notes["relay"]["network"]["kind"] == "unet"
    assert {name: x.shape for name, x in images.items()} == {
        "base": (6, 8, 8, 3),
        "relay": (6, 16, 16, 3),
    }


def test_the_command_line_writes_the_same_bits(
    workdir: Path, images: dict[str, np.ndarray], tmp_path: Path
) -> None:
    with command_line(f"--workdir={workdir}", "--mode=sample", "--seeds=1-4", f"--out={tmp_path}"):
        run_main()
    for seed in range(1, 5):
        pixels = np.asarray(Image.open(image_path(tmp_path, seed)))
        np.testing.assert_array_equal(pixels, to_uint8(images["relay"][seed]))


def test_classes_are_a_number_a_rule_or_one_for_each(
    relay: rx.Relay, images: dict[str, np.ndarray]
) -> None:
    by_number = relay.sample([1, 2], classes=3)["base"]
    each = relay.sample([1, 2], classes=[3, 2])["base"]
    np.testing.assert_array_equal(each[0], by_number[0])
    np.testing.assert_array_equal(each[1], images["base"][2])  # 2 mod 8
    assert not np.array_equal(by_number[1], each[1])


@pytest.mark.parametrize(
    ("seeds", "classes", "says"),
    [
        ([-1], None, "seeds must lie"),
        ([0], 8, "unknown class 8"),
        ([0, 1], [1], "2 seeds need as many"),
        ([0], [9], "classes must lie in 0 to 7"),
        ([0], "prime", "neither mod"),
    ],
)
def test_impossible_samples_are_refused(
    relay: rx.Relay, seeds: list[int], classes: object, says: str
) -> None:
    with pytest.raises(rx.UserError, match=says):
        relay.sample(seeds, classes)


def test_the_denoiser_is_the_preconditioned_network(relay: rx.Relay) -> None:
    x = np.random.default_rng(0).normal(0, 1, (2, 8, 8, 3)).astype(np.float32)
    stage, params, sigma = relay.stage("base"), relay.params["base"], 0.7
    denoised = jax.jit(relay.denoiser("base", [3, 4]))(x, sigma)
    total = sigma**2 + 0.25
    raw = stage.network.apply(
        {"params": params},
        x / np.sqrt(total),
        jnp.full(2, np.log(sigma) / 4),
        jax.nn.one_hot(jnp.array([3, 4]), 8),
    )
    expected = 0.25 / total * x + sigma * 0.5 / np.sqrt(total) * raw
    np.testing.assert_allclose(denoised, expected, atol=1e-5)


def test_the_loss_of_bytes_is_that_of_floats_and_depends_on_key_and_place(relay: rx.Relay) -> None:
    pixels, labels = read(SyntheticShapes(16, 64, 0), range(4), 16)
    key = jax.random.key(1)
    losses = relay.loss("relay", pixels, labels, key)
    assert losses.shape == (4,) and np.isfinite(losses).all()
    floats = pixels.astype(np.float32) / 127.5 - 1
    np.testing.assert_allclose(relay.loss("relay", floats, labels, key), losses, rtol=1e-5)
    np.testing.assert_allclose(relay.loss("relay", pixels[:2], labels[:2], key), losses[:2], 1e-5)
    with pytest.raises(AssertionError, match=r"images must be \[b, 16, 16, 3\]"):
        relay.loss("relay", pixels[:, :8], labels, key)


def test_a_replaced_sampler_changes_its_stage_alone(
    relay: rx.Relay, images: dict[str, np.ndarray]
) -> None:
    fewer = relay.replace("relay", sampler=rx.Heun(num_steps=4, handoff_sigma=0.9, sigma_min=0.01))
    other = fewer.sample(range(6))
    np.testing.assert_array_equal(other["base"], images["base"])
    assert np.abs(other["relay"] - images["relay"]).max() > 0.01
    with pytest.raises(rx.UserError, match="stage relay: handoff_sigma"):
        relay.replace("relay", sampler=rx.Heun(num_steps=4))
    with pytest.raises(rx.UserError, match=r"unknown stage 'top'; .* base, relay"):
        relay.replace("top", sampler=None)


def test_stages_are_found_in_folders_of_weights(workdir: Path, relay: rx.Relay) -> None:
    config = workdir / "config.json"
    folders = {name: workdir / name for name in ("base", "relay")}
    from relay_jax.workdir import open_config

    again = rx.load(folders, config=open_config(config.parent))
    for old, new in zip(*map(jax.tree.leaves, (relay.params, again.params)), strict=True):
        np.testing.assert_array_equal(old, new)
    with pytest.raises(rx.UserError, match="these weights fit no configuration"):
        rx.load(folders)
    with pytest.raises(rx.UserError, match="relay is of another network: resolution"):
        rx.load({"base": workdir / "relay"}, config=open_config(workdir))
    with pytest.raises(rx.UserError, match="neither a run"):
        rx.load(workdir / "nothing")


def test_weights_find_the_configuration_that_has_their_networks(tmp_path: Path) -> None:
    from relay_jax.models.network import describe
    from relay_jax.runtime.checkpoint import Checkpoints

    fresh = rx.build("demo")
    for stage in fresh.stages:
        with Checkpoints(tmp_path / stage.name / "checkpoints") as checkpoints:
            meta = {"images": 0, "network": describe(stage.network)}
            checkpoints.save(0, fresh.params[stage.name], {"step": np.int32(0)}, meta)
    relay = rx.load(tmp_path)
    assert relay.stages == fresh.stages
    for old, new in zip(*map(jax.tree.leaves, (fresh.params, relay.params)), strict=True):
        np.testing.assert_array_equal(old, new)


def test_pure_functions_are_those_of_the_relay(
    relay: rx.Relay, images: dict[str, np.ndarray]
) -> None:
    stage, params = relay.stages[0], relay.params["base"]
    seeds = jnp.arange(2, dtype=jnp.uint32)
    alone = jax.jit(lambda p, s, c: rx.sample(stage, p, s, c))(params, seeds, jnp.arange(2))
    np.testing.assert_allclose(alone, images["base"][:2], atol=2e-5)


def test_a_class_may_be_called_by_its_name(relay: rx.Relay) -> None:
    assert relay.class_names[:2] == ["stripes disc", "stripes square"]
    named = relay.sample([3, 4], classes="stripes square")["base"]
    np.testing.assert_array_equal(named, relay.sample([3, 4], classes=1)["base"])
    mixed = relay.sample([3, 4], classes=["stripes square", 0])["base"]
    np.testing.assert_array_equal(mixed, relay.sample([3, 4], classes=[1, 0])["base"])
    with pytest.raises(UserError, match="such as stripes disc"):
        relay.sample([3], classes="striped disc")

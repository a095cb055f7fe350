"""A relay that continues the noisy state of the first stage: whole chains, records, refusals."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import relay_jax as rx
from relay_jax.config import build, settings_of
from relay_jax.configs import default
from relay_jax.diffusion.sampler import Heun
from relay_jax.errors import UserError
from relay_jax.planning.cost import sampler_calls
from relay_jax.sampling.chain import Chain, Inputs, sample_stage
from relay_jax.sampling.pixels import to_uint8
from relay_jax.sampling.record import describe_sampling, first_difference
from relay_jax.sampling.request import OWN, of_one_stage, parse_request
from relay_jax.stage import Stage, handed_sigma, joined
from tests.conftest import command_line, mesh_of, run_main, tiny_relay
from tests.sampling.test_chain import random_params

SEEDS = np.array([3, 4, 5, 6, 9, 1_000_003])


def from_noise(**relay: object) -> ConfigDict:
    """The tiny relay with few steps and the hand-off of noise."""
    config = tiny_relay()
    config.stages.base.sample.update(kind="multistep", num_steps=5, corrector=True)
    config.stages.relay.sample.update(
        kind="multistep",
        num_steps=4,
        sigma_min=0.01,
        rho=7.0,
        handoff_sigma=0.8,
        corrector=True,
        exact_first_blur=True,
        fresh_noise_rate=0.4,
        handoff="noise",
    )
    config.stages.relay.sample.update(relay)
    return config


def params_of(stages: list[Stage]) -> dict[str, dict]:
    return {stage.name: random_params(stage, stage.index) for stage in stages}


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return build(from_noise())


@pytest.fixture(scope="module")
def images(stages: list[Stage]) -> dict[str, np.ndarray]:
    return Chain(stages, params_of(stages), mesh_of(1), 4).images(SEEDS, SEEDS % 8)


def test_the_relay_continues_the_state_and_its_picture_is_what_the_network_makes_of_it(
    stages: list[Stage], images: dict[str, np.ndarray]
) -> None:
    base, relay = joined(stages)
    assert base.sampler.levels()[-1] == handed_sigma(relay) == pytest.approx(0.4)
    params, seeds, classes = params_of(stages), jnp.asarray(SEEDS, jnp.uint32), SEEDS % 8
    state = sample_stage(base, params["base"], seeds, classes).final
    picture = base.denoiser(params["base"], jnp.asarray(classes))(state, jnp.float32(0.4))
    final = sample_stage(relay, params["relay"], seeds, classes, state).final
    np.testing.assert_allclose(images["base"], picture, atol=2e-5)
    np.testing.assert_allclose(images["relay"], final, atol=2e-5)
    assert np.abs(state - picture).max() > 0.5, "the state is noisy"


def test_an_image_depends_on_its_seed_and_setting_and_not_on_the_batch(
    stages: list[Stage], images: dict[str, np.ndarray]
) -> None:
    chain = Chain(stages, params_of(stages), mesh_of(1), 4)
    order = np.array([4, 0, 5, 2, 4])
    again = chain.images(SEEDS[order], SEEDS[order] % 8)
    for name in images:
        np.testing.assert_array_equal(again[name], images[name][order])
    other = Chain(stages, params_of(stages), mesh_of(8), 8).images(SEEDS, SEEDS % 8)
    np.testing.assert_allclose(other["relay"], images["relay"], atol=2e-5)
    expected = dict(zip(SEEDS.tolist(), to_uint8(images["relay"]), strict=True))
    chain.compile()
    for part in chain.stream(SEEDS, lambda seeds: Inputs((seeds % 8).astype(np.int32), None)):
        for seed, pixels in zip(part.seeds.tolist(), part.pixels, strict=True):
            np.testing.assert_array_equal(pixels, expected[seed])


@dataclass(frozen=True, kw_only=True)
class Joined(Heun):
    """Heun on the levels of two stages, one after the other."""

    sigmas: tuple[float, ...] = (1.0, 0.0)

    def levels(self) -> np.ndarray:
        return np.asarray(self.sigmas)


def test_without_blur_two_stages_of_one_network_are_one_uninterrupted_run() -> None:
    config = tiny_relay()
    second = default.relay_stage(8, patch=1)
    second.model.update(config.stages.base.model)
    second.process.block_noise_scale = 0.0
    second.sample.update(
        num_steps=6, sigma_max=0.5, rho=7.0, handoff_sigma=0.6, fresh_noise=0.0, handoff="noise"
    )
    config.stages.relay = second
    config.stages.base.sample.num_steps = 5
    stages = build(config)
    params = random_params(stages[0])
    chain = Chain(stages, {"base": params, "relay": params}, mesh_of(1), 4)
    base, relay = chain.stages
    levels = (*base.sampler.levels(), *relay.sampler.levels()[1:])
    assert len(levels) == 12 and levels[5] == pytest.approx(0.5)
    whole = replace(stages[0], sampler=Joined(num_steps=11, sigmas=levels))
    expected = Chain([whole], {"base": params}, mesh_of(1), 4).images(SEEDS, SEEDS % 8)
    got = chain.images(SEEDS, SEEDS % 8)
    np.testing.assert_allclose(got["relay"], expected["base"], atol=2e-5)


def test_the_first_stage_makes_its_calls_above_the_handoff_alone(stages: list[Stage]) -> None:
    base, relay = joined(stages)
    assert [sampler_calls(stage)[0] for stage in (base, relay)] == [5, 4]
    assert base.sampler.call_sigmas().min() > 0.4 > stages[0].sampler.call_sigmas().min()
    assert joined([base, relay]) == [base, relay]


def test_the_record_tells_the_handoffs_apart(stages: list[Stage]) -> None:
    record = describe_sampling(stages, {}, [0], "mod")
    assert record["stages"]["relay"]["handoff"] == "noise"
    assert record["stages"]["base"]["sampler"]["stop_sigma"] == pytest.approx(0.4)
    other = describe_sampling(build(from_noise(handoff="image")), {}, [0], "mod")
    assert "stop_sigma is 0.4 in" in str(first_difference(record, other))
    # A record of before the hand-off could be chosen.
    for stage in other["stages"].values():
        stage.pop("handoff", None)
        stage["sampler"].pop("stop_sigma", None)
    now = describe_sampling(build(from_noise(handoff="image")), {}, [0], "mod")
    assert "stop_sigma" in str(first_difference(other, record))
    now["stages"]["relay"]["sampler"].pop("stop_sigma")
    assert first_difference(other, now) is None


def test_a_stage_by_itself_continues_images_in_previews_and_is_refused_elsewhere(
    stages: list[Stage], tmp_path: Path
) -> None:
    alone = of_one_stage(stages[1], 3)
    assert alone.class_rule == OWN and alone.stages[0].handoff == "image"
    settings = settings_of(from_noise())
    for low_res in (None, tmp_path):
        with pytest.raises(UserError, match=r"relay: .* a state of the stage before"):
            parse_request(settings, settings.stages[1], seeds="0-3", low_res=low_res)
    assert (
        parse_request(settings, settings.stages[0], seeds="0-3").stages[0].sampler.levels()[-1] == 0
    )
    with pytest.raises(UserError, match="sample the whole relay"):
        Chain([stages[1]], {}, mesh_of(1), 4)
    with pytest.raises(UserError, match="sample the whole relay"):
        rx.sample(stages[1], {}, jnp.zeros(1, jnp.uint32), None, jnp.zeros((1, 8, 8, 3)))


def test_what_cannot_hand_over_a_state_is_refused_in_one_line() -> None:
    config = from_noise()
    config.stages.base.sample.kind = "examples.new_sampler:Euler"
    with pytest.raises(
        UserError, match=r"the sampler examples\.new_sampler:Euler of stage base cannot"
    ):
        build(config)
    with pytest.raises(UserError, match="must be 'image' or 'noise', not 'pixels'"):
        build(from_noise(handoff="pixels"))
    config = from_noise()
    config.stages.base.sample.sigma_max = 0.3
    with pytest.raises(UserError, match="'noise' stops stage base: need 0 < sigma_min < sigma_max"):
        build(config)
    config = from_noise(handoff="image")
    config.stages.last = default.relay_stage(32, patch=2)
    config.stages.last.model.update(config.stages.relay.model)
    config.stages.last.sample.handoff = "noise"
    with pytest.raises(UserError, match=r"stage last: .* and relay is a relay itself"):
        build(config)
    first = build(tiny_relay())[0]
    with pytest.raises(ValueError, match="'noise' is for a relay stage"):
        replace(first, handoff="noise").check()


def test_a_run_is_sampled_and_continued_from_noise(tiny_run: Path, tmp_path: Path) -> None:
    out, noise = tmp_path / "images", "--config.stages.relay.sample.handoff=noise"
    for seeds in ("0-2", "0-5"):
        with command_line(
            f"--workdir={tiny_run}", "--mode=sample", f"--seeds={seeds}", f"--out={out}", noise
        ):
            run_main()
    record = json.loads((out / "samples.json").read_text())
    assert record["stages"]["relay"]["handoff"] == "noise" and record["seeds"] == "0-5"
    relay = rx.load(tiny_run).replace("relay", handoff="noise")
    expected = to_uint8(relay.sample(range(6))["relay"])
    for seed, pixels in enumerate(expected):
        written = np.asarray(Image.open(next(out.rglob(f"*{seed:06d}.png"))))
        assert np.abs(written.astype(int) - pixels).max() <= 1
    with (
        command_line(f"--workdir={tiny_run}", "--mode=sample", "--seeds=0-5", f"--out={out}"),
        pytest.raises(UserError, match=r"holds other images: .*stop_sigma"),
    ):
        run_main()

"""Batches with fixed rows, the stages chained on the devices, bytes out; precision and guidance
of whole chains."""

import re

import jax
import numpy as np
import pytest
from absl import flags

from relay_jax.config import ConfigError, build
from relay_jax.sampling.chain import StageSampler, generate, sample_stage
from relay_jax.sampling.pixels import to_uint8
from relay_jax.sampling.record import describe_stage
from relay_jax.sampling.stream import Bytes, Inputs, arrange, compile_all, stream
from tests.conftest import command_line, mesh_of, tiny_relay
from tests.sampling.test_chain import random_params

Relay = list[tuple[StageSampler, dict]]
SEEDS = np.array([3, 4, 5, 6, 7, 8, 9, 1_000_003, 4_294_967_295])


def relay_of(batch: int = 4, devices: int = 1, **model: object) -> Relay:
    config = tiny_relay()
    for stage in config.stages.values():
        stage.model.update(model)
    return [
        (StageSampler(stage, mesh_of(devices), batch), random_params(stage, i))
        for i, stage in enumerate(build(config))
    ]


def inputs(seeds: np.ndarray) -> Inputs:
    return Inputs((seeds % 8).astype(np.int32), None)


def drawn(relay: Relay, seeds: np.ndarray | list[int]) -> dict[int, np.ndarray]:
    return {
        seed: pixels
        for part in stream(relay, arrange(seeds, relay[0][0].batch), inputs)
        for seed, pixels in zip(part.seeds.tolist(), part.pixels, strict=True)
    }


@pytest.fixture(scope="module")
def relay() -> Relay:
    made = relay_of()
    compile_all([sampler for sampler, _ in made])
    return made


@pytest.fixture(scope="module")
def images(relay: Relay) -> dict[int, np.ndarray]:
    return drawn(relay, SEEDS)


# Batches


@pytest.mark.parametrize(
    "seeds", [range(10_000, 10_130), [5], [3, 1, 2], [0, 64, 128, 1], [2**32 - 1, 0], []]
)
def test_each_seed_is_once_in_its_row_of_as_few_batches_as_can_be(seeds: range | list[int]) -> None:
    batches = arrange(seeds, 64)
    assert sorted(seed for part in batches for seed in part.tolist()) == sorted(seeds)
    rows = np.bincount(np.asarray(seeds, int) % 64, minlength=1)
    assert len(batches) == (rows.max() if len(seeds) else 0)
    assert all(len(set((part % 64).tolist())) == len(part) for part in batches)


def test_a_range_fills_its_batches_wherever_it_begins_and_comes_in_order() -> None:
    batches = arrange(range(10_007, 10_207), 64)
    assert [len(part) for part in batches] == [64, 64, 64, 8]
    assert np.concatenate(batches).tolist() == list(range(10_007, 10_207))


# Images


def test_the_stream_is_the_chain_of_stages_as_bytes(
    relay: Relay, images: dict[int, np.ndarray]
) -> None:
    one = [(StageSampler(s.stage, s.mesh, 4), p) for s, p in relay]
    expected = to_uint8(generate(one, SEEDS, SEEDS % 8)["relay"]).astype(int)
    got = np.stack([images[seed] for seed in SEEDS.tolist()])
    assert got.dtype == np.uint8 and got.shape == (9, 16, 16, 3) and got.std() > 10
    assert np.abs(got - expected).max() <= 1


def test_an_image_has_the_same_bits_whatever_else_is_asked_for(
    relay: Relay, images: dict[int, np.ndarray]
) -> None:
    for seeds in ([7], [9, 4], [4_294_967_295, 3, 11, 12, 13]):
        some = drawn(relay, seeds)
        assert some.keys() == set(seeds)
        for seed in some.keys() & images.keys():
            np.testing.assert_array_equal(some[seed], images[seed])


def test_more_devices_and_another_batch_move_a_level_at_most(images: dict[int, np.ndarray]) -> None:
    other = drawn(relay_of(batch=8, devices=8), SEEDS)
    assert max(np.abs(other[seed].astype(int) - images[seed]).max() for seed in images) <= 1


def test_the_next_batch_is_begun_before_one_is_handed_over(relay: Relay) -> None:
    asked: list[int] = []

    def watched(seeds: np.ndarray) -> Inputs:
        asked.append(len(asked))
        return inputs(seeds)

    parts = stream(relay, arrange(range(12), 4), watched)
    first: Bytes = next(parts)
    assert first.seeds.tolist() == [0, 1, 2, 3] and first.classes.tolist() == [0, 1, 2, 3]
    assert asked == [0, 1]
    assert len(list(parts)) == 2


def test_a_relay_alone_starts_from_the_given_images_of_its_seeds(relay: Relay) -> None:
    sampler, params = relay[1]
    low = np.random.default_rng(0).uniform(-1, 1, (10, 8, 8, 3)).astype(np.float32)
    seeds = np.array([9, 2, 5])

    def given(part: np.ndarray) -> Inputs:
        return Inputs(np.zeros(len(part), int), low[part])

    got = next(stream([(sampler, params)], arrange(seeds, 4), given))
    expected = to_uint8(sampler(params, seeds, np.zeros(3, int), low[seeds])).astype(int)
    order = np.argsort(seeds)[np.searchsorted(np.sort(seeds), got.seeds)]
    assert np.abs(got.pixels - expected[order]).max() <= 1


def test_images_that_are_no_numbers_are_refused_with_their_seed(relay: Relay) -> None:
    sampler, params = relay[0]
    broken = {**params, "out_conv": {**params["out_conv"], "bias": np.full(3, np.nan, np.float32)}}
    with pytest.raises(ConfigError, match="seed 6 is not finite"):
        list(stream([(sampler, broken)], arrange([6, 7], 4), inputs))


def test_a_sampler_never_goes_back_to_the_host(relay: Relay) -> None:
    for sampler, _ in relay:
        program = sampler._run.as_text()  # type: ignore[attr-defined]     # compiled by the fixture
        assert "while" in program
        assert not re.search(r"infeed|outfeed|callback|\bsend\b|\brecv\b", program)


# Precision, guidance


def test_a_bfloat16_network_changes_half_a_level_on_the_mean(images: dict[int, np.ndarray]) -> None:
    """The state between the calls stays float32; 1/255 of the range [-1, 1] is half a level."""
    half = drawn(relay_of(dtype="bfloat16"), SEEDS)
    difference = np.mean([np.abs(half[seed].astype(int) - images[seed]).mean() for seed in images])
    assert 0 < difference < 0.5


def test_guidance_of_each_stage_is_set_on_the_command_line_and_noted() -> None:
    with command_line(
        "--config=configs/demo.py:smoke",
        "--config.stages.base.sample.guidance=2.0",
        "--config.stages.base.train.label_dropout=0.1",
        "--config.stages.relay.train.label_dropout=0.1",
        "--config.stages.relay.sample.guidance=3.5",
        "--config.stages.relay.sample.guidance_interval=(0.1, 0.8)",
    ):
        base, relay = build(flags.FLAGS["config"].value)
    assert describe_stage(base)["guidance"] == {"weight": 2.0, "interval": (0.0, float("inf"))}
    assert describe_stage(relay)["guidance"] == {"weight": 3.5, "interval": (0.1, 0.8)}


def test_guidance_doubles_the_batch_of_one_call_and_stays_in_its_stage(
    images: dict[int, np.ndarray],
) -> None:
    config = tiny_relay()
    for stage in config.stages.values():
        stage.train.label_dropout = 0.1
    config.stages.relay.sample.guidance = 3.0
    stages = build(config)
    guided = [
        (StageSampler(stage, mesh_of(1), 4), random_params(stage, i))
        for i, stage in enumerate(stages)
    ]
    got, plain = drawn(guided, SEEDS), drawn(guided[:1], SEEDS)
    assert not any(np.array_equal(got[seed], images[seed]) for seed in images)
    base = drawn([(StageSampler(s.stage, s.mesh, 4), p) for s, p in relay_of()[:1]], SEEDS)
    assert all(np.array_equal(plain[seed], base[seed]) for seed in base)
    sampler, params = guided[1]
    text = str(
        jax.make_jaxpr(lambda *x: sample_stage(sampler.stage, params, *x))(
            np.arange(4, dtype=np.uint32), np.zeros(4, np.int32), np.zeros((4, 8, 8, 3), np.float32)
        )
    )
    convolutions = re.findall(r"f32\[(\d+),16,16,\d+\] = conv_general_dilated", text)
    assert convolutions and set(convolutions) == {"8"}, "both branches run in one batch"

"""The one chain: image i depends on seed i alone, rows are fixed, stages hand over floats."""

import jax
import numpy as np
import pytest
from absl import flags

from relay_jax.config import build
from relay_jax.configs import default
from relay_jax.diffusion.process import upsample
from relay_jax.errors import UserError
from relay_jax.sampling.chain import Chain, Inputs, Pixels, arrange, initial_state, sample_stage
from relay_jax.sampling.pixels import to_uint8
from relay_jax.stage import Stage
from tests.conftest import command_line, mesh_of, tiny_relay

SEEDS = np.array([3, 4, 5, 6, 7, 8, 9, 1_000_003, 4_294_967_295])


def random_params(stage: Stage, seed: int = 0) -> dict:
    """Parameters without the zeros of the initialisation, so that the network says something."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: (0.2 * rng.standard_normal(leaf.shape)).astype(np.float32), stage.shapes()
    )


def chain_of(batch: int = 4, devices: int = 1, only: int | None = None, **model: object) -> Chain:
    config = tiny_relay()
    for node in config.stages.values():
        node.model.update(model)
    stages = build(config)
    params = {stage.name: random_params(stage, stage.index) for stage in stages}
    chosen = stages if only is None else stages[only : only + 1]
    return Chain(chosen, params, mesh_of(devices), batch)


def inputs(seeds: np.ndarray) -> Inputs:
    return Inputs((seeds % 8).astype(np.int32), None)


def streamed(chain: Chain, seeds: np.ndarray | list[int]) -> dict[int, np.ndarray]:
    return {
        seed: pixels
        for part in chain.stream(seeds, inputs)
        for seed, pixels in zip(part.seeds.tolist(), part.pixels, strict=True)
    }


@pytest.fixture(scope="module")
def chain() -> Chain:
    compiled = chain_of()
    compiled.compile()
    return compiled


@pytest.fixture(scope="module")
def images(chain: Chain) -> dict[str, np.ndarray]:
    return chain.images(SEEDS, SEEDS % 8)


@pytest.fixture(scope="module")
def pixels(chain: Chain) -> dict[int, np.ndarray]:
    return streamed(chain, SEEDS)


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


def test_every_stage_gives_images_of_its_resolution(images: dict[str, np.ndarray]) -> None:
    assert {name: x.shape for name, x in images.items()} == {
        "base": (9, 8, 8, 3),
        "relay": (9, 16, 16, 3),
    }
    assert all(np.isfinite(x).all() and x.std() > 0.01 for x in images.values())
    assert np.abs(images["base"][0] - images["base"][1]).max() > 0.1, "seeds share an image"


def test_files_and_notebook_get_the_same_bits(
    images: dict[str, np.ndarray], pixels: dict[int, np.ndarray]
) -> None:
    expected = to_uint8(images["relay"])
    assert expected.std() > 10
    for row, seed in enumerate(SEEDS.tolist()):
        np.testing.assert_array_equal(pixels[seed], expected[row])


def test_an_image_has_the_same_bits_whatever_else_is_asked_for(
    chain: Chain, images: dict[str, np.ndarray], pixels: dict[int, np.ndarray]
) -> None:
    order = np.array([4, 0, 5, 2, 4])  # one of them twice
    again = chain.images(SEEDS[order], SEEDS[order] % 8)
    for name in images:
        np.testing.assert_array_equal(again[name], images[name][order])
    for seeds in ([7], [9, 4], [4_294_967_295, 3, 11, 12, 13]):
        some = streamed(chain, seeds)
        assert some.keys() == set(seeds)
        for seed in some.keys() & pixels.keys():
            np.testing.assert_array_equal(some[seed], pixels[seed])


@pytest.mark.parametrize(("batch", "devices"), [(3, 1), (8, 8)])
def test_another_batch_or_more_devices_leave_an_image_as_it_is(
    images: dict[str, np.ndarray], batch: int, devices: int
) -> None:
    other = chain_of(batch=batch, devices=devices).images(SEEDS, SEEDS % 8)
    for name in images:
        np.testing.assert_allclose(other[name], images[name], atol=2e-5)


def test_the_next_batch_is_begun_before_one_is_handed_over(chain: Chain) -> None:
    begun: list[int] = []

    def watched(seeds: np.ndarray) -> Inputs:
        begun.append(len(begun))
        return inputs(seeds)

    parts = chain.stream(range(12), watched)
    first: Pixels = next(parts)
    assert first.seeds.tolist() == [0, 1, 2, 3] and first.classes.tolist() == [0, 1, 2, 3]
    assert begun == [0, 1]
    assert len(list(parts)) == 2


def test_a_relay_alone_starts_from_the_low_resolution_images_of_its_seeds(
    images: dict[str, np.ndarray],
) -> None:
    alone = chain_of(only=1)
    continued = alone.images(SEEDS, SEEDS % 8, images["base"])
    np.testing.assert_allclose(continued["relay"], images["relay"], atol=2e-5)
    part = next(alone.stream(SEEDS[:4], lambda s: Inputs(s % 8, images["base"][s - 3])))
    assert np.abs(part.pixels.astype(int) - to_uint8(images["relay"][:4])).max() <= 1


def test_images_that_are_no_numbers_are_refused_with_their_seed(chain: Chain) -> None:
    base = chain.params["base"]
    broken = {**base, "out_conv": {**base["out_conv"], "bias": np.full(3, np.nan, np.float32)}}
    with pytest.raises(UserError, match="seed 6 is not finite"):
        list(chain.with_params({**chain.params, "base": broken}).stream([6, 7], inputs))


def test_three_stages_make_one_relay() -> None:
    config = tiny_relay()
    third = default.relay_stage(32, patch=2)
    third.model.update(channels=8, head_width=8, multipliers=(1,), blocks=1, attention=())
    third.sample.num_steps = 8
    config.stages.last = third
    stages = build(config)
    chain = Chain(stages, {s.name: random_params(s) for s in stages}, mesh_of(1), 2)
    out = chain.images(SEEDS[:2], SEEDS[:2] % 8)
    assert {name: x.shape[1] for name, x in out.items()} == {"base": 8, "relay": 16, "last": 32}


# The hand-off


def test_the_handoff_is_the_upsampled_image_and_noise_of_the_first_level() -> None:
    stage = build(tiny_relay())[1]
    low = np.random.default_rng(0).uniform(-1, 1, (64, 8, 8, 3)).astype(np.float32)
    noise = np.asarray(initial_state(stage, np.arange(64), np.zeros_like(low)))
    scale = stage.sampler.levels()[0] * np.sqrt(1 + stage.process.block_noise_scale**2)
    np.testing.assert_allclose(noise.std(), scale, rtol=0.02)
    assert np.abs(np.corrcoef(noise.reshape(64, -1)) - np.eye(64)).max() < 0.25, "seeds share noise"
    start = np.asarray(initial_state(stage, np.arange(64), low))
    np.testing.assert_allclose(start - noise, upsample(low, 2), atol=1e-6)


@pytest.mark.parametrize(
    "argument, shapes",
    [
        ("seeds must be", ((2, 2), (2, 2), (2, 8, 8, 3))),
        ("classes must be", ((2,), (3,), (2, 8, 8, 3))),
        ("low_res must be", ((2,), (2,), (2, 4, 4, 3))),
        ("low_res must be", ((2,), (2,), (3, 8, 8, 3))),
    ],
)
def test_other_shapes_are_refused_by_the_name_of_the_argument(
    argument: str, shapes: tuple[tuple[int, ...], ...]
) -> None:
    stage = build(tiny_relay())[1]
    seeds, classes, low_res = (np.zeros(shape, np.int32) for shape in shapes)
    with pytest.raises(AssertionError, match=argument):
        sample_stage(stage, {}, seeds, classes, low_res.astype(np.float32))


# Precision, guidance


def test_a_bfloat16_network_changes_half_a_level_on_the_mean(pixels: dict[int, np.ndarray]) -> None:
    """The state between the calls stays float32; 1/255 of the range [-1, 1] is half a level."""
    half = streamed(chain_of(dtype="bfloat16"), SEEDS)
    difference = np.mean([np.abs(half[seed].astype(int) - pixels[seed]).mean() for seed in pixels])
    assert 0 < difference < 0.5


def test_guidance_of_each_stage_is_set_on_the_command_line_and_noted() -> None:
    with command_line(
        "--config=demo:smoke",
        "--config.stages.base.sample.guidance=2.0",
        "--config.stages.base.train.label_dropout=0.1",
        "--config.stages.relay.train.label_dropout=0.1",
        "--config.stages.relay.sample.guidance=3.5",
        "--config.stages.relay.sample.guidance_interval=(0.1, 0.8)",
    ):
        base, relay = build(flags.FLAGS["config"].value)
    assert base.describe()["guidance"] == {"weight": 2.0, "interval": (0.0, float("inf"))}
    assert relay.describe()["guidance"] == {"weight": 3.5, "interval": (0.1, 0.8)}


def test_guidance_stays_in_its_stage(
    images: dict[str, np.ndarray],
) -> None:
    config = tiny_relay()
    for node in config.stages.values():
        node.train.label_dropout = 0.1
    config.stages.relay.sample.guidance = 3.0
    stages = build(config)
    params = {stage.name: random_params(stage, stage.index) for stage in stages}
    guided = Chain(stages, params, mesh_of(1), 4).images(SEEDS, SEEDS % 8)
    np.testing.assert_array_equal(guided["base"], images["base"])
    assert np.abs(guided["relay"] - images["relay"]).max((1, 2, 3)).min() > 1e-3

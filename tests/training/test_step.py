"""Training step: what moves, steps that are not finite, average, devices, precision, learning."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh
from ml_collections import ConfigDict

from relay_jax import stage as stage_module
from relay_jax.config import build
from relay_jax.diffusion.process import EdmProcess
from relay_jax.runtime import sharding
from relay_jax.stage import Stage
from relay_jax.training.state import TrainState, make_optimizer
from relay_jax.training.step import batch_loss, ema_decay, make_train_step, update_ema
from tests.test_stage import BATCH, KEY, LINEAR, LINEAR_PARAMS, STAGE, TRAIN, batch_of

OPTIMIZER = make_optimizer(TRAIN)
# Relative, of the gradient its norm; measured 0.0004 and 0.004.
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 0.002, 0.02
decay_of = jax.jit(ema_decay, static_argnums=(1, 2, 3))


def state_of(params: dict) -> TrainState:
    params, zero = jax.tree.map(jnp.asarray, params), jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        ema=jax.tree.map(jnp.zeros_like, params),
        opt_state=OPTIMIZER.init(params),
        nonfinite_row=zero,
        nonfinite_total=zero,
    )


@pytest.fixture(scope="module")
def fresh() -> TrainState:
    rng = np.random.default_rng(1)
    shapes = STAGE.shapes()
    return state_of(
        jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    )


@pytest.fixture(scope="module")
def train_step() -> Callable:
    return jax.jit(make_train_step(STAGE))


@pytest.fixture(scope="module")
def linear_step() -> Callable:
    return jax.jit(make_train_step(LINEAR))


# One step


def test_a_step_reports_its_metrics_and_moves_everything_it_should(
    fresh: TrainState, train_step: Callable
) -> None:
    first, metrics = train_step(fresh, batch_of(), KEY)
    assert set(metrics) == {"loss", "gradient_norm", "finite"}
    assert all(value.shape == () and value.dtype == jnp.float32 for value in metrics.values())
    assert metrics["finite"] == 1 and metrics["loss"] > 0 and metrics["gradient_norm"] > 0
    chex.assert_trees_all_equal(
        first.params, fresh.params
    )  # learning rate 0: only the moments move
    chex.assert_trees_all_equal(first.ema, fresh.params)  # decay 0: copied
    second, _ = train_step(first, batch_of(), KEY)
    assert (first.step, second.step) == (1, 2)
    moved = [
        np.any(a != b)
        for a, b in zip(jax.tree.leaves(second.params), jax.tree.leaves(first.params), strict=True)
    ]
    assert all(moved)
    decay = 0.5 ** (BATCH / (0.05 * BATCH))
    want = jax.tree.map(lambda old, new: decay * old + (1 - decay) * new, first.ema, second.params)
    chex.assert_trees_all_close(second.ema, want, rtol=1e-5, atol=1e-7)
    assert (second.nonfinite_row, second.nonfinite_total) == (0, 0)


def test_the_randomness_of_a_step_comes_from_the_key_and_the_step_number_alone(
    linear_step: Callable,
) -> None:
    state = state_of(LINEAR_PARAMS)

    def loss(state: TrainState, key: jax.Array) -> float:
        return float(linear_step(state, batch_of(), key)[1]["loss"])

    later = state._replace(step=state.step + 1)
    assert loss(state, KEY) == loss(state, KEY)
    assert len({loss(state, KEY), loss(later, KEY), loss(state, jax.random.key(6))}) == 3


def test_the_metrics_are_those_of_the_gradient(linear_step: Callable) -> None:
    state, batch = state_of(LINEAR_PARAMS), batch_of()
    key = jax.random.fold_in(KEY, state.step)
    value, gradient = jax.jit(jax.value_and_grad(partial(batch_loss, LINEAR)))(
        state.params, batch, jnp.arange(BATCH), key
    )
    norm = math.sqrt(sum(float(np.sum(np.square(leaf))) for leaf in jax.tree.leaves(gradient)))
    _, metrics = linear_step(state, batch, KEY)
    np.testing.assert_allclose(
        [metrics["loss"], metrics["gradient_norm"]], [value, norm], rtol=1e-5
    )


@pytest.mark.parametrize("parts", [2, 8])
def test_a_batch_in_parts_is_the_same_step(parts: int, linear_step: Callable) -> None:
    """Noise, augmentation and dropped labels belong to the image's place in the batch, not to
    the part."""
    settings = replace(TRAIN, augment=0.5, accumulate=parts)
    in_parts = jax.jit(make_train_step(replace(LINEAR, train=settings)))
    whole = jax.jit(make_train_step(replace(LINEAR, train=replace(settings, accumulate=1))))
    (state, metrics), (want, numbers) = (
        step(state_of(LINEAR_PARAMS), batch_of(), KEY) for step in (in_parts, whole)
    )
    chex.assert_trees_all_close(metrics, numbers, rtol=2e-5)
    chex.assert_trees_all_close(state.opt_state, want.opt_state, rtol=2e-4, atol=1e-6)


# Clipping


def test_a_long_gradient_is_clipped_to_the_limit_and_a_short_one_keeps_its_bits(
    linear_step: Callable,
) -> None:
    """Against Adam by hand: its first moment is a tenth of the gradient that it was given."""
    state = state_of(LINEAR_PARAMS)
    plain, metrics = linear_step(state, batch_of(), KEY)
    norm = float(metrics["gradient_norm"])
    for limit, clipped in ((0.5 * norm, 1), (2 * norm, 0)):
        stage = replace(LINEAR, train=replace(TRAIN, clip=limit))
        after, numbers = jax.jit(make_train_step(stage))(state, batch_of(), KEY)
        assert numbers["clipped"] == clipped
        np.testing.assert_allclose(numbers["gradient_norm"], norm, rtol=1e-6)
        want = jax.tree.map(lambda m, c=clipped: m * (0.5 if c else 1), plain.opt_state[0].mu)
        chex.assert_trees_all_close(after.opt_state[0].mu, want, rtol=0 if not clipped else 1e-5)


# Steps that are not finite


@pytest.mark.parametrize("poison", [math.nan, math.inf, 1e30])
def test_steps_that_are_not_finite_change_nothing_and_are_counted(
    poison: float, linear_step: Callable
) -> None:
    good = linear_step(state_of(LINEAR_PARAMS), batch_of(), KEY)[0]
    bad = good._replace(params={**good.params, "scale": jnp.float32(poison)})
    for count in (1, 2):
        before, (bad, metrics) = bad, linear_step(bad, batch_of(), KEY)
        assert metrics["finite"] == 0
        assert (bad.step, bad.nonfinite_row, bad.nonfinite_total) == (1 + count, count, count)
        for old, new in zip(
            *(jax.tree.leaves((s.params, s.ema, s.opt_state)) for s in (before, bad)), strict=True
        ):
            assert np.asarray(old).tobytes() == np.asarray(new).tobytes()
    mended, metrics = linear_step(bad._replace(params=good.params), batch_of(), KEY)
    assert metrics["finite"] == 1
    assert (mended.step, mended.nonfinite_row, mended.nonfinite_total) == (4, 0, 2)
    assert np.any(mended.params["classes"] != good.params["classes"])
    again, _ = linear_step(mended._replace(params=bad.params), batch_of(), KEY)
    assert (again.step, again.nonfinite_row, again.nonfinite_total) == (5, 1, 3)


def test_a_gradient_that_is_not_finite_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    def root_of_zero(
        process: EdmProcess, denoise: Callable, images: jax.Array, key: jax.Array, *_: object
    ) -> jax.Array:
        return jnp.sqrt(0 * jnp.square(denoise(images, jnp.ones(len(images)))).mean(axis=(1, 2, 3)))

    monkeypatch.setattr(stage_module, "loss", root_of_zero)
    state = state_of(LINEAR_PARAMS)
    after, metrics = jax.jit(make_train_step(LINEAR))(state, batch_of(), KEY)
    assert metrics["loss"] == 0 and metrics["finite"] == 0 and after.nonfinite_row == 1
    chex.assert_trees_all_equal((after.params, after.opt_state), (state.params, state.opt_state))


# Devices and learning


@pytest.mark.parametrize(
    "stage, fsdp",
    [(LINEAR, 1), (STAGE, 4), (replace(LINEAR, train=replace(TRAIN, accumulate=2)), 2)],
    ids=["data", "data and fsdp", "in parts"],
)
def test_a_step_on_eight_devices_is_that_of_one(
    stage: Stage, fsdp: int, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> None:
    if jax.device_count() < 8:
        pytest.skip("needs 8 devices")
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    is_linear = stage.network is LINEAR.network
    state = state_of(LINEAR_PARAMS) if is_linear else request.getfixturevalue("fresh")
    one = request.getfixturevalue("linear_step" if is_linear else "train_step")
    mesh: Mesh = jax.make_mesh(
        (8 // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=jax.devices()[:8],
    )
    shardings, replicated = sharding.state_shardings(state, mesh), sharding.replicated(mesh)
    many = jax.jit(
        make_train_step(stage, mesh),
        out_shardings=(shardings, replicated),
        in_shardings=(shardings, sharding.batch_sharding(mesh), replicated),
    )
    state_many = jax.device_put(state, shardings)
    many = many.lower(state_many, sharding.to_devices(batch_of(), mesh), KEY).compile()
    text, weights = many.as_text(), len(jax.tree.leaves(state.params))
    assert "all-to-all" not in text and text.count(" all-gather(") <= weights, (
        "more than the weights is exchanged"
    )
    for seed in range(3):
        state, metrics = one(state, batch_of(seed=seed), KEY)
        state_many, metrics_many = many(
            state_many, sharding.to_devices(batch_of(seed=seed), mesh), KEY
        )
        jax.block_until_ready(metrics_many)
        chex.assert_trees_all_close(
            jax.device_get(metrics_many), jax.device_get(metrics), rtol=1e-4
        )
    split = [leaf for leaf in jax.tree.leaves(state_many) if not leaf.sharding.is_fully_replicated]
    assert is_linear or split, "nothing was split"
    chex.assert_trees_all_close(
        jax.device_get(state_many), jax.device_get(state), rtol=1e-3, atol=1e-5
    )


def test_a_few_steps_on_one_image_lower_its_loss(fresh: TrainState, train_step: Callable) -> None:
    batch = {**batch_of(), "image": np.full((BATCH, 4, 4, 3), 230, np.uint8)}

    def mean_loss(state: TrainState) -> float:
        return float(
            np.mean(
                [
                    train_step(state._replace(step=jnp.int32(n)), batch, KEY)[1]["loss"]
                    for n in range(8)
                ]
            )
        )

    state = fresh
    for _ in range(100):
        state, _ = train_step(state, batch, KEY)
    assert mean_loss(state) < 0.5 * mean_loss(fresh)


# The average


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


# Precision


def loss_and_gradient(stage: Stage, dtype: str) -> tuple[float, np.ndarray]:
    """With parameters that are zero nowhere, or most of the gradient would be."""
    stage = replace(stage, network=stage.network.clone(dtype=jnp.dtype(dtype), dropout=0.1))
    rng = np.random.default_rng(0)
    shapes = stage.shapes()
    params = jax.tree.map(
        lambda leaf: np.float32(
            rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
            if leaf.ndim > 1
            else 1 + 0.1 * rng.normal(size=leaf.shape)
        ),
        shapes,
    )
    side = stage.resolution
    batch = {
        "image": rng.integers(0, 256, (8, side, side, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32),
    }
    value, gradient = jax.jit(jax.value_and_grad(partial(batch_loss, stage)))(
        params, batch, jnp.arange(8), jax.random.key(1)
    )
    return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("index", [0, 1], ids=["base", "relay"])
def test_bfloat16_agrees_with_float32_on_loss_and_gradient(config: ConfigDict, index: int) -> None:
    stage = build(config)[index]
    (value, gradient), (half_value, half_gradient) = (
        loss_and_gradient(stage, d) for d in ("float32", "bfloat16")
    )
    assert half_value == pytest.approx(value, rel=LOSS_TOLERANCE) and half_value != value
    assert np.linalg.norm(half_gradient - gradient) < GRADIENT_TOLERANCE * np.linalg.norm(gradient)

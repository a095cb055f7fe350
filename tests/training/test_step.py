"""Training step: the loss in closed form, labels, steps that are not finite, devices, and that
it learns."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh

from relay_jax.config import Guidance, Stage, TrainSettings
from relay_jax.data.transforms import to_float
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.diffusion.sampler import EdmSampler, RelaySampler
from relay_jax.models.unet import UNet, init_params
from relay_jax.runtime import sharding
from relay_jax.training import step as step_module
from relay_jax.training.optimizer import make_optimizer
from relay_jax.training.state import TrainState
from relay_jax.training.step import drop_labels, make_loss_fn, make_train_step

BATCH, CLASSES = 16, 4
TRAIN = TrainSettings(
    images=1600,
    batch=BATCH,
    learning_rate=1e-2,
    warmup_images=1,
    adam_beta1=0.9,
    adam_beta2=0.99,
    adam_epsilon=1e-3,
    accumulate=1,
    ema_halflife_images=64.0,
    ema_rampup=0.05,
    label_dropout=0.5,
    augment=0.0,
    max_nonfinite=3,
)
STAGE = Stage(
    name="base",
    index=0,
    resolution=4,
    process=EdmProcess(),
    sample_process=EdmProcess(),
    train=TRAIN,
    network=UNet(
        resolution=4, channels=8, multipliers=(1,), blocks=1, num_classes=CLASSES, dropout=0.1
    ),
    sampler=EdmSampler(num_steps=2),
    guidance=Guidance(weight=1.0, interval=(0.0, math.inf)),
)
OPTIMIZER = make_optimizer(
    learning_rate=1e-2, batch=BATCH, warmup_images=1, beta1=0.9, beta2=0.99, epsilon=1e-3
)
KEY = jax.random.key(5)


@dataclass(frozen=True)
class Linear:
    """A network with two numbers per image channel: scale * x + a number for each class + one
    for each augmentation."""

    num_classes: int = CLASSES
    dtype: jnp.dtype = jnp.float32

    def apply(
        self,
        variables: dict,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None,
        augment_labels: jax.Array | None,
        train: bool,
        rngs: dict,
    ) -> jax.Array:
        p = variables["params"]
        out = p["scale"] * x
        if class_labels is not None:
            out += (class_labels @ p["classes"])[:, None, None, None]
        if augment_labels is not None:
            out += (augment_labels @ p["augment"])[:, None, None, None]
        return out


LINEAR = replace(STAGE, network=Linear())
LINEAR_PARAMS = {
    "scale": np.float32(0.3),
    "classes": np.array([1, -2, 3, 0.5], np.float32),
    "augment": np.ones(9, np.float32),
}


def batch_of(count: int = BATCH, side: int = 4, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "image": rng.integers(0, 256, (count, side, side, 3), np.uint8),
        "label": rng.integers(0, CLASSES, count).astype(np.int32),
    }


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
    shapes = jax.eval_shape(lambda key: init_params(STAGE.network, key), KEY)
    return state_of(
        jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)
    )


@pytest.fixture(scope="module")
def train_step() -> Callable:
    return jax.jit(make_train_step(STAGE, OPTIMIZER))


@pytest.fixture(scope="module")
def linear_step() -> Callable:
    return jax.jit(make_train_step(LINEAR, OPTIMIZER))


# Loss


def test_pixels_map_to_minus_one_and_one() -> None:
    got = to_float(jnp.array([0, 51, 102, 255], jnp.uint8))
    assert got.dtype == jnp.float32
    np.testing.assert_allclose(got, [-1, -0.6, -0.2, 1], atol=1e-7)


def test_a_network_that_answers_zero_has_the_loss_of_its_skip_connection() -> None:
    """Grey images x0 = 0: the error is c_skip sigma g, its weighted square sd^2 / (sigma^2 +
    sd^2) on average."""
    normal = np.linspace(-8, 8, 4001)
    density = np.exp(-(normal**2) / 2)
    expected = np.sum(0.25 / (np.exp(2 * (-1.2 + 1.2 * normal)) + 0.25) * density) / np.sum(density)
    batch = {"image": np.full((4096, 4, 4, 3), 128, np.uint8), "label": np.zeros(4096, np.int32)}
    zero = jax.tree.map(np.zeros_like, LINEAR_PARAMS)
    got = jax.jit(make_loss_fn(LINEAR))(zero, batch, jnp.arange(4096), KEY)
    assert got.shape == () and got.dtype == jnp.float32
    np.testing.assert_allclose(got, expected, rtol=0.02)


def test_the_loss_is_the_mean_over_images_of_what_they_are_as_floats(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(
        step_module, "loss", lambda process, denoise, images, *_: images.mean(axis=(1, 2, 3))
    )
    batch = batch_of(6)
    got = jax.jit(make_loss_fn(LINEAR))(LINEAR_PARAMS, batch, jnp.arange(6), KEY)
    np.testing.assert_allclose(got, np.mean(batch["image"] / 127.5 - 1), atol=1e-6)


def test_a_relay_stage_is_trained_with_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process = RelayProcess(patch=2)
    relay = replace(
        LINEAR,
        process=process,
        sample_process=replace(process, cdf_max=1.05),
        sampler=RelaySampler(num_steps=20, handoff_sigma=0.9),
    )
    given = []
    monkeypatch.setattr(
        step_module, "loss", lambda process, *_: given.append(process) or jnp.zeros(6)
    )
    jax.eval_shape(make_loss_fn(relay), LINEAR_PARAMS, batch_of(6), jnp.arange(6), KEY)
    assert given == [process]


def test_augmentation_gives_the_network_its_nine_labels() -> None:
    loss_fn = jax.jit(make_loss_fn(replace(LINEAR, train=replace(TRAIN, augment=1.0))))
    losses = {
        float(loss_fn({**LINEAR_PARAMS, "augment": row}, batch_of(8), jnp.arange(8), KEY))
        for row in np.eye(10, 9, dtype="f4")
    }
    assert len(losses) == 10  # each label alone, and none


# Labels


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.7, 1.0])
def test_label_dropout_empties_the_given_share_of_rows_and_leaves_the_others(
    probability: float,
) -> None:
    labels = np.eye(CLASSES, dtype=np.float32)[np.arange(20_000) % CLASSES]
    got = np.asarray(
        jax.jit(drop_labels, static_argnums=1)(labels, probability, KEY, np.arange(len(labels)))
    )
    empty = ~got.any(axis=1)
    np.testing.assert_array_equal(got[~empty], labels[~empty])
    assert abs(empty.mean() - probability) <= 5 * math.sqrt(
        probability * (1 - probability) / len(labels)
    )


def test_labels_matter_unless_all_are_dropped() -> None:
    def losses(dropout: float) -> set[float]:
        loss_fn = jax.jit(
            make_loss_fn(replace(LINEAR, train=replace(TRAIN, label_dropout=dropout)))
        )
        unlabelled = {**LINEAR_PARAMS, "classes": np.zeros(CLASSES, np.float32)}
        batch = batch_of()
        other = {**batch, "label": (batch["label"] + 1) % CLASSES}
        return {
            float(loss_fn(*inputs, jnp.arange(BATCH), KEY))
            for inputs in ((LINEAR_PARAMS, batch), (LINEAR_PARAMS, other), (unlabelled, batch))
        }

    assert len(losses(0.0)) == 3
    assert len(losses(1.0)) == 1


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
    value, gradient = jax.jit(jax.value_and_grad(make_loss_fn(LINEAR)))(
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
    in_parts = jax.jit(make_train_step(replace(LINEAR, train=settings), OPTIMIZER))
    whole = jax.jit(
        make_train_step(replace(LINEAR, train=replace(settings, accumulate=1)), OPTIMIZER)
    )
    (state, metrics), (want, numbers) = (
        step(state_of(LINEAR_PARAMS), batch_of(), KEY) for step in (in_parts, whole)
    )
    chex.assert_trees_all_close(metrics, numbers, rtol=2e-5)
    chex.assert_trees_all_close(state.opt_state, want.opt_state, rtol=2e-4, atol=1e-6)


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

    monkeypatch.setattr(step_module, "loss", root_of_zero)
    state = state_of(LINEAR_PARAMS)
    after, metrics = jax.jit(make_train_step(LINEAR, OPTIMIZER))(state, batch_of(), KEY)
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
        make_train_step(stage, OPTIMIZER, mesh),
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

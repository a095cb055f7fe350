"""Stage: its loss in closed form, labels, augmentation, and what it refuses."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax import stage as stage_module
from relay_jax.diffusion.guidance import Guidance, Guide, Guided
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.diffusion.sampler import Heun
from relay_jax.models.unet import UNet
from relay_jax.stage import Stage, TrainSettings, drop_labels

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
    process=EdmProcess(),
    sample_process=EdmProcess(),
    train=TRAIN,
    network=UNet(
        resolution=4, channels=8, multipliers=(1,), blocks=1, num_classes=CLASSES, dropout=0.1
    ),
    sampler=Heun(num_steps=2),
    guidance=Guidance(),
)
KEY = jax.random.key(5)


@dataclass(frozen=True)
class Linear:
    """A network with two numbers per image channel: scale * x + a number for each class + one
    for each augmentation."""

    resolution: int = 4
    image_channels: int = 3
    num_classes: int = CLASSES
    dtype: jnp.dtype = jnp.float32

    def apply(
        self,
        variables: dict,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
        rngs: dict | None = None,
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


def loss_of(stage: Stage) -> Callable[..., jax.Array]:
    """(params, batch, key) -> training loss of each image."""
    return lambda params, batch, key: stage.loss(
        params, batch["image"], batch["label"], key, train=True
    )


def test_a_network_that_answers_zero_has_the_loss_of_its_skip_connection() -> None:
    """Grey images x0 = 0: the error is c_skip sigma g, its weighted square sd^2 / (sigma^2 +
    sd^2) on average."""
    normal = np.linspace(-8, 8, 4001)
    density = np.exp(-(normal**2) / 2)
    expected = np.sum(0.25 / (np.exp(2 * (-1.2 + 1.2 * normal)) + 0.25) * density) / np.sum(density)
    batch = {"image": np.full((4096, 4, 4, 3), 128, np.uint8), "label": np.zeros(4096, np.int32)}
    zero = jax.tree.map(np.zeros_like, LINEAR_PARAMS)
    got = jax.jit(loss_of(LINEAR))(zero, batch, KEY)
    assert got.shape == (4096,) and got.dtype == jnp.float32
    np.testing.assert_allclose(got.mean(), expected, rtol=0.02)


def test_bytes_and_floats_are_the_same_images() -> None:
    batch = batch_of(6)
    floats = {**batch, "image": batch["image"] / np.float32(127.5) - 1}
    losses = [jax.jit(loss_of(LINEAR))(LINEAR_PARAMS, images, KEY) for images in (batch, floats)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_images_of_another_size_are_refused_by_name() -> None:
    with pytest.raises(AssertionError, match=r"images must be \[b, 4, 4, 3\]"):
        loss_of(LINEAR)(LINEAR_PARAMS, batch_of(6, side=8), KEY)


def test_a_relay_stage_is_trained_with_its_own_process(monkeypatch: pytest.MonkeyPatch) -> None:
    process = RelayProcess(patch=2)
    relay = replace(
        LINEAR,
        process=process,
        sample_process=replace(process, cdf_max=1.05),
        sampler=Heun(num_steps=20, handoff_sigma=0.9),
    )
    seen = []
    monkeypatch.setattr(
        stage_module, "loss", lambda process, *_: seen.append(process) or jnp.zeros(6)
    )
    jax.eval_shape(loss_of(relay), LINEAR_PARAMS, batch_of(6), KEY)
    assert seen == [process]


def test_augmentation_gives_the_network_its_nine_labels() -> None:
    loss_fn = jax.jit(loss_of(replace(LINEAR, train=replace(TRAIN, augment=1.0))))
    losses = {
        float(loss_fn({**LINEAR_PARAMS, "augment": row}, batch_of(8), KEY).mean())
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
        loss_fn = jax.jit(loss_of(replace(LINEAR, train=replace(TRAIN, label_dropout=dropout))))
        unlabelled = {**LINEAR_PARAMS, "classes": np.zeros(CLASSES, np.float32)}
        batch = batch_of()
        other = {**batch, "label": (batch["label"] + 1) % CLASSES}
        return {
            float(loss_fn(*inputs, KEY).mean())
            for inputs in ((LINEAR_PARAMS, batch), (LINEAR_PARAMS, other), (unlabelled, batch))
        }

    assert len(losses(0.0)) == 3
    assert len(losses(1.0)) == 1


def test_a_guide_takes_parameters_of_its_own_and_loss_is_of_the_stage_alone() -> None:
    """Equation 2 of diffusion/guidance.py with two sets of weights of one network."""
    worse = jax.tree.map(lambda leaf: 0.5 * jnp.asarray(leaf), LINEAR_PARAMS)
    stage = replace(LINEAR, guide=Guide(weights="base@1", weight=3.0))
    both, x = Guided(LINEAR_PARAMS, worse), jnp.ones((2, 4, 4, 3))
    classes, sigma = jnp.array([0, 3]), jnp.float32(0.6)
    good, bad = (LINEAR.denoiser(params, classes)(x, sigma) for params in both)
    got = stage.denoiser(both, classes)(x, sigma)
    np.testing.assert_allclose(got, 3 * good - 2 * bad, rtol=1e-5)
    np.testing.assert_array_equal(LINEAR.denoiser(both, classes)(x, sigma), good)
    images = np.full((2, 4, 4, 3), 100, np.uint8)
    np.testing.assert_array_equal(
        stage.loss(both, images, classes, KEY), LINEAR.loss(LINEAR_PARAMS, images, classes, KEY)
    )
    with pytest.raises(ValueError, match="has a guide, whose parameters are missing"):
        stage.denoiser(LINEAR_PARAMS, classes)

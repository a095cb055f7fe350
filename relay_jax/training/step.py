"""One training step as a pure function (SPEC sections 4 and 7).

images -> augmentation -> loss per image -> mean over the batch -> gradient -> Adam -> average
A gradient that is not finite leaves parameters, optimiser and average as they were; the step is
counted.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from relay_jax.config import Stage
from relay_jax.data.transforms import to_float
from relay_jax.diffusion.augment import Augmentation, augment
from relay_jax.diffusion.loss import loss
from relay_jax.diffusion.precondition import precondition
from relay_jax.runtime.sharding import gathered
from relay_jax.training.ema import ema_decay, update_ema
from relay_jax.training.state import TrainState

Batch = dict[str, jax.Array]  # image: uint8 [b, h, w, c]; label: int32 [b]
Metrics = dict[str, jax.Array]


def drop_labels(
    class_labels: jax.Array, probability: float, key: jax.Array, index: jax.Array
) -> jax.Array:
    """Sets whole rows of [b, classes] to zero ("no label") with the given probability. index:
    [b], places in the batch."""
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(index)
    keep = jax.vmap(jax.random.uniform)(keys) >= probability
    return jnp.where(keep[:, None], class_labels, 0.0)


def make_loss_fn(stage: Stage) -> Callable[[dict, Batch, jax.Array, jax.Array], jax.Array]:
    """(params, batch, index [b], key) -> mean loss of the images, a scalar.

    index: places of these images in the whole batch. Their noise, augmentation and dropped
    labels depend on the key and the place alone, whatever the part of the batch they come in;
    only dropout masks belong to the part.
    """
    network, settings = stage.network, stage.train

    def loss_fn(params: dict, batch: Batch, index: jax.Array, key: jax.Array) -> jax.Array:
        loss_key, dropout_key, label_key, augment_key = jax.random.split(key, 4)
        dropout_key = jax.random.fold_in(dropout_key, index[0])
        images, augment_labels = to_float(batch["image"]), None
        if settings.augment > 0:
            images, augment_labels = augment(
                images, augment_key, Augmentation(probability=settings.augment), index
            )
        class_labels = None
        if network.num_classes:
            class_labels = jax.nn.one_hot(batch["label"], network.num_classes)
            if settings.label_dropout > 0:
                class_labels = drop_labels(class_labels, settings.label_dropout, label_key, index)

        def apply(x: jax.Array, c_noise: jax.Array, *labels: jax.Array | None) -> jax.Array:
            return network.apply(
                {"params": params},
                x,
                c_noise,
                class_labels,
                augment_labels,
                True,
                rngs={"dropout": dropout_key},
            )

        denoise = precondition(apply, stage.process.sigma_data)
        return jnp.mean(loss(stage.process, denoise, images, loss_key, index))

    return loss_fn


def value_and_gradient(
    loss_fn: Callable[[dict, Batch, jax.Array, jax.Array], jax.Array],
    params: dict,
    batch: Batch,
    key: jax.Array,
    parts: int,
) -> tuple[jax.Array, dict]:
    """Mean loss of a batch and its gradient, computed in `parts` equal parts one after the other.

    Part j takes images j, j + parts, ...: so each device contributes to every part, and no
    image moves between devices.
    """
    count = batch["label"].shape[0]
    index = jnp.arange(count)
    if parts == 1:
        return jax.value_and_grad(loss_fn)(params, batch, index, key)

    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(count // parts, parts, *x.shape[1:]), 1, 0)

    def add(
        total: tuple[jax.Array, dict], part: tuple[Batch, jax.Array]
    ) -> tuple[tuple[jax.Array, dict], None]:
        return jax.tree.map(jnp.add, total, jax.value_and_grad(loss_fn)(params, *part, key)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    total, _ = jax.lax.scan(add, zero, (jax.tree.map(split, batch), split(index)))
    return jax.tree.map(lambda x: x / parts, total)


def make_train_step(
    stage: Stage,
    optimizer: optax.GradientTransformation,
    mesh: Mesh | None = None,
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """(state, batch, key) -> (state, metrics); key is the run's, the step's own is folded from it.

    mesh: where the step runs, if it splits the state. metrics: loss, gradient_norm, finite (1
    or 0), each a float32 scalar.
    """
    own_loss, settings = make_loss_fn(stage), stage.train

    def loss_fn(params: dict, batch: Batch, index: jax.Array, key: jax.Array) -> jax.Array:
        splits = mesh is not None and mesh.shape["fsdp"] > 1
        return own_loss(
            gathered(params, mesh, stage.network.dtype) if splits else params, batch, index, key
        )

    def train_step(state: TrainState, batch: Batch, key: jax.Array) -> tuple[TrainState, Metrics]:
        value, gradient = value_and_gradient(
            loss_fn, state.params, batch, jax.random.fold_in(key, state.step), settings.accumulate
        )
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(norm) & jnp.isfinite(value)
        updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        images_seen = state.step.astype(jnp.float32) * settings.batch
        decay = ema_decay(
            images_seen, settings.batch, settings.ema_halflife_images, settings.ema_rampup
        )
        ema = update_ema(state.ema, params, decay)

        new = TrainState(
            step=state.step + 1,
            params=params,
            ema=ema,
            opt_state=opt_state,
            nonfinite_row=jnp.zeros_like(state.nonfinite_row),
            nonfinite_total=state.nonfinite_total,
        )
        skipped = TrainState(
            step=state.step + 1,
            params=state.params,
            ema=state.ema,
            opt_state=state.opt_state,
            nonfinite_row=state.nonfinite_row + 1,
            nonfinite_total=state.nonfinite_total + 1,
        )
        state = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, skipped)
        return state, {"loss": value, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}

    return train_step

"""What a training carries from step to step, and the optimiser that changes it.

Arrays only: everything else about a training follows from its
configuration and the step number, so that a checkpoint of the state
is all that a run needs to continue.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from relay_jax.models.averages import name_of
from relay_jax.stage import Stage, TrainSettings


class TrainState(NamedTuple):
    """Everything that a step changes; the fields' names are those of the checkpoints.

    step: [] int32, steps done. params, ema: the network's parameters
    and their average, trees of float32. opt_state: Adam's moments.
    averages: further averages of train.ema, each such a tree by name.
    nonfinite_row, nonfinite_total: [] int32, steps skipped in a row
    and in all, because their loss or gradient was not finite.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    nonfinite_row: jax.Array
    nonfinite_total: jax.Array
    averages: dict[str, dict] = {}


def init_state(stage: Stage, key: jax.Array) -> TrainState:
    """The state before the first step; under jax.eval_shape its shapes.

    To be jitted with the shardings of the state, so that large
    parameters are split from the start.
    """
    params = stage.init(key)
    zero = jnp.zeros((), jnp.int32)
    return TrainState(
        step=zero,
        params=params,
        # A copy: the step's buffers are donated, and one cannot be
        # given away twice.
        ema=jax.tree.map(jnp.copy, params),
        opt_state=make_optimizer(stage.train).init(params),
        nonfinite_row=zero,
        nonfinite_total=zero,
        averages={name_of(value): jax.tree.map(jnp.copy, params) for value in stage.train.ema},
    )


def make_optimizer(train: TrainSettings) -> optax.GradientTransformation:
    """Adam with a linear warm-up, without weight decay (docs/math.md section 8)."""
    schedule = partial(
        warmup_rate,
        learning_rate=train.learning_rate,
        batch=train.batch,
        warmup_images=train.warmup_images,
    )
    return optax.adam(schedule, b1=train.adam_beta1, b2=train.adam_beta2, eps=train.adam_epsilon)


def warmup_rate(step: jax.Array, learning_rate: float, batch: int, warmup_images: int) -> jax.Array:
    """learning_rate * min(images / warmup_images, 1), images = those before the step.

    step: [] or any shape, from 0; returns the same shape.
    """
    # The very first step has rate 0: it fills Adam's moments, as in
    # the official training. Images and not steps are counted, so
    # that half the batch warms up over the same images.
    images = jnp.asarray(step, jnp.float32) * batch
    return learning_rate * jnp.minimum(images / max(warmup_images, 1), 1.0)

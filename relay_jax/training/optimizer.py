"""Adam with a linear warm-up counted in images (SPEC section 7)."""

import jax
import jax.numpy as jnp
import optax

from relay_jax.config import TrainSettings


def warmup_schedule(learning_rate: float, batch: int, warmup_images: int) -> optax.Schedule:
    """step -> learning rate: learning_rate * min(images / warmup_images, 1), images = those
    before the step.

    The very first step therefore has rate 0: it fills Adam's moments, as in the official training.
    """

    def schedule(step: jax.Array) -> jax.Array:
        images = jnp.asarray(step, jnp.float32) * batch
        return learning_rate * jnp.minimum(images / max(warmup_images, 1), 1.0)

    return schedule


def make_optimizer(
    *,
    learning_rate: float,
    batch: int,
    warmup_images: int,
    beta1: float,
    beta2: float,
    epsilon: float,
) -> optax.GradientTransformation:
    """Adam without weight decay or clipping; `batch` converts steps to images."""
    return optax.adam(
        warmup_schedule(learning_rate, batch, warmup_images), b1=beta1, b2=beta2, eps=epsilon
    )


def optimizer_of(train: TrainSettings) -> optax.GradientTransformation:
    """The optimiser that a stage is trained with."""
    return make_optimizer(
        learning_rate=train.learning_rate,
        batch=train.batch,
        warmup_images=train.warmup_images,
        beta1=train.adam_beta1,
        beta2=train.adam_beta2,
        epsilon=train.adam_epsilon,
    )

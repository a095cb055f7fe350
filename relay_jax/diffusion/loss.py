"""Training loss of any process (docs/math.md section 5).

    corrupt:  sharp images and draws -> noisy images, sigma, weight, blur
    loss map: weight * (D(noisy, sigma) - x0)^2,  target always the SHARP image
    loss:     mean over the pixels of an image, one number per image; no mean over the batch

Every draw is an argument; `draw` makes them from one key.
"""

import math
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

from relay_jax.diffusion.precondition import Condition, Denoiser, per_image, with_condition
from relay_jax.diffusion.process import EdmProcess


class Corrupted(NamedTuple):
    """What the network is given, and how its answer is weighted: images [b, h, w, c], else [b]."""

    noisy: jax.Array
    sigma: jax.Array
    weight: jax.Array
    blur_sigma: jax.Array
    blurred: jax.Array
    condition: Condition | None = None


class Draws(NamedTuple):
    """The randomness of one batch: `level` [b] as the process draws it, fields [b, h, w, c].

    condition: of its level, uniform [b], and the field of its noise, for a process that has one.
    """

    level: jax.Array
    gaussian: jax.Array
    block_gaussian: jax.Array | None
    condition: jax.Array | None = None
    condition_gaussian: jax.Array | None = None


FIELDS = ("gaussian", "block_gaussian", "condition_gaussian")


def draw(
    process: EdmProcess,
    key: jax.Array,
    shape: tuple[int, ...],
    index: jax.Array | None = None,
) -> Draws:
    """All draws for images of shape [b, h, w, c] from one key.

    index: int [b], the images' places in the whole batch, by default
    0, 1, ...: what image i draws depends on the key and its place
    alone, so that a batch may be processed in parts.
    """
    index = jnp.arange(shape[0]) if index is None else index
    chex.assert_shape(index, (shape[0],), custom_message="index must be [b]")
    chex.assert_type(index, int, custom_message="index must be of whole numbers")

    def one(place: jax.Array) -> Draws:
        place_key = jax.random.fold_in(key, place)
        level_key, gaussian_key, block_key = jax.random.split(place_key, 3)
        # In rows of 3 colours CPUs take twice as long.
        gaussian = jax.random.normal(gaussian_key, (math.prod(shape[1:]),))
        block = jax.random.normal(block_key, gaussian.shape) if process.has_block_noise else None
        drawn = Draws(process.draw_level(level_key), gaussian, block)
        if not process.has_condition:
            return drawn
        level, field = jax.random.split(jax.random.fold_in(place_key, 3))
        return drawn._replace(
            condition=jax.random.uniform(level),
            condition_gaussian=jax.random.normal(field, gaussian.shape),
        )

    # Image by image, so that what one draws does not depend on the
    # size of the batch.
    drawn = jax.vmap(one)(index)
    fields = {name: getattr(drawn, name) for name in FIELDS}
    return drawn._replace(
        **{name: field.reshape(shape) for name, field in fields.items() if field is not None}
    )


def corrupt(process: EdmProcess, images: jax.Array, draws: Draws) -> Corrupted:
    """noisy = B_s x0 + sigma noise, the forward process of a stage.

    images: sharp, [b, h, w, c] in [-1, 1]; draws: one level and the
    fields for each. Raises ValueError where h or w is not divisible
    by the patch.
    """
    chex.assert_rank(images, 4, custom_message="images must be [b, h, w, c]")
    chex.assert_type(images, float, custom_message="images must be floating-point, in [-1, 1]")
    for name in FIELDS:
        field, message = (
            getattr(draws, name),
            f"draws.{name} must have the shape of the images",
        )
        if field is not None:
            chex.assert_equal_shape([images, field], custom_message=message)
    chex.assert_shape(draws.level, images.shape[:1], custom_message="draws.level must be [b]")
    sigma, blur_sigma = process.level(draws.level)
    blurred = process.blur(images, blur_sigma)
    noise = process.noise(draws.gaussian, draws.block_gaussian)
    noisy = blurred + per_image(sigma, images) * noise
    condition = process.condition(images, draws.condition, draws.condition_gaussian)
    return Corrupted(noisy, sigma, process.weight(sigma), blur_sigma, blurred, condition)


def loss_map(denoise: Denoiser, images: jax.Array, corrupted: Corrupted) -> jax.Array:
    """weight |D(noisy, sigma) - x0|^2 per pixel, [b, h, w, c]. denoise: (x, sigma [b]) -> x0."""
    message = "images must be those that were corrupted"
    chex.assert_equal_shape([images, corrupted.noisy], custom_message=message)
    # Against the sharp images, not the blurred ones: the denoiser
    # undoes the blur as well.
    denoise = with_condition(denoise, corrupted.condition)
    error = denoise(corrupted.noisy, corrupted.sigma) - images
    return per_image(corrupted.weight, images) * jnp.square(error)


def loss(
    process: EdmProcess,
    denoise: Denoiser,
    images: jax.Array,
    key: jax.Array,
    index: jax.Array | None = None,
) -> jax.Array:
    """Loss of each image, [b]: the mean of its loss map.

    images: sharp, [b, h, w, c] in [-1, 1]; index: see `draw`.
    """
    corrupted = corrupt(process, images, draw(process, key, images.shape, index))
    return jnp.mean(loss_map(denoise, images, corrupted), axis=(1, 2, 3))

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

from relay_jax.diffusion.precondition import Denoiser, per_image
from relay_jax.diffusion.process import EdmProcess


class Corrupted(NamedTuple):
    """What the network is given, and how its answer is weighted: images [b, h, w, c], else [b]."""

    noisy: jax.Array
    sigma: jax.Array
    weight: jax.Array
    blur_sigma: jax.Array
    blurred: jax.Array


class Draws(NamedTuple):
    """The randomness of one batch: `level` [b] as the process draws it, fields [b, h, w, c]."""

    level: jax.Array
    gaussian: jax.Array
    block_gaussian: jax.Array | None


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
        level_key, gaussian_key, block_key = jax.random.split(jax.random.fold_in(key, place), 3)
        # In rows of 3 colours CPUs take twice as long.
        gaussian = jax.random.normal(gaussian_key, (math.prod(shape[1:]),))
        block = jax.random.normal(block_key, gaussian.shape) if process.has_block_noise else None
        return Draws(process.draw_level(level_key), gaussian, block)

    # Image by image, so that what one draws does not depend on the
    # size of the batch.
    level, *fields = jax.vmap(one)(index)
    return Draws(
        level,
        *(field if field is None else field.reshape(shape) for field in fields),
    )


def corrupt(process: EdmProcess, images: jax.Array, draws: Draws) -> Corrupted:
    """noisy = B_s x0 + sigma noise, the forward process of a stage.

    images: sharp, [b, h, w, c] in [-1, 1]; draws: one level and the
    fields for each. Raises ValueError where h or w is not divisible
    by the patch.
    """
    chex.assert_rank(images, 4, custom_message="images must be [b, h, w, c]")
    chex.assert_type(images, float, custom_message="images must be floating-point, in [-1, 1]")
    for name in ("gaussian", "block_gaussian"):
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
    return Corrupted(noisy, sigma, process.weight(sigma), blur_sigma, blurred)


def loss_map(denoise: Denoiser, images: jax.Array, corrupted: Corrupted) -> jax.Array:
    """weight |D(noisy, sigma) - x0|^2 per pixel, [b, h, w, c]. denoise: (x, sigma [b]) -> x0."""
    message = "images must be those that were corrupted"
    chex.assert_equal_shape([images, corrupted.noisy], custom_message=message)
    # Against the sharp images, not the blurred ones: the denoiser
    # undoes the blur as well.
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

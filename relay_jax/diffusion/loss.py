"""Training losses of both processes (SPEC section 4).

    corrupt:  sharp images and draws -> noisy images, sigma, weight, blur
    loss map: weight * (D(noisy, sigma) - x0)^2,  target always the SHARP image
    loss:     mean over the pixels of an image, one number per image; nothing is reduced over the batch

Every draw is an argument; `draw` makes them from one key.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from relay_jax.diffusion.block_noise import relay_noise
from relay_jax.diffusion.blur import blur
from relay_jax.diffusion.precondition import Denoiser, per_image
from relay_jax.diffusion.process import EdmProcess, RelayProcess


class Corrupted(NamedTuple):
    """What the network is given, and how its answer is weighted. Images [b, h, w, c], the rest
    [b]."""

    noisy: jax.Array
    sigma: jax.Array
    weight: jax.Array
    blur_sigma: jax.Array
    blurred: jax.Array


class Draws(NamedTuple):
    """The randomness of one batch: `level` [b] is standard normal (EDM) or uniform (relay)."""

    level: jax.Array
    gaussian: jax.Array
    block_gaussian: jax.Array | None


def draw(
    process: EdmProcess, key: jax.Array, shape: tuple[int, ...], index: jax.Array | None = None
) -> Draws:
    """All draws for images of shape [b, h, w, c] from one key.

    index: int [b], the images' places in the whole batch, by default 0, 1, ...: what image i
    draws depends on the key
    and its place alone, so that a batch may be processed in parts.
    """
    index = jnp.arange(shape[0]) if index is None else index

    def one(place: jax.Array) -> Draws:
        level_key, gaussian_key, block_key = jax.random.split(jax.random.fold_in(key, place), 3)
        gaussian = jax.random.normal(
            gaussian_key, (math.prod(shape[1:]),)
        )  # flat: see sampler.seeded_noise
        if not isinstance(process, RelayProcess):
            return Draws(jax.random.normal(level_key), gaussian, None)
        block = (
            jax.random.normal(block_key, gaussian.shape) if process.block_noise_scale > 0 else None
        )
        return Draws(jax.random.uniform(level_key), gaussian, block)

    level, *fields = jax.vmap(one)(index)
    return Draws(level, *(field if field is None else field.reshape(shape) for field in fields))


def edm_corrupt(
    process: EdmProcess, images: jax.Array, normal: jax.Array, gaussian: jax.Array
) -> Corrupted:
    """noisy = x0 + sigma g. images, gaussian: [b, h, w, c]; normal: [b], the standard normal
    behind sigma."""
    sigma = process.sigma_from_normal(normal)
    noisy = images + per_image(sigma, images) * gaussian
    return Corrupted(noisy, sigma, process.weight(sigma), jnp.zeros_like(sigma), images)


def relay_corrupt(
    process: RelayProcess,
    images: jax.Array,
    uniform: jax.Array,
    gaussian: jax.Array,
    block_gaussian: jax.Array | None,
) -> Corrupted:
    """noisy = B_s x0 + sigma (g + block_noise_scale block_noise(g')).

    images and noise fields: [b, h, w, c]; uniform: raw draws [b] in [0, 1].
    Raises ValueError where h or w is not divisible by the patch.
    """
    u = process.clamp(uniform)
    sigma, blur_sigma = process.sigma_from_u(u), process.blur_sigma(u)
    blurred = blur(images, blur_sigma, process.patch, process.min_scale)
    noise = relay_noise(gaussian, block_gaussian, process.patch, process.block_noise_scale)
    return Corrupted(
        blurred + per_image(sigma, images) * noise,
        sigma,
        process.weight(sigma),
        blur_sigma,
        blurred,
    )


def corrupt(process: EdmProcess, images: jax.Array, draws: Draws) -> Corrupted:
    """The forward process of a stage. images: sharp, [b, h, w, c] in [-1, 1]."""
    if isinstance(process, RelayProcess):
        return relay_corrupt(process, images, draws.level, draws.gaussian, draws.block_gaussian)
    return edm_corrupt(process, images, draws.level, draws.gaussian)


def loss_map(denoise: Denoiser, images: jax.Array, corrupted: Corrupted) -> jax.Array:
    """weight |D(noisy, sigma) - x0|^2 per pixel, [b, h, w, c]. denoise: (x, sigma [b]) -> x0."""
    error = denoise(corrupted.noisy, corrupted.sigma) - images
    return per_image(corrupted.weight, images) * jnp.square(error)


def loss(
    process: EdmProcess,
    denoise: Denoiser,
    images: jax.Array,
    key: jax.Array,
    index: jax.Array | None = None,
) -> jax.Array:
    """Loss of each image, [b]: the mean of its loss map. images: sharp, [b, h, w, c] in [-1,
    1]; index: see `draw`."""
    corrupted = corrupt(process, images, draw(process, key, images.shape, index))
    return jnp.mean(loss_map(denoise, images, corrupted), axis=(1, 2, 3))

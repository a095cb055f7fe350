"""EDM preconditioning (docs/math.md section 5; arXiv 2206.00364, equation 7 and table 1).

(1)  D(x, sigma, labels) = c_skip x + c_out F(c_in x, c_noise, labels)
(2)  c_skip = sd^2 / (sigma^2 + sd^2)          c_out = sigma sd / sqrt(sigma^2 + sd^2)
     c_in   = 1 / sqrt(sigma^2 + sd^2)         c_noise = ln(sigma) / 4              sd = sigma_data
A condition, images with noise of a level of their own, enters as c_in image and c_noise at that
level (docs/math.md section 4).
"""

from collections.abc import Callable
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp

# (x [b, h, w, c], c_noise [b], class_labels, augment_labels) -> [b, h, w, c]
Network = Callable[..., jax.Array]
# (x [b, h, w, c], sigma scalar or [b], ...) -> x0 [b, h, w, c]
Denoiser = Callable[..., jax.Array]


class Condition(NamedTuple):
    """What a network is given beside the state: noisy images [b, h, w, c] and their sigma [b]."""

    image: jax.Array
    sigma: jax.Array


class Coefficients(NamedTuple):
    """The four functions of sigma in equation (2), each of the shape of sigma."""

    c_skip: jax.Array
    c_out: jax.Array
    c_in: jax.Array
    c_noise: jax.Array


def coefficients(sigma: jax.Array, sigma_data: float = 0.5) -> Coefficients:
    """Equation (2). sigma: noise standard deviation, any shape, > 0."""
    total = jnp.square(sigma) + sigma_data**2
    return Coefficients(
        c_skip=sigma_data**2 / total,
        c_out=sigma * sigma_data / jnp.sqrt(total),
        c_in=1 / jnp.sqrt(total),
        c_noise=jnp.log(sigma) / 4,
    )


def per_image(value: jax.Array, x: jax.Array) -> jax.Array:
    """A scalar or [b] as float32 [b, 1, 1, 1], to be multiplied with images x [b, h, w, c]."""
    chex.assert_rank(value, {0, 1}, custom_message="a value per image must be a scalar or [b]")
    value = jnp.asarray(value, jnp.float32).reshape(-1, 1, 1, 1)
    return jnp.broadcast_to(value, (x.shape[0], 1, 1, 1))


def precondition(network: Network, sigma_data: float = 0.5) -> Denoiser:
    """Equation (1): wraps the raw network F into the denoiser D.

    The result takes x [b, h, w, c], sigma (scalar or [b]), the
    network's labels and, for a network that has one, its condition.
    It returns the denoised images in float32 whatever the precision
    inside the network.
    """

    def denoise(
        x: jax.Array,
        sigma: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        condition: Condition | None = None,
    ) -> jax.Array:
        chex.assert_rank(x, 4, custom_message="x must be [b, h, w, c]")
        chex.assert_rank(sigma, {0, 1}, custom_message="sigma must be a scalar or [b]")
        # Skip and sum in float32: bfloat16 would round the
        # image that is passed through, and with it every
        # state of a sampler.
        x = x.astype(jnp.float32)
        c = coefficients(per_image(sigma, x), sigma_data)
        labels = class_labels, augment_labels
        given = {} if condition is None else {"condition": _scaled(condition, sigma_data)}
        raw = network(c.c_in * x, c.c_noise.reshape(-1), *labels, **given)
        return c.c_skip * x + c.c_out * raw.astype(jnp.float32)

    return denoise


def _scaled(condition: Condition, sigma_data: float) -> tuple[jax.Array, jax.Array]:
    """A condition as the network takes it: c_in image [b, h, w, c], c_noise [b]."""
    c = coefficients(per_image(condition.sigma, condition.image), sigma_data)
    return c.c_in * condition.image, c.c_noise.reshape(-1)


def with_condition(denoise: Denoiser, condition: Condition | None) -> Denoiser:
    """The denoiser with its condition bound; the denoiser itself for None.

    A batch that holds the images several times over, as guidance
    asks for both branches at once, has the condition as often.
    """
    if condition is None:
        return denoise

    def conditioned(x: jax.Array, sigma: jax.Array, *labels: jax.Array | None) -> jax.Array:
        times, rest = divmod(x.shape[0], condition.image.shape[0])
        if rest:
            raise ValueError("the condition must hold as many images as the batch")
        repeated = Condition(*(jnp.concatenate([value] * times) for value in condition))
        return denoise(x, sigma, *labels, condition=repeated)

    return conditioned

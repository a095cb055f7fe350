"""A small classifier trained on real images: does a generated image show the class that was
asked for?

A check for data sets without a standard classifier, and for the demo. Not a published metric.
"""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax


class _ConvNet(nn.Module):
    num_classes: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        for width in (24, 48, 96):
            x = nn.relu(nn.Conv(width, (3, 3))(x))
            b, h, w, c = x.shape  # maximum of 2 x 2 pixels; nn.max_pool's gradient is slow on CPU
            x = (
                x[:, : h // 2 * 2, : w // 2 * 2]
                .reshape(b, h // 2, 2, w // 2, 2, c)
                .max(axis=(2, 4))
            )
        return nn.Dense(self.num_classes)(x.mean(axis=(1, 2)))


def train_classifier(
    images: np.ndarray,
    labels: np.ndarray,
    num_classes: int,
    *,
    epochs: int = 6,
    batch: int = 32,
    seed: int = 0,
) -> Callable[[np.ndarray], np.ndarray]:
    """Trains on images [n, h, w, 3] in [-1, 1] and labels [n]; returns images [m, h, w, 3] ->
    classes [m]."""
    network, steps = _ConvNet(num_classes), epochs * (len(images) // batch)
    params = network.init(jax.random.key(seed), images[:1])
    optimizer = optax.adam(optax.cosine_decay_schedule(3e-3, steps))
    opt_state = optimizer.init(params)

    @jax.jit
    def step(
        params: dict, opt_state: optax.OptState, x: jax.Array, y: jax.Array
    ) -> tuple[dict, optax.OptState]:
        def loss(params: dict) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(
                network.apply(params, x), y
            ).mean()

        updates, opt_state = optimizer.update(jax.grad(loss)(params), opt_state)
        return optax.apply_updates(params, updates), opt_state

    rng = np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(images))
        for start in range(0, len(images) - batch + 1, batch):
            chosen = order[start : start + batch]
            params, opt_state = step(params, opt_state, images[chosen], labels[chosen])

    predict = jax.jit(lambda x: jnp.argmax(network.apply(params, x), axis=-1))
    return lambda x: np.concatenate(
        [np.asarray(predict(x[i : i + 256])) for i in range(0, len(x), 256)]
    )

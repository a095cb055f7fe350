"""What a training run carries from step to step: arrays only."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from relay_jax.models.unet import UNet, init_params


class TrainState(NamedTuple):
    """step: [] int32; params, ema: the network's parameters and their average; opt_state: optax's.

    nonfinite_row, nonfinite_total: [] int32, steps skipped in a row and in all: their gradient
    was not finite.
    """

    step: jax.Array
    params: dict
    ema: dict
    opt_state: optax.OptState
    nonfinite_row: jax.Array
    nonfinite_total: jax.Array


def make_init(
    network: UNet, optimizer: optax.GradientTransformation
) -> Callable[[jax.Array], TrainState]:
    """key -> TrainState, to be jitted with the shardings of the state, so that it is born
    sharded."""

    def init(key: jax.Array) -> TrainState:
        params = init_params(network, key)
        zero = jnp.zeros((), jnp.int32)
        return TrainState(
            step=zero,
            params=params,
            ema=jax.tree.map(jnp.copy, params),
            opt_state=optimizer.init(params),
            nonfinite_row=zero,
            nonfinite_total=zero,
        )

    return init

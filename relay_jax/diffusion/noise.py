"""Levels of noise and blur; and what fields of noise are for, on which every image depends."""

import enum
from collections.abc import Callable
from typing import NamedTuple

import jax


class Purpose(enum.IntEnum):
    """What a field of noise is for."""

    # The numbers are part of every seed's image: never change one.

    LATENTS = 0
    INITIAL_GAUSS = 1
    INITIAL_BLOCK = 2
    CHURN_GAUSS = 3
    EULER_GAUSS = 4
    EULER_BLOCK = 5
    HEUN_GAUSS = 6
    HEUN_BLOCK = 7


# (step, purpose) -> white unit noise [b, h, w, c]; step may be traced.
NoiseFn = Callable[[jax.Array | int, Purpose], jax.Array]


class Level(NamedTuple):
    """A level: noise sigma, and blur sigma in pixels or what the blur counts by; of one shape."""

    sigma: jax.Array
    blur_sigma: jax.Array

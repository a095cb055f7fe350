"""Batches by position: batch n is a pure function of the source, the seed and n.

    stream = source, shuffled anew each epoch, repeated for ever, each position flipped or not
    batch n on host k of m = elements k, k + m, ... of stream[n * batch_size : (n + 1) * batch_size]

So a run resumes with nothing but n, and the images of a global batch are the same whatever the number of hosts, threads or
worker processes. Grain (github.com/google/grain) supplies the random-access shuffle and the prefetching.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import TypedDict

import grain.python as pygrain
import numpy as np

from relay_jax.data.sources import DataError, Source
from relay_jax.data.transforms import center_crop_resize, flip_x


class Batch(TypedDict):
    """image: uint8 [b, r, r, 3]; label: int32 [b], zeros without labels."""

    image: np.ndarray
    label: np.ndarray

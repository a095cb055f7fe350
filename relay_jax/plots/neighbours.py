"""Nearest real images of samples, to see whether a network copies what it was trained on.

(1)  d(a, b) = sqrt(mean over the entries of (a - b)^2)
of pixels in [-1, 1], reduced to at most 32 x 32 by box averages, or of features, each divided
by its standard deviation over the real images. Where training mirrors images, a mirrored real
image counts as well (pixels only).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from relay_jax.data.loader import read
from relay_jax.data.source import Source
from relay_jax.data.transforms import to_float

SIDE = 32
BLOCK = 1024  # real images compared at a time
TYPICAL_IMAGES = 64  # real images whose own nearest neighbour is looked for, as a scale

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [n, r, r, 3] -> float [n, d]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """By one distance. positions: int [m, k], in the source, nearest first; distances: [m, k];
    typical: the median distance of a real image to the nearest other one."""

    name: str
    positions: np.ndarray
    distances: np.ndarray
    typical: float


def reduce(pixels: np.ndarray, side: int) -> np.ndarray:
    """Box average of [n, r, r, c] to the largest size of at most `side` that divides r. Same
    type, rounded."""
    resolution = pixels.shape[1]
    factor = next(f for f in range(-(-resolution // side), resolution + 1) if resolution % f == 0)
    n, c, size = len(pixels), pixels.shape[-1], resolution // factor
    means = pixels.reshape(n, size, factor, size, factor, c).mean(axis=(2, 4), dtype=np.float32)
    return (
        np.round(means).astype(np.uint8) if pixels.dtype == np.uint8 else means.astype(pixels.dtype)
    )


def _blocks(references: list[np.ndarray]) -> Iterator[tuple[int, list[np.ndarray]]]:
    for start in range(0, len(references[0]), BLOCK):
        yield (
            start,
            [
                r[start : start + BLOCK].reshape(len(r[start : start + BLOCK]), -1)
                for r in references
            ],
        )


def nearest(
    queries: np.ndarray, references: list[np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices int [m, count] and distances [m, count], nearest first. queries: [m, ...];
    references: alternatives of the
    same n things, each [n, ...]: the nearer one counts. At least `count` of them."""
    a = queries.reshape(len(queries), -1).astype(np.float64)
    best = np.zeros((len(a), 0))
    index = np.zeros((len(a), 0), int)
    for start, parts in _blocks(references):
        squared = np.minimum.reduce(
            [
                ((a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * (a @ b.T))
                for b in (part.astype(np.float64) for part in parts)
            ]
        )
        best = np.concatenate([best, squared], axis=1)
        index = np.concatenate(
            [index, np.broadcast_to(np.arange(start, start + len(parts[0])), squared.shape)], axis=1
        )
        order = np.argsort(best, axis=1, kind="stable")[:, :count]
        best, index = np.take_along_axis(best, order, 1), np.take_along_axis(index, order, 1)
    return index, np.sqrt(np.maximum(best, 0) / a.shape[1])


def _compare(
    name: str, samples: np.ndarray, real: list[np.ndarray], positions: Sequence[int], count: int
) -> Neighbours:
    index, distances = nearest(samples, real, count)
    own = np.linspace(0, len(positions) - 1, min(TYPICAL_IMAGES, len(positions))).astype(int)
    _, among = nearest(
        real[0][own], real, min(2, len(positions))
    )  # the nearest is the image itself
    return Neighbours(
        name=name,
        positions=np.asarray(positions)[index],
        distances=distances,
        typical=float(np.median(among[:, -1])),
    )


def neighbours(
    samples: np.ndarray,
    source: Source,
    positions: Sequence[int],
    count: int,
    *,
    mirrored: bool,
    features: dict[str, Features],
    each: Callable[[int], None],
) -> list[Neighbours]:
    """By pixels, and by every kind of features. samples: uint8 [m, r, r, 3]; positions: [n],
    where to look, n >= count.

    each: called with the number of images read, now and then.
    """
    resolution = samples.shape[1]
    small: list[np.ndarray] = []
    found: dict[str, list[np.ndarray]] = {name: [] for name in features}
    for start in range(0, len(positions), BLOCK // 4):
        pixels, _ = read(source, positions[start : start + BLOCK // 4], resolution)
        small.append(reduce(pixels, SIDE))
        for name, compute in features.items():
            found[name].append(compute(pixels))
        each(start + len(pixels))

    low = to_float(np.concatenate(small))
    results = [
        _compare(
            "pixels",
            to_float(reduce(samples, SIDE)),
            [low, low[:, :, ::-1]] if mirrored else [low],
            positions,
            count,
        )
    ]
    for name, parts in found.items():
        real = np.concatenate(parts)
        scale = np.maximum(real.std(axis=0), 1e-12)
        results.append(
            _compare(name, features[name](samples) / scale, [real / scale], positions, count)
        )
    return results

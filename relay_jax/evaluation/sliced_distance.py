"""Monge inception distance (MIND; arXiv 2605.06797): a sliced Wasserstein-2 distance of features.

(1)  W(u)^2 = integral over q in [0, 1] of (A_u(q) - B_u(q))^2
     A_u, B_u: quantile functions of the projections a . u and b . u; for as many images of both
     sets the mean squared difference of the sorted projections
(2)  MIND = 3 d mean over 1,000 random unit directions u of W(u)^2,    d features

A shift by v gives 3 |v|^2 in expectation over the directions (the mean of (u . v)^2 is |v|^2 / d).
Like a Frechet distance it is above zero for finite sets of one distribution, and falls as they
grow; but it sees all moments, and needs fewer images.
"""

import numpy as np

from relay_jax.evaluation.statistics import FeatureSet, comparable

DIRECTIONS = 1000
SETTINGS = {"sliced_directions": DIRECTIONS}
BLOCK = 64  # directions at a time: 50,000 images are then 26 MB


def directions(dims: int, count: int = DIRECTIONS) -> np.ndarray:
    """Unit vectors, uniform on the sphere and always the same: float64 [dims, count]."""
    # RandomState's stream is frozen by NumPy.
    vectors = np.random.RandomState(0).standard_normal((count, dims)).T
    return vectors / np.linalg.norm(vectors, axis=0)


def _quantiles(a: int, b: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where two quantile functions of a and b steps are constant: widths, and the rank in each."""
    # In units of 1 / (a b), integers: no step is lost to rounding.
    ends = np.union1d(np.arange(1, a + 1) * b, np.arange(1, b + 1) * a)
    widths = np.diff(ends, prepend=0)
    return widths / (a * b), (ends - 1) // b, (ends - 1) // a


def mind(a: np.ndarray, b: np.ndarray, count: int = DIRECTIONS) -> float:
    """Equation (2), float64. a, b: features [n, d] and [m, d]; count: of directions.

    Raises ValueError for shapes that do not fit.
    """
    a, b = comparable(a, b)
    a, b, dims = a.astype(np.float64), b.astype(np.float64), a.shape[1]
    widths, rank_a, rank_b = _quantiles(len(a), len(b))
    vectors, total = directions(dims, count), 0.0
    for start in range(0, count, BLOCK):
        block = vectors[:, start : start + BLOCK]
        # A direction a row: sorting goes along memory.
        sorted_a, sorted_b = (np.sort(block.T @ x.T, axis=1) for x in (a, b))
        total += float(np.sum((sorted_a[:, rank_a] - sorted_b[:, rank_b]) ** 2 @ widths))
    return 3 * dims * total / count


def sliced_distance(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """MIND, if both sets keep rows of features."""
    if reference.rows is None or samples.rows is None:
        return {}
    return {"MIND": mind(reference.rows, samples.rows)}

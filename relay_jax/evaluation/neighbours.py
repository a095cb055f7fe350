"""Scores by nearest neighbours: precision, recall, density, coverage.

B_k(x): the ball around a point of a set, up to its k-th nearest other point of that set, border
included. With N reference images x and M samples y:

(1)  precision = share of samples in some B_3(x)         (arXiv 1904.06991)
(2)  recall    = share of the reference in some B_3(y)
(3)  density   = sum over samples of the number of B_5(x) that hold them / (5 M)
(4)  coverage  = share of B_5(x) that hold a sample      (Naeem et al. 2020, arXiv 2002.09797)

Of two sets of one distribution density is 1 and coverage 1 - prod_{i=1..5} (N - i) / (N + M - i)
in expectation. One image far from all others has a large ball, which makes precision 1 for whatever
is drawn; density counts how many balls agree, and coverage takes only balls of real images.

All distances are computed once, also for the scores of several parts of the samples.
"""

from collections.abc import Iterator, Sequence

import numpy as np

from relay_jax.evaluation.statistics import BLOCK, FeatureSet, blocks, comparable
from relay_jax.runtime.counting import Add, counting

NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
CANDIDATES = 4  # times the neighbours that are asked for
SETTINGS = {"neighbours": NEIGHBOURS, "density_neighbours": DENSITY_NEIGHBOURS}


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2, float64 [n, m]; a: [n, d], b: [m, d]. Rounding below zero is clipped."""
    return np.maximum(np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1) - 2 * (a @ b.T), 0)


def _radii(features: np.ndarray, ranks: Sequence[int], block: int, add: Add) -> np.ndarray:
    """Squared distance of each point to its nearest other ones of these ranks: float32 [k, n]."""
    nearest = [near for near, _ in _nearest(features, max(ranks) + 1, block, add)]
    return np.concatenate(nearest)[:, list(ranks)].T.astype(np.float32)


def _nearest(
    features: np.ndarray, count: int, block: int, add: Add
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Of each block of points the so many nearest ones, the point itself among them: squared
    distances, rising, and which they are, both [rows, count]."""
    for rows in blocks(features, block):
        near, which, start = np.full((len(rows), 0), np.inf), np.zeros((len(rows), 0), int), 0
        for others in blocks(features, block):
            distance = _squared_distances(rows, others)
            numbers = np.broadcast_to(np.arange(start, start + len(others)), distance.shape)
            near = np.concatenate([near, distance], axis=1)
            which = np.concatenate([which, numbers], axis=1)
            if near.shape[1] > count:
                least = np.argpartition(near, count - 1, axis=1)[:, :count]
                near, which = (np.take_along_axis(x, least, axis=1) for x in (near, which))
            start += len(others)
        order = np.argsort(near, axis=1)
        yield np.take_along_axis(near, order, axis=1), np.take_along_axis(which, order, axis=1)
        add(len(rows) * len(features) / 1e6)


def _radii_in_parts(
    features: np.ndarray, rank: int, parts: np.ndarray, block: int, add: Add
) -> np.ndarray:
    """As `_radii`, among the points of each part alone: float32 [p, n], -1 for other points."""
    # More than are needed, where some of them are in no part.
    count = rank + 1 if parts.all() else CANDIDATES * (rank + 1)
    radii: list[np.ndarray] = []
    for near, which in _nearest(features, count, block, add):
        inside = np.where(parts[:, which], near, np.inf)
        inside.partition(rank, axis=-1)
        radii.append(inside[..., rank])
    result = np.where(parts, np.concatenate(radii, axis=1), -1).astype(np.float32)
    # Not enough after all.
    for part, row in zip(parts, result, strict=True):
        if np.isinf(row).any():
            row[part] = _radii(features[part], [rank], block, add)[0]
    return result


def neighbour_scores(
    ref: np.ndarray,
    sample: np.ndarray,
    neighbours: int = NEIGHBOURS,
    density_neighbours: int = DENSITY_NEIGHBOURS,
    block: int = BLOCK,
) -> dict[str, float]:
    """Equations (1) to (4) of features ref [n, d] and sample [m, d], by name.

    n, m > neighbours; where n is not above density_neighbours, without (3) and (4). The official
    protocol of (1) and (2) takes 10,000 reference images. block: points per tile of distances
    (2048: 32 MB); memory grows with its square, not with n. Raises ValueError for too few points,
    other shapes and numbers that are not finite.
    """
    every = np.ones((1, len(sample)), bool)
    scores = _of_parts(ref, sample, every, neighbours, density_neighbours, block)
    return {name: float(value[0]) for name, value in scores.items()}


def _of_parts(
    ref: np.ndarray,
    sample: np.ndarray,
    parts: np.ndarray,
    neighbours: int,
    density_neighbours: int,
    block: int,
) -> dict[str, np.ndarray]:
    """`neighbour_scores` of parts of the samples, bool [p, m]: [p] by name."""
    ref, sample = comparable(ref, sample)
    if min(neighbours, density_neighbours) < 1:
        raise ValueError(f"neighbours must be at least 1, not {neighbours}")
    sizes = parts.sum(axis=1)
    if min(len(ref), *sizes) <= neighbours:
        raise ValueError(
            f"{len(ref)} and {min(sizes)} images are too few for {neighbours} neighbours; "
            f"each set needs at least {neighbours + 1}"
        )
    pairs = len(ref) ** 2 + len(sample) ** 2 + len(ref) * len(sample)
    dense = len(ref) > density_neighbours
    ranks = [neighbours, density_neighbours if dense else neighbours]
    members = parts.T.astype(np.float32)
    sample_inside, ref_inside = np.zeros(len(sample), bool), np.zeros((len(parts), len(ref)), bool)
    held = np.zeros((len(ref), len(parts)))  # samples of each part in the ball of an image
    with counting("neighbours", pairs / 1e6, "million pairs") as add:
        radii_ref, radii_dense = _radii(ref, ranks, block, add)
        radii_sample = _radii_in_parts(sample, neighbours, parts, block, add)
        for i, a in enumerate(blocks(ref, block)):
            rows = slice(i * block, i * block + len(a))
            # Each tile of distances serves all: precision looks along
            # one axis, recall the other.
            for j, b in enumerate(blocks(sample, block)):
                columns = slice(j * block, j * block + len(b))
                distance = _squared_distances(a, b)
                sample_inside[columns] |= (distance <= radii_ref[rows, None]).any(axis=0)
                for inside, radii in zip(ref_inside, radii_sample, strict=True):
                    inside[rows] |= (distance <= radii[columns]).any(axis=1)
                near = (distance <= radii_dense[rows, None]).astype(np.float32)
                held[rows] += near @ members[columns]
            add(len(a) * len(sample) / 1e6)
    scores = {
        "precision": (parts & sample_inside).sum(axis=1) / sizes,
        "recall": ref_inside.mean(axis=1),
    }
    if dense:
        scores["density"] = held.sum(axis=0) / (density_neighbours * sizes)
        scores["coverage"] = (held > 0).mean(axis=0)
    return scores


def precision_recall(
    ref: np.ndarray,
    sample: np.ndarray,
    neighbours: int = NEIGHBOURS,
    block: int = BLOCK,
) -> tuple[float, float]:
    """Equations (1) and (2) alone. Raises ValueError as `neighbour_scores`."""
    scores = neighbour_scores(ref, sample, neighbours, block=block)
    return scores["precision"], scores["recall"]


def neighbour_shares(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """Precision, recall, density and coverage, if both sets keep rows of features."""
    if reference.rows is None or samples.rows is None:
        return {}
    # One metric for four scores: they share
    # the distances, which take minutes.
    return neighbour_scores(reference.rows, samples.rows)


def shares_without(
    reference: FeatureSet, samples: FeatureSet, group: np.ndarray
) -> dict[str, np.ndarray]:
    """`neighbour_shares` without the samples of each group: [g] by name.

    group: int [m], from 0 on. Raises ValueError as `neighbour_scores`.
    """
    if reference.rows is None or samples.rows is None:
        return {}
    parts = group != np.arange(group.max() + 1)[:, None]
    settings = NEIGHBOURS, DENSITY_NEIGHBOURS, BLOCK
    return _of_parts(reference.rows, samples.rows, parts, *settings)

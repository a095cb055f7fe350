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
"""

from collections.abc import Sequence

import numpy as np

from relay_jax.evaluation.statistics import BLOCK, FeatureSet, blocks, comparable
from relay_jax.runtime.counting import Add, counting

NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
SETTINGS = {"neighbours": NEIGHBOURS, "density_neighbours": DENSITY_NEIGHBOURS}


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2, float64 [n, m]; a: [n, d], b: [m, d]. Rounding below zero is clipped."""
    return np.maximum(np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1) - 2 * (a @ b.T), 0)


def _radii(features: np.ndarray, ranks: Sequence[int], block: int, add: Add) -> np.ndarray:
    """Squared distance of each point to its nearest other ones of these ranks: float32 [k, n]."""
    radii, most = [], max(ranks)
    for rows in blocks(features, block):
        nearest = np.full((len(rows), 0), np.inf)
        for others in blocks(features, block):
            nearest = np.concatenate([nearest, _squared_distances(rows, others)], axis=1)
            # One more than the neighbours:
            # the point itself is one of them.
            if nearest.shape[1] > most + 1:
                nearest = np.partition(nearest, most, axis=1)[:, : most + 1]
        # float32 as in the official code: points on the border of a
        # ball count the same.
        radii.append(np.sort(nearest, axis=1)[:, list(ranks)].astype(np.float32))
        add(len(rows) * len(features) / 1e6)
    return np.concatenate(radii).T


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
    ref, sample = comparable(ref, sample)
    if min(neighbours, density_neighbours) < 1:
        raise ValueError(f"neighbours must be at least 1, not {neighbours}")
    if min(len(ref), len(sample)) <= neighbours:
        raise ValueError(
            f"{len(ref)} and {len(sample)} images are too few for {neighbours} neighbours; "
            f"each set needs at least {neighbours + 1}"
        )
    pairs = len(ref) ** 2 + len(sample) ** 2 + len(ref) * len(sample)
    dense = len(ref) > density_neighbours
    ranks = [neighbours, density_neighbours if dense else neighbours]
    ref_inside, sample_inside = np.zeros(len(ref), bool), np.zeros(len(sample), bool)
    covered, balls = np.zeros(len(ref), bool), 0
    with counting("neighbours", pairs / 1e6, "million pairs") as add:
        radii_ref, radii_dense = _radii(ref, ranks, block, add)
        (radii_sample,) = _radii(sample, [neighbours], block, add)
        for i, a in enumerate(blocks(ref, block)):
            rows = slice(i * block, i * block + len(a))
            # Each tile of distances serves all: precision looks along
            # one axis, recall the other.
            for j, b in enumerate(blocks(sample, block)):
                columns = slice(j * block, j * block + len(b))
                distance = _squared_distances(a, b)
                sample_inside[columns] |= (distance <= radii_ref[rows, None]).any(axis=0)
                ref_inside[rows] |= (distance <= radii_sample[columns]).any(axis=1)
                held = distance <= radii_dense[rows, None]
                covered[rows] |= held.any(axis=1)
                balls += int(np.count_nonzero(held))
            add(len(a) * len(sample) / 1e6)
    scores = {"precision": float(sample_inside.mean()), "recall": float(ref_inside.mean())}
    if dense:
        scores["density"] = balls / (density_neighbours * len(sample))
        scores["coverage"] = float(covered.mean())
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

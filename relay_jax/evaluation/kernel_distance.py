"""Kernel inception distance (KID; arXiv 1801.01401): a squared maximum mean discrepancy.

(1)  k(x, y) = (x . y / d + 1)^3,    d features
(2)  MMD^2 = mean k(a, a') + mean k(b, b') - 2 mean k(a, b),    over pairs of different images
(3)  KID = mean of (2) over 100 pairs of subsets of 1,000 images, drawn with a fixed seed

Unbiased, unlike a Frechet distance: its expectation does not depend on the number of images, and is
0 for sets of one distribution. So it may be negative, and has no ratio to that of real images.
"""

import numpy as np

from relay_jax.evaluation.statistics import BLOCK, FeatureSet, blocks, comparable

SUBSETS, SUBSET = 100, 1000
SETTINGS = {"kernel_subsets": SUBSETS, "kernel_subset_images": SUBSET}


def kernel_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Equation (2), float64. a, b: features [n, d] and [m, d], n, m >= 2.

    Memory: 8 (n + m)^2 bytes and some. Raises ValueError for shapes that do not fit.
    """
    a, b = comparable(a, b)
    if min(len(a), len(b)) < 2:
        raise ValueError(
            f"{len(a)} and {len(b)} images are too few for a kernel distance, which needs 2 of each"
        )
    a, b = a.astype(np.float64), b.astype(np.float64)
    return _mean_of_pairs(a) + _mean_of_pairs(b) - 2 * float(_kernel(a, b).mean())


def _kernel(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Equation (1) of all pairs: float64 [n, m]."""
    base = a @ b.T / a.shape[1] + 1
    # A power of floats would take longer than the product before.
    return base * base * base


def _mean_of_pairs(a: np.ndarray) -> float:
    # An image is always like itself: with those pairs the estimate would be biased.
    kernel, n = _kernel(a, a), len(a)
    return float((kernel.sum() - np.trace(kernel)) / (n * (n - 1)))


def kid(a: np.ndarray, b: np.ndarray, subsets: int = SUBSETS, subset: int = SUBSET) -> float:
    """Equation (3). a, b: features [n, d] and [m, d].

    Of smaller sets the subsets are as large as the smaller one; where both are as small, (2) of
    them. Raises ValueError as `kernel_mmd`.
    """
    a, b = comparable(a, b)
    size = min(subset, len(a), len(b))
    if len(a) == len(b) == size:
        return kernel_mmd(a, b)
    # RandomState's stream is frozen by NumPy. One for each set: the subsets of the reference do
    # not depend on the number of samples.
    draws = [np.random.RandomState(0), np.random.RandomState(1)]
    values = [
        kernel_mmd(
            *(
                features[rng.choice(len(features), size, replace=False)]
                for features, rng in zip((a, b), draws, strict=True)
            )
        )
        for _ in range(subsets)
    ]
    return float(np.mean(values))


def kernel_distance(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """KID, if both sets keep rows of features."""
    if reference.rows is None or samples.rows is None:
        return {}
    return {"KID": kid(reference.rows, samples.rows)}


def mmd_without(a: np.ndarray, b: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Equation (2) of a and of b without each group, float64 [g], from one pass over the pairs.

    a, b: features [n, d] and [m, d]. group: int [m], from 0 on, at least two images outside of
    each. Raises ValueError for shapes that do not fit.
    """
    a, b = comparable(a, b)
    member = np.eye(group.max() + 1)[group]
    own, cross, same = np.zeros((member.shape[1],) * 2), np.zeros(member.shape[1]), 0.0
    parts = list(zip(blocks(b, BLOCK), np.split(member, range(BLOCK, len(b), BLOCK)), strict=True))
    for rows, of_rows in parts:
        own -= of_rows.T @ (of_rows * np.diag(_kernel(rows, rows))[:, None])
        for others, of_others in parts:
            own += of_rows.T @ _kernel(rows, others) @ of_others
        for others in blocks(a, BLOCK):
            cross += of_rows.T @ _kernel(rows, others).sum(axis=1)
    for rows in blocks(a, BLOCK):
        same -= float(np.trace(_kernel(rows, rows)))
        same += sum(float(_kernel(rows, others).sum()) for others in blocks(a, BLOCK))
    n, rest = len(a), len(b) - member.sum(axis=0)
    inside = own.sum() - 2 * own.sum(axis=1) + np.diag(own)
    between = cross.sum() - cross
    return same / (n * (n - 1)) + inside / (rest * (rest - 1)) - 2 * between / (n * rest)


def kernel_distance_without(
    reference: FeatureSet, samples: FeatureSet, group: np.ndarray
) -> dict[str, np.ndarray]:
    """(2) of all images without those of each group: KID without the chance of its subsets."""
    if reference.rows is None or samples.rows is None:
        return {}
    return {"KID": mmd_without(reference.rows, samples.rows, group)}

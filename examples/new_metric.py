"""A metric of your own: the kernel distance (KID, arXiv 1801.01401), and features to measure it on.

One line in METRICS of relay_jax/evaluation/metrics.py adds it to every evaluation: --mode=evaluate,
the scores during a training, and its report.

    METRICS["KID"] = kernel_distance

Reports call it KID for Inception's features, and KID-NAME for others. Features of your own need no
line at all:

    python -m relay_jax.main --workdir=runs/demo --mode=evaluate \\
        --features=examples.new_metric:colour_features

In Python: `kernel_mmd(features_a, features_b)` of any two tables of features.

(1)  k(x, y) = (x . y / d + 1)^3
(2)  MMD^2 = mean k(a, a') + mean k(b, b') - 2 mean k(a, b),     a' another image than a

Unlike a Frechet distance its expectation does not depend on the number of images, so it may be
compared between sets of different sizes; it may be negative.
"""

from collections.abc import Mapping

import numpy as np

from relay_jax.evaluation.statistics import BLOCK, FeatureSet, blocks


def kernel_distance(reference: FeatureSet, samples: FeatureSet) -> Mapping[str, float]:
    """{"KID": equation (2)} of the rows of features that both sets keep; none without them."""
    # No score rather than an error: statistics read from a file come without rows, and the other
    # metrics can still be computed.
    if reference.rows is None or samples.rows is None:
        return {}
    return {"KID": kernel_mmd(reference.rows, samples.rows)}


def kernel_mmd(a: np.ndarray, b: np.ndarray) -> float:
    """Equation (2), unbiased. a, b: features [n, d] and [m, d], at least two rows of each.

    Raises ValueError for shapes that do not fit, which becomes one line for the user.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {list(a.shape)} and {list(b.shape)} cannot be compared")
    if min(len(a), len(b)) < 2:
        raise ValueError("the kernel distance needs at least two images of each set")
    between = _sum_of_kernel(a, b) / (len(a) * len(b))
    return _mean_of_pairs(a) + _mean_of_pairs(b) - 2 * between


def _sum_of_kernel(a: np.ndarray, b: np.ndarray) -> float:
    """Sum of equation (1) over all pairs of rows of a and b."""
    # In blocks, as 50,000 x 50,000 numbers would be 20 GB; and in float64, as the difference of
    # large means is what counts.
    return sum(
        float(np.sum((rows @ others.T / a.shape[1] + 1) ** 3))
        for rows in blocks(a, BLOCK)
        for others in blocks(b, BLOCK)
    )


def _mean_of_pairs(a: np.ndarray) -> float:
    """Mean of the kernel over pairs of different rows."""
    # An image is always like itself: with those pairs the estimate would be biased.
    itself = np.sum((np.sum(np.square(a, dtype=np.float64), axis=1) / a.shape[1] + 1) ** 3)
    return (_sum_of_kernel(a, a) - float(itself)) / (len(a) * (len(a) - 1))


def colour_features(pixels: np.ndarray) -> np.ndarray:
    """Mean and spread of each colour: uint8 [n, h, w, 3] -> float32 [n, 6]."""
    values = pixels.astype(np.float32) / 127.5 - 1
    # An image's row must not depend on the others: sets are measured in batches of any size.
    return np.concatenate([values.mean(axis=(1, 2)), values.std(axis=(1, 2))], axis=1)

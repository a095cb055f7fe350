"""A metric of your own, the energy distance (Szekely and Rizzo 2013), and features for it.

One line in METRICS of relay_jax/evaluation/metrics.py adds it to every evaluation: --mode=evaluate,
the scores during a training, and its report.

    METRICS["energy"] = energy_distance

Reports call it energy for Inception's features, and energy-NAME for others. Features of your own
need no line at all:

    python -m relay_jax.main --workdir=runs/demo --mode=evaluate \\
        --features=examples.new_metric:colour_features

In Python: `energy(features_a, features_b)` of any two tables of features.

(1)  E = 2 mean |a - b| - mean |a - a'| - mean |b - b'|,     a' another image than a

Unlike a Frechet distance its expectation does not depend on the number of images, so it may be
compared between sets of different sizes; it may be negative.
"""

from collections.abc import Mapping

import numpy as np
from scipy.spatial.distance import cdist

from relay_jax.evaluation.statistics import BLOCK, FeatureSet, blocks


def energy_distance(reference: FeatureSet, samples: FeatureSet) -> Mapping[str, float]:
    """{"energy": equation (1)} of the rows of features that both sets keep; none without them."""
    # No score rather than an error: statistics read from a file come without rows, and the other
    # metrics can still be computed.
    if reference.rows is None or samples.rows is None:
        return {}
    return {"energy": energy(reference.rows, samples.rows)}


def energy(a: np.ndarray, b: np.ndarray) -> float:
    """Equation (1), unbiased. a, b: features [n, d] and [m, d], at least two rows of each.

    Raises ValueError for shapes that do not fit, which becomes one line for the user.
    """
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features {list(a.shape)} and {list(b.shape)} cannot be compared")
    if min(len(a), len(b)) < 2:
        raise ValueError("the energy distance needs at least two images of each set")
    # An image is at no distance of itself: those pairs are not counted.
    within = [_sum_of_distances(x, x) / (len(x) * (len(x) - 1)) for x in (a, b)]
    return 2 * _sum_of_distances(a, b) / (len(a) * len(b)) - sum(within)


def _sum_of_distances(a: np.ndarray, b: np.ndarray) -> float:
    """Over all pairs of rows of a and b."""
    # In blocks, as 50,000 x 50,000 numbers would be 20 GB; and in float64, as the difference of
    # large means is what counts.
    return sum(
        float(cdist(rows, others).sum()) for rows in blocks(a, BLOCK) for others in blocks(b, BLOCK)
    )


def colour_features(pixels: np.ndarray) -> np.ndarray:
    """Mean and spread of each colour: uint8 [n, h, w, 3] -> float32 [n, 6]."""
    values = pixels.astype(np.float32) / 127.5 - 1
    # An image's row must not depend on the others: sets are measured in batches of any size.
    return np.concatenate([values.mean(axis=(1, 2)), values.std(axis=(1, 2))], axis=1)

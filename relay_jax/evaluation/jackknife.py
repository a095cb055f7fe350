"""Standard errors of scores by a jackknife over the samples.

The images are divided at random into G = 10 groups, and with s_g the score without group g
(1)  error^2 = (G - 1)/G sum_g (s_g - mean s)^2
(2)  of a difference between two sets of samples: (1) with s_g the difference. It is smaller than
     the errors of both where they share seeds: they share the groups.
KID's s_g is what its subsets estimate, from all images: drawn anew for each g they would add their
own chance. A bootstrap would repeat images, and so put the radii of precision and recall to zero.
The reference counts as it is.
"""

from collections.abc import Callable, Mapping

import numpy as np

from relay_jax.evaluation.kernel_distance import kernel_distance_without
from relay_jax.evaluation.metrics import score, score_name
from relay_jax.evaluation.neighbours import shares_without
from relay_jax.evaluation.statistics import FeatureSet, feature_stats
from relay_jax.runtime.counting import counted

GROUPS = 10
# Metrics that know all s_g from one pass over the pairs of images.
AT_ONCE = {"KID": kernel_distance_without, "neighbours": shares_without}

Groups = dict[str, np.ndarray]  # s_g by name: [GROUPS]


def scores_without(reference: FeatureSet, samples: FeatureSet, features: str) -> Groups:
    """Scores of the samples without each of the groups.

    samples: with rows of all of them; what has no rows, such as spatial statistics, has no groups.
    features: name of the extractor. Raises DataError as `score`.
    """
    values = jackknife(samples, lambda part: score(reference, part, features, AT_ONCE))
    group = _groups(samples.count)
    for metric in AT_ONCE.values():
        groups = metric(reference, samples, group)
        values |= {score_name(name, features): each for name, each in groups.items()}
    return values


def _groups(count: int) -> np.ndarray:
    # At random, but always alike: classes follow the seeds, and
    # groups are shared by all samplers.
    return np.random.default_rng(0).permutation(count) % GROUPS


def jackknife(
    samples: FeatureSet, scores_of: Callable[[FeatureSet], Mapping[str, float]]
) -> Groups:
    """What a function makes of the samples without each of the groups."""
    rows, probabilities = samples.rows, samples.probabilities
    assert rows is not None
    group = _groups(len(rows))
    values: dict[str, list[float]] = {}
    for number in counted(range(GROUPS), "errors of the scores", GROUPS, "groups"):
        rest = group != number
        part = FeatureSet(
            count=int(rest.sum()),
            statistics={"pool": feature_stats(rows[rest])},
            rows=rows[rest],
            probabilities=None if probabilities is None else probabilities[rest],
        )
        for name, value in scores_of(part).items():
            values.setdefault(name, []).append(value)
    return {name: np.asarray(each) for name, each in values.items()}


def standard_error(without: np.ndarray) -> float:
    """Equation (1). without: s_g, [GROUPS]."""
    return float(np.sqrt((len(without) - 1) * np.mean((without - without.mean()) ** 2)))

"""Scores of images from their features and class probabilities (docs/math.md section 9).

FID, sFID (arXiv 1706.08500):       |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),
                                    covariances with n - 1, no epsilon
inception score (arXiv 1606.03498): mean over splits of exp(mean over images of
                                    KL(p(y|x) || p(y)))
MIND, KID, neighbours:              sliced_distance.py, kernel_distance.py, neighbours.py

Everything is float64 on the host: the matrix root and
|a|^2 + |b|^2 - 2 a.b lose half of the digits, TPUs have no float64,
and counting points on the edge of a ball must not depend on the
machine. Cost with 2048 features: FID under a minute on two cores;
neighbours of 50,000 samples 1e13 flops, minutes on a server.

A new metric is a function of two `FeatureSet`s, in a file of its own,
and a line in METRICS, or DISTANCES.
"""

from collections.abc import Callable, Collection, Mapping

import numpy as np
from absl import logging
from scipy import linalg
from scipy.special import rel_entr

from relay_jax.errors import DataError
from relay_jax.evaluation import kernel_distance, neighbours, sliced_distance
from relay_jax.evaluation.statistics import FeatureSet, blocks, checked, feature_stats

SPLIT = 5000
SETTINGS = {
    "inception_score_split": SPLIT,
    "covariance": "divided by n - 1, float64",
    **neighbours.SETTINGS,
    **kernel_distance.SETTINGS,
    **sliced_distance.SETTINGS,
}


def _root(covariance: np.ndarray) -> np.ndarray:
    """F [d, d] with F F^T = covariance, for a positive semidefinite matrix of any rank."""
    values, vectors = linalg.eigh(covariance)
    # Below this the eigenvalue of a singular matrix is rounding; its
    # root would not be.
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0
    return vectors * np.sqrt(values)


def frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Squared Frechet (Wasserstein-2) distance of two gaussians: means [d], covariances [d, d].

    Never negative. Raises ValueError for shapes that do not fit or
    numbers that are not finite.
    """
    arrays = [np.asarray(x, np.float64) for x in (mean_a, cov_a, mean_b, cov_b)]
    d = arrays[0].size
    if [x.shape for x in arrays] != [(d,), (d, d)] * 2:
        raise ValueError(
            f"means and covariances do not fit: {', '.join(str(list(x.shape)) for x in arrays)}"
        )
    if not all(np.isfinite(x).all() for x in arrays):
        raise ValueError("means or covariances are not finite")
    mean_a, cov_a, mean_b, cov_b = arrays
    # With A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the
    # singular values of F^T G. Unlike roots of the eigenvalues of A
    # B, these are exact to rounding also where a covariance is
    # singular (fewer images than features).
    cross = linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    # Equal arguments give rounding of either sign.
    return max(float(distance), 0.0)


def fid(features_ref: np.ndarray, features_sample: np.ndarray) -> float:
    """Frechet distance of the gaussians fitted to features [n, d] and [m, d], at least two of each.

    Inception pool features give FID, the 2023 spatial ones sFID.
    Raises ValueError as the functions above.
    """
    return frechet_distance(*feature_stats(features_ref), *feature_stats(features_sample))


def inception_score(probabilities: np.ndarray, split_size: int = SPLIT) -> float:
    """exp(mean KL(p(y|x) || mean p(y|x))) of each split, then the mean over splits.

    probabilities: [n, classes], rows that sum to 1 (softmax of the
    logits without bias, as ADM), in the order of the images. Raises
    ValueError for a split_size below 1 or other rows.
    """
    probabilities = checked(probabilities, "probabilities")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, not {split_size}")
    scores = []
    # The last split may be shorter and counts fully, as in the
    # official code.
    for p in blocks(probabilities, split_size):
        if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
            raise ValueError("probabilities of an image must not be negative and must sum to 1")
        scores.append(np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()))
    return float(np.mean(scores))


# What a report calls scores. Each function takes the reference and
# the samples, and returns scores by name, none if one of the two has
# not what it needs; ValueError becomes one line for the user.

Metric = Callable[[FeatureSet, FeatureSet], Mapping[str, float]]


def _distance(
    name: str, output: str, reference: FeatureSet, samples: FeatureSet
) -> dict[str, float]:
    """The Frechet distance of one output of the extractor."""
    if output not in reference.statistics or output not in samples.statistics:
        return {}
    dims = len(samples.statistics[output][0])
    if dims > 1000:
        # Half a minute without another line.
        logging.info("%s: matrix roots of %d features", output, dims)
    pairs = (reference.statistics[output], samples.statistics[output])
    return {name: frechet_distance(*pairs[0], *pairs[1])}


def pool_distance(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """FID, if both sets have statistics of the pool features."""
    return _distance("FID", "pool", reference, samples)


def spatial_distance(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """sFID, if both sets have statistics of the spatial features."""
    return _distance("sFID", "spatial", reference, samples)


def sample_diversity(reference: FeatureSet, samples: FeatureSet) -> dict[str, float]:
    """The inception score of the samples, if their class probabilities are known."""
    if samples.probabilities is None:
        return {}
    return {"IS": inception_score(samples.probabilities, SPLIT)}


# Above zero also for finite sets of one distribution: beside their value a report has its ratio to
# that of held-out real images.
DISTANCES: dict[str, Metric] = {
    "FID": pool_distance,
    "sFID": spatial_distance,
    "MIND": sliced_distance.sliced_distance,
}
METRICS: dict[str, Metric] = {
    "KID": kernel_distance.kernel_distance,
    "IS": sample_diversity,
    "neighbours": neighbours.neighbour_shares,
}


def score_name(name: str, features: str) -> str:
    """Inception's scores have their own names; of other features NAME, FID is FD-NAME and so on."""
    if features == "inception":
        return name
    # FID means Inception's features and nothing else.
    return f"{name.replace('FID', 'FD')}-{features}"


def score(
    reference: FeatureSet,
    samples: FeatureSet,
    features: str,
    but: Collection[str] = (),
) -> dict[str, float]:
    """Every score of METRICS that both sets have what it takes for, by its `score_name`.

    features: name of the extractor; but: metrics that are left out. Raises DataError, for instance
    for too few images.
    """
    scores: dict[str, float] = {}
    for name, metric in (DISTANCES | METRICS).items():
        if name in but:
            continue
        try:
            values = metric(reference, samples)
        except ValueError as error:
            raise DataError(f"{features} features of {samples.count} samples: {error}") from error
        scores |= {score_name(each, features): value for each, value in values.items()}
    return scores


def ratios(
    scores: Mapping[str, float], real: Mapping[str, float], features: str
) -> dict[str, float]:
    """Each of DISTANCES over that of as many real images, none of them in the reference, by name.

    1 is what a perfect network would get. KID has none: that of real images is 0 but for chance.
    """
    names = [score_name(name, features) for name in DISTANCES]
    return {n: scores[n] / real[n] for n in names if n in scores and real.get(n, 0) > 0}


def notes(samples: FeatureSet, features: str) -> list[str]:
    """What a reader of the scores has to know. features: name of the extractor."""
    dims = len(samples.statistics["pool"][0])
    lines = []
    if features != "inception":
        lines.append(
            f"FD-{features} is not FID, and the other scores are not the published ones: compare "
            f"them only with those of {features} features of as many images of the same size."
        )
    if samples.count < 50_000:
        lines.append(
            f"{samples.count:,} samples: a Frechet distance, and MIND, fall as the number of "
            "images grows; published ones are of 50,000 (ImageNet) or 30,000 (CelebA-HQ)."
        )
    if samples.count <= dims:
        lines.append(
            f"Fewer samples than features ({samples.count} and {dims}): their covariance is "
            "singular."
        )
    return lines

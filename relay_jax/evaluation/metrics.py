"""Scores of a set of images from their features and class probabilities (SPEC section 9).

FID, sFID (arXiv 1706.08500):       |m_a - m_b|^2 + tr A + tr B - 2 tr (A B)^(1/2),   covariances with n - 1, no epsilon
precision, recall (arXiv 1904.06991): share of one set inside the union of k-nearest-neighbour
balls of the other inception score (arXiv 1606.03498):  mean over splits of exp(mean over images
of KL(p(y|x) || p(y)))

Everything is float64 on the host: the matrix root and |a|^2 + |b|^2 - 2 a.b lose half of the
digits, TPUs have no float64, and counting points on the edge of a ball must not depend on the
machine. Cost with 2048 features: FID under a minute on two cores; precision and recall of
50,000 samples 1e13 flops, minutes on a server.
"""

from collections.abc import Callable, Iterator

import numpy as np
from scipy import linalg
from scipy.special import rel_entr

Tick = Callable[[int], None]  # is told how many pairs of points have been compared
BLOCK = 2048  # rows of features in float64 at a time; a tile of distances is BLOCK x BLOCK (32 MB)


def _checked(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features as an array [n, d]. Raises ValueError for another shape, an empty one or
    numbers not finite."""
    features = np.asarray(features)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(
            f"{name} must be a table of images by features, not of shape {list(features.shape)}"
        )
    bad = sum(
        int(np.count_nonzero(~np.isfinite(rows).all(axis=1))) for rows in _blocks(features, BLOCK)
    )
    if bad:
        raise ValueError(f"{bad} of {len(features)} images have {name} that are not finite")
    return features


def _blocks(features: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows in float64, `size` at a time."""
    for start in range(0, len(features), size):
        yield np.asarray(features[start : start + size], np.float64)


class Moments:
    """Mean and covariance of features that arrive in parts, on one host or on several.

    count: rows so far; mean: float64 [d]; scatter: float64 [d, d], sum of (x - mean)(x -
    mean)^T. Three arrays that hosts may exchange. Parts are combined by their means (Chan,
    Golub and LeVeque), so that no digits are lost to a large common offset, as in E[x x^T] - m m^T.
    """

    def __init__(self, dims: int) -> None:
        self.count, self.mean, self.scatter = 0, np.zeros(dims), np.zeros((dims, dims))

    def update(self, features: np.ndarray) -> None:
        """Adds features [n, d]. Raises ValueError for another d or numbers that are not finite."""
        features = _checked(features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"{features.shape[1]} features per image do not fit to {len(self.mean)}"
            )
        for rows in _blocks(features, BLOCK):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Adds all that the other has seen; the other is left as it is. Raises ValueError for
        another d."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"{len(other.mean)} features per image do not fit to {len(self.mean)}")
        self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        total, offset = self.count + count, mean - self.mean
        self.scatter += scatter + np.outer(offset, offset) * (self.count * count / total)
        self.mean += offset * (count / total)
        self.count = total

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] (divided by n - 1). Raises ValueError for fewer than
        two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.mean.copy(), self.scatter / (self.count - 1)


def feature_stats(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features [n, d], n >= 2: float64 [d] and [d, d]. Raises ValueError
    as `Moments` does."""
    features = _checked(features)
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.statistics()


def _root(covariance: np.ndarray) -> np.ndarray:
    """F [d, d] with F F^T = covariance, for a symmetric positive semidefinite matrix of
    whatever rank."""
    values, vectors = linalg.eigh(covariance)
    # Below this the eigenvalue of a singular matrix is rounding; its root would not be.
    values[values < len(values) * np.finfo(np.float64).eps * values[-1]] = 0
    return vectors * np.sqrt(values)


def frechet_distance(
    mean_a: np.ndarray, cov_a: np.ndarray, mean_b: np.ndarray, cov_b: np.ndarray
) -> float:
    """Squared Frechet (Wasserstein-2) distance of two gaussians: means [d], covariances [d, d].

    With A = F F^T and B = G G^T, tr (A B)^(1/2) is the sum of the singular values of F^T G.
    Unlike roots of the eigenvalues of A B, these are exact to rounding also where a covariance
    is singular (fewer images than features).
    Never negative. Raises ValueError for shapes that do not fit or numbers that are not finite.
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
    cross = linalg.svdvals(_root(cov_a).T @ _root(cov_b)).sum()
    distance = np.sum((mean_a - mean_b) ** 2) + np.trace(cov_a) + np.trace(cov_b) - 2 * cross
    return max(float(distance), 0.0)  # equal arguments give rounding of either sign


def fid(features_ref: np.ndarray, features_sample: np.ndarray) -> float:
    """Frechet distance of the gaussians fitted to features [n, d] and [m, d], at least two of each.

    Inception pool features give FID, the 2023 spatial ones sFID. Raises ValueError as the
    functions above.
    """
    return frechet_distance(*feature_stats(features_ref), *feature_stats(features_sample))


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """|a_i - b_j|^2, float64 [n, m]; a: [n, d], b: [m, d]. Rounding below zero is clipped, as
    in the official code."""
    return np.maximum(np.sum(a * a, axis=1)[:, None] + np.sum(b * b, axis=1) - 2 * (a @ b.T), 0)


def _radii(features: np.ndarray, neighbours: int, block: int, tick: Tick) -> np.ndarray:
    """Squared distance of each point to its `neighbours`-th nearest other one, [n]; float32, as
    officially."""
    radii = []
    for rows in _blocks(features, block):
        nearest = np.full((len(rows), 0), np.inf)
        for others in _blocks(features, block):
            nearest = np.concatenate([nearest, _squared_distances(rows, others)], axis=1)
            if nearest.shape[1] > neighbours + 1:  # the point itself is one of them
                nearest = np.partition(nearest, neighbours, axis=1)[:, : neighbours + 1]
        radii.append(nearest.max(axis=1).astype(np.float32))
        tick(len(rows) * len(features))
    return np.concatenate(radii)


def precision_recall(
    ref: np.ndarray,
    sample: np.ndarray,
    neighbours: int = 3,
    block: int = BLOCK,
    progress: Callable[[float], None] | None = None,
) -> tuple[float, float]:
    """Improved precision and recall of features: ref [n, d], sample [m, d], n and m above
    `neighbours`.

    The ball of a point reaches to its `neighbours`-th nearest other point of its own set,
    border included.
    Precision: share of samples inside some ball of ref; recall: share of ref inside some ball
    of the samples.
    block: points per tile of distances; memory grows with its square and not with n. The
    official protocol takes
    10,000 reference images. progress: is told the share of the work that is done, after every
    row of tiles.
    Raises ValueError for too few points, other shapes and numbers that are not finite.
    """
    ref, sample = _checked(ref), _checked(sample)
    if ref.shape[1] != sample.shape[1]:
        raise ValueError(
            f"{ref.shape[1]} and {sample.shape[1]} features per image cannot be compared"
        )
    if neighbours < 1:
        raise ValueError(f"neighbours must be at least 1, not {neighbours}")
    if min(len(ref), len(sample)) <= neighbours:
        raise ValueError(
            f"{len(ref)} and {len(sample)} images are too few for {neighbours} neighbours; "
            "each set needs "
            f"at least {neighbours + 1}"
        )
    total, done = len(ref) ** 2 + len(sample) ** 2 + len(ref) * len(sample), 0

    def tick(pairs: int) -> None:
        nonlocal done
        done += pairs
        if progress is not None:
            progress(done / total)

    radii_ref, radii_sample = (
        _radii(ref, neighbours, block, tick),
        _radii(sample, neighbours, block, tick),
    )
    ref_found, sample_found = np.zeros(len(ref), bool), np.zeros(len(sample), bool)
    for i, a in enumerate(_blocks(ref, block)):
        rows = slice(i * block, i * block + len(a))
        for j, b in enumerate(_blocks(sample, block)):
            columns = slice(j * block, j * block + len(b))
            distance = _squared_distances(a, b)
            sample_found[columns] |= (distance <= radii_ref[rows, None]).any(axis=0)
            ref_found[rows] |= (distance <= radii_sample[columns]).any(axis=1)
        tick(len(a) * len(sample))
    return float(sample_found.mean()), float(ref_found.mean())


def inception_score(probabilities: np.ndarray, split_size: int = 5000) -> float:
    """exp(mean KL(p(y|x) || mean p(y|x))) of each split, then the mean over splits.

    probabilities: [n, classes], rows that sum to 1 (softmax of the logits without bias, as
    ADM), in the order of the
    images. The last split may be shorter and counts fully, as in the official code.
    Raises ValueError for a split_size below 1 or rows that are no distributions.
    """
    probabilities = _checked(probabilities, "probabilities")
    if split_size < 1:
        raise ValueError(f"split_size must be at least 1, not {split_size}")
    scores = []
    for p in _blocks(probabilities, split_size):
        if p.min() < 0 or np.abs(p.sum(axis=1) - 1).max() > 1e-3:
            raise ValueError("probabilities of an image must not be negative and must sum to 1")
        scores.append(np.exp(rel_entr(p, p.mean(axis=0)).sum(axis=1).mean()))
    return float(np.mean(scores))

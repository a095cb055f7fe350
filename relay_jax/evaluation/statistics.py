"""From a set of images to what the metrics need of it: moments, kept features, class probabilities.

Each host takes its share of the images, with its own devices;
moments are merged and rows gathered at the end, so that every host
ends with all of it. Features are float32, as the networks give them;
moments are float64 on the host: TPUs have no float64.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import jax
import numpy as np

from relay_jax.errors import DataError, Stopped
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ImageSet, choice
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import Progress
from relay_jax.runtime.sharding import padded

DECODED_BATCHES = 4  # of the extractor, read at a time
BLOCK = 2048  # rows of features in float64 at a time
STATISTICS = ("pool", "spatial")


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of a set of images.

    statistics: mean [d] and covariance [d, d], float64, by output
    ("pool", "spatial"). rows: pool features of the images kept for
    precision and recall, float32 [m, d]. probabilities: of every
    image, float32 [n, classes].
    """

    count: int
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    rows: np.ndarray | None = None
    probabilities: np.ndarray | None = None


def checked(features: np.ndarray, name: str = "features") -> np.ndarray:
    """The features as an array [n, d].

    Raises ValueError for another shape, an empty array or numbers
    that are not finite.
    """
    features = np.asarray(features)
    if features.ndim != 2 or features.size == 0:
        raise ValueError(
            f"{name} must be a table of images by features, not of shape {list(features.shape)}"
        )
    bad = sum(
        int(np.count_nonzero(~np.isfinite(rows).all(axis=1))) for rows in blocks(features, BLOCK)
    )
    if bad:
        raise ValueError(f"{bad} of {len(features)} images have {name} that are not finite")
    return features


def comparable(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Two tables of as many features, `checked`. Raises ValueError."""
    a, b = checked(a), checked(b)
    if a.shape[1] != b.shape[1]:
        raise ValueError(f"{a.shape[1]} and {b.shape[1]} features per image cannot be compared")
    return a, b


def blocks(features: np.ndarray, size: int) -> Iterator[np.ndarray]:
    """The rows in float64, `size` at a time."""
    # A whole set in float64 would double the memory of 50,000 images
    # of Inception.
    for start in range(0, len(features), size):
        yield np.asarray(features[start : start + size], np.float64)


class Moments:
    """Mean and covariance of features that arrive in parts, on one host or on several.

    count: rows so far; mean: float64 [d]; scatter: float64
    [d, d], the sum of (x - mean)(x - mean)^T. Three arrays that
    hosts may exchange.
    """

    def __init__(self, dims: int) -> None:
        self.count, self.mean, self.scatter = (
            0,
            np.zeros(dims),
            np.zeros((dims, dims)),
        )

    def update(self, features: np.ndarray) -> None:
        """Adds features [n, d]. Raises ValueError for another d or numbers that are not finite."""
        features = checked(features)
        if features.shape[1] != len(self.mean):
            raise ValueError(
                f"{features.shape[1]} features per image do not fit to {len(self.mean)}"
            )
        for rows in blocks(features, BLOCK):
            mean = rows.mean(axis=0)
            centred = rows - mean
            self._add(len(rows), mean, centred.T @ centred)

    def merge(self, other: "Moments") -> None:
        """Adds the rows of the other, which stays as it is. Raises ValueError for another d."""
        if len(other.mean) != len(self.mean):
            raise ValueError(f"{len(other.mean)} features per image do not fit to {len(self.mean)}")
        self._add(other.count, other.mean, other.scatter)

    def _add(self, count: int, mean: np.ndarray, scatter: np.ndarray) -> None:
        if count == 0:
            return
        # Parts are combined by their means (Chan, Golub and
        # LeVeque), so that no digits are lost to a large common
        # offset, as they would be in E[x x^T] - m m^T.
        total, offset = self.count + count, mean - self.mean
        self.scatter += scatter + np.outer(offset, offset) * (self.count * count / total)
        self.mean += offset * (count / total)
        self.count = total

    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean [d] and covariance [d, d] (divided by n - 1). Raises ValueError below two images."""
        if self.count < 2:
            raise ValueError(f"a covariance needs at least 2 images, not {self.count}")
        return self.mean.copy(), self.scatter / (self.count - 1)


def feature_stats(features: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance of features [n, d], n >= 2: float64 [d] and [d, d].

    Raises ValueError as `Moments` does.
    """
    features = checked(features)
    moments = Moments(features.shape[1])
    moments.update(features)
    return moments.statistics()


def collect(
    images: ImageSet,
    extractor: FeatureExtractor,
    *,
    what: str,
    rows: int = 0,
    probabilities: bool = False,
    stop: bool = True,
) -> FeatureSet:
    """Features of all images. All processes must call it, with the same set.

    what: names the set in progress and errors. rows: keep so many
    pool features at most, of images that are always the same
    (`choice`). probabilities: keep those of all images, if the
    extractor has them. stop: answer SIGTERM here.
    Raises DataError for an unreadable image or features that are not
    finite, Stopped after SIGTERM.
    """
    host, hosts = jax.process_index(), jax.process_count()
    streams = {name: _Stream() for name in STATISTICS if name in extractor.outputs}
    kept_positions = choice(len(images), rows) if rows else np.zeros(0, int)
    kept, guesses = _Rows(), _Rows()
    with_guesses = probabilities and "probabilities" in extractor.outputs
    progress, done = Progress(what, len(images)), 0
    # Only errors: Stopped comes to all processes at once, and must
    # not be turned into an error.
    with distributed.agree(errors=(ValueError,)):
        for positions, pixels in images.share(host, hosts, DECODED_BATCHES * extractor.batch):
            if len(pixels):
                outputs = extractor(pixels)
                try:
                    for name, stream in streams.items():
                        stream.add(outputs[name])
                except ValueError as error:
                    raise DataError(f"{what}, {extractor.name}: {error}") from error
                kept.add(positions, outputs["pool"], np.isin(positions, kept_positions))
                if with_guesses:
                    guesses.add(positions, outputs["probabilities"])
            done += len(pixels)
            seen = min(done * hosts, len(images))
            progress.update(seen)
            # Every host has as many parts, so all of them ask
            # equally often.
            if stop and distributed.stop_requested():
                raise Stopped(
                    f"stopped by SIGTERM after {seen:,} of {len(images):,} images of {what}"
                )
    return FeatureSet(
        count=len(images),
        statistics={name: _merged(stream.moments(), what) for name, stream in streams.items()},
        rows=kept.gathered() if rows else None,
        probabilities=guesses.gathered() if with_guesses else None,
    )


class _Stream:
    """Moments of features that arrive in small parts."""

    # They wait for each other: a product of few rows with 2048
    # columns costs as much as of many.

    def __init__(self) -> None:
        self._moments: Moments | None = None
        self._waiting: list[np.ndarray] = []

    def add(self, features: np.ndarray) -> None:
        bad = int(np.count_nonzero(~np.isfinite(features).all(axis=1)))
        if bad:
            raise ValueError(
                f"{bad} of {len(features)} images in a batch have features that are not finite"
            )
        self._waiting.append(features)
        if sum(map(len, self._waiting)) >= BLOCK:
            self._update()

    def _update(self) -> None:
        if self._waiting:
            features, self._waiting = np.concatenate(self._waiting), []
            self._moments = self._moments or Moments(features.shape[1])
            self._moments.update(features)

    def moments(self) -> Moments | None:
        self._update()
        return self._moments


def _merged(part: Moments | None, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over all processes. part: of this one, None if it had no images."""
    dims = int(distributed.of_all(np.asarray(len(part.mean) if part else 0)).max())
    part = part or Moments(dims)
    counts, means, scatters = (
        distributed.of_all(np.asarray(x)) for x in (part.count, part.mean, part.scatter)
    )
    total = Moments(dims)
    for count, mean, scatter in zip(counts, means, scatters, strict=True):
        of_host = Moments(dims)
        of_host.count, of_host.mean, of_host.scatter = int(count), mean, scatter
        total.merge(of_host)
    try:
        return total.statistics()
    except ValueError as error:
        raise DataError(f"{what}: {error}") from error


class _Rows:
    """Rows of features that are kept, with the positions of their images."""

    def __init__(self) -> None:
        self._positions: list[np.ndarray] = []
        self._rows: list[np.ndarray] = []

    def add(
        self,
        positions: np.ndarray,
        rows: np.ndarray,
        keep: np.ndarray | slice = slice(None),
    ) -> None:
        self._positions.append(positions[keep])
        self._rows.append(rows[keep])

    def gathered(self) -> np.ndarray:
        """The rows of all processes in the order of the images, float32 [n, d]."""
        positions = np.concatenate(self._positions) if self._rows else np.zeros(0, int)
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, 0), np.float32)
        if jax.process_count() > 1:
            # Arrays travel in one shape: a host may have fewer
            # images than another, or none.
            counts, dims = distributed.of_all(np.asarray(rows.shape)).T
            if not rows.shape[1]:
                rows = np.zeros((0, dims.max()), np.float32)
            all_positions, all_rows = (
                distributed.of_all(padded(x, counts.max())) for x in (positions, rows)
            )
            positions, rows = (
                np.concatenate([x[:count] for x, count in zip(of_hosts, counts, strict=True)])
                for of_hosts in (all_positions, all_rows)
            )
        # Features come in the order of the batches, which generated
        # images take by their seeds.
        return rows[np.argsort(positions)]

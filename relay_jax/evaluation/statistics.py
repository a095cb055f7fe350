"""From a set of images to what the metrics need of it: moments, kept features, class probabilities.

Each host takes its share of the images, with its own devices; moments are merged and rows
gathered at the end, so that every host ends with all of it. Features are float32, as the
networks give them; moments are float64.
"""

import time
from dataclasses import dataclass, field

import jax
import numpy as np

from relay_jax.data.images import DataError
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ImageSet, chosen
from relay_jax.evaluation.metrics import BLOCK, Moments
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import Progress

DECODED_BATCHES = 4  # of the extractor, read at a time
EVERY_SECONDS = 5.0  # between lines of progress
STATISTICS = ("pool", "spatial")


@dataclass(frozen=True, kw_only=True)
class FeatureSet:
    """Features of a set of images.

    statistics: mean [d] and covariance [d, d], float64, by output ("pool", "spatial"). rows:
    pool features of the images kept for precision and recall, float32 [m, d]. probabilities: of
    every image, float32 [n, classes].
    """

    count: int
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)
    rows: np.ndarray | None = None
    probabilities: np.ndarray | None = None


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

    what: names the set in progress and errors. rows: keep so many pool features at most, of
    images that are always the same (`chosen`). probabilities: keep those of all images, if the
    extractor has them. stop: answer SIGTERM here.
    Raises DataError for an unreadable image or features that are not finite, Stopped after SIGTERM.
    """
    host, hosts = jax.process_index(), jax.process_count()
    streams = {name: _Stream() for name in STATISTICS if name in extractor.outputs}
    wanted = chosen(len(images), rows) if rows else np.zeros(0, int)
    told = probabilities and "probabilities" in extractor.outputs
    kept, known = _Rows(), _Rows()

    def read() -> None:
        progress, last, done, spoken = Progress(what, len(images)), time.monotonic(), 0, False
        for positions, pixels in images.share(host, hosts, DECODED_BATCHES * extractor.batch):
            if len(pixels):
                outputs = extractor(pixels)
                try:
                    for name, stream in streams.items():
                        stream.add(outputs[name])
                except ValueError as error:
                    raise DataError(f"{what}, {extractor.name}: {error}") from error
                kept.add(positions, outputs["pool"], np.isin(positions, wanted))
                if told:
                    known.add(positions, outputs["probabilities"])
            done += len(pixels)
            seen = min(done * hosts, len(images))
            if time.monotonic() - last > EVERY_SECONDS or (spoken and seen == len(images)):
                progress.line(seen)
                last, spoken = time.monotonic(), True
            if stop and distributed.stop_requested():
                raise distributed.Stopped(
                    f"stopped by SIGTERM after {seen:,} of {len(images):,} images of {what}"
                )

    distributed.everywhere(
        read, errors=(ValueError,)
    )  # an image that one of them cannot read ends all
    return FeatureSet(
        count=len(images),
        statistics={name: _merged(stream.moments(), what) for name, stream in streams.items()},
        rows=kept.gathered() if rows else None,
        probabilities=known.gathered() if told else None,
    )


class _Stream:
    """Moments of features that arrive in small parts: a product of few rows with 2048 columns
    costs as much as of many."""

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


def _merged(own: Moments | None, what: str) -> tuple[np.ndarray, np.ndarray]:
    """Mean and covariance over all processes; one may have had no images."""
    dims = int(distributed.of_all(np.asarray(len(own.mean) if own else 0)).max())
    own = own or Moments(dims)
    counts, means, scatters = (
        distributed.of_all(np.asarray(x)) for x in (own.count, own.mean, own.scatter)
    )
    total = Moments(dims)
    for count, mean, scatter in zip(counts, means, scatters, strict=True):
        part = Moments(dims)
        part.count, part.mean, part.scatter = int(count), mean, scatter
        total.merge(part)
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
        self, positions: np.ndarray, rows: np.ndarray, keep: np.ndarray | slice = slice(None)
    ) -> None:
        self._positions.append(positions[keep])
        self._rows.append(rows[keep])

    def gathered(self) -> np.ndarray:
        """The rows of all processes in the order of the images, float32 [n, d]."""
        positions = np.concatenate(self._positions) if self._rows else np.zeros(0, int)
        rows = np.concatenate(self._rows) if self._rows else np.zeros((0, 0), np.float32)
        if jax.process_count() > 1:
            counts, dims = distributed.of_all(np.asarray(rows.shape)).T
            padded, places = (
                np.zeros((counts.max(), dims.max()), np.float32),
                np.zeros(counts.max(), int),
            )
            padded[: len(rows), : rows.shape[1]], places[: len(rows)] = rows, positions
            told = zip(distributed.of_all(places), distributed.of_all(padded), counts, strict=True)
            cut = [(p[:count], r[:count]) for p, r, count in told]
            positions, rows = (
                np.concatenate([p for p, _ in cut]),
                np.concatenate([r for _, r in cut]),
            )
        return rows[np.argsort(positions)]

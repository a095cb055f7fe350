"""What samples are compared with.

    folder, data set    all images (or a choice), cropped and resized as in training to the size
                        of the samples
    npz                 ADM's VIRTUAL_*.npz: `mu`, `sigma` (pool features) and `mu_s`, `sigma_s`
                        (spatial) of Inception over a whole data set, and `arr_0`, images for
                        precision and recall; EDM's fid-refs: `mu`, `sigma`; any npz with `arr_0`

Features of images are kept in a cache, under a hash of all that they
depend on: the images, their preparation, the network. A damaged or
foreign file there is computed again.
"""

import json
import zipfile
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from relay_jax.data.folder import ImageFolder
from relay_jax.data.source import Source
from relay_jax.errors import DataError, StorageError, one_line
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ImageSet, SourceImages, npz_source
from relay_jax.evaluation.metrics import NEIGHBOURS
from relay_jax.evaluation.statistics import FeatureSet, collect
from relay_jax.runtime import distributed
from relay_jax.runtime.distributed import is_first
from relay_jax.runtime.files import digest, file_sha256, replacing

CACHE_VERSION = 1
NEIGHBOUR_IMAGES = 10_000  # for precision and recall, as in ADM's evaluation
_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
# What NumPy raises for files that are cut short, overwritten or of
# another kind.
_DAMAGE = (
    OSError,
    ValueError,
    KeyError,
    TypeError,
    EOFError,
    zipfile.BadZipFile,
    zlib.error,
    AttributeError,
)
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    images: to compute features of, None without any. statistics: mean
    and covariance of Inception features by output, as a file brings
    them.
    """

    identity: dict[str, Any]
    images: ImageSet | None
    statistics: Statistics = field(default_factory=dict)


def open_reference(
    text: str,
    resolution: int,
    *,
    data_set: Callable[[], tuple[Source, Mapping[str, Any]]],
    threads: int,
    limit: int = 0,
) -> Reference:
    """The reference that --reference names: a folder, an npz, or 'dataset'.

    resolution: of the samples. data_set: opens the data set of the
    configuration, and says what that is. limit: images of a folder, npz
    or data set at most, 0 = all. Raises DataError.
    """
    if text == "dataset":
        return of_source(*data_set(), resolution, threads=threads, limit=limit)
    path = Path(text)
    if path.is_dir():
        folder = ImageFolder(path)
        identity = {"kind": "folder", "path": text, "sha256": folder.fingerprint()}
        return _prepared(folder, identity, resolution, threads, limit)
    if not path.exists():
        raise DataError(
            f"--reference={text}: no such folder or npz file; 'dataset' is the data set of the "
            "configuration"
        )
    return _of_npz(path, resolution, threads, limit)


def of_source(
    source: Source,
    description: Mapping[str, Any],
    resolution: int,
    *,
    threads: int,
    limit: int,
) -> Reference:
    """A data set as reference. description: what the configuration says of it."""
    identity = {"kind": "dataset", **description, "sha256": source.fingerprint()}
    return _prepared(source, identity, resolution, threads, limit)


def _prepared(
    source: Source, identity: dict[str, Any], resolution: int, threads: int, limit: int
) -> Reference:
    preparation = (
        f"centre crop and resize to {resolution} px as in training (images of that size stay as "
        "they are)"
    )
    images = SourceImages(
        source,
        resolution,
        {**identity, "preparation": preparation},
        exact=False,
        threads=threads,
        limit=limit,
    )
    return Reference(identity=images.identity, images=images)


def _of_npz(path: Path, resolution: int, threads: int, limit: int) -> Reference:
    keys, statistics = _read_statistics(path)
    if not statistics and "arr_0" not in keys:
        raise DataError(
            f"{path}: wanted arr_0 (images) or mu and sigma (statistics), it holds "
            f"{', '.join(keys) or 'nothing'}"
        )
    identity: dict[str, Any] = {
        "kind": "npz",
        "path": str(path),
        "sha256": file_sha256(path),
        "keys": keys,
    }
    if "arr_0" not in keys:
        return Reference(identity=identity, images=None, statistics=statistics)
    source = npz_source(path)
    # No resizing: statistics of other sizes in the same file would not be
    # those of its images.
    if source.resolution != resolution:
        raise DataError(
            f"{path} holds images of {source.resolution} px, the samples have {resolution}; a "
            "reference of their size is needed, or a folder of originals"
        )
    images = SourceImages(source, resolution, identity, exact=True, threads=threads, limit=limit)
    return Reference(identity=images.identity, images=images, statistics=statistics)


def _read_statistics(path: Path) -> tuple[list[str], Statistics]:
    """The keys of an npz, and the statistics among its arrays. Raises DataError."""
    try:
        with np.load(path) as archive:
            keys = sorted(archive.files)
            statistics = {
                name: (
                    np.asarray(archive[mean], np.float64),
                    np.asarray(archive[cov], np.float64),
                )
                for name, (mean, cov) in _KEYS.items()
                if {mean, cov} <= set(keys)
            }
    except _DAMAGE as error:
        raise DataError(f"{path}: not a readable npz file ({one_line(error)})") from error
    for name, (mean, cov) in statistics.items():
        if (
            mean.ndim != 1
            or cov.shape != mean.shape * 2
            or not (np.isfinite(mean).all() and np.isfinite(cov).all())
        ):
            raise DataError(
                f"{path}: {' and '.join(_KEYS[name])} are no mean and covariance "
                f"({list(mean.shape)}, {list(cov.shape)})"
            )
    return keys, statistics


def check_sizes(reference: Reference, samples: ImageSet) -> None:
    """Raises DataError if a set has fewer images than the scores need."""
    least, why = NEIGHBOURS + 1, f"{NEIGHBOURS} neighbours"
    # Statistics without images give no precision and recall, which would
    # need neighbours.
    if reference.images is None:
        least, why = 2, "a covariance"
    for what, images in (("samples", samples), ("reference", reference.images)):
        if images is not None and len(images) < least:
            count = len(images)
            raise DataError(
                f"{count} image{'s' * (count != 1)} as {what}: {why} need at least {least}"
            )


def reference_features(
    reference: Reference, extractor: FeatureExtractor, *, cache: Path, stop: bool = True
) -> FeatureSet | None:
    """Statistics and features of the reference, from the cache if they are there.

    All processes must call it; process 0 gets them (and writes the
    cache), others may get None. cache: a folder. stop: answer SIGTERM.
    Raises DataError for a reference that does not fit the extractor,
    and as `collect` does.
    """
    # Published statistics are those of Inception: other features have
    # only the images.
    statistics = reference.statistics if extractor.name == "inception" else {}
    if statistics:
        _check_dimensions(reference, extractor)
    if reference.images is None:
        if not statistics:
            raise DataError(
                f"{reference.identity['path']} holds statistics of Inception features alone, "
                "no images; use --features=inception, or another reference"
            )
        return FeatureSet(count=0, statistics=statistics)
    features = _of_images(reference.images, extractor, cache, stop)
    if features is None:
        return None
    return FeatureSet(
        count=features.count,
        statistics=statistics or features.statistics,
        rows=features.rows,
    )


def _check_dimensions(reference: Reference, extractor: FeatureExtractor) -> None:
    """Raises DataError for statistics of another number of features than the extractor's."""
    # Features of no images tell the dimensions.
    probe = extractor(np.zeros((0, 8, 8, 3), np.uint8))
    for name, (mean, _) in reference.statistics.items():
        if name in probe and probe[name].shape[1] != len(mean):
            raise DataError(
                f"{reference.identity['path']}: statistics of {len(mean)} features, "
                f"{extractor.name} has {probe[name].shape[1]}"
            )


def _of_images(
    images: ImageSet, extractor: FeatureExtractor, cache: Path, stop: bool
) -> FeatureSet | None:
    # Not the path: the same images elsewhere have the same features.
    key = digest(
        {
            "version": CACHE_VERSION,
            "images": {name: value for name, value in images.identity.items() if name != "path"},
            "resolution": images.resolution,
            "features": extractor.identity,
            "neighbour_images": NEIGHBOUR_IMAGES,
        }
    )
    file = cache / f"reference-{key[:24]}.npz"
    # Process 0 alone looks: the others may see another folder, and all
    # must go the same way.
    kept = _load(file, key) if is_first() else None
    if distributed.of_first(kept is not None):
        logging.info("reference: features of %s images from %s", f"{len(images):,}", file)
        return kept
    features = collect(images, extractor, what="reference", rows=NEIGHBOUR_IMAGES, stop=stop)
    if is_first():
        _save(file, key, features)
    return features


def _checksum(arrays: dict[str, np.ndarray], key: str) -> str:
    sha = sha256(key.encode())
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        sha.update(f"{name} {array.shape} {array.dtype}".encode())
        sha.update(array.data)
    return sha.hexdigest()


def _save(file: Path, key: str, features: FeatureSet) -> None:
    """Keeps features where they can be written; elsewhere the next evaluation computes them."""
    arrays = {
        f"{part}_{name}": value
        for name, pair in features.statistics.items()
        for part, value in zip(("mean", "cov"), pair, strict=True)
    }
    if features.rows is not None:
        arrays["rows"] = features.rows
    about = {"key": key, "count": features.count, "checksum": _checksum(arrays, key)}
    try:
        with replacing(file) as temporary, temporary.open("wb") as stream:
            note = np.asarray(json.dumps(about))
            np.savez(stream, about=note, **arrays)  # type: ignore[arg-type]
    # A cache is no result: the scores do not need it.
    except StorageError as error:
        logging.warning(
            "the features of the reference cannot be kept in %s: %s",
            file,
            one_line(error),
        )


def _load(file: Path, key: str) -> FeatureSet | None:
    """What `_save` has written under this key; None for anything else."""
    if not file.exists():
        return None
    try:
        with np.load(file) as archive:
            about = json.loads(str(archive["about"]))
            arrays = {name: archive[name] for name in archive.files if name != "about"}
        # Its own checksum over the arrays: a zip's covers neither its
        # directory nor the key.
        if about["key"] != key or about["checksum"] != _checksum(arrays, key):
            raise ValueError("its checksum differs")
        names = [name.removeprefix("mean_") for name in arrays if name.startswith("mean_")]
        return FeatureSet(
            count=about["count"],
            rows=arrays.get("rows"),
            statistics={name: (arrays[f"mean_{name}"], arrays[f"cov_{name}"]) for name in names},
        )
    except _DAMAGE as error:
        logging.warning("%s is damaged and will be computed again: %s", file, one_line(error))
        return None

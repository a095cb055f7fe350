"""What samples are compared with: a data set, a folder, ADM's reference batches, EDM's
reference statistics.

    folder, data set    all images (or a choice), cropped and resized as in training to the size of the samples
    npz                 ADM's VIRTUAL_*.npz: `mu`, `sigma` (pool features) and `mu_s`, `sigma_s` (spatial) of Inception
                        over a whole data set, and `arr_0`, images for precision and recall
                        EDM's fid-refs: `mu`, `sigma`; any npz with `arr_0` alone

Features of images are kept in a cache, under a hash of all that they depend on: the images,
their preparation, the
network. A damaged or foreign file there is computed again.
"""

import json
import os
import zipfile
import zlib
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from relay_jax.data.images import DataError, one_line
from relay_jax.data.source import ImageFolder, Source
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import (
    ImageSet,
    NpzImages,
    SourceImages,
    digest,
    folder_sha256,
    npz_sha256,
    source_sha256,
)
from relay_jax.evaluation.statistics import FeatureSet, collect
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import is_writer

CACHE_VERSION = 1
NEIGHBOUR_IMAGES = 10_000  # for precision and recall, as in ADM's evaluation
_GIVEN = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
Statistics = dict[str, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True, kw_only=True)
class Reference:
    """images: to compute features of, if there are any. given: mean and covariance of Inception
    features by output."""

    identity: dict[str, Any]
    images: ImageSet | None
    given: Statistics = field(default_factory=dict)


def open_reference(
    text: str,
    resolution: int,
    *,
    data_set: Callable[[], tuple[Source, dict[str, Any]]],
    threads: int,
    limit: int = 0,
) -> Reference:
    """The reference that --reference names: a folder, an npz, or 'dataset' (then `data_set`
    gives it and says what it is).

    resolution: of the samples. limit: images of a folder or data set at most, 0 = all. Raises
    DataError.
    """
    if text == "dataset":
        return of_source(*data_set(), resolution, threads=threads, limit=limit)
    path = Path(text)
    if path.is_dir():
        folder = ImageFolder(path)
        identity = {"kind": "folder", "path": text, "sha256": folder_sha256(folder)}
        return _of_images(folder, identity, resolution, threads, limit)
    if not path.exists():
        raise DataError(
            f"--reference={text}: no such folder or npz file; 'dataset' is the data set of the "
            "configuration"
        )
    return _of_npz(path, resolution, limit)


def of_source(
    source: Source, description: dict[str, Any], resolution: int, *, threads: int, limit: int
) -> Reference:
    """A data set as reference. description: what the configuration says of it."""
    identity = {"kind": "dataset", **description, "sha256": source_sha256(source, description)}
    return _of_images(source, identity, resolution, threads, limit)


def _of_images(
    source: Source, identity: dict[str, Any], resolution: int, threads: int, limit: int
) -> Reference:
    how = f"centre crop and resize to {resolution} px as in training (images of that size stay as they are)"
    images = SourceImages(
        source,
        resolution,
        {**identity, "preparation": how},
        exact=False,
        threads=threads,
        limit=limit,
    )
    return Reference(identity=images.identity, images=images)


def _of_npz(path: Path, resolution: int, limit: int) -> Reference:
    try:
        with np.load(path) as archive:
            keys = set(archive.files)
            given = {
                name: (np.asarray(archive[mean], np.float64), np.asarray(archive[cov], np.float64))
                for name, (mean, cov) in _GIVEN.items()
                if {mean, cov} <= keys
            }
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
    ) as error:
        raise DataError(f"{path}: not a readable npz file ({one_line(error)})") from error
    if not given and "arr_0" not in keys:
        raise DataError(
            f"{path}: wanted arr_0 (images) or mu and sigma (statistics), it holds "
            f"{', '.join(sorted(keys)) or 'nothing'}"
        )
    for name, (mean, cov) in given.items():
        if (
            mean.ndim != 1
            or cov.shape != mean.shape * 2
            or not (np.isfinite(mean).all() and np.isfinite(cov).all())
        ):
            raise DataError(
                f"{path}: {' and '.join(_GIVEN[name])} are no mean and covariance "
                f"({list(mean.shape)}, "
                f"{list(cov.shape)})"
            )
    identity = {"kind": "npz", "path": str(path), "sha256": npz_sha256(path), "keys": sorted(keys)}
    if "arr_0" not in keys:
        return Reference(identity=identity, images=None, given=given)
    images = NpzImages([path], identity, limit)
    if images.resolution != resolution:
        raise DataError(
            f"{path} holds images of {images.resolution} px, the samples have {resolution}; a "
            "reference of "
            "their size is needed, or a folder of originals"
        )
    return Reference(identity=images.identity, images=images, given=given)


def reference_features(
    reference: Reference, extractor: FeatureExtractor, *, cache: Path, stop: bool = True
) -> FeatureSet | None:
    """Statistics and features of the reference, from the cache if they are there. All processes
    must call it.

    Process 0 gets them (and writes the cache), others may get None. Raises DataError for a
    reference that does not fit to the extractor, and as `collect` does.
    """
    given = reference.given if extractor.name == "inception" else {}
    if given:
        probe = extractor(np.zeros((0, 8, 8, 3), np.uint8))
        for name, (mean, _) in given.items():
            if name in probe and probe[name].shape[1] != len(mean):
                raise DataError(
                    f"{reference.identity['path']}: statistics of {len(mean)} features, "
                    f"{extractor.name} has "
                    f"{probe[name].shape[1]}"
                )
    if reference.images is None:
        if not given:
            raise DataError(
                f"{reference.identity['path']} holds statistics of Inception features alone, "
                "no images; use "
                "--features=inception, or another reference"
            )
        return FeatureSet(count=0, statistics=given)
    found = _computed(reference.images, extractor, cache, stop)
    return (
        FeatureSet(count=found.count, statistics=given or found.statistics, rows=found.rows)
        if found
        else None
    )


def _computed(
    images: ImageSet, extractor: FeatureExtractor, cache: Path, stop: bool
) -> FeatureSet | None:
    what = {name: value for name, value in images.identity.items() if name != "path"}
    key = digest(
        {
            "version": CACHE_VERSION,
            "images": what,
            "resolution": images.resolution,
            "features": extractor.identity,
            "neighbour_images": NEIGHBOUR_IMAGES,
        }
    )
    file = cache / f"reference-{key[:24]}.npz"
    found = _load(file, key) if is_writer() else None
    if distributed.of_first(found is not None):
        logging.info("reference: features of %s images from %s", f"{len(images):,}", file)
        return found
    features = collect(images, extractor, what="reference", rows=NEIGHBOUR_IMAGES, stop=stop)
    if is_writer():
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
    """Keeps features where they can be written; elsewhere the next evaluation computes them
    again."""
    arrays = {
        f"{part}_{name}": value
        for name, pair in features.statistics.items()
        for part, value in zip(("mean", "cov"), pair, strict=True)
    }
    if features.rows is not None:
        arrays["rows"] = features.rows
    about = {"key": key, "count": features.count, "checksum": _checksum(arrays, key)}
    temporary = file.with_suffix(f".{os.getpid()}.tmp")
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as stream:
            np.savez(stream, about=np.asarray(json.dumps(about)), **arrays)  # type: ignore[arg-type]
        temporary.replace(file)
    except OSError as error:
        logging.warning(
            "the features of the reference cannot be kept in %s: %s", file, one_line(error)
        )
        with suppress(OSError):
            temporary.unlink()


def _load(file: Path, key: str) -> FeatureSet | None:
    """What `_save` has written under this key; None for anything else."""
    if not file.exists():
        return None
    try:
        with np.load(file) as archive:
            about = json.loads(str(archive["about"]))
            arrays = {name: archive[name] for name in archive.files if name != "about"}
        if about["key"] != key or about["checksum"] != _checksum(arrays, key):
            raise ValueError("its checksum differs")
        names = [name.removeprefix("mean_") for name in arrays if name.startswith("mean_")]
        return FeatureSet(
            count=about["count"],
            rows=arrays.get("rows"),
            statistics={name: (arrays[f"mean_{name}"], arrays[f"cov_{name}"]) for name in names},
        )
    except (
        OSError,
        ValueError,
        KeyError,
        TypeError,
        EOFError,
        zipfile.BadZipFile,
        zlib.error,
        AttributeError,
    ) as error:
        logging.warning("%s is damaged and will be computed again: %s", file, one_line(error))
        return None

"""What samples are compared with.

    folder, zip, set    all images (or a choice), cropped and resized as in training to the size
                        of the samples
    npz                 ADM's VIRTUAL_*.npz: `mu`, `sigma` (pool features) and `mu_s`, `sigma_s`
                        (spatial) of Inception over a whole data set, and `arr_0`, images for
                        precision and recall; EDM's fid-refs: `mu`, `sigma`; any npz with `arr_0`
    pkl                 EDM2's references: `mu` and `sigma` of Inception

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

from relay_jax.data.decoding import AS_SHOWN, Decoding
from relay_jax.data.files import several
from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import EncodedImages
from relay_jax.data.source import Source
from relay_jax.data.zip import EdmZip
from relay_jax.errors import DataError, StorageError, one_line
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ImageSet, SourceImages, kind_of, npz_source
from relay_jax.evaluation.neighbours import NEIGHBOURS
from relay_jax.evaluation.published import Statistics, read_npz, read_pickle
from relay_jax.evaluation.statistics import FeatureSet, collect
from relay_jax.resolution import Resolution, pixels_text, size_text
from relay_jax.runtime import distributed
from relay_jax.runtime.distributed import is_first
from relay_jax.runtime.files import digest, file_sha256, replacing

CACHE_VERSION = 2
NEIGHBOUR_IMAGES = 10_000  # for precision and recall, as in ADM's evaluation
UNKNOWN = "as the file's makers did it: not known"
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


@dataclass(frozen=True, kw_only=True)
class Reference:
    """What samples are compared with.

    images: to compute features of, None without any.
    statistics: mean and covariance of Inception features by
    output, as a file brings them.
    """

    identity: dict[str, Any]
    images: ImageSet | None
    statistics: Statistics = field(default_factory=dict)


def open_reference(
    text: str,
    resolution: Resolution,
    *,
    data_set: Callable[[], tuple[Source, Mapping[str, Any]]],
    threads: int,
    limit: int = 0,
    decoding: Decoding = AS_SHOWN,
) -> Reference:
    """The reference that --reference names: a folder, zip, npz or .pkl, or 'dataset'.

    resolution: of the samples. decoding: of the images of a folder
    or zip, as in training. data_set: opens the data set of the
    configuration, and says what that is. limit: images of a folder,
    npz or data set at most, 0 = all. Raises DataError.
    """
    if text == "dataset":
        return of_source(*data_set(), resolution, threads=threads, limit=limit)
    path = Path(text)
    if not path.exists():
        raise DataError(
            f"--reference={text}: no such folder or npz file; 'dataset' is the data set of the "
            "configuration"
        )
    kind = kind_of(path)
    if path.is_dir() and kind != "folder":
        raise DataError(
            f"--reference={text}: a folder of {kind} files; name one npz, or train with "
            "it as data set and use --reference=dataset"
        )
    if kind in ("folder", "zip"):
        source: EncodedImages = ImageFolder(path) if path.is_dir() else EdmZip(path)
        source.decoding = decoding
        # Shown otherwise they have other features.
        shown = {"exif": decoding.exif, "background": list(decoding.background)}
        identity = {
            "kind": kind,
            "path": text,
            "sha256": source.fingerprint(),
            **shown,
        }
        return _prepared(source, identity, resolution, threads, limit)
    if path.suffix.lower() == ".pkl":
        return _of_pickle(path)
    return _of_npz(path, resolution, threads, limit)


def of_source(
    source: Source,
    description: Mapping[str, Any],
    resolution: Resolution,
    *,
    threads: int,
    limit: int,
) -> Reference:
    """A data set as reference. description: what the configuration says of it."""
    identity = {"kind": "dataset", **description, "sha256": source.fingerprint()}
    return _prepared(source, identity, resolution, threads, limit)


def _prepared(
    source: Source,
    identity: dict[str, Any],
    resolution: Resolution,
    threads: int,
    limit: int,
) -> Reference:
    preparation = (
        f"centre crop and resize to {pixels_text(resolution)} as in training (images of that "
        "size stay as they are)"
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


def _of_pickle(path: Path) -> Reference:
    identity = {"kind": "pkl", "path": str(path), "sha256": file_sha256(path)}
    statistics = read_pickle(path)
    _say_unknown_resize(path)
    return Reference(
        identity={**identity, "preparation": UNKNOWN},
        images=None,
        statistics=statistics,
    )


def _of_npz(path: Path, resolution: Resolution, threads: int, limit: int) -> Reference:
    keys, statistics = read_npz(path)
    if not statistics and "arr_0" not in keys:
        raise DataError(
            f"{path}: wanted arr_0 (images) or mu and sigma (statistics), it holds {several(keys)}"
        )
    identity: dict[str, Any] = {
        "kind": "npz",
        "path": str(path),
        "sha256": file_sha256(path),
        # A report is for people: an npz
        # of thousands of arrays is none.
        "keys": keys[:20],
    }
    if "arr_0" not in keys:
        _say_unknown_resize(path)
        return Reference(
            identity={**identity, "preparation": UNKNOWN},
            images=None,
            statistics=statistics,
        )
    source = npz_source(path)
    # No resizing: statistics of other sizes in the same file would
    # not be those of its images.
    if source.resolution != resolution:
        raise DataError(
            f"{path} holds images of {pixels_text(source.resolution)}, the samples have "
            f"{size_text(resolution)}; a reference of their size is needed, or a folder of "
            "originals"
        )
    images = SourceImages(source, resolution, identity, exact=True, threads=threads, limit=limit)
    return Reference(identity=images.identity, images=images, statistics=statistics)


def _say_unknown_resize(path: Path) -> None:
    # The resize alone moves FID by whole points.
    logging.warning(
        "%s: how the images of these statistics were cropped and resized is not known; scores "
        "compare with others of the same file alone",
        path,
    )


def check_sizes(reference: Reference, samples: ImageSet) -> None:
    """Raises DataError if a set has fewer images than the scores need."""
    least, why = NEIGHBOURS + 1, f"{NEIGHBOURS} neighbours"
    # Statistics without images give no precision and recall, which
    # would need neighbours.
    if reference.images is None:
        least, why = 2, "a covariance"
    for what, images in (("samples", samples), ("reference", reference.images)):
        if images is not None and len(images) < least:
            count = len(images)
            raise DataError(
                f"{count} image{'s' * (count != 1)} as {what}: {why} need at least {least}"
            )


def reference_features(
    reference: Reference,
    extractor: FeatureExtractor,
    *,
    cache: Path,
    stop: bool = True,
) -> FeatureSet | None:
    """Statistics and features of the reference, from the cache if they are there.

    All processes must call it; process 0 gets them (and writes the
    cache), others may get None. cache: a folder. stop: answer
    SIGTERM. Raises DataError for a reference that does not fit the
    extractor, and as `collect` does.
    """
    # Published statistics are those of Inception: other features
    # have only the images.
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
    features = _of_images(reference.images, extractor, cache, NEIGHBOUR_IMAGES, stop)
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


def held_out(reference: Reference, count: int) -> SourceImages | None:
    """So many real images beside those of the reference, None if there are not."""
    # A file's statistics may be of all of its images.
    if isinstance(reference.images, SourceImages) and not reference.statistics:
        return reference.images.held_out(count)
    return None


def held_out_features(
    images: SourceImages, extractor: FeatureExtractor, *, cache: Path, stop: bool = True
) -> FeatureSet | None:
    """Of images of `held_out`, with every row, as samples have; else as `reference_features`."""
    return _of_images(images, extractor, cache, len(images), stop, "real images")


def _of_images(
    images: ImageSet,
    extractor: FeatureExtractor,
    cache: Path,
    rows: int,
    stop: bool,
    what: str = "reference",
) -> FeatureSet | None:
    # Not the path: the same images elsewhere have the same features.
    key = digest(
        {
            "version": CACHE_VERSION,
            "images": {name: value for name, value in images.identity.items() if name != "path"},
            "resolution": images.resolution,
            "features": extractor.identity,
            "neighbour_images": rows,
        }
    )
    file = cache / f"{what.replace(' ', '-')}-{key[:24]}.npz"
    # Process 0 alone looks: the others may see another folder, and
    # all must go the same way.
    kept = _load(file, key) if is_first() else None
    if distributed.of_first(kept is not None):
        logging.info("%s: features of %s images from %s", what, f"{len(images):,}", file)
        return kept
    features = collect(images, extractor, what=what, rows=rows, stop=stop)
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
    about = {
        "key": key,
        "count": features.count,
        "checksum": _checksum(arrays, key),
    }
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
        # Its own checksum over the arrays: a zip's covers neither
        # its directory nor the key.
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

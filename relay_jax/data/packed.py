"""Packed data sets: images cropped and resized once for each resolution, in a few large files.

    DIR/dataset.json                          what the set holds (`Manifest`)
    DIR/64/00000-of-00129.array_record        the first images at 64 px; read at any position
    DIR/64/00000-of-00129.array_record.json   its size and checksum (`Shard`), to resume by

A record is 12 bytes (b"RLY1", height and width as uint16, label as
int32, little endian) and uint8 [h, w, 3]: each pixel less its left
neighbour, modulo 256. ArrayRecord compresses it with zstd. So it is
lossless: training sees the pixels that it would have seen without
packing. Measured on 256 px photographs, per image and core: 127 KB,
0.3 ms to read, 1.3 ms to write; PNG: 120 KB, 1.6 ms, 12.5 ms; plain
pixels under zstd: 167 KB, 0.2 ms, 0.9 ms.

DIR may be gs://BUCKET/PATH: ArrayRecord and data/storage.py read
there with the application's default credentials. data/prepare.py
writes such sets; samples in this format are one, too.
"""

import bisect
import contextlib
import copy
import itertools
import os
import re
import struct
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypedDict, cast

import numpy as np
from array_record.python import array_record_module

from relay_jax.data.files import MAX_CLASSES, refusing, show
from relay_jax.data.images import ImageSource
from relay_jax.data.storage import Folder, storage
from relay_jax.errors import DataError
from relay_jax.resolution import Resolution, as_resolution, height_width, size_text
from relay_jax.runtime.counting import counted
from relay_jax.runtime.files import MAX_TEXT, digest, parse_json, replacing

VERSION = 1
MANIFEST = "dataset.json"
# One record per group: read at any
# position without decoding its neighbours.
WRITER_OPTIONS = "group_size:1,zstd:3"
# Reading ahead is for sequences; training jumps from record to record.
READER_OPTIONS = "readahead_buffer_size:0"
_HEADER = struct.Struct("<4sHHi")
_MAGIC = b"RLY1"


class Shard(TypedDict):
    """One file: its path below the set's folder, and size and SHA-256 of the whole of it."""

    file: str
    images: int
    bytes: int
    sha256: str


class Manifest(TypedDict):
    """dataset.json. source: what was packed, for people. shards: by resolution."""

    version: int
    complete: bool
    source: dict[str, Any]
    images: int
    class_names: list[str]
    resolutions: list[Resolution]
    shard_images: int
    shards: dict[str, list[Shard]]


def encode_record(image: np.ndarray, label: int) -> bytes:
    """uint8 [h, w, 3] and its label as a record."""
    # Neighbours are alike: their differences are small numbers,
    # which zstd packs a quarter better.
    differences = image.copy()
    differences[:, 1:] -= image[:, :-1]
    return _HEADER.pack(_MAGIC, image.shape[0], image.shape[1], label) + differences.tobytes()


def decode_record(record: bytes) -> tuple[np.ndarray, int]:
    """The inverse of `encode_record`. Raises ValueError for bytes that it did not write."""
    if record[:4] != _MAGIC:
        raise ValueError("not a record of this format")
    _, height, width, label = _HEADER.unpack_from(record)
    differences = np.frombuffer(record, np.uint8, offset=_HEADER.size).reshape(height, width, 3)
    return np.cumsum(differences, axis=1, dtype=np.uint8), label


def shard_name(resolution: Resolution, number: int, count: int) -> str:
    """Path of a shard below the folder of the set."""
    return f"{size_text(resolution)}/{number:05d}-of-{count:05d}.array_record"


@contextlib.contextmanager
def record_file(path: Path) -> Iterator[Callable[[bytes], object]]:
    """An ArrayRecord file, whole or not there: gives the function that adds a record.

    Raises StorageError if it cannot be
    written, such as on a full disk.
    """
    with replacing(path) as temporary:
        writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
        try:
            yield writer.write
        except BaseException:
            # An open writer would write into the temporary file
            # after it is gone; on a full disk closing fails once
            # more, and the first error says more.
            with contextlib.suppress(RuntimeError):
                writer.close()
            raise
        writer.close()


def read_manifest(folder: str | os.PathLike[str]) -> Manifest:
    """dataset.json of a packed set, finished or not. Raises DataError."""
    folder = os.fspath(folder)
    path, place = os.path.join(folder, MANIFEST), storage(folder)
    try:
        with refusing(f"{path}: cannot be read"):
            manifest = parse_json(_small(place, MANIFEST).decode())
    except DataError as error:
        if not isinstance(error.__cause__, FileNotFoundError):
            raise
        raise DataError(
            f"{folder}: no packed data set ({MANIFEST} is missing); run --mode=prepare"
        ) from error
    if not isinstance(manifest, dict) or not manifest.keys() >= Manifest.__required_keys__:
        cure = ""
        if isinstance(manifest, dict) and "labels" in manifest:
            cure = ", but of one in EDM's format; use --config.dataset.source=folder"
        raise DataError(f"{path}: not a description of a packed data set{cure}")
    if manifest["version"] != VERSION:
        raise DataError(
            f"{path}: format {show(manifest['version'])}, this program reads {VERSION}; prepare "
            "the set again"
        )
    if reason := _contradiction(manifest):
        raise DataError(f"{path}: damaged ({reason}); start the preparation again")
    # JSON has no tuples.
    resolutions = [as_resolution(size) for size in manifest["resolutions"]]
    return cast(Manifest, {**manifest, "resolutions": resolutions})


def is_packed(folder: str | os.PathLike[str]) -> bool:
    """Whether the dataset.json of a folder is that of a packed set: EDM's has the same name."""
    try:
        manifest = parse_json(_small(storage(folder), MANIFEST).decode())
    except (OSError, ValueError):
        # Damaged: its own reader says how.
        return True
    return not isinstance(manifest, dict) or "labels" not in manifest


def _small(place: Folder, name: str) -> bytes:
    """A file that is no longer than a description may be. Raises OSError, ValueError."""
    data = place.read(name)
    if len(data) > MAX_TEXT:
        raise ValueError(f"it is longer than {MAX_TEXT:,} bytes")
    return data


def _contradiction(manifest: Mapping[str, Any]) -> str:
    """What is of another type or number than this program writes, '' if nothing is."""
    # What is computed with later, here it is looked at once.
    checks = {
        "images": _is_count(manifest["images"]),
        "complete": type(manifest["complete"]) is bool,
        "source": type(manifest["source"]) is dict,
        "class_names": _all(str, manifest["class_names"]),
        "resolutions": type(manifest["resolutions"]) is list
        and all(map(_is_resolution, manifest["resolutions"])),
        "shard_images": _is_count(manifest["shard_images"]),
        "shards": type(manifest["shards"]) is dict
        and all(
            type(row) is list and all(map(_is_shard, row)) for row in manifest["shards"].values()
        ),
    }
    wrong = [key for key, good in checks.items() if not good]
    if wrong:
        return f"{wrong[0]} is not what a preparation writes"
    if len(manifest["class_names"]) > MAX_CLASSES:
        return "it has too many classes"
    for resolution, row in manifest["shards"].items():
        if sum(shard["images"] for shard in row) != manifest["images"]:
            return f"the files at {resolution[:9]} px hold another number of images"
    return ""


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


def _all(kind: type, values: object) -> bool:
    return type(values) is list and all(type(value) is kind for value in values)


def _is_resolution(size: object) -> bool:
    try:
        as_resolution(size)  # type: ignore[arg-type]
    except (ValueError, TypeError):
        return False
    return True


def _is_shard(shard: object) -> bool:
    # A file is in the set's own folder: another path could name any
    # file of the machine.
    return (
        type(shard) is dict
        and shard.keys() >= Shard.__required_keys__
        and _is_count(shard["images"])
        and _is_count(shard["bytes"])
        and type(shard["sha256"]) is str
        and type(shard["file"]) is str
        and re.fullmatch(r"[\w-]+/[\w.-]+", shard["file"]) is not None
        and ".." not in shard["file"]
    )


class PackedDataset(ImageSource):
    """A packed data set at one of its resolutions; `at` gives the others.

    Raises DataError, when opened and when read, for a set that is
    unfinished, or of which a file is missing, truncated, damaged or
    not of this set, naming the file.
    """

    prepared: ClassVar[bool] = True
    resolution: Resolution

    def __init__(self, path: str | os.PathLike[str], resolution: Resolution) -> None:
        """Looks at the size of every file (not in a bucket); `verify` reads them."""
        self.path = os.fspath(path)
        if not self.path:
            raise DataError(
                "the packed source needs a path: the folder that --mode=prepare has written"
            )
        manifest = read_manifest(self.path)
        if not manifest["complete"]:
            raise DataError(
                f"{self.path}: the preparation has not finished; start the same --mode=prepare "
                "again"
            )
        self.class_names = tuple(manifest["class_names"])
        self.num_classes = len(self.class_names)
        self._manifest = manifest
        self._forget_readers()
        self._choose(resolution)

    @classmethod
    def from_config(cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int) -> Self:
        return cls(dataset["path"], resolution)

    def fingerprint(self) -> str:
        """Hash of the description, which has the checksum of every file."""
        return digest(self._manifest)

    def identity(self) -> str:
        """Hash of the images: not of where the originals were, which the description has, too."""
        keys = ("images", "class_names", "shards")
        return digest({key: self._manifest[key] for key in keys})  # type: ignore[literal-required]

    def class_counts(self) -> list[int] | None:
        """As the preparation has noted them; earlier ones have not."""
        identity: Any = self._manifest["source"].get("identity")
        try:
            counts = [int(part["images"]) for part in identity["parts"]]
        except (TypeError, KeyError, ValueError):
            return None
        return counts if self.num_classes and len(counts) == self.num_classes else None

    def at(self, resolution: Resolution) -> Self:
        """The same images at another resolution. Raises DataError naming those there are."""
        if resolution == self.resolution:
            return self
        other = copy.copy(self)
        other._forget_readers()
        other._choose(resolution)
        return other

    def _choose(self, resolution: Resolution) -> None:
        manifest = self._manifest
        shards = manifest["shards"].get(size_text(resolution))
        if shards is None:
            present = ", ".join(map(size_text, manifest["resolutions"]))
            raise DataError(
                f"{self.path}: packed at {present} px, not at {size_text(resolution)}; prepare it "
                "for this relay"
            )
        # In a bucket each look is a request: a thousand files would
        # take minutes.
        looked_at = [] if self.path.startswith("gs://") else shards
        for shard in counted(looked_at, f"opening {Path(self.path).name}", len(looked_at)):
            file = Path(self.path, shard["file"])
            try:
                size = file.stat().st_size
            except OSError as error:
                raise DataError(
                    f"{file}: cannot be read ({error.strerror}); start the preparation again"
                ) from error
            if size != shard["bytes"]:
                raise DataError(
                    f"{file}: has {size} bytes instead of {shard['bytes']}; start the "
                    "preparation again"
                )
        self.resolution, self._shards = resolution, shards
        self._ends = list(itertools.accumulate(shard["images"] for shard in shards))

    # Open files and locks cannot be sent to a worker process, which
    # opens its own.
    def __getstate__(self) -> dict[str, object]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_readers", "_lock")
        }

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._forget_readers()

    def _forget_readers(self) -> None:
        self._readers: dict[int, array_record_module.ArrayRecordReader] = {}
        self._lock = threading.Lock()

    def _reader(self, number: int) -> array_record_module.ArrayRecordReader:
        """The reader of a shard, opened when first needed; threads share it. Raises DataError."""
        with self._lock:
            if number not in self._readers:
                shard = self._shards[number]
                file = os.path.join(self.path, shard["file"])
                with refusing(f"{file}: cannot be read", "; start the preparation again"):
                    reader = array_record_module.ArrayRecordReader(
                        file, READER_OPTIONS, file_reader_buffer_size=32768
                    )
                # It reports 0 for whatever
                # is not an ArrayRecord file.
                if reader.num_records() != shard["images"]:
                    raise DataError(
                        f"{file}: not the file that was prepared; start the preparation again"
                    )
                self._readers[number] = reader
            return self._readers[number]

    def __len__(self) -> int:
        return self._manifest["images"]

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label; IndexError outside the set. Raises DataError."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside 0..{len(self) - 1}")
        number, offset = self._place(position)
        with refusing(f"{self.where(position)}: damaged", "; start the preparation again"):
            image, label = decode_record(self._reader(number).read([offset])[0])
            # A record of another set decodes as well: its size or
            # its label gives it away.
            size = height_width(self.resolution)
            if image.shape != (*size, 3) or not 0 <= label < max(self.num_classes, 1):
                raise ValueError(
                    f"image of {image.shape[1]}x{image.shape[0]} px with label {label}"
                )
        return image, label

    def where(self, position: int) -> str:
        """The file and the record in it."""
        number, offset = self._place(position)
        return f"{os.path.join(self.path, self._shards[number]['file'])}[{offset}]"

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the shard, and of the record in it."""
        number = bisect.bisect_right(self._ends, position)
        return number, int(position) - (self._ends[number] - self._shards[number]["images"])

    def verify(self) -> None:
        """Compares every file at this resolution with its checksum. Raises DataError."""
        for shard in counted(self._shards, "comparing checksums", len(self._shards)):
            file = os.path.join(self.path, shard["file"])
            with refusing(f"{file}: cannot be read", "; prepare or copy it again"):
                sha256 = storage(self.path).checksum(shard["file"])[1]
            if sha256 != shard["sha256"]:
                raise DataError(
                    f"{file}: damaged (its checksum differs); start the preparation again"
                )

"""ADM's format of image batches (arXiv 2105.05233): one npz, or a folder of them as samples are.

    arr_0    uint8 [n, side, side, 3]
    arr_1    int [n], classes from 0; there may be none

`np.savez` does not compress: the bytes of image i then begin at a known
place of the file, and one image is read without the others. A
compressed npz is held in memory once it is read.
"""

import bisect
import itertools
import os
import re
import struct
import threading
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy

from relay_jax.data.images import ImageSource
from relay_jax.errors import DataError, one_line
from relay_jax.runtime.files import digest, file_sha256

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
# What zipfile and NumPy raise for files that are cut short, overwritten
# or of another kind.
_DAMAGE = (
    OSError,
    ValueError,
    EOFError,
    RuntimeError,
    NotImplementedError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)


@dataclass(frozen=True)
class _File:
    """One npz. start: offset of the first image in the file, None if the images are compressed."""

    path: Path
    shape: tuple[int, ...]
    labels: np.ndarray | None
    start: int | None


class NpzImages(ImageSource):
    """The images of an npz, or of all npz files of a folder in their order; all of one size."""

    resolution: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises DataError for files that are missing, damaged or not of this format."""
        self.path = os.fspath(path)
        if not self.path:
            raise DataError(
                "the npz source needs a path: an npz with images in arr_0, or a folder of them"
            )
        place = Path(self.path)
        files = npz_files(place) if place.is_dir() else [place]
        if not files:
            raise DataError(f"{self.path}: no npz files in this folder")
        self._files = [_open(file) for file in files]
        first = self._files[0]
        for file in self._files:
            if file.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"images of different sizes: {file.path} has {file.shape[1]} x "
                    f"{file.shape[1]} pixels, {first.path} {first.shape[1]} x {first.shape[1]}"
                )
            if (file.labels is None) != (first.labels is None):
                raise DataError(
                    f"{file.path} and {first.path}: one has classes (arr_1), the other has none"
                )
        self.resolution = first.shape[1]
        self._ends = list(itertools.accumulate(file.shape[0] for file in self._files))
        if not self._ends[-1]:
            raise DataError(f"{first.path}: arr_0 holds no images")
        rows = [file.labels for file in self._files if file.labels is not None]
        self._labels = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        self.num_classes = int(self._labels.max()) + 1 if rows else 0
        self.class_names = tuple(str(label) for label in range(self.num_classes))
        self._forget_images()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [r, r, 3] and its label; IndexError outside the set. Raises DataError."""
        number, row = self._place(position)
        file = self._files[number]
        if file.start is None:
            pixels = self._whole(number)[row]
        else:
            size = int(np.prod(file.shape[1:]))
            data = _read(file, file.start + row * size, size)
            pixels = np.frombuffer(data, np.uint8).reshape(file.shape[1:])
        return pixels, int(self._labels[position]) if self.num_classes else 0

    def where(self, position: int) -> str:
        """The file, and the row in its arr_0."""
        number, row = self._place(position)
        return f"{self._files[number].path}[{row}]"

    def fingerprint(self) -> str:
        """Hash of the bytes of the file, or of the hashes of all. Raises DataError."""
        sums = []
        for file in self._files:
            try:
                sums.append(file_sha256(file.path))
            except OSError as error:
                raise DataError(f"{file.path}: cannot be read ({one_line(error)})") from error
        return digest(sums) if Path(self.path).is_dir() else sums[0]

    def verify(self) -> None:
        """Compares every file with its checksums. Raises DataError for the first that differs."""
        # Reading one image cannot do it: the zip has one checksum for all
        # images of a file.
        for file in self._files:
            try:
                with zipfile.ZipFile(file.path) as archive:
                    member = archive.testzip()
            except _DAMAGE as error:
                raise DataError(f"{file.path}: damaged ({one_line(error)})") from error
            if member is not None:
                raise DataError(f"{file.path}: damaged (the checksum of {member} differs)")

    def _place(self, position: int) -> tuple[int, int]:
        """Number of the file and row in it. Raises IndexError."""
        if not 0 <= position < len(self):
            raise IndexError(f"position {position} is outside 0..{len(self) - 1}")
        number = bisect.bisect_right(self._ends, position)
        return number, int(position) - (self._ends[number] - self._files[number].shape[0])

    def _whole(self, number: int) -> np.ndarray:
        """All images of a compressed file, read when the first of them is needed."""
        with self._lock:
            if number not in self._images:
                file = self._files[number]
                try:
                    with (
                        zipfile.ZipFile(file.path) as archive,
                        archive.open(IMAGES) as stream,
                    ):
                        _read_header(stream)
                        data = stream.read()
                    images = np.frombuffer(data, np.uint8).reshape(file.shape)
                except _DAMAGE as error:
                    raise DataError(f"{file.path}: damaged ({one_line(error)})") from error
                self._images[number] = images
            return self._images[number]

    def _forget_images(self) -> None:
        self._images: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    # A worker process reads for itself: gigabytes of images do not travel
    # through a pipe.
    def __getstate__(self) -> dict[str, object]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_images", "_lock")
        }

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._forget_images()


def npz_files(folder: Path) -> list[Path]:
    """The npz files of a folder in their order; of samples those named for their seeds."""
    # --mode=sample leaves the sum of all beside its files: both together
    # would count images twice.
    files = sorted(folder.glob("*.npz"))
    shards = [file for file in files if re.fullmatch(r"\d+-\d+", file.stem)]
    return sorted(shards, key=lambda file: int(file.stem.split("-")[0])) or files


def _open(path: Path) -> _File:
    """What an npz holds, without reading its images. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such folder or npz file of images")
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.namelist()
            if IMAGES in members:
                with archive.open(IMAGES) as stream:
                    shape, fortran, dtype = _read_header(stream)
                    header = stream.tell()
                start = _offset(path, archive.getinfo(IMAGES), header)
            labels = _labels(archive) if LABELS in members else None
    except _DAMAGE as error:
        raise DataError(f"{path}: not a readable npz file ({one_line(error)})") from error
    if IMAGES not in members:
        keys = ", ".join(sorted(name.removesuffix(".npy") for name in members)) or "nothing"
        raise DataError(f"{path}: no images: arr_0 is missing, it holds {keys}")
    if dtype != np.uint8 or fortran:
        raise DataError(f"{path}: arr_0 must be uint8 in C order, not {dtype}")
    if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
        raise DataError(f"{path}: arr_0 must be images [n, side, side, 3], not {list(shape)}")
    if labels is not None and (
        labels.shape != shape[:1] or labels.dtype.kind not in "iu" or (labels < 0).any()
    ):
        raise DataError(
            f"{path}: arr_1 must be {shape[0]} classes, whole numbers from 0, not "
            f"{labels.dtype} {list(labels.shape)}"
        )
    return _File(path, shape, labels, start)


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran order, and type of an array; the stream is then at its data."""
    # NumPy writes the newer headers only where a shape does not fit the
    # older one.
    if npy.read_magic(stream) == (1, 0):
        return npy.read_array_header_1_0(stream)
    return npy.read_array_header_2_0(stream)


def _offset(path: Path, member: zipfile.ZipInfo, header: int) -> int | None:
    """Where the array's data begin in the file, None if compressed. header: bytes before them."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    # The lengths of the name and of the extra field stand in front of the
    # data; the directory at the end of the file has its own extra field,
    # of another length.
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + name + extra + header


def _labels(archive: zipfile.ZipFile) -> np.ndarray:
    with archive.open(LABELS) as stream:
        return npy.read_array(stream, allow_pickle=False)


def _read(file: _File, start: int, size: int) -> bytes:
    """Bytes of a file at an offset. Raises DataError if there are fewer."""
    # Opened for each image, as image files are: a set may have more files
    # than a process may hold open. No memory map: a file that shrinks
    # under it kills the process without a message.
    try:
        with file.path.open("rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), size, start)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({one_line(error)})") from error
    if len(data) != size:
        raise DataError(f"{file.path}: damaged (arr_0 ends early)")
    return data

"""ADM's format of image batches (arXiv 2105.05233): one npz, or a folder of them as samples are.

    arr_0    uint8 [n, h, w, 3]
    arr_1    int [n], classes from 0; there may be none

`np.savez` does not compress: the bytes of image i then begin at a
known place of the file, and one image is read without the others. A
compressed npz is held in memory once it is read.
"""

import bisect
import itertools
import math
import os
import re
import struct
import threading
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
from numpy.lib import format as npy

from relay_jax.data.files import (
    MAX_CLASSES,
    check_member,
    read_member,
    refusing,
    several,
)
from relay_jax.data.images import ImageSource
from relay_jax.errors import DataError, one_line
from relay_jax.resolution import Resolution, as_resolution
from relay_jax.runtime.counting import counted, counting
from relay_jax.runtime.files import digest, file_sha256

IMAGES, LABELS = "arr_0.npy", "arr_1.npy"
_HEADER = 1 << 16  # bytes that the header of an array may have; NumPy takes less


@dataclass(frozen=True)
class _File:
    """One npz. start: offset of the first image in the file, None if the images are compressed."""

    path: Path
    shape: tuple[int, ...]
    labels: np.ndarray | None
    start: int | None


class NpzImages(ImageSource):
    """The images of an npz, or of all npz files of a folder in their order; all of one size."""

    resolution: Resolution

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises DataError for files that are missing, damaged or not of this format."""
        self.path = os.fspath(path)
        if not self.path:
            raise DataError(
                "the npz source needs a path: an npz with images in arr_0, or a folder of them"
            )
        place = Path(self.path)
        if place.suffix.lower() == ".zip":
            raise DataError(f"{place}: is a zip, not an npz; use --config.dataset.source=zip")
        files = npz_files(place) if place.is_dir() else [place]
        if not files:
            raise DataError(
                f"{self.path}: no npz files in this folder; for image files use "
                "--config.dataset.source=folder"
            )
        self._files = [_open(file) for file in counted(files, "opening npz files", len(files))]
        first = self._files[0]
        for file in self._files:
            if file.shape[1:] != first.shape[1:]:
                raise DataError(
                    f"images of different sizes: {file.path} has {file.shape[2]} x "
                    f"{file.shape[1]} pixels, {first.path} {first.shape[2]} x {first.shape[1]}"
                )
            if (file.labels is None) != (first.labels is None):
                raise DataError(
                    f"{file.path} and {first.path}: one has classes (arr_1), the other has none"
                )
        self.resolution = as_resolution(first.shape[1:3])
        self._ends = list(itertools.accumulate(file.shape[0] for file in self._files))
        if not self._ends[-1]:
            raise DataError(f"{first.path}: arr_0 holds no images")
        rows = [file.labels for file in self._files if file.labels is not None]
        self._labels = np.concatenate(rows) if rows else np.zeros(0, np.int64)
        self.num_classes = int(self._labels.max()) + 1 if rows else 0
        self.class_names = tuple(str(label) for label in range(self.num_classes))
        self._forget_images()
        self._check_no_sum()

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label; IndexError outside the set. Raises DataError."""
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

    def known_labels(self) -> np.ndarray | None:
        return self._labels if self.num_classes else None

    def fingerprint(self) -> str:
        """Hash of the bytes of the file, or of the hashes of all. Raises DataError."""
        sums = []
        size = sum(file.path.stat().st_size for file in self._files if file.path.is_file())
        with counting("hashing the images", size / 1e6, "MB") as add:
            for file in self._files:
                try:
                    sums.append(file_sha256(file.path, add))
                except OSError as error:
                    raise DataError(f"{file.path}: cannot be read ({one_line(error)})") from error
        return digest(sums) if Path(self.path).is_dir() else sums[0]

    def verify(self) -> None:
        """Compares every file with its checksums. Raises DataError for the first that differs."""
        # Reading one image cannot do it: the zip has one checksum
        # for all images of a file.
        for file in counted(self._files, "comparing checksums", len(self._files)):
            with (
                refusing(f"{file.path}: damaged"),
                zipfile.ZipFile(file.path) as archive,
            ):
                for info in archive.infolist():
                    check_member(info, _memory())
                member = archive.testzip()
            if member is not None:
                raise DataError(f"{file.path}: damaged (the checksum of {member} differs)")

    def _check_no_sum(self) -> None:
        """Raises DataError if one file holds the images of all others together."""
        counts = [file.shape[0] for file in self._files]
        if len(counts) < 3 or 2 * max(counts) != sum(counts):
            return
        largest = int(np.argmax(counts))
        starts = [end - count for end, count in zip(self._ends, counts, strict=True)]
        # The number may be a coincidence, an image of one part at
        # its beginning is none.
        first = self[starts[largest]][0]
        parts = [start for n, start in enumerate(starts) if n != largest and counts[n]]
        if any(np.array_equal(self[start][0], first) for start in parts):
            raise DataError(
                f"{self._files[largest].path}: holds the images of the {len(counts) - 1} other "
                "files together; name one file, or move what is not meant to another folder"
            )

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
                with (
                    refusing(f"{file.path}: damaged"),
                    zipfile.ZipFile(file.path) as archive,
                ):
                    data = read_member(archive, IMAGES, _memory())
                    size = math.prod(file.shape)
                    images = np.frombuffer(data, np.uint8, size, len(data) - size)
                    images = images.reshape(file.shape)
                self._images[number] = images
            return self._images[number]

    def _forget_images(self) -> None:
        self._images: dict[int, np.ndarray] = {}
        self._lock = threading.Lock()

    # A worker process reads for itself: gigabytes of images do not
    # travel through a pipe.
    def __getstate__(self) -> dict[str, object]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_images", "_lock")
        }

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._forget_images()


def npz_files(folder: Path) -> list[Path]:
    """The npz files of a folder in their order; of samples those named for their seeds.

    Raises DataError for parts beside what may be their sum: images
    would count twice.
    """
    files = sorted(file for file in folder.glob("*.npz") if file.is_file())
    shards = [file for file in files if re.fullmatch(r"\d+-\d+", file.stem)]
    others = [file for file in files if file not in shards]
    # --mode=sample leaves the sum of all beside its files.
    sums = [file for file in others if _SUM.fullmatch(file.stem)]
    if shards and len(sums) == len(others):
        return sorted(shards, key=lambda file: int(file.stem.split("-")[0]))
    if shards or (sums and len(files) > 1):
        kind = "files of seeds" if shards else "parts"
        odd = sums if sums and not shards else others
        raise DataError(
            f"{folder}: {several(f.name for f in odd)} beside {kind} such as "
            f"{several([next(f.name for f in files if f not in odd)])}, of which it may be the "
            "sum; name one file, or move what is not meant to another folder"
        )
    return files


_SUM = re.compile(r"samples_\d+x\d+x\d+x3")


def _open(path: Path) -> _File:
    """What an npz holds, without reading its images. Raises DataError."""
    if not path.is_file():
        raise DataError(f"{path}: no such folder or npz file of images")
    with (
        refusing(f"{path}: not a readable npz file"),
        zipfile.ZipFile(path) as archive,
    ):
        members = archive.namelist()
        twice = [name for name in (IMAGES, LABELS) if members.count(name) > 1]
        if twice:
            raise DataError(f"{path}: {twice[0]} is there twice; write the file again")
        if IMAGES not in members:
            keys = several(sorted(name.removesuffix(".npy") for name in members))
            raise DataError(f"{path}: no images: arr_0 is missing, it holds {keys}")
        images = read_array_header(archive, IMAGES)
        _check_images(path, images)
        labels = _labels(path, archive, images.shape[0]) if LABELS in members else None
        start = _offset(path, archive.getinfo(IMAGES), images.start)
    return _File(path, images.shape, labels, start)


@dataclass(frozen=True)
class ArrayHeader:
    """What an array in an npz says of itself. start: bytes before its data."""

    shape: tuple[int, ...]
    fortran: bool
    dtype: np.dtype
    start: int


def read_array_header(archive: zipfile.ZipFile, name: str) -> ArrayHeader:
    """The header of a member, checked against its size. Raises ValueError, as zipfile does."""
    member = archive.getinfo(name)
    check_member(member, _memory())
    # So much and no more: a header may claim gigabytes.
    with archive.open(member) as stream:
        head = BytesIO(stream.read(_HEADER))
    # NumPy writes the newer headers only where a shape does not fit
    # the older one.
    read = npy.read_array_header_1_0
    if npy.read_magic(head) != (1, 0):
        read = npy.read_array_header_2_0
    shape, fortran, dtype = read(head)
    size = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) < 0 or dtype.hasobject or head.tell() + size != member.file_size:
        raise ValueError(f"{name.removesuffix('.npy')} has another size than it says")
    return ArrayHeader(shape, fortran, dtype, head.tell())


def read_array(archive: zipfile.ZipFile, name: str) -> np.ndarray:
    """An array of numbers. Raises ValueError, as zipfile does."""
    header = read_array_header(archive, name)
    if header.dtype.kind not in "fiu":
        raise ValueError(f"{name.removesuffix('.npy')} does not hold numbers")
    data = np.frombuffer(read_member(archive, name, _memory()), np.uint8)
    flat = data[header.start :].view(header.dtype)
    return flat.reshape(header.shape, order="F" if header.fortran else "C")


def _memory() -> int:
    """Bytes of this machine's memory: what is larger cannot be read whole."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _check_images(path: Path, images: ArrayHeader) -> None:
    """Raises DataError for an arr_0 that is not 8-bit images."""
    if images.dtype != np.uint8:
        raise DataError(f"{path}: arr_0 must be uint8 in C order, not {images.dtype!s:.40}")
    shape, size = images.shape, math.prod(images.shape)
    if len(shape) != 4 or shape[3] != 3 or not all(shape[1:3]):
        raise DataError(f"{path}: arr_0 must be images [n, h, w, 3], not {list(shape[:6])!s:.80}")
    if images.fortran and size:
        raise DataError(
            f"{path}: arr_0 must be uint8 in C order, it is in Fortran order; save "
            "numpy.ascontiguousarray of it"
        )


def _labels(path: Path, archive: zipfile.ZipFile, count: int) -> np.ndarray:
    """The classes of `count` images, int64 [n]. Raises DataError, and as `read_array`."""
    header = read_array_header(archive, LABELS)
    fits = header.shape == (count,) and header.dtype.kind in "iu"
    labels = read_array(archive, LABELS) if fits else np.zeros(0)
    if not fits or (labels < 0).any() or (labels >= MAX_CLASSES).any():
        raise DataError(
            f"{path}: arr_1 must be {count} classes, whole numbers from 0, not "
            f"{header.dtype!s:.40} {list(header.shape[:6])!s:.80}, and all below {MAX_CLASSES:,}"
        )
    return labels.astype(np.int64)


def _offset(path: Path, member: zipfile.ZipInfo, header: int) -> int | None:
    """Where the array's data begin in the file, None if compressed. header: bytes before them."""
    if member.compress_type != zipfile.ZIP_STORED:
        return None
    # The lengths of the name and of the extra field stand in front
    # of the data; the directory at the end of the file has its own
    # extra field, of another length.
    with path.open("rb") as file:
        file.seek(member.header_offset + 26)
        name, extra = struct.unpack("<HH", file.read(4))
    return member.header_offset + 30 + name + extra + header


def _read(file: _File, start: int, size: int) -> bytes:
    """Bytes of a file at an offset. Raises DataError if there are fewer."""
    # Opened for each image, as image files are: a set may have more
    # files than a process may hold open. No memory map: a file that
    # shrinks under it kills the process without a message.
    try:
        with file.path.open("rb", buffering=0) as stream:
            data = os.pread(stream.fileno(), size, start)
    except OSError as error:
        raise DataError(f"{file.path}: cannot be read ({one_line(error)})") from error
    if len(data) != size:
        raise DataError(f"{file.path}: damaged (arr_0 ends early)")
    return data

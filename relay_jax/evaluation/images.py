"""Sets of 8-bit images to score, read in order: a folder, an npz, a data set.

A set is read in shares, one for each host, that make the whole of it. A share comes in parts,
as many on every host (some may be short or empty), so that hosts can agree on something between
parts; each part says which images it holds.
"""

import hashlib
import json
import math
import os
import re
import zipfile
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from relay_jax.data.images import DataError, one_line
from relay_jax.data.packed import MANIFEST, read_manifest
from relay_jax.data.source import EdmZip, ImageFolder, PackedDataset, Source, at_resolution, picture
from relay_jax.data.storage import file_sha256
from relay_jax.data.transforms import center_crop_resize

AHEAD = 2  # parts decoded beyond the one in use


Part = tuple[np.ndarray, np.ndarray]  # positions int [n] in the set, pixels uint8 [n, r, r, 3]


class ImageSet(Protocol):
    """Images of one size. identity: what a report says of the set: kind, images and a hash at
    least."""

    resolution: int
    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """This host's images in parts of `batch` or fewer. Raises DataError."""
        ...


def chosen(total: int, limit: int) -> np.ndarray:
    """Positions of at most `limit` of `total` images: all, or a choice that is always the same.
    Rising, int [n].

    Not the first ones: folders and data sets are often in the order of their classes.
    """
    if total <= limit:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, limit, replace=False))


def parts_of(count: int, host: int, hosts: int, batch: int) -> list[np.ndarray]:
    """Positions of the parts of a share: of the images host, host + hosts, ..."""
    own, parts = np.arange(host, count, hosts), math.ceil(math.ceil(count / hosts) / batch)
    return [own[number * batch : (number + 1) * batch] for number in range(parts)]


def _stack(images: Sequence[np.ndarray], resolution: int) -> np.ndarray:
    return np.stack(images) if len(images) else np.empty((0, resolution, resolution, 3), np.uint8)


def digest(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def npz_sha256(path: Path) -> str:
    """SHA-256 of a file's bytes. Raises DataError if it cannot be read."""
    try:
        return file_sha256(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({one_line(error)})") from error


def folder_sha256(source: ImageFolder) -> str:
    """Hash of the listing of a folder's images: paths below it, sizes and times.

    The images themselves are not read: a data set may be terabytes. A copy with new times has
    another hash.
    """
    found = []
    for file in map(source.file, range(len(source))):
        try:
            status = os.stat(file)
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({one_line(error)})") from error
        found.append([os.path.relpath(file, source.path), status.st_size, status.st_mtime_ns])
    return digest(found)


def source_sha256(source: Source, description: dict[str, Any]) -> str:
    """Hash of what a data set holds, as far as that is known without reading it.

    description: what the configuration says of it; all that there is for procedural and TFDS sets.
    """
    if isinstance(source, ImageFolder):
        return folder_sha256(source)
    if isinstance(source, EdmZip):
        with zipfile.ZipFile(source.path) as archive:
            return digest(
                [[info.filename, info.CRC, info.file_size] for info in archive.infolist()]
            )
    if isinstance(source, PackedDataset):
        return digest(read_manifest(source.path))
    return digest([description, len(source)])


class SourceImages:
    """Images of a source, decoded in threads ahead of their use.

    exact: every image must have `resolution` pixels per side already; else they are cropped and
    resized as in training.
    limit: use so many of them at most (`chosen`), 0 = all.
    """

    def __init__(
        self,
        source: Source,
        resolution: int,
        identity: dict[str, Any],
        *,
        exact: bool,
        threads: int,
        limit: int = 0,
    ) -> None:
        self._source, self.resolution = at_resolution(source, resolution), resolution
        self._exact, self._threads = exact, max(threads, 1)
        self._positions = chosen(len(source), limit or len(source))
        rule = (
            {}
            if len(self._positions) == len(source)
            else {"choice": f"of {len(source)}, drawn once by numpy's default_rng(0)"}
        )
        self.identity = {**identity, "images": len(self._positions), **rule}

    def __len__(self) -> int:
        return len(self._positions)

    def _image(self, position: int) -> np.ndarray:
        if not self._exact:
            return center_crop_resize(picture(self._source, position)[0], self.resolution)
        image, _ = self._source[position]
        if image.shape != (self.resolution, self.resolution, 3):
            where = (
                self._source.file(position)
                if isinstance(self._source, ImageFolder)
                else f"image {position}"
            )
            raise DataError(
                f"images of different sizes: {where} has {image.shape[1]} x {image.shape[0]} "
                "pixels, the "
                f"first one {self.resolution} x {self.resolution}; all must be alike"
            )
        return image

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        parts = parts_of(len(self), host, hosts, batch)
        pool, waiting = (
            ThreadPoolExecutor(self._threads, "decode"),
            deque[list[Future[np.ndarray]]](),
        )
        try:
            for number in range(len(parts)):
                while len(waiting) <= AHEAD and number + len(waiting) < len(parts):
                    wanted = self._positions[parts[number + len(waiting)]].tolist()
                    waiting.append([pool.submit(self._image, position) for position in wanted])
                yield (
                    parts[number],
                    _stack([future.result() for future in waiting.popleft()], self.resolution),
                )
        finally:
            pool.shutdown(cancel_futures=True)


class NpzImages:
    """uint8 images [n, r, r, 3] under `arr_0` of one or several npz files, read in order and
    never whole.

    ADM's format of sample batches (arXiv 2105.05233). limit as in SourceImages.
    """

    def __init__(self, files: Sequence[Path], identity: dict[str, Any], limit: int = 0) -> None:
        shapes = [_npy_shape(file) for file in files]
        for file, shape in zip(files, shapes, strict=True):
            if len(shape) != 4 or shape[3] != 3 or shape[1] != shape[2]:
                raise DataError(
                    f"{file}: arr_0 must be images [n, side, side, 3], not {list(shape)}"
                )
            if shape[1:] != shapes[0][1:]:
                raise DataError(
                    f"images of different sizes: {file} has {shape[1]} x {shape[1]} pixels, "
                    f"{files[0]} "
                    f"{shapes[0][1]} x {shapes[0][1]}"
                )
        total = sum(shape[0] for shape in shapes)
        if not total:
            raise DataError(f"{files[0]}: arr_0 holds no images")
        self._files, self.resolution = (
            list(zip(files, [shape[0] for shape in shapes], strict=True)),
            shapes[0][1],
        )
        self._positions = chosen(total, limit or total)
        self.identity = {**identity, "images": len(self._positions)}

    def __len__(self) -> int:
        return len(self._positions)

    def _rows(self) -> Iterator[np.ndarray]:
        """Every image of every file, in order."""
        for file, count in self._files:
            with _open_array(file) as (stream, shape):
                size = int(np.prod(shape[1:]))
                for _ in range(count):
                    data = _read(stream, size, file)
                    yield np.frombuffer(data, np.uint8).reshape(shape[1:])

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        rows = enumerate(self._rows())
        for part in parts_of(len(self), host, hosts, batch):
            wanted, images = self._positions[part].tolist(), list[np.ndarray]()
            while len(images) < len(wanted):
                row, image = next(rows)
                if row == wanted[len(images)]:
                    images.append(image)
            yield part, _stack(images, self.resolution)


class _open_array:
    """The member arr_0.npy of an npz as (stream at its first byte, shape). Raises DataError."""

    def __init__(self, file: Path) -> None:
        self._file = file

    def __enter__(self) -> tuple[Any, tuple[int, ...]]:
        try:
            self._archive = zipfile.ZipFile(self._file)
            if "arr_0.npy" not in self._archive.namelist():
                keys = (
                    ", ".join(
                        sorted(name.removesuffix(".npy") for name in self._archive.namelist())
                    )
                    or "nothing"
                )
                self._archive.close()
                raise DataError(f"{self._file}: no images: arr_0 is missing, it holds {keys}")
            self._stream = self._archive.open("arr_0.npy")
            version = np.lib.format.read_magic(self._stream)
            read = (
                np.lib.format.read_array_header_1_0
                if version == (1, 0)
                else np.lib.format.read_array_header_2_0
            )
            shape, fortran, dtype = read(self._stream)
        except (
            OSError,
            zipfile.BadZipFile,
            zlib.error,
            EOFError,
            NotImplementedError,
            ValueError,
        ) as error:
            if isinstance(error, DataError):
                raise
            raise DataError(f"{self._file}: not a readable npz file ({one_line(error)})") from error
        if dtype != np.uint8 or fortran:
            raise DataError(f"{self._file}: arr_0 must be uint8 in C order, not {dtype}")
        return self._stream, shape

    def __exit__(self, *_: object) -> None:
        self._stream.close()
        self._archive.close()


def _npy_shape(file: Path) -> tuple[int, ...]:
    with _open_array(file) as (_, shape):
        return shape


def _read(stream: Any, size: int, file: Path) -> bytes:
    try:
        data = stream.read(size)
    except (OSError, zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise DataError(f"{file}: damaged ({one_line(error)})") from error
    if len(data) != size:
        raise DataError(f"{file}: damaged (arr_0 ends early)")
    return data


def npz_files(folder: Path) -> list[Path]:
    """The npz files of a folder in their order; of --mode=sample's those named after their
    seeds, not their sum."""
    files = sorted(folder.glob("*.npz"))
    shards = [file for file in files if re.fullmatch(r"\d+-\d+", file.stem)]
    return sorted(shards, key=lambda file: int(file.stem.split("-")[0])) or files


class ArrayImages:
    """Images that are in memory, uint8 [n, r, r, 3], the same on all processes."""

    def __init__(self, pixels: np.ndarray, identity: dict[str, Any]) -> None:
        self._pixels, self.resolution = pixels, pixels.shape[1]
        self.identity = {**identity, "images": len(pixels)}

    def __len__(self) -> int:
        return len(self._pixels)

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        for part in parts_of(len(self), host, hosts, batch):
            yield part, self._pixels[part]


def open_images(path: Path, threads: int) -> ImageSet:
    """The images to score at `path`: a folder of image files, of npz shards or of ArrayRecord
    files, or one npz.

    All must have one size; a folder's order is that of its names. Raises DataError.
    """
    if path.is_dir():
        shards = npz_files(path)
        if shards:
            return NpzImages(
                shards,
                {
                    "kind": "npz",
                    "path": str(path),
                    "sha256": digest([npz_sha256(f) for f in shards]),
                },
            )
        if (path / MANIFEST).exists():
            manifest = read_manifest(path)
            packed = PackedDataset(path, max(manifest["resolutions"], default=0))
            identity = {
                "kind": "arrayrecord",
                "path": str(path),
                "sha256": digest(manifest["shards"]),
            }
            return SourceImages(packed, packed.resolution, identity, exact=True, threads=threads)
        source = ImageFolder(path)
        height, width, _ = source[0][0].shape
        if height != width:
            raise DataError(
                f"{source.file(0)} has {width} x {height} pixels; images must be square"
            )
        return SourceImages(
            source,
            height,
            {"kind": "folder", "path": str(path), "sha256": folder_sha256(source)},
            exact=True,
            threads=threads,
        )
    if not path.exists():
        raise DataError(f"{path}: no such folder or npz file of images")
    return NpzImages([path], {"kind": "npz", "path": str(path), "sha256": npz_sha256(path)})

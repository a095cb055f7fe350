"""Where images come from: position -> (uint8 [h, w, 3], int label).

A source is a finite, ordered set of images that can be read at any position, in any order, from
several threads and from worker processes (it pickles, without open files). Nothing here
shuffles, crops or downloads.
"""

import json
import os
import threading
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import numpy as np
from PIL import Image

from relay_jax.data.folder import list_images
from relay_jax.data.images import EXTENSIONS, DataError, EncodedImages, is_image, one_line
from relay_jax.data.packed import PackedDataset
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.data.tfds import TfdsSource

__all__ = [
    "DataError",
    "EdmZip",
    "ImageFolder",
    "PackedDataset",
    "Source",
    "SyntheticShapes",
    "TfdsSource",
    "at_resolution",
    "make_source",
    "picture",
]


class Source(Protocol):
    """What the loader reads."""

    num_classes: int  # 0: no labels
    class_names: tuple[str, ...]  # empty without labels

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label (0 without labels). Raises DataError for an
        unreadable image."""
        ...


def at_resolution(source: Source, resolution: int) -> Source:
    """The source that a stage of that resolution reads: a packed set holds each resolution
    apart, any other is itself.

    Raises DataError if a packed set was not prepared for it.
    """
    return source.at(resolution) if isinstance(source, PackedDataset) else source


def picture(source: Source, position: int) -> tuple[np.ndarray | Image.Image, int]:
    """The image at `position` as `center_crop_resize` takes it soonest, and its label. Raises
    DataError."""
    return source.picture(position) if isinstance(source, EncodedImages) else source[position]


class ImageFolder(EncodedImages):
    """Image files in a folder: one class per sub-folder (labels by sorted name), or a flat
    folder without labels."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        root = os.fspath(path)
        if not os.path.isdir(root):
            raise DataError(
                f"{root}: no such folder; put the images there, with one sub-folder per class "
                "or none"
            )
        try:
            listing = list_images(root)
        except OSError as error:
            raise DataError(f"{root}: cannot be listed ({one_line(error)})") from error
        flat, classes = listing.flat, listing.classes
        if flat and classes:
            raise DataError(
                f"{root}: holds images (such as {flat[0]}) beside sub-folders of images (such as "
                f"{next(iter(classes))}); move them into the sub-folders, or keep a single "
                "flat folder"
            )
        if not flat and not classes:
            raise DataError(
                f"{root}: no images found; wanted files ending in {' '.join(EXTENSIONS)}"
            )
        self.path = root
        self.class_names: tuple[str, ...] = tuple(classes)
        self.num_classes = len(classes)
        self._files = flat or [
            file for files in classes.values() for file in files
        ]  # below the folder of the class
        self._labels = np.repeat(
            np.arange(len(classes)), [len(files) for files in classes.values()]
        )

    def __len__(self) -> int:
        return len(self._files)

    def _label(self, position: int) -> int:
        return int(self._labels[position]) if self.num_classes else 0

    def file(self, position: int) -> str:
        """Path of the image at a position."""
        below = [self.class_names[self._label(position)]] if self.num_classes else []
        return os.path.join(self.path, *below, self._files[position])

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        label, file = self._label(position), self.file(position)
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror or one_line(error)})"
            ) from error
        return data, file, label


class EdmZip(EncodedImages):
    """EDM's dataset format (arXiv 2206.00364): square images of one size in a zip, labels in
    its `dataset.json`.

    `dataset.json` is {"labels": [["00000/img00000000.png", 6], ...]}; without the file, or with
    null, there are no labels. Images are ordered by name. `resolution` is the size of the
    first; reading another size is a DataError.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self._open_zip: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        if not os.path.isfile(self.path):
            raise DataError(
                f"{self.path}: no such file; put a zip there in the format of EDM's dataset_tool.py"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.namelist()
                index = archive.read("dataset.json") if "dataset.json" in members else b"{}"
        except (zipfile.BadZipFile, OSError, RuntimeError, NotImplementedError) as error:
            raise DataError(f"{self.path}: not a readable zip file ({one_line(error)})") from error
        self._files = sorted(
            name for name in members if is_image(name) and not name.startswith("__MACOSX/")
        )
        if not self._files:
            raise DataError(
                f"{self.path}: no images in this zip; wanted members ending in "
                f"{' '.join(EXTENSIONS)}"
            )
        self._labels = self._read_labels(index)
        self.num_classes = int(self._labels.max()) + 1 if len(self._labels) else 0
        self.class_names: tuple[str, ...] = tuple(str(label) for label in range(self.num_classes))
        width, height = super().picture(0)[0].size
        self.resolution: int = height
        if height != width:
            raise DataError(
                f"{self.path}:{self._files[0]}: wrong image size {width}x{height}; it must be "
                "square"
            )

    def _read_labels(self, index: bytes) -> np.ndarray:
        """Labels [n] in the order of the images, or [0] if there are none. DataError if damaged
        or incomplete."""
        where = f"{self.path}:dataset.json"
        try:
            pairs = json.loads(index).get("labels")
            # EDM's tool writes forward slashes, archives made on Windows hold the other kind.
            labels = (
                None if pairs is None else {name.replace("\\", "/"): label for name, label in pairs}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not an EDM label list ({one_line(error)})") from error
        if labels is None:
            return np.zeros(0, np.int64)
        found = []
        for file in self._files:
            label = labels.get(file.replace("\\", "/"))
            if label is None:
                raise DataError(
                    f"{where}: no label for {file}; label every image, or set labels to null"
                )
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise DataError(
                    f"{where}: the label of {file} is {label!r}; labels are whole numbers from 0"
                )
            found.append(label)
        return np.array(found, np.int64)

    def __getstate__(self) -> dict[str, object]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_open_zip", "_lock")
        }

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._open_zip, self._lock = None, threading.Lock()

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        where = f"{self.path}:{self._files[position]}"
        try:
            # One handle for each process: its file offset is shared by threads, and by a child
            # after fork. Decoding, which takes the time, happens outside the lock.
            with self._lock:
                if self._open_zip is None or self._open_zip[0] != os.getpid():
                    self._open_zip = os.getpid(), zipfile.ZipFile(self.path)
                data = self._open_zip[1].read(self._files[position])
        except (zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, KeyError) as error:
            raise DataError(
                f"{where}: cannot be read ({one_line(error)}); the zip is damaged"
            ) from error
        return data, where, int(self._labels[position]) if self.num_classes else 0

    def __len__(self) -> int:
        return len(self._files)

    def picture(self, position: int) -> tuple[Image.Image, int]:
        picture, label = super().picture(position)
        if picture.size != (self.resolution, self.resolution):
            raise DataError(
                f"{self.path}:{self._files[position]}: wrong image size "
                f"{picture.width}x{picture.height}; the first "
                f"image of this zip is {self.resolution}x{self.resolution}, and all must be alike"
            )
        return picture, label


def make_source(
    source: str,
    *,
    path: str = "",
    name: str = "",
    split: str = "train",
    data_dir: str = "",
    resolution: int,
    size: int,
    seed: int,
) -> Source:
    """The source a configuration names. Raises DataError if it cannot be had.

    source: "synthetic" (reads resolution, size, seed), "folder" or "zip" (path), "packed"
        (path, resolution), "tfds" (name, split, data_dir).
    resolution: that of the largest stage. The synthetic set draws at it, which sets the scale
        of its texture; a packed set is opened at it (`at_resolution` gives the others).
    """
    if source == "synthetic":
        return SyntheticShapes(resolution, size, seed)
    if source == "folder":
        if not path:
            raise DataError(
                "the folder source needs a path: a folder of images, with one sub-folder per "
                "class or none"
            )
        return ImageFolder(path)
    if source == "zip":
        if not path:
            raise DataError(
                "the zip source needs a path: a dataset zip in the format of EDM's dataset_tool.py"
            )
        return EdmZip(path)
    if source == "packed":
        if not path:
            raise DataError(
                "the packed source needs a path: the folder that --mode=prepare has written"
            )
        return PackedDataset(path, resolution)
    if source == "tfds":
        return TfdsSource(name, split, data_dir)
    raise DataError(
        f"unknown source {source!r}; choose synthetic, folder, zip or tfds, or packed "
        "(--mode=prepare)"
    )

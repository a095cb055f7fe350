"""EDM's dataset format (arXiv 2206.00364): square images of one size in a zip, with their labels.

    dataset.zip:00000/img00000000.png
    dataset.zip:dataset.json             {"labels": [["00000/img00000000.png", 6], ...]}

Without `dataset.json`, or with null, there are no labels. Images are
ordered by name.
"""

import json
import os
import threading
import zipfile
import zlib
from collections.abc import Mapping

import numpy as np
from PIL import Image

from relay_jax.data.images import EXTENSIONS, EncodedImages, is_image
from relay_jax.errors import DataError, one_line
from relay_jax.runtime.files import digest

INDEX = "dataset.json"


class EdmZip(EncodedImages):
    """A zip of square images; `resolution` is the size of the first, another one is an error."""

    resolution: int

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises DataError for a zip that is missing, damaged or not of this format."""
        self.path = os.fspath(path)
        if not self.path:
            raise DataError(
                "the zip source needs a path: a dataset zip in the format of EDM's dataset_tool.py"
            )
        self._open_zip: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        if not os.path.isfile(self.path):
            raise DataError(
                f"{self.path}: no such file; put a zip there in the format of EDM's dataset_tool.py"
            )
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.namelist()
                index = archive.read(INDEX) if INDEX in members else b"{}"
        except (
            zipfile.BadZipFile,
            OSError,
            RuntimeError,
            NotImplementedError,
        ) as error:
            raise DataError(f"{self.path}: not a readable zip file ({one_line(error)})") from error
        # macOS adds a folder of its own to every archive that the Finder
        # makes.
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
        self.class_names = tuple(str(label) for label in range(self.num_classes))
        width, height = super().picture(0)[0].size
        self.resolution = height
        if height != width:
            raise DataError(
                f"{self.where(0)}: wrong image size {width}x{height}; it must be square"
            )

    def __len__(self) -> int:
        return len(self._files)

    def where(self, position: int) -> str:
        """The zip and the member."""
        return f"{self.path}:{self._files[position]}"

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        where = self.where(position)
        try:
            # One handle for each process: its file offset is shared by
            # threads, and by a child after fork. Decoding, which takes
            # the time, happens outside the lock.
            with self._lock:
                if self._open_zip is None or self._open_zip[0] != os.getpid():
                    self._open_zip = os.getpid(), zipfile.ZipFile(self.path)
                data = self._open_zip[1].read(self._files[position])
        except (
            zipfile.BadZipFile,
            zlib.error,
            OSError,
            EOFError,
            RuntimeError,
            KeyError,
        ) as error:
            raise DataError(
                f"{where}: cannot be read ({one_line(error)}); the zip is damaged"
            ) from error
        return data, where, int(self._labels[position]) if self.num_classes else 0

    def picture(self, position: int) -> tuple[Image.Image, int]:
        picture, label = super().picture(position)
        if picture.size != (self.resolution, self.resolution):
            raise DataError(
                f"{self.where(position)}: wrong image size {picture.width}x{picture.height}; the "
                f"first image of this zip is {self.resolution}x{self.resolution}, and all must be "
                "alike"
            )
        return picture, label

    def fingerprint(self) -> str:
        """Hash of the zip's own listing: names, checksums and sizes. Raises DataError."""
        # The checksums are in the directory at the end: nothing else is
        # read.
        try:
            with zipfile.ZipFile(self.path) as archive:
                members = archive.infolist()
        except (zipfile.BadZipFile, OSError) as error:
            raise DataError(f"{self.path}: not a readable zip file ({one_line(error)})") from error
        return digest([[member.filename, member.CRC, member.file_size] for member in members])

    def _read_labels(self, index: bytes) -> np.ndarray:
        """Labels [n] in the order of the images, or [0] if there are none. Raises DataError."""
        where = f"{self.path}:{INDEX}"
        try:
            pairs = json.loads(index).get("labels")
            # EDM's tool writes forward slashes, archives made on Windows
            # hold the other kind.
            by_name = (
                None if pairs is None else {name.replace("\\", "/"): label for name, label in pairs}
            )
        except (ValueError, TypeError, AttributeError) as error:
            raise DataError(f"{where}: not an EDM label list ({one_line(error)})") from error
        if by_name is None:
            return np.zeros(0, np.int64)
        labels = []
        for file in self._files:
            label = by_name.get(file.replace("\\", "/"))
            if label is None:
                raise DataError(
                    f"{where}: no label for {file}; label every image, or set labels to null"
                )
            # True and False are whole numbers to Python, not to whoever
            # wrote the list.
            if not isinstance(label, int) or isinstance(label, bool) or label < 0:
                raise DataError(
                    f"{where}: the label of {file} is {label!r}; labels are whole numbers from 0"
                )
            labels.append(label)
        return np.array(labels, np.int64)

    # Neither a lock nor an open file can be sent to a worker process.
    def __getstate__(self) -> dict[str, object]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_open_zip", "_lock")
        }

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._open_zip, self._lock = None, threading.Lock()

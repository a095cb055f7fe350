"""Images in a zip: EDM's dataset format (arXiv 2206.00364), or a folder of class folders, zipped.

    dataset.zip:00000/img00000000.png
    dataset.zip:dataset.json             {"labels": [["00000/img00000000.png", 6], ...]}

    photographs.zip:cat/1.jpg dog/2.jpg  classes by folder; any size

With `dataset.json` all images have one size. The other
rules are those of a folder (data/listing.py). Whoever zips the folder
and not what is in it has all names below one more folder, which is
left out of them.
"""

import os
import threading
import zipfile
from collections.abc import Mapping, Sequence

import numpy as np
from PIL import Image

from relay_jax.data.decoding import is_hidden, is_image, read_header
from relay_jax.data.files import read_member, refusing, several
from relay_jax.data.images import EncodedImages
from relay_jax.data.listing import (
    INDEX,
    RECORD,
    Index,
    arrange,
    check_unique,
    labelled,
)
from relay_jax.errors import DataError
from relay_jax.resolution import as_resolution, height_width
from relay_jax.runtime.counting import counting
from relay_jax.runtime.files import MAX_TEXT, digest

__all__ = ["INDEX", "EdmZip"]


class EdmZip(EncodedImages):
    """A zip of images; `resolution` is the size of the first, None for any that is not EDM's."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises DataError for a zip that is missing, damaged or contradicts itself."""
        self.path = os.fspath(path)
        if not self.path:
            raise DataError(
                "the zip source needs a path: a dataset zip in the format of EDM's dataset_tool.py"
            )
        self._open_zip: tuple[int, zipfile.ZipFile] | None = None
        self._lock = threading.Lock()
        if os.path.isdir(self.path):
            raise DataError(
                f"{self.path}: is a folder, not a zip; use --config.dataset.source=folder"
            )
        if not os.path.isfile(self.path):
            raise DataError(
                f"{self.path}: no such file; put a zip there in the format of EDM's dataset_tool.py"
            )
        # One call, for the whole directory.
        with (
            refusing(f"{self.path}: not a readable zip file"),
            counting(f"listing {os.path.basename(self.path)}"),
            zipfile.ZipFile(self.path) as archive,
        ):
            members = [member for member in archive.infolist() if not member.is_dir()]
            names = [m.filename for m in members if not is_hidden(m.filename)]
            self._above = _common_folder(names)
            index = self._read_index(archive, names)
        check_unique(names, self.path)
        below = [name.replace("\\", "/").removeprefix(self._above) for name in names]
        no_images = {INDEX, RECORD}
        images = labelled(
            arrange(name for name in below if name not in no_images),
            self.path,
            index,
            RECORD in below,
        )
        # What the zip calls them: it may have other slashes.
        called = dict(zip(below, names, strict=True))
        self.class_names, self.unused = images.class_names, images.unused
        self.num_classes, self._labels = len(images.class_names), images.labels
        paths = images.files
        if images.folders:
            tops = [self.class_names[label] for label in images.labels]
            paths = [f"{top}/{file}" for top, file in zip(tops, images.files, strict=True)]
        self._files = [called[name] for name in paths]
        checksums = {member.filename: member.CRC for member in members}
        self._checksums = [checksums[name] for name in self._files]
        self.resolution = None
        if not images.folders:
            header = read_header(self.encoded(0)[0], self.where(0))
            # Photographs have all sizes, zipped or not.
            size = as_resolution((header.height, header.width))
            self.resolution = None if index is None else size

    def __len__(self) -> int:
        return len(self._files)

    def where(self, position: int) -> str:
        """The zip and the member."""
        return f"{self.path}:{several([self._files[position]])}"

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        where = self.where(position)
        # One handle for each process: its file offset is shared by
        # threads, and by a child after fork. Decoding, which takes
        # the time, happens outside the lock.
        with (
            refusing(f"{where}: cannot be read", "; repair the zip"),
            self._lock,
        ):
            if self._open_zip is None or self._open_zip[0] != os.getpid():
                self._open_zip = os.getpid(), zipfile.ZipFile(self.path)
            data = read_member(self._open_zip[1], self._files[position])
        return data, where, int(self._labels[position]) if self.num_classes else 0

    def picture(self, position: int) -> tuple[Image.Image, int]:
        picture, label = super().picture(position)
        if self.resolution is not None:
            height, width = height_width(self.resolution)
            if picture.size != (width, height):
                raise DataError(
                    f"{self.where(position)}: wrong image size {picture.width}x{picture.height}; "
                    f"the first image of this zip is {width}x{height}, and all must be alike"
                )
        return picture, label

    def fingerprint(self) -> str:
        """Hash of the zip's own listing: names, checksums and sizes. Raises DataError."""
        # The checksums are in the directory
        # at the end: nothing else is read.
        with (
            refusing(f"{self.path}: not a readable zip file"),
            zipfile.ZipFile(self.path) as archive,
        ):
            members = archive.infolist()
        return digest([[member.filename, member.CRC, member.file_size] for member in members])

    def known_labels(self) -> np.ndarray | None:
        return self._labels if self.num_classes else None

    def file_name(self, position: int) -> str:
        return self._files[position]

    def file_stamp(self, position: int) -> int:
        """The checksum in the zip's directory."""
        return self._checksums[position]

    def _read_index(self, archive: zipfile.ZipFile, names: Sequence[str]) -> Index | None:
        """The list of labels, if there is one. Raises DataError, and what zipfile raises."""
        where = f"{self.path}:{self._above}{INDEX}"
        if self._above + INDEX in names:
            return read_member(archive, self._above + INDEX, MAX_TEXT), where
        deeper = [name for name in names if name.endswith(f"/{INDEX}")]
        if deeper:
            raise DataError(
                f"{self.path}: {several(deeper)} is below the images' own folder, where nobody "
                "would look at it; zip each data set apart"
            )
        return None

    # Neither a lock nor an open file
    # can be sent to a worker process.
    def __getstate__(self) -> dict[str, object]:
        return {
            key: value for key, value in self.__dict__.items() if key not in ("_open_zip", "_lock")
        }

    def __setstate__(self, state: Mapping[str, object]) -> None:
        self.__dict__.update(state)
        self._open_zip, self._lock = None, threading.Lock()


def _common_folder(names: Sequence[str]) -> str:
    """The folder, with its slash, that all images and their labels are in; '' without one."""
    paths = [name.replace("\\", "/") for name in names]
    used = [path for path in paths if is_image(path) or path.split("/")[-1] == INDEX]
    tops = {path.partition("/")[0] for path in used}
    return f"{tops.pop()}/" if len(tops) == 1 and all("/" in path for path in used) else ""

"""Image files in a folder, listed once: a scan of a million files on a remote disk takes minutes.

The listing is kept in the user's cache folder ($XDG_CACHE_HOME or
~/.cache, below relay_jax), not beside the images, whose folder is
often read-only and shared. Adding, removing or renaming a file
changes the time of the folder it is in: the listing is used as long
as all folders have the inode and the times they had, which takes one
`stat` per folder. A file system that keeps no folder times (some
bucket mounts) would not show a change; removing the cache helps.
"""

import contextlib
import hashlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import numpy as np

from relay_jax.data.decoding import ending, is_hidden, is_image
from relay_jax.data.files import read_file, refusing
from relay_jax.data.images import EncodedImages
from relay_jax.data.listing import (
    INDEX,
    RECORD,
    SPECIAL,
    Index,
    Listing,
    class_order,
    count,
    labelled,
)
from relay_jax.errors import DataError, StorageError, one_line
from relay_jax.runtime.counting import Add, counted, counting
from relay_jax.runtime.files import MAX_TEXT, digest, write_text

VERSION = 2
# Smaller folders are listed faster than their index is checked.
CACHED_IMAGES = 10_000
# A folder that changed just now may change
# again without a new time: clocks tick.
SETTLED_SECONDS = 2.0
# Inode, time of the last change of the entries, time of the last
# change of anything.
Stamp = list[int]


class ImageFolder(EncodedImages):
    """Images in a folder with one class per sub-folder, or with EDM's dataset.json, or without."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises DataError for a folder that is missing, empty or contradicts itself."""
        root = os.fspath(path)
        if not root:
            raise DataError(
                "the folder source needs a path: a folder of images, with one sub-folder per "
                "class or none"
            )
        if os.path.isfile(root):
            kind = {".zip": "zip", ".npz": "npz"}.get(ending(root))
            cure = f"use --config.dataset.source={kind}" if kind else "name the folder it is in"
            raise DataError(f"{root}: is a file, not a folder; {cure}")
        if not os.path.isdir(root):
            raise DataError(
                f"{root}: no such folder; put the images there, with one sub-folder per class "
                "or none"
            )
        with refusing(f"{root}: cannot be listed"):
            listing = list_images(root)
        # Kept open for the next start is the listing
        # alone: what these files say may change without a
        # new time of the folder.
        _check_below(root, listing)
        samples = os.path.exists(os.path.join(root, RECORD))
        images = labelled(listing, root, _index(root), samples)
        self.path, self.unused = root, images.unused
        self.class_names = images.class_names
        self.num_classes = len(self.class_names)
        # Paths below the folder of the class, not whole ones:
        # a million of them are in memory, and are sent to
        # every worker process.
        self._files, self._labels, self._folders = (
            images.files,
            images.labels,
            images.folders,
        )

    def __len__(self) -> int:
        return len(self._files)

    def where(self, position: int) -> str:
        """Path of the image at a position."""
        below = [self.class_names[self._label(position)]] if self._folders else []
        return os.path.join(self.path, *below, self._files[position])

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        label, file = self._label(position), self.where(position)
        try:
            data = read_file(file)
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror or one_line(error)})"
            ) from error
        return data, file, label

    def fingerprint(self) -> str:
        """Hash of the listing: paths below the folder, sizes and times. Raises DataError."""
        # The images themselves are not read: a data set may be
        # terabytes. The price is that a copy with new times has
        # another hash.
        rows = []
        files = map(self.where, range(len(self)))
        for file in counted(files, f"looking at {os.path.basename(self.path)}", len(self)):
            try:
                status = os.stat(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({one_line(error)})") from error
            rows.append(
                [
                    os.path.relpath(file, self.path),
                    status.st_size,
                    status.st_mtime_ns,
                ]
            )
        return digest(rows)

    def known_labels(self) -> np.ndarray | None:
        return np.asarray(self._labels, np.int64) if self.num_classes else None

    def file_name(self, position: int) -> str:
        return os.path.relpath(self.where(position), self.path)

    def file_stamp(self, position: int) -> int:
        """The size in bytes. Raises DataError."""
        file = self.where(position)
        try:
            return os.stat(file).st_size
        except OSError as error:
            raise DataError(f"{file}: cannot be read ({one_line(error)})") from error

    def _label(self, position: int) -> int:
        return int(self._labels[position]) if self.num_classes else 0


def _check_below(root: str, listing: Listing) -> None:
    """Raises DataError if all images are in one folder, with a description that nobody reads."""
    if listing.flat or len(listing.classes) != 1:
        return
    below = os.path.join(root, next(iter(listing.classes)))
    for name in (INDEX, RECORD):
        if os.path.exists(os.path.join(below, name)):
            raise DataError(f"{root}: the images are in {below}, with their {name}; name that one")


def _index(root: str) -> Index | None:
    """The dataset.json of a folder, if there is one. Raises DataError."""
    file = os.path.join(root, INDEX)
    if not os.path.lexists(file):
        return None
    with refusing(f"{file}: cannot be read"):
        return read_file(file, MAX_TEXT), file


def list_images(root: str) -> Listing:
    """The images below `root`, from the index where it holds, else by a scan. Raises OSError."""
    try:
        file = cache_file(root)
    except RuntimeError:  # no home folder
        return _scan(root)[0]
    kept = _load(file, root)
    if kept is not None:
        return kept
    before = time.time()
    listing, stamps = _scan(root)
    newest = max(max(stamp[1:]) for stamp in stamps.values()) / 1e9
    untimed = any(stamp[1] <= 0 for stamp in stamps.values())
    if len(listing) >= CACHED_IMAGES and newest < before - SETTLED_SECONDS and not untimed:
        _save(file, root, listing, stamps)
    return listing


def _scan(root: str) -> tuple[Listing, dict[str, Stamp]]:
    """The images below `root`, and the stamps of its folders. Raises OSError."""
    with counting(f"listing {os.path.basename(os.path.abspath(root))}", unit="images") as add:
        scan = _Scan(root, add)
        return scan.listing(), scan.stamps


def cache_file(root: str) -> Path:
    """Where the listing of a folder is kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return base / "relay_jax" / f"folder-{name}.json"


class _Scan:
    """Walks a folder, noting the stamp of every folder before its entries are read."""

    # Before, so that a file which arrives during the scan leaves a
    # stamp that no longer holds.

    def __init__(self, root: str, add: Add) -> None:
        self._root, self._add = root, add
        self.stamps: dict[str, Stamp] = {}
        self._unused: dict[str, int] = {}

    def listing(self) -> Listing:
        """Raises OSError. Folders without images are no classes."""
        flat, folders = self._entries("")
        classes = {name: sorted(self._below(name, name, ())) for name in folders}
        order = class_order(name for name, files in classes.items() if files)
        return Listing(sorted(flat), {name: classes[name] for name in order}, self._unused)

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the images and of the sub-folders in one folder; hidden ones are left out."""
        path = os.path.join(self._root, folder)
        self.stamps[folder] = _stamp(path)
        images, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if is_hidden(entry.name):
                    continue
                if _is(entry.is_dir):
                    folders.append(entry.name)
                # Reading a pipe would wait for ever; a link may lead
                # nowhere, or to itself.
                elif not _is(entry.is_file):
                    count(self._unused, SPECIAL)
                elif is_image(entry.name):
                    images.append(entry.name)
                    self._add(1)
                elif folder or entry.name not in (INDEX, RECORD):
                    count(self._unused, ending(entry.name))
        return images, folders

    def _below(self, top: str, folder: str, above: tuple[tuple[int, int], ...]) -> list[str]:
        """Images at any depth below `top`, as paths from there; above: the parents' inodes."""
        # A link to a parent folder would
        # otherwise be followed for ever.
        status = os.stat(os.path.join(self._root, folder))
        inode = (status.st_dev, status.st_ino)
        if inode in above:
            return []
        images, folders = self._entries(folder)
        prefix = folder[len(top) + 1 :]
        files = [os.path.join(prefix, name) for name in images]
        for name in folders:
            files += self._below(top, os.path.join(folder, name), (*above, inode))
        return files


def _is(kind: Callable[[], bool]) -> bool:
    try:
        return kind()
    except OSError:
        return False


def _stamp(folder: str) -> Stamp:
    status = os.stat(folder)
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


def _load(file: Path, root: str) -> Listing | None:
    """The listing kept in `file` if it is that of the folder as it is now, else None."""
    try:
        kept = json.loads(file.read_bytes())
        if kept["version"] != VERSION or kept["root"] != os.path.realpath(root):
            return None
        for folder, stamp in kept["folders"].items():
            if _stamp(os.path.join(root, folder)) != stamp:
                return None
        return Listing(**kept["listing"])
    # Absent, damaged, or a folder has gone: a scan is always right.
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
        RecursionError,
    ):
        return None


def _save(file: Path, root: str, listing: Listing, stamps: dict[str, Stamp]) -> None:
    """Keeps a listing where it can be written; elsewhere the next start scans again."""
    kept = {
        "version": VERSION,
        "root": os.path.realpath(root),
        "folders": stamps,
        "listing": asdict(listing),
    }
    with contextlib.suppress(StorageError):
        write_text(file, json.dumps(kept, separators=(",", ":")))

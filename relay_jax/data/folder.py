"""Image files in a folder, listed once: a scan of a million files on a remote disk takes minutes.

The listing is kept in the user's cache folder ($XDG_CACHE_HOME or
~/.cache, below relay_jax), not beside the images, whose folder is often
read-only and shared. Adding, removing or renaming a file changes the
time of the folder it is in: the listing is used as long as all folders
have the inode and the times they had, which takes one `stat` per
folder. A file system that keeps no folder times (some bucket mounts)
would not show a change; removing the cache helps.
"""

import contextlib
import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from relay_jax.data.images import EXTENSIONS, EncodedImages, is_image
from relay_jax.errors import DataError, StorageError, one_line
from relay_jax.runtime.files import digest, write_text

VERSION = 1
# Smaller folders are listed faster than their index is checked.
CACHED_IMAGES = 10_000
# A folder that changed just now may change again without a new time:
# clocks tick.
SETTLED_SECONDS = 2.0
# Inode, time of the last change of the entries, time of the last change
# of anything.
Stamp = list[int]


class ImageFolder(EncodedImages):
    """One class per sub-folder (labels by sorted name), or a flat folder without labels."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """Raises DataError for a folder that is missing, empty or mixes both layouts."""
        root = os.fspath(path)
        if not root:
            raise DataError(
                "the folder source needs a path: a folder of images, with one sub-folder per "
                "class or none"
            )
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
        # Images beside class folders are a mistake nearly always; to drop
        # either would be silent.
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
        self.class_names = tuple(classes)
        self.num_classes = len(classes)
        # Paths below the folder of the class, not whole ones: a million
        # of them are in memory, and are sent to every worker process.
        self._files = flat or [file for files in classes.values() for file in files]
        self._labels = np.repeat(
            np.arange(len(classes)), [len(files) for files in classes.values()]
        )

    def __len__(self) -> int:
        return len(self._files)

    def where(self, position: int) -> str:
        """Path of the image at a position."""
        below = [self.class_names[self._label(position)]] if self.num_classes else []
        return os.path.join(self.path, *below, self._files[position])

    def encoded(self, position: int) -> tuple[bytes, str, int]:
        label, file = self._label(position), self.where(position)
        try:
            data = Path(file).read_bytes()
        except OSError as error:
            raise DataError(
                f"{file}: cannot be read ({error.strerror or one_line(error)})"
            ) from error
        return data, file, label

    def fingerprint(self) -> str:
        """Hash of the listing: paths below the folder, sizes and times. Raises DataError."""
        # The images themselves are not read: a data set may be terabytes.
        # The price is that a copy with new times has another hash.
        rows = []
        for file in map(self.where, range(len(self))):
            try:
                status = os.stat(file)
            except OSError as error:
                raise DataError(f"{file}: cannot be read ({one_line(error)})") from error
            rows.append([os.path.relpath(file, self.path), status.st_size, status.st_mtime_ns])
        return digest(rows)

    def _label(self, position: int) -> int:
        return int(self._labels[position]) if self.num_classes else 0


@dataclass
class Listing:
    """Image files, sorted, as paths below the folder of their class; flat: those without one."""

    flat: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.flat) + sum(map(len, self.classes.values()))


def list_images(root: str) -> Listing:
    """The images below `root`, from the index where it holds, else by a scan. Raises OSError."""
    try:
        file = cache_file(root)
    except RuntimeError:  # no home folder
        return _Scan(root).listing()
    kept = _load(file, root)
    if kept is not None:
        return kept
    before = time.time()
    scan = _Scan(root)
    listing = scan.listing()
    newest = max(max(stamp[1:]) for stamp in scan.stamps.values()) / 1e9
    untimed = any(stamp[1] <= 0 for stamp in scan.stamps.values())
    if len(listing) >= CACHED_IMAGES and newest < before - SETTLED_SECONDS and not untimed:
        _save(file, root, listing, scan.stamps)
    return listing


def cache_file(root: str) -> Path:
    """Where the listing of a folder is kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return base / "relay_jax" / f"folder-{name}.json"


class _Scan:
    """Walks a folder, noting the stamp of every folder before its entries are read."""

    # Before, so that a file which arrives during the scan leaves a stamp
    # that no longer holds.

    def __init__(self, root: str) -> None:
        self._root = root
        self.stamps: dict[str, Stamp] = {}

    def listing(self) -> Listing:
        """Raises OSError. Folders without images are no classes."""
        flat, folders = self._entries("")
        classes = {name: sorted(self._below(name, name, ())) for name in sorted(folders)}
        return Listing(sorted(flat), {name: files for name, files in classes.items() if files})

    def _entries(self, folder: str) -> tuple[list[str], list[str]]:
        """Names of the images and of the sub-folders in one folder; hidden ones are left out."""
        path = os.path.join(self._root, folder)
        self.stamps[folder] = _stamp(path)
        images, folders = [], []
        with os.scandir(path) as entries:
            for entry in entries:
                if entry.is_dir():
                    folders += [] if entry.name.startswith(".") else [entry.name]
                elif is_image(entry.name):
                    images.append(entry.name)
        return images, folders

    def _below(self, top: str, folder: str, above: tuple[tuple[int, int], ...]) -> list[str]:
        """Images at any depth below `top`, as paths from there; above: the parents' inodes."""
        # A link to a parent folder would otherwise be followed for ever.
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
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
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

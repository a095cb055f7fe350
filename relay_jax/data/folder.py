"""The images of a folder, listed once: scanning a million files on a cold or remote disk takes
minutes.

The listing is kept in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, below relay_jax),
not beside the images, whose folder is often read-only and shared. Adding, removing or renaming
a file changes the time of the folder it is in: the listing is used as long as all folders have
the inode and the times they had. One `stat` per folder finds that out. A file system that does
not keep folder times (some bucket mounts) would not show a change; removing the cache helps.
"""

import hashlib
import json
import os
import time
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path

from relay_jax.data.images import is_image

VERSION = 1
CACHED_IMAGES = 10_000  # smaller folders are listed faster than their index is checked
SETTLED_SECONDS = (
    2.0  # a folder that changed just now may change again without a new time: clocks tick
)


@dataclass
class Listing:
    """Image files, sorted, with paths below the folder of their class; `flat`: those without a
    class."""

    flat: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.flat) + sum(map(len, self.classes.values()))


Stamp = list[
    int
]  # inode, time of the last change of the entries, time of the last change of anything


def _stamp(folder: str) -> Stamp:
    status = os.stat(folder)
    return [status.st_ino, status.st_mtime_ns, status.st_ctime_ns]


class _Scan:
    """Walks a folder, noting the stamp of every folder before its entries are read."""

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
        """Images at any depth below `top`, as paths from there. `above` guards against links to
        a parent folder."""
        status = os.stat(os.path.join(self._root, folder))
        here = (status.st_dev, status.st_ino)
        if here in above:
            return []
        images, folders = self._entries(folder)
        prefix = folder[len(top) + 1 :]
        found = [os.path.join(prefix, name) for name in images]
        for name in folders:
            found += self._below(top, os.path.join(folder, name), above + (here,))
        return found


def cache_file(root: str) -> Path:
    """Where the listing of a folder is kept."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()[:24]
    return base / "relay_jax" / f"folder-{name}.json"


def _load(file: Path, root: str) -> Listing | None:
    """The listing kept in `file` if it is that of the folder as it is now, else None."""
    try:
        kept = json.loads(file.read_bytes())
        if kept["version"] != VERSION or kept["root"] != os.path.realpath(root):
            return None
        if any(
            _stamp(os.path.join(root, folder)) != stamp for folder, stamp in kept["folders"].items()
        ):
            return None
        return Listing(**kept["listing"])
    except (
        OSError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ):  # absent, damaged, or a folder has gone
        return None


def _save(file: Path, root: str, listing: Listing, stamps: dict[str, Stamp]) -> None:
    """Keeps a listing where it can be written; elsewhere the next start scans again."""
    kept = {
        "version": VERSION,
        "root": os.path.realpath(root),
        "folders": stamps,
        "listing": asdict(listing),
    }
    temporary = file.with_suffix(f".{os.urandom(4).hex()}.tmp")  # hosts may share the cache folder
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary.write_text(json.dumps(kept, separators=(",", ":")), "ascii")
        temporary.replace(file)
    except OSError:
        with suppress(OSError):
            temporary.unlink()


def list_images(root: str) -> Listing:
    """The images below `root`, from the index where it holds, else by a scan. Raises OSError if
    it cannot be listed."""
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

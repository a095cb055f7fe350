"""What a folder or a zip of images holds: the images, their classes, and what is not used.

    a.png b.png                       no classes
    cat/1.png dog/2.png               classes by name, by number where all names are numbers
    dataset.json 00000/img0.png       EDM's format (arXiv 2206.00364): its labels
    samples.json 000000/000000.png    samples, of this program or of EDM's: no classes

One set of rules for both: whoever
unpacks a zip has the same data set.
"""

import posixpath
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from relay_jax.data.decoding import EXTENSIONS, ending, is_hidden, is_image
from relay_jax.data.files import MAX_CLASSES, several, show
from relay_jax.errors import DataError, one_line
from relay_jax.runtime.files import parse_json

INDEX = "dataset.json"
RECORD = "samples.json"
# What is counted for images that are no files that could be read.
SPECIAL, MISSING = "not a regular file", "listed but missing"
# The bytes of a dataset.json, and what errors call it.
Index = tuple[bytes, str]


@dataclass
class Listing:
    """Image files, sorted, as paths below the folder of their class; flat: those without one.

    unused: other files, by ending.
    """

    flat: list[str] = field(default_factory=list)
    classes: dict[str, list[str]] = field(default_factory=dict)
    unused: dict[str, int] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.flat) + sum(map(len, self.classes.values()))

    def paths(self) -> list[str]:
        """All images by name, as paths below the set."""
        return sorted(
            [
                *self.flat,
                *(f"{name}/{file}" for name, files in self.classes.items() for file in files),
            ]
        )

    def without_classes(self) -> "Listing":
        """The same files, of a set whose folders mean nothing."""
        return Listing(self.paths(), {}, dict(self.unused))


@dataclass(frozen=True)
class Labelled:
    """Images and what they show. files: paths below the set, or below `class_names` if `folders`.

    labels: int64 [n], or [0] without labels. folders: whether
    classes are folders.
    """

    files: list[str]
    labels: np.ndarray
    class_names: tuple[str, ...]
    unused: Mapping[str, int]
    folders: bool = False


def class_order(names: Iterable[str]) -> list[str]:
    """Names of classes in the order of their labels: 2 before 10 where all are numbers."""
    listed = sorted(names)
    if all(name.isascii() and name.isdigit() for name in listed):
        listed.sort(key=int)
    return listed


def arrange(paths: Iterable[str]) -> Listing:
    """The listing of a set by the paths of its files, with forward slashes."""
    listing = Listing()
    for path in paths:
        if is_hidden(path):
            continue
        if not is_image(path):
            count(listing.unused, ending(path))
            continue
        top, slash, below = path.partition("/")
        if slash:
            listing.classes.setdefault(top, []).append(below)
        else:
            listing.flat.append(path)
    listing.flat.sort()
    listing.classes = {name: sorted(listing.classes[name]) for name in class_order(listing.classes)}
    return listing


def count(unused: dict[str, int], kind: str) -> None:
    """Adds a file that is not used."""
    unused[kind] = unused.get(kind, 0) + 1


def labelled(listing: Listing, where: str, index: Index | None, samples: bool) -> Labelled:
    """The images of a set with their labels.

    where: what errors call the set. index: its dataset.json, if
    there is one. samples: whether it has a samples.json. Raises
    DataError for a set that is empty, or that contradicts itself.
    """
    listed = parse_index(index) if index is not None else None
    mixed = bool(listing.flat and listing.classes)
    if index is not None or (not mixed and (samples or is_numbered(listing))):
        listing = listing.without_classes()
    if not listing:
        kinds = [f"{number} {kind or 'without ending'}" for kind, number in listing.unused.items()]
        rest = f"; it holds {several(kinds)}" if kinds else ""
        raise DataError(
            f"{where}: no images found; wanted files ending in {' '.join(EXTENSIONS)}{rest}"
        )
    flat, classes = listing.flat, listing.classes
    # Images beside class folders are a mistake nearly always; to
    # drop either would be silent.
    if flat and classes:
        raise DataError(
            f"{where}: holds images (such as {several(flat[:1])}) beside sub-folders of images "
            f"(such as {several([*classes][:1])}); move them into the sub-folders, or keep a "
            "single flat folder"
        )
    if classes:
        sizes = [len(files) for files in classes.values()]
        labels = np.repeat(np.arange(len(classes)), sizes)
        files = [file for names in classes.values() for file in names]
        return Labelled(files, labels, tuple(classes), listing.unused, folders=True)
    labels = np.zeros(0, np.int64)
    if index is not None and listed is not None:
        labels = match(listed, flat, index[1])
        if listed:
            listing.unused[MISSING] = len(listed)
    numbers = range(int(labels.max()) + 1 if len(labels) else 0)
    return Labelled(flat, labels, tuple(map(str, numbers)), listing.unused)


def is_numbered(listing: Listing) -> bool:
    """Whether folders are those of a running number: 000000/000012.png, 00000/img00000012.png."""
    # Taken for classes they would teach a network the thousand that
    # an image happens to be in.
    if listing.flat or not listing.classes:
        return False
    for folder, files in listing.classes.items():
        if not (folder.isascii() and folder.isdigit() and len(folder) in (5, 6)):
            return False
        for file in files:
            stem = posixpath.splitext(file)[0].removeprefix("img")
            if not (stem.isascii() and stem.isdigit() and len(stem) >= 6):
                return False
            thousand = int(stem) // 1000
            if int(folder) not in (thousand, 1000 * thousand):
                return False
    return True


def parse_index(index: Index) -> dict[str, Any] | None:
    """Labels of dataset.json by `canonical` name, None if it says that there are none.

    Raises DataError.
    """
    data, where = index
    try:
        value = parse_json(data.decode())
        pairs = value.get("labels")
        rows = None if pairs is None else [(str.__str__(name), label) for name, label in pairs]
    except (ValueError, TypeError, AttributeError) as error:
        raise DataError(f"{where}: not an EDM label list ({one_line(error, 160)})") from error
    if rows is None:
        # Other descriptions have the same name.
        if "shards" in value:
            raise DataError(f"{where}: is that of a packed set; use --config.dataset.source=packed")
        return None
    labels: dict[str, Any] = {}
    for name, label in rows:
        key = canonical(name)
        if key in labels:
            raise DataError(
                f"{where}: {several([name])} is listed twice, with the labels "
                f"{show(labels[key])} and {show(label)}; keep one of them"
            )
        labels[key] = label
    return labels


def match(labels: dict[str, Any], files: Sequence[str], where: str) -> np.ndarray:
    """The labels of `files`, int64 [n]; they are taken from `labels`. Raises DataError."""
    matched = []
    for file in files:
        label = labels.pop(canonical(file), None)
        if label is None:
            raise DataError(
                f"{where}: no label for {several([file])}; label every image, or set labels to null"
            )
        # True and False are whole numbers to Python, not to whoever
        # wrote the list.
        if type(label) is not int or not 0 <= label < MAX_CLASSES:
            raise DataError(
                f"{where}: the label of {several([file])} is {show(label)}; labels are whole "
                f"numbers from 0, below {MAX_CLASSES:,}"
            )
        matched.append(label)
    return np.array(matched, np.int64)


def canonical(name: str) -> str:
    """One writing of a path: archives of Windows, macOS and Linux have different ones."""
    # Nearly all names are plain, and there may be a million.
    if name.isascii() and not any(mark in name for mark in ("\\", "//", "./")):
        return name
    return unicodedata.normalize("NFC", posixpath.normpath(name.replace("\\", "/")))


def check_unique(files: Sequence[str], where: str) -> None:
    """Raises DataError for a file that is there twice, or under two writings of its name."""
    seen: dict[str, str] = {}
    for file in files:
        key = canonical(file)
        if key in seen:
            also = "" if seen[key] == file else f", also as {several([seen[key]])}"
            raise DataError(f"{where}: {several([file])} is there twice{also}; keep one of them")
        seen[key] = file

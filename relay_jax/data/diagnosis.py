"""What is probably wrong with the classes of a data set, in words, before a cure is offered.

The number in the configuration is rarely what must change: a folder
of splits, a class without images and a zip whose list of labels lies
one folder too deep all look like "another number of classes".
"""

import os
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from relay_jax.data.folder import ImageFolder
from relay_jax.data.zip import INDEX, EdmZip

SPLITS = {
    "train",
    "training",
    "val",
    "valid",
    "validation",
    "test",
    "testing",
    "dev",
    "eval",
}
LISTED = 3  # names at each end of a list


def wrong_classes(source: Any, dataset: Mapping[str, Any]) -> str:
    """One line for a set whose number of classes is not that of the configuration.

    What was found comes first, then
    the likely cause, then what to set.
    """
    number, names = source.num_classes, list(source.class_names)
    expected = dataset["num_classes"]
    what = f"{number} {'class' if number == 1 else 'classes'}" if number else "no classes"
    listed = f" ({shortened(names)})" if names else ""
    cause = likely_cause(source)
    cure = f"set --config.dataset.num_classes={number}" + ("" if number else ", for no labels")
    return (
        f"the data set has {what}{listed}, the configuration dataset.num_classes={expected}; "
        + (f"{cause}; or " if cause else "")
        + cure
    )


def likely_cause(source: Any) -> str:
    """Why the classes may not be those that were meant, '' where nothing is suspicious."""
    path = str(getattr(source, "path", ""))
    if splits := _splits(source.class_names):
        return (
            "these are names of splits, not of classes: name one of them, such as "
            f"--config.dataset.path={_end(os.path.join(path, splits[0]))}"
        )
    # A class without images takes no number: all classes behind it
    # have moved up by one.
    if isinstance(source, ImageFolder):
        if not source.num_classes:
            return "all images lie in one folder: classes are its sub-folders"
        if empty := folders_without_images(source):
            return f"no images that can be used are in {shortened(empty)}"
    # The labels of a zip are in a file
    # that may be missing or elsewhere.
    if isinstance(source, EdmZip) and not source.num_classes:
        return _zip_without_labels(path)
    return ""


def folders_without_images(source: Any) -> list[str]:
    """Sub-folders of a folder of classes that are no class, because nothing in them is used."""
    labels = source.known_labels() if isinstance(source, ImageFolder) else None
    # Where a list gives the labels, folders are none.
    if labels is None or not source.where(0).startswith(
        os.path.join(source.path, source.class_names[int(labels[0])], "")
    ):
        return []
    try:
        with os.scandir(source.path) as entries:
            names = sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))
    except OSError:
        return []
    return [name for name in names if name not in source.class_names]


def shortened(names: Sequence[str], most: int = 2 * LISTED) -> str:
    """Names as 'a, b, c ... x, y, z'; long ones are cut."""
    short = [name if len(name) <= 24 else f"{name[:21]}..." for name in names]
    if len(short) <= most:
        return ", ".join(short)
    half = most // 2
    return f"{', '.join(short[:half])} ... {', '.join(short[-half:])}"


def _splits(names: Iterable[str]) -> list[str]:
    """The names, training first, if all of them are those of splits."""
    words = list(names)
    if not words or not all(word.lower() in SPLITS for word in words):
        return []
    return sorted(words, key=lambda word: not word.lower().startswith("train"))


def _zip_without_labels(path: str) -> str:
    """Where the labels of a zip may be."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = {name.rpartition("/")[2] for name in archive.namelist()}
    except (OSError, zipfile.BadZipFile):
        return ""
    if INDEX in names:
        return f"its {INDEX} holds no labels"
    return f"it has no {INDEX}, which would name the classes, and no class folders"


def _end(path: str, most: int = 80) -> str:
    return path if len(path) <= most else f"...{path[3 - most :]}"

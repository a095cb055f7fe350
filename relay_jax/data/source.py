"""Where images come from: a source gives (uint8 [h, w, 3], int label) at any position.

A source is a finite, ordered set of images that can be read in any
order, from several threads and from worker processes (it pickles,
without open files). Nothing here shuffles, crops or downloads. A new
source is a subclass of `ImageSource` and a line in `SOURCES`, or no
line at all: config.dataset.source may name `package.module:Class`.
"""

import importlib
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from PIL import Image

from relay_jax.data.diagnosis import wrong_classes
from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import ImageSource
from relay_jax.data.npz import NpzImages
from relay_jax.data.packed import PackedDataset
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.data.tfds import TfdsSource
from relay_jax.data.zip import EdmZip
from relay_jax.errors import DataError, UserError, one_line
from relay_jax.resolution import Resolution, height_width, pixels_text, size_text, smaller

__all__ = [
    "SOURCES",
    "ImageSource",
    "Source",
    "describe_source",
    "draw",
    "draw_balanced",
    "open_source",
]


class Source(Protocol):
    """What the loader, the preparation and the evaluation read; `ImageSource` has the defaults."""

    @property
    def num_classes(self) -> int:
        """0: no labels."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class; empty without labels."""

    @property
    def resolution(self) -> Resolution | None:
        """Of all images; None where they differ."""

    @property
    def prepared(self) -> bool:
        """Whether the images are cropped and resized for the stages already."""

    @property
    def unused(self) -> Mapping[str, int]:
        """Files beside the images that are not used, by ending."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""

    def fingerprint(self) -> str:
        """SHA-256 of what the set holds, as far as known without decoding it. Raises DataError."""

    def identity(self) -> str:
        """As `fingerprint`, but the same wherever the set lies. Raises DataError."""

    def known_labels(self) -> np.ndarray | None:
        """The labels of all images, int64 [n], None where they are not known without decoding."""

    def class_counts(self) -> list[int] | None:
        """Images of each class, None where they are not known without decoding."""

    def file_name(self, position: int) -> str:
        """The path of an image's file below the set, '' for images that are no files."""

    def file_stamp(self, position: int) -> int:
        """A number that changes with the bytes of an image's file. Raises DataError."""

    def at(self, resolution: Resolution) -> "Source":
        """The source that a stage of this resolution reads. Raises DataError without one."""

    def picture(self, position: int) -> tuple[np.ndarray | Image.Image, int]:
        """The image as `center_crop_resize` takes it soonest, and its label. Raises DataError."""

    def where(self, position: int) -> str:
        """What error messages call the image at a position."""


# dataset.source -> class
SOURCES: dict[str, type[ImageSource]] = {
    "synthetic": SyntheticShapes,
    "folder": ImageFolder,
    "zip": EdmZip,
    "npz": NpzImages,
    "packed": PackedDataset,
    "tfds": TfdsSource,
}


def open_source(dataset: Mapping[str, Any], resolutions: Sequence[Resolution], seed: int) -> Source:
    """The data set of a configuration, checked against it.

    dataset: config.dataset. resolutions: of all stages, in any
    order. Raises DataError if it is missing, damaged or not there at
    one of the resolutions, and UserError for another number of
    classes or images smaller than the largest stage.
    """
    source_class = _source_class(dataset["source"])
    largest = max(resolutions, key=height_width)
    try:
        source: Source = source_class.from_config(dataset, largest, seed)
        # A packed set holds each resolution apart: one that is
        # missing must be known now, not when the stage that needs it
        # begins, days later.
        for resolution in resolutions:
            source.at(resolution)
    except DataError as error:
        # The hint says where the originals come from, which is no
        # help for a prepared set.
        if source_class.prepared or not dataset["hint"]:
            raise
        raise DataError(f"{error}; {dataset['hint']}") from error
    _check(source, dataset, largest)
    return source


def describe_source(
    dataset: Mapping[str, Any], resolution: Resolution, seed: int
) -> dict[str, Any]:
    """What config.dataset.source reads, as plain values, for records of what was made from it.

    dataset: config.dataset; resolution: of the largest stage; seed:
    of the configuration. Raises UserError for an unknown source.
    """
    text = dataset["source"]
    return {
        "source": text,
        **_source_class(text).describe(dataset, resolution, seed),
    }


def draw(total: int, count: int, seed: int) -> np.ndarray:
    """Positions of at most `count` of `total` images, int [n], in the order they were drawn."""
    # Never the first ones: most sets are sorted by class. A longer
    # draw of the same seed begins with the shorter one.
    return np.random.default_rng(seed).permutation(total)[:count]


def draw_balanced(source: Source, count: int, seed: int) -> np.ndarray:
    """As `draw`, but every part of the draw has all classes as equally often as the set allows.

    At random alone where the labels are not known without decoding.
    """
    order, labels = draw(len(source), len(source), seed), source.known_labels()
    if labels is None or not source.num_classes:
        return order[:count]
    # In turns: first the first image of every class, then the
    # second. The classes take their turns in the order in which they
    # were drawn, so that no class is always first.
    grouped = order[np.argsort(labels[order], kind="stable")]
    sizes = np.bincount(labels, minlength=source.num_classes)
    turns = np.arange(len(order)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    rank = np.empty(len(order), np.int64)
    rank[order] = np.arange(len(order))
    return grouped[np.lexsort((rank[grouped], turns))][:count]


def _source_class(text: str) -> type[ImageSource]:
    """The class of config.dataset.source: a key of SOURCES or package.module:Class."""
    if text in SOURCES:
        return SOURCES[text]
    module, colon, name = text.partition(":")
    if not colon:
        raise DataError(
            f"unknown source {text!r}; choose {', '.join(SOURCES)}, or name a class of your own as "
            "package.module:Class"
        )
    try:
        source_class = getattr(importlib.import_module(module), name)
    # A user's module may raise anything while it is imported.
    except Exception as error:
        raise UserError(f"dataset.source={text}: cannot be imported ({one_line(error)})") from error
    if not isinstance(source_class, type) or not issubclass(source_class, ImageSource):
        raise UserError(
            f"dataset.source={text}: not a class of images; derive it from "
            "relay_jax.data.source.ImageSource"
        )
    return source_class


def _check(source: Source, dataset: Mapping[str, Any], largest: Resolution) -> None:
    if dataset["num_classes"] and source.num_classes != dataset["num_classes"]:
        raise UserError(wrong_classes(source, dataset))
    # A set of which some images are smaller is warned of, one of
    # which all are is refused (data/description.py); here it is
    # known without reading any.
    if source.resolution is not None and smaller(source.resolution, largest):
        raise UserError(
            f"{dataset['path'] or dataset['source']} has images of "
            f"{pixels_text(source.resolution)}, the largest stage needs {size_text(largest)}; use "
            "larger images or a smaller stage"
        )

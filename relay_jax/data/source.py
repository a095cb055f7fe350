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

from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import ImageSource
from relay_jax.data.npz import NpzImages
from relay_jax.data.packed import PackedDataset
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.data.tfds import TfdsSource
from relay_jax.data.zip import EdmZip
from relay_jax.errors import DataError, UserError, one_line

__all__ = ["SOURCES", "ImageSource", "Source", "describe_source", "open_source"]


class Source(Protocol):
    """What the loader, the preparation and the evaluation read; `ImageSource` has the defaults."""

    @property
    def num_classes(self) -> int:
        """0: no labels."""

    @property
    def class_names(self) -> tuple[str, ...]:
        """One for each class; empty without labels."""

    @property
    def resolution(self) -> int | None:
        """Side of all images in pixels; None where they differ."""

    @property
    def prepared(self) -> bool:
        """Whether the images are cropped and resized for the stages already."""

    def __len__(self) -> int: ...

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""

    def fingerprint(self) -> str:
        """SHA-256 of what the set holds, as far as known without decoding it. Raises DataError."""

    def at(self, resolution: int) -> "Source":
        """The source that a stage of this resolution reads. Raises DataError without one."""

    def picture(self, position: int) -> tuple[np.ndarray | Image.Image, int]:
        """The image as `center_crop_resize` takes it soonest, and its label. Raises DataError."""

    def where(self, position: int) -> str:
        """What error messages call the image at a position."""


SOURCES: dict[str, type[ImageSource]] = {
    "synthetic": SyntheticShapes,
    "folder": ImageFolder,
    "zip": EdmZip,
    "npz": NpzImages,
    "packed": PackedDataset,
    "tfds": TfdsSource,
}


def open_source(dataset: Mapping[str, Any], resolutions: Sequence[int], seed: int) -> Source:
    """The data set of a configuration, checked against it.

    dataset: config.dataset. resolutions: of all stages, in any order.
    Raises DataError if it is missing, damaged or not there at one of
    the resolutions, and UserError for another number of classes or
    images smaller than the largest stage.
    """
    source_class, largest = _source_class(dataset["source"]), max(resolutions)
    try:
        source: Source = source_class.from_config(dataset, largest, seed)
        # A packed set holds each resolution apart: one that is missing
        # must be known now, not when the stage that needs it begins, days
        # later.
        for resolution in resolutions:
            source.at(resolution)
    except DataError as error:
        # The hint says where the originals come from, which is no help
        # for a prepared set.
        if source_class.prepared or not dataset["hint"]:
            raise
        raise DataError(f"{error}; {dataset['hint']}") from error
    _check(source, dataset, largest)
    return source


def describe_source(dataset: Mapping[str, Any], resolution: int, seed: int) -> dict[str, Any]:
    """What config.dataset.source reads, as plain values, for records of what was made from it.

    resolution: of the largest stage. Raises UserError for an unknown
    source.
    """
    text = dataset["source"]
    return {"source": text, **_source_class(text).describe(dataset, resolution, seed)}


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


def _check(source: Source, dataset: Mapping[str, Any], largest: int) -> None:
    if dataset["num_classes"] and source.num_classes != dataset["num_classes"]:
        number = f"{source.num_classes} classes" if source.num_classes else "no classes"
        raise UserError(
            f"the data set has {number}, the configuration "
            f"dataset.num_classes={dataset['num_classes']}; set "
            f"--config.dataset.num_classes={source.num_classes}"
        )
    # Only sets of one size are known to be too small without reading
    # every image; a folder's small images are enlarged, as ADM's
    # procedure does.
    if source.resolution is not None and source.resolution < largest:
        raise UserError(
            f"{dataset['path'] or dataset['source']} has images of {source.resolution} px, the "
            f"largest stage needs {largest}; use larger images or a smaller stage"
        )

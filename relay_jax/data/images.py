"""From an image file to pixels: the operations between a source and a network.

    bytes -> decode_picture -> center_crop_resize -> uint8 [h, w, 3] -> flip_x -> to_float

`ImageSource` is the base class of everything that holds images;
data/source.py says what a source promises and lists those there are.
"""

import abc
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from relay_jax.data.decoding import (
    AS_SHOWN,
    Decoding,
    Header,
    decode_picture,
    read_header,
)
from relay_jax.resolution import Resolution, height_width

# Pictures longer than so many times what is left of them are cut
# before they are resized.
MAX_ASPECT = 32


def center_crop_resize(image: np.ndarray | Image.Image, resolution: Resolution) -> np.ndarray:
    """Centre crop of uint8 [h, w, 3] or of an RGB picture to the aspect and size of `resolution`.

    ADM's procedure (arXiv 2105.05233), which takes squares: halve
    with a box filter while both sides are at least twice too long,
    then bicubic, until one side is right, then crop the other. An
    image that already fits is returned as it is. A square
    power-of-two reduction is a box average but for Pillow's
    rounding: halves go up after each axis, so a halving adds 0 to 1
    levels of 255, on average half a level.
    """
    # The filters are part of the data set's definition: the
    # reference statistics of FID were made from images reduced this
    # way. Another filter would be another data set.
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    height, width = height_width(resolution)
    if picture.size == (width, height):
        return np.asarray(image)
    while picture.width >= 2 * width and picture.height >= 2 * height:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    picture = _not_too_long(picture, width, height)
    scale = max(width / picture.width, height / picture.height)
    # Python rounds halves to even, as ADM's code does.
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)),
        Image.Resampling.BICUBIC,
    )
    top, left = (picture.height - height) // 2, (picture.width - width) // 2
    return np.asarray(picture)[top : top + height, left : left + width]


def _not_too_long(picture: Image.Image, wanted_width: int, wanted_height: int) -> Image.Image:
    """Without the ends of a picture that is a strip, which the crop would drop in any case."""
    # A strip of 30000 x 1 pixels would be enlarged to millions of
    # columns, of which the crop keeps 256.
    width, height = picture.size
    # So much of it the crop keeps, times a factor: of whole numbers,
    # which are exact.
    kept = MAX_ASPECT * min(width * wanted_height, height * wanted_width)
    widest, highest = max(kept // wanted_height, 1), max(kept // wanted_width, 1)
    if width <= widest and height <= highest:
        return picture
    left, top = max(width - widest, 0) // 2, max(height - highest, 0) // 2
    return picture.crop((left, top, left + min(width, widest), top + min(height, highest)))


def to_float(pixels: Any) -> Any:
    """uint8 pixels of NumPy or JAX, any shape, to float32 in [-1, 1], as docs/differences.md says.

    sampling/pixels.py has the way back.
    """
    return pixels.astype(np.float32) / 127.5 - 1


def flip_x(image: np.ndarray) -> np.ndarray:
    """Mirrors [h, w, c] left to right; a view."""
    return image[:, ::-1]


class ImageSource(abc.ABC):
    """What sources have in common: a new one adds `__len__`, `__getitem__` and `fingerprint`.

    resolution: of all images, None where they differ. prepared: cropped and resized for the stages
    already, so the originals are elsewhere. config_keys: the
    keys of config.dataset that the class is made from, named
    as its parameters.
    """

    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    resolution: Resolution | None = None
    prepared: ClassVar[bool] = False
    unused: Mapping[str, int] = MappingProxyType({})
    config_keys: ClassVar[tuple[str, ...]] = ("path",)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what the set holds, as far as known without decoding it. Raises DataError."""

    def identity(self) -> str:
        """As `fingerprint`, but the same wherever the set lies. Raises DataError."""
        return self.fingerprint()

    def known_labels(self) -> np.ndarray | None:
        """The labels of all images, int64 [n], None where they are not known without decoding."""
        return None

    def class_counts(self) -> list[int] | None:
        """Images of each class, None where they are not known without decoding."""
        labels = self.known_labels()
        if labels is None or not self.num_classes:
            return None
        return np.bincount(labels, minlength=self.num_classes).tolist()

    def file_name(self, position: int) -> str:
        """The path of an image's file below the set, '' for images that are no files."""
        return ""

    def file_stamp(self, position: int) -> int:
        """A number that changes with the bytes of an image's file: its size, or a checksum."""
        return 0

    def at(self, resolution: Resolution) -> Self:
        """The source that a stage of this resolution reads: the same one."""
        return self

    def picture(self, position: int) -> tuple[np.ndarray | Image.Image, int]:
        """The image as `center_crop_resize` takes it soonest, and its label. Raises DataError."""
        return self[position]

    def where(self, position: int) -> str:
        """What error messages call the image at a position."""
        return f"image {position}"

    @classmethod
    def from_config(cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int) -> Self:
        """The source that config.dataset describes. Raises DataError.

        resolution: of the largest stage. seed: of the configuration.
        """
        return cls(**{key: dataset[key] for key in cls.config_keys})

    @classmethod
    def describe(
        cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int
    ) -> dict[str, Any]:
        """What makes the set the one it is, for the record of a preparation or a report."""
        return {key: dataset[key] for key in cls.config_keys}


class EncodedImages(ImageSource):
    """A source of image files: `encoded` says which; pictures and arrays of them follow.

    decoding: how they are shown, of
    config.dataset where it made the source.
    """

    decoding: Decoding = AS_SHOWN

    @classmethod
    def from_config(cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int) -> Self:
        decoding = Decoding.from_config(dataset)
        source = super().from_config(dataset, resolution, seed)
        source.decoding = decoding
        return source

    @classmethod
    def describe(
        cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int
    ) -> dict[str, Any]:
        # Other pixels are another set, for a preparation and for
        # kept features.
        decoding = Decoding.from_config(dataset)
        shown = {"exif": decoding.exif, "background": list(decoding.background)}
        return {**super().describe(dataset, resolution, seed), **shown}

    @abc.abstractmethod
    def encoded(self, position: int) -> tuple[bytes, str, int]:
        """The file at `position`, what errors call it, and its label. Raises DataError."""

    def header(self, position: int) -> Header:
        """Size, mode and transparency of an image without decoding it. Raises DataError."""
        data, where, _ = self.encoded(position)
        return read_header(data, where, self.decoding)

    # The picture goes to the crop as Pillow has decoded it: an array
    # of it would be one more copy of the whole image, which is many
    # times larger than what is left of it.
    def picture(self, position: int) -> tuple[Image.Image, int]:
        """The decoded file as an RGB picture, and its label. Raises DataError."""
        data, where, label = self.encoded(position)
        return decode_picture(data, where, self.decoding), label

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""
        picture, label = self.picture(position)
        return np.asarray(picture), label

"""From an image file to pixels: the one decoder, and the operations between a source and a network.

    bytes -> decode_picture -> center_crop_resize -> uint8 [r, r, 3] -> flip_x -> to_float

`ImageSource` is the base class of everything that holds images;
data/source.py says what a source promises and lists those there are.
"""

import abc
import io
import re
import struct
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np
from PIL import Image

from relay_jax.errors import DataError, one_line

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


def is_image(name: str) -> bool:
    """Whether a file name or path is an image's."""
    # Hidden files are not: macOS leaves '._name.jpg' beside 'name.jpg'.
    return name.lower().endswith(EXTENSIONS) and not re.split(r"[/\\]", name)[-1].startswith(".")


def decode_picture(data: bytes, where: str) -> Image.Image:
    """An encoded image as an RGB picture; grey, palette and CMYK become RGB.

    where: what an error calls the image. Raises DataError if it is
    damaged.
    """
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    # What Pillow's decoders raise for damaged files; SyntaxError is a
    # broken PNG.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        # Pillow quotes the address of the buffer, which says nothing to
        # the user.
        why = "not an image" if "BytesIO" in str(error) else one_line(error)
        raise DataError(
            f"{where}: cannot decode this image ({why}); replace or remove it"
        ) from error


def center_crop_resize(image: np.ndarray | Image.Image, resolution: int) -> np.ndarray:
    """Centre crop of uint8 [h, w, 3] or of an RGB picture to uint8 [r, r, 3].

    ADM's procedure (arXiv 2105.05233): halve with a box filter while
    the shorter side is at least twice too long, then bicubic, then
    crop. An image that already fits is returned as it is. A square
    power-of-two reduction is a box average but for Pillow's rounding:
    halves go up after each axis, so a halving adds 0 to 1 levels of
    255, on average half a level.
    """
    # The filters are part of the data set's definition: the reference
    # statistics of FID were made from images reduced this way. Another
    # filter would be another data set.
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if picture.size == (resolution, resolution):
        return np.asarray(image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    # Python rounds halves to even, as ADM's code does.
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)),
        Image.Resampling.BICUBIC,
    )
    top, left = (picture.height - resolution) // 2, (picture.width - resolution) // 2
    return np.asarray(picture)[top : top + resolution, left : left + resolution]


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

    resolution: the side of all images in pixels, None where they
    differ. prepared: cropped and resized for the stages already, so the
    originals are elsewhere. config_keys: the keys of config.dataset
    that the class is made from, named as its parameters.
    """

    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    resolution: int | None = None
    prepared: ClassVar[bool] = False
    config_keys: ClassVar[tuple[str, ...]] = ("path",)

    @abc.abstractmethod
    def __len__(self) -> int: ...

    @abc.abstractmethod
    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""

    @abc.abstractmethod
    def fingerprint(self) -> str:
        """SHA-256 of what the set holds, as far as known without decoding it. Raises DataError."""

    def at(self, resolution: int) -> Self:
        """The source that a stage of this resolution reads: the same one."""
        return self

    def picture(self, position: int) -> tuple[np.ndarray | Image.Image, int]:
        """The image as `center_crop_resize` takes it soonest, and its label. Raises DataError."""
        return self[position]

    def where(self, position: int) -> str:
        """What error messages call the image at a position."""
        return f"image {position}"

    @classmethod
    def from_config(cls, dataset: Mapping[str, Any], resolution: int, seed: int) -> Self:
        """The source that config.dataset describes. Raises DataError.

        resolution: of the largest stage. seed: of the configuration.
        """
        return cls(**{key: dataset[key] for key in cls.config_keys})

    @classmethod
    def describe(cls, dataset: Mapping[str, Any], resolution: int, seed: int) -> dict[str, Any]:
        """What makes the set the one it is, for the record of a preparation or a report."""
        return {key: dataset[key] for key in cls.config_keys}


class EncodedImages(ImageSource):
    """A source of image files: `encoded` says which; pictures and arrays of them follow."""

    @abc.abstractmethod
    def encoded(self, position: int) -> tuple[bytes, str, int]:
        """The file at `position`, what errors call it, and its label. Raises DataError."""

    # The picture goes to the crop as Pillow has decoded it: an array of
    # it would be one more copy of the whole image, which is many times
    # larger than what is left of it.
    def picture(self, position: int) -> tuple[Image.Image, int]:
        """The decoded file as an RGB picture, and its label. Raises DataError."""
        data, where, label = self.encoded(position)
        return decode_picture(data, where), label

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""
        picture, label = self.picture(position)
        return np.asarray(picture), label

"""Image files to arrays, and the one error that all data problems become."""

import abc
import io
import re
import struct

import numpy as np
from PIL import Image

EXTENSIONS = (".jpg", ".jpeg", ".png", ".webp", ".bmp")


class DataError(ValueError):
    """The data is missing, damaged or does not fit the configuration; the message is one line
    for the user."""


def one_line(error: BaseException) -> str:
    """The message of a foreign error on one line."""
    return " ".join(str(error).split()) or type(error).__name__


def is_image(name: str) -> bool:
    """Whether a file name or path is an image's. Hidden ones are not: macOS leaves '._name.jpg'
    beside 'name.jpg'."""
    return name.lower().endswith(EXTENSIONS) and not re.split(r"[/\\]", name)[-1].startswith(".")


def decode_picture(data: bytes, where: str) -> Image.Image:
    """An encoded image as an RGB picture; grey, palette and CMYK become RGB. DataError naming
    `where` if damaged."""
    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            return image if image.mode == "RGB" else image.convert("RGB")
    # What Pillow's decoders raise for damaged files; SyntaxError is a broken PNG.
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        struct.error,
        Image.DecompressionBombError,
    ) as error:
        why = one_line(error)
        why = (
            "not an image" if "BytesIO" in why else why
        )  # Pillow quotes the buffer's address, which tells nothing
        raise DataError(
            f"{where}: cannot decode this image ({why}); replace or remove it"
        ) from error


class EncodedImages(abc.ABC):
    """A source of image files: `encoded` says which; pictures and arrays of them follow."""

    @abc.abstractmethod
    def encoded(self, position: int) -> tuple[bytes, str, int]:
        """The file at `position`, what errors call it, and its label. Raises DataError."""

    def picture(self, position: int) -> tuple[Image.Image, int]:
        """As Pillow has decoded it: to be cropped, which then needs no copy of the whole image."""
        data, where, label = self.encoded(position)
        return decode_picture(data, where), label

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""
        picture, label = self.picture(position)
        return np.asarray(picture), label

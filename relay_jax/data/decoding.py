"""The one decoder of pictures: from the bytes of a file to what is shown, as 8-bit RGB.

    bytes -> RGB: 16 bits to 8, transparent parts on a background -> turned as EXIF says

Everything that reads a picture comes through here: data sets,
samples that are scored, references, low-resolution inputs.
"""

import contextlib
import importlib.util
import io
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
from PIL import Image

from relay_jax.errors import DataError, one_line

# Pillow would try every format it knows by content, whatever the
# name: EPS among them, which starts Ghostscript.
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM")
# Older Pillows do not know it, and a
# format that is asked for must be known.
if importlib.util.find_spec("PIL.AvifImagePlugin"):
    FORMATS += ("AVIF",)
EXTENSIONS = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".apng", ".webp", ".bmp", ".gif"),
    *(".tif", ".tiff", ".ppm", ".pgm", ".pnm", ".avif"),
)
MAX_PIXELS = 1 << 27  # of one picture: 400 MB when decoded, per thread
WHITE = (255, 255, 255)
_ORIENTATION = 0x0112  # EXIF's number of the key
_BITS, _PHOTOMETRIC = 258, 262  # those of TIFF


def is_image(name: str) -> bool:
    """Whether a file name or path is an image's."""
    return name.lower().endswith(EXTENSIONS) and not is_hidden(name)


def is_hidden(path: str) -> bool:
    """Whether a path below a data set is hidden, or in a hidden folder."""
    # macOS leaves '._name.jpg' beside 'name.jpg', and a folder of
    # its own in every archive that the Finder makes.
    parts = re.split(r"[/\\]", path)
    return any(part.startswith(".") and part not in (".", "..") for part in parts) or (
        "__MACOSX" in parts
    )


def ending(name: str) -> str:
    """What files that are not used are counted by, such as '.heic'; '' without one."""
    return os.path.splitext(name)[1].lower()[:20]


@dataclass(frozen=True)
class Decoding:
    """How encoded pictures are shown: `config.dataset.exif` and `.background`.

    exif: turned as the camera says. background: RGB of 0 to
    255 that transparent pictures are laid on. Raises DataError
    for another colour.
    """

    exif: bool = True
    background: tuple[int, int, int] = WHITE

    def __post_init__(self) -> None:
        levels = self.background
        if len(levels) != 3 or not all(type(v) is int and 0 <= v <= 255 for v in levels):
            raise DataError(
                f"dataset.background must be three whole numbers from 0 to 255, not {levels!r:.80}"
            )

    @classmethod
    def from_config(cls, dataset: Mapping[str, Any]) -> Self:
        """What config.dataset says; its defaults where it says nothing."""
        colour = dataset.get("background", WHITE)
        levels = tuple(colour) if isinstance(colour, list | tuple) else (colour,)
        return cls(bool(dataset.get("exif", True)), levels)


AS_SHOWN = Decoding()


@dataclass(frozen=True)
class Header:
    """What a picture's file says before its pixels are decoded.

    width, height: as shown, after turning. alpha: it may have
    transparent parts. turned: by its EXIF orientation.
    """

    width: int
    height: int
    mode: str
    alpha: bool
    turned: bool


def read_header(data: bytes, where: str, decoding: Decoding = AS_SHOWN) -> Header:
    """The header of an encoded image, without its pixels. Raises DataError."""
    with _opened(data, where) as image:
        _refuse_32_bits(image)
        # Pillow would decode a PNG to
        # look for EXIF behind its pixels.
        has_exif = image.format != "PNG" or "exif" in image.info
        orientation = _orientation(image) if has_exif and decoding.exif else 1
        turned = orientation in _TURNS
        # Pillow gives a TIFF's size as shown.
        sideways = orientation >= 5 and turned and image.format != "TIFF"
        size = image.size[::-1] if sideways else image.size
        return Header(*size, image.mode, _may_be_transparent(image), turned)


def decode_picture(data: bytes, where: str, decoding: Decoding = AS_SHOWN) -> Image.Image:
    """An encoded image as it is shown, as an RGB picture: the first one of several.

    Grey, palette and CMYK become RGB, 16 bits become 8, transparent
    pictures are laid on a background, photographs are turned. where:
    what an error calls the image. Raises DataError if it is damaged,
    too large, or has 32 bits, of which nobody knows what is white.
    """
    with _opened(data, where) as image:
        image.load()
        picture: Image.Image = image
        if picture.mode != "RGB" or "transparency" in picture.info:
            picture = _to_rgb(picture, decoding.background)
        turn = _TURNS.get(_orientation(image)) if decoding.exif else None
        return picture if turn is None else picture.transpose(turn)


@contextlib.contextmanager
def _opened(data: bytes, where: str) -> Iterator[Image.Image]:
    """The image at its header. Every error of the block becomes a DataError."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            # Every thread has one in memory.
            if image.width * image.height > MAX_PIXELS:
                raise ValueError(
                    f"{image.width} x {image.height} pixels; at most {MAX_PIXELS:,} are decoded"
                )
            yield image
    # Decoders raise whatever their authors
    # thought of for damaged files.
    except Exception as error:
        # Pillow quotes the address of the
        # buffer, which says nothing to the user.
        why = "not an image" if "BytesIO" in str(error) else one_line(error, 160)
        raise DataError(
            f"{where}: cannot decode this image ({why}); replace or remove it"
        ) from error


_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def _orientation(image: Image.Image) -> int:
    """EXIF's number, 1 for upright; Pillow turns TIFFs itself while they load."""
    try:
        return int(image.getexif().get(_ORIENTATION, 1))
    # A camera's EXIF is often damaged where the picture is not.
    except Exception:
        return 1


def _refuse_32_bits(image: Image.Image) -> None:
    # In PNG and PPM, Pillow's "I" are 16 bits.
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
        raise ValueError(
            f"32-bit {'floating point' if image.mode == 'F' else 'whole'} numbers; save it with "
            "8 or 16 bits"
        )


def _may_be_transparent(image: Image.Image) -> bool:
    return image.mode in ("RGBA", "LA", "PA", "RGBa", "La") or "transparency" in image.info


def _to_rgb(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """A loaded picture of any mode but plain RGB. Raises ValueError."""
    _refuse_32_bits(image)
    if image.mode.startswith("I"):
        return _from_16_bits(image, background)
    if not _may_be_transparent(image):
        return image.convert("RGB")
    shown = image.convert("RGBA")
    flat = Image.new("RGBA", shown.size, (*background, 255))
    return Image.alpha_composite(flat, shown).convert("RGB")


def _from_16_bits(image: Image.Image, background: tuple[int, int, int]) -> Image.Image:
    """Grey of 16 bits, of which Pillow would clip all that is above 255."""
    values = np.asarray(image).astype(np.int64)
    tags = getattr(image, "tag_v2", {})
    full = 4095 if tags.get(_BITS) == (12,) else 65535
    levels = np.clip((255 * values + full // 2) // full, 0, 255).astype(np.uint8)
    # In some TIFFs 0 is white.
    if tags.get(_PHOTOMETRIC) == 0:
        levels = 255 - levels
    pixels = np.repeat(levels[:, :, None], 3, axis=2)
    # A PNG without alpha may name one grey that is transparent.
    key = image.info.get("transparency")
    if isinstance(key, int):
        pixels[values == key] = background
    return Image.fromarray(pixels)

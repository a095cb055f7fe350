"""Pixel operations between a source, a batch and a network."""

from typing import Any

import numpy as np
from PIL import Image


def center_crop_resize(image: np.ndarray | Image.Image, resolution: int) -> np.ndarray:
    """Centre crop of uint8 [h, w, 3] or of an RGB picture: uint8 [r, r, 3]. ADM's procedure
    (arXiv 2105.05233).

    Halves with a box filter while the shorter side is at least twice too long, then bicubic,
    then the crop. The filters are part of the data set's definition: the reference statistics
    of FID were made from images reduced this way. An image that already fits is returned as it
    is; a square power-of-two reduction is a box average, but for Pillow's
    rounding: it rounds halves up after each axis, so a halving adds 0 to 1 levels of 255, on
    average half a level.
    """
    picture = image if isinstance(image, Image.Image) else Image.fromarray(image)
    if picture.size == (resolution, resolution):
        return np.asarray(image)
    while min(picture.size) >= 2 * resolution:
        picture = picture.resize((picture.width // 2, picture.height // 2), Image.Resampling.BOX)
    scale = resolution / min(picture.size)
    # Python rounds halves to even, as ADM's code does.
    picture = picture.resize(
        (round(picture.width * scale), round(picture.height * scale)), Image.Resampling.BICUBIC
    )
    top, left = (picture.height - resolution) // 2, (picture.width - resolution) // 2
    return np.asarray(picture)[top : top + resolution, left : left + resolution]


def to_float(pixels: Any) -> Any:
    """uint8 array of NumPy or JAX to float32 in [-1, 1] (SPEC section 9); sampling/pixels.py
    has the way back."""
    return pixels.astype(np.float32) / 127.5 - 1


def flip_x(image: np.ndarray) -> np.ndarray:
    """Mirrors [h, w, c] left to right; a view."""
    return image[:, ::-1]

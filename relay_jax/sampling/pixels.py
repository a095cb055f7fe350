"""From images of about [-1, 1] to the 8-bit pixels that are written and scored.

(1)  pixel = clip(127.5 x + 128, 0, 255), truncated
(2)  optionally the colour edits that the official image writers made before their images were
     scored (docs/differences.md):
         imagenet: brightness 1.06
         celebahq: contrast 0.9, then brightness 1.05, then colour 0.99

The edits of (2) belong to the published scores and to nothing
else: they are off unless asked for by name. The arithmetic is
Pillow's, as in the official scripts: every edit is
value = low + factor (value - low) in float32, clipped and
truncated to 8 bits; low is 0 (brightness), the image's mean grey
(contrast) or the pixel's grey (colour).
"""

from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageEnhance

from relay_jax.config import PIXEL_EDITS

_STEPS = {
    "none": (),
    "imagenet": ((ImageEnhance.Brightness, 1.06),),
    "celebahq": (
        (ImageEnhance.Contrast, 0.9),
        (ImageEnhance.Brightness, 1.05),
        (ImageEnhance.Color, 0.99),
    ),
}


def to_uint8(images: np.ndarray) -> np.ndarray:
    """About [-1, 1] to 8 bits: clip(127.5 x + 128, 0, 255), truncated. Same shape."""
    return np.clip(np.asarray(images) * 127.5 + 128, 0, 255).astype(np.uint8)


def to_uint8_on_device(images: jax.Array) -> jax.Array:
    """`to_uint8` inside a compiled program: the same bytes from the same float32, to the last one.

    images: any shape, float32. A compiler may round 127.5 x + 128
    once instead of twice, which moves a level now and then. So the
    product only proposes a level, and the least float32 of that
    level and of the next, known from `to_uint8` itself, decide.
    """
    # Nothing is above 255: comparisons with NaN are false.
    table = np.concatenate([[-np.inf], _least_of_levels(), [np.nan]])
    least = jnp.asarray(table, jnp.float32)
    near = jnp.clip(images * 127.5 + 128, 0, 255).astype(jnp.int32)
    return (near - (images < least[near]) + (images >= least[near + 1])).astype(jnp.uint8)


@cache
def _least_of_levels() -> np.ndarray:
    """The least float32 that `to_uint8`, which never falls, takes to each of the levels 1 to 255.

    By bisection over the numbers of floats in order, so that the
    last step is between neighbours.
    """
    below, above = (
        _number(np.full(255, x, np.float32).view(np.int32)).astype(np.int64) for x in (-2, 2)
    )
    while np.any(above - below > 1):
        middle = (below + above) // 2
        reached = to_uint8(_float(middle)) >= np.arange(1, 256)
        below, above = (
            np.where(reached, below, middle),
            np.where(reached, middle, above),
        )
    return _float(above)


def _number(bits: np.ndarray) -> np.ndarray:
    """Bits of a float32 -> its number in the order of floats. Its own inverse."""
    return np.where(bits < 0, np.int32(-(2**31)) - bits, bits).astype(np.int32)


def _float(numbers: np.ndarray) -> np.ndarray:
    return _number(numbers.astype(np.int32)).view(np.float32)


def edit_pixels(pixels: np.ndarray, edit: str) -> np.ndarray:
    """Colour edit (2), each image by itself. pixels: uint8 [n, h, w, c], c = 3 or 1 (grey);
    same shape and type.

    edit: one of PIXEL_EDITS; 'none' returns the pixels as they are.
    A grey image is treated as three equal channels.
    Raises ValueError for another edit, type or shape.
    """
    if edit not in _STEPS:
        raise ValueError(f"unknown pixel_edit {edit!r}; there are {', '.join(PIXEL_EDITS)}")
    if pixels.dtype != np.uint8 or pixels.ndim != 4 or pixels.shape[-1] not in (1, 3):
        raise ValueError(
            f"pixels must be uint8 [n, h, w, 1 or 3], not {pixels.dtype} {list(pixels.shape)}"
        )
    if not _STEPS[edit]:
        return pixels
    edited = np.empty_like(pixels)
    for source, target in zip(pixels, edited, strict=True):
        picture = Image.fromarray(source if source.shape[-1] == 3 else source[..., 0])
        for enhancer, factor in _STEPS[edit]:
            picture = enhancer(picture).enhance(factor)
        target[...] = np.asarray(picture).reshape(target.shape)
    return edited

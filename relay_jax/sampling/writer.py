"""Numbered images: out/000000/000012.png holds seed 12, in folders of a thousand. What exists is not made again."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from relay_jax.config import MAX_SEED, ConfigError
from relay_jax.logs import write_png
from relay_jax.sampling.pixels import edit_pixels, to_uint8

MAX_IMAGES = 10_000_000


def parse_seeds(text: str) -> list[int]:
    """'0-63' or '1,5,10-12' as a list without repeats. Raises ConfigError for anything else, and beyond MAX_IMAGES."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(f"--seeds={text}: {part.strip()!r} is neither a number nor a range like 0-63")
        low, high = int(first), int(last or first)
        if high < low or high > MAX_SEED:
            raise ConfigError(f"--seeds={text}: the range {part.strip()!r} is empty or goes beyond {MAX_SEED}")
        if high - low >= MAX_IMAGES:
            raise ConfigError(f"--seeds={text}: more than {MAX_IMAGES:,} images at once")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def image_path(folder: Path, seed: int) -> Path:
    """Where the image of a seed lies."""
    return folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"


def missing(folder: Path, seeds: Iterable[int]) -> list[int]:
    """The seeds that have no image yet."""
    return [seed for seed in seeds if not image_path(folder, seed).exists()]


def write_images(folder: Path, seeds: Iterable[int], images: np.ndarray, pixel_edit: str = "none") -> None:
    """float images [n, h, w, c] to one PNG each; a file under its name is complete, whenever the run is killed.

    pixel_edit: one of pixels.PIXEL_EDITS.
    """
    for seed, pixels in zip(seeds, edit_pixels(to_uint8(images), pixel_edit), strict=True):
        write_png(image_path(folder, seed), pixels)


def read_images(folder: Path, seeds: Iterable[int], resolution: int) -> np.ndarray:
    """Images of the given seeds, float32 [n, resolution, resolution, 3] in [-1, 1].

    Raises ConfigError for one that is missing, damaged or of another size.
    """
    images = []
    for seed in seeds:
        path = image_path(folder, seed)
        if not path.exists():
            raise ConfigError(f"no image of seed {seed} in {folder} ({path} is missing); write it with --stage=base first")
        try:
            with Image.open(path) as image:
                pixels = np.asarray(image.convert("RGB"))
        except (OSError, UnidentifiedImageError, SyntaxError) as error:
            raise ConfigError(f"{path} cannot be decoded ({' '.join(str(error).split())}); remove it") from error
        if pixels.shape != (resolution, resolution, 3):
            raise ConfigError(f"{path} has {pixels.shape[1]} x {pixels.shape[0]} pixels; this stage continues images of "
                              f"{resolution} x {resolution}")
        images.append(pixels.astype(np.float32) / 127.5 - 1)
    return np.stack(images)

"""A procedural, class-conditional image set: eight classes, no download, a function of (seed, i).

It is made for testing a relay. Four shapes (disc, square,
triangle, cross) are visible at every resolution, so the base stage
can learn them; two textures (stripes, checks) have a period of
four native pixels, so a 4x4 box average erases them and only the
relay stage can add them.

    label = i mod 8 = 4 * texture + shape
"""

import colorsys
import functools
import math
from collections.abc import Mapping
from typing import Any, ClassVar, Self

import numpy as np

from relay_jax.data.images import ImageSource
from relay_jax.errors import DataError
from relay_jax.resolution import Resolution, height_width
from relay_jax.runtime.files import digest

SHAPES = ("disc", "square", "triangle", "cross")
TEXTURES = ("stripes", "checks")
TEXTURE_PERIOD = 4.0  # pixels of the native resolution


class SyntheticShapes(ImageSource):
    """`size` images of `resolution`, classes balanced."""

    class_names = tuple(f"{texture} {shape}" for texture in TEXTURES for shape in SHAPES)
    num_classes = len(class_names)
    config_keys: ClassVar[tuple[str, ...]] = ("size",)
    resolution: Resolution

    def __init__(self, resolution: Resolution, size: int, seed: int) -> None:
        """Raises DataError for impossible arguments."""
        if min(height_width(resolution)) < 1 or size < 1 or seed < 0:
            raise DataError(
                f"the synthetic source needs resolution, size >= 1, seed >= 0: {resolution}, "
                f"{size}, {seed}"
            )
        self.resolution, self.size, self.seed = resolution, size, seed

    @classmethod
    def from_config(cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int) -> Self:
        # Made at the size of the largest stage, which sets the scale
        # of the texture.
        return cls(resolution, dataset["size"], seed)

    @classmethod
    def describe(
        cls, dataset: Mapping[str, Any], resolution: Resolution, seed: int
    ) -> dict[str, Any]:
        return {"size": dataset["size"], "resolution": resolution, "seed": seed}

    def fingerprint(self) -> str:
        """Hash of the parameters, which make every pixel."""
        about = {
            "size": self.size,
            "resolution": self.resolution,
            "seed": self.seed,
        }
        return digest([{"source": "synthetic", **about}, self.size])

    def known_labels(self) -> np.ndarray:
        return np.arange(self.size) % self.num_classes

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and label 0..7 at `position`; IndexError outside 0..size-1."""
        if not 0 <= position < self.size:
            raise IndexError(f"position {position} is outside 0..{self.size - 1}")
        label = int(position) % self.num_classes
        texture, shape = divmod(label, len(SHAPES))
        height, width = height_width(self.resolution)
        r = min(height, width)
        # All random numbers of an image at once: what one of them
        # does cannot shift another's.
        u = np.random.default_rng([self.seed, int(position)]).random(11).tolist()
        x, y = _grid(height, width)

        # A pastel gradient behind a darker, saturated shape: they
        # differ in brightness whatever the two hues.
        colours = [
            np.array(colorsys.hsv_to_rgb(h, 0.25, v), np.float32)
            for h, v in ((u[0], 1.0), (u[1], 0.78))
        ]
        angle = 2 * math.pi * u[2]
        ramp = np.clip(
            0.5 + (math.cos(angle) * x + math.sin(angle) * y) / max(height, width), 0, 1
        )[..., None]
        background = colours[0] + ramp * (colours[1] - colours[0])
        colour = np.array(colorsys.hsv_to_rgb(u[3], 0.75, 0.57), np.float32)

        radius = r * (0.55 + 0.3 * u[4]) / 2
        px = x - (width / 2 - radius) * (2 * u[5] - 1)
        py = y - (height / 2 - radius) * (2 * u[6] - 1)
        turn = math.radians(30 * u[7] - 15)
        cos, sin = math.cos(turn), math.sin(turn)
        distance = _signed_distance(shape, cos * px + sin * py, cos * py - sin * px, radius)
        # An edge of one pixel's width: a hard one would make stairs,
        # which no blur explains.
        inside = np.clip(0.5 - distance, 0, 1)[..., None]

        # The wave swings each channel by 0.7 of its own value (by
        # 0.4 for the strongest): nothing clips, so the mean over a
        # period stays the colour, and the hue stays too.
        tilt = math.radians(20 * u[8] - 10)
        k = 2 * math.pi / TEXTURE_PERIOD
        kx, ky = k * math.sin(tilt), k * math.cos(tilt)
        wave = np.sin(kx * x + ky * y + 2 * math.pi * u[9])
        if texture == 1:
            wave = wave * np.sin(ky * x - kx * y + 2 * math.pi * u[10])
        wave = np.clip(1.5 * wave, -1, 1)[..., None]
        image = background + inside * (colour * (1 + 0.7 * wave) - background)
        return (image * 255 + 0.5).astype(np.uint8), label


@functools.lru_cache(maxsize=8)
def _grid(height: int, width: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres x [1, w] and y [h, 1], in pixels from the image's centre, y downwards."""
    x, y = (np.arange(size, dtype=np.float32) + 0.5 - size / 2 for size in (width, height))
    # Threads share what is cached: nobody may write to it.
    for line in (x, y):
        line.setflags(write=False)
    return x[None, :], y[:, None]


def _signed_distance(shape: int, x: np.ndarray, y: np.ndarray, radius: float) -> np.ndarray:
    """Distance to the outline in pixels, negative inside, [h, w]."""
    # The factors make the four shapes look alike in size.
    if shape == 0:
        return np.sqrt(x * x + y * y) - 0.95 * radius
    ax, ay = np.abs(x), np.abs(y)
    if shape == 1:
        return np.maximum(ax, ay) - 0.82 * radius
    if shape == 2:
        # Equilateral, point up, its bounding box centred; symmetry
        # folds two sides into one.
        y = y - 0.3 * radius
        return np.maximum(y, 0.5 * math.sqrt(3) * ax - 0.5 * y) - 0.6 * radius
    return np.maximum(np.maximum(ax, ay) - radius, np.minimum(ax, ay) - 0.32 * radius)

"""Inception-v3 of 2015-12-05 a second time, in numpy, as a table of its branches: the tests'
reference.

Channels first, one image at a time, batch normalisation as it is written; the weights are made,
under the names of the PyTorch port, by whoever runs the table first. Compared once with
torchvision's Inception3 (its pools changed as above): equal to float rounding at 75 and 299 pixels.
"""

from collections.abc import Callable

import numpy as np

Weights = Callable[[str, tuple[int, ...]], np.ndarray]  # name, shape -> array


class Reference:
    """Called with an image [3, h, w]; `seen` then holds the outputs [channels, h, w] of every
    convolution by name."""

    def __init__(self, weights: Weights) -> None:
        self.weights, self.seen = weights, dict[str, np.ndarray]()

    def conv(
        self,
        x: np.ndarray,
        name: str,
        width: int,
        kernel: tuple[int, int] = (1, 1),
        stride: int = 1,
        pad: tuple[int, int] = (0, 0),
    ) -> np.ndarray:
        kernels = self.weights(f"{name}.conv.weight", (width, len(x), *kernel))
        gain, offset, mean, var = (
            self.weights(f"{name}.bn.{part}", (width,))
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        x = np.pad(x, ((0, 0), (pad[0],) * 2, (pad[1],) * 2))
        views = np.lib.stride_tricks.sliding_window_view(x, kernel, axis=(1, 2))[
            :, ::stride, ::stride
        ]
        y = np.tensordot(kernels, views, axes=((1, 2, 3), (0, 3, 4)))
        y = (y - mean[:, None, None]) / np.sqrt(var + 0.001)[:, None, None] * gain[:, None, None]
        self.seen[name] = np.maximum(y + offset[:, None, None], 0)
        return self.seen[name]

    def chain(self, x: np.ndarray, block: str, branch: str, *layers: tuple) -> np.ndarray:
        """Layers (width, kernel, stride, pad), named branch_1, branch_2, ..."""
        for i, layer in enumerate(layers, start=1):
            x = self.conv(x, f"{block}.{branch}_{i}", *layer)
        return x

    def __call__(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Pool features and logits without bias."""
        x = self.conv(x, "Conv2d_1a_3x3", 32, (3, 3), 2)
        x = self.conv(x, "Conv2d_2a_3x3", 32, (3, 3))
        x = halved(self.conv(x, "Conv2d_2b_3x3", 64, (3, 3), 1, (1, 1)))
        x = self.conv(self.conv(x, "Conv2d_3b_1x1", 80), "Conv2d_4a_3x3", 192, (3, 3))
        x = halved(x)
        for block, width in (("Mixed_5b", 32), ("Mixed_5c", 64), ("Mixed_5d", 64)):
            x = np.concatenate(
                [
                    self.conv(x, f"{block}.branch1x1", 64),
                    self.chain(x, block, "branch5x5", (48,), (64, (5, 5), 1, (2, 2))),
                    self.chain(
                        x,
                        block,
                        "branch3x3dbl",
                        (64,),
                        (96, (3, 3), 1, (1, 1)),
                        (96, (3, 3), 1, (1, 1)),
                    ),
                    self.conv(means(x), f"{block}.branch_pool", width),
                ]
            )
        x = np.concatenate(
            [
                self.conv(x, "Mixed_6a.branch3x3", 384, (3, 3), 2),
                self.chain(
                    x, "Mixed_6a", "branch3x3dbl", (64,), (96, (3, 3), 1, (1, 1)), (96, (3, 3), 2)
                ),
                halved(x),
            ]
        )
        wide, high = ((1, 7), 1, (0, 3)), ((7, 1), 1, (3, 0))
        for block, width in (
            ("Mixed_6b", 128),
            ("Mixed_6c", 160),
            ("Mixed_6d", 160),
            ("Mixed_6e", 192),
        ):
            x = np.concatenate(
                [
                    self.conv(x, f"{block}.branch1x1", 192),
                    self.chain(x, block, "branch7x7", (width,), (width, *wide), (192, *high)),
                    self.chain(
                        x,
                        block,
                        "branch7x7dbl",
                        (width,),
                        (width, *high),
                        (width, *wide),
                        (width, *high),
                        (192, *wide),
                    ),
                    self.conv(means(x), f"{block}.branch_pool", 192),
                ]
            )
        x = np.concatenate(
            [
                self.chain(x, "Mixed_7a", "branch3x3", (192,), (320, (3, 3), 2)),
                self.chain(
                    x,
                    "Mixed_7a",
                    "branch7x7x3",
                    (192,),
                    (192, *wide),
                    (192, *high),
                    (192, (3, 3), 2),
                ),
                halved(x),
            ]
        )
        for block, pool in (("Mixed_7b", means), ("Mixed_7c", maxima)):
            one = self.conv(x, f"{block}.branch3x3_1", 384)
            two = self.chain(x, block, "branch3x3dbl", (448,), (384, (3, 3), 1, (1, 1)))
            x = np.concatenate(
                [self.conv(x, f"{block}.branch1x1", 320)]
                + [
                    self.conv(y, f"{block}.{name}{side}", 384, kernel, 1, pad)
                    for y, name in ((one, "branch3x3_2"), (two, "branch3x3dbl_3"))
                    for side, kernel, pad in (("a", (1, 3), (0, 1)), ("b", (3, 1), (1, 0)))
                ]
                + [self.conv(pool(x), f"{block}.branch_pool", 192)]
            )
        features = x.mean(axis=(1, 2))
        return features, self.weights("fc.weight", (1008, 2048)) @ features


def windows(x: np.ndarray) -> np.ndarray:
    return np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))


def halved(x: np.ndarray) -> np.ndarray:
    return windows(x)[:, ::2, ::2].max(axis=(3, 4))


def maxima(x: np.ndarray) -> np.ndarray:
    return windows(np.pad(x, ((0, 0), (1, 1), (1, 1)), constant_values=-np.inf)).max(axis=(3, 4))


def means(x: np.ndarray) -> np.ndarray:
    """Over those of the 3 x 3 neighbours that exist."""
    neighbours = windows(np.pad(np.ones_like(x[:1]), ((0, 0), (1, 1), (1, 1)))).sum(axis=(3, 4))
    return windows(np.pad(x, ((0, 0), (1, 1), (1, 1)))).sum(axis=(3, 4)) / neighbours


def tensorflow_resize(image: np.ndarray, side: int) -> np.ndarray:
    """[h, w, c] -> float64 [side, side, c], the definition pixel by pixel."""
    h, w, _ = image.shape
    out = np.empty((side, side, image.shape[2]))
    for i in range(side):
        for j in range(side):
            y, x = i * h / side, j * w / side
            top, left = int(y), int(x)
            corners = image[
                np.ix_([top, min(top + 1, h - 1)], [left, min(left + 1, w - 1)])
            ].astype(np.float64)
            rows = corners[:, 0] * (1 - x + left) + corners[:, 1] * (x - left)
            out[i, j] = rows[0] * (1 - y + top) + rows[1] * (y - top)
    return out

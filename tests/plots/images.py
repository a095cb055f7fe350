"""Images for the tests of the pictures: white noise, and box averages of it."""

import numpy as np

RNG = np.random.default_rng(0)


def white(*shape: int) -> np.ndarray:
    """White unit noise, float32."""
    return RNG.standard_normal(shape).astype(np.float32)


def up(x: np.ndarray, patch: int) -> np.ndarray:
    """Every pixel of [n, h, w, c] as patch x patch pixels."""
    return x.repeat(patch, axis=1).repeat(patch, axis=2)


def box(x: np.ndarray, patch: int) -> np.ndarray:
    """Averages of patch x patch pixels of [n, h, w, c]."""
    n, h, w, c = x.shape
    return x.reshape(n, h // patch, patch, w // patch, patch, c).mean((2, 4))

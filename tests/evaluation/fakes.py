"""An extractor whose features can be computed by hand: six pixels of an image and more."""

import numpy as np

from relay_jax.evaluation.features import FeatureExtractor

DIMS = 6


def known(pixels: np.ndarray) -> dict[str, np.ndarray]:
    """uint8 [n, h, w, 3] -> pool [n, 6], spatial [n, 3], probabilities [n, 2]."""
    flat = pixels.reshape(len(pixels), -1).astype(np.float64) / 255
    first = 0.1 + 0.8 * flat[:, :1]
    return {
        "pool": flat[:, :DIMS].astype(np.float32),
        "spatial": flat[:, -3:].astype(np.float32),
        "probabilities": np.concatenate([first, 1 - first], axis=1).astype(np.float32),
    }


class Calls(list[int]):
    """Sizes of the batches that were computed."""


def extractor(
    name: str = "inception",
    batch: int = 4,
    calls: Calls | None = None,
    version: int = 1,
    bad: int = 0,
) -> FeatureExtractor:
    """bad: so many images of each batch get features that are not finite."""

    def compute(full: np.ndarray) -> dict[str, np.ndarray]:
        if calls is not None:
            calls.append(len(full))
        outputs = known(full)
        outputs["pool"][:bad] = np.nan
        return outputs

    return FeatureExtractor(
        name=name,
        identity={"name": name, "version": version},
        batch=batch,
        outputs=("pool", "spatial", "probabilities"),
        compute=compute,
    )

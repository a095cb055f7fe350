"""The training loss of a stage by noise level, from its averaged weights (SPEC section 4).

For levels sigma_1 < sigma_2 < ... over the range that training draws from, every image is
corrupted at every level as in training (loss.corrupt) and gives one weighted loss w |D - x0|^2,
the mean of its pixels. Then
(1)  quartiles and mean over the images, for each level
(2)  expected loss = sum_j share_j mean_j,     share_j = chance that training draws a sigma nearest to level j (in ln sigma)
(2) is what the training curve would show without dropout, label dropout and augmentation, for
the averaged weights.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from scipy.special import ndtr, ndtri

from relay_jax.config import Stage
from relay_jax.data.transforms import to_float
from relay_jax.diffusion.loss import corrupt, draw, loss_map
from relay_jax.diffusion.precondition import precondition
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.runtime.sharding import batch_sharding, from_all, to_host

LEVELS = 20
TAIL = 1e-3  # share of the draws of an unbounded schedule that is left out at each end


def level_draws(process: EdmProcess, count: int = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """sigma of the levels, rising and even in ln sigma, and the draws behind them
    (loss.Draws.level): float64 [count]."""
    if not isinstance(process, RelayProcess):
        normal = np.linspace(ndtri(TAIL), -ndtri(TAIL), count)
        return np.exp(process.P_mean + process.P_std * normal), normal
    lowest = float(process.sigma_from_u(jnp.float32(process.u_min)))
    highest = min(process.sigma_full_blur, math.exp(process.P_mean - process.P_std * ndtri(TAIL)))
    sigma = np.geomspace(lowest, highest, count)
    return sigma, np.minimum(process.u_from_sigma(sigma), 1.0)


def shares(process: EdmProcess, sigma: np.ndarray) -> np.ndarray:
    """share_j of equation (2), [levels], summing to 1. The clamped draws of a relay all count
    to its lowest level."""
    edges = np.log(np.sqrt(sigma[1:] * sigma[:-1]))
    below = ndtr((edges - process.P_mean) / process.P_std)
    if isinstance(process, RelayProcess):
        below = below / process.cdf_max
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


@dataclass(frozen=True, kw_only=True)
class LossBySigma:
    """Losses of one stage. sigma, share: [levels]; losses: weighted, one for each image,
    [levels, n]."""

    stage: str
    images: int  # seen in training
    sigma: np.ndarray
    share: np.ndarray
    losses: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        return self.losses.mean(axis=1)

    @property
    def quartiles(self) -> np.ndarray:
        """[3, levels]: a quarter, half and three quarters of the images lie below."""
        return np.quantile(self.losses, (0.25, 0.5, 0.75), axis=1)

    @property
    def expected(self) -> float:
        """Equation (2)."""
        return float(self.share @ self.mean)


def loss_by_sigma(
    stage: Stage,
    params: dict,
    mesh: Mesh,
    pixels: np.ndarray,
    labels: np.ndarray,
    images_seen: int,
    batch: int,
    seed: int = 0,
) -> LossBySigma:
    """pixels: uint8 [n, h, w, c], real images; labels: int [n]; batch: images per call, at
    most, rounded up to the devices.

    The noise of an image depends on the seed, the level and its place alone.
    """
    sigma, level = level_draws(stage.process)
    batch = -(-min(batch, len(pixels)) // mesh.size) * mesh.size

    def losses(params: dict, inputs: dict[str, jax.Array], key: jax.Array) -> jax.Array:
        images = to_float(inputs["image"])
        classes = stage.network.num_classes
        one_hot = jax.nn.one_hot(inputs["label"], classes) if classes else None
        denoise = precondition(
            lambda *args: stage.network.apply({"params": params}, *args), stage.process.sigma_data
        )
        draws = draw(stage.process, key, images.shape, inputs["place"])
        corrupted = corrupt(stage.process, images, draws._replace(level=inputs["level"]))
        return jnp.mean(
            loss_map(lambda x, s: denoise(x, s, one_hot), images, corrupted), axis=(1, 2, 3)
        )

    run = jax.jit(losses, out_shardings=batch_sharding(mesh))
    found = np.empty((len(level), len(pixels)))
    for start in range(0, len(pixels), batch):
        place = np.arange(start, start + batch)
        chosen = place % len(pixels)  # the last batch is filled up
        inputs = from_all(
            {"image": pixels[chosen], "label": labels[chosen], "place": place.astype(np.int32)},
            mesh,
        )
        for j, value in enumerate(level):
            inputs |= from_all({"level": np.full(batch, value, np.float32)}, mesh)
            values = to_host(run(params, inputs, jax.random.fold_in(jax.random.key(seed), j)))
            found[j, start : start + batch] = values[: len(pixels) - start]
    return LossBySigma(
        stage=stage.name,
        images=images_seen,
        sigma=sigma,
        share=shares(stage.process, sigma),
        losses=found,
    )

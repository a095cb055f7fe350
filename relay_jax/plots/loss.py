"""The picture `loss`: the training loss of a stage by noise level, from its averaged weights.

For levels sigma_1 < sigma_2 < ... over the range that training draws from, every image is
corrupted at every level as in training (docs/math.md section 5) and gives one weighted loss
w |D - x0|^2, the mean of its pixels. Then
(1)  quartiles and mean over the images, for each level
(2)  expected loss = sum_j share_j mean_j,
     share_j = chance that training draws a sigma nearest to level j (in ln sigma)
(2) is what the training curve would show without dropout, label dropout and augmentation, for
the averaged weights.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax.data.images import to_float
from relay_jax.diffusion.loss import corrupt, draw, loss_map
from relay_jax.diffusion.process import EdmProcess
from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.runtime.devices import jit
from relay_jax.runtime.sharding import batch_sharding, from_all, to_host
from relay_jax.stage import Stage, own

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEVELS = 20
TAIL = 1e-3  # share of the draws of an unbounded schedule that is left out at each end


def level_draws(process: EdmProcess, count: int = LEVELS) -> tuple[np.ndarray, np.ndarray]:
    """sigma of the levels, rising and even in ln sigma, and the draws behind them
    (loss.Draws.level): float64 [count]."""
    # Even in ln sigma like the horizontal axis: the network sees
    # sigma as its logarithm.
    sigma = np.geomspace(*process.sigma_range(TAIL), count)
    return sigma, process.draw_at(sigma)


def shares(process: EdmProcess, sigma: np.ndarray) -> np.ndarray:
    """share_j of equation (2), [levels], summing to 1."""
    below = process.cdf(np.sqrt(sigma[1:] * sigma[:-1]))
    # What lies outside the levels, or is clamped, counts to the
    # nearest of them.
    return np.diff(np.concatenate([[0.0], below, [1.0]]))


@dataclass(frozen=True, kw_only=True)
class LossBySigma:
    """Losses of one stage.

    images: seen in training; sigma, share: [levels]; losses:
    weighted, one for each image, [levels, n].
    """

    stage: str
    images: int
    sigma: np.ndarray
    share: np.ndarray
    losses: np.ndarray

    @property
    def mean(self) -> np.ndarray:
        """Over the images, [levels]."""
        return self.losses.mean(axis=1)

    @property
    def quartiles(self) -> np.ndarray:
        """[3, levels]: a quarter, half and three quarters of the images lie below."""
        return np.quantile(self.losses, (0.25, 0.5, 0.75), axis=1)

    @property
    def expected(self) -> float:
        """Equation (2)."""
        return float(self.share @ self.mean)

    def describe(self) -> dict[str, Any]:
        """The numbers of the picture; not the loss of each image."""
        return {
            "stage": self.stage,
            "images_seen": self.images,
            "images": self.losses.shape[1],
            "sigma": self.sigma,
            "share": self.share,
            "mean": self.mean,
            "quartiles": self.quartiles,
            "expected": self.expected,
        }


def losses_at(
    stage: Stage, params: dict, inputs: dict[str, jax.Array], key: jax.Array
) -> jax.Array:
    """The weighted loss of each image, float32 [b] at chosen levels.

    inputs: image uint8 [b, h, w, c]; label int [b]; place int [b],
    in the whole set; level [b], the raw draw of the process.
    """
    # Without augmentation, dropout and dropped labels: what they add
    # differs from image to image, and would hide the differences
    # between levels.
    images = to_float(inputs["image"])
    denoise = partial(_with_labels, stage.preconditioned(params), stage.one_hot(inputs["label"]))
    draws = draw(stage.process, key, images.shape, inputs["place"])
    corrupted = corrupt(stage.process, images, draws._replace(level=inputs["level"]))
    return jnp.mean(loss_map(denoise, images, corrupted), axis=(1, 2, 3))


def _with_labels(
    denoise: Any, labels: jax.Array | None, x: jax.Array, sigma: jax.Array, **given: Any
) -> jax.Array:
    return denoise(x, sigma, labels, **given)


def loss_by_sigma(
    stage: Stage,
    params: dict,
    mesh: Mesh,
    real: tuple[np.ndarray, np.ndarray],
    *,
    images_seen: int,
    batch: int,
    seed: int = 0,
) -> LossBySigma:
    """Equations (1) and (2) for one stage.

    real: uint8 [n, h, w, c] and labels int [n]; images_seen: by the
    training; batch: images per call, at most, rounded up to the
    devices. The noise of an image depends on the seed, the level and
    its place alone.
    """
    pixels, labels = real
    sigma, level = level_draws(stage.process)
    batch = -(-min(batch, len(pixels)) // mesh.size) * mesh.size
    run = jit(partial(losses_at, stage), mesh, out_shardings=batch_sharding(mesh))
    losses = np.empty((len(level), len(pixels)))
    for start in range(0, len(pixels), batch):
        place = np.arange(start, start + batch)
        rows = place % len(pixels)  # the last batch is filled up
        arrays = {
            "image": pixels[rows],
            "label": labels[rows],
            "place": place.astype(np.int32),
        }
        # Images go to the devices once, not once for each level.
        inputs = from_all(arrays, mesh)
        for j, value in enumerate(level):
            inputs |= from_all({"level": np.full(batch, value, np.float32)}, mesh)
            values = to_host(run(params, inputs, jax.random.fold_in(jax.random.key(seed), j)))
            losses[j, start : start + batch] = values[: len(pixels) - start]
    return LossBySigma(
        stage=stage.name,
        images=images_seen,
        sigma=sigma,
        share=shares(stage.process, sigma),
        losses=losses,
    )


def _panel(axes: "Axes", result: LossBySigma) -> None:
    sigma = result.sigma
    # Losses of images are skewed: quartiles show most of them, the
    # mean is what training lowers.
    low, middle, high = result.quartiles
    half = "middle half of the images"
    axes.fill_between(sigma, low, high, color="tab:blue", alpha=0.25, lw=0, label=half)
    axes.plot(sigma, middle, color="tab:blue", label="median")
    axes.plot(sigma, result.mean, color="tab:red", label="mean")
    expected = f"mean over the training's sigmas: {result.expected:.3g}"
    axes.axhline(result.expected, color="tab:red", lw=1, ls=":", label=expected)
    # The shares have a scale without ticks and keep to the lowest
    # third: their shape is enough.
    behind = axes.twinx()
    share = "share of the training"
    behind.fill_between(
        sigma,
        0,
        result.share,
        color="grey",
        alpha=0.2,
        lw=0,
        step="mid",
        label=share,
    )
    behind.set(ylim=(0, 3 * result.share.max()), yticks=[])
    style.power_axis(axes)
    axes.set(
        ylabel="weighted loss per image",
        title=f"stage {result.stage}, {result.images:,} images seen",
    )
    style.sigma_axis(axes, sigma)
    handles = [
        *axes.get_legend_handles_labels()[0],
        *behind.get_legend_handles_labels()[0],
    ]
    axes.legend(handles=handles, fontsize="small")


def loss_figure(results: Sequence[LossBySigma], title: str) -> "Figure":
    """One panel per stage: quartiles and mean by sigma, and how often training draws each sigma."""
    figure = style.make_figure(7 * len(results), 5, title)
    for number, result in enumerate(results):
        _panel(figure.add_subplot(1, len(results), number + 1), result)
    return figure


def plot_loss(inputs: Inputs) -> None:
    """loss.png and loss.json, of the stages that have a checkpoint."""
    results = []
    for stage in inputs.trained:
        logging.info("loss: stage %s", stage.name)
        params, notes = inputs.params(stage)
        results.append(
            loss_by_sigma(
                stage,
                own(params),
                inputs.mesh,
                inputs.real(stage.resolution),
                images_seen=notes["images"] or 0,
                batch=inputs.settings.sample.batch,
                seed=inputs.settings.seed,
            )
        )
    count = len(inputs.positions())
    title = f"Training loss by noise level: averaged weights, {count} images of the data set"
    style.save(loss_figure(results, title), inputs.out / "loss.png")
    inputs.write(
        "loss",
        inputs.describe() | {"stages": [result.describe() for result in results]},
    )


PICTURE = Picture(plot_loss, ("real images", "a checkpoint"))

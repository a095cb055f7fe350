"""The picture `handoff`: does a relay stage start from what its network was trained on?

At a level sigma, with s = s(sigma) of the training schedule and n the stage's noise (docs/math.md
sections 4 and 6):
(1)  start    = up-sampled image of the stage before + sigma n   what sampling begins with
(2)  forward  = B_s x0 + sigma n,  x0 real                       what the network was trained on
(3)  E|U|^2 of a state = E|U|^2 of its images + sigma^2 N,       N = power of n (noise_power)
(4)  discrepancy = sum over DCT coefficients of (q - 1 - ln q) / 2
                   q = E|U_start|^2 / E|U_forward|^2

The noise enters by its expectation, not by draws. (4) is the
Kullback-Leibler divergence in nats per image of two gaussians with
these powers: how much a best observer of spectra learns from one
state about where it comes from. It is the same for a relay that
continues a noisy state (handoff "noise"): its start has the law of
(1). It falls with sigma, as the blur grows and the noise covers what
is left; a higher hand-off costs more steps, and more of what the
stage before has made. Powers are means over bands
(spectra.square_bands); DCT coefficients of images are about
uncorrelated, channels are taken as independent.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging

from relay_jax.data.images import to_float
from relay_jax.diffusion.process import EdmProcess, Purpose
from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.plots.spectra import (
    Bands,
    dct_power,
    frequencies,
    radial_bands,
    square_bands,
)
from relay_jax.resolution import as_resolution, size_text
from relay_jax.stage import Stage

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

SIGMA_LIMIT = 5.0  # where the schedule itself sets no end
BATCH = 32  # images blurred at a time
CHANNELS = ("red", "green", "blue")


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Start and forward states at one sigma.

    Powers by frequency in cycles per image width, [bands]; moments
    by channel [c], of whole states. floor: the nats that two sets of
    forward states of these sizes would give by chance.
    """

    sigma: float
    blur_sigma: float
    blur_unit: str
    frequency: np.ndarray
    start: np.ndarray
    forward: np.ndarray
    noise: np.ndarray
    start_mean: np.ndarray
    forward_mean: np.ndarray
    start_std: np.ndarray
    forward_std: np.ndarray
    nats: float
    floor: float

    @property
    def decibels(self) -> np.ndarray:
        """Power of the start over that of the forward process, [bands]."""
        return 10 * np.log10(self.start / self.forward)


def highest_sigma(process: EdmProcess) -> float:
    """Where training ends; infinite where it has no end."""
    return process.sigma_range(0.0)[1]


def candidates(process: EdmProcess, first_level: float, count: int = 12) -> np.ndarray:
    """Levels to compare at, rising, float64 [count + 1].

    Logarithmic from a fifth of the first level of sampling to where
    training ends, and that level.
    """
    end = min(highest_sigma(process), SIGMA_LIMIT)
    # Just below the end: at it, rounding decides whether the level
    # still belongs to the training.
    levels = np.geomspace(min(first_level, end) / 5, 0.9999 * end, count)
    return np.unique(np.append(levels, first_level))


def divergence(start: np.ndarray, forward: np.ndarray, bands: Bands, channels: int) -> float:
    """Equation (4), nats per image. start, forward: powers [h, w] of whole states."""
    quotient = bands.mean(start) / bands.mean(forward)
    return float(0.5 * channels * np.sum(bands.count * (quotient - 1 - np.log(quotient))))


def start_images(process: EdmProcess, low_res: np.ndarray) -> np.ndarray:
    """Start states without their noise: low_res [n, h/p, w/p, c] up-sampled, [n, h, w, c]."""
    n, height, width, channels = low_res.shape
    shape = (n, height * process.patch, width * process.patch, channels)

    def silence(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        return jnp.zeros(shape)

    return np.asarray(process.initial_state(0.0, silence, jnp.asarray(low_res)))


def _blurred(blur: Callable[..., jax.Array], images: np.ndarray, blur_sigma: float) -> np.ndarray:
    """B_s x0 on the host, [n, h, w, c]. blur: of the process, compiled."""
    parts = [images[start : start + BATCH] for start in range(0, len(images), BATCH)]
    return np.concatenate([np.asarray(blur(part, jnp.float32(blur_sigma))) for part in parts])


def compare(
    process: EdmProcess,
    low_res: np.ndarray,
    real: np.ndarray,
    sigmas: Sequence[float] | np.ndarray,
) -> list[Comparison]:
    """Equations (1) to (4) at each sigma.

    process: the stage's, as trained; low_res: [m, h/p, w/p, c],
    images of the stage before; real: [n, h, w, c], n > 1; all
    float32 in [-1, 1]. Raises ValueError for a sigma that training
    does not reach.
    """
    resolution, channels = as_resolution(real.shape[1:3]), real.shape[-1]
    fine, rings = square_bands(resolution), radial_bands(resolution)
    unit = process.noise_power(resolution)
    variance = float(unit.mean())  # of the noise in each pixel, by Parseval's theorem
    up = start_images(process, low_res)
    start_mean, up_variance = (
        up.mean((0, 1, 2), np.float64),
        up.var((0, 1, 2), np.float64),
    )
    # The blur keeps the mean; powers are around it, or the first
    # band would hold nothing else.
    center = real.mean((0, 1, 2), np.float64)
    up_power = dct_power(up - center)
    # Two halves of the real images differ by chance alone. Sets of m
    # and n images would differ less, as the variance of a mean over
    # n images is 1/n.
    chance = (1 / len(low_res) + 1 / len(real)) / (4 / len(real))
    blur = jax.jit(process.blur)  # once for all levels
    comparisons = []
    for sigma in sigmas:
        if not 0 < process.cdf(np.asarray(sigma)) <= 1:
            raise ValueError(
                f"sigma {sigma:g} is beyond what this stage is trained on, "
                f"{highest_sigma(process):g}"
            )
        blur_sigma = float(process.blur_sigma_at(np.asarray(sigma)))
        images = _blurred(blur, real, blur_sigma)
        noise = sigma**2 * unit
        halves = [dct_power(images[part::2] - center) for part in (0, 1)]
        power = np.average(halves, axis=0, weights=[len(images[part::2]) for part in (0, 1)])
        start, forward = up_power + noise, power + noise
        comparisons.append(
            Comparison(
                sigma=float(sigma),
                blur_sigma=blur_sigma,
                blur_unit=process.blur_unit,
                frequency=rings.mean(frequencies(resolution)),
                start=rings.mean(start),
                forward=rings.mean(forward),
                noise=rings.mean(noise),
                start_mean=start_mean,
                forward_mean=images.mean((0, 1, 2), np.float64),
                start_std=np.sqrt(up_variance + sigma**2 * variance),
                forward_std=np.sqrt(images.var((0, 1, 2), np.float64) + sigma**2 * variance),
                nats=divergence(start, forward, fine, channels),
                floor=chance * divergence(halves[0] + noise, halves[1] + noise, fine, channels),
            )
        )
    return comparisons


# The figure: four panels, all of the comparisons with the images
# that sampling starts from, but for the third, which shows every
# kind of image.


def _spectra_panel(axes: "Axes", kind: str, at: Comparison) -> None:
    forward = "real images, forward process (trained on)"
    axes.plot(at.frequency, at.forward, color="tab:red", lw=4, alpha=0.4, label=forward)
    start = f"{kind}, up-sampled, plus noise (starts from)"
    axes.plot(at.frequency, at.start, color="tab:blue", label=start)
    for total, color, label in (
        (at.forward, "tab:red", "blurred real images, without noise"),
        (at.start, "tab:blue", "up-sampled images, without noise"),
    ):
        axes.plot(at.frequency, total - at.noise, color=color, ls=":", label=label)
    axes.plot(at.frequency, at.noise, color="grey", lw=1, label="noise")
    axes.set(
        ylabel="power per DCT coefficient",
        title=f"spectra at the hand-off, sigma {at.sigma:.3g}",
        # Without a limit the blurred images, 0 but for rounding,
        # would take most of the height.
        ylim=(at.noise.min() * 1e-5, at.forward.max() * 2),
    )
    style.power_axis(axes)
    style.frequency_axis(axes, at.frequency[-1])
    axes.legend(loc="lower left", fontsize="small")


def _difference_panel(axes: "Axes", comparisons: Sequence[Comparison], at: Comparison) -> None:
    import matplotlib

    spread = [comparisons[i] for i in np.linspace(0, len(comparisons) - 1, 5).astype(int)]
    shown = sorted({c.sigma: c for c in [at, *spread]}.values(), key=lambda c: c.sigma)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(shown)))
    for c, colour in zip(shown, colours, strict=True):
        label = f"sigma {c.sigma:.2f}, blur {c.blur_sigma:.2f} {c.blur_unit}"
        label += " (hand-off)" if c is at else ""
        width = 3 if c is at else 1.5
        axes.plot(c.frequency, c.decibels, color=colour, lw=width, label=label)
    axes.set(
        ylabel="power of start over forward, dB",
        title="difference of the states by candidate sigma",
    )
    axes.axhline(0, color="black", lw=0.8)
    style.frequency_axis(axes, at.frequency[-1])
    axes.legend(loc="lower left", fontsize="small")


def _discrepancy_panel(
    axes: "Axes", kinds: Sequence[tuple[str, list[Comparison]]], at: Comparison
) -> None:
    sigmas = np.array([c.sigma for c in kinds[0][1]])
    for (kind, comparisons), colour in zip(kinds, ("tab:blue", "tab:green"), strict=False):
        nats = [c.nats for c in comparisons]
        axes.plot(sigmas, nats, "o-", color=colour, ms=4, label=kind)
    # Down-sampled real images alone are the same images on both
    # sides: no chance in them.
    if len(kinds) > 1:
        floor = [c.floor for c in kinds[0][1]]
        label = "two sets of real images, for comparison"
        axes.plot(sigmas, floor, color="grey", ls="--", label=label)
    style.mark_line(axes, at.sigma, " hand-off", "black")
    style.power_axis(axes)
    axes.set(
        ylabel="discrepancy, nats per image",
        title="discrepancy of start and forward states by sigma",
    )
    style.sigma_axis(axes, sigmas)
    axes.legend(loc="lower left", fontsize="small")


def _moments_panel(axes: "Axes", comparisons: Sequence[Comparison], at: Comparison) -> None:
    sigmas = np.array([c.sigma for c in comparisons])
    means = 127.5 * np.array([c.start_mean - c.forward_mean for c in comparisons])
    deviations = 127.5 * np.array([c.start_std - c.forward_std for c in comparisons])
    for channel in range(means.shape[1]):
        colour = CHANNELS[channel % len(CHANNELS)]
        for name, values, line in (("mean", means, "-"), ("std", deviations, "--")):
            label = f"{name}, {colour}"
            axes.plot(sigmas, values[:, channel], line, color=f"tab:{colour}", label=label)
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(at.sigma, color="black", lw=1, ls=":")
    axes.set(ylabel="start minus forward, levels of 255", title="moments of the states")
    style.sigma_axis(axes, sigmas)
    axes.legend(fontsize="small", ncols=3)


def handoff_figure(
    kinds: Sequence[tuple[str, list[Comparison]]], first_level: float, title: str
) -> "Figure":
    """Four panels: spectra, moments and divergence of the states.

    kinds: what the low-resolution images are, with comparisons at
    rising sigmas; those that sampling starts from first.
    first_level: the sigma where it starts.
    """
    figure = style.make_figure(13, 9.5, title)
    kind, comparisons = kinds[0]
    at = min(comparisons, key=lambda c: abs(c.sigma - first_level))
    _spectra_panel(figure.add_subplot(2, 2, 1), kind, at)
    _difference_panel(figure.add_subplot(2, 2, 2), comparisons, at)
    _discrepancy_panel(figure.add_subplot(2, 2, 3), kinds, at)
    _moments_panel(figure.add_subplot(2, 2, 4), comparisons, at)
    return figure


def plot_handoff(inputs: Inputs) -> None:
    """handoff.png and .json, or handoff_STAGE for each stage of a longer relay."""
    for before, stage in zip(inputs.stages, inputs.stages[1:], strict=False):
        if stage.process.has_handoff:
            name = "handoff" if len(inputs.stages) == 2 else f"handoff_{stage.name}"
            _plot_stage(inputs, before, stage, name)


def _plot_stage(inputs: Inputs, before: Stage, stage: Stage, name: str) -> None:
    real, labels = inputs.real(stage.resolution)
    first_level = float(stage.sampler.levels()[0])
    images = {"down-sampled real images": to_float(inputs.real(before.resolution)[0])}
    # Without their weights the real images stand for the stages
    # before: they show what the schedule does, though not what
    # those stages make.
    if all(earlier in inputs.trained for earlier in inputs.stages[: stage.index]):
        logging.info("handoff: samples %d images of stage %s", len(real), before.name)
        samples = inputs.samples(range(len(real)), labels, stage.index)[before.name]
        images = {f"samples of stage {before.name}": samples} | images
    sigmas = candidates(stage.process, first_level)
    kinds = [
        (kind, compare(stage.process, low_res, to_float(real), sigmas))
        for kind, low_res in images.items()
    ]
    title = (
        f"Hand-off from {before.name} ({size_text(before.resolution)} px) to {stage.name} "
        f"({size_text(stage.resolution)} px): {kinds[0][0]} against {len(real)} real images"
    )
    style.save(handoff_figure(kinds, first_level, title), inputs.out / f"{name}.png")
    numbers = {
        "stage": stage.name,
        "images": len(real),
        "sampler": stage.describe()["sampler"],
        "handoff": stage.handoff,
        "first_level": first_level,
        "low_resolution_images": {
            kind: [asdict(c) | {"decibels": c.decibels} for c in comparisons]
            for kind, comparisons in kinds
        },
    }
    inputs.write(name, inputs.describe() | numbers)


PICTURE = Picture(plot_handoff, ("a relay", "a hand-off", "real images"))

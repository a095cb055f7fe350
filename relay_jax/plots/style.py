"""Draws what spectra, handoff_check, loss_by_sigma, filmstrip and neighbours compute.
Matplotlib is imported late."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_jax.plots.filmstrip import Frames
from relay_jax.plots.grids import power_axis
from relay_jax.plots.handoff import Comparison
from relay_jax.plots.loss import LossBySigma
from relay_jax.plots.neighbours import Neighbours
from relay_jax.plots.spectra import Ratio
from relay_jax.runtime.logs import write_png
from relay_jax.sampling.pixels import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
FREQUENCY = "frequency, cycles per image width"
GAP = 0.12  # between groups of columns, in columns
CHANNELS = ("tab:red", "tab:green", "tab:blue")


def _figure(width: float, height: float) -> "Figure":
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def save(figure: "Figure", path: Path) -> None:
    """Writes a whole PNG or nothing."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    write_png(path, np.asarray(canvas.buffer_rgba())[..., :3])


def _log_axis(axis: Any, ticks: Sequence[float]) -> None:
    """Plain numbers on a logarithmic axis, at these ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _frequency_axis(axes: "Axes", highest: float) -> None:
    axes.set(xscale="log", xlabel=FREQUENCY)
    _log_axis(axes.xaxis, [2.0**k for k in range(0, 12) if 2.0**k <= highest])
    axes.grid(alpha=0.3)


def _sigma_axis(axes: "Axes", sigmas: np.ndarray) -> None:
    low, high = sigmas.min(), sigmas.max()
    axes.set(
        xscale="log", xlabel="noise level sigma (images in [-1, 1])", xlim=(low / 1.05, high * 1.05)
    )
    ticks = [m * 10.0**k for k in range(-4, 3) for m in (1, 2, 5)]
    _log_axis(axes.xaxis, [t for t in ticks if low / 1.05 <= t <= high * 1.05])
    axes.grid(alpha=0.3)


def draw_ratios(pairs: Sequence[tuple[str, list[Ratio]]], title: str) -> "Figure":
    """One panel for each pair of resolutions: title and curves of spectra.resolution_ratios."""
    figure = _figure(7.5 * len(pairs), 5.2)
    figure.suptitle(title)
    for number, (name, curves) in enumerate(pairs):
        axes = figure.add_subplot(1, len(pairs), number + 1)
        styles: tuple[dict[str, Any], ...] = (
            dict(color="tab:blue", lw=5, alpha=0.35),
            dict(color="tab:red"),
            dict(color="tab:blue"),
            dict(color="tab:orange", ls="--"),
        )
        for curve, style in zip(curves, styles, strict=False):
            axes.plot(curve.frequency, curve.decibels, label=curve.name, **style)
        edge = curves[0].resolution / 2
        axes.axvline(edge, color="grey", lw=1, ls=":")
        axes.annotate(
            f"end of {curves[0].resolution} px ",
            (edge, 0.97),
            xycoords=("data", "axes fraction"),
            ha="right",
            va="top",
            color="grey",
            rotation=90,
        )
        axes.set(ylabel="signal-to-noise ratio, dB", title=name)
        _frequency_axis(axes, curves[1].frequency[-1])
        axes.legend(loc="lower left")
    return figure


def draw_handoff(
    name: str, kinds: Sequence[tuple[str, list[Comparison]]], handoff_sigma: float, title: str
) -> "Figure":
    """name: the stage; kinds: (what the low-resolution images are, comparisons at rising
    sigmas), the run's own first."""
    import matplotlib

    figure = _figure(13, 9.5)
    figure.suptitle(title)
    what, found = kinds[0]
    at = min(found, key=lambda c: abs(c.sigma - handoff_sigma))
    chosen = sorted(
        {
            id(c): c
            for c in [at, *(found[i] for i in np.linspace(0, len(found) - 1, 5).astype(int))]
        }.values(),
        key=lambda c: c.sigma,
    )

    axes = figure.add_subplot(2, 2, 1)
    axes.plot(
        at.frequency,
        at.forward,
        color="tab:red",
        lw=4,
        alpha=0.4,
        label="real images, forward process (trained on)",
    )
    axes.plot(
        at.frequency,
        at.start,
        color="tab:blue",
        label=f"{what}, up-sampled, plus noise (starts from)",
    )
    axes.plot(
        at.frequency,
        at.forward - at.noise,
        color="tab:red",
        ls=":",
        label="blurred real images, without noise",
    )
    axes.plot(
        at.frequency,
        at.start - at.noise,
        color="tab:blue",
        ls=":",
        label="up-sampled images, without noise",
    )
    axes.plot(at.frequency, at.noise, color="grey", lw=1, label="noise")
    axes.set(
        ylabel="power per DCT coefficient",
        title=f"spectra at the hand-off, sigma {at.sigma:.3g}",
        ylim=(at.noise.min() * 1e-5, at.forward.max() * 2),
    )
    power_axis(axes)
    _frequency_axis(axes, at.frequency[-1])
    axes.legend(loc="lower left", fontsize="small")

    axes = figure.add_subplot(2, 2, 2)
    colours = matplotlib.colormaps["viridis"](np.linspace(0, 0.9, len(chosen)))
    for c, colour in zip(chosen, colours, strict=True):
        mark = " (hand-off)" if c is at else ""
        axes.plot(
            c.frequency,
            c.decibels,
            color=colour,
            lw=3 if c is at else 1.5,
            label=f"sigma {c.sigma:.2f}, blur {c.blur_sigma:.2f} px{mark}",
        )
    axes.set(
        ylabel="power of start over forward, dB",
        title="difference of the states by candidate sigma",
    )
    axes.axhline(0, color="black", lw=0.8)
    _frequency_axis(axes, at.frequency[-1])
    axes.legend(loc="lower left", fontsize="small")

    axes = figure.add_subplot(2, 2, 3)
    for (kind, comparisons), colour in zip(kinds, ("tab:blue", "tab:green"), strict=False):
        axes.plot(
            [c.sigma for c in comparisons],
            [c.nats for c in comparisons],
            "o-",
            color=colour,
            ms=4,
            label=kind,
        )
    if len(kinds) > 1:  # the second kind are the same real images on both sides: no chance in it
        axes.plot(
            [c.sigma for c in found],
            [c.floor for c in found],
            color="grey",
            ls="--",
            label="two sets of real images, for comparison",
        )
    axes.axvline(at.sigma, color="black", lw=1, ls=":")
    axes.annotate(
        " hand-off",
        (at.sigma, 0.97),
        xycoords=("data", "axes fraction"),
        va="top",
        rotation=90,
        ha="right",
    )
    power_axis(axes)
    axes.set(
        ylabel="discrepancy, nats per image",
        title="discrepancy of start and forward states by sigma",
    )
    _sigma_axis(axes, np.array([c.sigma for c in found]))
    axes.legend(loc="lower left", fontsize="small")

    axes = figure.add_subplot(2, 2, 4)
    for channel in range(len(at.start_mean)):
        for moment, style in (("mean", "-"), ("std", "--")):
            values = [
                127.5 * (getattr(c, f"start_{moment}") - getattr(c, f"forward_{moment}"))[channel]
                for c in found
            ]
            axes.plot(
                [c.sigma for c in found],
                values,
                style,
                color=CHANNELS[channel % 3],
                label=f"{moment}, {('red', 'green', 'blue')[channel % 3]}",
            )
    axes.axhline(0, color="black", lw=0.8)
    axes.axvline(at.sigma, color="black", lw=1, ls=":")
    axes.set(
        ylabel="start minus forward, levels of 255", title=f"moments of the states (stage {name})"
    )
    _sigma_axis(axes, np.array([c.sigma for c in found]))
    axes.legend(fontsize="small", ncols=3)
    return figure


def draw_losses(losses: Sequence[LossBySigma], title: str) -> "Figure":
    """One panel per stage: quartiles and mean by sigma, and how often training draws each sigma."""
    figure = _figure(7 * len(losses), 5)
    figure.suptitle(title)
    for number, found in enumerate(losses):
        axes = figure.add_subplot(1, len(losses), number + 1)
        low, middle, high = found.quartiles
        axes.fill_between(
            found.sigma,
            low,
            high,
            color="tab:blue",
            alpha=0.25,
            lw=0,
            label="middle half of the images",
        )
        axes.plot(found.sigma, middle, color="tab:blue", label="median")
        axes.plot(found.sigma, found.mean, color="tab:red", label="mean")
        axes.axhline(
            found.expected,
            color="tab:red",
            lw=1,
            ls=":",
            label=f"mean over the training's sigmas: {found.expected:.3g}",
        )
        drawn = axes.twinx()
        drawn.fill_between(
            found.sigma,
            0,
            found.share,
            color="grey",
            alpha=0.2,
            lw=0,
            step="mid",
            label="share of the training",
        )
        drawn.set(ylim=(0, 3 * found.share.max()), yticks=[])
        power_axis(axes)
        axes.set(
            ylabel="weighted loss per image",
            title=f"stage {found.stage}, {found.images:,} images seen",
        )
        _sigma_axis(axes, found.sigma)
        handles = [*axes.get_legend_handles_labels()[0], *drawn.get_legend_handles_labels()[0]]
        axes.legend(handles=handles, fontsize="small")
    return figure


def _show(axes: "Axes", image: np.ndarray) -> None:
    """A float image about [-1, 1], or uint8, as it is: no smoothing between pixels."""
    pixels = image if image.dtype == np.uint8 else to_uint8(image)
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)


def draw_filmstrip(
    strip: Sequence[Frames],
    seeds: Sequence[int],
    classes: np.ndarray | None,
    sigma_data: float,
    title: str,
) -> "Figure":
    """Two rows per seed, state above denoised image; a column per step, then the sample. States
    are drawn at the contrast
    of images: x sigma_data / sqrt(sigma^2 + sigma_data^2)."""
    widths = [width for frames in strip for width in (GAP, *[1.0] * len(frames.steps))] + [GAP, 1.0]
    figure = _figure(1.15 * sum(widths) + 1, 2.35 * len(seeds) + 1)
    figure.suptitle(title)
    grid = figure.add_gridspec(
        2 * len(seeds), len(widths), wspace=0.05, hspace=0.05, width_ratios=widths
    )
    column = 0
    for number, frames in enumerate(strip):
        for k, step in enumerate(frames.steps):
            column += 2 if k == 0 else 1  # a gap before each stage
            scale = sigma_data / np.hypot(frames.sigmas[k], sigma_data)
            for n, seed in enumerate(seeds):
                for row, image in enumerate((frames.states[k, n] * scale, frames.denoised[k, n])):
                    axes = figure.add_subplot(grid[2 * n + row, column - 1])
                    _show(axes, image)
                    if n == 0 and row == 0:
                        head = f"{frames.stage}, {image.shape[0]} px" if k == 0 else ""
                        head += " (hand-off)" if k == 0 and number else ""
                        axes.set_title(
                            f"{head}\nstep {step + 1}/{frames.total_steps}\nsigma "
                            f"{frames.sigmas[k]:.3g}",
                            fontsize="small",
                            loc="left",
                        )
                    if number == 0 and k == 0:
                        label = f"seed {seed}" + (
                            f"\nclass {classes[n]}" if classes is not None else ""
                        )
                        axes.set_ylabel(
                            f"{label}\nstate" if row == 0 else "denoised", fontsize="small"
                        )
    for n in range(len(seeds)):
        axes = figure.add_subplot(grid[2 * n : 2 * n + 2, -1])
        _show(axes, strip[-1].final[n])
        axes.set_title("sample", fontsize="small", loc="left")
    return figure


def draw_neighbours(
    found: Sequence[Neighbours],
    samples: np.ndarray,
    real: Sequence[np.ndarray],
    seeds: Sequence[int],
    title: str,
) -> "Figure":
    """A row per sample: the sample, then its nearest real images by each distance. real: [m, k,
    r, r, 3] for each."""
    counts = [f.positions.shape[1] for f in found]
    columns = 1 + sum(counts)
    figure = _figure(1.25 * columns + 0.8, 1.5 * len(samples) + 1.2)
    figure.suptitle(title)
    grid = figure.add_gridspec(
        len(samples),
        columns + len(found),
        wspace=0.05,
        hspace=0.05,
        width_ratios=[1.0, *(width for count in counts for width in (GAP, *[1.0] * count))],
    )
    for n, sample in enumerate(samples):
        axes = figure.add_subplot(grid[n, 0])
        _show(axes, sample)
        axes.set_ylabel(f"seed {seeds[n]}", fontsize="small")
        if n == 0:
            axes.set_title("sample", fontsize="small", loc="left")
        column = 1
        for one, images in zip(found, real, strict=True):
            for k in range(images.shape[1]):
                axes = figure.add_subplot(grid[n, column + 1 + k])
                _show(axes, images[n, k])
                axes.set_xlabel(f"{one.distances[n, k]:.3f}", fontsize="small", labelpad=2)
                if n == 0 and k == 0:
                    axes.set_title(
                        f"nearest real images by {one.name}\n(between real images: "
                        f"{one.typical:.3f})",
                        fontsize="small",
                        loc="left",
                    )
            column += 1 + images.shape[1]
    return figure

"""What the pictures share: figures, axes and how an image stands in them.

Matplotlib takes a second to import and only pictures need it, so
that every function here imports it itself. Figures are made without
pyplot: it would keep each one, and may look for a screen.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from relay_jax.runtime.files import write_png
from relay_jax.sampling.pixels import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DPI = 130
GAP = 0.12  # between groups of columns, in columns


def make_figure(width: float, height: float, title: str = "", dpi: int = DPI) -> "Figure":
    """An empty figure. width, height: in inches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=dpi, layout="constrained")
    if title:
        figure.suptitle(title)
    return figure


def save(figure: "Figure", path: Path) -> None:
    """Writes a whole PNG or nothing. Raises StorageError."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    # A file that matplotlib writes
    # itself could be left half written.
    write_png(path, np.asarray(canvas.buffer_rgba())[..., :3])


def plain_ticks(axis: Any, ticks: Sequence[float]) -> None:
    """Numbers such as 0.02 instead of powers of ten on a logarithmic axis, at these ticks."""
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullFormatter

    axis.set_major_locator(FixedLocator(list(ticks)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def power_axis(axes: "Axes") -> None:
    """A logarithmic vertical axis with plain numbers at 1, 2 and 5 of each decade."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    # Over few decades every digit has room, over many only the
    # powers of ten.
    digits = range(1, 10) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=[float(digit) for digit in digits]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def frequency_axis(axes: "Axes", highest: float) -> None:
    """A horizontal axis of DCT frequencies up to `highest` cycles per image width."""
    axes.set(xscale="log", xlabel="frequency, cycles per image width")
    plain_ticks(axes.xaxis, [2.0**k for k in range(0, 12) if 2.0**k <= highest])
    axes.grid(alpha=0.3)


def sigma_axis(axes: "Axes", sigmas: np.ndarray) -> None:
    """A horizontal axis of noise levels, a little wider than `sigmas` reach."""
    low, high = sigmas.min() / 1.05, sigmas.max() * 1.05
    axes.set(
        xscale="log",
        xlabel="noise level sigma (images in [-1, 1])",
        xlim=(low, high),
    )
    ticks = [digit * 10.0**k for k in range(-4, 3) for digit in (1, 2, 5)]
    plain_ticks(axes.xaxis, [tick for tick in ticks if low <= tick <= high])
    axes.grid(alpha=0.3)


def mark_line(axes: "Axes", x: float, text: str, color: str) -> None:
    """A dotted vertical line with a text at its top."""
    axes.axvline(x, color=color, lw=1, ls=":")
    # x in units of the data, height as a share of the axes: stays at
    # the top on any scale.
    where = ("data", "axes fraction")
    axes.annotate(
        text,
        (x, 0.97),
        xycoords=where,
        ha="right",
        va="top",
        color=color,
        rotation=90,
    )


def aspect(image: np.ndarray) -> float:
    """Height over width of an image [h, w, c]."""
    return image.shape[0] / image.shape[1]


def show(axes: "Axes", image: np.ndarray) -> None:
    """One image [h, w, 3], floats about [-1, 1] or uint8, without a frame."""
    pixels = image if image.dtype == np.uint8 else to_uint8(image)
    # No smoothing between pixels: what is seen must be what the
    # network made.
    axes.imshow(pixels, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    for spine in axes.spines.values():
        spine.set_visible(False)

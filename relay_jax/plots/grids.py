"""Pictures for people: grids of samples, the relay in three panels, loss curves."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from relay_jax.config import Stage
from relay_jax.diffusion.process import RelayProcess
from relay_jax.runtime.logs import read_jsonl, write_png
from relay_jax.sampling.chain import handoff_images
from relay_jax.sampling.pixels import to_uint8

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PAPER = 255
GRID_ROWS, GRID_COLUMNS = 8, 4


def grid(images: np.ndarray, columns: int, side: int = 96) -> np.ndarray:
    """float images [n, h, w, c] as one picture, `columns` to a row, each shown `side` pixels or
    more wide.

    Enlarged by whole factors without smoothing: what is seen are the pixels. Returns uint8 [H,
    W, 3].
    """
    pixels = to_uint8(images)
    scale = max(round(side / pixels.shape[1]), 1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = pixels.shape
    rows, gap = -(-n // columns), 2
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), PAPER, np.uint8)
    for i, image in enumerate(pixels):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[y : y + h, x : x + w] = image
    return canvas


def panels(pictures: Sequence[tuple[str, np.ndarray]]) -> np.ndarray:
    """Pictures [H, W, 3] side by side under their captions. Returns uint8 [H', W', 3]."""
    gap, header = 16, 28
    height = max(p.shape[0] for _, p in pictures) + header
    width = sum(p.shape[1] for _, p in pictures) + gap * (len(pictures) - 1)
    canvas = Image.new("RGB", (width, height), (PAPER,) * 3)
    draw, x = ImageDraw.Draw(canvas), 0
    for caption, picture in pictures:
        draw.text((x, 4), caption, fill=(0, 0, 0), font=ImageFont.load_default(16))
        canvas.paste(Image.fromarray(picture), (x, header))
        x += picture.shape[1] + gap
    return np.asarray(canvas)


def relay_picture(
    stages: Sequence[Stage], images: dict[str, np.ndarray], seeds: np.ndarray, classes: np.ndarray
) -> np.ndarray:
    """Each stage, and each hand-off, as a panel: a row for each of the first classes, a column
    for each sample."""
    if stages[-1].network.num_classes:
        rows = [
            np.flatnonzero(classes == c)[:GRID_COLUMNS]
            for c in range(min(stages[-1].network.num_classes, GRID_ROWS))
        ]
        chosen = np.concatenate(
            [row for row in rows if len(row) == GRID_COLUMNS] or [np.arange(len(seeds))]
        )
    else:
        chosen = np.arange(len(seeds))
    chosen = chosen[: GRID_ROWS * GRID_COLUMNS]
    side = (
        min(stages[-1].resolution * 3, 96) if stages[-1].resolution <= 64 else stages[-1].resolution
    )
    pictures = []
    for before, stage in zip([None, *stages[:-1]], stages, strict=True):
        if before is not None and isinstance(stage.process, RelayProcess):
            start = handoff_images(stage, seeds[chosen], images[before.name][chosen])
            pictures.append((f"hand-off to {stage.name}", grid(start, GRID_COLUMNS, side)))
        pictures.append(
            (
                f"{stage.name}, {stage.resolution} px",
                grid(images[stage.name][chosen], GRID_COLUMNS, side),
            )
        )
    return panels(pictures)


def power_axis(axes: "Axes") -> None:
    """A logarithmic vertical axis with plain numbers, at 1, 2 and 5 of each decade where there
    are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    low, high = axes.get_ylim()
    subs = range(1, 10) if high < 10 * low else (1, 2, 5) if high < 1000 * low else (1,)
    axes.yaxis.set_major_locator(LogLocator(subs=[float(digit) for digit in subs]))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def loss_curves(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Loss over images seen, one panel per stage, from their metrics.jsonl, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(runs), 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, (name, metrics) in enumerate(runs):
        lines = [line for line in read_jsonl(metrics) if line.get("loss") is not None]
        axes = figure.add_subplot(1, len(runs), number + 1)
        axes.plot(
            [line["images"] for line in lines], [line["loss"] for line in lines], linewidth=1.5
        )
        axes.set(title=f"stage {name}", xlabel="images seen", ylabel="training loss")
        power_axis(axes)
        axes.grid(alpha=0.3, which="both")
    canvas.draw()
    write_png(path, np.asarray(canvas.buffer_rgba())[..., :3])

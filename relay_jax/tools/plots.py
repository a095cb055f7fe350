"""Pictures for people: grids of samples, the relay in three panels, loss curves."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from relay_jax.logs import read_jsonl, write_png
from relay_jax.sampling.pixels import to_uint8

PAPER = 255


def grid(images: np.ndarray, columns: int, side: int = 96) -> np.ndarray:
    """float images [n, h, w, c] as one picture, `columns` to a row, each shown `side` pixels or more wide.

    Enlarged by whole factors without smoothing: what is seen are the pixels. Returns uint8 [H, W, 3].
    """
    pixels = to_uint8(images)
    scale = max(round(side / pixels.shape[1]), 1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = pixels.shape
    rows, gap = -(-n // columns), 2
    canvas = np.full((rows * (h + gap) - gap, columns * (w + gap) - gap, c), PAPER, np.uint8)
    for i, image in enumerate(pixels):
        y, x = (i // columns) * (h + gap), (i % columns) * (w + gap)
        canvas[y:y + h, x:x + w] = image
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


def loss_curves(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Loss over images seen, one panel per stage, from their metrics.jsonl, to a PNG."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import, needed once a run
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(runs), 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    for number, (name, metrics) in enumerate(runs):
        lines = [line for line in read_jsonl(metrics) if line.get("loss") is not None]
        axes = figure.add_subplot(1, len(runs), number + 1)
        axes.plot([line["images"] for line in lines], [line["loss"] for line in lines], linewidth=1.5)
        axes.set(title=f"stage {name}", xlabel="images seen", ylabel="training loss", yscale="log")
        axes.grid(alpha=0.3, which="both")
    canvas.draw()
    write_png(path, np.asarray(canvas.buffer_rgba())[..., :3])

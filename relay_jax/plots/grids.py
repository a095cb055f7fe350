"""The pictures `grid` and `curves`: samples with their hand-offs, and the loss by images seen.

Training makes both at its end, and grids of previews on the way.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.resolution import size_text
from relay_jax.runtime.files import write_png
from relay_jax.runtime.logs import read_curve
from relay_jax.sampling.chain import condition_of, initial_state
from relay_jax.sampling.pixels import to_uint8
from relay_jax.stage import Stage

PAPER = 255
GRID_ROWS, GRID_COLUMNS = 8, 4
SEEDS = 64  # at most, to choose the rows of the grid from


def grid(images: np.ndarray, columns: int, side: int = 96) -> np.ndarray:
    """Float images [n, h, w, c] as one picture, uint8 [H, W, c], `columns` to a row.

    Each is shown `side` pixels or more high, enlarged by whole
    factors without smoothing: what is seen are the pixels.
    """
    pixels = to_uint8(images)
    scale = max(round(side / pixels.shape[1]), 1)
    pixels = pixels.repeat(scale, axis=1).repeat(scale, axis=2)
    n, h, w, c = pixels.shape
    rows, gap = -(-n // columns), 2
    # White where the last row has no
    # image: black could be taken for one.
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
    # Pillow rather than matplotlib, which would resample the pixels.
    canvas = Image.new("RGB", (width, height), (PAPER,) * 3)
    pen, x = ImageDraw.Draw(canvas), 0
    for caption, picture in pictures:
        pen.text((x, 4), caption, fill=(0, 0, 0), font=ImageFont.load_default(16))
        canvas.paste(Image.fromarray(picture), (x, header))
        x += picture.shape[1] + gap
    return np.asarray(canvas)


def _rows_by_class(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Indices of the images to show, int [n]: a row for each of the first classes."""
    rows = [
        np.flatnonzero(classes == label)[:GRID_COLUMNS]
        for label in range(min(num_classes, GRID_ROWS))
    ]
    # A short row would move the classes below it out of their rows.
    full = [row for row in rows if len(row) == GRID_COLUMNS] or [np.arange(len(classes))]
    return np.concatenate(full)[: GRID_ROWS * GRID_COLUMNS]


def relay_picture(
    stages: Sequence[Stage],
    images: dict[str, np.ndarray],
    seeds: np.ndarray,
    classes: np.ndarray,
) -> np.ndarray:
    """Each stage, and each hand-off, as a panel of samples.

    images: by stage name, float32 [n, h, w, c]; seeds, classes: int
    [n]. A row for each of the first classes, a column for each
    sample. Returns uint8 [H, W, 3].
    """
    last = stages[-1]
    rows = _rows_by_class(classes, last.num_classes)
    height = last.image_shape[0]
    side = min(height * 3, 96) if height <= 64 else height
    pictures = []
    for before, stage in zip([None, *stages[:-1]], stages, strict=True):
        # A relay stage on its own, as training has it, has no image
        # to start from here.
        if before is not None and stage.starts_from_images:
            # Where a noisy state is handed over, its picture
            # stands for it: the noise here is drawn anew, of
            # the same strength.
            given = seeds[rows], images[before.name][rows]
            condition = condition_of(stage, *given)
            if condition is None:
                start, caption = initial_state(stage.alone, *given), f"hand-off to {stage.name}"
            else:
                start, caption = condition.image, f"condition of {stage.name}"
            if stage.handoff == "noise":
                caption += ", noise redrawn"
            pictures.append((caption, grid(np.asarray(start), GRID_COLUMNS, side)))
        caption = f"{stage.name}, {size_text(stage.resolution)} px"
        pictures.append((caption, grid(images[stage.name][rows], GRID_COLUMNS, side)))
    return panels(pictures)


def loss_curves(runs: Sequence[tuple[str, Path]], path: Path) -> None:
    """Loss over images seen, one panel per stage, from their metrics.jsonl, to a PNG.

    runs: (stage name, file), which may be missing or end in half a
    line. Raises StorageError.
    """
    figure = style.make_figure(5.5 * len(runs), 4, dpi=100)
    for number, (name, metrics) in enumerate(runs):
        # Lines without a loss report skipped steps.
        lines = [line for line in read_curve(metrics) if line.get("loss") is not None]
        images, losses = (
            [line["images"] for line in lines],
            [line["loss"] for line in lines],
        )
        axes = figure.add_subplot(1, len(runs), number + 1)
        axes.plot(images, losses, linewidth=1.5)
        axes.set(title=f"stage {name}", xlabel="images seen", ylabel="training loss")
        style.power_axis(axes)
        axes.grid(alpha=0.3, which="both")
    style.save(figure, path)


def plot_grid(inputs: Inputs) -> None:
    """grid.png and grid.json."""
    seeds = inputs.seeds(SEEDS)
    classes = inputs.classes(seeds)
    images = inputs.samples(seeds, classes)
    picture = relay_picture(inputs.stages, images, np.asarray(seeds), classes)
    write_png(inputs.out / "grid.png", picture)
    inputs.write("grid", {"seeds": seeds, "classes": classes})


def plot_curves(inputs: Inputs) -> None:
    """curves.png and curves.json."""
    loss_curves(inputs.logs, inputs.out / "curves.png")
    curves = {
        name: [
            {key: line[key] for key in ("images", "loss") if key in line}
            for line in read_curve(path)
        ]
        for name, path in inputs.logs
    }
    inputs.write("curves", curves)


GRID = Picture(plot_grid, ("all checkpoints",))
CURVES = Picture(plot_curves, ("a log",))

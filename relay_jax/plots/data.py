"""The picture `data`: real images as the networks get them, a row for each class with its name.

To be looked at before a training: labels that belong to other
images, classes that are splits, crops that cut the subject off and
pictures that lie on a side are seen at once, and in no number.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from relay_jax.data.description import Description, describe
from relay_jax.data.loader import read
from relay_jax.data.source import Source, draw, draw_balanced
from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.resolution import size_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

ROWS, COLUMNS = 12, 10


@dataclass(frozen=True, kw_only=True)
class Row:
    """Images of one class. name: with its number, '' without labels; positions: in the source."""

    name: str
    positions: list[int]


def shown_classes(num_classes: int, rows: int) -> list[int]:
    """Numbers of the classes that have a row: all, or some from the first to the last."""
    return (
        np.unique(np.linspace(0, num_classes - 1, min(num_classes, rows)).round())
        .astype(int)
        .tolist()
    )


def choose(source: Source, seed: int, rows: int = ROWS, columns: int = COLUMNS) -> list[Row]:
    """Which images are shown, drawn by the seed; of each class, if there are any.

    Raises DataError for an image that cannot be read.
    """
    if not source.num_classes:
        positions = draw(len(source), rows * columns, seed).tolist()
        parts = [positions[start : start + columns] for start in range(0, len(positions), columns)]
        return [Row(name="", positions=part) for part in parts]
    labels = source.known_labels()
    if labels is None:
        # Labels that are stored with the images: as many are read as
        # fill the rows if all classes come equally often.
        order = draw(len(source), rows * columns, seed)
        members = read(source, order.tolist(), source.resolution or 8)[1]
        classes = np.unique(members)[:rows].tolist()
    else:
        order = draw_balanced(source, len(source), seed)
        members, classes = labels[order], shown_classes(source.num_classes, rows)
    names = source.class_names or tuple(map(str, range(source.num_classes)))
    chosen = {number: order[members == number][:columns].tolist() for number in classes}
    # A class of a list of labels may have no image.
    return [
        Row(name=f"{number} {names[number]}", positions=positions)
        for number, positions in chosen.items()
        if positions
    ]


def data_figure(rows: list[Row], images: list[np.ndarray], title: str) -> "Figure":
    """A row for each class. images: for each of the rows, uint8 [n, h, w, 3]."""
    columns = max(len(row.positions) for row in rows)
    named = any(row.name for row in rows)
    height = 0.95 * style.aspect(images[0][0]) + (0.25 if named else 0)
    figure = style.make_figure(max(0.95 * columns, 4.0), height * len(rows) + 0.9, title)
    grid = figure.add_gridspec(len(rows), columns, wspace=0.04, hspace=0.04)
    for n, (row, pictures) in enumerate(zip(rows, images, strict=True)):
        for k, picture in enumerate(pictures):
            axes = figure.add_subplot(grid[n, k])
            style.show(axes, picture)
            if k == 0 and row.name:
                # A name is text, whatever dollars it holds:
                # matplotlib would set it as a formula.
                axes.set_title(row.name[:60], fontsize="small", loc="left", parse_math=False)
    return figure


def plot_data(inputs: Inputs) -> None:
    """data.png and data.json: the images, and the description of their set."""
    settings, source = inputs.settings, inputs.source
    description: Description = describe(
        source, settings.dataset.keys, settings.resolutions, settings.seed
    ).show()
    largest = settings.resolutions[-1]
    rows = choose(source.at(largest), settings.seed)
    images = [read(source, row.positions, largest)[0] for row in rows]
    title = f"{len(source):,} real images at {size_text(largest)} px"
    style.save(data_figure(rows, images, title), inputs.out / "data.png")
    shown = {row.name or str(n): row.positions for n, row in enumerate(rows)}
    inputs.write("data", description.plain() | {"shown": shown})


PICTURE = Picture(plot_data, ("real images",))

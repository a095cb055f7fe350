"""What the page of a finished run shows, made at the end of its training from what is loaded.

WORKDIR/samples/stage-STAGE.png, real.png   grids without writing, a column for each class
WORKDIR/samples/grids.json                  the classes of the samples and of the real images
WORKDIR/plots/                              some pictures of --mode=plot, with their numbers
"""

from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
from absl import logging

from relay_jax.config import Settings
from relay_jax.data.images import to_float
from relay_jax.data.loader import read
from relay_jax.data.source import Source, draw
from relay_jax.errors import DataError
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.plots import animation, handoff, neighbours, snr
from relay_jax.plots.grids import grid
from relay_jax.plots.inputs import Inputs, Picture, PlotSettings, lacking
from relay_jax.runtime import distributed
from relay_jax.runtime.files import write_json, write_png
from relay_jax.runtime.sharding import make_mesh, place, to_host
from relay_jax.sampling.chain import Chain
from relay_jax.stage import Stage

ROWS, COLUMNS, SIDE = 4, 8, 64  # of a grid; least pixels of an image in it
GRIDS = "grids.json"  # beside them: the classes of their images
LOOKED_AT = 8  # real images for each that is shown, where labels are known of read ones alone
PICTURES: Mapping[str, Picture] = {
    "snr": snr.PICTURE,
    "handoff": handoff.PICTURE,
    "neighbours": neighbours.PICTURE,
    "animation": animation.PICTURE,
}


def write_grid(path: Path, images: np.ndarray) -> None:
    """Images float32 [n, h, w, c] or uint8 as a grid of COLUMNS, without writing."""
    floats = to_float(images) if images.dtype == np.uint8 else images
    write_png(path, grid(floats[: ROWS * COLUMNS], COLUMNS, SIDE))


def in_columns(classes: np.ndarray, num_classes: int) -> np.ndarray:
    """Which of some images a grid shows, int [n]: a column for each of the first classes."""
    columns = [
        np.flatnonzero(classes == label)[:ROWS] for label in range(min(num_classes, COLUMNS))
    ]
    if len(columns) == COLUMNS and all(len(column) == ROWS for column in columns):
        return np.stack(columns, axis=1).reshape(-1)
    return np.arange(min(len(classes), ROWS * COLUMNS))


def write_grids(
    settings: Settings,
    source: Source,
    images: Mapping[str, np.ndarray],
    classes: np.ndarray,
    workdir: Path,
) -> None:
    """Samples of every stage, and as many real images of the same classes.

    images: by stage name, float32 [n, h, w, c]; classes: int [n].
    Raises DataError and StorageError.
    """
    last = settings.stages[-1]
    shown = in_columns(classes, last.num_classes)
    for name, samples in images.items():
        write_grid(workdir / "samples" / f"stage-{name}.png", samples[shown])
    wanted = classes[shown] if last.num_classes else np.zeros(len(shown), int)
    positions = real_positions(source, wanted, last, settings.seed)
    real, labels = read(source, positions, last.resolution)
    write_grid(workdir / "samples" / "real.png", real)
    grids = {"samples": wanted.tolist(), "real": labels.tolist()} if last.num_classes else {}
    write_json(workdir / "samples" / GRIDS, grids)


def real_positions(source: Source, wanted: np.ndarray, last: Stage, seed: int) -> list[int]:
    """Positions of as many images, of these classes in this order where the set has them.

    wanted: int [n]. Fewer than n for a smaller set.
    """
    order = draw(len(source), len(source), seed)
    if not last.num_classes:
        return order[: len(wanted)].tolist()
    labels = source.known_labels()
    if labels is None:
        # They are stored with the images: some are read for them.
        order = order[: LOOKED_AT * len(wanted)]
        members = read(source, order.tolist(), last.resolution)[1]
    else:
        members = labels[order]
    waiting = {label: iter(order[members == label].tolist()) for label in set(wanted.tolist())}
    chosen = [next(waiting[label], None) for label in wanted.tolist()]
    others = (position for position in order.tolist() if position not in chosen)
    filled = (next(others, None) if position is None else position for position in chosen)
    return [position for position in filled if position is not None]


def plot_finished(
    settings: Settings,
    source: Source,
    chain: Chain,
    extractor: FeatureExtractor,
    workdir: Path,
) -> None:
    """The pictures of PICTURES that can be plotted, in WORKDIR/plots.

    chain: all stages with their weights. All processes must call it:
    process 0 plots, on its own devices, and the others wait. Raises
    StorageError.
    """
    if distributed.joined():
        chain = _on_own_devices(chain, settings.stages)
    with distributed.agree():
        if distributed.is_first():
            inputs = Inputs(
                settings=settings,
                folders={stage.name: workdir / stage.name for stage in settings.stages},
                request=PlotSettings(seeds=range(64)),
                out=workdir / "plots",
                opened=source,
                chain=chain,
                extractor=extractor,
            )
            _plot_all(inputs)


def _on_own_devices(chain: Chain, stages: Sequence[Stage]) -> Chain:
    """The same relay on the devices of process 0 alone. All processes must call it."""
    # The weights may be split over all hosts: gathered by all, kept by one.
    params = {name: jax.tree.map(to_host, tree) for name, tree in chain.params.items()}
    if not distributed.is_first():
        return chain
    mesh = make_mesh(devices=chain.mesh.local_devices)
    batch = chain.batch * mesh.size // chain.mesh.size
    own = Chain(stages, {name: place(tree, mesh) for name, tree in params.items()}, mesh, batch)
    own.notes = dict(chain.notes)
    return own


def _plot_all(inputs: Inputs) -> None:
    # The film is mostly a compilation, which needs one core; the
    # others are mostly NumPy and matplotlib, which need another.
    with ThreadPoolExecutor(1) as beside:
        waiting = beside.submit(_plot, inputs, ["animation"])
        _plot(inputs, [name for name in PICTURES if name != "animation"])
        waiting.result()


def _plot(inputs: Inputs, names: Sequence[str]) -> None:
    for name in names:
        # The report is written: what
        # cannot be shown must not end it.
        try:
            why = lacking(inputs, PICTURES[name])
            if not why:
                PICTURES[name].plot(inputs)
        except (DataError, ValueError) as error:
            why = str(error)
        if why:
            logging.info("not plotted: %s (%s)", name, why)

"""--mode=plot: pictures of the data, the schedules and a trained relay, each with its numbers
beside it as JSON.

A new picture is one file with a `Picture`
(inputs.py), and one line in PLOTS.
"""

from collections.abc import Mapping
from pathlib import Path

import jax
from absl import logging

from relay_jax.config import Settings
from relay_jax.errors import UserError
from relay_jax.plots import animation, data, filmstrip, grids, handoff, loss, neighbours, snr
from relay_jax.plots.inputs import Inputs, Picture, PlotSettings, lacking

# In the order in which they are plotted: those of the data first,
# which need no run.
PLOTS: dict[str, Picture] = {
    "data": data.PICTURE,
    "snr": snr.PICTURE,
    "handoff": handoff.PICTURE,
    "loss": loss.PICTURE,
    "filmstrip": filmstrip.PICTURE,
    "animation": animation.PICTURE,
    "neighbours": neighbours.PICTURE,
    "grid": grids.GRID,
    "curves": grids.CURVES,
}


def plot(
    settings: Settings,
    folders: Mapping[str, Path],
    request: PlotSettings,
    out: Path,
) -> None:
    """Plots the pictures that are asked for into `out`, or all that can be plotted.

    folders: of each stage that may have checkpoints and a log.
    Raises UserError for an unknown name, for a named picture that
    cannot be plotted, and where none can.
    """
    if jax.process_count() > 1:
        raise UserError("--mode=plot runs in one process; start it on one host")
    for name in request.names:
        if name not in PLOTS:
            raise UserError(f"unknown plot {name!r}; there are {', '.join(PLOTS)}")
    # One image has no other to be compared with.
    if request.images < 0 or request.images == 1:
        raise UserError(
            f"--plot_images must be at least 2, or 0 for the default, not {request.images}"
        )
    inputs = Inputs(settings=settings, folders=folders, request=request, out=out)
    # All reasons before the first picture: a command that cannot
    # do what it was asked for ends at once, and not after
    # minutes of sampling.
    reasons = {name: lacking(inputs, PLOTS[name]) for name in request.names or PLOTS}
    for name, why in reasons.items():
        if why and (request.names or all(reasons.values())):
            raise UserError(f"cannot plot {name}: {why}")
        if why:
            logging.info("not plotted: %s (%s)", name, why)
    possible = [name for name, why in reasons.items() if not why]
    for number, name in enumerate(possible):
        PLOTS[name].plot(inputs)
        path = out / f"{name}.{PLOTS[name].ending}"
        logging.info("picture %d of %d: %s", number + 1, len(possible), path)

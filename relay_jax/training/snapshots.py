"""Snapshots of power-function averages while a stage trains, and any width from them afterwards.

STAGE/snapshots/checkpoints/STEP        the averages of train.ema with a relative width, for ever
STAGE/averages/WIDTH/checkpoints/STEP   one that `reconstruct` has made (--mode=average)

Both are checkpoints with notes and checksums, without the rest of a
training. Source: Karras et al. 2024, arXiv 2312.02696, section 3;
the maths is in models/averages.py.
"""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from relay_jax.errors import UserError
from relay_jax.models.averages import (
    Profile,
    combination,
    is_width,
    item_of,
    name_of,
    parse_name,
)
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import Checkpoints, checkpoints_of
from relay_jax.runtime.checksums import damage, open_array
from relay_jax.runtime.checksums import name_of as array_name
from relay_jax.runtime.files import read_json
from relay_jax.runtime.single import write_checkpoint
from relay_jax.stage import Stage, TrainSettings

SNAPSHOTS, AVERAGES = "snapshots", "averages"
# Beyond it the images may differ visibly
# from those of the width that was asked for.
LARGE_ERROR = 0.05


class Snapshots:
    """Writes the snapshots of a training; to be used as a context. Without widths it does nothing.

    folder: of the stage; every: whether a step is at an interval.
    All processes must call every method.
    """

    def __init__(self, folder: Path, train: TrainSettings, every: Callable[[int], bool]) -> None:
        self._names = [name_of(value) for value in train.ema if is_width(value)]
        self._every, self._last = every, train.steps
        self._saved: Checkpoints | None = None
        if self._names:
            place = folder / SNAPSHOTS / "checkpoints"
            self._saved = Checkpoints(place, keep_always=lambda step: True)

    def __enter__(self) -> "Snapshots":
        return self

    def __exit__(self, *error: object) -> None:
        if self._saved is not None:
            self._saved.__exit__(*error)

    def begin(self, step: int) -> None:
        """Removes what lies beyond the step that a training begins at: it will come there again."""
        # They may be of a training that has diverged, or of other
        # devices, and the averages of one training go together.
        if self._saved is not None:
            self._saved.remove(lambda saved: saved > step)

    def due(self, step: int) -> bool:
        """Whether a snapshot is taken after a step."""
        return self._saved is not None and (self._every(step) or step == self._last)

    def save(
        self, step: int, averages: dict[str, dict], notes: dict, checkpoints: Checkpoints
    ) -> None:
        """Saves a snapshot, if one is due; it is complete when this returns.

        checkpoints: those that the training would go on from. Raises
        StorageError.
        """
        if self._saved is None or not self.due(step):
            return
        # Not in the background, for two reasons: Orbax confuses two
        # saves at the same time, and a checkpoint must not be there
        # before an earlier snapshot.
        checkpoints.wait()
        items = {item_of(name): averages[name] for name in self._names}
        kept = {key: notes[key] for key in ("images", "network", "dataset")}
        self._saved.save(step, None, None, kept, **items)
        self._saved.wait()


def with_averages(folder: Path) -> list[Path]:
    """The folder of a stage, and those of its snapshots and averages, which are alike."""
    return [folder, *sorted(folder.glob(SNAPSHOTS)), *sorted(folder.glob(f"{AVERAGES}/*"))]


def reconstruct_all(stages: Sequence[Stage], folders: Mapping[str, Path], text: str) -> None:
    """--mode=average: prints a line for each stage. folders: by name; of one checkpoint: its step.

    Raises UserError.
    """
    if distributed.joined():
        raise UserError("--mode=average runs in one process; start it on one host")
    for stage in stages:
        place, step = checkpoints_of(folders[stage.name])
        print(reconstruct(stage, place.parent, text, step), flush=True)


def reconstruct(stage: Stage, folder: Path, text: str, only: int | None = None) -> str:
    """Makes the average of a relative width from the snapshots of a stage; a line about it.

    folder: of the stage; it goes to folder/averages/WIDTH. text: the
    width, as people write it. only: the step at which it is wanted,
    by default that of the newest snapshot. Array after array, in
    float64 on the host: it takes the memory of less than three copies
    of the parameters. Raises UserError where it cannot be made.
    """
    try:
        name = parse_name(text)
    except ValueError as error:
        raise UserError(str(error)) from error
    if not name or not is_width(float(name)):
        raise UserError(f"--ema={text}: name a relative width, such as 0.08, to be made")
    place = folder / SNAPSHOTS / "checkpoints"
    whole = _whole_snapshots(place)
    if not whole:
        raise UserError(
            f"stage {stage.name} has no snapshots in {folder / SNAPSHOTS}; they are taken while a "
            "stage trains with relative widths in train.ema, such as (0.05, 0.1)"
        )
    # The newest of all, also if it is damaged: an average of an earlier
    # step must be asked for.
    newest = max(int(path.name) for path in place.glob("*") if path.name.isdecimal())
    step = newest if only is None else only
    if step not in whole:
        present = ", ".join(map(str, sorted(whole, reverse=True)))
        raise UserError(f"no whole snapshot of step {step} in {place}; there are {present}"[:390])
    kept = [
        (Profile(number, float(item.removeprefix("ema_"))), place / str(number) / item)
        for number in sorted(whole)
        if number <= step
        for item in whole[number]
    ]
    weights, distance = combination([profile for profile, _ in kept], Profile(step, float(name)))
    items, cpu = [item for _, item in kept], jax.devices("cpu")[0]
    params = jax.tree.map_with_path(
        lambda path, leaf: jax.device_put(
            _weighted_sum(items, weights, array_name(path), leaf), cpu
        ),
        stage.shapes(),
    )
    steps = sorted({profile.step for profile, _ in kept})
    about = {"width": float(name), "error": distance, "snapshots": steps}
    notes = read_json(place / str(step) / "meta" / "metadata") | {"average": about}
    out = folder / AVERAGES / name
    write_checkpoint(out / "checkpoints", step, params, notes)
    if distance > LARGE_ERROR:
        logging.warning(
            "stage %s: the snapshots are too few for width %s: its profile is met to %.0f%%; see "
            "checkpoint.snapshot_every_images and train.ema",
            stage.name,
            name,
            100 * (1 - distance),
        )
    return (
        f"stage {stage.name}: average {name} of step {step} from {len(kept)} kept ones, error of "
        f"the profile {distance:.2g}, in {out}"
    )


def _whole_snapshots(place: Path) -> dict[int, list[str]]:
    """The items of every snapshot that is what was saved, by step; damaged ones are named."""
    whole = {}
    for folder in sorted(place.glob("*")):
        if not folder.name.isdecimal():
            continue
        reason = damage(folder)
        if reason:
            logging.warning("snapshot %s is damaged and left out: %s", folder, reason)
            continue
        whole[int(folder.name)] = sorted(path.name for path in folder.glob("ema_*"))
    return whole


def _weighted_sum(items: list[Path], weights: np.ndarray, name: str, shape: Any) -> np.ndarray:
    """sum_i weights[i] * array `name` of item i, added up in float64, as float32."""
    total = np.zeros(shape.shape)
    for item, weight in zip(items, weights, strict=True):
        array = open_array(item, name)
        if tuple(array.shape) != shape.shape:
            raise UserError(
                f"{item}: {name} has shape {list(array.shape)}, and {list(shape.shape)} in the "
                "configuration"
            )
        total += weight * np.asarray(array.read().result(), np.float64)
    return total.astype(np.float32)

"""Orbax checkpoints of one stage: items `ema`, `train` (the rest of the state) and `meta` (JSON).

`ema` is an item of its own, and so is `ema_NAME`, each further average
of the weights, so that sampling reads nothing else. Orbax
does not fall back from a damaged checkpoint by itself, and notices
little of the damage; `restore` compares checksums (checksums.py), and
takes the newest that is whole. With several processes each writes and
reads its own parts in a folder that all of them share; every method
must then be called by all.
"""

import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from logging import CRITICAL, getLogger
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh

from relay_jax.errors import StorageError, UserError, one_line
from relay_jax.runtime import distributed
from relay_jax.runtime.checksums import FOLDER, Checksums, SaveChecksums, damage, describe
from relay_jax.runtime.files import storage_reason
from relay_jax.runtime.sharding import state_shardings

UNCHECKED = "written without checksums by an earlier version: cannot be checked"
# Folders whose checkpoints were said
# to have no checksums: once is enough.
_without_checksums: set[Path] = set()


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        tree,
        shardings,
    )


@contextmanager
def quiet(level: int = logging.ERROR) -> Iterator[None]:
    """Within it absl logs errors alone, or what is worse than they."""
    before = logging.get_verbosity()
    logging.set_verbosity(level)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _unraisable(event: Any) -> None:
    """Says nothing of reads of TensorStore that end after another one has failed."""
    if not re.search("Event loop is closed|reading array index", str(event.exc_value)):
        sys.__unraisablehook__(event)


@contextmanager
def _reading() -> Iterator[None]:
    """Around what Orbax reads: damage is said once, in one line, by who catches it."""
    if sys.unraisablehook is sys.__unraisablehook__:
        # Stays: the other reads end later, in threads of their own, and
        # asyncio complains of each.
        sys.unraisablehook = _unraisable
        getLogger("asyncio").setLevel(CRITICAL)
    with quiet(logging.FATAL):
        yield


class _Chosen(ocp.checkpoint_managers.PreservationPolicy):
    """Keeps the steps that a rule names."""

    def __init__(self, rule: Callable[[int], bool]) -> None:
        self._rule = rule

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> Sequence[bool]:
        return [self._rule(checkpoint.step) for checkpoint in checkpoints]


class Checkpoints:
    """The checkpoints in one folder; to be used as a context, whose end waits for the last save.

    keep: how many of the newest stay. keep_always: whether that of a
    step stays for ever.
    """

    def __init__(
        self,
        folder: Path,
        keep: int = 2,
        read_only: bool = False,
        keep_always: Callable[[int], bool] = lambda step: False,
    ) -> None:
        self.folder = folder.absolute()
        policies = ocp.checkpoint_managers
        policy = policies.AnyPreservationPolicy(
            [policies.LatestN(max(keep, 1)), _Chosen(keep_always)]
        )
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._handed_over: Future[None] | None = None
        self._manager: ocp.CheckpointManager | None = None
        if not self.folder.exists() and read_only:
            return
        with _reading():  # Orbax warns that what it was asked to read only is read only
            options = ocp.CheckpointManagerOptions(
                preservation_policy=policy,
                cleanup_tmp_directories=not read_only,
                create=not read_only,
                read_only=read_only,
            )
            self._manager = ocp.CheckpointManager(self.folder, options=options)

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._hand_over()
        finally:
            self._thread.shutdown()
            if self._manager is not None:
                with self._writing():
                    self._manager.close()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Turns what Orbax raises, also about saves begun before, into one line."""
        try:
            yield
        # Not the storage: another process has died.
        except jax.errors.JaxRuntimeError:
            raise
        # Of OSError, ValueError and others,
        # depending on where the disk became full.
        except Exception as error:
            raise StorageError(
                f"checkpoints cannot be written in {self.folder}: {storage_reason(error)}"
            ) from error

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, newest first, as process 0 sees them."""
        self._hand_over()
        steps = self._manager.all_steps() if self._manager is not None else []
        return distributed.of_first(sorted(steps, reverse=True))

    def save(self, step: int, ema: Any, train: Any, meta: dict, **averages: Any) -> None:
        """Starts saving; a step that is saved already is left alone.

        averages: further items. None in place of a tree: without that
        item. Raises StorageError, also for the save before.
        """
        assert self._manager is not None
        self._hand_over()
        if step in self._manager.all_steps():
            return
        items = {"ema": ema, "train": train, **averages}
        items = {name: tree for name, tree in items.items() if tree is not None}
        if distributed.joined():  # each process writes the parts that it has
            with self._writing():
                self._write(step, items, meta)
            return
        # What Orbax does before it writes in the background takes 0.2
        # ms for each array, some training steps in all. Here only the
        # copy to the host keeps the loop waiting: a copy, as the arrays
        # are donated to the next step.
        for leaf in jax.tree.leaves(items):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()  # all at once, before the first is waited for
        items = jax.tree.map(lambda x: np.array(x), items)
        self._handed_over = self._thread.submit(self._write, step, items, meta)

    def _write(self, step: int, items: dict[str, Any], meta: dict) -> None:
        assert self._manager is not None
        args = ocp.args
        # Before anything is written: of
        # the arrays as they are in memory.
        record = SaveChecksums(describe(items, meta))
        saves = {name: args.StandardSave(tree) for name, tree in items.items()}
        composite = args.Composite(**saves, meta=args.JsonSave(meta), **{FOLDER: record})
        self._manager.save(step, force=True, args=composite)

    def _hand_over(self) -> None:
        """Waits until Orbax has the last save in hand; raises what went wrong in it."""
        waiting, self._handed_over = self._handed_over, None
        if waiting is not None:
            with self._writing():
                waiting.result()

    def remove(self, chosen: Callable[[int], bool]) -> None:
        """Removes the checkpoints of the chosen steps."""
        assert self._manager is not None
        for step in filter(chosen, self.steps()):
            self._manager.delete(step)

    def wait(self) -> None:
        """Returns when the last save is complete. Raises StorageError."""
        self._hand_over()
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def is_whole(self, step: int) -> bool:
        """Whether a checkpoint is what was saved, as process 0 sees its files.

        Reads all of its arrays, once in a process; of a checkpoint
        without checksums notes and indices alone.
        """
        folder = self.folder / str(step)
        return distributed.of_first(distributed.is_first() and not damage(folder))

    def restore(
        self,
        like: dict[str, Any],
        shardings: dict[str, Any],
        only: int | None = None,
        notes: Mapping[str, tuple[type, ...]] | None = None,
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint: (step, {item: tree, "meta": dict}), or None if there
        is none at all.

        like, shardings: for each item to read ("ema", "train") a tree
        of shapes, and where the arrays go. notes: types of keys that
        `meta` must have. only: this step and no other. Otherwise
        unreadable newer ones are named in a warning and removed, if
        `train` is read, so that the run can save them again. Raises
        UserError if there are checkpoints and none can be read, or if
        `only` is missing or unreadable.
        """
        damaged: list[int] = []
        steps = self.steps()
        if only is not None and only not in steps:
            raise UserError(f"no checkpoint {only} in {self.folder}; there are {steps or 'none'}")
        for step in steps if only is None else [only]:
            result, reason = self._read(step, like, shardings, notes or {})
            if reason and only is not None:
                raise UserError(
                    f"checkpoint {self.folder}/{only} cannot be read; there are {steps}; the "
                    f"reason: {reason}"
                )
            if reason:
                logging.warning(
                    "checkpoint %s/%d is unreadable, trying the one before: %s",
                    self.folder,
                    step,
                    reason,
                )
                damaged.append(step)
                continue
            # A run that continues comes to these steps again, and Orbax
            # saves no step twice.
            if "train" in like:
                assert self._manager is not None
                for newer in damaged:
                    self._manager.delete(newer)
            return step, {k: result[k] for k in (*like, "meta")}
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read (tried {damaged}), the "
                f"last because: {reason}"
            )
        return None

    def _read(
        self,
        step: int,
        like: dict[str, Any],
        shardings: dict[str, Any],
        notes: Mapping[str, tuple[type, ...]],
    ) -> tuple[dict[str, Any], str]:
        """The items of a checkpoint, and why they cannot be used: '' where they can, on all."""
        assert self._manager is not None
        folder, args = self.folder / str(step), ocp.args
        result: dict[str, Any] = {}
        checksums, reason = None, ""
        # Whatever is wrong, this process still takes part in Orbax's
        # restore, where others may wait for it.
        try:
            checksums = Checksums.read(folder)
        except Exception as error:
            reason = f"its checksums: {one_line(error)}"
        try:
            items = {k: args.StandardRestore(_abstract(like[k], shardings[k])) for k in like}
            composite = args.Composite(**items, meta=args.JsonRestore())
            with _reading():
                result = dict(self._manager.restore(step, args=composite).items())
            if not isinstance(result["meta"], dict):
                raise ValueError("the notes (meta) are no JSON object")
            for key, kinds in notes.items():
                if not isinstance(result["meta"].get(key), kinds):
                    raise ValueError(f"the notes (meta) lack {key}")
        # Orbax raises many types, even bare Exception.
        except Exception as error:
            reason = reason or one_line(error)
        try:
            if checksums is not None and not reason:
                checksums.check_meta(result["meta"])
                for item in like:
                    checksums.check(item, result[item])
        except Exception as error:
            reason = one_line(error)
        # A damaged part is seen by the process that reads it alone, and
        # all must go on with the same checkpoint.
        reason = next((text for text in distributed.tell(reason) if text), "")
        if checksums is None and not reason and self.folder not in _without_checksums:
            _without_checksums.add(self.folder)
            logging.warning("%s was %s", folder, UNCHECKED)
        return result, reason


def verify(folder: Path) -> dict[int, str]:
    """Every checkpoint of a stage's folder, newest first, and what is wrong with it, '' if nothing.

    A checkpoint of an earlier version says that it cannot be checked.
    """
    place, named = checkpoints_of(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    reasons = {step: damage(place / str(step)) for step in steps if named in (None, step)}
    for step, reason in reasons.items():
        if not reason and not (place / str(step) / FOLDER).exists():
            reasons[step] = UNCHECKED
    return reasons


def verify_all(folders: Sequence[Path]) -> None:
    """Prints what `verify` says of each folder. Raises UserError if a checkpoint is damaged."""
    count, damaged = 0, []
    for folder in folders:
        place, _ = checkpoints_of(folder)
        reasons = verify(folder)
        if not reasons:
            print(f"{place}: no checkpoint")
        for step, reason in reasons.items():
            print(f"{place}/{step}: {reason or 'whole'}")
            count += 1
            if reason and reason != UNCHECKED:
                damaged.append(f"{place}/{step}")
    if not count:
        raise UserError(f"no checkpoint in {', '.join(map(str, folders))}"[:300])
    if damaged:
        raise UserError(
            f"{len(damaged)} of {count} checkpoints are damaged, the first {damaged[0]}; remove "
            "them, or start the training again: it goes on from the newest whole one"
        )


def checkpoints_of(folder: Path) -> tuple[Path, int | None]:
    """The folder of all checkpoints, and the step if `folder` is one of them.

    folder: of a stage, or of one of its checkpoints.
    """
    is_step = folder.parent.name == "checkpoints" and folder.name.isdecimal()
    if is_step and not (folder / "checkpoints").exists():
        return folder.parent, int(folder.name)
    return folder / "checkpoints", None


def has_checkpoint(folder: Path) -> bool:
    """Whether `load_ema` finds something to read."""
    place, named = checkpoints_of(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    return bool(steps) if named is None else named in steps


def load_ema(folder: Path, shapes: Any, mesh: Mesh, item: str = "ema") -> tuple[dict, dict]:
    """Averaged parameters on the devices, and the notes of their checkpoint.

    folder: of a stage, whose newest readable checkpoint is meant, or
    one of its checkpoints, STAGE/checkpoints/STEP. shapes: of the
    network's parameters (Stage.shapes). item: of which average. The
    notes have "step" and "images" (None for converted weights).
    Raises UserError if there is none, if none fits the network, or if
    the named one is missing or unreadable.
    """
    place, named = checkpoints_of(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        restored = checkpoints.restore({item: shapes}, {item: state_shardings(shapes, mesh)}, named)
    if restored is None:
        raise UserError(f"no checkpoint in {folder}; train this stage first, or name its weights")
    step, items = restored
    return items[item], {"images": None, **items["meta"], "step": step}


def read_meta(folder: Path) -> dict[str, Any]:
    """The notes of the newest readable checkpoint of a folder as in `load_ema`, {} without one.

    "network" among them is the description
    of the network (models.network.describe).
    """
    place, named = checkpoints_of(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        restored = checkpoints.restore({}, {}, named)
    return restored[1]["meta"] if restored else {}

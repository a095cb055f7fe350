"""Orbax checkpoints of one stage: items `ema`, `train` (the rest of the state) and `meta` (JSON).

`ema` is an item of its own, so that sampling reads nothing else. Orbax
does not fall back from a damaged checkpoint by itself; `restore` does,
newest first. With several processes each writes and reads its own parts
in a folder that all of them share; every method must then be called by
all.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from absl import logging
from jax.sharding import Mesh

from relay_jax.errors import StorageError, UserError, one_line
from relay_jax.runtime import distributed
from relay_jax.runtime.sharding import state_shardings


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
        tree,
        shardings,
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Within it absl logs errors alone."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


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
        with quiet():  # Orbax warns that what it was asked to read only is read only
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
        # Of OSError, ValueError and others, depending on where the disk
        # became full.
        except Exception as error:
            raise StorageError(
                f"checkpoints cannot be written in {self.folder}: {one_line(error)}"
            ) from error

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, newest first, as process 0 sees them."""
        self._hand_over()
        steps = self._manager.all_steps() if self._manager is not None else []
        return distributed.of_first(sorted(steps, reverse=True))

    def save(self, step: int, ema: Any, train: Any, meta: dict) -> None:
        """Starts saving; a step that is saved already is left alone.

        Raises StorageError, also for the save before.
        """
        assert self._manager is not None
        self._hand_over()
        if step in self._manager.all_steps():
            return
        if distributed.joined():  # each process writes the parts that it has
            with self._writing():
                self._write(step, ema, train, meta)
            return
        # What Orbax does before it writes in the background takes 0.2 ms
        # for each array, some training steps in all. Here only the copy
        # to the host keeps the loop waiting: a copy, as the arrays are
        # donated to the next step.
        for leaf in jax.tree.leaves((ema, train)):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()  # all at once, before the first is waited for
        ema, train = jax.tree.map(lambda x: np.array(x), (ema, train))
        self._handed_over = self._thread.submit(self._write, step, ema, train, meta)

    def _write(self, step: int, ema: Any, train: Any, meta: dict) -> None:
        assert self._manager is not None
        args = ocp.args
        self._manager.save(
            step,
            force=True,
            args=args.Composite(
                ema=args.StandardSave(ema),
                train=args.StandardSave(train),
                meta=args.JsonSave(meta),
            ),
        )

    def _hand_over(self) -> None:
        """Waits until Orbax has the last save in hand; raises what went wrong in it."""
        waiting, self._handed_over = self._handed_over, None
        if waiting is not None:
            with self._writing():
                waiting.result()

    def wait(self) -> None:
        """Returns when the last save is complete. Raises StorageError."""
        self._hand_over()
        if self._manager is not None:
            with self._writing():
                self._manager.wait_until_finished()

    def looks_whole(self, step: int) -> bool:
        """Whether the notes and indices of a checkpoint can be read, as process 0 sees them."""
        # The arrays are not read: it is asked at every start, of
        # checkpoints of many gigabytes.
        folder = self.folder / str(step)
        return distributed.of_first(jax.process_index() == 0 and _can_be_listed(folder))

    def restore(
        self, like: dict[str, Any], shardings: dict[str, Any], only: int | None = None
    ) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint: (step, {item: tree, "meta": dict}), or None if there
        is none at all.

        like, shardings: for each item to read ("ema", "train") a tree
        of shapes, and where the arrays go. only: this step and no
        other. Otherwise unreadable newer ones are named in a warning
        and removed, if `train` is read, so that the run can save them
        again. Raises UserError if there are checkpoints and none can be
        read, or if `only` is missing or unreadable.
        """
        damaged: list[int] = []
        steps = self.steps()
        if only is not None and only not in steps:
            raise UserError(f"no checkpoint {only} in {self.folder}; there are {steps or 'none'}")
        for step in steps if only is None else [only]:
            assert self._manager is not None
            result, reason = None, ""
            try:
                args = ocp.args
                items = {k: args.StandardRestore(_abstract(like[k], shardings[k])) for k in like}
                result = self._manager.restore(
                    step, args=args.Composite(**items, meta=args.JsonRestore())
                )
            # Orbax raises many types, even bare Exception.
            except Exception as error:
                reason = one_line(error)
            # A damaged part is seen by the process that reads it alone,
            # and all must go on with the same checkpoint.
            reason = next((text for text in distributed.tell(reason) if text), "")
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
            assert result is not None
            # A run that continues comes to these steps again, and Orbax
            # saves no step twice.
            if "train" in like:
                for newer in damaged:
                    self._manager.delete(newer)
            return step, {k: result[k] for k in (*like, "meta")}
        if damaged:
            raise UserError(
                f"none of the checkpoints in {self.folder} can be read (tried {damaged}), the "
                f"last because: {reason}"
            )
        return None


def _can_be_listed(folder: Path) -> bool:
    """Whether the notes of a checkpoint are JSON, and the index of each item names some arrays."""
    try:
        json.loads((folder / "meta" / "metadata").read_text())
        for item in ("ema", "train"):
            notes = folder / item / "_METADATA"
            if notes.exists():
                json.loads(notes.read_text())
            base = {"driver": "file", "path": f"{folder / item}/"}
            index = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            if not index.list().result():
                return False
    except (OSError, ValueError):
        return False
    return True


def _place(folder: Path) -> tuple[Path, int | None]:
    """The folder of all checkpoints, and the step if `folder` is one of them.

    folder: of a stage, or of one of its checkpoints.
    """
    is_step = folder.parent.name == "checkpoints" and folder.name.isdecimal()
    if is_step and not (folder / "checkpoints").exists():
        return folder.parent, int(folder.name)
    return folder / "checkpoints", None


def has_checkpoint(folder: Path) -> bool:
    """Whether `load_ema` finds something to read."""
    place, named = _place(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        steps = checkpoints.steps()
    return bool(steps) if named is None else named in steps


def load_ema(folder: Path, shapes: Any, mesh: Mesh) -> tuple[dict, dict]:
    """Averaged parameters on the devices, and the notes of their checkpoint.

    folder: of a stage, whose newest readable checkpoint is meant, or
    one of its checkpoints, STAGE/checkpoints/STEP. shapes: of the
    network's parameters (Stage.shapes). The notes have "step" and
    "images" (None for converted weights).
    Raises UserError if there is none, if none fits the network, or if
    the named one is missing or unreadable.
    """
    place, named = _place(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        restored = checkpoints.restore(
            {"ema": shapes}, {"ema": state_shardings(shapes, mesh)}, named
        )
    if restored is None:
        raise UserError(f"no checkpoint in {folder}; train this stage first, or name its weights")
    step, items = restored
    return items["ema"], {"images": None, **items["meta"], "step": step}


def read_meta(folder: Path) -> dict[str, Any]:
    """The notes of the newest readable checkpoint of a folder as in `load_ema`, {} without one.

    "network" among them is the description of the network
    (models.network.describe).
    """
    place, named = _place(folder)
    with Checkpoints(place, read_only=True) as checkpoints:
        restored = checkpoints.restore({}, {}, named)
    return restored[1]["meta"] if restored else {}

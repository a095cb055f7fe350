"""Orbax checkpoints of one stage: items `ema`, `train` (the rest of the state) and `meta` (JSON).

`ema` is an item of its own, so that sampling reads nothing else. Orbax does not fall back from a damaged
checkpoint by itself; `restore` does, newest first. With several processes each writes and reads its own parts in a
folder that all of them share; every method must then be called by all of them.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging
from jax.sharding import Mesh

from relay_jax import distributed
from relay_jax.models.unet import UNet, init_params
from relay_jax.sharding import state_shardings


class CheckpointError(RuntimeError):
    """A checkpoint is missing or cannot be read; the message is one line for the user."""


def _abstract(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s), tree, shardings)


class Checkpoints:
    """The checkpoints in one folder. Saving is asynchronous; use as a context, which waits at its end."""

    def __init__(self, folder: Path, keep: int = 2, read_only: bool = False) -> None:
        self.folder = folder.absolute()
        policy = ocp.checkpoint_managers.LatestN(max(keep, 1))
        options = ocp.CheckpointManagerOptions(preservation_policy=policy, cleanup_tmp_directories=not read_only,
                                               create=not read_only, read_only=read_only)
        exists = self.folder.exists() or not read_only
        self._manager = ocp.CheckpointManager(self.folder, options=options) if exists else None
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._handed_over: Future[None] | None = None

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._hand_over()
        finally:
            self._thread.shutdown()
            if self._manager is not None:
                self._manager.close()

    def steps(self) -> list[int]:
        """Steps with a complete checkpoint, newest first, as process 0 sees them."""
        self._hand_over()
        found = sorted(self._manager.all_steps(), reverse=True) if self._manager is not None else []
        return distributed.of_first(found)

    def save(self, step: int, ema: Any, train: Any, meta: dict) -> None:
        """Starts saving; a step that is already there is left alone."""
        assert self._manager is not None
        self._hand_over()
        if step in self._manager.all_steps():
            return
        if distributed.joined():    # each process writes the parts that it has
            self._write(step, ema, train, meta)
            return
        # What Orbax does before it writes in the background takes 0.2 ms for each array, some training steps in all.
        # Here only the copy to the host keeps the loop waiting: a copy, as the arrays are donated to the next step.
        for leaf in jax.tree.leaves((ema, train)):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()       # all at once, before the first is waited for
        ema, train = jax.tree.map(lambda x: np.array(x), (ema, train))
        self._handed_over = self._thread.submit(self._write, step, ema, train, meta)

    def _write(self, step: int, ema: Any, train: Any, meta: dict) -> None:
        assert self._manager is not None
        args = ocp.args
        self._manager.save(step, force=True, args=args.Composite(
            ema=args.StandardSave(ema), train=args.StandardSave(train), meta=args.JsonSave(meta)))

    def _hand_over(self) -> None:
        """Waits until Orbax has the last save in hand; raises what went wrong in it."""
        waiting, self._handed_over = self._handed_over, None
        if waiting is not None:
            waiting.result()

    def wait(self) -> None:
        self._hand_over()
        if self._manager is not None:
            self._manager.wait_until_finished()

    def restore(self, like: dict[str, Any], shardings: dict[str, Any]) -> tuple[int, dict[str, Any]] | None:
        """The newest readable checkpoint: (step, {item: tree, "meta": dict}), or None if there is none at all.

        like, shardings: for each wanted item ("ema", "train") a tree of shapes, and where the arrays go.
        Unreadable newer ones are named in a warning and removed, so that the run can save them again.
        Raises CheckpointError if there are checkpoints and none can be read.
        """
        failed: list[int] = []
        for step in self.steps():
            assert self._manager is not None
            result, reason = None, ""
            try:
                args = ocp.args
                items = {k: args.StandardRestore(_abstract(like[k], shardings[k])) for k in like}
                result = self._manager.restore(step, args=args.Composite(**items, meta=args.JsonRestore()))
            except Exception as error:      # Orbax raises many types, even bare Exception
                reason = " ".join(str(error).split())[:200] or type(error).__name__
            # A damaged part is seen by the process that reads it alone.
            reason = next((text for text in distributed.tell(reason) if text), "")
            if reason:
                logging.warning("checkpoint %s/%d is unreadable, trying the one before: %s", self.folder, step, reason)
                failed.append(step)
                continue
            assert result is not None
            if "train" in like:
                for bad in failed:
                    self._manager.delete(bad)
            return step, {k: result[k] for k in (*like, "meta")}
        if failed:
            raise CheckpointError(f"none of the checkpoints in {self.folder} can be read (tried {failed}), the "
                                  f"last because: {reason}")
        return None


def load_ema(folder: Path, network: UNet, mesh: Mesh) -> tuple[dict, dict]:
    """The averaged parameters in the newest checkpoint of a stage's folder, on the devices, and its notes.

    Raises CheckpointError if there is none, or none fits the network.
    """
    shapes = jax.eval_shape(partial(init_params, network), jax.random.key(0))
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        restored = checkpoints.restore({"ema": shapes}, {"ema": state_shardings(shapes, mesh)})
    if restored is None:
        raise CheckpointError(f"no checkpoint in {folder}; train this stage first, or name its weights")
    return restored[1]["ema"], restored[1]["meta"]

"""One checkpoint of averaged weights, written at once and with little memory.

For weights that were converted or made from others: there is no
training that goes on meanwhile (checkpoint.py), and a large network
may hardly fit.
"""

from pathlib import Path
from typing import Any

import jax
import orbax.checkpoint as ocp

from relay_jax.runtime.checksums import FOLDER, ChecksumHandler, SaveChecksums, describe
from relay_jax.runtime.files import cannot_write


def write_checkpoint(folder: Path, step: int, ema: Any, meta: dict) -> None:
    """folder/STEP with the items `ema` and `meta`, and their checksums; replaces one of that step.

    ema: a tree of arrays, of JAX ones a quarter is copied at a time.
    Raises StorageError.
    """
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(ema)]
    # Without a limit Orbax would copy all arrays at once.
    in_flight = max(*sizes, sum(sizes) // 4) / 1e9
    handlers = {
        "ema": ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight),
        "meta": ocp.JsonCheckpointHandler(),
        FOLDER: ChecksumHandler(),
    }
    items = {
        "ema": ocp.args.StandardSave(ema),
        "meta": ocp.args.JsonSave(meta),
        FOLDER: SaveChecksums(describe({"ema": ema}, meta)),
    }
    options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
    try:
        with ocp.CheckpointManager(
            folder.absolute(), options=options, item_handlers=handlers
        ) as manager:
            if step in manager.all_steps():
                manager.delete(step)
            manager.save(step, force=True, args=ocp.args.Composite(**items))
    # ValueError and RuntimeError are
    # TensorStore's, such as for a full disk.
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_write(folder, error) from error

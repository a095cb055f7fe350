"""Damage to the files of a checkpoint, and what a run makes of it: for the tests and for
benchmarks/endurance.py.

    from tests.damage import damage_checkpoint
    print(damage_checkpoint(Path("/tmp/damage"), count=1000, seed=0))
"""

import random
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging

from relay_jax.errors import UserError
from relay_jax.runtime.checkpoint import Checkpoints
from relay_jax.runtime.checksums import damage

META = {"images": 640, "data": {"next_batch": 10, "x_flip": True}, "seconds": 1.5}
STEPS = (10, 20)


def _items(step: int) -> dict[str, Any]:
    """Arrays of several sizes and types, compressible and not, as items of a checkpoint."""
    rng = np.random.default_rng(step)
    params = {
        "conv": {"kernel": rng.normal(size=(3, 3, 8, 16)).astype(np.float32)},
        "norm": {"scale": np.ones(16, np.float32), "bias": np.zeros(16, np.float32)},
    }
    train = {"params": params, "moments": [params, params], "step": np.int32(step)}
    return {"ema": jax.tree.map(lambda x: x + step, params), "train": train}


def change(content: bytes, rng: random.Random) -> bytes:
    """One bit flipped, a byte replaced, a stretch of zeros, or a part cut off."""
    place, kind = rng.randrange(len(content)), rng.choice(("bit", "bit", "byte", "zeros", "cut"))
    if kind == "cut":
        return content[:place]
    changed = bytearray(content)
    if kind == "bit":
        changed[place] ^= 1 << rng.randrange(8)
    elif kind == "byte":
        changed[place] = rng.randrange(256)
    else:
        stretch = len(changed[place : place + 16])
        changed[place : place + stretch] = bytes(stretch)
    return bytes(changed)


def damages(place: Path, count: int, seed: int) -> Iterator[tuple[Path, bytes]]:
    """`count` times a file (below a folder, each as often), in its place a changed content.

    The file is as before when the next one comes.
    """
    rng = random.Random(seed)
    below = [place] if place.is_file() else sorted(place.rglob("*"))
    files = [path for path in below if path.is_file() and path.stat().st_size]
    for number in range(count):
        path = files[number % len(files)]
        content = path.read_bytes()
        changed = change(content, rng)
        while changed == content:
            changed = change(content, rng)
        path.write_bytes(changed)
        try:
            yield path, changed
        finally:
            path.write_bytes(content)


def damage_checkpoint(
    folder: Path, count: int, seed: int, report: Callable[[Path], object] = print
) -> Counter[str]:
    """How often damage to the newest checkpoint was harmless, detected or silent.

    harmless: what was restored is equal; detected: the one before was
    taken, or an error raised; silent: something else came back. report:
    is called with the file of each silent one.
    """
    with Checkpoints(folder, 3) as saved:
        for step in STEPS:
            saved.save(step, **_items(step), meta=META)
    like = jax.eval_shape(lambda: _items(0))
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    shardings = jax.tree.map(lambda _: here, like)
    results: Counter[str] = Counter()
    before = logging.get_verbosity()
    logging.set_verbosity(logging.FATAL)
    try:
        for path, _ in damages(folder / str(STEPS[1]), count, seed):
            outcome = _outcome(folder, like, shardings)
            # Whether a look at the files alone would have seen it.
            missed = outcome == "detected" and not damage(folder / str(STEPS[1]))
            results[outcome] += 1
            results["restored as damaged, but whole for `verify`"] += missed
            if outcome == "silent":
                report(path)
    finally:
        logging.set_verbosity(before)
    return results


def _outcome(folder: Path, like: Any, shardings: Any) -> str:
    try:
        with Checkpoints(folder, read_only=True) as checkpoints:
            restored = checkpoints.restore(like, shardings)
    except UserError:
        return "detected"
    if restored is None:
        return "silent"
    step, items = restored
    expected = {**_items(step), "meta": META} if step in STEPS else {}
    same = jax.tree.structure(expected) == jax.tree.structure(items) and all(
        np.asarray(a).dtype == np.asarray(b).dtype and np.array_equal(a, b)
        for a, b in zip(jax.tree.leaves(expected), jax.tree.leaves(items), strict=True)
    )
    if not same:
        return "silent"
    return "harmless" if step == STEPS[1] else "detected"

"""Many images as bytes: batches of fixed places, all stages on the devices, the next batch
while one is fetched.

The image of a seed is computed in row `seed mod batch` of its batch, whatever other seeds are
asked for. Rows do not
see each other, so on the same devices with the same batch size an image has the same bits in a
run that was interrupted,
extended, or asked for it alone. Only the bytes leave the devices.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.config import ConfigError
from relay_jax.runtime import distributed
from relay_jax.runtime.sharding import from_all, replicated
from relay_jax.sampling.chain import StageSampler
from relay_jax.sampling.pixels import to_uint8_on_device

RUN_AHEAD = 1  # batches queued on the devices beyond the one that is waited for


class Inputs(NamedTuple):
    """What a batch starts from besides its seeds: classes int32 [n], and low_res float32 [n, h,
    w, c] or None."""

    classes: np.ndarray
    low_res: np.ndarray | None


class Bytes(NamedTuple):
    """Finished images: seeds int64 [n], classes int32 [n], pixels uint8 [n, h, w, c], the same
    on every process."""

    seeds: np.ndarray
    classes: np.ndarray
    pixels: np.ndarray


def arrange(seeds: Iterable[int], batch: int) -> list[np.ndarray]:
    """The seeds in as few batches as hold each in row `seed mod batch`, about in rising order;
    int64 each.

    Consecutive seeds fill their batches wherever they begin.
    """
    rising = np.unique(np.fromiter(seeds, np.int64))
    by_row = np.argsort(rising % batch, kind="stable")
    rows = (rising % batch)[by_row]
    turn = np.empty(len(rising), np.int64)  # how many seeds of the same row come before
    turn[by_row] = np.arange(len(rising)) - np.searchsorted(rows, rows)
    by_turn = np.argsort(turn, kind="stable")
    return np.split(rising[by_turn], np.cumsum(np.bincount(turn))[:-1]) if len(rising) else []


def compile_all(samplers: Sequence[StageSampler]) -> None:
    """Compiles every stage; at once, where a process need not mind the order in which others
    compile."""
    if distributed.joined() or len(samplers) == 1:
        for sampler in samplers:
            sampler.compile()
        return
    with ThreadPoolExecutor(len(samplers)) as pool:
        for compiled in [pool.submit(sampler.compile) for sampler in samplers]:
            compiled.result()


def stream(
    samplers: Sequence[tuple[StageSampler, dict]],
    batches: Iterable[np.ndarray],
    inputs: Callable[[np.ndarray], Inputs],
) -> Iterator[Bytes]:
    """The images of the last of consecutive stages, batch after batch.

    samplers: each stage with its parameters, all of one batch size. batches: seeds, as
    `arrange` gives them.
    inputs: called for each batch, while the devices are at the one before.
    Raises ConfigError for images that are not finite numbers.
    """
    size, mesh = samplers[0][0].batch, samplers[0][0].mesh
    finish = jax.jit(
        lambda x: (to_uint8_on_device(x), jnp.isfinite(x).all((1, 2, 3))),
        out_shardings=replicated(mesh),
    )

    def start(seeds: np.ndarray) -> tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array]]:
        given = inputs(seeds)
        rows = seeds % size
        source = np.zeros(size, int)  # empty rows repeat the first image
        source[rows] = np.arange(len(seeds))
        values = {"seeds": seeds.astype(np.uint32), "classes": given.classes.astype(np.int32)}
        if given.low_res is not None:
            values["low_res"] = given.low_res.astype(np.float32)
        on_devices = from_all({key: value[source] for key, value in values.items()}, mesh)
        images = on_devices.get("low_res")
        for sampler, params in samplers:
            images = sampler.start(params, on_devices["seeds"], on_devices["classes"], images)
        result = finish(images)
        for array in result:
            array.copy_to_host_async()
        return seeds, given.classes, result

    def fetch(seeds: np.ndarray, classes: np.ndarray, result: tuple[jax.Array, jax.Array]) -> Bytes:
        pixels, finite = (np.asarray(array.addressable_data(0))[seeds % size] for array in result)
        if not finite.all():
            raise ConfigError(
                f"the image of seed {seeds[~finite][0]} is not finite: the weights are "
                "damaged, or need "
                "model.dtype=float32"
            )
        return Bytes(seeds, classes, pixels)

    waiting: deque[tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array]]] = deque()
    for seeds in batches:
        waiting.append(start(seeds))
        if len(waiting) > RUN_AHEAD:
            yield fetch(*waiting.popleft())
    while waiting:
        yield fetch(*waiting.popleft())

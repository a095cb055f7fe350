"""Batches by position: batch n is a pure function of the source, the seed and n.

    stream = the source's positions, shuffled anew each epoch, repeated for ever, each image
    flipped or not batch n = stream[n * batch_size : (n + 1) * batch_size], of which a host
    loads the rows that its devices hold

So a run resumes with nothing but n, and row r of a batch is the same image whatever the number
of hosts, threads or worker processes. Grain (github.com/google/grain) supplies the
random-access shuffle and the prefetching.
"""

from collections.abc import Iterator, Sequence
from types import TracebackType
from typing import Self, TypedDict

import grain
import numpy as np

from relay_jax.data.source import DataError, Source, at_resolution, picture
from relay_jax.data.transforms import center_crop_resize, flip_x


class Batch(TypedDict):
    """image: uint8 [b, r, r, 3]; label: int32 [b], zeros without labels."""

    image: np.ndarray
    label: np.ndarray


class LoaderState(TypedDict):
    """The position in the stream, and what makes the stream the one it is. Plain numbers, for
    JSON."""

    next_batch: int
    seed: int
    length: int
    batch_size: int
    x_flip: bool


class _Examples:
    """The source as Grain wants it: one dictionary per position, cropped."""

    def __init__(self, source: Source, resolution: int) -> None:
        self._source, self._resolution = at_resolution(source, resolution), resolution

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> dict[str, object]:
        image, label = picture(self._source, int(position))
        return {"image": center_crop_resize(image, self._resolution), "label": np.int32(label)}


class _OwnRows:
    """The rows of one batch after the other that this host loads, as a source for Grain."""

    def __init__(self, stream: grain.MapDataset, batch_size: int, rows: np.ndarray) -> None:
        self._stream, self._batch_size, self._rows = stream, batch_size, rows.tolist()

    def __len__(self) -> int:
        return len(self._stream) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(int(index), len(self._rows))
        return self._stream[batch * self._batch_size + self._rows[row]]


class _RandomFlip(grain.transforms.RandomMap):
    """Mirrors half of the images. Grain's generator depends on nothing but the seed and the
    position in the stream."""

    def random_map(
        self, element: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        return {**element, "image": flip_x(element["image"])} if rng.random() < 0.5 else element


class Loader(Iterator[Batch]):
    """Endless iterator over batches of this host; a context manager, to be closed.

    batch_size: images of all hosts together; it may exceed the number of images in the source.
    rows: those of each batch that this host loads, in this order (`sharding.host_rows`); all by
    default.
    start: batches already consumed: `state["next_batch"]` of an earlier loader continues it
    exactly.
    threads: decoding threads in each process; 0 decodes in the caller, without prefetching.
    workers: decoding processes; 0 for none. They need parsed absl flags (`app.run` does it)
        and, as they are spawned, a main module that can be imported. Threads do while decoding
        dominates: Pillow releases the interpreter lock.
    Raises ValueError for impossible arguments, and DataError for a packed set without this
    resolution. `next` raises DataError for an unreadable image; any error closes it.
    """

    def __init__(
        self,
        source: Source,
        *,
        resolution: int,
        batch_size: int,
        seed: int,
        x_flip: bool,
        start: int = 0,
        rows: Sequence[int] | np.ndarray | None = None,
        threads: int = 2,
        workers: int = 0,
    ) -> None:
        if batch_size < 1 or start < 0 or threads < 0 or workers < 0:
            raise ValueError(f"impossible {batch_size=} {start=} {threads=} {workers=}")
        own = np.arange(batch_size) if rows is None else np.asarray(rows, int)
        if not len(own) or own.min() < 0 or own.max() >= batch_size:
            raise ValueError(f"rows must name images of a batch, 0 to {batch_size - 1}: {rows}")
        if not 0 <= seed < 2**32:
            raise ValueError(f"seed {seed} must fit 32 bits without sign")
        self._state = LoaderState(
            next_batch=start, seed=seed, length=len(source), batch_size=batch_size, x_flip=x_flip
        )
        # The order matters: shuffling before repeating covers each image once per epoch, and
        # anything random comes before the choice of rows, so that it depends on the position in
        # the global stream.
        stream = (
            grain.MapDataset.source(_Examples(source, resolution)).seed(seed).shuffle().repeat()
        )
        if x_flip:
            stream = stream.random_map(_RandomFlip())
        if rows is not None:
            stream = grain.MapDataset.source(_OwnRows(stream, batch_size, own))
        batches = stream.batch(len(own), drop_remainder=True)[start:]
        # Grain's own default would buffer 500 elements, and after batching an element is a batch.
        reading = batches.to_iter_dataset(
            grain.ReadOptions(num_threads=threads, prefetch_buffer_size=2 * threads)
        )
        if workers:
            reading = reading.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers))
        self._batches: grain.DatasetIterator | None = iter(reading)

    @property
    def state(self) -> LoaderState:
        """What the next call of `next` will return, whatever has been prefetched."""
        return self._state.copy()

    def __next__(self) -> Batch:
        if self._batches is None:
            raise ValueError("this loader is closed")
        try:
            batch = next(self._batches)
        except Exception as error:
            # Grain would go on with the batch after the bad one, and `state` would no longer
            # say where we are.
            self.close()
            if isinstance(error, DataError):  # Grain has added lines of its own to the message
                raise DataError(str(error).partition("\n")[0]) from error
            raise
        self._state["next_batch"] += 1
        return Batch(image=batch["image"], label=batch["label"])

    def close(self) -> None:
        """Ends threads and worker processes; `next` then raises ValueError. May be called twice."""
        if self._batches is not None:
            self._batches.close()
            self._batches = (
                None  # what is still there when the interpreter exits prints a traceback from Grain
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def read(
    source: Source, positions: Sequence[int], resolution: int
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, r, r, 3] and labels int32 [n] at `positions`, in that order, unshuffled
    and unflipped."""
    images = np.empty((len(positions), resolution, resolution, 3), np.uint8)
    labels = np.empty(len(positions), np.int32)
    source = at_resolution(source, resolution)
    for n, position in enumerate(positions):
        image, labels[n] = picture(source, int(position))
        images[n] = center_crop_resize(image, resolution)
    return images, labels

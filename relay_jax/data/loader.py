"""Batches by position: batch n is a pure function of the source, the seed and n.

    stream  = the source's positions, shuffled anew each epoch, repeated for ever, each image
              flipped or not
    batch n = stream[n * batch_size : (n + 1) * batch_size], of which a host loads the rows that
              its devices hold

So a run resumes with nothing but n, and row r of a batch is the same
image whatever the number of hosts, threads or worker processes.
Grain (github.com/google/grain) supplies the random-access shuffle
and the prefetching.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self, TypedDict

import grain
import numpy as np

from relay_jax.data.images import center_crop_resize, flip_x
from relay_jax.data.source import Source
from relay_jax.errors import DataError
from relay_jax.resolution import Resolution, height_width


class Batch(TypedDict):
    """image: uint8 [b, h, w, 3]; label: int32 [b], zeros without labels."""

    image: np.ndarray
    label: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Stream:
    """What makes the stream of images the one it is, whoever reads which part of it.

    resolution: of the images. batch_size: images of all
    hosts together; it may exceed the number of images in the source.
    seed: of order and flips. x_flip: mirror half of the images.
    """

    resolution: Resolution
    batch_size: int
    seed: int
    x_flip: bool

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"a batch needs at least one image, not {self.batch_size}")
        # Grain's generators take no more.
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed {self.seed} must fit 32 bits without sign")


class LoaderState(TypedDict):
    """The position in the stream, and what makes the stream the one it is; plain, for JSON."""

    next_batch: int
    seed: int
    length: int
    batch_size: int
    x_flip: bool


class Loader(Iterator[Batch]):
    """Endless iterator over batches of this host; a context manager, to be closed."""

    def __init__(
        self,
        source: Source,
        stream: Stream,
        *,
        start: int = 0,
        rows: Sequence[int] | np.ndarray | None = None,
        threads: int = 2,
        workers: int = 0,
    ) -> None:
        """The stream of a source, from a batch on.

        start: batches already consumed: `state["next_batch"]` of an earlier loader continues it
            exactly.
        rows: those of each batch that this host loads, in this order (`sharding.host_rows`); all
            by default.
        threads: decoding threads in each process; 0 decodes in the caller, without prefetching.
        workers: decoding processes; 0 for none. They need parsed absl flags (`app.run` does it)
            and, as they are spawned, a main module that can be imported. Threads do while decoding
            dominates: Pillow releases the interpreter lock.
        Raises ValueError for impossible arguments, and DataError for a packed set without this
        resolution. `next` raises DataError for an unreadable image; any error closes the loader.
        """
        if start < 0 or threads < 0 or workers < 0:
            raise ValueError(f"impossible {start=} {threads=} {workers=}")
        size = stream.batch_size
        chosen = np.arange(size) if rows is None else np.asarray(rows, int)
        if not len(chosen) or chosen.min() < 0 or chosen.max() >= size:
            raise ValueError(f"rows must name images of a batch, 0 to {size - 1}: {rows}")
        self._state = LoaderState(
            next_batch=start,
            seed=stream.seed,
            length=len(source),
            batch_size=size,
            x_flip=stream.x_flip,
        )
        # The order matters: shuffling before repeating covers each
        # image once per epoch, and anything random comes before the
        # choice of rows, so that it depends on the position in the
        # global stream.
        examples = grain.MapDataset.source(_Examples(source, stream.resolution))
        images = examples.seed(stream.seed).shuffle().repeat()
        if stream.x_flip:
            images = images.random_map(_RandomFlip())
        if rows is not None:
            images = grain.MapDataset.source(_HostRows(images, size, chosen))
        batches = images.batch(len(chosen), drop_remainder=True)[start:]
        # Grain's own default would buffer 500 elements, and after
        # batching an element is a batch.
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
            # Grain would go on with the batch after the bad one, and
            # `state` would no longer say where the stream is.
            self.close()
            # Grain has added lines of its own to the message.
            if isinstance(error, DataError):
                raise DataError(str(error).partition("\n")[0]) from error
            raise
        self._state["next_batch"] += 1
        return Batch(image=batch["image"], label=batch["label"])

    def close(self) -> None:
        """Ends threads and worker processes; `next` then raises ValueError. May be called twice."""
        if self._batches is not None:
            self._batches.close()
            # An iterator that is alive when the interpreter exits
            # prints a traceback from Grain.
            self._batches = None

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
    source: Source, positions: Sequence[int], resolution: Resolution
) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [n, h, w, 3] and labels int32 [n] at `positions`, in that order.

    Neither shuffled nor flipped. Raises DataError.
    """
    images = np.empty((len(positions), *height_width(resolution), 3), np.uint8)
    labels = np.empty(len(positions), np.int32)
    source = source.at(resolution)
    for n, position in enumerate(positions):
        image, labels[n] = source.picture(int(position))
        images[n] = center_crop_resize(image, resolution)
    return images, labels


class _Examples:
    """The source as Grain wants it: one dictionary per position, cropped."""

    def __init__(self, source: Source, resolution: Resolution) -> None:
        self._source, self._resolution = source.at(resolution), resolution

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, position: int) -> dict[str, object]:
        image, label = self._source.picture(int(position))
        return {
            "image": center_crop_resize(image, self._resolution),
            "label": np.int32(label),
        }


class _HostRows:
    """The rows of one batch after the other that this host loads, as a source for Grain."""

    def __init__(self, images: grain.MapDataset, batch_size: int, rows: np.ndarray) -> None:
        self._images, self._batch_size, self._rows = (
            images,
            batch_size,
            rows.tolist(),
        )

    def __len__(self) -> int:
        return len(self._images) // self._batch_size * len(self._rows)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        batch, row = divmod(int(index), len(self._rows))
        return self._images[batch * self._batch_size + self._rows[row]]


class _RandomFlip(grain.transforms.RandomMap):
    """Mirrors half of the images."""

    # Grain's generator depends on nothing but the seed and the
    # position in the stream.

    def random_map(
        self, element: dict[str, np.ndarray], rng: np.random.Generator
    ) -> dict[str, np.ndarray]:
        return {**element, "image": flip_x(element["image"])} if rng.random() < 0.5 else element

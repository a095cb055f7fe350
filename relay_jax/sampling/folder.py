"""Folders of finished images: numbered PNG files, and what all formats have in common.

    out/samples.json                what they were made with (record.py)
    out/000000/000012.png           seed 12, in folders of a thousand (here)
    out/000000-000999.npz ...       files of many seeds (shards.py)

A file under its name is complete, whenever the run is killed, and is
never written again.
"""

import os
import re
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np

from relay_jax.data.images import decode_picture, to_float
from relay_jax.errors import UserError
from relay_jax.runtime.files import write_png

FORMATS = ("png", "npz", "arrayrecord")


class ImageFolder(Protocol):
    """A folder that finished images go to.

    `owns` and `add` are for seeds that `plan` was called with.
    """

    def finished(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds whose images are there."""

    def plan(self, seeds: Iterable[int]) -> None:
        """Says which images will come. All processes say the same."""

    def owns(self, seed: int) -> bool:
        """Whether this process writes the image of a seed."""

    def add(self, seed: int, pixels: np.ndarray, label: int) -> None:
        """Takes the image uint8 [h, w, c] of a seed; threads may call it.

        Raises StorageError if it cannot be written.
        """

    def flush(self) -> None:
        """Writes what `add` has kept back, before the run is stopped."""


class PngFolder:
    """One PNG file for each seed. The seeds are shared out over the processes."""

    def __init__(self, out: Path) -> None:
        self._out = out

    def finished(self, seeds: Iterable[int]) -> set[int]:
        by_folder: dict[Path, list[int]] = {}
        for seed in seeds:
            by_folder.setdefault(image_path(self._out, seed).parent, []).append(seed)
        present: set[int] = set()
        # One look into each folder, not one for each image: file systems
        # of clusters are slow.
        for folder, members in by_folder.items():
            try:
                names = {entry.name for entry in os.scandir(folder)}
            except FileNotFoundError:
                continue
            present |= {seed for seed in members if image_path(self._out, seed).name in names}
        return present

    def plan(self, seeds: Iterable[int]) -> None:
        pass

    def owns(self, seed: int) -> bool:
        return seed % jax.process_count() == jax.process_index()

    def add(self, seed: int, pixels: np.ndarray, label: int) -> None:
        write_png(image_path(self._out, seed), pixels)

    def flush(self) -> None:
        pass


def image_path(folder: Path, seed: int) -> Path:
    """Where the image of a seed lies."""
    return folder / f"{seed - seed % 1000:06d}" / f"{seed:06d}.png"


def holds_images(folder: Path) -> bool:
    """Whether a folder has images in any of the formats, or below folders of numbers."""
    if not folder.is_dir():
        return False
    image_name = re.compile(r"\d+(-\d+)?\.(png|npz|array_record)")
    for entry in os.scandir(folder):
        if image_name.fullmatch(entry.name):
            return True
        numbered = entry.is_dir() and entry.name.isdecimal()
        if numbered and any(image_name.fullmatch(name) for name in os.listdir(entry)):
            return True
    return False


class Background:
    """Threads that do what is handed to `submit`, a bounded number of calls at a time.

    Use as a context. threads: 0 for one per core, 16 at most. waiting:
    calls that may be unfinished before `submit` waits.
    """

    def __init__(self, threads: int = 0, waiting: int = 256) -> None:
        self._pool = ThreadPoolExecutor(threads or min(os.cpu_count() or 1, 16), "write")
        self._waiting, self._free = waiting, threading.Semaphore(waiting)
        self._failed: list[BaseException] = []

    def submit(self, action: Callable[..., None], *arguments: object) -> None:
        """Raises what an earlier call has raised."""
        if self._failed:
            raise self._failed[0]
        self._free.acquire()
        self._pool.submit(action, *arguments).add_done_callback(self._finished)

    def wait(self) -> None:
        """Until all is done. Raises what a call has raised."""
        for _ in range(self._waiting):
            self._free.acquire()
        self._free.release(self._waiting)
        if self._failed:
            raise self._failed[0]

    def _finished(self, future: "Future[None]") -> None:
        error = None if future.cancelled() else future.exception()
        if error is not None:
            self._failed.append(error)
        self._free.release()

    def __enter__(self) -> "Background":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._pool.shutdown(wait=True)
        if kind is None and self._failed:
            raise self._failed[0]


def read_images(folder: Path, seeds: Iterable[int], resolution: int) -> np.ndarray:
    """PNG images of the given seeds, float32 [n, resolution, resolution, 3] in [-1, 1].

    Raises UserError for one that is missing, damaged or of another
    size.
    """
    images = []
    for seed in seeds:
        path = image_path(folder, seed)
        try:
            picture = decode_picture(path.read_bytes(), str(path))
        except FileNotFoundError as error:
            raise UserError(
                f"no image of seed {seed} in {folder} ({path} is missing); write it with "
                "--stage=base first"
            ) from error
        if picture.size != (resolution, resolution):
            raise UserError(
                f"{path} has {picture.width} x {picture.height} pixels; this stage continues "
                f"images of {resolution} x {resolution}"
            )
        images.append(np.asarray(picture))
    return to_float(np.stack(images))

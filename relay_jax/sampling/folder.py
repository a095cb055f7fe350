"""Folders of finished images: numbered PNG files, and what all formats have in common.

    out/samples.json                what they were made with (record.py)
    out/000000/000012.png           seed 12, in folders of a thousand (here)
    out/000000-000999.npz ...       files of many seeds (shards.py)

A file under its name is complete, whenever the run is killed, and is
never written again, unless it has been damaged since: at the next
start the files there are checked.
"""

import contextlib
import os
import re
import threading
import time
import zlib
from collections.abc import Callable, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Protocol

import jax
import numpy as np
from absl import logging

from relay_jax.data.decoding import decode_picture
from relay_jax.data.files import read_file
from relay_jax.data.images import to_float
from relay_jax.errors import UserError, one_line
from relay_jax.resolution import Resolution, height_width
from relay_jax.runtime.files import write_png

FORMATS = ("png", "npz", "arrayrecord")
LEFTOVER_SECONDS = 60.0  # a temporary file that was not written to for so long has no writer


class ImageFolder(Protocol):
    """A folder that finished images go to.

    `owns` and `add` are for seeds that `plan` was called with.
    `finished`, `kept` and `tidy` are for process 0 alone.
    """

    def finished(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds whose images are there; damaged files are removed, with a warning."""

    def kept(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds whose images `flush` has kept, for a file that is not finished."""

    def plan(self, seeds: Iterable[int], kept: Iterable[int] = ()) -> None:
        """Says which images will come, and which were kept. All processes say the same."""

    def owns(self, seed: int) -> bool:
        """Whether this process writes the image of a seed."""

    def add(self, seed: int, pixels: np.ndarray, label: int) -> None:
        """Takes the image uint8 [h, w, c] of a seed; threads may call it.

        Raises StorageError if it cannot be written.
        """

    def flush(self) -> None:
        """Keeps what `add` has not written yet, before the run is stopped."""

    def tidy(self) -> None:
        """After the last image: removes what killed runs have left, and images that are twice."""


class PngFolder:
    """One PNG file for each seed. The seeds are shared out over the processes.

    resolution: that every image must have; 0: any.
    """

    def __init__(self, out: Path, resolution: Resolution = 0) -> None:
        self._out, self._resolution = out, resolution

    def finished(self, seeds: Iterable[int]) -> set[int]:
        by_folder: dict[Path, list[int]] = {}
        for seed in seeds:
            by_folder.setdefault(image_path(self._out, seed).parent, []).append(seed)
        present: set[int] = set()
        # One look into each folder, not one for each image: file
        # systems of clusters are slow.
        for folder, members in by_folder.items():
            try:
                names = {entry.name for entry in os.scandir(folder)}
            except FileNotFoundError:
                continue
            present |= {seed for seed in members if image_path(self._out, seed).name in names}
        return present - self._damaged(sorted(present))

    def _damaged(self, seeds: list[int]) -> set[int]:
        """Removes the damaged ones of the images there."""
        paths = [image_path(self._out, seed) for seed in seeds]
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            reasons = list(pool.map(self._damage, paths))
        damaged = {seed: reason for seed, reason in zip(seeds, reasons, strict=True) if reason}
        for seed in damaged:
            remove(image_path(self._out, seed))
        if damaged:
            first, reason = next(iter(damaged.items()))
            logging.warning(
                "%d images in %s are damaged and will be made again, the first %s (%s)",
                len(damaged),
                self._out,
                image_path(self._out, first).name,
                reason,
            )
        return set(damaged)

    def _damage(self, path: Path) -> str:
        try:
            return png_damage(path.read_bytes(), self._resolution)
        except OSError as error:
            return one_line(error)

    def kept(self, seeds: Iterable[int]) -> set[int]:
        return set()

    def plan(self, seeds: Iterable[int], kept: Iterable[int] = ()) -> None:
        pass

    def owns(self, seed: int) -> bool:
        return seed % jax.process_count() == jax.process_index()

    def add(self, seed: int, pixels: np.ndarray, label: int) -> None:
        write_png(image_path(self._out, seed), pixels)

    def flush(self) -> None:
        pass

    def tidy(self) -> None:
        remove_leftovers(self._out)


def png_damage(content: bytes, resolution: Resolution = 0) -> str:
    """What is wrong with a PNG file that this program has written, '' if nothing.

    resolution: of the image, 0 for any. By the checksums of its
    chunks: ten times faster than decoding, and any changed bit
    is seen.
    """
    if content[:8] != b"\x89PNG\r\n\x1a\n":
        return "it is no PNG"
    place = 8
    kinds: list[bytes] = []
    while place + 12 <= len(content) and kinds[-1:] != [b"IEND"]:
        length = int.from_bytes(content[place : place + 4], "big")
        end = place + 8 + length
        if zlib.crc32(content[place + 4 : end]) != int.from_bytes(content[end : end + 4], "big"):
            return "a checksum in it differs"
        kinds.append(content[place + 4 : place + 8])
        place = end + 4
    if kinds[-1:] != [b"IEND"] or place != len(content) or b"IDAT" not in kinds:
        return "it is not whole"
    if kinds[0] != b"IHDR":
        return "it has no header"
    width, height = (int.from_bytes(content[at : at + 4], "big") for at in (16, 20))
    if resolution and (height, width) != height_width(resolution):
        return f"it is not {' x '.join(map(str, height_width(resolution)))}"
    return ""


def remove(path: Path) -> None:
    """Removes a file of this program, if it can be."""
    with contextlib.suppress(OSError):
        path.unlink()


def remove_leftovers(out: Path) -> None:
    """Removes temporary files of runs that were killed."""
    # A run beside this one may be writing: its files are
    # younger. A file that is made again has taken the place of
    # its leftover before.
    now = time.time()
    for path in [*out.glob(".*.tmp"), *out.glob("[0-9]*/.*.tmp")]:
        with contextlib.suppress(OSError):
            if now - path.stat().st_mtime > LEFTOVER_SECONDS:
                path.unlink()


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

    Use as a context. threads: 0 for one per core, 16 at most.
    waiting: calls that may be unfinished before `submit` waits.
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


def read_images(folder: Path, seeds: Iterable[int], resolution: Resolution) -> np.ndarray:
    """PNG images of the given seeds and size, float32 [n, h, w, 3] in [-1, 1].

    Raises UserError for one that is
    missing, damaged or of another size.
    """
    images = []
    for seed in seeds:
        path = image_path(folder, seed)
        try:
            picture = decode_picture(read_file(path), str(path))
        except FileNotFoundError as error:
            raise UserError(
                f"no image of seed {seed} in {folder} ({path} is missing); write it with "
                "--stage=base first"
            ) from error
        except OSError as error:
            raise UserError(f"{path} cannot be read ({error.strerror})") from error
        height, width = height_width(resolution)
        if picture.size != (width, height):
            raise UserError(
                f"{path} has {picture.width} x {picture.height} pixels; this stage continues "
                f"images of {width} x {height}"
            )
        images.append(np.asarray(picture))
    return to_float(np.stack(images))

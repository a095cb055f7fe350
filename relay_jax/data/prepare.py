"""--mode=prepare: any source, cropped and resized once for each stage, into packed files.

    python -m relay_jax.main --config=configs/imagenet256.py --mode=prepare --out=DIR
    python -m relay_jax.main --config=configs/imagenet256.py --workdir=runs/imagenet \\
        --config.dataset.source=packed --config.dataset.path=DIR

DIR may be gs://BUCKET/PATH; data/packed.py has the format. May be
stopped at any moment; the same command goes on after the last whole
file. Started again on a finished set, it compares every file with
its checksum and makes the damaged ones anew.
"""

import contextlib
import fcntl
import itertools
import json
import math
import os
import re
from collections import deque
from collections.abc import (
    Callable,
    Container,
    Generator,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from absl import logging

from relay_jax.data.identity import changes
from relay_jax.data.images import center_crop_resize
from relay_jax.data.packed import (
    MANIFEST,
    VERSION,
    Manifest,
    Shard,
    encode_record,
    read_manifest,
    record_file,
    shard_name,
)
from relay_jax.data.source import Source
from relay_jax.data.storage import Bucket, Folder, storage
from relay_jax.errors import DataError
from relay_jax.resolution import Resolution, height_width, pixels_text, size_text
from relay_jax.runtime.counting import counted
from relay_jax.runtime.files import cannot_write

# Keys of the source that are not compared where the originals are
# known by their identity.
_ELSEWHERE = ("path", "data_dir", "identity")

# Called with the number of images that are done and that of all,
# before the first image and after every one; may raise to stop, for
# instance after SIGTERM.
Report = Callable[[int, int], None]


def no_report(done: int, total: int) -> None:
    """For callers who need none."""


def prepare(
    source: Source,
    resolutions: Sequence[Resolution],
    out: str | os.PathLike[str],
    *,
    description: Mapping[str, Any],
    shard_images: int = 10_000,
    threads: int = 0,
    report: Report = no_report,
) -> Manifest:
    """Writes `source` at each resolution into `out`, or finishes what an earlier call has begun.

    out: a folder, or gs://BUCKET/PATH, whose files are made on this machine first.
    description: what the source is, as plain values: kept in dataset.json, and compared when a
        preparation goes on; its "identity" (data/identity.py) recognises changed originals.
    shard_images: images per file: what is lost when the preparation is stopped.
    threads: that decode and resize; 0 for one per core.
    Raises DataError for an unreadable image (finished files stay) or a folder that holds anything
    else, and StorageError for a full disk.
    """
    threads = threads or os.cpu_count() or 1
    sizes = sorted(set(resolutions), key=height_width)
    if not sizes or min(height_width(sizes[0])) < 1 or shard_images < 1 or threads < 1:
        raise DataError(f"cannot prepare with {resolutions=} {shard_images=} {threads=}")
    # Resized twice, images would not be those that the statistics
    # and the paper's networks know.
    if source.prepared:
        raise DataError(
            f"{getattr(source, 'path', 'this source')}: is packed already; prepare from the "
            "original images, resized once"
        )
    place = storage(out)
    manifest = Manifest(
        version=VERSION,
        complete=False,
        # As it will be read back, for the
        # comparison: tuples become lists.
        source=json.loads(json.dumps(dict(description))),
        images=len(source),
        class_names=list(source.class_names),
        resolutions=sizes,
        shard_images=shard_images,
        shards={},
    )
    try:
        begun = _belongs(place, manifest)
        with _only_one(place), place.workshop() as workshop:
            if not begun:
                _write_json(place, MANIFEST, manifest)
            return _Preparation(source, place, workshop, manifest, threads).run(report)
    # A bucket's errors are OSErrors, too.
    except OSError as error:
        raise cannot_write(place.path, error) from error


@dataclass(frozen=True)
class _Preparation:
    """One call of `prepare`, in a place that belongs to it alone."""

    source: Source
    place: Folder
    workshop: Path
    manifest: Manifest
    threads: int

    @property
    def count(self) -> int:
        """Files of one resolution."""
        return math.ceil(self.manifest["images"] / self.manifest["shard_images"])

    def names(self, number: int) -> list[str]:
        """The files of the same images, one for each resolution."""
        return [
            shard_name(resolution, number, self.count)
            for resolution in self.manifest["resolutions"]
        ]

    def positions(self, number: int) -> range:
        """The images of the files with that number."""
        first, size = (
            number * self.manifest["shard_images"],
            self.manifest["shard_images"],
        )
        return range(first, min(first + size, self.manifest["images"]))

    def run(self, report: Report) -> Manifest:
        """Makes what is missing, and then says in dataset.json that the set is complete."""
        total, shards = self.manifest["images"], self._finished()
        waiting = [number for number, row in enumerate(shards) if None in row]
        done = total - sum(len(self.positions(number)) for number in waiting)
        if done:
            logging.info(
                "%s: %s of %s images are there, and whole",
                self.place.path,
                f"{done:,}",
                f"{total:,}",
            )
        report(done, total)
        # One stream of images through all files: at the end of a
        # file the threads go on with the images of the next one.
        positions = itertools.chain.from_iterable(map(self.positions, waiting))
        with contextlib.closing(self._records(positions)) as records:
            for number in waiting:
                with contextlib.ExitStack() as stack:
                    files = [
                        stack.enter_context(record_file(self.workshop / name))
                        for name in self._forget(number)
                    ]
                    for _ in self.positions(number):
                        for write, record in zip(files, next(records), strict=True):
                            write(record)
                        done += 1
                        report(done, total)
                shards[number] = [self._note(name, number) for name in self.names(number)]
        by_resolution = {
            size_text(resolution): [shard for row in shards if (shard := row[column])]
            for column, resolution in enumerate(self.manifest["resolutions"])
        }
        manifest: Manifest = {
            **self.manifest,
            "complete": True,
            "shards": by_resolution,
        }
        _write_json(self.place, MANIFEST, manifest)
        _say_finished(self.place.path, manifest)
        return manifest

    def _finished(self) -> list[list[Shard | None]]:
        """By number and resolution what is noted of files that are there and whole, else None."""
        # An object is read into memory as a whole, a file is not.
        threads = 2 if isinstance(self.place, Bucket) else self.threads
        width = len(self.manifest["resolutions"])
        names = itertools.chain.from_iterable(map(self.names, range(self.count)))
        with ThreadPoolExecutor(threads) as pool:
            kept = pool.map(partial(_kept, self.place), names)
            shards = list(counted(kept, "comparing checksums", self.count * width))
        return [shards[start : start + width] for start in range(0, len(shards), width)]

    def _forget(self, number: int) -> list[str]:
        """Takes back the notes of files that are about to be made; gives their names."""
        # First of all: a note beside a file that it does not
        # describe would be taken for damage.
        for name in self.names(number):
            self.place.forget(_note_name(name))
        return self.names(number)

    def _note(self, name: str, number: int) -> Shard:
        """Brings a file to its place and notes its checksum, by which it counts as finished."""
        size, sha256 = Folder(str(self.workshop)).checksum(name)
        shard = Shard(file=name, images=len(self.positions(number)), bytes=size, sha256=sha256)
        self.place.take(self.workshop, name)
        _write_json(self.place, _note_name(name), shard)
        return shard

    def _records(self, positions: Iterable[int]) -> Generator[list[bytes], None, None]:
        """For each position, in order, its record at each resolution."""
        # A bounded number of images is in memory, whatever is
        # slower: decoding or writing.
        pool = ThreadPoolExecutor(self.threads)
        ahead: deque[Future[list[bytes]]] = deque()
        try:
            for position in positions:
                ahead.append(pool.submit(self._convert, position))
                if len(ahead) > 4 * self.threads:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _convert(self, position: int) -> list[bytes]:
        image, label = self.source.picture(position)
        return [
            encode_record(center_crop_resize(image, resolution), label)
            for resolution in self.manifest["resolutions"]
        ]


def _belongs(place: Folder, manifest: Manifest) -> bool:
    """Whether this very preparation has begun at `place`; False if it is new or empty.

    Raises DataError for anything else.
    """
    occupants = place.occupants()
    if MANIFEST not in occupants:
        # What a preparation leaves that was killed at once.
        if all(re.fullmatch(r"\.lock|\.?dataset\..*tmp", name) for name in occupants):
            return False
        raise DataError(
            f"{place.path}: holds something else; name a new or empty folder to prepare into"
        )
    earlier = read_manifest(place.path)
    same_originals = _check_originals(place.path, earlier["source"], manifest["source"])
    skip = _ELSEWHERE if same_originals else ("identity",)
    for key in ("source", "images", "class_names", "resolutions", "shard_images"):
        before, after = (_without(value[key], skip) for value in (earlier, manifest))
        if before != after:
            old, new = (f"{value!r:.100}" for value in (before, after))
            raise DataError(
                f"{place.path}: belongs to another preparation: {key} is {old} there and {new} "
                "here; use another"
            )
    return True


def _check_originals(path: str, earlier: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether the originals are known to be those of the beginning, wherever they are now.

    Raises DataError, with what has changed, if they are not.
    """
    # Preparations of earlier versions do not know them.
    old, new = earlier.get("identity"), now.get("identity")
    if not old or not new:
        return False
    difference = changes(old, new)
    if difference:
        raise DataError(
            f"{path}: the originals have changed since it was prepared: {difference}; prepare them "
            "into another folder"
        )
    return True


def _without(value: Any, skip: Container[str]) -> Any:
    if not isinstance(value, Mapping):
        return value
    return {key: child for key, child in value.items() if key not in skip}


@contextlib.contextmanager
def _only_one(place: Folder) -> Iterator[None]:
    """Keeps a second process out of the folder. Raises DataError if there is one."""
    # Buckets and some file systems cannot lock; two processes that
    # write there do the same work twice, and the files are equal.
    if isinstance(place, Bucket):
        yield
        return
    Path(place.path).mkdir(parents=True, exist_ok=True)
    with Path(place.path, ".lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise DataError(f"{place.path}: another process is preparing this folder") from error
        except OSError:
            pass
        else:
            # Half files of a run that was killed. Only a lock makes
            # sure that nobody writes them.
            for temporary in Path(place.path).glob("*/*.tmp"):
                temporary.unlink()
        yield


def _write_json(place: Folder, name: str, value: Mapping[str, Any]) -> None:
    place.write(name, json.dumps(value, indent=1) + "\n")


def _note_name(name: str) -> str:
    return name + ".json"


def _kept(place: Folder, name: str) -> Shard | None:
    """What is noted of a finished file, None if there is none or if it is damaged."""
    try:
        shard: Shard = json.loads(place.read(_note_name(name)))
        if place.checksum(name) == (shard["bytes"], shard["sha256"]):
            return shard
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    logging.warning("%s/%s is damaged and will be made again", place.path, name)
    return None


def _say_finished(path: str, manifest: Manifest) -> None:
    gigabytes = sum(shard["bytes"] for row in manifest["shards"].values() for shard in row) / 1e9
    logging.info(
        "%s: %s images at %s, %.3g GB; train on them with --config.dataset.source=packed "
        "--config.dataset.path=%s",
        path,
        f"{manifest['images']:,}",
        pixels_text(*manifest["resolutions"]),
        gigabytes,
        path,
    )

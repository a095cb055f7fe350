"""--mode=prepare: any source, cropped and resized once for each stage, into the files of
data/packed.py.

    python -m relay_jax.main --config=configs/imagenet256.py --mode=prepare --out=DIR      (or gs://BUCKET/PATH)
    python -m relay_jax.main --config=configs/imagenet256.py --workdir=runs/imagenet \\
        --config.dataset.source=packed --config.dataset.path=DIR

May be stopped at any moment; the same command goes on after the last whole file. Started again
on a finished set, it
compares every file with its checksum and makes the damaged ones anew.
"""

import fcntl
import json
import math
import os
import time
from collections import deque
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, closing, contextmanager, suppress
from pathlib import Path
from typing import Any

from absl import logging
from array_record.python import array_record_module

from relay_jax.data.images import DataError, one_line
from relay_jax.data.packed import (
    MANIFEST,
    VERSION,
    Manifest,
    PackedDataset,
    Shard,
    encode_record,
    read_manifest,
    shard_name,
)
from relay_jax.data.source import Source, picture
from relay_jax.data.storage import Bucket, Folder, storage
from relay_jax.data.transforms import center_crop_resize
from relay_jax.runtime.logs import Progress

# one record per group: read at any position without decoding its neighbours
WRITER_OPTIONS = "group_size:1,zstd:3"
PROGRESS_SECONDS = 10.0


def prepare(
    source: Source,
    resolutions: Sequence[int],
    out: str | os.PathLike[str],
    *,
    description: Mapping[str, Any],
    shard_images: int = 10_000,
    threads: int = 0,
    each: Callable[[], None] = lambda: None,
) -> Manifest:
    """Writes `source` at each of `resolutions` into the folder `out`, or finishes what an
    earlier call has begun.

    out: a folder, or gs://BUCKET/PATH: there each file is made in a temporary folder of this
    machine first.
    description: what the source is, as plain values: kept in dataset.json, and compared when a
    preparation goes on.
    shard_images: images per file: what is lost when the preparation is stopped.
    threads: that decode and resize; 0 for one per core.
    each: called after every image; may raise to stop, for instance after SIGTERM.
    Raises DataError for an unreadable image (finished files stay), a folder that holds anything
    else, or a full disk.
    """
    threads = threads or os.cpu_count() or 1
    if not resolutions or min(resolutions) < 1 or shard_images < 1 or threads < 1:
        raise DataError(f"cannot prepare with {resolutions=} {shard_images=} {threads=}")
    if isinstance(source, PackedDataset):
        raise DataError(
            f"{source.path}: is packed already; prepare from the original images, resized once"
        )
    place = storage(out)
    ours = Manifest(
        version=VERSION,
        complete=False,
        source=json.loads(
            json.dumps(dict(description))
        ),  # as it will be read back: tuples are lists
        images=len(source),
        class_names=list(source.class_names),
        resolutions=sorted(set(resolutions)),
        shard_images=shard_images,
        shards={},
    )
    try:
        begun = _belongs(place, ours)
        with _only_one(place), place.workshop() as workshop:
            if not begun:
                _write_json(place, MANIFEST, ours)
            return _prepare(source, place, workshop, ours, threads, each)
    except (
        OSError,
        RuntimeError,
    ) as error:  # ArrayRecord's own are RuntimeErrors, such as for a full disk
        raise DataError(f"{out}: cannot be written ({one_line(error)})") from error


def _belongs(place: Folder, ours: Manifest) -> bool:
    """Whether this very preparation has begun at `place`; False if it is new or empty.
    DataError for anything else."""
    occupants = place.occupants()
    if MANIFEST not in occupants:
        leftovers = {
            ".lock",
            Path(MANIFEST).with_suffix(".tmp").name,
        }  # of a preparation that was killed at once
        if occupants <= leftovers:
            return False
        raise DataError(
            f"{place.path}: holds something else; name a new or empty folder to prepare into"
        )
    theirs = read_manifest(place.path)
    for key in ("source", "images", "class_names", "resolutions", "shard_images"):
        if theirs[key] != ours[key]:
            old, new = (f"{manifest[key]!r:.200}" for manifest in (theirs, ours))
            raise DataError(
                f"{place.path}: belongs to another preparation: {key} is {old} there and {new} "
                "here; use another"
            )
    return True


@contextmanager
def _only_one(place: Folder) -> Iterator[None]:
    """Keeps a second process out of the folder. Raises DataError if there is one. Buckets and
    some file systems cannot lock; two that write there do the same work twice, and the files
    are equal."""
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
        yield


def _write_json(place: Folder, name: str, value: Mapping[str, Any]) -> None:
    place.write(name, json.dumps(value, indent=1) + "\n")


def _note(name: str) -> str:
    return name + ".json"


def _kept(place: Folder, name: str) -> Shard | None:
    """What is noted of a finished file, None if there is none or if it is damaged."""
    try:
        shard: Shard = json.loads(place.read(_note(name)))
        if place.checksum(name) == (shard["bytes"], shard["sha256"]):
            return shard
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    logging.warning("%s/%s is damaged and will be made again", place.path, name)
    return None


def _prepare(
    source: Source,
    place: Folder,
    workshop: Path,
    manifest: Manifest,
    threads: int,
    each: Callable[[], None],
) -> Manifest:
    total, size, resolutions = manifest["images"], manifest["shard_images"], manifest["resolutions"]
    count = math.ceil(total / size)
    with ThreadPoolExecutor(
        2 if isinstance(place, Bucket) else threads
    ) as pool:  # an object is read into memory

        def kept_at(number: int) -> list[Shard | None]:
            return [
                _kept(place, shard_name(resolution, number, count)) for resolution in resolutions
            ]

        shards = list(pool.map(kept_at, range(count)))
    waiting = [number for number in range(count) if None in shards[number]]
    lengths = [min(size, total - number * size) for number in range(count)]
    done = total - sum(lengths[number] for number in waiting)
    if done:
        logging.info(
            "%s: %s of %s images are there, and whole", place.path, f"{done:,}", f"{total:,}"
        )

    progress, last = Progress("prepare", total, done), time.monotonic()
    positions = (number * size + n for number in waiting for n in range(lengths[number]))
    with closing(_records(source, positions, resolutions, threads)) as records:
        for number in waiting:
            names = [shard_name(resolution, number, count) for resolution in resolutions]
            with ExitStack() as stack:
                files = [stack.enter_context(_ShardWriter(place, workshop, name)) for name in names]
                for _ in range(lengths[number]):
                    for file, record in zip(files, next(records), strict=True):
                        file.write(record)
                    done += 1
                    each()
                    if time.monotonic() - last > PROGRESS_SECONDS:
                        progress.line(done)
                        last = time.monotonic()
                shards[number] = [file.finish() for file in files]
    if waiting:
        progress.line(done)
    by_resolution = {
        str(r): [row[n] for row in shards if row[n]] for n, r in enumerate(resolutions)
    }
    finished: Manifest = {**manifest, "complete": True, "shards": by_resolution}  # type: ignore[typeddict-item]
    _write_json(place, MANIFEST, finished)
    gigabytes = sum(shard["bytes"] for row in finished["shards"].values() for shard in row) / 1e9
    sizes = " and ".join(map(str, resolutions))
    logging.info(
        "%s: %s images at %s px, %.3g GB; train on them with --config.dataset.source=packed "
        "--config.dataset.path=%s",
        place.path,
        f"{total:,}",
        sizes,
        gigabytes,
        place.path,
    )
    return finished


def _records(
    source: Source, positions: Iterator[int], resolutions: Sequence[int], threads: int
) -> Generator[list[bytes], None, None]:
    """For each position, in order, its record at each resolution. A bounded number of images is
    in memory."""

    def convert(position: int) -> list[bytes]:
        image, label = picture(source, position)
        return [
            encode_record(center_crop_resize(image, resolution), label)
            for resolution in resolutions
        ]

    pool = ThreadPoolExecutor(threads)
    ahead: deque[Future[list[bytes]]] = deque()
    try:
        for position in positions:
            ahead.append(pool.submit(convert, position))
            if len(ahead) > 4 * threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


class _ShardWriter:
    """A file that appears under its name when it is whole and on disk; left early, it leaves
    nothing behind."""

    def __init__(self, place: Folder, workshop: Path, name: str) -> None:
        self._place, self._name, self._images = place, name, 0
        self._temporary = (workshop / name).with_suffix(".tmp")

    def __enter__(self) -> "_ShardWriter":
        self._temporary.parent.mkdir(exist_ok=True)
        self._place.forget(_note(self._name))
        self._writer = array_record_module.ArrayRecordWriter(str(self._temporary), WRITER_OPTIONS)
        return self

    def write(self, record: bytes) -> None:
        self._writer.write(record)
        self._images += 1

    def finish(self) -> Shard:
        """Closes the file, gives it its name and notes its checksum, by which it counts as
        finished."""
        self._writer.close()
        size, sha256 = Folder(str(self._temporary.parent)).checksum(self._temporary.name)
        shard = Shard(file=self._name, images=self._images, bytes=size, sha256=sha256)
        self._place.take(self._temporary, self._name)
        _write_json(self._place, _note(self._name), shard)
        return shard

    def __exit__(self, *_: object) -> None:
        with suppress(RuntimeError):
            self._writer.close()
        self._temporary.unlink(missing_ok=True)

"""Files of many images: ADM's npz, or ArrayRecord as data/packed.py reads it.

    npz           out/010000-010999.npz              arr_0 uint8 [n, h, w, 3]; arr_1 int64 [n], classes, if there are any
                  out/samples_50000x256x256x3.npz    all of them in one (`merge_npz`): what ADM's evaluator reads
    arrayrecord   out/256/010000-010999.array_record and out/dataset.json: a data set for dataset.source=packed

A file holds consecutive seeds, those of its name, and none beyond a multiple of `shard_images`.
So the names tell what is finished. It gets its name when it is whole and on disk; a killed run
loses the images of unfinished files.
"""

import os
import re
import threading
import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from array_record.python import array_record_module
from numpy.lib import format as npy

from relay_jax.data.packed import MANIFEST, VERSION, Manifest, Shard, encode_record, read_manifest
from relay_jax.data.storage import file_sha256
from relay_jax.runtime.logs import write_json
from relay_jax.sampling.folder import cannot_write
from relay_jax.sampling.seeds import runs_of

WRITER_OPTIONS = "group_size:1,zstd:3"  # as in data/prepare.py: read at any position


def shard_size(resolution: int) -> int:
    """Images per file: 200 MB at 256 px, 80 MB at 512 px."""
    return 1000 if resolution <= 256 else 100


class ShardFolder:
    """The files of one format in a folder. Memory: the images of the files that are not yet
    whole."""

    def __init__(self, out: Path, kind: str, resolution: int, num_classes: int) -> None:
        """kind: npz or arrayrecord. num_classes: 0 if the images have no classes."""
        self.out, self.kind, self.resolution, self.num_classes = out, kind, resolution, num_classes
        self.shard_images = shard_size(resolution)
        self._files = out / str(resolution) if kind == "arrayrecord" else out
        self._suffix = {"npz": ".npz", "arrayrecord": ".array_record"}[kind]
        self._lock = threading.Lock()
        self._owned: dict[int, tuple[int, int]] = {}  # seed -> first and last seed of its file
        self._open: dict[tuple[int, int], dict[int, tuple[np.ndarray, int]]] = {}

    def shards(self) -> list[tuple[int, int]]:
        """First and last seed of every finished file, rising."""
        names = os.listdir(self._files) if self._files.is_dir() else []
        found = [re.fullmatch(rf"(\d+)-(\d+){re.escape(self._suffix)}", name) for name in names]
        return sorted(
            (int(match[1]), int(match[2]))
            for match in found
            if match and self._is_whole(self._files / match[0])
        )

    def path(self, run: tuple[int, int]) -> Path:
        return self._files / f"{run[0]:06d}-{run[1]:06d}{self._suffix}"

    def _is_whole(self, path: Path) -> bool:
        """A look at the size, for copies that were cut short; our own files are whole by their
        names."""
        first, last = (int(number) for number in path.stem.split("-"))
        least = (last - first + 1) * (self.resolution**2 * 3 if self.kind == "npz" else 1)
        if path.stat().st_size >= least:
            return True
        logging.warning("%s is too short; its images will be made again", path)
        return False

    def finished(self, seeds: Iterable[int]) -> set[int]:
        there: set[int] = set()
        for first, last in self.shards():
            there.update(range(first, last + 1))
        return there.intersection(seeds)

    def plan(self, seeds: Iterable[int]) -> None:
        """Consecutive seeds, cut at the multiples of `shard_images`, become a file each;
        processes take turns."""
        files = []
        for first, last in runs_of(seeds):
            cuts = range(first - first % self.shard_images, last + 1, self.shard_images)
            files += [(max(first, cut), min(last, cut + self.shard_images - 1)) for cut in cuts]
        for run in files[jax.process_index() :: jax.process_count()]:
            self._owned.update(dict.fromkeys(range(run[0], run[1] + 1), run))

    def owns(self, seed: int) -> bool:
        return seed in self._owned

    def add(self, seed: int, pixels: np.ndarray, label: int) -> None:
        """The last image of a file writes it."""
        run = self._owned[seed]
        with self._lock:
            images = self._open.setdefault(run, {})
            images[seed] = (pixels, label)
            if len(images) <= run[1] - run[0]:
                return
            del self._open[run]
        self._write(run, images)

    def flush(self) -> None:
        """What is there of unfinished files, as files of their own."""
        for images in self._open.values():
            for first, last in runs_of(images):
                self._write((first, last), images)
        self._open = {}

    def _write(self, run: tuple[int, int], images: Mapping[int, tuple[np.ndarray, int]]) -> None:
        path = self.path(run)
        temporary = path.with_suffix(".tmp")
        chosen = [images[seed] for seed in range(run[0], run[1] + 1)]
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            if self.kind == "npz":
                arrays = [np.stack([pixels for pixels, _ in chosen])]
                if self.num_classes:
                    arrays.append(np.asarray([label for _, label in chosen], np.int64))
                with temporary.open("wb") as file:
                    np.savez(file, *arrays)  # named arr_0, arr_1
            else:
                writer = array_record_module.ArrayRecordWriter(str(temporary), WRITER_OPTIONS)
                for pixels, label in chosen:
                    writer.write(encode_record(pixels, label))
                writer.close()
            _name(temporary, path)
        except (OSError, RuntimeError) as error:  # ArrayRecord's own are RuntimeErrors
            raise cannot_write(path, error) from error


def _name(temporary: Path, path: Path) -> None:
    """Gives a file its name once it is on disk."""
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _parts(folder: ShardFolder, seeds: Iterable[int]) -> list[tuple[tuple[int, int], slice]] | None:
    """Files, and which of their images, that hold each of the seeds once in rising order; None
    if one is missing."""
    parts: list[tuple[tuple[int, int], slice]] = []
    files = folder.shards()
    for first, last in runs_of(seeds):
        for run in files:
            if run[0] <= first <= run[1]:
                end = min(run[1], last)
                parts.append((run, slice(first - run[0], end + 1 - run[0])))
                first = end + 1
        if first <= last:
            return None
    return parts


def merge_npz(folder: ShardFolder, seeds: Iterable[int]) -> Path | None:
    """One npz with the images of all seeds, in rising order, in ADM's layout; None if a seed is
    missing.

    Memory: the images of one file. What is there already is left alone.
    """
    parts = _parts(folder, seeds)
    if not parts:
        return None
    count = sum(part.stop - part.start for _, part in parts)
    shape = (count, folder.resolution, folder.resolution, 3)
    path = folder.out / f"samples_{'x'.join(map(str, shape))}.npz"
    if path.exists():
        return path
    temporary, labels = path.with_suffix(".tmp"), []
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            with archive.open("arr_0.npy", "w", force_zip64=True) as member:
                npy.write_array_header_1_0(
                    member, {"descr": "|u1", "fortran_order": False, "shape": shape}
                )
                for run, part in parts:
                    with np.load(folder.path(run)) as shard:
                        member.write(np.ascontiguousarray(shard["arr_0"][part]).data)
                        if folder.num_classes:
                            labels.append(shard["arr_1"][part])
            if labels:
                with archive.open("arr_1.npy", "w", force_zip64=True) as member:
                    npy.write_array(member, np.concatenate(labels))
        _name(temporary, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    return path


def write_manifest(folder: ShardFolder, source: Mapping[str, Any]) -> Path:
    """dataset.json: all finished ArrayRecord files as one packed data set, at one resolution.
    source: for people."""
    path = folder.out / MANIFEST
    before = (
        read_manifest(folder.out)["shards"].get(str(folder.resolution), []) if path.exists() else []
    )
    known = {shard["file"]: shard for shard in before}
    shards: list[Shard] = []
    for run in folder.shards():
        name = str(folder.path(run).relative_to(folder.out))
        size, there = folder.path(run).stat().st_size, known.get(name)
        digest = (
            there["sha256"] if there and there["bytes"] == size else file_sha256(folder.path(run))
        )
        shards.append(Shard(file=name, images=run[1] - run[0] + 1, bytes=size, sha256=digest))
    manifest = Manifest(
        version=VERSION,
        complete=True,
        source=dict(source),
        images=sum(shard["images"] for shard in shards),
        class_names=[str(label) for label in range(folder.num_classes)],
        resolutions=[folder.resolution],
        shard_images=folder.shard_images,
        shards={str(folder.resolution): shards},
    )
    try:
        write_json(path, dict(manifest))
    except OSError as error:
        raise cannot_write(path, error) from error
    return path

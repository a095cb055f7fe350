"""Files of many images: ADM's npz, or ArrayRecord as data/packed.py reads it.

    npz           out/010000-010999.npz             arr_0 uint8 [n, h, w, 3]; arr_1 int64 [n],
                                                    classes, if there are any
                  out/samples_50000x256x256x3.npz   all in one (`merge_npz`), for ADM's evaluator
    arrayrecord   out/256/010000-010999.array_record
                  out/dataset.json                  both together: dataset.source=packed

A file holds consecutive seeds, those of its name, and none beyond a
multiple of `shard_images`. So the names tell what is finished. It gets
its name when it is whole and on disk; a killed run loses the images of
unfinished files.
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
from numpy.lib import format as npy

from relay_jax.data.packed import (
    MANIFEST,
    VERSION,
    Manifest,
    Shard,
    encode_record,
    read_manifest,
    record_file,
)
from relay_jax.runtime.files import file_sha256, replacing, write_json
from relay_jax.sampling.seeds import runs_of


def shard_size(resolution: int) -> int:
    """Images per file: 200 MB at 256 px, 80 MB at 512 px."""
    return 1000 if resolution <= 256 else 100


class ShardFolder:
    """The files of one format in a folder; the images of unfinished files are in memory."""

    def __init__(self, out: Path, kind: str, resolution: int, num_classes: int) -> None:
        """kind: npz or arrayrecord. num_classes: 0 if the images have no classes."""
        self.out, self.kind, self.resolution, self.num_classes = (
            out,
            kind,
            resolution,
            num_classes,
        )
        self.shard_images = shard_size(resolution)
        self._files = out / str(resolution) if kind == "arrayrecord" else out
        self._suffix = {"npz": ".npz", "arrayrecord": ".array_record"}[kind]
        self._lock = threading.Lock()
        # Seed -> first and last seed of its file.
        self._owned: dict[int, tuple[int, int]] = {}
        self._open: dict[tuple[int, int], dict[int, tuple[np.ndarray, int]]] = {}

    def shards(self) -> list[tuple[int, int]]:
        """First and last seed of every finished file, rising."""
        names = os.listdir(self._files) if self._files.is_dir() else []
        matches = [re.fullmatch(rf"(\d+)-(\d+){re.escape(self._suffix)}", name) for name in names]
        return sorted(
            (int(match[1]), int(match[2]))
            for match in matches
            if match and self._is_whole(self._files / match[0])
        )

    def path(self, run: tuple[int, int]) -> Path:
        return self._files / f"{run[0]:06d}-{run[1]:06d}{self._suffix}"

    def _is_whole(self, path: Path) -> bool:
        """Whether a file has the size that its images take at least."""
        # Files of this program are whole by their names; copies may have
        # been cut short.
        first, last = (int(number) for number in path.stem.split("-"))
        least = (last - first + 1) * (self.resolution**2 * 3 if self.kind == "npz" else 1)
        if path.stat().st_size >= least:
            return True
        logging.warning("%s is too short; its images will be made again", path)
        return False

    def finished(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds whose images are in finished files."""
        seeds_in_files: set[int] = set()
        for first, last in self.shards():
            seeds_in_files.update(range(first, last + 1))
        return seeds_in_files.intersection(seeds)

    def plan(self, seeds: Iterable[int]) -> None:
        """Gives each file of consecutive seeds to a process; processes take turns."""
        # Cut at multiples, not at the first seed: another command over
        # part of the seeds must come to the same files.
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
        # Outside the lock: other threads go on while this one writes.
        self._write(run, images)

    def flush(self) -> None:
        """Writes the images of unfinished files, as files of their own."""
        for images in self._open.values():
            for first, last in runs_of(images):
                self._write((first, last), images)
        self._open = {}

    def _write(self, run: tuple[int, int], images: Mapping[int, tuple[np.ndarray, int]]) -> None:
        path = self.path(run)
        chosen = [images[seed] for seed in range(run[0], run[1] + 1)]
        if self.kind == "arrayrecord":
            with record_file(path) as write:
                for pixels, label in chosen:
                    write(encode_record(pixels, label))
            return
        arrays = [np.stack([pixels for pixels, _ in chosen])]
        if self.num_classes:
            arrays.append(np.asarray([label for _, label in chosen], np.int64))
        # To an open file: NumPy would add .npz to the temporary name.
        # Arrays without names are arr_0 and arr_1, which is what ADM's
        # evaluator asks for.
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, *arrays)


def _parts(folder: ShardFolder, seeds: Iterable[int]) -> list[tuple[tuple[int, int], slice]] | None:
    """Files, and which of their images, that hold each seed once in rising order.

    None if a seed is missing.
    """
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
    """One npz with the images of all seeds, in rising order, in ADM's layout.

    None if a seed is missing. Memory: the images of one file. An npz of
    that name stays as it is.
    """
    parts = _parts(folder, seeds)
    if not parts:
        return None
    count = sum(part.stop - part.start for _, part in parts)
    shape = (count, folder.resolution, folder.resolution, 3)
    path = folder.out / f"samples_{'x'.join(map(str, shape))}.npz"
    if path.exists():
        return path
    labels = []
    # Written as a zip by hand: np.savez would need all images in memory
    # at once.
    with (
        replacing(path) as temporary,
        zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive,
    ):
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
    return path


def write_manifest(folder: ShardFolder, source: Mapping[str, Any]) -> Path:
    """dataset.json: all finished ArrayRecord files as one packed set; source: for people."""
    path = folder.out / MANIFEST
    # A file under its name never changes: what was hashed before is not
    # read again.
    earlier = read_manifest(folder.out)["shards"] if path.exists() else {}
    recorded = {shard["file"]: shard for shard in earlier.get(str(folder.resolution), [])}
    shards: list[Shard] = []
    for run in folder.shards():
        file = folder.path(run)
        name, size = str(file.relative_to(folder.out)), file.stat().st_size
        shard = recorded.get(name)
        if shard is None or shard["bytes"] != size:
            images = run[1] - run[0] + 1
            shard = Shard(file=name, images=images, bytes=size, sha256=file_sha256(file))
        shards.append(shard)
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
    write_json(path, dict(manifest))
    return path

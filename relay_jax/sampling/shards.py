"""Files of many images: ADM's npz, or ArrayRecord as data/packed.py reads it.

    npz           out/010000-010999.npz             arr_0 uint8 [n, h, w, 3]; arr_1 int64 [n],
                                                    classes, if there are any
                  out/samples_50000x256x256x3.npz   all in one (`merge_npz`), for ADM's evaluator
    arrayrecord   out/256/010000-010999.array_record
                  out/dataset.json                  both together: dataset.source=packed

A file holds consecutive seeds, those of its name, and none beyond a
multiple of `shard_images`. So the names tell what is finished. It
gets its name when it is whole and on disk. A killed run loses the
images of unfinished files; one that is asked to stop keeps them, in
`.010000-010041.part` beside its place, and its continuation makes
the file that an uninterrupted run makes. Files are checked before
they are believed: npz by their checksums, ArrayRecord by
dataset.json, or by reading every record.
"""

import os
import re
import threading
import zipfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from array_record.python.array_record_module import ArrayRecordReader
from numpy.lib import format as npy

from relay_jax.data.packed import (
    MANIFEST,
    VERSION,
    Manifest,
    Shard,
    decode_record,
    encode_record,
    read_manifest,
    record_file,
)
from relay_jax.errors import one_line
from relay_jax.resolution import Resolution, height_width, size_text
from relay_jax.runtime.files import file_sha256, replacing, write_json
from relay_jax.sampling.folder import remove, remove_leftovers
from relay_jax.sampling.seeds import runs_of

_SHARD_KEYS = Shard.__required_keys__


def shard_size(resolution: Resolution) -> int:
    """Images per file: 200 MB at 256 px, 80 MB at 512 px."""
    return 1000 if max(height_width(resolution)) <= 256 else 100


class ShardFolder:
    """The files of one format in a folder; the images of unfinished files are in memory."""

    def __init__(self, out: Path, kind: str, resolution: Resolution, num_classes: int) -> None:
        """kind: npz or arrayrecord. num_classes: 0 if the images have no classes."""
        self.out, self.kind, self.resolution, self.num_classes = (
            out,
            kind,
            resolution,
            num_classes,
        )
        self.shard_images = shard_size(resolution)
        self._files = out / size_text(resolution) if kind == "arrayrecord" else out
        self._suffix = {"npz": ".npz", "arrayrecord": ".array_record"}[kind]
        self._lock = threading.Lock()
        # Size and time of files that were found whole, or were
        # written by this process.
        self._whole: dict[str, tuple[int, int]] = {}
        self._manifest: dict[str, Shard] | None = None
        # Seed -> first and last seed of its file.
        self._owned: dict[int, tuple[int, int]] = {}
        self._open: dict[tuple[int, int], dict[int, tuple[np.ndarray, int]]] = {}

    def shards(self) -> list[tuple[int, int]]:
        """First and last seed of every finished file, rising; damaged ones are removed."""
        names = os.listdir(self._files) if self._files.is_dir() else []
        matches = [re.fullmatch(rf"(\d+)-(\d+){re.escape(self._suffix)}", name) for name in names]
        runs = sorted((int(match[1]), int(match[2])) for match in matches if match)
        return [run for run in runs if self.path(run).name in names and self._is_whole(run)]

    def path(self, run: tuple[int, int]) -> Path:
        return self._files / f"{run[0]:06d}-{run[1]:06d}{self._suffix}"

    def _is_whole(self, run: tuple[int, int]) -> bool:
        """Whether a file holds what its name says; looked at once as long as it stays as it is."""
        path = self.path(run)
        try:
            about = path.stat()
            if self._whole.get(path.name) == (about.st_size, about.st_mtime_ns):
                return True
            self._check(run)
        # Of zipfile, numpy, ArrayRecord
        # and zlib: damage has many types.
        except Exception as error:
            logging.warning(
                "%s is damaged (%s); its images will be made again", path, one_line(error, 100)
            )
            self.recorded().pop(str(path.relative_to(self.out)), None)
            remove(path)
            return False
        self._whole[path.name] = about.st_size, about.st_mtime_ns
        return True

    def _check(self, run: tuple[int, int]) -> None:
        """Raises an exception of any type for a damaged file."""
        path, count = self.path(run), run[1] - run[0] + 1
        if self.kind == "npz":
            check_npz(path, count, self.resolution, bool(self.num_classes))
            return
        recorded = self.recorded().get(str(path.relative_to(self.out)))
        if recorded is None or recorded["images"] != count:
            self._read(run)
        elif recorded["bytes"] != path.stat().st_size or recorded["sha256"] != file_sha256(path):
            raise ValueError(f"its checksum is not that of {MANIFEST}")

    def recorded(self) -> dict[str, Shard]:
        """The files of this size that dataset.json describes, by name; none if it is damaged."""
        if self._manifest is None:
            self._manifest = {}
            if (self.out / MANIFEST).exists():
                try:
                    shards = read_manifest(self.out)["shards"][size_text(self.resolution)]
                    self._manifest = {s["file"]: s for s in shards if s.keys() >= _SHARD_KEYS}
                # It is made of the files, and will be made again.
                except Exception as error:
                    logging.warning("%s is made again: %s", MANIFEST, one_line(error, 100))
        return self._manifest

    def _read(self, run: tuple[int, int]) -> dict[int, tuple[np.ndarray, int]]:
        """The images and labels of a file by seed. Raises exceptions of many types."""
        path, seeds = self.path(run), range(run[0], run[1] + 1)
        if self.kind == "npz":
            return _read_npz(path, seeds)
        reader = ArrayRecordReader(str(path))
        if reader.num_records() != len(seeds):
            raise ValueError(f"it has {reader.num_records()} records, not {len(seeds)}")
        images = [decode_record(record) for record in reader.read_all()]
        for image, label in images:
            if image.shape != (*height_width(self.resolution), 3) or label < 0:
                raise ValueError("it holds other images")
        return dict(zip(seeds, images, strict=True))

    def finished(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds whose images are in finished files."""
        seeds_in_files: set[int] = set()
        for first, last in self.shards():
            seeds_in_files.update(range(first, last + 1))
        return seeds_in_files.intersection(seeds)

    def _parts(self) -> dict[tuple[int, int], Path]:
        """What `flush` has kept of unfinished files, by first and last seed."""
        names = os.listdir(self._files) if self._files.is_dir() else []
        matches = [re.fullmatch(r"\.(\d+)-(\d+)\.part", name) for name in names]
        return {(int(m[1]), int(m[2])): self._files / m[0] for m in matches if m}

    def kept(self, seeds: Iterable[int]) -> set[int]:
        """Those of the seeds that are in kept parts, and in no finished file."""
        kept: set[int] = set()
        for run, path in self._parts().items():
            try:
                check_npz(path, run[1] - run[0] + 1, self.resolution, labels=True)
                kept.update(range(run[0], run[1] + 1))
            except Exception as error:
                logging.warning("%s is left out: %s", path, one_line(error, 100))
                remove(path)
        return kept.intersection(seeds) - self.finished(seeds)

    def plan(self, seeds: Iterable[int], kept: Iterable[int] = ()) -> None:
        """Gives each file of consecutive seeds to a process; processes take turns.

        kept: what `kept` has said, of
        the same seeds on all processes.
        """
        # Cut at multiples, not at the first seed: another command
        # over part of the seeds must come to the same files.
        files, kept = [], set(kept)
        for first, last in runs_of(kept.union(seeds)):
            cuts = range(first - first % self.shard_images, last + 1, self.shard_images)
            files += [(max(first, cut), min(last, cut + self.shard_images - 1)) for cut in cuts]
        for run in files[jax.process_index() :: jax.process_count()]:
            self._owned.update(dict.fromkeys(range(run[0], run[1] + 1), run))
        for part, path in self._parts().items() if kept else ():
            ready = {seed for seed in range(part[0], part[1] + 1) if seed in self._owned} & kept
            images = _read_npz(path, range(part[0], part[1] + 1)) if ready else {}
            for seed in sorted(ready):
                self._open.setdefault(self._owned[seed], {})[seed] = images[seed]
        for run in [run for run, images in self._open.items() if len(images) > run[1] - run[0]]:
            self._write(run, self._open.pop(run))

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
        # Outside the lock: other threads
        # go on while this one writes.
        self._write(run, images)

    def flush(self) -> None:
        """Keeps the images of unfinished files for the next start."""
        for run, images in self._open.items():
            parts = runs_of(images)
            for first, last in parts:
                _write_npz(self._part(first, last), images, range(first, last + 1), labels=True)
            self._forget_parts(run, keep=parts)
        self._open = {}

    def _part(self, first: int, last: int) -> Path:
        return self._files / f".{first:06d}-{last:06d}.part"

    def _forget_parts(self, run: tuple[int, int], keep: Sequence[tuple[int, int]] = ()) -> None:
        """Removes the parts of a file, and what a kill has left of them."""
        for (first, last), path in self._parts().items():
            if run[0] <= first and last <= run[1] and (first, last) not in keep:
                remove(path)
        for path in self._files.glob("..*.part.tmp"):
            first, last = (int(number) for number in re.findall(r"\d+", path.name)[:2])
            if run[0] <= first and last <= run[1]:
                remove(path)

    def _write(self, run: tuple[int, int], images: Mapping[int, tuple[np.ndarray, int]]) -> None:
        path, seeds = self.path(run), range(run[0], run[1] + 1)
        if self.kind == "arrayrecord":
            with record_file(path) as write:
                for seed in seeds:
                    write(encode_record(*images[seed]))
        else:
            _write_npz(path, images, seeds, labels=bool(self.num_classes))
        about = path.stat()
        self._whole[path.name] = about.st_size, about.st_mtime_ns
        self._forget_parts(run)

    def tidy(self) -> None:
        """Makes every seed stand in one file, and removes what killed runs have left.

        Commands over overlapping seeds that ran at the same time
        have written some images twice; both are the same.
        """
        end = -1
        for run in sorted(self.shards(), key=lambda run: (run[0], -run[1])):
            first, last = run
            if first <= end < last:
                self._write((end + 1, last), self._read(run))
            if first <= end:
                logging.info("%s: its images are in other files, too; removed", self.path(run))
                remove(self.path(run))
            end = max(end, last)
        remove_leftovers(self.out)


def _read_npz(path: Path, seeds: range) -> dict[int, tuple[np.ndarray, int]]:
    """Images and labels of an npz by seed."""
    with np.load(path) as file:
        images = file["arr_0"]
        labels = file["arr_1"].tolist() if "arr_1" in file else [0] * len(images)
    return dict(zip(seeds, zip(images, labels, strict=True), strict=True))


def _write_npz(
    path: Path, images: Mapping[int, tuple[np.ndarray, int]], seeds: range, labels: bool
) -> None:
    arrays = [np.stack([images[seed][0] for seed in seeds])]
    if labels:
        arrays.append(np.asarray([images[seed][1] for seed in seeds], np.int64))
    # To an open file: NumPy would add .npz to the temporary name.
    # Arrays without names are arr_0 and arr_1, which is what ADM's
    # evaluator asks for.
    with replacing(path) as temporary, temporary.open("wb") as file:
        np.savez(file, *arrays)


def check_npz(path: Path, count: int, resolution: Resolution, labels: bool) -> None:
    """Raises an exception of any type for a damaged npz, or one of other images.

    Reads it, in pieces, and compares the checksums of the zip.
    """
    shapes = {"arr_0.npy": ((count, *height_width(resolution), 3), np.dtype(np.uint8))}
    if labels:
        shapes["arr_1.npy"] = ((count,), np.dtype(np.int64))  # type: ignore[assignment]
    with zipfile.ZipFile(path) as archive:
        if archive.namelist() != list(shapes):
            raise ValueError(f"it holds {len(archive.namelist())} other arrays")
        if any(info.compress_size != info.file_size for info in archive.infolist()):
            raise ValueError("it is compressed")
        if damaged := archive.testzip():
            raise ValueError(f"the checksum of {damaged} differs")
        for name, expected in shapes.items():
            with archive.open(name) as member:
                npy.read_magic(member)
                shape, _, dtype = npy.read_array_header_1_0(member)
            if (shape, dtype) != expected:
                raise ValueError(f"{name} is {dtype} {list(shape)}")


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

    None if a seed is missing. Memory: the images of one file. A
    whole npz of that name stays as it is.
    """
    parts = _parts(folder, seeds)
    if not parts:
        return None
    count = sum(part.stop - part.start for _, part in parts)
    shape = (count, *height_width(folder.resolution), 3)
    path = folder.out / f"samples_{'x'.join(map(str, shape))}.npz"
    if path.exists():
        try:
            check_npz(path, count, folder.resolution, bool(folder.num_classes))
            return path
        except Exception as error:
            logging.warning("%s is made again: %s", path, one_line(error, 100))
    labels = []
    # Written as a zip by hand: np.savez would need all images in
    # memory at once.
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
    # What was hashed before, and compared at the start, is not
    # hashed again.
    recorded = folder.recorded()
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
        shards={size_text(folder.resolution): shards},
    )
    write_json(path, dict(manifest))
    return path

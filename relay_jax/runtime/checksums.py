"""Checksums of a checkpoint: what was handed to Orbax, compared with what comes back.

    STEP/checksums/process_0.json   SHA-256 of every part of every array,
                                    and of the notes; one file a process

TensorStore does not notice most changed bytes in its data files, and
gives back wrong weights. So each part of an array is hashed over
name, shape, type, place and bytes before it is written, and again
after it has been read. The files protect themselves: `sha256` is
that of all else in them. No process needs another one for this,
neither when saving nor when restoring: there is nothing to wait for.
"""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from relay_jax.errors import one_line
from relay_jax.runtime.files import digest

FOLDER = "checksums"
_VERSION = 1
_THREADS = min(os.cpu_count() or 1, 8)  # hashlib lets other threads work meanwhile
# Checkpoints whose arrays were compared,
# by path, sizes and times of their files.
_compared: dict[tuple, str] = {}


def name_of(path: Any) -> str:
    """The name under which Orbax stores the leaf of a tree."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def open_array(item: Path, name: str) -> Any:
    """One array of an item as TensorStore opens it; nothing of it is read yet."""
    spec = {"driver": "file", "path": f"{item}/"}
    store = {"driver": "ocdbt", "base": spec, "path": f"{name}/"}
    return tensorstore.open({"driver": "zarr", "kvstore": store}, open=True).result()


def _text_of(index: tuple[slice, ...], shape: tuple[int, ...]) -> str:
    """A part of an array as text: '0:3,8:16', '' for a scalar."""
    ends = (place.indices(size)[:2] for place, size in zip(index, shape, strict=True))
    return ",".join(f"{first}:{last}" for first, last in ends)


def _index_of(text: str) -> tuple[slice, ...]:
    pairs = (part.split(":") for part in text.split(",") if part)
    return tuple(slice(int(first), int(last)) for first, last in pairs)


def _hash(name: str, shape: tuple[int, ...], place: str, value: np.ndarray) -> str:
    """SHA-256 of one part of an array. shape: of the whole array."""
    # Little endian and in rows, so that
    # it is the same on every machine.
    little = np.ascontiguousarray(value).astype(value.dtype.newbyteorder("<"), copy=False)
    head = f"{name} {list(shape)} {value.dtype.name} {place}\n"
    state = hashlib.sha256(head.encode())
    state.update(little.reshape(-1).view(np.uint8).data)
    return state.hexdigest()


def _parts(name: str, leaf: Any) -> Iterator[tuple[str, tuple[int, ...], str, Any]]:
    """The parts of an array that this process answers for: (name, shape, place, values)."""
    whole = tuple(slice(None) for _ in np.shape(leaf))
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        yield name, np.shape(leaf), _text_of(whole, np.shape(leaf)), leaf
        return
    # Of several copies one process answers for one.
    for shard in leaf.addressable_shards:
        if shard.replica_id == 0:
            yield name, leaf.shape, _text_of(shard.index, leaf.shape), shard.data


def _hash_part(part: tuple[str, tuple[int, ...], str, Any]) -> tuple[str, str, str]:
    name, shape, place, value = part
    return name, place, _hash(name, shape, place, np.asarray(value))


def describe(items: Mapping[str, Any], meta: Mapping[str, Any]) -> dict[str, Any]:
    """What this process knows of a checkpoint, as JSON.

    items: trees of arrays by name. meta: the notes beside them.
    """
    hashes: dict[str, dict[str, dict[str, str]]] = {}
    with ThreadPoolExecutor(_THREADS) as pool:
        for item, tree in items.items():
            leaves = jax.tree.leaves_with_path(tree)
            parts = [part for path, leaf in leaves for part in _parts(name_of(path), leaf)]
            # Every name is listed, also where another process has
            # the array, so that a lost array is seen by all.
            names = hashes[item] = {name_of(path): {} for path, _ in leaves}
            for name, place, value in pool.map(_hash_part, parts):
                names[name][place] = value
    record = {
        "version": _VERSION,
        "processes": jax.process_count(),
        "meta": digest(json.loads(json.dumps(meta))),
        "items": hashes,
    }
    return record | {"sha256": digest(record)}


class ChecksumHandler(ocp.AsyncCheckpointHandler):
    """Writes the record of each process into the folder of the item."""

    def __init__(self, name: str = "") -> None:
        self._name = name or f"process_{jax.process_index()}.json"

    async def async_save(self, directory: Any, args: Any) -> list[Any]:
        # By this class the file is written once process 0 has made
        # the folder, which it does in the background.
        writing = self._write(directory, json.dumps(args.record))
        return [ocp.future.CommitFutureAwaitingContractedSignals(writing, name="checksums")]

    async def _write(self, directory: Any, text: str) -> None:
        (directory / self._name).write_text(text)

    def save(self, directory: Any, args: Any) -> None:
        (directory / self._name).write_text(json.dumps(args.record))

    def restore(self, directory: Any, args: Any = None) -> None:
        """Nothing: `Checksums.read` does it, without the other processes."""


@ocp.args.register_with_handler(ChecksumHandler, for_save=True, for_restore=True)
@dataclass
class SaveChecksums(ocp.args.CheckpointArgs):
    """`describe` of this process, to be saved as an item."""

    record: dict[str, Any] | None = None


@dataclass(frozen=True)
class Checksums:
    """Those of one checkpoint, of all processes that have written it.

    folder: of the checkpoint. parts: item -> name -> place ->
    (process, SHA-256).
    """

    folder: Path
    meta: str
    parts: Mapping[str, Mapping[str, Mapping[str, tuple[int, str]]]]

    @classmethod
    def read(cls, folder: Path) -> "Checksums | None":
        """Of the checkpoint in a folder; None if it was written without.

        Raises ValueError or OSError where
        they are damaged themselves.
        """
        if not (folder / FOLDER).exists():
            return None
        first = cls._record(folder, 0)
        parts: dict[str, dict[str, dict[str, tuple[int, str]]]] = {
            item: {name: {} for name in names} for item, names in first["items"].items()
        }
        for process in range(first["processes"]):
            record = cls._record(folder, process)
            for item, names in record["items"].items():
                for name, places in names.items():
                    marked = {place: (process, value) for place, value in places.items()}
                    parts[item][name].update(marked)
        return cls(folder, first["meta"], parts)

    @staticmethod
    def _record(folder: Path, process: int) -> dict[str, Any]:
        path = folder / FOLDER / f"process_{process}.json"
        record = json.loads(path.read_text())
        if not isinstance(record, dict) or record.pop("sha256", None) != digest(record):
            raise ValueError(f"{path} is damaged: its checksum differs")
        if record["version"] != _VERSION:
            raise ValueError(f"{path} has format {record['version']}, not {_VERSION}")
        return record

    def check_meta(self, meta: Any) -> None:
        """Raises ValueError for other notes than were saved."""
        if digest(meta) != self.meta:
            raise ValueError("the notes (meta) differ from their checksum")

    def check(self, item: str, tree: Any) -> None:
        """Raises ValueError if arrays that were read are not those that were saved.

        tree: of arrays, on the host or on devices. With several
        processes each looks at its share of the parts, which are all
        of them together.
        """
        leaves = {name_of(path): leaf for path, leaf in jax.tree.leaves_with_path(tree)}
        saved = self.parts.get(item, {})
        for name in leaves.keys() ^ saved.keys():
            raise ValueError(f"array {item}/{name} is not in both, checkpoint and checksums")
        count, here = jax.process_count(), jax.process_index()
        jobs = [
            (item, name, place, value, leaves[name])
            for name, places in saved.items()
            for place, (process, value) in places.items()
            if process % count == here
        ]
        self._compare(jobs)

    def check_files(self, items: Mapping[str, Any] | None = None) -> None:
        """As `check`, of the files of all items or some, without Orbax and other processes.

        Memory: a few arrays at a time.
        """
        chosen = self.parts if items is None else items
        self._compare(
            [
                (item, name, place, value, None)
                for item in chosen
                for name, places in self.parts[item].items()
                for place, (_, value) in places.items()
            ]
        )

    def _compare(self, jobs: list[tuple[str, str, str, str, Any]]) -> None:
        with ThreadPoolExecutor(_THREADS) as pool:
            for job, same in zip(jobs, pool.map(self._is_same, jobs), strict=True):
                if not same:
                    raise ValueError(f"array {job[0]}/{job[1]} differs from its checksum")

    def _is_same(self, job: tuple[str, str, str, str, Any]) -> bool:
        item, name, place, value, leaf = job
        index = _index_of(place)
        array = None if leaf is None else _values(leaf, index)
        shape = None if leaf is None else np.shape(leaf)
        # The devices of this process may hold other parts than were
        # saved: those are read once more, from the files.
        if array is None:
            opened = open_array(self.folder / item, name)
            shape, array = opened.shape, np.asarray(opened[index].read().result())
        assert shape is not None
        return _hash(name, tuple(shape), place, array) == value


def _values(leaf: Any, index: tuple[slice, ...]) -> np.ndarray | None:
    """A part of an array, None where no device of this process holds it whole."""
    if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable:
        return np.asarray(leaf)[index]
    for shard in leaf.addressable_shards:
        bounds = [place.indices(size) for place, size in zip(shard.index, leaf.shape, strict=True)]
        pairs = list(zip(index, bounds, strict=True))
        if all(first <= part.start and part.stop <= last for part, (first, last, _) in pairs):
            moved = (slice(part.start - first, part.stop - first) for part, (first, *_) in pairs)
            return np.asarray(shard.data)[tuple(moved)]
    return None


def damage(folder: Path) -> str:
    """What is wrong with the checkpoint in a folder, '' if it is what was saved.

    Reads all of its arrays, a few at a time. One process is enough.
    """
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    stats = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    key = (str(folder), *stats)
    if key not in _compared:
        _compared[key] = _damage(folder)
    return _compared[key]


def _damage(folder: Path) -> str:
    if not _can_be_listed(folder):
        return "its notes or indices cannot be read"
    try:
        checksums = Checksums.read(folder)
        if checksums is not None:
            checksums.check_meta(json.loads((folder / "meta" / "metadata").read_text()))
            for item, names in checksums.parts.items():
                if missing := names.keys() - _names(folder / item):
                    raise ValueError(f"array {item}/{min(missing)} is not in _METADATA")
            checksums.check_files()
    # TensorStore raises many types, too.
    except Exception as error:
        return one_line(error)
    return ""


def _can_be_listed(folder: Path) -> bool:
    """Whether the notes of a checkpoint are JSON, and the index of each item names some arrays."""
    try:
        json.loads((folder / "meta" / "metadata").read_text())
        for item in _items(folder):
            notes = folder / item / "_METADATA"
            if notes.exists():
                json.loads(notes.read_text())
            base = {"driver": "file", "path": f"{folder / item}/"}
            index = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
            if not index.list().result():
                return False
    except (OSError, ValueError):
        return False
    return True


def _items(folder: Path) -> list[str]:
    """The items of a checkpoint that hold arrays: snapshots and averages have other ones."""
    saved = [path.name for kind in ("ema*", "train") for path in folder.glob(kind)]
    return saved if (folder / FOLDER).exists() and saved else ["ema", "train"]


def _names(item: Path) -> set[str]:
    """The arrays that Orbax restores of an item, by its own notes; KeyError for broken ones."""
    names = set()
    for leaf in json.loads((item / "_METADATA").read_text())["tree_metadata"].values():
        # Every key that Orbax asks for.
        value, keys = leaf["value_metadata"], leaf["key_metadata"]
        if value["value_type"] != "None" and not value["skip_deserialize"]:
            names.add(".".join(key["key"] for key in keys if isinstance(key["key_type"], int)))
    return names

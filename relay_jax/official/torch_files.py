"""Files of torch.save and pickled torch modules, read without torch, running nothing in them.

    .pt   zip of torch.save: <folder>/data.pkl, and one stored member <folder>/data/<key> for each
          storage
    .pkl  plain pickle; each storage is the argument of torch.storage._load_from_bytes, a small
          pickle stream itself
    .pth  torch.save before version 1.6: three pickles of header, the object, its storages' keys,
          then their bytes

Tensors are views of the memory-mapped file; only another precision is copied.
"""

import math
import mmap
import pickle
import struct
import zipfile
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from relay_jax.errors import UserError
from relay_jax.official.pickle import Machine, Name, Record, no_storage, show

MAX_PICKLE = 1 << 28  # bytes of data.pkl in a zip
MAX_MEMBERS = 100_000  # of a zip
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


@dataclass(eq=False, repr=False)
class Storage:
    """Raw little-endian elements.

    crc: checksum of the bytes, None if there is none or it has been verified.
    """

    key: str
    dtype: str
    count: int
    data: memoryview
    crc: int | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Tensor:
    """A strided window of a storage, checked to lie within it. Offset and strides count
    elements."""

    storage: Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """float32, read-only; a view of the file where that has float32.

        Raises UserError for integers, and for damage.
        """
        storage = self.storage
        if storage.dtype not in ("<f2", "<f4", "<f8", "bf16"):
            raise UserError(
                f"storage {show(storage.key)} has elements of type {storage.dtype}, not "
                "floating point"
            )
        if storage.crc is not None and zlib.crc32(storage.data) != storage.crc:
            raise UserError(f"storage {show(storage.key)} is damaged (its checksum differs)")
        # Many tensors may share a storage, which
        # is checked for the first of them alone.
        storage.crc = None
        flat = np.frombuffer(storage.data, "<u2" if storage.dtype == "bf16" else storage.dtype)
        strides = [step * flat.itemsize for step in self.stride]
        view = np.lib.stride_tricks.as_strided(
            flat[self.offset :], self.size, strides, writeable=False
        )
        if storage.dtype == "bf16":
            # bfloat16 is the upper half of float32; NumPy knows no such type.
            view = (view.astype(np.uint32) << 16).view(np.float32)
        view = view.astype(np.float32, copy=False)
        view.flags.writeable = False
        return view


class _Dtype(Record):
    """numpy's: class_name is its code, state[1] the order of bytes."""


def is_count(value: object) -> bool:
    """An int of at least 0 that no later arithmetic can make harmful."""
    return type(value) is int and 0 <= value < 1 << 48


def _itemsize(dtype: str) -> int:
    return 2 if dtype == "bf16" else int(dtype[-1])


# What the names on the list do


def _persistent_object(_: Machine, args: tuple) -> Record:
    """Keeps class name and state; the embedded source is dropped with the rest."""
    match args:
        case ({"type": "class", "class_name": str(name), "state": dict(state)},):
            return Record(name[:80], state)
    raise UserError("a persistent object is not in the expected form")


def _rebuild_tensor(_: Machine, args: tuple) -> Tensor:
    match args:
        case (Storage() as storage, offset, tuple(size), tuple(stride), *_):
            if (
                len(size) > 8
                or len(size) != len(stride)
                or not all(map(is_count, (offset, *size, *stride)))
            ):
                raise UserError(
                    f"a tensor has an impossible size or stride: {show(size)}, {show(stride)}"
                )
            count = math.prod(size)
            reach = sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
            end = offset + (reach if count else 0)
            # Also the number of elements: a stride of 0
            # would make a large array of a few bytes.
            if max(end, count) > storage.count:
                raise UserError(
                    f"a tensor of size {show(size)} lies outside its storage {show(storage.key)} "
                    f"of {storage.count} elements"
                )
            return Tensor(storage, offset, size, stride)
    raise UserError("a tensor is not in the expected form")


def _rebuild_parameter(_: Machine, args: tuple) -> Tensor:
    if not args or not isinstance(args[0], Tensor):
        raise UserError("a parameter is not a tensor")
    return args[0]


def _load_from_bytes(machine: Machine, args: tuple) -> Storage:
    """The legacy stream of one storage: header, the storage, its keys, a count and the raw data."""
    if len(args) != 1 or not isinstance(args[0], memoryview):
        raise UserError("torch.storage._load_from_bytes is called without bytes")
    # With the same budget: streams within streams
    # must not multiply what a file may cost.
    storage, storages = _legacy(Machine(args[0], _STORAGES, no_storage, machine.budget))
    if not isinstance(storage, Storage) or list(storages) != [storage.key]:
        raise UserError("a storage is not in torch's legacy format")
    return storage


def _numpy_dtype(_: Machine, args: tuple) -> _Dtype:
    code = args[0] if args else None
    if code not in ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"):
        raise UserError(f"numpy type {show(code)} is not on the list")
    return _Dtype(code)


def _numpy_scalar(_: Machine, args: tuple) -> object:
    match args:
        case (_Dtype(class_name=code, state=(_, "<" | "|", *_)), memoryview() as data) if len(
            data
        ) == int(code[1]):
            return np.frombuffer(data, "<" + code)[0].item()
    raise UserError("a numpy number is not in the expected form")


def _encode(_: Machine, args: tuple) -> memoryview:
    match args:
        case (str(text), "latin1") if len(text) <= 8:
            return memoryview(text.encode("latin1"))
    raise UserError("_codecs.encode is only known for numpy's numbers")


def _set(_: Machine, args: tuple) -> list:
    match args:
        case (list(items),):
            return items
    raise UserError("a set is not made of a list")


def _ordered_dict(_: Machine, args: tuple) -> dict:
    if args:
        raise UserError("collections.OrderedDict is called with arguments")
    return {}


_CODES = {
    "Float": "<f4",
    "Half": "<f2",
    "Double": "<f8",
    "BFloat16": "bf16",
    "Long": "<i8",
    "Int": "<i4",
    "Short": "<i2",
    "Char": "<i1",
    "Byte": "<u1",
    "Bool": "<b1",
}
# Storages stand alone in the small streams
# of a .pkl: no other name may occur there.
_STORAGES = {
    f"torch.{kind}Storage": Name(f"torch.{kind}Storage", tag=code) for kind, code in _CODES.items()
}
_FUNCTIONS: dict[str, Callable[[Machine, tuple], object]] = {
    "torch_utils.persistence._reconstruct_persistent_obj": _persistent_object,
    "torch._utils._rebuild_tensor_v2": _rebuild_tensor,
    "torch._utils._rebuild_parameter": _rebuild_parameter,
    "torch.storage._load_from_bytes": _load_from_bytes,
    "collections.OrderedDict": _ordered_dict,
    "builtins.set": _set,
    "__builtin__.set": _set,
    "_codecs.encode": _encode,
    "numpy.dtype": _numpy_dtype,
    "numpy.core.multiarray.scalar": _numpy_scalar,
    "numpy._core.multiarray.scalar": _numpy_scalar,
}
_CLASSES = ("torch.nn.modules.container.ModuleDict", "torch.nn.modules.container.ModuleList")
NAMES = (
    _STORAGES
    | {name: Name(name, call) for name, call in _FUNCTIONS.items()}
    | {name: Name(name, is_class=True) for name in _CLASSES}
)


def _storage_id(tag: object, length: int) -> tuple[str, str, int]:
    """('storage', class, key, place, count[, None]) -> key, dtype, count.

    The place, such as cuda:0, is ignored. Raises UserError for anything else.
    """
    if isinstance(tag, tuple) and len(tag) == length and tag[5:] in ((), (None,)):
        match tag[:5]:
            case ("storage", Name(tag=dtype), str(key), str(), int(count)) if dtype and is_count(
                count
            ):
                return key, dtype, count
    raise UserError("a persistent id is not that of a storage")


def _legacy(machine: Machine) -> tuple[object, dict[str, Storage]]:
    """The object of a legacy stream, and its storages by key, whose data follow in their order."""
    magic, protocol, system = [machine.run() for _ in range(3)]
    if magic != LEGACY_MAGIC or protocol != 1001:
        raise UserError("a storage is not in torch's legacy format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise UserError("a storage is not little-endian")
    storages: dict[str, Storage] = {}
    machine.persistent = partial(_announce, storages)
    loaded, keys = machine.run(), machine.run()
    if (
        not isinstance(keys, list)
        or not all(isinstance(key, str) for key in keys)
        or sorted(keys) != sorted(storages)
    ):
        raise UserError("its list of storages does not fit to its tensors")
    for storage in (storages[key] for key in keys):
        if machine.number("<q") != storage.count:
            raise UserError(
                f"storage {show(storage.key)} does not have the announced {storage.count} elements"
            )
        storage.data = machine.take(storage.count * _itemsize(storage.dtype))
    return loaded, storages


def _announce(storages: dict[str, Storage], tag: object) -> Storage:
    """A storage whose data are read later, when the object is complete."""
    key, dtype, count = _storage_id(tag, 6)
    storage = storages.setdefault(key, Storage(key, dtype, count, memoryview(b"")))
    if (storage.dtype, storage.count) != (dtype, count):
        raise UserError(f"storage {show(key)} is announced twice, differently")
    return storage


class _Archive:
    """A zip of torch.save. Members are views of `whole`, the file: only stored ones are read."""

    def __init__(self, entries: list[zipfile.ZipInfo], whole: memoryview) -> None:
        self.whole, self.members, self.storages = whole, {}, {}  # type: ignore[var-annotated]
        if len(entries) > MAX_MEMBERS:
            raise UserError(f"it has {len(entries)} members, far more than any official file")
        for entry in entries:
            parts = entry.orig_filename.split("/")
            if {"", ".", ".."}.intersection(parts) or any(
                c in entry.orig_filename for c in "\\:\0"
            ):
                raise UserError(
                    f"member {show(entry.orig_filename)} has a name that no official file has"
                )
        if len({entry.orig_filename.partition("/")[0] for entry in entries}) == 1:
            for entry in entries:
                self._add(entry)
        if "data.pkl" not in self.members:
            raise UserError(
                "it is a zip, but not one of torch.save (no single folder with a data.pkl)"
            )
        if "byteorder" in self.members and self._view("byteorder") != b"little":
            raise UserError("its storages are not little-endian")

    def _add(self, entry: zipfile.ZipInfo) -> None:
        name, inner = show(entry.orig_filename), entry.orig_filename.partition("/")[2]
        if inner == "constants.pkl" or inner.startswith("code/"):
            raise UserError("it is a TorchScript program, not an official checkpoint")
        if entry.flag_bits & 0x41:
            raise UserError(f"member {name} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise UserError(f"member {name} is compressed, which torch.save never does")
        # The reader of another program might take the other one of the two.
        if inner in self.members:
            raise UserError(f"member {name} occurs twice")
        self.members[inner] = entry

    def _view(self, name: str) -> memoryview:
        # By hand, for zipfile copies. Its directory
        # may say anything: both headers must agree.
        entry = self.members[name]
        at, encoded = entry.header_offset, entry.orig_filename.encode()
        header = self.whole[max(at, 0) : max(at, 0) + 30]
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise UserError(f"member {show(name)} is damaged or missing")
        name_length, extra_length = struct.unpack("<HH", header[26:30])
        start = at + 30 + name_length + extra_length
        end = start + entry.file_size
        if self.whole[at + 30 : at + 30 + name_length] != encoded or end > len(self.whole):
            raise UserError(f"member {show(name)} is damaged or lies outside the file")
        return self.whole[start:end]

    def program(self) -> memoryview:
        entry = self.members["data.pkl"]
        # The weights lie in members of their own: this is names and numbers alone.
        if entry.file_size > MAX_PICKLE:
            raise UserError(
                f"its data.pkl has {entry.file_size} bytes, far more than in any official file"
            )
        program = self._view("data.pkl")
        if zlib.crc32(program) != entry.CRC:
            raise UserError("its data.pkl is damaged (the checksum differs)")
        return program

    def storage(self, tag: object) -> Storage:
        key, dtype, count = _storage_id(tag, 5)
        if key not in self.storages:
            entry = self.members.get(f"data/{key}")
            if entry is None:
                raise UserError(f"storage {show(key)} is missing")
            self.storages[key] = Storage(key, dtype, count, self._view(f"data/{key}"), entry.CRC)
        storage = self.storages[key]
        if storage.dtype != dtype or len(storage.data) != count * _itemsize(dtype):
            raise UserError(
                f"storage {show(key)} has {len(storage.data)} bytes, not {count} elements of "
                f"type {dtype}"
            )
        return storage


# What people name by mistake, or what a failed download leaves.
_FOREIGN = {
    b"\x89PNG": "a PNG image",
    b"\xff\xd8\xff": "a JPEG image",
    b"\x1f\x8b": "a gzip file",
    b"<": "a web page",
    b"\x93NUMPY": "a numpy array",
    b"\x89HDF": "an HDF5 file",
    b"version https://git-lfs": "a Git LFS pointer",
}


def load(path: Path) -> tuple[Any, mmap.mmap]:
    """The object in a file of any of the formats: plain containers, Records and Tensors.

    Formats are told apart by content. Also returns the mapped file that the tensors view, which
    must not change while they are in use. Raises UserError or OSError; the errors of zipfile
    and struct for some damage.
    """
    if not path.is_file():
        raise UserError("it is not a file" if path.exists() else "there is no such file")
    with path.open("rb") as file:
        if not file.seek(0, 2):
            raise UserError("it is empty")
        mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        whole = memoryview(mapping)
        start = bytes(whole[:32])
        if start[:4] == b"PK\3\4":
            with zipfile.ZipFile(file) as archive:
                entries = archive.infolist()
            zipped = _Archive(entries, whole)
            return Machine(zipped.program(), NAMES, zipped.storage).run(), mapping
    if start[:1] == pickle.PROTO and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        # A .pth begins with a pickle of its own, the magic number.
        loaded = Machine(whole, NAMES, no_storage).run()
        if loaded == LEGACY_MAGIC:
            loaded = _legacy(Machine(whole, NAMES, no_storage))[0]
        return loaded, mapping
    kind = next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), "")
    # Behind the length of its header, which can be any number.
    kind = "a safetensors file" if start[8:10] == b'{"' else kind
    hint = f"; it is {kind}" if kind else ""
    raise UserError(f"it is neither a zip of torch.save nor a pickle{hint}")

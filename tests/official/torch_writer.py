"""Writes files of torch.save and pickled modules, opcode by opcode, for the tests: well-formed
ones and traps."""

import math
import pickle
import struct
import zipfile
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

CODES = {
    "<f4": "FloatStorage",
    "<f2": "HalfStorage",
    "<f8": "DoubleStorage",
    "<i8": "LongStorage",
    "bf16": "BFloat16Storage",
}
SOURCE = "raise SystemExit('embedded code was executed')"


@dataclass
class Global:
    """A name, module and attribute."""

    module: str
    name: str


@dataclass
class Call:
    """REDUCE."""

    function: Any
    args: Any = ()
    state: Any = None  # BUILD


@dataclass
class New:
    """NEWOBJ."""

    cls: Any
    state: Any = None


@dataclass
class Persistent:
    tag: Any


@dataclass
class Raw:
    """Opcodes as they are."""

    code: bytes


def dumps(value: Any, protocol: int = 2) -> bytes:
    return pickle.PROTO + bytes([protocol]) + emit(value, protocol) + pickle.STOP


def emit(value: Any, protocol: int = 2) -> bytes:
    """The opcodes that push a value. bytes use protocol 3's opcode."""

    def many(items: Any) -> bytes:
        return pickle.MARK + b"".join(emit(item, protocol) for item in items)

    match value:
        case None | True | False:
            return {None: pickle.NONE, True: pickle.NEWTRUE, False: pickle.NEWFALSE}[value]
        case int():
            data = value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True)
            return (
                pickle.BININT1 + bytes([value])
                if 0 <= value < 256
                else pickle.LONG1 + bytes([len(data)]) + data
            )
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case bytes():
            return pickle.BINBYTES + struct.pack("<I", len(value)) + value
        case tuple():
            return many(value) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + many(value) + pickle.APPENDS
        case dict():
            return (
                pickle.EMPTY_DICT
                + many(x for pair in value.items() for x in pair)
                + pickle.SETITEMS
            )
        case Global(module, name) if protocol >= 4:
            return emit(module) + emit(name) + pickle.STACK_GLOBAL
        case Global(module, name):
            return pickle.GLOBAL + f"{module}\n{name}\n".encode()
        case Call(function, args, state):
            built = b"" if state is None else emit(state, protocol) + pickle.BUILD
            return emit(function, protocol) + emit(args, protocol) + pickle.REDUCE + built
        case New(cls, state):
            built = b"" if state is None else emit(state, protocol) + pickle.BUILD
            return emit(cls, protocol) + emit((), protocol) + pickle.NEWOBJ + built
        case Persistent(tag):
            return emit(tag, protocol) + pickle.BINPERSID
        case Raw(code):
            return code
    raise TypeError(type(value))


@dataclass
class Storages:
    """The storages of a file: members of the zip or, if legacy, behind the pickles; else
    streams within the pickle.
    place: the tag to be ignored; counts: elements."""

    zipped: bool
    legacy: bool = False
    place: str = "cuda:0"
    data: dict[str, bytes] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def storage(self, raw: bytes, dtype: str, **changes: Any) -> Any:
        """changes: to what the storage claims (count, kind, key, view, keys, little_endian,
        stored)."""
        key = changes.get("key", str(len(self.data)))
        count = changes.get("count", len(raw) // (2 if dtype == "bf16" else int(dtype[-1])))
        kind = changes.get("kind", Global("torch", CODES[dtype]))
        self.data[key], self.counts[key] = raw, count
        if self.legacy:
            return Persistent(("storage", kind, key, self.place, count, None))
        if self.zipped:
            return Persistent(("storage", kind, key, self.place, count))
        tag = ("storage", kind, key, self.place, count, changes.get("view"))
        stream = (
            legacy_header(changes.get("little_endian", True))
            + dumps(Persistent(tag))
            + dumps([key])
        )
        return Call(
            Global("torch.storage", "_load_from_bytes"),
            (stream + struct.pack("<q", changes.get("stored", count)) + raw,),
        )

    def tensor(self, array: np.ndarray, dtype: str = "<f4") -> Call:
        """A contiguous tensor; bf16 keeps the upper half of float32."""
        if dtype == "bf16":
            raw = (np.ascontiguousarray(array, "<f4").view("<u4") >> 16).astype("<u2").tobytes()
        else:
            raw = np.ascontiguousarray(array, dtype).tobytes()
        strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
        return self.window(self.storage(raw, dtype), 0, array.shape, strides)

    def window(self, storage: Any, offset: Any, size: Any, stride: Any) -> Call:
        return Call(
            Global("torch._utils", "_rebuild_tensor_v2"),
            (storage, offset, size, stride, True, Call(Global("collections", "OrderedDict"))),
        )


ORDERED = Global("collections", "OrderedDict")


def legacy_header(little_endian: bool = True) -> bytes:
    system = {"protocol_version": 1001, "little_endian": little_endian, "type_sizes": {}}
    return b"".join(dumps(part) for part in (0x1950A86A20F9469CFC6C, 1001, system))


def state_dict(tensors: dict[str, Any], **more: Any) -> Raw:
    """What `state_dict()` returns: an OrderedDict with an attribute, the versions of the
    modules."""
    items = (
        pickle.MARK + b"".join(emit(x) for pair in tensors.items() for x in pair) + pickle.SETITEMS
    )
    return Raw(
        emit(Call(ORDERED))
        + items
        + emit({"_metadata": {"": {"version": 1}}} | more)
        + pickle.BUILD
    )


def parameter(tensor: Any) -> Call:
    return Call(Global("torch._utils", "_rebuild_parameter"), (tensor, True, Call(ORDERED)))


def persistent(class_name: str, state: Any, source: str = SOURCE, **more: Any) -> Call:
    """An object that carries its source text."""
    meta = {
        "type": "class",
        "version": 6,
        "module_src": source,
        "class_name": class_name,
        "state": state,
    }
    return Call(Global("torch_utils.persistence", "_reconstruct_persistent_obj"), (meta | more,))


def module_state(parameters: dict, buffers: dict, children: Any, **more: Any) -> dict:
    return {
        "training": False,
        "_parameters": parameters,
        "_buffers": buffers,
        "_modules": children,
        "_non_persistent_buffers_set": Call(Global("builtins", "set"), ([],)),
        "_init_args": (),
        "_init_kwargs": {},
    } | more


def network(params: dict[str, Any], arguments: dict, class_name: str = "EDMPrecond") -> Call:
    """A module with these parameters ({official name: tensor}); entries named resample_filter
    are buffers."""

    def build(level: dict[str, Any], name: str, depth: int) -> Any:
        groups: list[dict[str, Any]] = [{}, {}, {}]
        nodes: dict[str, dict[str, Any]] = {}
        for key, tensor in level.items():
            head, _, rest = key.partition(".")
            if rest:
                nodes.setdefault(head, {})[rest] = tensor
            elif head == "resample_filter":
                groups[1][head] = tensor
            else:
                groups[0][head] = parameter(tensor)
        groups[0].setdefault("bias", None)
        groups[2] = {key: build(node, key, depth + 1) for key, node in nodes.items()}
        if name in ("enc", "dec"):
            return New(Global("torch.nn.modules.container", "ModuleDict"), module_state(*groups))
        more = {"_init_kwargs": arguments} if depth == 0 else {}
        return persistent(class_name if depth == 0 else "Layer", module_state(*groups, **more))

    return build(params, "", 0)


def write_zip(
    path: Path,
    top: Any,
    storages: Storages,
    folder: str = "archive",
    skip: tuple[str, ...] = (),
    more: dict[str, bytes] | None = None,
    compression: int = zipfile.ZIP_STORED,
) -> Path:
    """top: a value to pickle, or the bytes of data.pkl. skip: members left out; more: members
    by full name."""
    members = {
        "data.pkl": top if isinstance(top, bytes) else dumps(top),
        "byteorder": b"little",
        "version": b"3\n",
    }
    members |= {f"data/{key}": raw for key, raw in storages.data.items()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in members.items():
            if name not in skip:
                archive.writestr(f"{folder}/{name}", data)
        for name, data in (more or {}).items():
            archive.writestr(name, data)
    return path


def write_legacy(path: Path, top: Any, storages: Storages, keys: list[str] | None = None) -> Path:
    """A file of torch.save before version 1.6. keys: of the storages, in the order of their
    data."""
    order = list(reversed(storages.data)) if keys is None else keys
    raw = [
        struct.pack("<q", storages.counts[key]) + storages.data[key]
        for key in order
        if isinstance(key, str)
    ]
    path.write_bytes(legacy_header() + dumps(top) + dumps(order) + b"".join(raw))
    return path


def write_pickle(path: Path, top: Any, protocol: int = 4) -> Path:
    path.write_bytes(top if isinstance(top, bytes) else dumps(top, protocol))
    return path

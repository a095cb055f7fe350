"""Official checkpoint files, read without running anything that is in them (SPEC section 11).

Both formats are pickles of whole module objects that carry the SOURCE TEXT of their classes, which an ordinary load
executes. Here an interpreter of our own walks the opcodes. It knows a fixed list of names, each standing for a plain
container or a conversion below, and refuses every other name and opcode; it imports nothing, calls nothing that a
file brings along, and needs steps and memory in proportion to the file. (`pickle.Unpickler` with a `find_class` is
not enough: huge memo indices, long claimed lengths and nested tuples as dictionary keys exhaust memory or the C stack
before any Python code is asked.)

    .pt   zip of torch.save: <folder>/data.pkl, and one stored member <folder>/data/<key> per storage
    .pkl  plain pickle; each storage is the argument of torch.storage._load_from_bytes, a small pickle stream itself

Tensors are views of the memory-mapped file: nothing is copied unless float32 asks for it.
"""

import math
import mmap
import pickle
import pickletools
import struct
import zipfile
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

MAX_STEPS = 2_000_000           # opcodes in a file: ten times what the largest published one has
MAX_TEXT = 1 << 24              # bytes of one string
MAX_PICKLE = 1 << 28            # bytes of data.pkl in a zip
MAX_ENTRIES = 100_000           # tensors and modules of a network, members of a zip
MAX_DEPTH = 32                  # modules within modules
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class FileError(ValueError):
    """A file that is not an official checkpoint, is damaged or is not trusted; one line for the user."""


@dataclass(frozen=True, kw_only=True)
class Network:
    """A pickled network: parameters and buffers by official name (float32, official layouts, read-only), the class
    it was pickled as, and those constructor arguments that are numbers, texts, or lists and dicts of them."""
    class_name: str
    params: dict[str, np.ndarray]
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """Everything that we use of an official file; the Adam moments by parameter name."""
    ema: Network
    net: Network | None = None
    images_seen: int | None = None
    exp_avg: dict[str, np.ndarray] | None = None
    exp_avg_sq: dict[str, np.ndarray] | None = None


# What a file can be made of, besides None, numbers, texts, bytes (as memoryviews), lists, tuples and dicts

@dataclass(frozen=True)
class _Name:
    """A global on the list. call: what REDUCE does, None for a mere marker; dtype: of a storage class."""
    name: str
    call: Callable[["_Machine", tuple], object] | None = None
    dtype: str = ""


@dataclass(eq=False)
class _Module:
    class_name: str
    state: object = None


@dataclass(frozen=True, eq=False)
class _Dtype:
    code: str


@dataclass(frozen=True, eq=False)
class _Storage:
    """Raw little-endian data. crc: what the bytes must add up to, None if the file does not say."""
    key: str
    dtype: str
    count: int
    data: memoryview
    crc: int | None = None


@dataclass(frozen=True, eq=False)
class _Tensor:
    """A strided window of a storage, checked to lie within it. Offsets and strides count elements."""
    storage: _Storage
    offset: int
    size: tuple[int, ...]
    stride: tuple[int, ...]

    def array(self) -> np.ndarray:
        """float32, read-only; a view of the file where it can be."""
        storage = self.storage
        if storage.crc is not None and zlib.crc32(storage.data) != storage.crc:
            raise FileError(f"storage {storage.key} is damaged (its checksum differs)")
        if storage.dtype not in ("<f2", "<f4", "<f8", "bf16"):
            raise FileError(f"storage {storage.key} has elements of type {storage.dtype!r}, not floating point")
        flat = np.frombuffer(storage.data, np.dtype("<u2" if storage.dtype == "bf16" else storage.dtype))
        strides = [s * flat.itemsize for s in self.stride]
        view = np.lib.stride_tricks.as_strided(flat[self.offset:], self.size, strides, writeable=False)
        if storage.dtype == "bf16":
            view = (view.astype(np.uint32) << 16).view(np.float32)
        view = view.astype(np.float32, copy=False)
        view.flags.writeable = False
        return view


_MARKERS = (_Name, _Module, _Dtype, _Storage, _Tensor)


def _show(value: object) -> str:
    """Something from a file for a message: short, one line, escaped."""
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None), tuple)) else type(value).__name__
    return text if len(text) <= 80 else text[:77] + "..."


def _is_count(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 48


# The names on the list

def _persistent_object(_: "_Machine", args: tuple) -> _Module:
    """Keeps the class name and the state; the embedded source is dropped with the rest."""
    match args:
        case ({"type": "class", "class_name": str(name), **meta},):
            return _Module(name, meta.get("state"))
    raise FileError("a persistent object is not in the expected form")


def _rebuild_tensor(_: "_Machine", args: tuple) -> _Tensor:
    """(storage, offset, size, stride, ...) -> a window that lies within its storage."""
    match args:
        case (_Storage() as storage, offset, tuple(size), tuple(stride), *_):
            if len(size) > 8 or len(size) != len(stride) or not all(map(_is_count, (offset, *size, *stride))):
                raise FileError(f"a tensor has an impossible size or stride: {_show(size)}, {_show(stride)}")
            end = offset + (sum((n - 1) * s for n, s in zip(size, stride, strict=True)) + 1 if math.prod(size) else 0)
            if end > storage.count or math.prod(size) > storage.count:
                raise FileError(f"a tensor of size {_show(size)} lies outside its storage {_show(storage.key)} of "
                                f"{storage.count} elements")
            return _Tensor(storage, offset, size, stride)
    raise FileError("a tensor is not in the expected form")


def _rebuild_parameter(_: "_Machine", args: tuple) -> _Tensor:
    if not args or not isinstance(args[0], _Tensor):
        raise FileError("a parameter is not a tensor")
    return args[0]


def _load_from_bytes(machine: "_Machine", args: tuple) -> _Storage:
    """The legacy stream of one storage: magic, protocol, system, the storage, its keys, a count and the raw data."""
    if len(args) != 1 or not isinstance(args[0], memoryview):
        raise FileError("torch.storage._load_from_bytes without bytes")
    inner = _Machine(args[0], _STORAGES, _legacy_storage, machine.budget)
    magic, protocol, system, storage, keys = [inner.run() for _ in range(5)]
    if magic != LEGACY_MAGIC or protocol != 1001 or not isinstance(storage, _Storage) or keys != [storage.key]:
        raise FileError("a storage is not in torch's legacy format")
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise FileError("a storage is not little-endian")
    (count,) = struct.unpack("<q", inner.take(8))
    if count != storage.count:
        raise FileError(f"storage {_show(storage.key)} has {count} elements where {storage.count} were announced")
    return replace(storage, data=inner.take(count * _itemsize(storage.dtype)))


def _numpy_dtype(_: "_Machine", args: tuple) -> _Dtype:
    code = args[0] if args else None
    if not isinstance(code, str) or code not in ("b1", "i1", "u1", "i2", "u2", "i4", "u4", "i8", "u8", "f2", "f4", "f8"):
        raise FileError(f"numpy type {_show(code)} is not on the list")
    return _Dtype(code)


def _numpy_scalar(_: "_Machine", args: tuple) -> object:
    match args:
        case (_Dtype(code), memoryview() as data) if len(data) == np.dtype(code).itemsize:
            return np.frombuffer(data, "<" + code)[0].item()
    raise FileError("a numpy number is not in the expected form")


def _encode(_: "_Machine", args: tuple) -> memoryview:
    match args:
        case (str(text), "latin1"):
            return memoryview(text.encode("latin1"))
    raise FileError("_codecs.encode is only known for text as latin1")


def _set(_: "_Machine", args: tuple) -> list:
    match args:
        case (list(items),):
            return items
    raise FileError("a set is not made of a list")


def _ordered_dict(_: "_Machine", args: tuple) -> dict:
    if args:
        raise FileError("collections.OrderedDict with arguments")
    return {}


def _table(*names: _Name) -> dict[str, _Name]:
    return {name.name: name for name in names}


_STORAGES = _table(*(_Name(f"torch.{kind}Storage", None, code) for kind, code in {
    "Float": "<f4", "Half": "<f2", "Double": "<f8", "BFloat16": "bf16", "Long": "<i8", "Int": "<i4", "Short": "<i2",
    "Char": "<i1", "Byte": "<u1", "Bool": "<b1"}.items()))
_NAMES = _STORAGES | _table(
    _Name("torch_utils.persistence._reconstruct_persistent_obj", _persistent_object),
    _Name("torch._utils._rebuild_tensor_v2", _rebuild_tensor), _Name("torch._utils._rebuild_parameter", _rebuild_parameter),
    _Name("torch.storage._load_from_bytes", _load_from_bytes),
    _Name("torch.nn.modules.container.ModuleDict"), _Name("torch.nn.modules.container.ModuleList"),
    _Name("collections.OrderedDict", _ordered_dict), _Name("builtins.set", _set), _Name("__builtin__.set", _set),
    _Name("numpy.core.multiarray.scalar", _numpy_scalar), _Name("numpy._core.multiarray.scalar", _numpy_scalar),
    _Name("numpy.dtype", _numpy_dtype), _Name("_codecs.encode", _encode))


def _itemsize(dtype: str) -> int:
    return int(dtype[-1]) if dtype != "bf16" else 2


def _storage_id(tag: object, length: int) -> tuple[str, str, int]:
    """('storage', class, key, place, count[, None]) -> key, dtype, count; the place is ignored."""
    match tag:
        case ("storage", _Name(dtype=dtype), str(key), str(), count, *rest) if dtype and _is_count(count):
            if len(tag) == length and not any(rest):
                return key, dtype, count
    raise FileError("a persistent id is not that of a storage")


def _legacy_storage(tag: object) -> _Storage:
    key, dtype, count = _storage_id(tag, 6)
    return _Storage(key, dtype, count, memoryview(b""))


# The interpreter

class _Budget:
    """Steps left for a file, nested streams included."""
    steps = MAX_STEPS


class _Machine:
    """Interprets the pickles that follow each other in `data`. Nothing in here recurses."""

    def __init__(self, data: memoryview, names: Mapping[str, _Name], storage: Callable[[object], _Storage],
                 budget: _Budget) -> None:
        self.data, self.names, self.storage, self.budget, self.at = data, names, storage, budget, 0
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, object] = {}

    def run(self) -> object:
        """The object of the next pickle."""
        self.stack, self.marks, self.memo = [], [], {}
        while (code := self.take(1)[0]) != pickle.STOP[0]:
            self.budget.steps -= 1
            if self.budget.steps < 0:
                raise FileError("it has far more objects than any official file")
            step = _STEPS.get(code)
            if step is None:
                known = pickletools.code2op.get(chr(code))
                raise FileError(f"pickle opcode {known.name if known else hex(code)} is not on the list")
            step(self)
        return self.pop()

    def take(self, count: int) -> memoryview:
        """The next bytes, not copied. Raises FileError past the end, whatever the claimed length."""
        if count < 0 or count > len(self.data) - self.at:
            raise FileError("it is truncated or damaged (it ends inside an object)")
        self.at += count
        return self.data[self.at - count:self.at]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def text(self, form: str) -> str:
        length = self.number(form)
        if length > MAX_TEXT:
            raise FileError(f"a text of {length} bytes is longer than any in an official file")
        return str(self.take(length), "utf-8", "surrogatepass")

    def line(self) -> str:
        end = bytes(self.data[self.at:self.at + 256]).find(b"\n")
        if end < 0:
            raise FileError("a name has no end")
        return str(self.take(end + 1)[:-1], "utf-8")

    def integer(self, form: str) -> int:
        length = self.number(form)
        if not 0 <= length <= 32:
            raise FileError(f"an integer of {length} bytes is longer than any in an official file")
        return int.from_bytes(self.take(length), "little", signed=True)

    def pop(self) -> Any:
        if len(self.stack) <= (self.marks[-1] if self.marks else 0):
            raise FileError("it is damaged (an operand is missing)")
        return self.stack.pop()

    def pop_mark(self) -> list:
        if not self.marks:
            raise FileError("it is damaged (a mark is missing)")
        start = self.marks.pop()
        items = self.stack[start:]
        del self.stack[start:]
        return items

    def top(self, kind: type) -> Any:
        """The topmost object, left on the stack."""
        value = self.pop()
        self.stack.append(value)
        if type(value) is not kind:
            raise FileError(f"it is damaged or hostile ({_show(value)} is used as a {kind.__name__})")
        return value

    def tuple_of(self, count: int) -> tuple:
        return tuple(self.pop() for _ in range(count))[::-1]

    def put(self, index: int) -> None:
        value = self.pop()
        self.stack.append(value)
        self.memo[index] = value

    def get(self, index: int) -> object:
        if index not in self.memo:
            raise FileError(f"it is damaged (object {index} is used before it exists)")
        return self.memo[index]

    def set_items(self, items: Sequence[Any]) -> None:
        target = self.top(dict)
        if len(items) % 2:
            raise FileError("it is damaged (a key has no value)")
        for key, value in zip(items[::2], items[1::2], strict=True):
            if not isinstance(key, (str, int, float, bool, type(None))):
                raise FileError(f"a key of type {type(key).__name__} is not on the list")
            target[key] = value

    def lookup(self, module: object, name: object) -> _Name:
        found = self.names.get(f"{module}.{name}") if type(module) is str and type(name) is str else None
        if found is None:
            label = f"{module}.{name}" if type(module) is str and type(name) is str else "a name that is no text"
            raise FileError(f"it asks for {_show(label)}, which is not on the list of allowed names")
        return found

    def global_name(self) -> _Name:
        return self.lookup(self.line(), self.line())

    def stack_global(self) -> _Name:
        return self.lookup(*self.tuple_of(2))

    def reduce(self) -> object:
        function, args = self.tuple_of(2)
        if not isinstance(function, _Name) or function.call is None or type(args) is not tuple:
            label = function.name if isinstance(function, _Name) else type(function).__name__
            raise FileError(f"it calls {_show(label)}, which is not a function on the list")
        return function.call(self, args)

    def new_object(self) -> _Module:
        cls, args = self.tuple_of(2)
        if not isinstance(cls, _Name) or cls.call or cls.dtype or args != ():
            raise FileError("it creates an object of a class that is not on the list")
        return _Module(cls.name.rpartition(".")[2])

    def build(self) -> None:
        """The state of a module or a numpy type; nothing else has one."""
        state, target = self.pop(), self.pop()
        self.stack.append(target)
        if isinstance(target, _Module) and type(state) is dict and target.state is None:
            target.state = state
        elif not (isinstance(target, _Dtype) and type(state) is tuple and state[1:2] in (("<",), ("|",))):
            raise FileError(f"it sets the state of a {type(target).__name__.strip('_').lower()}, which is not on the list")


def _push(value: Callable[[_Machine], object]) -> Callable[[_Machine], None]:
    return lambda machine: machine.stack.append(value(machine))


def _step_table() -> dict[int, Callable[[_Machine], Any]]:
    pushes: dict[bytes, Callable[[_Machine], object]] = {
        pickle.NONE: lambda m: None, pickle.NEWTRUE: lambda m: True, pickle.NEWFALSE: lambda m: False,
        pickle.BININT: lambda m: m.number("<i"), pickle.BININT1: lambda m: m.number("<B"),
        pickle.BININT2: lambda m: m.number("<H"), pickle.BINFLOAT: lambda m: m.number(">d"),
        pickle.LONG1: lambda m: m.integer("<B"), pickle.LONG4: lambda m: m.integer("<i"),
        pickle.BINUNICODE: lambda m: m.text("<I"), pickle.SHORT_BINUNICODE: lambda m: m.text("<B"),
        pickle.BINUNICODE8: lambda m: m.text("<Q"),
        pickle.BINBYTES: lambda m: m.take(m.number("<I")), pickle.SHORT_BINBYTES: lambda m: m.take(m.number("<B")),
        pickle.BINBYTES8: lambda m: m.take(m.number("<Q")),
        pickle.EMPTY_LIST: lambda m: [], pickle.EMPTY_DICT: lambda m: {}, pickle.EMPTY_SET: lambda m: [],
        pickle.EMPTY_TUPLE: lambda m: (), pickle.TUPLE1: lambda m: m.tuple_of(1), pickle.TUPLE2: lambda m: m.tuple_of(2),
        pickle.TUPLE3: lambda m: m.tuple_of(3), pickle.TUPLE: lambda m: tuple(m.pop_mark()),
        pickle.BINGET: lambda m: m.get(m.number("<B")), pickle.LONG_BINGET: lambda m: m.get(m.number("<I")),
        pickle.GLOBAL: _Machine.global_name, pickle.STACK_GLOBAL: _Machine.stack_global,
        pickle.REDUCE: _Machine.reduce, pickle.NEWOBJ: _Machine.new_object,
        pickle.BINPERSID: lambda m: m.storage(m.pop()),
    }
    actions: dict[bytes, Callable[[_Machine], Any]] = {
        pickle.PROTO: lambda m: m.take(1), pickle.FRAME: lambda m: m.take(8),
        pickle.MARK: lambda m: m.marks.append(len(m.stack)),
        pickle.BINPUT: lambda m: m.put(m.number("<B")), pickle.LONG_BINPUT: lambda m: m.put(m.number("<I")),
        pickle.MEMOIZE: lambda m: m.put(len(m.memo)), pickle.BUILD: _Machine.build,
        pickle.APPEND: lambda m: (item := m.pop(), m.top(list).append(item)),
        pickle.APPENDS: lambda m: (items := m.pop_mark(), m.top(list).extend(items)),
        pickle.ADDITEMS: lambda m: (items := m.pop_mark(), m.top(list).extend(items)),
        pickle.SETITEM: lambda m: m.set_items(m.tuple_of(2)), pickle.SETITEMS: lambda m: m.set_items(m.pop_mark()),
    }
    return {code[0]: _push(value) for code, value in pushes.items()} | {code[0]: act for code, act in actions.items()}


_STEPS = _step_table()


# The two containers

def _zip_storages(path: Path, whole: memoryview) -> tuple[memoryview, Callable[[object], _Storage]]:
    """data.pkl of a torch.save zip, and what finds its storages. Members are views: none is decompressed."""
    members: dict[str, zipfile.ZipInfo] = {}
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    if len(entries) > MAX_ENTRIES:
        raise FileError(f"it has {len(entries)} members, far more than any official file")
    tops = {entry.filename.partition("/")[0] for entry in entries}
    for entry in entries:
        name, parts = entry.filename, entry.filename.split("/")
        if not all(parts) or ".." in parts or "." in parts or "\\" in name or ":" in name or "\0" in entry.orig_filename:
            raise FileError(f"member {_show(name)} has a name that no official file has")
        if len(parts) < 2 or len(tops) > 1:
            raise FileError("it is a zip, but not one of torch.save (its members are not in one folder)")
        if parts[1] in ("code", "constants.pkl"):
            raise FileError("it is a TorchScript program, not an official checkpoint")
        if "/".join(parts[1:]) in members:
            raise FileError(f"member {_show(name)} occurs twice")
        if entry.flag_bits & 0x41:
            raise FileError(f"member {_show(name)} is encrypted")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size:
            raise FileError(f"member {_show(name)} is compressed; torch.save never does that")
        members["/".join(parts[1:])] = entry

    def view(entry: zipfile.ZipInfo) -> memoryview:
        at = entry.header_offset
        header = whole[at:at + 30] if 0 <= at < len(whole) else b""
        if len(header) < 30 or header[:4] != b"PK\3\4":
            raise FileError(f"member {_show(entry.filename)} is damaged or missing")
        lengths = struct.unpack("<HH", header[26:30])
        start = at + 30 + sum(lengths)
        if whole[at + 30:at + 30 + lengths[0]] != entry.orig_filename.encode("utf-8") \
                or start + entry.file_size > len(whole):
            raise FileError(f"member {_show(entry.filename)} is damaged or lies outside the file")
        return whole[start:start + entry.file_size]

    if "data.pkl" not in members:
        raise FileError("it is a zip, but not one of torch.save (it has no data.pkl)")
    if "byteorder" in members and view(members["byteorder"]) != b"little":
        raise FileError("its storages are not little-endian")
    entry = members["data.pkl"]
    if entry.file_size > MAX_PICKLE:
        raise FileError(f"its data.pkl has {entry.file_size} bytes, far more than in any official file")
    program = view(entry)
    if zlib.crc32(program) != entry.CRC:
        raise FileError("its data.pkl is damaged (the checksum differs)")

    def storage(tag: object) -> _Storage:
        key, dtype, count = _storage_id(tag, 5)
        entry = members.get(f"data/{key}")
        if entry is None:
            raise FileError(f"storage {_show(key)} is missing")
        if entry.file_size != count * _itemsize(dtype):
            raise FileError(f"storage {_show(key)} has {entry.file_size} bytes, not the announced {count} elements")
        return _Storage(key, dtype, count, view(entry), entry.CRC)

    return program, storage


def _no_storage(_: object) -> _Storage:
    raise FileError("a persistent id in a plain pickle")


_FOREIGN = {b"\x89PNG": "a PNG image", b"\xff\xd8\xff": "a JPEG image", b"\x1f\x8b": "a gzip file", b"<": "a web page",
            b"\x93NUMPY": "a numpy array", b"\x89HDF": "an HDF5 file", b"version https://git-lfs": "a Git LFS pointer"}


def _load(path: Path) -> object:
    """The top object of a file of either format, told apart by content."""
    if not path.is_file():
        raise FileError("there is no such file" if not path.exists() else "it is not a file")
    if path.stat().st_size == 0:
        raise FileError("it is empty")
    with path.open("rb") as file:
        whole = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
    start = bytes(whole[:32])
    if start[:4] == b"PK\3\4":
        return _Machine(*_with_names(*_zip_storages(path, whole))).run()
    if start[:1] == pickle.PROTO and start[1:2] in (b"\2", b"\3", b"\4", b"\5"):
        top = _Machine(*_with_names(whole, _no_storage)).run()
        if top == LEGACY_MAGIC:
            raise FileError("it was written by torch.save before version 1.6, as no official file is; save it anew")
        return top
    kind = next((kind for magic, kind in _FOREIGN.items() if start.startswith(magic)), "")
    if start[8:10] == b'{"':
        kind = "a safetensors file"
    raise FileError(f"it is not an official checkpoint (neither a zip of torch.save nor a pickle){kind and '; it is ' + kind}")


def _with_names(data: memoryview, storage: Callable[[object], _Storage]) -> tuple:
    return data, _NAMES, storage, _Budget()


# From objects to networks

def _tensors(module: object) -> Iterator[tuple[str, _Tensor, bool]]:
    """(name, tensor, is it a parameter) of a module, in torch's order: its own first, then those of its children."""
    entries = 0
    stack: list[tuple[str, object, int]] = [("", module, 0)]
    while stack:
        prefix, node, depth = stack.pop()
        state = node.state if isinstance(node, _Module) else None
        if not isinstance(state, dict) or depth > MAX_DEPTH:
            raise FileError(f"{_show(prefix or 'the network')} is not a module")
        groups = [state.get(k) for k in ("_parameters", "_buffers", "_modules")]
        if not all(isinstance(group, dict) and all(type(k) is str for k in group) for group in groups):
            raise FileError(f"module {_show(prefix)} has no parameters, buffers or children")
        parameters, buffers, children = groups
        hidden = state.get("_non_persistent_buffers_set") or []
        for group, is_parameter in ((parameters, True), (buffers, False)):
            for name, tensor in group.items():
                if tensor is None or (not is_parameter and name in hidden):
                    continue
                if not isinstance(tensor, _Tensor):
                    raise FileError(f"{_show(prefix + name)} is not a tensor")
                yield prefix + name, tensor, is_parameter
        entries += len(parameters) + len(buffers) + len(children)
        if entries > MAX_ENTRIES:
            raise FileError("its network has far more parts than any official one")
        stack.extend((f"{prefix}{name}.", child, depth + 1) for name, child in reversed(children.items())
                     if child is not None)


def _plain(value: object, depth: int = 0) -> object:
    """Numbers, texts, lists and dicts as they are; None for anything else, or too deep or long."""
    if isinstance(value, (bool, int, float, str, type(None))):
        return value
    if isinstance(value, (list, tuple)) and depth < 3 and len(value) <= 64:
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, dict) and depth < 3 and len(value) <= 64:
        return {str(k): _plain(v, depth + 1) for k, v in value.items()}
    return None


def _network(module: object, what: str) -> Network:
    params: dict[str, np.ndarray] = {}
    for name, tensor, _ in _tensors(module):
        if name in params:
            raise FileError(f"parameter {_show(name)} of {what} occurs twice")
        params[name] = tensor.array()
    assert isinstance(module, _Module) and isinstance(module.state, dict)
    if module.state.get("_init_args"):
        raise FileError(f"the constructor arguments of {what} have no names")
    arguments = _plain(module.state.get("_init_kwargs") or {})
    if not isinstance(arguments, dict) or not params:
        raise FileError(f"{what} has no {'parameters' if isinstance(arguments, dict) else 'constructor arguments'}")
    return Network(class_name=module.class_name, params=params, arguments=arguments)


def _moments(state: object, module: object) -> dict[str, dict[str, np.ndarray]]:
    """Adam's exp_avg and exp_avg_sq by parameter name: the optimizer counts the parameters in torch's order."""
    names = [name for name, _, is_parameter in _tensors(module) if is_parameter]
    match state:
        case {"state": dict(entries), "param_groups": [{"params": list(order)}]} if len(order) == len(names):
            moments: dict[str, dict[str, np.ndarray]] = {"exp_avg": {}, "exp_avg_sq": {}}
            for index, name in zip(order, names, strict=True):
                entry = entries.get(index) if type(index) is int else None
                for key, found in moments.items():
                    tensor = entry.get(key) if isinstance(entry, dict) else None
                    if not isinstance(tensor, _Tensor):
                        raise FileError(f"its optimizer has no {key} of {_show(name)}")
                    found[name] = tensor.array()
            return moments
    raise FileError("its optimizer state is not that of Adam over the parameters of net")


def _images_seen(step: object) -> int | None:
    if isinstance(step, _Tensor) and math.prod(step.size) == 1:
        step = int(step.array().item())
    if step is not None and not _is_count(step):
        raise FileError(f"its step is {_show(step)}, not a number of images")
    return step     # type: ignore[return-value]


def read_official(path: Path | str, networks: Sequence[str] = ("ema", "net"), optimizer: bool = False) -> OfficialFile:
    """Reads an official `.pt` or `.pkl` file, or one of EDM's releases.

    networks: which to read of "ema" and "net"; optimizer: read the Adam moments too. The arrays are read-only views
    of the mapped file wherever it holds float32, so the file must not change while they are in use.
    Raises FileError, one line that names the file.
    """
    path = Path(path)
    try:
        top = _load(path)
        if not isinstance(top, dict) or not isinstance(top.get("ema"), _Module):
            raise FileError("it has no network under 'ema', so it is not an official checkpoint")
        net = top.get("net")
        found = {name: _network(top[name], name) for name in ("ema", "net")
                 if name in networks and top.get(name) is not None}
        moments = _moments(top.get("optimizer_state"), net) if optimizer and top.get("optimizer_state") else {}
        return OfficialFile(ema=found["ema"], net=found.get("net"), images_seen=_images_seen(top.get("step")), **moments)
    except FileError as error:
        raise FileError(f"{path.name}: {error}") from None
    except OSError as error:
        raise FileError(f"{path.name}: it cannot be read ({error.strerror or error})") from error
    except (zipfile.BadZipFile, NotImplementedError, struct.error, ValueError, TypeError, LookupError, OverflowError,
            EOFError, MemoryError) as error:
        raise FileError(f"{path.name}: it is truncated or damaged ({type(error).__name__})") from error

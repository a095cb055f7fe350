"""Official files for the tests: good ones, and HOSTILE, which must be refused: name -> (writes
it into a folder, part of the message)."""

import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from tests.official import torch_writer as tw
from tests.official.torch_writer import Call, Global, New, Persistent, Raw, Storages

RNG = np.random.default_rng(0)
ARRAYS = {
    "model.map.weight": RNG.standard_normal((3, 4), np.float32),
    "model.map.bias": np.arange(3, dtype=np.float32),
    "model.enc.8x8_conv.weight": RNG.standard_normal((2, 3, 3, 3), np.float32),
    "model.enc.8x8_down.conv0.resample_filter": np.full((1, 1, 2, 2), 0.25, np.float32),
}
ARGUMENTS = {
    "img_resolution": 8,
    "channel_mult": [1, 2],
    "dropout": 0.13,
    "sigma_max": float("inf"),
    "label_dim": 0,
}
TRAINED = [name for name in ARRAYS if "filter" not in name]


def write(folder: Path, zipped: bool, build: Callable[[Storages], Any], **options: Any) -> Path:
    storages = Storages(zipped)
    top = build(storages)
    if zipped:
        return tw.write_zip(folder / "file.pt", top, storages, **options)
    return tw.write_pickle(folder / "file.pkl", top, **options)


def net(
    storages: Storages, arrays: dict[str, np.ndarray] = ARRAYS, dtype: str = "<f4", **options: Any
) -> Call:
    return tw.network(
        {name: storages.tensor(a, dtype) for name, a in arrays.items()}, ARGUMENTS, **options
    )


def state(storages: Storages) -> dict[str, Any]:
    """Everything that a training state has."""
    moments = {
        i: {
            "step": storages.tensor(np.ones(())),
            "exp_avg": storages.tensor(ARRAYS[name] + 1),
            "exp_avg_sq": storages.tensor(ARRAYS[name] + 2),
        }
        for i, name in enumerate(TRAINED)
    }
    return {
        "optimizer_state": {
            "state": moments,
            "param_groups": [{"lr": 1e-4, "params": [*range(len(TRAINED))]}],
        },
        "step": 10240,
        "ema": net(storages),
        "net": net(storages, {k: 2 * v for k, v in ARRAYS.items()}),
    }


def _damaged(path: Path, change: Callable[[bytearray], bytes | bytearray]) -> Path:
    path.write_bytes(change(bytearray(path.read_bytes())))
    return path


def _text(data: bytes) -> Callable[[Path], Path]:
    return lambda folder: tw.write_pickle(folder / "file.pkl", data)


def _ema(build: Callable[[Storages], Any], zipped: bool = True) -> Callable[[Path], Path]:
    """A file whose network has one parameter made by `build`."""
    return lambda folder: write(
        folder, zipped, lambda s: {"ema": tw.network({"model.w": build(s)}, {})}
    )


def _window(
    offset: Any, size: Any, stride: Any, zipped: bool = True, **claims: Any
) -> Callable[[Path], Path]:
    """A file whose only tensor is a window of a storage of 8 bytes; claims: what the storage
    says wrongly."""
    return _ema(
        lambda s: s.window(s.storage(bytes(8), "<f4", **claims), offset, size, stride), zipped
    )


def beside(value: Any, protocol: int = 4) -> Callable[[Path], Path]:
    """A plain pickle of anything beside a good network."""
    return lambda folder: write(
        folder, False, lambda s: {"ema": net(s), "loss_fn": value}, protocol=protocol
    )


def _zip(**options: Any) -> Callable[[Path], Path]:
    return lambda folder: write(folder, True, lambda s: {"ema": net(s)}, **options)


def _legacy(build: Callable[[Storages], Any], keys: Any = None) -> Callable[[Path], Path]:
    """A file of torch.save before version 1.6."""
    storages = Storages(True, legacy=True)
    return lambda folder: tw.write_legacy(
        folder / "file.pth", {"ema": build(storages)}, storages, keys
    )


def _encrypted(folder: Path) -> Path:
    def patch(data: bytearray) -> bytearray:
        for signature, offset in ((b"PK\3\4", 6), (b"PK\1\2", 8)):
            at = data.find(signature)
            while at >= 0:
                data[at + offset] |= 1
                at = data.find(signature, at + 1)
        return data

    return _damaged(_zip()(folder), patch)


def _flip_storage(folder: Path) -> Path:
    raw = ARRAYS["model.map.weight"].tobytes()
    return _damaged(_zip()(folder), lambda data: data.replace(raw, bytes([raw[0] ^ 1]) + raw[1:]))


def _foreign_zip(*names: str) -> Callable[[Path], Path]:
    def build(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "file.zip", "w") as archive:
            for name in names:
                archive.writestr(name, b"content")
        return folder / "file.zip"

    return build


def _cyclic(folder: Path) -> Path:
    """A module that is its own child."""
    inner = tw.persistent("Layer", tw.module_state({}, {}, Raw(pickle.BINGET + b"\x07")))
    children = Raw(
        pickle.EMPTY_DICT
        + pickle.BINPUT
        + b"\x07"
        + tw.emit("again")
        + tw.emit(inner)
        + pickle.SETITEM
    )
    return tw.write_pickle(
        folder / "file.pkl", {"ema": tw.persistent("EDMPrecond", tw.module_state({}, {}, children))}
    )


def _doubling(folder: Path) -> Path:
    """Thirty modules, each twice the child of the next: 2^30 names."""
    top = tw.persistent("Layer", tw.module_state({}, {}, {}))
    for i in range(30):
        twice = {
            "a": Raw(tw.emit(top) + pickle.BINPUT + bytes([i])),
            "b": Raw(pickle.BINGET + bytes([i])),
        }
        top = tw.persistent("EDMPrecond", tw.module_state({}, {}, twice))
    return tw.write_pickle(folder / "file.pkl", {"ema": top})


ORDERED, FLOATS = Global("collections", "OrderedDict"), Global("torch", "FloatStorage")
SCALAR, PERSISTENT = (
    Global("numpy.core.multiarray", "scalar"),
    Global("torch_utils.persistence", "_reconstruct_persistent_obj"),
)
SYSTEM = Global("os", "system")
TOUCH = ("touch canary",)
NESTED_TUPLES = b")" + (pickle.BINPUT + b"\x09" + pickle.BINGET + b"\x09" + pickle.TUPLE2) * 90
DTYPE = Global("numpy", "dtype")

HOSTILE: dict[str, tuple[Callable[[Path], Path], str]] = {
    # foreign and damaged
    "empty": (_text(b""), "empty"),
    "text": (_text(b"These are not the weights\n"), "neither a zip"),
    "web page": (_text(b"<!DOCTYPE html><html>"), "web page"),
    "png": (_text(b"\x89PNG\r\n\x1a\n" + bytes(64)), "PNG"),
    "safetensors": (_text(struct.pack("<Q", 16) + b'{"a":{}}        '), "safetensors"),
    "git lfs pointer": (_text(b"version https://git-lfs.github.com/spec/v1\n"), "LFS"),
    "torchscript": (
        _foreign_zip("m/data.pkl", "m/code/__torch__.py", "m/constants.pkl"),
        "TorchScript",
    ),
    "npz": (_foreign_zip("a.npy", "b.npy"), "not one of torch.save"),
    "legacy header alone": (_text(tw.dumps(0x1950A86A20F9469CFC6C) + tw.dumps(1001)), "truncated"),
    "missing": (lambda folder: folder / "nothing.pt", "no such file"),
    "folder": (lambda folder: folder, "not a file"),
    "truncated zip": (lambda f: _damaged(_zip()(f), lambda d: d[: len(d) // 2]), "truncated"),
    "truncated pickle": (
        lambda f: _damaged(beside(None)(f), lambda d: d[: len(d) // 2]),
        "truncated",
    ),
    "zip without its end": (lambda f: _damaged(_zip()(f), lambda d: d[:-10]), "truncated"),
    "only a pickle header": (_text(b"\x80\x04"), "truncated"),
    # zip
    "path traversal": (_zip(more={"archive/../../evil": b"x"}), "'archive/../../evil'"),
    "absolute name": (_zip(more={"/etc/evil": b"x"}), "'/etc/evil'"),
    "backslash name": (_zip(more={"archive/..\\evil": b"x"}), "name that no official"),
    "duplicate member": (_zip(more={"archive/version": b"4"}), "twice"),
    "two folders": (_zip(more={"other/thing": b"4"}), "single folder"),
    "encrypted": (_encrypted, "encrypted"),
    "compressed": (_zip(compression=zipfile.ZIP_DEFLATED), "compressed"),
    "no data.pkl": (_zip(skip=("data.pkl",)), "data.pkl"),
    "missing storage": (_zip(skip=("data/2",)), "'2' is missing"),
    "damaged storage": (_flip_storage, "checksum"),
    "damaged data.pkl": (
        lambda f: _damaged(_zip()(f), lambda d: d.replace(b"EDMPrecond", b"EDMprecond")),
        "checksum",
    ),
    "big-endian zip": (
        _zip(skip=("byteorder",), more={"archive/byteorder": b"big"}),
        "little-endian",
    ),
    "other name in front of the data": (
        lambda f: _damaged(_zip()(f), lambda d: d.replace(b"archive/data/1", b"archive/data/9", 1)),
        "damaged",
    ),
    # calls
    "os.system": (beside(Call(SYSTEM, TOUCH)), "'os.system'"),
    "os.system in a zip": (
        lambda f: write(f, True, lambda s: {"ema": Call(SYSTEM, TOUCH)}),
        "'os.system'",
    ),
    "posix.system": (beside(Call(Global("posix", "system"), TOUCH), 2), "'posix.system'"),
    "eval": (beside(Call(Global("builtins", "eval"), ("open('canary', 'w')",))), "'builtins.eval'"),
    "getattr": (
        beside(Call(Global("builtins", "getattr"), (Global("numpy", "dtype"), "mro"))),
        "'builtins.getattr'",
    ),
    "dotted name": (beside(Call(Global("numpy", "dtype.mro"), ())), "'numpy.dtype.mro'"),
    "numpy reconstruct": (
        beside(Call(Global("numpy.core.multiarray", "_reconstruct"), ())),
        "_reconstruct",
    ),
    "name that is no text": (
        beside(Raw(tw.emit("os") + tw.emit(1) + pickle.STACK_GLOBAL)),
        "not text",
    ),
    "name without end": (beside(Raw(pickle.GLOBAL + b"os" * 200)), "no end"),
    "calling a result": (beside(Call(Call(ORDERED), TOUCH)), "calls"),
    "calling a text": (beside(Call("os.system", TOUCH)), "calls"),
    "calling a class": (beside(Call(FLOATS, (8,))), "calls 'torch.FloatStorage'"),
    "arguments that are a list": (beside(Call(ORDERED, [])), "calls"),
    "OrderedDict of things": (beside(Call(ORDERED, ([],))), "OrderedDict"),
    "encode with another codec": (
        beside(Call(Global("_codecs", "encode"), ("x", "rot13"))),
        "encode",
    ),
    "encode of a long text": (
        beside(Call(Global("_codecs", "encode"), ("x" * 10**6, "latin1"))),
        "encode",
    ),
    "numpy object type": (beside(Call(DTYPE, ("O8", False, True))), "'O8'"),
    "numpy scalar of a wrong size": (
        beside(Call(SCALAR, (Call(DTYPE, ("f8",), (3, "<")), b"1234567"))),
        "numpy number",
    ),
    "big-endian numpy scalar": (
        beside(Call(SCALAR, (Call(DTYPE, ("f8",), (3, ">")), b"12345678"))),
        "numpy number",
    ),
    "state of a dict": (beside(Call(ORDERED, (), {"__class__": 1})), "sets the state"),
    "state of a function": (
        beside(Raw(tw.emit(Global("_codecs", "encode"), 4) + tw.emit({"a": 1}) + b"b")),
        "sets the state",
    ),
    "state set twice": (
        beside(
            Raw(
                tw.emit(New(Global("torch.nn.modules.container", "ModuleDict"), {"a": 1}), 4)
                + tw.emit({"__setstate__": SYSTEM.name})
                + b"b"
            )
        ),
        "sets the state",
    ),
    "object of a function": (beside(New(Global("builtins", "set"))), "not a class"),
    "object of an unlisted class": (
        beside(New(Global("subprocess", "Popen"))),
        "'subprocess.Popen'",
    ),
    "INST": (beside(Raw(b"(S'touch canary'\nios\nsystem\n")), "STRING"),
    "INST at once": (beside(Raw(b"(ios\nsystem\n")), "INST"),
    "OBJ": (beside(Raw(b"(" + tw.emit(ORDERED) + b"o")), "OBJ"),
    "EXT1": (beside(Raw(pickle.EXT1 + b"\x01")), "EXT1"),
    "NEWOBJ_EX": (beside(Raw(tw.emit(ORDERED) + b")}" + pickle.NEWOBJ_EX)), "NEWOBJ_EX"),
    "PERSID": (beside(Raw(b"Pstorage\n")), "PERSID"),
    "no opcode": (beside(Raw(b"\xff")), "0xff"),
    "another persistent object": (beside(tw.persistent("A", {}, type="function")), "expected form"),
    "persistent object with extra arguments": (beside(Call(PERSISTENT, ({}, 1))), "expected form"),
    "persistent id in a plain pickle": (
        beside(Persistent(("storage", FLOATS, "0", "cpu", 1))),
        "persistent id",
    ),
    "persistent id of another kind": (
        _ema(lambda s: s.window(Persistent(("module", 1)), 0, (1,), (1,))),
        "persistent id",
    ),
    "persistent id of another class": (
        _window(0, (1,), (1,), kind=Global("collections", "OrderedDict")),
        "persistent id",
    ),
    "persistent id that leaves the folder": (
        _ema(
            lambda s: s.window(
                Persistent(("storage", FLOATS, "../../etc/passwd", "cpu", 1)), 0, (1,), (1,)
            )
        ),
        "missing",
    ),
    # claims
    "claimed bytes": (beside(Raw(pickle.BINBYTES8 + struct.pack("<Q", 1 << 60))), "truncated"),
    "claimed text": (beside(Raw(pickle.BINUNICODE8 + struct.pack("<Q", 1 << 62))), "longer"),
    "claimed integer": (beside(Raw(pickle.LONG4 + struct.pack("<i", 1 << 30))), "longer"),
    "negative integer length": (beside(Raw(pickle.LONG4 + struct.pack("<i", -5))), "longer"),
    "huge memo index": (beside(Raw(pickle.LONG_BINGET + b"\xff\xff\xff\xff")), "before it exists"),
    "tuple as key": (beside(Raw(b"}" + NESTED_TUPLES + tw.emit(1) + pickle.SETITEM)), "key"),
    "tensor as key": (
        _ema(lambda s: Raw(b"}" + tw.emit(s.tensor(np.ones(1))) + tw.emit(1) + pickle.SETITEM)),
        "key",
    ),
    "items of a list": (
        beside(Raw(b"]" + tw.emit("a") + tw.emit("b") + pickle.SETITEM)),
        "not a dict",
    ),
    "append to a tuple": (beside(Raw(b")" + tw.emit("a") + pickle.APPEND)), "not a list"),
    "empty stack": (_text(b"\x80\x04."), "operand"),
    "no mark": (_text(b"\x80\x04" + pickle.TUPLE), "mark"),
    "operand below the mark": (_text(b"\x80\x04NN(" + pickle.TUPLE2), "operand"),
    "too many objects": (_text(b"\x80\x04" + b"}" * 2_100_000), "far more objects"),
    "bad utf-8": (beside(Raw(pickle.SHORT_BINUNICODE + b"\x02\xff\xfe")), "damaged"),
    # tensors
    "size beyond the storage": (_window(0, (3,), (1,)), "outside its storage"),
    "offset beyond the storage": (_window(2, (1,), (1,)), "outside"),
    "stride beyond the storage": (_window(0, (2,), (2,)), "outside"),
    "huge size without stride": (_window(0, (1 << 40,), (0,)), "outside"),
    "huge sizes": (_window(0, (1 << 47,) * 8, (1 << 47,) * 8), "outside"),
    "negative offset": (_window(-1, (1,), (1,)), "impossible"),
    "negative stride": (_window(1, (2,), (-1,)), "impossible"),
    "size that is a float": (_window(0, (1.0,), (1,)), "impossible"),
    "size that is nested": (_window(0, Raw(NESTED_TUPLES), (1, 1)), "impossible"),
    "no storage": (_ema(lambda s: s.window("storage", 0, (1,), (1,))), "expected form"),
    "storage of another length": (_window(0, (3,), (1,), count=3), "8 bytes"),
    "huge storage": (_window(0, (3,), (1,), count=1 << 40), "8 bytes"),
    "huge storage in a pickle": (_window(0, (3,), (1,), False, count=1 << 40), "truncated"),
    "integers": (_ema(lambda s: s.tensor(np.arange(4), "<i8")), "not floating point"),
    "one storage of two types": (
        _ema(
            lambda s: Raw(
                tw.emit(s.tensor(np.arange(4)))
                + tw.emit(
                    s.window(
                        Persistent(("storage", Global("torch", "HalfStorage"), "0", "cpu", 8)),
                        0,
                        (1,),
                        (1,),
                    )
                )
                + pickle.TUPLE2
            )
        ),
        "not 8 elements",
    ),
    "legacy count": (_window(0, (2,), (1,), False, stored=1 << 40), "announced"),
    "legacy keys": (_window(0, (2,), (1,), False, key="\n" * 99, view=()), "persistent id"),
    "big-endian legacy": (_window(0, (2,), (1,), False, little_endian=False), "little-endian"),
    "legacy within legacy": (
        _ema(
            lambda s: s.window(
                Call(
                    Global("torch.storage", "_load_from_bytes"),
                    (tw.dumps(s.storage(bytes(8), "<f4")),),
                ),
                0,
                (2,),
                (1,),
            ),
            False,
        ),
        "'torch.storage._load_from_bytes'",
    ),
    "legacy file with a call": (_legacy(lambda s: Call(SYSTEM, TOUCH)), "'os.system'"),
    "legacy file without data": (_legacy(lambda s: s.tensor(np.ones(2)), keys=[]), "does not fit"),
    "legacy file with a storage twice": (
        _legacy(lambda s: s.tensor(np.ones(2)), keys=["0", "0"]),
        "does not fit",
    ),
    "legacy file with strange keys": (
        _legacy(lambda s: s.tensor(np.ones(2)), keys=[{}]),
        "does not fit",
    ),
    "huge legacy file": (
        _legacy(lambda s: s.window(s.storage(bytes(8), "<f4", count=1 << 40), 0, (1 << 40,), (1,))),
        "truncated",
    ),
    "legacy storage of two types": (
        _legacy(
            lambda s: [
                s.tensor(np.ones(2)),
                Persistent(("storage", Global("torch", "HalfStorage"), "0", "cpu", 2, None)),
            ]
        ),
        "announced twice",
    ),
    "more than metadata": (beside(tw.state_dict({}, evil=1)), "sets the state"),
    "metadata of a list": (
        beside(Raw(b"]" + tw.emit({"_metadata": {}}) + pickle.BUILD)),
        "sets the state",
    ),
    "legacy with a call": (
        _ema(
            lambda s: s.window(
                Call(Global("torch.storage", "_load_from_bytes"), (tw.dumps(Call(SYSTEM, TOUCH)),)),
                0,
                (2,),
                (1,),
            ),
            False,
        ),
        "'os.system'",
    ),
    # networks
    "no network": (_text(tw.dumps({"step": 1})), "'ema'"),
    "a list": (_text(tw.dumps([1, 2])), "'ema'"),
    "ema is a state dict": (
        lambda f: write(f, True, lambda s: {"ema": {"w": s.tensor(np.ones(2))}}),
        "'ema'",
    ),
    "ema is no module": (
        _text(tw.dumps({"ema": tw.persistent("EDMPrecond", {"a": 1})})),
        "no parameters",
    ),
    "no parameters": (_text(tw.dumps({"ema": tw.network({}, {})})), "no parameters"),
    "parameter is a list": (_ema(lambda s: [1, 2]), "not a tensor"),
    "child is a number": (
        _text(tw.dumps({"ema": tw.persistent("EDMPrecond", tw.module_state({}, {}, {"m": 3}))})),
        "not a module",
    ),
    "cyclic modules": (_cyclic, "far more parts"),
    "doubling modules": (_doubling, "far more parts"),
    "one tensor many times": (
        lambda f: write(
            f,
            True,
            lambda s: {
                "ema": tw.network(
                    {
                        f"model.w{i}": Raw(
                            tw.emit(s.tensor(np.ones((64, 64)))) + b"q\x07" if i == 0 else b"h\x07"
                        )
                        for i in range(99)
                    },
                    {},
                )
            },
        ),
        "or its data does",
    ),
    "step is a text": (lambda f: write(f, True, lambda s: {"ema": net(s), "step": "x\ny"}), "step"),
    "no moments": (
        lambda f: write(
            f,
            True,
            lambda s: (
                state(s)
                | {"optimizer_state": {"state": {}, "param_groups": [{"params": [0, 1, 2]}]}}
            ),
        ),
        "no exp_avg",
    ),
    "too few moments": (
        lambda f: write(
            f,
            True,
            lambda s: (
                state(s) | {"optimizer_state": {"state": {}, "param_groups": [{"params": [0]}]}}
            ),
        ),
        "not that of Adam",
    ),
}

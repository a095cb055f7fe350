"""Hostile files for every reader of data: what comes of it is data, or one line that refuses them.

    fuzz("zip", folder, range(300)) -> Outcome

A case is a function of the reader and its number. tests/data/test_fuzz.py
tries a few hundred of each, benchmarks/endurance.py as many as one likes.
"""

import contextlib
import copy
import functools
import io
import json
import os
import random
import resource
import shutil
import struct
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relay_jax.data.decoding import decode_picture, read_header
from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import center_crop_resize
from relay_jax.data.npz import NpzImages
from relay_jax.data.packed import PackedDataset
from relay_jax.data.prepare import prepare
from relay_jax.data.source import Source
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.data.zip import EdmZip
from relay_jax.errors import UserError
from relay_jax.evaluation.published import read_npz

LONGEST_LINE = 400
SLOW = 10.0  # seconds for a file of a few KB
SIDE = 8
_EXTREMES = (0, 1, -1, 127, 255, 256, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF)
_VALUES: tuple[Any, ...] = (
    *(
        None,
        True,
        -1,
        0,
        1.5,
        2**31,
        2**62,
        10**300,
        float("nan"),
        float("inf"),
        "",
        "0",
        "x" * 5000,
    ),
    *([], {}, [[]], {"": {}}, "../../../etc/passwd", "/etc/passwd", "\0", "\ud800", ["a"] * 300),
)


@dataclass
class Outcome:
    """What came of the cases. faults: what should not have come, with the number of its case."""

    cases: int = 0
    read: int = 0
    refused: int = 0
    faults: list[str] = field(default_factory=list)
    slowest: float = 0.0
    grown: float = 0.0  # GB of memory, at the worst case so far


def fuzz(reader: str, folder: Path, numbers: Iterable[int]) -> Outcome:
    """Tries the cases of these numbers on a reader of READERS; they are made in `folder`."""
    outcome, before = Outcome(), _peak()
    for number in numbers:
        place = folder / f"{reader}-{number}"
        place.mkdir(parents=True)
        start = time.monotonic()
        fault = _try(reader, place, number, outcome)
        seconds = time.monotonic() - start
        outcome.cases += 1
        outcome.slowest = max(outcome.slowest, seconds)
        if seconds > SLOW:
            fault = f"{seconds:.0f} seconds"
        if fault:
            outcome.faults.append(f"{reader} {number}: {fault}")
        _remove(place)
    outcome.grown = _peak() - before
    return outcome


def _try(reader: str, place: Path, number: int, outcome: Outcome) -> str:
    """What was wrong with the answer to one case, '' if nothing was."""
    rng = random.Random(f"{reader}/{number}")
    try:
        READERS[reader](place, rng)
    except UserError as error:
        outcome.refused += 1
        message = str(error)
        if "\n" in message or len(message) > LONGEST_LINE:
            return f"a message of {len(message)} characters: {message[:80]!r}"
        return ""
    # Any other error is what this looks for.
    except Exception as error:
        return f"{type(error).__name__}: {str(error)[:120]}"
    outcome.read += 1
    return ""


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def _remove(place: Path) -> None:
    for folder, _, _ in os.walk(place):
        os.chmod(folder, 0o700)
    shutil.rmtree(place)


# Mutations


def mutate(data: bytes, rng: random.Random) -> bytes:
    """Bytes with one to three damages."""
    for _ in range(rng.choice((1, 1, 2, 3))):
        data = rng.choice(_DAMAGES)(data, rng, rng.randrange(len(data) + 1))
    return data


def _flip(data: bytes, rng: random.Random, at: int) -> bytes:
    at = min(at, len(data) - 1)
    return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :] if data else b""


def _cut(data: bytes, rng: random.Random, at: int) -> bytes:
    return data[:at] if rng.random() < 0.5 else data[:at] + data[at + rng.randrange(1, 64) :]


def _insert(data: bytes, rng: random.Random, at: int) -> bytes:
    return data[:at] + rng.randbytes(rng.randrange(1, 64)) + data[at:]


def _repeat(data: bytes, rng: random.Random, at: int) -> bytes:
    return data[:at] + data[at : at + rng.randrange(1, 200)] * rng.randrange(2, 5) + data[at:]


def _overwrite(data: bytes, rng: random.Random, at: int) -> bytes:
    size = rng.choice((1, 2, 4, 8))
    value = rng.choice(_EXTREMES) % (1 << 8 * size)
    return data[:at] + value.to_bytes(size, rng.choice(("little", "big"))) + data[at + size :]


def _zero(data: bytes, rng: random.Random, at: int) -> bytes:
    size = rng.randrange(1, 200)
    return data[:at] + bytes(len(data[at : at + size])) + data[at + size :]


_DAMAGES = (_flip, _flip, _cut, _insert, _repeat, _overwrite, _overwrite, _zero)


def mutate_json(value: Any, rng: random.Random) -> bytes:
    """JSON of another meaning: a value of another type or size, a key less; or of no meaning."""
    if rng.random() < 0.1:
        return rng.choice(
            (b"[" * 200_000, b'{"a":' * 50_000, b"9" * 6000, b"\xff\xfe{}", b"", b"{")
        )
    changed = json.loads(json.dumps(value))
    for _ in range(rng.choice((1, 1, 2))):
        changed = _mutate_node(changed, rng)
    return json.dumps(changed).encode()


def _mutate_node(node: Any, rng: random.Random) -> Any:
    if not isinstance(node, dict | list) or not node or rng.random() < 0.15:
        # A copy: the next damage may be inside of it.
        return copy.deepcopy(rng.choice(_VALUES))
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    key = rng.choice(keys)
    if rng.random() < 0.15:
        del node[key]
    elif rng.random() < 0.15 and isinstance(node, list):
        node.append(node[key])
    else:
        node[key] = _mutate_node(node[key], rng)
    return node


# Readers: each makes the file of a case in a folder, and reads all of it


def _read(source: Source) -> None:
    source.fingerprint()
    for position in range(min(len(source), 20)):
        center_crop_resize(source.picture(position)[0], SIDE)


@functools.cache
def pictures() -> dict[str, bytes]:
    """Small pictures of all formats and kinds, by name."""
    rng = np.random.default_rng(0)
    colour = Image.fromarray(rng.integers(0, 256, (24, 40, 3), np.uint8))
    grey = Image.fromarray(rng.integers(0, 65536, (24, 40)).astype(np.uint16))
    turned = Image.Exif()
    turned[0x0112] = 6
    kinds: dict[str, tuple[Image.Image, str, dict[str, Any]]] = {
        "a.jpg": (colour, "JPEG", {"exif": turned}),
        "progressive.jpeg": (colour, "JPEG", {"progressive": True}),
        "cmyk.jpg": (colour.convert("CMYK"), "JPEG", {}),
        "a.png": (colour, "PNG", {}),
        "alpha.png": (colour.convert("RGBA"), "PNG", {"exif": turned}),
        "palette.png": (colour.convert("P"), "PNG", {"transparency": 3}),
        "grey16.png": (grey, "PNG", {}),
        "a.gif": (colour.convert("P"), "GIF", {"save_all": True, "append_images": [colour]}),
        "a.tif": (colour, "TIFF", {"compression": "tiff_lzw"}),
        "grey16.tif": (grey, "TIFF", {}),
        "a.webp": (colour, "WEBP", {}),
        "a.bmp": (colour, "BMP", {}),
        "a.ppm": (colour, "PPM", {}),
    }
    made = {}
    for name, (image, form, options) in kinds.items():
        buffer = io.BytesIO()
        image.save(buffer, form, **options)
        made[name] = buffer.getvalue()
    return made


def _png(level: int, size: int = SIDE) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (size, size), (level, 0, 0)).save(buffer, "png")
    return buffer.getvalue()


def _try_image(place: Path, rng: random.Random) -> None:
    name = rng.choice(list(pictures()))
    data = mutate(pictures()[name], rng)
    # The header of a PNG has a checksum: without a new one no decoder
    # would believe the rest.
    if name.endswith(".png") and rng.random() < 0.3:
        data = _resized_png(pictures()[name], rng)
    read_header(data, name)
    center_crop_resize(decode_picture(data, name), SIDE)


def _resized_png(data: bytes, rng: random.Random) -> bytes:
    width, height = (rng.choice((0, 1, 2, 30_000, 100_000, 3_000_000, 2**31 - 1)) for _ in "wh")
    header = b"IHDR" + struct.pack(">II", width, height) + data[24:29]
    return data[:12] + header + struct.pack(">I", zlib.crc32(header)) + data[33:]


def _try_npz(place: Path, rng: random.Random) -> None:
    images = np.random.default_rng(0).integers(0, 256, (6, SIDE, SIDE, 3), np.uint8)
    labels: Any = np.arange(6) % 3
    if rng.random() < 0.3:
        labels = rng.choice((labels - 1, labels + 2**62, labels / 2, labels[:3], labels[None], 3))
    if rng.random() < 0.2:
        images = rng.choice((images.T, images[..., :2], images[:0], images.astype("U3")))
    buffer = io.BytesIO()
    save = rng.choice((np.savez, np.savez_compressed))
    save(buffer, images, labels, mu=np.zeros(4), sigma=np.eye(4))
    data = buffer.getvalue()
    if rng.random() < 0.3:
        data = _other_members(data, rng)
    elif rng.random() < 0.8:
        data = mutate(data, rng)
    path = place / "a.npz"
    path.write_bytes(data)
    with contextlib.suppress(UserError):
        read_npz(path)
    source = NpzImages(path)
    _read(source)
    source.verify()


def _other_members(data: bytes, rng: random.Random) -> bytes:
    """A zip of the same names, whose members are damaged, with the right checksums."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(buffer, "w") as new:
        for member in old.infolist():
            content = old.read(member)
            if rng.random() < 0.6:
                head, rest = content[:128], content[128:]
                content = mutate(head, rng) + rest
            if rng.random() < 0.2:
                shape = rng.choice((b"(-1,)", b"(99999999999999,)", b"(True, 2)", b"((((1,),),),)"))
                head = b"{'descr': '|u1', 'fortran_order': False, 'shape': " + shape + b", }\n"
                content = b"\x93NUMPY\1\0" + struct.pack("<H", len(head)) + head
            new.writestr(member.filename, content, rng.choice((0, 8, 12, 14)))
            if rng.random() < 0.1:
                new.writestr(member.filename, content)
    return buffer.getvalue()


def _try_zip(place: Path, rng: random.Random) -> None:
    names = [f"00000/img{i:08d}.png" for i in range(6)]
    index: Any = {"labels": [[name, i % 3] for i, name in enumerate(names)]}
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, name in enumerate(names):
            content = _png(i * 10) if rng.random() < 0.95 else mutate(_png(i), rng)
            called = name if rng.random() < 0.97 else rng.choice(_NAMES)
            archive.writestr(called, content, rng.choice((0, 8) * 20 + (12, 14)))
        kind = rng.randrange(4)
        if kind:
            text = mutate_json(index, rng) if kind > 2 else json.dumps(index).encode()
            archive.writestr("dataset.json", text, rng.choice((0, 8, 8, 14)))
    data = buffer.getvalue()
    path = place / "a.zip"
    path.write_bytes(data if rng.random() < 0.4 else mutate(data, rng))
    _read(EdmZip(path))


_NAMES = (
    *("a" * 5000 + ".png", "../../a.png", "/a.png", "a\\b.png", "cat/1.png", ".hidden/a.png"),
    *("x/dataset.json", "00000/img00000001.png", "00000\\img00000001.png", "\u00e9.png"),
)


@functools.cache
def _packed_files() -> dict[str, bytes]:
    with tempfile.TemporaryDirectory() as folder:
        prepare(
            SyntheticShapes(SIDE, 12, 0), [SIDE], folder, description={}, shard_images=5, threads=1
        )
        files = [file for file in Path(folder).rglob("*") if file.is_file()]
        return {str(file.relative_to(folder)): file.read_bytes() for file in files}


def _try_packed(place: Path, rng: random.Random) -> None:
    files = dict(_packed_files())
    manifest = "dataset.json"
    if rng.random() < 0.6:
        files[manifest] = mutate_json(json.loads(files[manifest]), rng)
    else:
        name = rng.choice([name for name in files if not name.endswith(".lock")])
        damaged = mutate(files[name], rng)
        if name != manifest and rng.random() < 0.7:
            # Of the right size: the difference is found when it is read.
            damaged = damaged[: len(files[name])].ljust(len(files[name]), b"\0")
        files[name] = damaged
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
    source = PackedDataset(place, SIDE)
    _read(source)
    source.class_counts()
    source.identity()
    source.verify()


def _try_folder(place: Path, rng: random.Random) -> None:
    names = []
    for i in range(rng.randrange(1, 8)):
        name = rng.choice(("", "cat/", "dog/", "10/", "2/", "00000/", ".h/", "a/b/")) + rng.choice(
            (f"{i}.png", f"{i:08d}.png", f"._{i}.png", "a.PNG", "b.heic", "noend", "\u00e9.png")
        )
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        kind = rng.random()
        if os.path.lexists(path):
            continue
        names.append(name)
        if kind < 0.7:
            path.write_bytes(_png(i))
        elif kind < 0.8:
            path.write_bytes(mutate(rng.choice(list(pictures().values())), rng))
        elif kind < 0.9:
            path.symlink_to(rng.choice((path, place, place / "nowhere", Path("/dev/zero"))))
        elif kind < 0.95:
            os.mkfifo(path)
        else:
            path.mkdir()
    index = {"labels": [[name, i % 3] for i, name in enumerate(names)]}
    kind = rng.random()
    if kind < 0.4:
        (place / "dataset.json").write_bytes(mutate_json(index, rng))
    elif kind < 0.5:
        (place / "dataset.json").write_bytes(json.dumps(index).encode())
    elif kind < 0.6:
        (place / "samples.json").write_bytes(b"{}")
    elif kind < 0.65:
        os.mkfifo(place / "dataset.json")
    _read(ImageFolder(place))


READERS: dict[str, Callable[[Path, random.Random], None]] = {
    "images": _try_image,
    "npz": _try_npz,
    "zip": _try_zip,
    "packed": _try_packed,
    "folder": _try_folder,
}

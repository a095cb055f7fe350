"""Inputs of kinds that other people's files have been, small: pictures, folders, zips and npz files
that are not what a program of this field expects.

    places = make_inputs(folder)        # {name: path}
"""

import io
import json
import os
import pickle
import shutil
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 16 16\nshowpage\n%%EOF\n"
SIDE = 16


class Runs:
    """What pickle makes of a file that wants to run something."""

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, ("touch it_ran",)


def _encoded(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, form, **options)
    return buffer.getvalue()


def _noise(number: int, channels: int = 3) -> Image.Image:
    shape = (SIDE, SIDE, channels)
    return Image.fromarray(np.random.default_rng(number).integers(0, 256, shape, np.uint8))


def _folder(place: Path, files: dict[str, bytes]) -> Path:
    for name, data in files.items():
        path = place / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return place


def _zip(place: Path, files: Iterable[tuple[str, bytes]], kind: int = zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(place, "w", kind) as archive:
        for name, data in files:
            archive.writestr(name, data)
    return place


def _npz(place: Path, *arrays: Any, **named: Any) -> Path:
    np.savez(place, *arrays, **named)
    return place


def make_inputs(out: Path) -> dict[str, Path]:
    """Makes all of them below a folder; their paths by name."""
    noise = [_encoded(_noise(i)) for i in range(8)]
    names = [f"00000/img{i:08d}.png" for i in range(8)]
    labels = [[name, i % 2] for i, name in enumerate(names)]
    flat = {f"{i}.png": data for i, data in enumerate(noise)}
    ramp = Image.fromarray(np.tile(np.linspace(0, 65535, SIDE).astype(np.uint16), (SIDE, 1)))
    turned = Image.Exif()
    turned[0x0112] = 6
    clear = Image.fromarray(np.dstack([np.asarray(_noise(0)), np.zeros((SIDE, SIDE), np.uint8)]))
    pixels = np.stack([np.asarray(_noise(i)) for i in range(8)])
    numbers = {f"{k}/{i}.png": noise[i] for k in range(12) for i in range(2)}
    two = {f"{k}/{i}.png": noise[i] for k in ("cat", "dog") for i in range(4)}
    edm = dict(zip(names, noise, strict=True)) | {
        "dataset.json": json.dumps({"labels": labels}).encode()
    }
    twice = json.dumps({"labels": labels + [[name, 2] for name in names]}).encode()
    places = {
        "plain": _folder(out / "plain", flat),
        "classes": _folder(out / "classes", two),
        # Pixel formats.
        "grey16": _folder(out / "grey16", {f"{i}.png": _encoded(ramp) for i in range(8)}),
        "turned": _folder(
            out / "turned",
            {f"{i}.jpg": _encoded(_noise(i).resize((20, 30)), "JPEG", exif=turned) for i in (0, 1)},
        ),
        "transparent": _folder(
            out / "transparent", {f"{i}.png": _encoded(clear) for i in range(8)}
        ),
        "float32": _folder(
            out / "float32",
            {"a.tif": _encoded(Image.fromarray(np.ones((16, 16), np.float32)), "TIFF")},
        ),
        # Descriptions and classes.
        "edm_folder": _folder(out / "edm_folder", edm),
        "edm_zip": _zip(out / "edm.zip", edm.items()),
        "json_below": _zip(out / "below.zip", ((f"set/{k}", v) for k, v in edm.items())),
        "labels_twice": _zip(out / "twice.zip", (edm | {"dataset.json": twice}).items()),
        "members_twice": _zip(out / "members.zip", [("0.png", noise[0]), ("1.png", noise[1])]),
        "numbers": _folder(out / "numbers", numbers),
        "numbers_zip": _zip(out / "numbers.zip", numbers.items()),
        "splits": _folder(
            out / "splits", {f"{s}/{k}": v for s in ("train", "val") for k, v in two.items()}
        ),
        "hidden": _zip(out / "hidden.zip", [*flat.items(), (".ipynb_checkpoints/0.png", noise[0])]),
        "deep_json": _folder(out / "deep", flat | {"dataset.json": b"[" * 100_000}),
        "deep_json_zip": _zip(out / "deep.zip", (flat | {"dataset.json": b"[" * 100_000}).items()),
        "other_json": _folder(
            out / "other", flat | {"dataset.json": b'{"labels": [[0, "\\ud800"], 7]}'}
        ),
        # Several kinds in one place.
        "endings": _folder(
            out / "endings",
            {
                f"a{i}.{form.lower()}": _encoded(_noise(i), form)
                for i in (0, 1)
                for form in ("PNG", "TIFF", "GIF", "WEBP")
            }
            | {"x.jfif": _encoded(_noise(2), "JPEG"), "y.heic": b"none", "notes.txt": b"text"},
        ),
        "results": _folder(out / "results", flat),
        "parts_and_sum": _folder(out / "parts", {}),
        # Contents.
        "truncated": _folder(out / "truncated", flat | {"3.png": noise[3][:60]}),
        "postscript": _folder(out / "ps", flat | {"a.jpg": POSTSCRIPT}),
        "postscript_zip": _zip(out / "ps.zip", (flat | {"a.jpg": POSTSCRIPT}).items()),
        "half_zip": out / "half.zip",
        "lzma_zip": _zip(out / "lzma.zip", flat.items(), zipfile.ZIP_LZMA),
        "fortran": _npz(out / "fortran.npz", np.asfortranarray(pixels)),
        "huge_labels": _npz(out / "labels.npz", pixels, np.arange(8) + 2**62),
        "many_arrays": _npz(out / "many.npz", **{f"a{i}": np.zeros(1) for i in range(500)}),
        "statistics": _npz(out / "stats.npz", mu=np.zeros(4), sigma=np.eye(4)),
        "pickled": _npz(out / "pickled.npz", np.array([Runs()], object)),
        "adm": _npz(out / "adm.npz", pixels, np.arange(8) % 2),
        # Cost.
        "strip": _folder(out / "strip", {"a.png": _encoded(Image.new("RGB", (30_000, 1)))}),
        "strip_zip": _zip(out / "strip.zip", [("a.png", _encoded(Image.new("RGB", (30_000, 1))))]),
        # Places.
        "empty": out / "empty",
        "missing": out / "missing",
        "file": out / "file.png",
        "pipe": out / "pipe",
        "pipe_zip": out / "pipe.zip",
        "pipe_npz": out / "pipe.npz",
        "loop": out / "loop",
        "evil": out / "evil.pkl",
    }
    # A member's name is written twice, before it and at the end of the zip.
    members = places["members_twice"]
    members.write_bytes(members.read_bytes().replace(b"1.png", b"0.png"))
    _npz(places["results"] / "old.npz", np.zeros((10, SIDE, SIDE, 3), np.uint8))
    places["parts_and_sum"].mkdir(exist_ok=True)
    for name, rows in (
        ("part_0", pixels[:4]),
        ("part_1", pixels[4:]),
        ("samples_8x16x16x3", pixels),
    ):
        _npz(places["parts_and_sum"] / f"{name}.npz", rows)
    whole = places["edm_zip"].read_bytes()
    places["half_zip"].write_bytes(whole[: len(whole) // 2])
    places["empty"].mkdir()
    places["file"].write_bytes(noise[0])
    shutil.copytree(places["plain"], places["pipe"])
    for path in (places["pipe"] / "p.png", places["pipe_zip"], places["pipe_npz"]):
        os.mkfifo(path)
    places["loop"].symlink_to(places["loop"])
    places["evil"].write_bytes(pickle.dumps({"fid": Runs()}))
    return places

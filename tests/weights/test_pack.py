"""Weights in one file: of any run, and those that come with the package."""

import json
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
from PIL import Image

import relay_jax as rx
from relay_jax.runtime.safetensors import read_safetensors, write_safetensors
from relay_jax.weights import pack, unpack
from tests.conftest import command_line, run_main

CIFAR10 = unpack.FOLDER / "cifar10.safetensors"


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The user's cache folder, of this module."""
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="module")
def packed(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny run in one file, by the command."""
    file = tmp_path_factory.mktemp("packed") / "tiny.safetensors"
    (file.parent / "about.json").write_text('{"data": "procedural"}')
    arguments = [str(tiny_run), f"--out={file}", f"--about={file.parent / 'about.json'}"]
    pack.main(["pack", *arguments, "--config.sample.batch=16"])
    return file


def test_the_cifar10_relay_of_the_package_opens_offline(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError("no network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    relay = rx.load("cifar10")
    assert relay.class_names == [str(number) for number in range(10)]
    assert relay.notes["base"]["images"] == 2_632_192
    # What the file says, and what the folder says that it was unpacked into.
    folder = next(cache.glob("relay_jax/weights-cifar10-*"))
    again = rx.load(folder)
    jax.tree.map(np.testing.assert_array_equal, relay.params, again.params)
    assert relay.settings == again.settings and relay.stages == again.stages
    arrays, metadata = read_safetensors(CIFAR10)
    named = jax.tree.leaves_with_path(relay.params)
    assert len(named) == len(arrays)
    for path, leaf in named:
        array = arrays["/".join(str(key.key) for key in path)]
        np.testing.assert_array_equal(np.asarray(leaf), array.astype(np.float32))
    images = relay.with_preset("draft").sample(seeds=range(4), classes=range(4))["relay"]
    assert images.shape == (4, 32, 32, 3) and np.isfinite(images).all()
    assert images.std() > 0.2 and np.abs(images).max() < 2
    # Where they come from is said in the file and beside it.
    about = json.loads(CIFAR10.with_suffix(".json").read_text())
    assert json.loads(metadata["about"]) == about
    assert "Krizhevsky" in about["data"] and "Apache-2.0" in about["licence_of_the_weights"]
    assert about["images_trained"] == {s: n["images"] for s, n in relay.notes.items()}
    assert CIFAR10.stat().st_size <= 12_100_000


def test_a_packed_run_is_the_run_with_weights_in_bfloat16(tiny_run: Path, packed: Path) -> None:
    run, relay = rx.load(tiny_run), rx.load(packed)
    rounded = jax.tree.map(
        lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16).astype(np.float32), run.params
    )
    jax.tree.map(np.testing.assert_array_equal, relay.params, rounded)
    assert relay.batch == 16 and run.batch == 8
    assert relay.class_names == run.class_names
    for notes in run.notes.values():
        notes["dataset"]["content"] = ""
    assert relay.notes == run.notes
    other = packed.with_name("other.safetensors")
    pack.main(["pack", str(tiny_run), f"--out={other}", "--config.sample.batch=16"])
    assert read_safetensors(other)[1]["about"] == "null"
    assert rx.load(other).notes == relay.notes


def test_the_safetensors_library_reads_bfloat16(packed: Path) -> None:
    library = pytest.importorskip("safetensors")
    arrays, metadata = read_safetensors(packed)
    with library.safe_open(packed, framework="np") as file:
        assert set(file.keys()) == set(arrays) and file.metadata() == metadata


def pixels(out: Path) -> dict[str, np.ndarray]:
    return {file.stem: np.asarray(Image.open(file)) for file in sorted(out.rglob("*.png"))}


def test_the_command_line_draws_from_a_file_without_run_and_configuration(
    packed: Path, tiny_run: Path, tmp_path: Path
) -> None:
    common = ["--mode=sample", "--seeds=0-3"]
    for name, arguments in {
        "file": [f"--weights={packed}"],
        "folder": [f"--workdir={unpack.run_of(packed)}"],
        # Those of one stage are meant, wherever they stand.
        "base": [f"--weights.base={tiny_run / 'base'}", f"--weights={packed}"],
    }.items():
        with command_line(*arguments, *common, f"--out={tmp_path / name}"):
            run_main()
    file, folder = pixels(tmp_path / "file"), pixels(tmp_path / "folder")
    assert len(file) == 4
    jax.tree.map(np.testing.assert_array_equal, file, folder)
    kept = json.loads((tmp_path / "base/samples.json").read_text())
    record = json.loads((tmp_path / "file/samples.json").read_text())
    hashes = [
        [each["stages"][name]["checkpoint"]["ema_sha256"] for name in ("base", "relay")]
        for each in (record, kept)
    ]
    assert hashes[0][0] != hashes[1][0] and hashes[0][1] == hashes[1][1]


def changed(packed: Path, file: Path, kind: str) -> Path:
    """A file with one fault."""
    content = packed.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    arrays, metadata = read_safetensors(packed)
    if kind == "cut":
        file.write_bytes(content[:-1])
    elif kind == "text":
        file.write_text("no weights")
    elif kind == "foreign":
        write_safetensors(file, {"x": np.zeros(3, np.float32)}, {"format": "pt"})
    elif kind == "place":
        header = content[8 : 8 + length].replace(b'"data_offsets":[0,', b'"data_offsets":[2,')
        file.write_bytes(content[:8] + header + content[8 + length :])
    elif kind == "name":
        config = json.loads(metadata["config"])
        config["stages"] = {"../up": config["stages"]["base"]}
        write_safetensors(file, arrays, metadata | {"config": json.dumps(config)})
    return file


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        ("cut", "cut off"),
        ("text", "cut off"),
        ("foreign", "relay_jax.weights.pack"),
        ("place", "is wrong"),
        ("name", "no name of a stage"),
    ],
)
def test_a_damaged_or_foreign_file_is_one_line(
    packed: Path, tmp_path: Path, kind: str, says: str
) -> None:
    file = changed(packed, tmp_path / "x.safetensors", kind)
    with pytest.raises(rx.UserError, match=says) as caught:
        unpack.unpack(file, tmp_path / "run")
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400
    assert {path.name for path in tmp_path.iterdir()} == {"x.safetensors"}


def test_what_the_process_that_unpacks_refuses_is_said_here(
    packed: Path, tmp_path: Path, cache: Path
) -> None:
    with pytest.raises(rx.UserError, match="cut off") as caught:
        rx.load(changed(packed, tmp_path / "x.safetensors", "cut"))
    assert caught.value.status == 2 and not list(cache.glob("relay_jax/*weights-x-*"))


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode=sample", "--weights=cifar11", "--out=x"], "the package has cifar10"),
        (["--mode=sample", "--weights=x.safetensors", "--out=x"], "x.safetensors cannot be read"),
        (["--mode=plan", "--weights={file}"], "not used by --mode=plan"),
        (["--mode=sample", "--weights="], "name a configuration"),
    ],
)
def test_weights_that_are_not_there_are_one_line(
    packed: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    filled = [argument.format(file=packed) for argument in arguments]
    with pytest.raises(SystemExit) as stopped, command_line(*filled):
        pass
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and says in lines[0]
    with pytest.raises(rx.UserError, match="the package has the weights cifar10"):
        rx.load("cifar11")


def test_packing_refuses_in_one_line(
    packed: Path, tiny_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for arguments, says in (
        ([tiny_run, f"--out={packed}"], "exists"),
        ([tiny_run, f"--out={tmp_path / 'x'}"], "--out=NAME.safetensors"),
        ([tmp_path, f"--out={tmp_path / 'x.safetensors'}"], "no run"),
        ([f"--out={tmp_path / 'x.safetensors'}"], "name one run"),
        ([tiny_run, f"--out={tmp_path / 'x.safetensors'}", "--config.sample.bats=8"], "bats"),
    ):
        with pytest.raises(SystemExit) as stopped:
            pack.main(["pack", *map(os.fspath, arguments)])
        assert stopped.value.code == 2
        assert says in capsys.readouterr().err
    assert not list(tmp_path.iterdir())

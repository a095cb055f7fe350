"""The command: official file -> checkpoint -> official names; or one line, and nothing left."""

import json
import os
import runpy
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.configs import demo
from relay_jax.errors import UserError
from relay_jax.models.network import describe, shapes_of
from relay_jax.models.unet import UNet
from relay_jax.official import convert as command
from relay_jax.official.parameters import filters, from_official, official_shapes
from relay_jax.runtime.checkpoint import Checkpoints, load_ema
from relay_jax.runtime.files import write_json
from relay_jax.runtime.safetensors import write_safetensors
from tests.conftest import mesh_of
from tests.official import torch_writer as tw

ROOT = Path(__file__).parents[2]
NETWORK = UNet(
    resolution=8,
    channels=8,
    multipliers=(1, 8),
    blocks=1,
    attention=(4,),
    num_classes=5,
    num_augment=9,
    dropout=0.13,
)
ARGUMENTS: dict[str, Any] = {
    "img_channels": 3,
    "img_resolution": 8,
    "label_dim": 5,
    "augment_dim": 9,
    "model_channels": 8,
    "channel_mult": [1, 8],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "dropout": 0.13,
}
CONFIG = """
from relay_jax.configs import demo
def get_config():
    config = demo.get_config("smoke")
    config.dataset.num_classes = {classes}
    config.stages.base.model.update(channels=8, multipliers=(1, 8), blocks=1, attention=(4,),
                                    head_width={head_width}, num_augment=9, dropout=0.0)
    return config
"""


def arrays_of(network: UNet = NETWORK, seed: int = 0) -> dict[str, np.ndarray]:
    """Random official parameters of a network, with the constant entries."""
    rng = np.random.default_rng(seed)
    shapes = official_shapes(network)
    arrays = {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    return arrays | filters(network)


ARRAYS = arrays_of()


def write(
    path: Path,
    arrays: dict[str, np.ndarray] = ARRAYS,
    arguments: dict = ARGUMENTS,
    step: int | None = 10240,
    net: dict[str, np.ndarray] | None = None,
    class_name: str = "EDMPrecond",
) -> Path:
    """An official file, of the format that the suffix says."""
    storages = tw.Storages(path.suffix == ".pt")

    def network(values: dict[str, np.ndarray]) -> tw.Call:
        return tw.network({k: storages.tensor(v) for k, v in values.items()}, arguments, class_name)

    top: dict[str, Any] = {"ema": network(arrays)}
    top |= {"step": step} if step is not None else {}
    top |= {"net": network(net)} if net is not None else {}
    return tw.write_zip(path, top, storages) if path.suffix == ".pt" else tw.write_pickle(path, top)


def read_safetensors(path: Path) -> dict[str, np.ndarray]:
    data = path.read_bytes()
    (length,) = struct.unpack("<Q", data[:8])
    header, body = json.loads(data[8 : 8 + length]), data[8 + length :]
    header.pop("__metadata__")
    assert sorted(x for entry in header.values() for x in entry["data_offsets"])[-1] == len(body)
    return {
        name: np.frombuffer(body[slice(*entry["data_offsets"])], "<f4").reshape(entry["shape"])
        for name, entry in header.items()
    }


def refusal(capsys: pytest.CaptureFixture[str], *arguments: Any) -> str:
    """The command must end with status 2 and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        command.main(["convert", *map(str, arguments)])
    assert stopped.value.code == 2
    printed = capsys.readouterr()
    lines = printed.err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and not printed.out, printed
    return lines[0]


def assert_equal(tree: Any, expected: Any) -> None:
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def save(folder: Path, params: dict, **meta: Any) -> None:
    """A checkpoint of step 7 as a training leaves it."""
    notes = {"images": 5, "seconds": 1.0, **meta}
    with Checkpoints(folder / "checkpoints") as checkpoints:
        checkpoints.save(7, ema=params, train={"step": jnp.zeros(())}, meta=notes)


# What it does


@pytest.mark.parametrize("name", ["state.pt", "release.pkl"])
def test_a_converted_file_is_a_stage(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    path, out = write(tmp_path / name), tmp_path / "new" / "base"
    command.main(["convert", str(path), f"--out={out}"])
    params, meta = load_ema(out, shapes_of(NETWORK), mesh_of(1))
    assert_equal(jax.device_get(params), from_official(ARRAYS))
    assert (meta["source"], meta["weights"], meta["images"]) == (name, "ema", 10240)
    assert len(meta["sha256"]) == 64
    assert meta["network"] == json.loads(json.dumps(describe(NETWORK)))
    assert sorted(p.name for p in out.parent.iterdir()) == ["base"]
    assert [p.name for p in out.iterdir()] == ["checkpoints"]
    report = capsys.readouterr().out
    count = sum(a.size for k, a in ARRAYS.items() if "filter" not in k)
    for part in (
        name,
        f"{count:,} parameters",
        "8 px",
        "5 classes",
        "9 augmentation labels",
        "10,240",
    ):
        assert part in report


def test_every_part_of_a_conversion_says_how_far_it_is(
    tmp_path: Path, tasks: dict[str, list[float | None]]
) -> None:
    path, out = write(tmp_path / "state.pt"), tmp_path / "base"
    command.convert(path, out)
    size = path.stat().st_size / 1e6
    assert list(tasks) == [
        "reading ema, MB",
        "hashing state.pt, MB",
        "converting ema, MB",
        "writing base, files",
    ]
    assert tasks["hashing state.pt, MB"] == pytest.approx([size, size])
    total, done = tasks["converting ema, MB"]
    assert done == pytest.approx(total) and 0.5 * size < done < size
    tasks.clear()
    command.export(out, tmp_path / "back.safetensors")
    assert list(tasks) == ["reading base, files", "writing back.safetensors, MB"]
    total, done = tasks["writing back.safetensors, MB"]
    assert done == pytest.approx(total) and done > 0


def test_from_a_file_and_back_is_equal_to_the_bit(tmp_path: Path) -> None:
    net = arrays_of(seed=1)
    path = write(tmp_path / "state.pt", net=net)
    for weights, expected in (("ema", ARRAYS), ("net", net)):
        out, back = tmp_path / weights, tmp_path / f"{weights}.safetensors"
        command.main(["convert", str(path), f"--out={out}", f"--weights={weights}"])
        command.main(["convert", "--to-official", str(out), f"--out={back}"])
        state = read_safetensors(back)
        assert set(state) == set(expected)
        for name, value in expected.items():
            assert state[name].tobytes() == value.tobytes(), name
            assert state[name].shape == value.shape, name


def test_the_safetensors_library_reads_it(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    write_safetensors(tmp_path / "x.safetensors", ARRAYS, {"format": "pt"})
    state = library.load_file(tmp_path / "x.safetensors")
    assert all(np.array_equal(state[name], value) for name, value in ARRAYS.items())


def config_file(folder: Path, classes: int = 5, head_width: int = 64) -> str:
    (folder / "tiny.py").write_text(CONFIG.format(classes=classes, head_width=head_width))
    return f"--config={folder / 'tiny.py'}"


def test_a_configuration_must_agree(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, config = write(tmp_path / "state.pt"), config_file(tmp_path)
    command.main(["convert", str(path), f"--out={tmp_path / 'good'}", config, "--stage=base"])
    assert (tmp_path / "good" / "checkpoints").is_dir()
    out = f"--out={tmp_path / 'bad'}"
    assert "resolution is 8 in the file and 32 in stage relay" in refusal(
        capsys, path, out, config, "--stage=relay"
    )
    assert "unknown stage 'middle'" in refusal(capsys, path, out, config, "--stage=middle")
    assert "dataset.num_classes is 5" in refusal(
        capsys, path, out, config_file(tmp_path, classes=8), "--stage=base"
    )
    assert "model.head_width" in refusal(
        capsys, path, out, config_file(tmp_path, head_width=8), "--stage=base"
    )
    assert "model.blocks" in refusal(
        capsys,
        path,
        out,
        config_file(tmp_path),
        "--stage=base",
        "--config.stages.base.model.blocks=2",
    )
    assert not (tmp_path / "bad").exists()


def test_weights_of_a_run_get_official_names_from_its_folder_alone(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, folder = from_official(ARRAYS), tmp_path / "base"
    save(folder, params, network=describe(NETWORK))
    command.main(["convert", "--to-official", str(folder), f"--out={tmp_path / 'x.safetensors'}"])
    assert "step 7" in capsys.readouterr().out
    assert_equal(from_official(read_safetensors(tmp_path / "x.safetensors")), params)
    again = ("--to-official", folder, f"--out={tmp_path / 'x.safetensors'}")
    assert "exists" in refusal(capsys, *again)
    other = ("--to-official", folder, f"--out={tmp_path / 'y.safetensors'}", "--stage=base")
    config = config_file(tmp_path, classes=8)
    assert "dataset.num_classes is 5 in the checkpoint and 8" in refusal(capsys, *other, config)


def test_the_run_says_what_network_a_checkpoint_of_an_earlier_version_is_of(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    params, out = from_official(ARRAYS), tmp_path / "x.safetensors"
    save(tmp_path / "base", params)
    arguments = ("--to-official", tmp_path / "base", f"--out={out}")
    assert "--config and --stage" in refusal(capsys, *arguments)
    narrow = config_file(tmp_path, head_width=8)
    assert "head_width 8" in refusal(capsys, *arguments, narrow, "--stage=base")

    config = demo.get_config("smoke")
    config.dataset.num_classes = 5
    model = {"channels": 8, "multipliers": (1, 8), "blocks": 1, "attention": (4,), "head_width": 64}
    config.stages.base.model.update(model, num_augment=9)
    write_json(tmp_path / "config.json", json.loads(config.to_json_best_effort()))
    command.main(["convert", *map(str, arguments)])
    assert_equal(from_official(read_safetensors(out)), params)


def test_notes_of_an_earlier_conversion_are_understood(tmp_path: Path) -> None:
    notes = {k: v for k, v in describe(NETWORK).items() if k not in ("kind", "dtype", "remat")}
    save(tmp_path / "base", from_official(ARRAYS), network=notes)
    command.export(tmp_path / "base", tmp_path / "x.safetensors")
    assert set(read_safetensors(tmp_path / "x.safetensors")) == set(ARRAYS)


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ({"kind": "subprocess:Popen", "args": ["touch", "canary"]}, "of the kind"),
        ({"kind": "unet", "petals": 5}, "describe no network"),
        ("a U-Net", "describe no network"),
    ],
)
def test_notes_that_describe_no_unet_are_refused_and_nothing_of_theirs_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, network: Any, says: str
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "base", {"w": np.ones(3, np.float32)}, network=network)
    with pytest.raises(UserError, match=says):
        command.export(tmp_path / "base", tmp_path / "x.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


def test_the_old_name_of_the_command_still_works(tmp_path: Path) -> None:
    path, out = write(tmp_path / "f.pkl"), tmp_path / "out"
    with mock.patch.object(sys, "argv", ["convert", str(path), f"--out={out}"]):
        runpy.run_module("relay_jax.tools.convert", run_name="__main__")
    assert (out / "checkpoints").is_dir()


# What it refuses


def changed(**arguments: Any) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        merged = ARGUMENTS | arguments
        return write(folder / "f.pt", arguments={k: v for k, v in merged.items() if v is not None})

    return make


def with_arrays(**arrays: np.ndarray | None) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        merged: dict = ARRAYS | {name.replace("__", "."): value for name, value in arrays.items()}
        return write(folder / "f.pkl", {k: v for k, v in merged.items() if v is not None})

    return make


BAD: dict[str, tuple[Callable[[Path], Path], str]] = {
    "SongUNet": (changed(model_type="SongUNet"), "'SongUNet'"),
    "VPPrecond": (lambda folder: write(folder / "f.pt", class_name="VPPrecond"), "'VPPrecond'"),
    "sigma_data": (changed(sigma_data=1.0), "sigma_data"),
    "no resolution": (changed(img_resolution=None), "img_resolution"),
    "resolution as text": (changed(img_resolution="8"), "img_resolution"),
    "true as a number": (changed(num_blocks=True), "num_blocks"),
    "huge resolution": (changed(img_resolution=1 << 40), "img_resolution"),
    "many blocks": (changed(num_blocks=60), "too few"),
    "no levels": (changed(channel_mult=[]), "too few"),
    "levels that are no list": (changed(channel_mult=3), "channel_mult"),
    "negative multiplier": (changed(channel_mult=[1, -8]), "channel_mult"),
    "odd resolution": (changed(img_resolution=9), "halved"),
    "channels that make no groups": (changed(model_channels=6), "make no network"),
    "other channels": (changed(model_channels=16, channel_mult=[1, 4]), "shape"),
    "other dropout": (changed(dropout="much"), "dropout"),
    "more classes": (changed(label_dim=6), "map_label.weight"),
    "no classes": (changed(label_dim=0), "left over"),
    "no augmentation": (changed(augment_dim=0), "map_augment.weight"),
    "a block more": (changed(num_blocks=2), "misses"),
    "no attention at 4": (changed(attn_resolutions=[]), "left over"),
    "other width of the embedding": (changed(channel_mult_emb=2), "shape"),
    "a parameter missing": (with_arrays(model__out_conv__bias=None), "model.out_conv.bias"),
    "a parameter left over": (
        with_arrays(model__extra__weight=np.ones(3, np.float32)),
        "model.extra.weight",
    ),
    "a hostile name": (
        with_arrays(**{"model__a\nb\x1b[2J__weight": np.ones(3, np.float32)}),
        "left over",
    ),
    "another shape": (with_arrays(model__out_conv__bias=np.ones(4, np.float32)), "(4,)"),
    "another filter": (
        with_arrays(
            **{"model__enc__4x4_down__conv0__resample_filter": np.full((1, 1, 4, 4), 1 / 16)}
        ),
        "mean of 2 x 2",
    ),
    "a filter elsewhere": (
        with_arrays(**{"model__enc__8x8_conv__resample_filter": np.full((1, 1, 2, 2), 0.25)}),
        "left over",
    ),
    "a call": (
        lambda folder: tw.write_pickle(
            folder / "f.pkl",
            {"ema": tw.Call(tw.Global("os", "system"), (f"touch {folder / 'canary'}",))},
        ),
        "'os.system'",
    ),
    "truncated": (lambda folder: truncated(write(folder / "f.pt")), "truncated"),
    "not a checkpoint": (lambda folder: Path(__file__), "neither a zip"),
    "missing": (lambda folder: folder / "nothing.pt", "no such file"),
}


def truncated(path: Path) -> Path:
    path.write_bytes(path.read_bytes()[:-1000])
    return path


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_leaves_nothing(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    make, says = BAD[name]
    path = make(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    line = refusal(capsys, path, f"--out={tmp_path / 'out'}")
    assert says in line and path.name in line and "\x1b" not in line and len(line) < 400, line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name one file"),
        (["a.pt", "b.pt", "--out=x"], "name one file"),
        (["a.pt"], "--out"),
        (["a.pt", "--out=x", "--weights=raw"], "weights"),
        (["a.pt", "--out=x", "--nonsense"], "nonsense"),
        (["a.pt", "--out=x", "--stage=base"], "--config"),
        (["a.pt", "--out=x", "--config=configs/demo.py"], "--stage"),
        (
            ["a.pt", "--out=x", "--config=configs/nothing.py", "--stage=base"],
            "no configuration file",
        ),
        (["--to-official", "a", "--out=x"], ".safetensors"),
        (["--to-official", "a", "--out=x.safetensors"], "folder of a stage"),
        (["--to-official", "a", "--weights=net", "--out=x.safetensors"], "ema"),
    ],
)
def test_bad_arguments(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    says: str,
) -> None:
    monkeypatch.chdir(ROOT)
    assert says in refusal(capsys, *arguments)


def test_raw_weights_that_are_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "'net'" in refusal(
        capsys, write(tmp_path / "f.pkl"), f"--out={tmp_path / 'out'}", "--weights=net"
    )


def test_nothing_is_overwritten(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path, out = write(tmp_path / "f.pt"), tmp_path / "out"
    out.mkdir()
    command.main(["convert", str(path), f"--out={out}"])  # an empty folder is as good as none
    before = sorted(out.rglob("*"))
    assert "not an empty folder" in refusal(capsys, path, f"--out={out}")
    assert "not an empty folder" in refusal(capsys, path, f"--out={path}")
    assert sorted(out.rglob("*")) == before


@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        ValueError("RESOURCE_EXHAUSTED: disk"),
        KeyboardInterrupt(),
    ],
)
def test_a_failure_while_writing_leaves_nothing(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    error: BaseException,
) -> None:
    def fail(*_: Any) -> None:
        raise error

    path = write(tmp_path / "f.pt")
    monkeypatch.setattr(Path, "rename", fail)  # the last thing that can fail
    with pytest.raises(SystemExit) as stopped:
        command.main(["convert", str(path), f"--out={tmp_path / 'out'}"])
    assert stopped.value.code == (130 if isinstance(error, KeyboardInterrupt) else 1)
    assert [p.name for p in tmp_path.iterdir()] == ["f.pt"]


def test_memory_stays_below_twice_the_file(tmp_path: Path) -> None:
    """In a process of its own: what the conversion of 60 MB adds to the peak after that of a
    small file."""
    network = UNet(resolution=8, channels=128, multipliers=(1, 2), blocks=1, num_classes=10)
    arguments = {
        "img_channels": 3,
        "img_resolution": 8,
        "label_dim": 10,
        "model_channels": 128,
        "channel_mult": [1, 2],
        "num_blocks": 1,
        "attn_resolutions": [],
    }
    big = write(tmp_path / "big.pkl", arrays_of(network), arguments, step=None)
    size = big.stat().st_size
    assert 40e6 < size < 80e6
    program = """
import sys
from pathlib import Path
from relay_jax.official.convert import convert
def peak():
    lines = open("/proc/self/status").read().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
folder = Path(sys.argv[1])
convert(folder / "small.pkl", folder / "small")
before = peak()
convert(folder / "big.pkl", folder / "big")
print(peak() - before)
"""
    write(tmp_path / "small.pkl")
    if not Path("/proc/self/status").exists():
        pytest.skip("needs /proc")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_NUM_CPU_DEVICES": "1"}
    run = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
        timeout=400,
        check=True,
    )
    added = int(run.stdout.split()[-1])
    print(f"peak grew by {added / size:.2f} times the file")
    assert added < 2 * size

"""Official parameters <-> ours (SPEC sections 6 and 11): names and layouts, no arithmetic; and
the command for it.

    python -m relay_jax.official.convert FILE --out=DIR [--weights=net]
    [--config=configs/imagenet256.py --stage=relay]
    python -m relay_jax.official.convert --to-official DIR --out=FILE.safetensors [--config=...
    --stage=...]

The first reads an official .pt or .pkl file, without running anything in it, and writes
DIR/checkpoints, from which a stage samples. The second writes the averaged weights of a stage's
folder, or of such a DIR, as a state dict with the official names. With a configuration, the
network must be that of its stage. Bad input is one line and exit status 2;
nothing is overwritten, and nothing is left behind by a conversion that fails.

Official names read `model.enc.64x64_block0.conv0.weight`; ours are the nested dict
params["enc_64x64_block0"]["conv0"]["kernel"]. Layouts: convolutions OIHW -> HWIO, linear layers
[out, in] -> [in, out], and the channels of the qkv projection from (head, channel, q/k/v) to
(q/k/v, head, channel). Constant `resample_filter` entries are left out.
"""

import hashlib
import json
import os
import shutil
import struct
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import flags, logging
from ml_collections import config_flags

from relay_jax.config import ConfigError, build, parse_stage
from relay_jax.models.unet import UNet, init_params, parameter_count
from relay_jax.official.files import read_official
from relay_jax.official.network import (
    check_same_network,
    describe,
    heads_at,
    network_of,
    note,
    noted_network,
    unused_arguments,
)
from relay_jax.official.pickle import FileError, show
from relay_jax.runtime.checkpoint import CheckpointError, Checkpoints
from relay_jax.runtime.logs import fail, quieten

HEAD_WIDTH = 64
_ATTENTION = ("norm2", "qkv", "proj")


def _our_path(name: str) -> tuple[str, ...]:
    """model.enc.64x64_block0.conv0.weight -> (enc_64x64_block0, conv0, kernel). Raises
    ValueError for other names."""
    parts = name.split(".")
    if parts[0] != "model" or len(parts) < 3 or parts[-1] not in ("weight", "bias"):
        raise ValueError(f"{name!r} is not the name of an official U-Net parameter")
    if parts[1] in ("enc", "dec"):
        parts[1:3] = [f"{parts[1]}_{parts[2]}"]
    *modules, leaf = parts[1:]
    is_norm = modules[-1].startswith("norm") or modules[-1] == "out_norm"
    if leaf == "weight":
        leaf = "scale" if is_norm else "kernel"
    if modules[-1] in _ATTENTION:
        modules.insert(-1, "attention")
    return (*modules, leaf)


def _official_name(path: tuple[str, ...]) -> str:
    """The inverse of `_our_path`."""
    parts = [part for part in path[:-1] if part != "attention"]
    if parts[0].startswith(("enc_", "dec_")):
        parts[0] = parts[0].replace("_", ".", 1)
    return ".".join(["model", *parts, "bias" if path[-1] == "bias" else "weight"])


def _swap_qkv(value: np.ndarray, heads: int, to_ours: bool) -> np.ndarray:
    """Reorders the last axis, 3C channels, between (head, channel, q/k/v) and (q/k/v, head,
    channel)."""
    width = value.shape[-1] // (3 * heads)
    sizes, axes = ((heads, width, 3), (2, 0, 1)) if to_ours else ((3, heads, width), (1, 2, 0))
    lead = value.shape[:-1]
    split = value.reshape(*lead, *sizes)
    order = [*range(len(lead)), *(len(lead) + axis for axis in axes)]
    return np.ascontiguousarray(split.transpose(order)).reshape(*lead, -1)


def _heads(value: np.ndarray, head_width: int) -> int:
    return max(value.shape[-1] // 3 // head_width, 1)


def from_official(params: Mapping[str, np.ndarray], head_width: int = HEAD_WIDTH) -> dict:
    """Official names and layouts -> our nested parameter dict.

    head_width: channels per attention head of the network (64 in every published one).
    Raises ValueError for a name that no U-Net has.
    """
    ours: dict = {}
    for name, value in params.items():
        if name.endswith(".resample_filter"):
            continue
        path, value = _our_path(name), np.asarray(value)
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        if path[-2] == "qkv":
            value = _swap_qkv(value, _heads(value, head_width), to_ours=True)
        node = ours
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return ours


def to_official(params: Mapping, head_width: int = HEAD_WIDTH) -> dict[str, np.ndarray]:
    """Our nested parameter dict (or one of its gradients) -> official names and layouts."""
    official: dict[str, np.ndarray] = {}

    def visit(node: Mapping, path: tuple[str, ...]) -> None:
        for key, child in node.items():
            if isinstance(child, Mapping):
                visit(child, (*path, key))
                continue
            value = np.asarray(child)
            if path[-1] == "qkv":
                value = _swap_qkv(value, _heads(value, head_width), to_ours=False)
            if value.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            elif value.ndim == 2:
                value = value.T
            official[_official_name((*path, key))] = value

    visit(params, ())
    return official


# Checking


def official_shapes(network: UNet) -> dict[str, tuple[int, ...]]:
    """Official name -> official shape of every parameter of a U-Net."""
    tree = jax.eval_shape(partial(init_params, network), jax.random.key(0))
    shapes = {}
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]:
        shape = leaf.shape
        shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
        shapes[_official_name(tuple(entry.key for entry in path))] = shape
    return shapes


def _filter_names(network: UNet) -> list[str]:
    """The constant entries of an official state dict, in the blocks that change the resolution."""
    sizes = [network.resolution >> level for level in range(len(network.multipliers))]
    blocks = [f"enc.{size}x{size}_down" for size in sizes[1:]] + [
        f"dec.{size}x{size}_up" for size in sizes[:-1]
    ]
    return [
        f"model.{block}.{layer}.resample_filter" for block in blocks for layer in ("conv0", "skip")
    ]


def check_parameters(params: Mapping[str, np.ndarray], network: UNet) -> None:
    """Raises FileError unless these official parameters are those of the U-Net: names, shapes,
    none over or missing."""
    try:
        wanted = official_shapes(network)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise FileError(f"its constructor arguments make no network ({error})") from error
    filters = {name for name in params if name.endswith(".resample_filter")}
    for name in sorted(filters):
        if params[name].shape != (1, 1, 2, 2) or not np.all(params[name] == 0.25):
            raise FileError(
                f"{show(name)} is not the mean of 2 x 2 pixels: the network resamples unlike ours"
            )
    for what, names in (
        ("misses", set(wanted) - set(params)),
        ("has left over", set(params) - set(wanted) - filters),
        ("has left over", filters - set(_filter_names(network))),
    ):
        if names:
            first = ", ".join(name[:80] for name in sorted(names)[:3])
            raise FileError(
                f"it {what} {len(names)} parameters of the network: {show(first)}"
                f"{' and more' if len(names) > 3 else ''}"
            )
    for name, shape in wanted.items():
        if params[name].shape != shape:
            raise FileError(
                f"{show(name)} has shape {show(params[name].shape)} where the network has {shape}"
            )


# The two directions


def convert(
    source: Path, out: Path, weights: str = "ema", stage: tuple[str, UNet] | None = None
) -> str:
    """An official file -> out/checkpoints/0 with items `ema` and `meta`. Returns a report of
    one line.

    weights: ema or net; stage: name and network of the stage that it must fit. Memory: one and
    a half times the parameters. Raises FileError, also where `out` exists and is not an empty
    folder.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise FileError(f"{out} exists and is not an empty folder; name another --out")
    official = read_official(source, networks=(weights,))
    found = official.ema if weights == "ema" else official.net
    if found is None:
        raise FileError(
            f"{source.name} has no {weights!r}, only the averaged network; leave --weights out"
        )
    try:
        network = network_of(found)
        if stage is not None:
            check_same_network(network, stage[1], stage[0])
        check_parameters(found.params, network)
    except FileError as error:
        raise FileError(f"{source.name} does not fit: {error}") from error
    ignored = unused_arguments(found)
    with source.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    meta = {
        "source": source.name,
        "sha256": digest,
        "weights": weights,
        "images": official.images_seen,
        "network": note(network),
    }
    cpu = jax.devices("cpu")[0]

    def copy(value: np.ndarray) -> jax.Array:
        placed = jax.device_put(value, cpu).block_until_ready()
        official.release()
        return placed

    params = jax.tree.map(copy, from_official(found.params))
    _write_checkpoint(out, params, meta)
    return (
        f"{source.name}: {weights}, {parameter_count(params):,} parameters, "
        f"{describe(network)}, images seen: "
        f"{'not noted' if meta['images'] is None else format(meta['images'], ',')}"
        + (f"; constructor arguments not used: {show(', '.join(ignored))}" if ignored else "")
    )


def _write_checkpoint(out: Path, ema: dict, meta: dict) -> None:
    """out/checkpoints/0 as relay_jax.runtime.checkpoint reads it; out appears when it is
    complete."""
    out = out.absolute()
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")
    partial_out.mkdir(parents=True)
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(ema)]
    in_flight = max(*sizes, sum(sizes) // 4) / 1e9  # of Orbax, which would copy everything at once
    try:
        handlers = {
            "ema": ocp.StandardCheckpointHandler(save_concurrent_gb=in_flight),
            "meta": ocp.JsonCheckpointHandler(),
        }
        options = ocp.CheckpointManagerOptions(enable_async_checkpointing=False)
        with ocp.CheckpointManager(
            partial_out / "checkpoints", options=options, item_handlers=handlers
        ) as manager:
            manager.save(
                0,
                args=ocp.args.Composite(
                    ema=ocp.args.StandardSave(ema), meta=ocp.args.JsonSave(meta)
                ),
            )
        partial_out.rename(out)
    except (ValueError, RuntimeError) as error:  # TensorStore's, such as a full disk
        raise FileError(f"{out} cannot be written: {error}") from error
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)


def export(folder: Path, out: Path, network: UNet | None = None) -> str:
    """The averaged weights of a stage's folder -> a safetensors file with official names.
    Returns a report.

    network: what was trained; None for a converted checkpoint, which notes it. Raises
    FileError, CheckpointError.
    """
    if out.exists():
        raise FileError(f"{out} exists; name another --out")
    if not (folder / "checkpoints").is_dir():
        raise FileError(f"{folder} is not the folder of a stage (it has no checkpoints)")
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        if network is None:
            noted = checkpoints.restore({}, {})
            network = noted_network(noted[1]["meta"] if noted else {})
        if heads_at(network, network.head_width) != heads_at(network, HEAD_WIDTH):
            raise FileError(
                f"with model.head_width {network.head_width} its attention differs from that "
                "of the "
                f"official network, which has {HEAD_WIDTH} channels per head"
            )
        shapes = jax.eval_shape(partial(init_params, network), jax.random.key(0))
        place = jax.sharding.SingleDeviceSharding(jax.devices("cpu")[0])
        restored = checkpoints.restore(
            {"ema": shapes}, {"ema": jax.tree.map(lambda _: place, shapes)}
        )
    if restored is None:
        raise CheckpointError(f"{folder} has no complete checkpoint")
    state = to_official(restored[1]["ema"])
    state |= {name: np.full((1, 1, 2, 2), 0.25, np.float32) for name in _filter_names(network)}
    write_safetensors(out, state)
    return f"{folder}: ema of step {restored[0]}, {parameter_count(shapes):,} parameters, {describe(network)}"


def write_safetensors(path: Path, state: Mapping[str, np.ndarray]) -> None:
    """float32 arrays by name, as a safetensors file: length and text of a JSON header, then the
    raw data."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(state):
        start, end = end, end + 4 * state[name].size
        header[name] = {
            "dtype": "F32",
            "shape": list(state[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(struct.pack("<Q", len(text)) + text)
            for name in sorted(state):
                file.write(np.ascontiguousarray(state[name], "<f4").data)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


# Command line: flags of its own, because the main program has some of the same names

_FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string(
    "out", "", "Folder to write; with --to-official a .safetensors file.", flag_values=_FLAGS
)
_WEIGHTS = flags.DEFINE_enum(
    "weights", "ema", ["ema", "net"], "Averaged or raw weights.", flag_values=_FLAGS
)
_STAGE = flags.DEFINE_string(
    "stage", "", "Stage of --config that the network must fit.", flag_values=_FLAGS
)
_REVERSE = flags.DEFINE_bool(
    "to_official", False, "Write official names instead.", flag_values=_FLAGS
)
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", flag_values=_FLAGS)


def main(argv: Sequence[str]) -> None:
    """argv: the program's name, then arguments as in the module's docstring."""
    if any(arg in ("--help", "-h") for arg in argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        return
    argv = ["--to_official" if arg == "--to-official" else arg for arg in argv]
    try:
        _FLAGS.unparse_flags()
        rest, config = _FLAGS(argv)[1:], _CONFIG.value
        if config is not None:
            file = config_flags.get_config_filename(_FLAGS["config"]).split(":")[0]
            if not Path(file).exists():  # ml_collections would tell later, in a traceback
                fail(f"no configuration file {file}")
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        SyntaxError,
        ImportError,
        OSError,
    ) as error:
        fail(error)
    if len(rest) != 1:
        fail("name one file to convert: python -m relay_jax.official.convert FILE --out=DIR")
    if not _OUT.value:
        fail("say where to write: --out=DIR (with --to-official: --out=FILE.safetensors)")
    if (config is None) != (not _STAGE.value):
        fail("--config and --stage go together")
    if _REVERSE.value and (_WEIGHTS.value != "ema" or not _OUT.value.endswith(".safetensors")):
        fail("--to-official writes the ema weights, to a file --out=NAME.safetensors")
    logging.use_absl_handler()
    quieten()
    jax.config.update("jax_platforms", "cpu")  # no accelerator is needed
    try:
        stage = None if config is None else parse_stage(build(config), _STAGE.value)
        if _REVERSE.value:
            print(export(Path(rest[0]), Path(_OUT.value), stage.network if stage else None))
        else:
            wanted = (stage.name, stage.network) if stage else None
            print(convert(Path(rest[0]), Path(_OUT.value), _WEIGHTS.value, wanted))
    except (FileError, ConfigError, CheckpointError, OSError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote {_OUT.value}")


if __name__ == "__main__":
    main(sys.argv)

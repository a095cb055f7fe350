"""Official weights <-> the checkpoints of a stage, and the command for it.

    python -m relay_jax.official.convert FILE --out=DIR [--weights=net]
        [--config=imagenet256 --stage=relay]
    python -m relay_jax.official.convert --to-official DIR --out=FILE.safetensors

The first reads an official .pt or .pkl file, without running
anything in it, and writes DIR/checkpoints, from which a stage
samples. The second writes the averaged weights of a stage's folder,
or of such a DIR, as a state dict with the official names; what
network it is, the checkpoint or the run says. With a configuration,
the network must be that of its stage. Bad input is one line and exit
status 2; nothing is overwritten, and nothing is left behind by a
conversion that fails.
"""

import os
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from relay_jax.runtime import start

# Before JAX, whose import takes seconds and may fail.
if start.is_command(__name__):
    start.begin()

import jax
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from relay_jax.config import build, config_file, parse_stage
from relay_jax.errors import UserError, one_line
from relay_jax.models.network import describe, parameter_count, shapes_of
from relay_jax.models.unet import UNet
from relay_jax.official.files import OfficialFile, read_official
from relay_jax.official.network import (
    check_same_network,
    heads_at,
    in_words,
    network_of,
    noted_network,
    unet,
    unused_arguments,
)
from relay_jax.official.parameters import (
    HEAD_WIDTH,
    check_parameters,
    filters,
    from_official,
    to_official,
)
from relay_jax.official.pickle import show
from relay_jax.runtime.checkpoint import load_ema, read_meta
from relay_jax.runtime.counting import Add, counting
from relay_jax.runtime.files import cannot_write, expanded, file_sha256, try_folder
from relay_jax.runtime.logs import fail, quieten
from relay_jax.runtime.safetensors import write_safetensors
from relay_jax.runtime.sharding import make_mesh
from relay_jax.runtime.single import write_checkpoint
from relay_jax.stage import Stage
from relay_jax.workdir import open_config, read_config


def convert(source: Path, out: Path, weights: str = "ema", stage: Stage | None = None) -> str:
    """An official file -> out/checkpoints/0 with items `ema` and `meta`; returns a line about it.

    weights: ema or net; stage: the one whose network it must be.
    Memory: one and a half times the parameters. Raises
    UserError, also where `out` exists and is not an empty
    folder, and StorageError.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists and is not an empty folder; name another --out")
    try_folder(out)
    official = read_official(source, networks=(weights,))
    pickled = official.ema if weights == "ema" else official.net
    if pickled is None:
        raise UserError(
            f"{source.name} has no {weights!r}, only the averaged network; leave --weights out"
        )
    # The file is refused before anything is written: it may be of
    # any network, or of none.
    try:
        network = network_of(pickled)
        if stage is not None:
            expected = unet(stage.network, f"stage {stage.name}")
            check_same_network(network, expected, stage.name)
        check_parameters(pickled.params, network)
    except UserError as error:
        raise UserError(f"{source.name} does not fit: {error}") from error
    with counting(f"hashing {source.name}", source.stat().st_size / 1e6, "MB") as add:
        sha256 = file_sha256(source, add)
    meta = {
        "source": source.name,
        "sha256": sha256,
        "weights": weights,
        "images": official.images_seen,
        "network": describe(network),
    }
    arrays = from_official(pickled.params)
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(arrays))
    with counting(f"converting {weights}", size / 1e6, "MB") as add:
        copy = partial(_on_cpu, official, jax.devices("cpu")[0], add)
        params = jax.tree.map(copy, arrays)
    with counting(f"writing {out.name}"):
        _write_checkpoint(out, params, meta)
    images = "not noted" if meta["images"] is None else format(meta["images"], ",")
    ignored = ", ".join(unused_arguments(pickled))
    return (
        f"{source.name}: {weights}, {parameter_count(params):,} parameters, {in_words(network)}, "
        f"images seen: {images}"
        + (f"; constructor arguments not used: {show(ignored)}" if ignored else "")
    )


def _on_cpu(official: OfficialFile, device: jax.Device, add: Add, value: np.ndarray) -> jax.Array:
    placed = jax.device_put(value, device).block_until_ready()
    add(value.nbytes / 1e6)
    # One parameter at a time: the file must not stay in memory
    # beside its copy.
    official.release()
    return placed


def _write_checkpoint(out: Path, ema: dict, meta: dict) -> None:
    """out/checkpoints/0 as runtime.checkpoint reads it; `out` appears when it is complete."""
    out = out.absolute()
    partial_out = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial_out.mkdir(parents=True)
        write_checkpoint(partial_out / "checkpoints", 0, ema, meta)
        partial_out.rename(out)
    # ValueError and RuntimeError are
    # TensorStore's, such as for a full disk.
    except (OSError, ValueError, RuntimeError) as error:
        raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial_out, ignore_errors=True)


def export(folder: Path, out: Path, stage: Stage | None = None) -> str:
    """The averaged weights of a stage's folder -> a safetensors file with official names.

    stage: the one whose network it must be. Returns a line about it.
    Raises UserError, also where `out` exists, and StorageError.
    """
    if out.exists():
        raise UserError(f"{out} exists; name another --out")
    try_folder(out.parent)
    if not (folder / "checkpoints").is_dir():
        raise UserError(f"{folder} is not the folder of a stage (it has no checkpoints)")
    network = _trained_network(folder, stage)
    # The order of the attention channels depends on the heads, which
    # no shape tells.
    if heads_at(network, network.head_width) != heads_at(network, HEAD_WIDTH):
        raise UserError(
            f"with model.head_width {network.head_width} its attention differs from that of the "
            f"official network, which has {HEAD_WIDTH} channels per head"
        )
    # On one device: a split array would
    # be gathered again for the file.
    with counting(f"reading {folder.name}"):
        mesh = make_mesh(devices=jax.devices("cpu")[:1])
        ema, notes = load_ema(folder, shapes_of(network), mesh)
    write_safetensors(out, to_official(ema) | filters(network), {"format": "pt"})
    return (
        f"{folder}: ema of step {notes['step']}, {parameter_count(ema):,} parameters, "
        f"{in_words(network)}"
    )


def _trained_network(folder: Path, stage: Stage | None) -> UNet:
    """The network of a stage's folder: of its notes, else of `stage`, else of its run."""
    noted = noted_network(read_meta(folder))
    # What was trained counts; a
    # configuration may have changed since.
    if noted is not None:
        if stage is not None:
            expected = unet(stage.network, f"stage {stage.name}")
            check_same_network(noted, expected, stage.name, "checkpoint")
        return noted
    if stage is None:
        stage = _stage_of_run(folder.absolute())
    return unet(stage.network, f"stage {stage.name}")


def _stage_of_run(folder: Path) -> Stage:
    """The stage with this folder, from the configuration of its run.

    Checkpoints of earlier versions do not say what network they are
    of; the run beside them does.
    """
    if read_config(folder.parent) is None:
        raise UserError(
            f"the checkpoint in {folder} does not say what network it is of; add --config and "
            "--stage"
        )
    stage = parse_stage(build(open_config(folder.parent)), folder.name)
    assert stage is not None
    return stage


# Command line: flags of its own, because the main program has some
# of the same names.

_FLAGS = flags.FlagValues()
_HERE: dict[str, Any] = {"flag_values": _FLAGS}
_OUT = flags.DEFINE_string(
    "out", "", "Folder to write; with --to-official a .safetensors file.", **_HERE
)
_WEIGHTS = flags.DEFINE_enum("weights", "ema", ["ema", "net"], "Averaged or raw weights.", **_HERE)
_STAGE = flags.DEFINE_string("stage", "", "Stage of --config that the network must fit.", **_HERE)
_REVERSE = flags.DEFINE_bool("to_official", False, "Write official names instead.", **_HERE)
_CONFIG = config_flags.DEFINE_config_file("config", None, "Configuration file.", **_HERE)


@dataclass(frozen=True)
class Request:
    """What a command line asks for. config: with the name of its stage, None without --config."""

    source: Path
    out: Path
    weights: str
    reverse: bool
    config: tuple[Any, str] | None

    def run(self) -> str:
        """Does it; returns a line about it. Raises UserError."""
        stage = None
        if self.config is not None:
            config, name = self.config
            stage = parse_stage(build(config), name)
        if self.reverse:
            return export(self.source, self.out, stage)
        return convert(self.source, self.out, self.weights, stage)


def parse(argv: Sequence[str]) -> Request:
    """A command line as in the module's docstring, program name first. Raises UserError."""
    try:
        _FLAGS.unparse_flags()
        argv = _usual(argv)
        with start.argv_is(argv):
            rest, config = _FLAGS(argv)[1:], _CONFIG.value
    except UserError:
        raise
    # A configuration file is a program: what it raises is told like
    # a mistake in a flag.
    except Exception as error:
        raise UserError(one_line(error)) from error
    if len(rest) != 1:
        raise UserError(
            "name one file to convert: python -m relay_jax.official.convert FILE --out=DIR"
        )
    if not _OUT.value:
        raise UserError(
            "say where to write: --out=DIR (with --to-official: --out=FILE.safetensors)"
        )
    if (config is None) != (not _STAGE.value):
        raise UserError("--config and --stage go together")
    if _REVERSE.value and (_WEIGHTS.value != "ema" or not _OUT.value.endswith(".safetensors")):
        raise UserError("--to-official writes the ema weights, to a file --out=NAME.safetensors")
    return Request(
        source=expanded(rest[0]),
        out=expanded(_OUT.value),
        weights=_WEIGHTS.value,
        reverse=_REVERSE.value,
        config=None if config is None else (config, _STAGE.value),
    )


def _usual(argv: Sequence[str]) -> list[str]:
    """A command line in absl's spelling, and with --config as a file that is there."""
    words: list[str] = []
    for word in argv:
        if word == "--to-official":
            word = "--to_official"
        elif word.startswith("--config="):
            word = f"--config={config_file(word.removeprefix('--config='))}"
        elif words and words[-1] == "--config":
            word = config_file(word)
        words.append(word)
    return words


def main(argv: Sequence[str]) -> None:
    """argv: the program's name, then arguments as in the module's docstring."""
    if any(arg in ("--help", "-h") for arg in argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        return
    try:
        start.refuse_bytes(argv)
        request = parse(argv)
        logging.use_absl_handler()
        quieten()
        # No accelerator is needed, and
        # one may be busy with a training.
        jax.config.update("jax_platforms", "cpu")
        print(request.run())
    except UserError as error:
        fail(error, error.status)
    except (OSError, UnicodeError) as error:
        fail(error)
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"wrote {request.out}")


if __name__ == "__main__":
    main(sys.argv)

"""Weights in one file, those that come with the package among them, as the folder of a run.

    run_of("cifar10")               of the package
    run_of("mine.safetensors")      made by relay_jax/weights/pack.py

A file is unpacked once, into the user's cache folder
($XDG_CACHE_HOME or ~/.cache, below relay_jax), as an ordinary run:
config.json and a checkpoint of each stage. The folder is named by
the hash of the file, and appears when it is whole. Everything that
opens a run opens it.

    python -m relay_jax.weights.unpack FILE --out=DIR
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from relay_jax.errors import StorageError, UserError, one_line
from relay_jax.runtime.checkpoint import quiet
from relay_jax.runtime.files import cannot_write, expanded, file_sha256, parse_json, write_json
from relay_jax.runtime.logs import fail
from relay_jax.runtime.safetensors import read_safetensors
from relay_jax.runtime.single import write_checkpoint
from relay_jax.workdir import CONFIG

FORMAT = "relay_jax-1"  # "format" in the metadata of a file
SUFFIX = ".safetensors"
FOLDER = Path(__file__).parent


def names() -> list[str]:
    """The weights that come with the package."""
    return sorted(file.stem for file in FOLDER.glob(f"*{SUFFIX}"))


def stages_in(run: Path) -> list[str]:
    """The names of the stages with checkpoints in the folder of a run."""
    return sorted(folder.parent.name for folder in run.glob("*/checkpoints"))


def run_of(text: str | os.PathLike[str]) -> Path:
    """The folder of a run: that of weights in a file, unpacked where it has to be; else `text`.

    text: a name of the package, a file .safetensors, or a folder. A
    folder that holds a run or stages comes before a name. Raises
    UserError for a file that is not there or no weights, and
    StorageError where it cannot be unpacked.
    """
    path = expanded(text)
    if path.is_dir() and ((path / CONFIG).exists() or stages_in(path)):
        return path
    if str(text) in names():
        path = FOLDER / f"{text}{SUFFIX}"
    return _unpacked(path) if path.suffix == SUFFIX and not path.is_dir() else path


def weights_run(text: str) -> Path:
    """`run_of`, for what must be weights of all stages. Raises UserError that lists the names."""
    run = run_of(text)
    if not (run / CONFIG).is_file() or not stages_in(run):
        raise UserError(
            f"unknown weights {text!r}; the package has {', '.join(names())}; or name a file "
            f"{SUFFIX}, or the folder of a run"
        )
    return run


def _unpacked(file: Path) -> Path:
    try:
        sha256 = file_sha256(file)
    except OSError as error:
        raise UserError(f"weights {file} cannot be read ({error.strerror or error})") from error
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute()
    folder = base / "relay_jax" / f"weights-{file.stem}-{sha256[:16]}"
    if not (folder / CONFIG).exists():
        logging.info("unpacking %s into %s", file.name, folder)
        # In a process of its own: Orbax starts JAX's devices, and in
        # this one they are set up later, or belong to several hosts.
        root = str(Path(__file__).parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {"JAX_PLATFORMS": "cpu", "PYTHONPATH": os.pathsep.join(paths)}
        done = subprocess.run(
            [sys.executable, "-m", __name__, str(file.absolute()), f"--out={folder}"],
            env=os.environ | environment,
            capture_output=True,
            text=True,
        )
        if done.returncode:
            line = (done.stderr.strip().splitlines() or [f"status {done.returncode}"])[-1]
            failure = StorageError(line.removeprefix("error: "))
            failure.status = done.returncode
            raise failure
    return folder


def read_weights(file: Path) -> tuple[dict[str, Any], dict[str, tuple[dict, dict]]]:
    """A file as (configuration, {stage: (parameters, float32; notes)}). Raises UserError."""
    try:
        arrays, metadata = read_safetensors(file)
        if metadata.get("format") != FORMAT:
            raise ValueError("make one of a run by python -m relay_jax.weights.pack")
        config, notes = (parse_json(metadata[key]) for key in ("config", "stages"))
        stages: dict[str, tuple[dict, dict]] = {}
        for stage in config["stages"]:
            # Names of folders, by whoever made the file.
            if not stage.isidentifier():
                raise ValueError(f"{stage!r} is no name of a stage")
            stages[stage] = {}, {**notes[stage], "step": int(notes[stage]["step"])}
            if dataset := notes[stage].get("dataset"):
                # The configuration may name another form of the data,
                # of which nobody can tell that the images are the same.
                dataset["content"] = ""
        for name, array in arrays.items():
            stage, *parents, leaf = name.split("/")
            node = stages[stage][0]
            for parent in parents:
                node = node.setdefault(parent, {})
            node[leaf] = array.astype(np.float32)
        return config, stages
    except OSError as error:
        raise UserError(f"weights {file} cannot be read ({error.strerror or error})") from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} holds no weights of a relay: {one_line(error, 200)}") from error


def unpack(file: Path, out: Path) -> None:
    """Writes the folder of a run, which appears when it is whole; one that was first stays.

    Raises UserError for what is no such file, and StorageError.
    """
    config, stages = read_weights(file)
    out = out.absolute()
    partial = out.with_name(f".{out.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for stage, (params, notes) in stages.items():
            step = notes.pop("step")
            with quiet():
                write_checkpoint(partial / stage / "checkpoints", step, params, notes)
        write_json(partial / CONFIG, config)
        partial.rename(out)
    except OSError as error:
        if not (out / CONFIG).exists():
            raise cannot_write(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description="Weights in one file -> the folder of a run.")
    parser.add_argument("file", type=expanded)
    parser.add_argument("--out", type=expanded, required=True)
    arguments = parser.parse_args()
    try:
        if arguments.out.exists():
            raise UserError(f"{arguments.out} exists; name another --out")
        unpack(arguments.file, arguments.out)
    except UserError as error:
        fail(error, error.status)


if __name__ == "__main__":
    main()

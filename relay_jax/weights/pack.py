"""The averaged weights of a run as one file, with its configuration.

    python -m relay_jax.weights.pack runs/NAME --out=NAME.safetensors [--about=NAME.json]
        [--config.KEY=VALUE ...]

bfloat16, all stages, named STAGE/PATH; two bytes for each parameter.
`--weights=NAME.safetensors` and rx.load("NAME.safetensors") open it
(unpack.py). --config.KEY changes what the configuration in the file
says, such as where the data set is; which average of the weights it
is `sample.ema` says, as in sampling. --about: a JSON file that says
where the weights come from, kept in the metadata. Metadata, all text:

format    relay_jax-1
config    config.json of the run that it will be
stages    by name: images trained, steps, network, data set
about     what --about says
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from relay_jax.runtime import start

# Before JAX, whose import takes seconds and may fail.
if start.is_command(__name__):
    start.begin()

import copy
import json

import jax
import ml_dtypes
import numpy as np
from absl import flags, logging
from ml_collections import config_flags

from relay_jax import workdir
from relay_jax.config import Settings, settings_of
from relay_jax.errors import UserError, one_line
from relay_jax.runtime.counting import counting
from relay_jax.runtime.files import expanded, read_json, try_folder
from relay_jax.runtime.logs import fail, quieten
from relay_jax.runtime.safetensors import write_safetensors
from relay_jax.runtime.sharding import make_mesh
from relay_jax.sampling.weights import load_weights
from relay_jax.weights.unpack import FORMAT, SUFFIX


def pack(settings: Settings, run: Path, out: Path, about: Any = None) -> str:
    """Weights of all stages of a run -> a file; returns a line about it.

    settings: the run's configuration, as the file will say it; about:
    a JSON value. Raises UserError for weights that are missing or do
    not fit, and StorageError.
    """
    # On one device: a split array would
    # be gathered again for the file.
    mesh = make_mesh(devices=jax.devices("cpu")[:1])
    config, stages = copy.deepcopy(dict(settings.plain)), {}
    arrays: dict[str, np.ndarray] = {}
    for stage in settings.stages:
        if stage.guide is not None:
            raise UserError(
                f"stage {stage.name}: the weights of a guide are not packed; leave it out by "
                f"--config.stages.{stage.name}.sample.guide="
            )
        with counting(f"reading {stage.name}"):
            params, notes = load_weights(stage, run / stage.name, mesh)
        stages[stage.name] = notes
        if stage.ema:
            # The one that the file has.
            config["stages"][stage.name]["sample"]["ema"] = ""
        for path, leaf in jax.tree.leaves_with_path(params):
            name = "/".join([stage.name, *(str(key.key) for key in path)])
            arrays[name] = np.asarray(leaf).astype(ml_dtypes.bfloat16)
    metadata = {"config": config, "stages": stages, "about": about}
    texts = {name: json.dumps(value) for name, value in metadata.items()}
    write_safetensors(out, arrays, {"format": FORMAT, **texts})
    images = ", ".join(f"{name} {notes['images']:,}" for name, notes in stages.items())
    return f"{out}: {out.stat().st_size:,} bytes; images trained: {images}"


# Command line: flags of its own, because the main program has some
# of the same names.

_FLAGS = flags.FlagValues()
_OUT = flags.DEFINE_string("out", "", "File .safetensors to write.", flag_values=_FLAGS)
_ABOUT = flags.DEFINE_string("about", "", "JSON file: provenance, licence.", flag_values=_FLAGS)
_CONFIG = config_flags.DEFINE_config_file(
    "config", None, "Keys of the run's configuration.", lock_config=True, flag_values=_FLAGS
)


@dataclass(frozen=True)
class Request:
    """What a command line asks for."""

    settings: Settings
    run: Path
    out: Path
    about: Any


def parse(argv: Sequence[str]) -> Request:
    """A command line as in the module's docstring, program name first. Raises UserError."""
    _FLAGS.unparse_flags()
    for name in [name for name in _FLAGS if name.startswith("config.")]:
        delattr(_FLAGS, name)  # of an earlier command line of this process
    words = [word for word in argv[1:] if not word.startswith("-")]
    if len(words) != 1:
        raise UserError(
            f"name one run to pack: python -m relay_jax.weights.pack runs/NAME --out=FILE{SUFFIX}"
        )
    run = expanded(words[0])
    workdir.open_config(run)
    argv = [argv[0], f"--config={workdir.__file__}:{run}", *argv[1:]]
    try:
        with start.argv_is(argv):
            _FLAGS(argv)
        config = _CONFIG.value
        about = read_json(expanded(_ABOUT.value)) if _ABOUT.value else None
    except UserError:
        raise
    except Exception as error:
        raise UserError(one_line(error)) from error
    if not _OUT.value.endswith(SUFFIX):
        raise UserError(f"say which file to write: --out=NAME{SUFFIX}")
    out = expanded(_OUT.value)
    if out.exists():
        raise UserError(f"{out} exists; name another --out")
    return Request(settings_of(config), run, out, about)


def main(argv: Sequence[str]) -> None:
    """argv: the program's name, then arguments as in the module's docstring."""
    if any(arg in ("--help", "-h") for arg in argv):
        print(__doc__, _FLAGS.get_help(), sep="\n")
        return
    try:
        start.refuse_bytes(argv)
        request = parse(argv)
        try_folder(request.out.absolute().parent)
        logging.use_absl_handler()
        quieten()
        # No accelerator is needed, and
        # one may be busy with a training.
        jax.config.update("jax_platforms", "cpu")
        print(pack(request.settings, request.run, request.out, request.about))
    except UserError as error:
        fail(error, error.status)


if __name__ == "__main__":
    main(sys.argv)

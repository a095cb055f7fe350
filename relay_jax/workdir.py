"""The folder of a run: its configuration, and where the weights of its stages are.

WORKDIR/config.json      the configuration as it was begun; a run opens itself from it
WORKDIR/STAGE/           checkpoints, logs and previews of a stage
"""

import json
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from relay_jax.errors import UserError, one_line
from relay_jax.runtime.files import write_json
from relay_jax.stage import Stage

CONFIG = "config.json"

# Keys that may change between two runs in one workdir without making it
# another relay.
FREE = (
    "log",
    "checkpoint",
    "evaluate",
    "sample",
    "mesh",
    "threads",
    "workers",
    "hint",
    "path",
    "data_dir",
    "images",
    "remat",
    "max_nonfinite",
    "accumulate",
    "debug",
)

# Keys of a stage that earlier versions wrote under another name.
RENAMED = {
    ("model", "augment_labels"): "num_augment",
    ("sample", "sde_scale"): "fresh_noise",
}
# Keys that earlier versions did not have, with the value that they meant.
IMPLIED = {("model", "kind"): "unet", ("sample", "kind"): "heun"}


def flat(node: object, skip: Container[str] = (), path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: key.key -> value; lists stay whole.

    skip: keys left out, with all below them.
    """
    if not isinstance(node, Mapping):
        return {path: node}
    pairs: dict[str, Any] = {}
    for key, child in node.items():
        if key not in skip:
            pairs |= flat(child, skip, f"{path}.{key}" if path else str(key))
    return pairs


def read_config(workdir: Path) -> dict[str, Any] | None:
    """config.json of a run in today's names, None where there is none. Raises UserError."""
    path = workdir / CONFIG
    try:
        return upgraded(json.loads(path.read_text()))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise UserError(
            f"{path} is damaged ({one_line(error)}); restore it, or use another --workdir"
        ) from error


def upgraded(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration as an earlier version wrote it, in the names of this one."""
    for stage in config.get("stages", {}).values():
        for (section, old), new in RENAMED.items():
            if old in stage.get(section, {}):
                stage[section][new] = stage[section].pop(old)
        for (section, key), value in IMPLIED.items():
            stage.setdefault(section, {}).setdefault(key, value)
    return config


def get_config(workdir: str) -> ConfigDict:
    """For --config=relay_jax/workdir.py:WORKDIR, which main.py names where --config is left out:
    a run opens itself, and --config.KEY=VALUE works on it as on a
    file."""
    return open_config(Path(workdir))


def open_config(workdir: Path) -> ConfigDict:
    """The configuration of a run, from its config.json. Raises UserError if there is none."""
    kept = read_config(workdir)
    if kept is None:
        raise UserError(
            f"no run in {workdir} ({CONFIG} is missing); train one first or correct --workdir"
        )
    return ConfigDict(kept)


def claim_workdir(plain: Mapping[str, Any], workdir: Path, create: bool) -> None:
    """Ties a workdir to its configuration: writes config.json, or compares with the one there.

    plain: the configuration as JSON values. create: False for reading
    only (sampling). Raises UserError naming the first key that differs,
    or the missing run; nothing is overwritten then.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    kept = read_config(workdir)
    if kept is not None:
        old, new = flat(kept, FREE), flat(upgraded(json.loads(json.dumps(plain))), FREE)
        for key in sorted(old.keys() | new.keys()):
            if old.get(key) != new.get(key):
                raise UserError(
                    f"{workdir} belongs to another configuration: {key} is {old.get(key)!r} there "
                    f"and {new.get(key)!r} here; use another --workdir, or the configuration it "
                    "was made with"
                )
    elif not create:
        raise UserError(
            f"no run in {workdir} ({CONFIG} is missing); train one first or correct --workdir"
        )
    if create:
        write_json(workdir / CONFIG, plain)


def parse_weights(stages: Sequence[Stage], texts: Mapping[str, str]) -> dict[str, Path]:
    """Weights of stages by stage name: the folder of a stage, or of one checkpoint for FOLDER@STEP.

    Raises UserError for an unknown stage, and for a folder or
    checkpoint that is not there.
    """
    names = [stage.name for stage in stages]
    for name, text in texts.items():
        if text and name not in names:
            raise UserError(f"unknown stage {name!r}; this configuration has {', '.join(names)}")
    return {name: weights_folder(name, text) for name, text in texts.items() if text}


def weights_folder(name: str, text: str) -> Path:
    """FOLDER as it is, FOLDER@STEP as FOLDER/checkpoints/STEP. Raises UserError."""
    folder, step = Path(text), ""
    before, at, after = text.rpartition("@")
    if at and after.isdecimal() and not (folder / "checkpoints").is_dir():
        folder, step = Path(before), after
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(
            f"--weights.{name}: {folder} has no checkpoints; name a converted or trained stage"
        )
    if step and not (checkpoints / step).is_dir():
        steps = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())
        present = ", ".join(map(str, reversed(steps))) or "none"
        raise UserError(
            f"--weights.{name}: {folder} has no checkpoint of step {step}; there are {present}"
        )
    return checkpoints / step if step else folder

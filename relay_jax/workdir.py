"""The folder of a run: its configuration, and where the weights of its stages are.

WORKDIR/config.json      the configuration as it was begun; a run opens itself from it
WORKDIR/dataset.json     the data set as it was begun with: classes, sizes, identity
WORKDIR/STAGE/           checkpoints, logs and previews of a stage
"""

import json
import math
from collections.abc import Container, Mapping, Sequence
from pathlib import Path
from typing import Any

from absl import logging
from ml_collections import ConfigDict

from relay_jax.data.description import Description
from relay_jax.data.identity import changes, from_summary, summary
from relay_jax.errors import StorageError, UserError, one_line
from relay_jax.runtime.files import expanded, read_json, write_json
from relay_jax.stage import Stage

CONFIG, DATASET = "config.json", "dataset.json"
MAX_BYTES = 2**22  # of a configuration; the published ones have 5 KB

# Keys that may change between two runs in one workdir without making
# it another relay.
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
    "identity",
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
# Keys that earlier versions did not have, for what they did by
# accident: their runs may go on with either.
SINCE = {"dataset.exif": True, "dataset.background": [255, 255, 255]}
# Keys that earlier versions did not
# have, with the value that they meant.
IMPLIED = {
    ("model", "kind"): "unet",
    ("train", "clip"): 0.0,
    ("train", "ema"): [],
    ("sample", "kind"): "heun",
    ("sample", "correction"): "official",
    ("sample", "fresh_noise_rate"): 0.0,
    ("sample", "corrector"): False,
    ("sample", "guide"): "",
    ("sample", "guide_weight"): 2.0,
    ("sample", "guide_interval"): [0.0, math.inf],
    ("sample", "guide_ema"): "",
    ("sample", "ema"): "",
}
# The same of a stage that continues images.
IMPLIED_RELAY = {
    ("sample", "direct"): True,
    ("sample", "exact_first_blur"): False,
    ("sample", "handoff"): "image",
    ("process", "sigma_full"): 0.6,
    ("process", "condition_sigma_min"): 0.01,
    ("process", "condition_sigma_max"): 0.5,
    ("sample", "condition_sigma"): 0.1,
}


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
        return upgraded(read_json(path, MAX_BYTES))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror})") from error
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
        continues = "handoff_sigma" in stage.get("sample", {})
        implied = IMPLIED | (IMPLIED_RELAY if continues else {})
        for (section, key), value in implied.items():
            stage.setdefault(section, {}).setdefault(key, value)
    # So that the key can be set on the
    # command line for an older run.
    for key in ("preset", "dinov2"):
        config.get("evaluate", {}).setdefault(key, "")
    config.get("evaluate", {}).setdefault("pictures", True)
    config.get("dataset", {}).setdefault("identity", "listing")
    return config


def get_config(workdir: str) -> ConfigDict:
    """For --config=relay_jax/workdir.py:WORKDIR, which main.py names where --config is left out.

    So a run opens itself, and --config.KEY=VALUE works on it as on a
    file.
    """
    return open_config(Path(workdir))


def open_config(workdir: Path) -> ConfigDict:
    """The configuration of a run, from its config.json. Raises UserError if there is none."""
    kept = read_config(workdir)
    if kept is None:
        raise UserError(
            f"no run in {workdir} ({CONFIG} is missing); train one first or correct --workdir"
        )
    # So that the keys can be set on the
    # command line for an older run.
    for key, value in SINCE.items():
        kept.get("dataset", {}).setdefault(key.partition(".")[2], value)
    return ConfigDict(_with_tuples(kept))


def _with_tuples(node: Any) -> Any:
    """JSON's lists as the tuples that they were: flags override these alone."""
    if isinstance(node, Mapping):
        return {key: _with_tuples(child) for key, child in node.items()}
    return tuple(map(_with_tuples, node)) if isinstance(node, list) else node


def claim_workdir(plain: Mapping[str, Any], workdir: Path, create: bool) -> None:
    """Ties a workdir to its configuration: writes config.json, or compares with the one there.

    plain: the configuration as JSON values. create: False for
    reading only (sampling). Raises UserError naming the first key
    that differs, or the missing run; nothing is overwritten then.
    """
    if workdir.exists() and not workdir.is_dir():
        raise UserError(f"--workdir {workdir} is a file; name a folder")
    kept = read_config(workdir)
    if kept is not None:
        old, new = (
            flat(kept, FREE),
            flat(upgraded(json.loads(json.dumps(plain))), FREE),
        )
        for key in sorted(old.keys() | new.keys()):
            if key in SINCE and not (key in old and key in new):
                continue
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
    # Not where nothing has changed: a finished run may lie where
    # nobody may write.
    if create and kept != json.loads(json.dumps(plain)):
        write_json(workdir / CONFIG, plain)


def read_dataset(workdir: Path) -> dict[str, Any] | None:
    """dataset.json of a run; None where there is none, and for a damaged one, with a warning."""
    path = workdir / DATASET
    try:
        kept = read_json(path)
        # What is compared must be there; the rest is for people.
        identity = kept["identity"]
        names = [str(part["name"]) for part in identity["parts"]]
        if not names or not isinstance(identity["content"], str):
            raise ValueError("it describes no data set")
        int(identity["images"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError) as error:
        logging.warning("%s is damaged and is made again: %s", path, one_line(error))
        return None
    return kept


def kept_identity(workdir: Path) -> dict[str, Any] | None:
    """What the data set of a run is, for comparison, None for runs that do not know it."""
    kept = read_dataset(workdir)
    return kept["identity"] if kept else None


def claim_dataset(workdir: Path, description: Description) -> None:
    """Ties a run to its data set: writes dataset.json, or compares with the one there.

    The same data elsewhere are accepted, and so is a run of an
    earlier version, which knows no data set yet. Raises UserError
    that says what has changed; nothing is overwritten then.
    """
    kept, value = read_dataset(workdir), description.plain()
    # The checkpoints know it, too, if less of it: a lost file does
    # not let other data in.
    stages = [] if kept else [(f, notes_of(f).get("dataset")) for f in sorted(workdir.glob("*"))]
    for folder, dataset in stages:
        if dataset:
            refuse_changes(from_summary(dataset), description.identity, folder)
    if kept is not None:
        refuse_changes(kept["identity"], description.identity, workdir)
        # Once the bytes were hashed, a start that does not hash them
        # must not forget it.
        for old, new in zip(kept["identity"]["parts"], value["identity"]["parts"], strict=False):
            if "contents" in old:
                new.setdefault("contents", old["contents"])
    if value != kept:
        try:
            write_json(workdir / DATASET, value)
        # The training itself will say that nothing can be written; a
        # finished run needs to write nothing.
        except StorageError as error:
            logging.warning("%s", one_line(error))


def refuse_changes(old: Mapping[str, Any], new: Mapping[str, Any], folder: Path) -> None:
    """Raises UserError if two identities are of different data. folder: begun with the old one."""
    difference = changes(old, new)
    if difference:
        raise UserError(
            f"the data set has changed since {folder} was begun: {difference}; use the same data "
            "or another --workdir"
        )


def warn_of_changes(folder: Path, identity: Mapping[str, Any], what: str) -> None:
    """Logs a warning if the weights in a folder were trained on other data.

    what: the meaning of that, for the user.
    """
    dataset = notes_of(folder).get("dataset")
    if isinstance(dataset, Mapping):
        difference = changes(from_summary(dataset), identity)
        if difference:
            logging.warning("%s: %s", what, difference)


def class_names(workdir: Path | None, weights: Mapping[str, Path]) -> list[str]:
    """The names of the classes of a run, or of weights; empty where they are not known.

    weights: folders of stages or of checkpoints, which come before
    the run, as they do in sampling.
    """
    kept = [notes_of(folder).get("dataset") for folder in weights.values()]
    run = read_dataset(workdir) if workdir is not None else None
    if run is not None:
        kept.append(summary(run["identity"]))
    elif workdir is not None:
        kept += [notes_of(folder).get("dataset") for folder in sorted(workdir.glob("*"))]
    for dataset in kept:
        if isinstance(dataset, Mapping) and isinstance(dataset.get("class_names"), list):
            return [str(name) for name in dataset["class_names"]]
    return []


def notes_of(folder: Path) -> dict[str, Any]:
    """The notes of the newest checkpoint of a stage, or of one checkpoint; {} if there are none.

    Read as the file they are: no process has to wait for another.
    """
    single = folder / "meta" / "metadata"
    steps = [path for path in folder.glob("checkpoints/*") if path.name.isdecimal()]
    newest = sorted(steps, key=lambda path: int(path.name), reverse=True)
    for file in [single, *(path / "meta" / "metadata" for path in newest)]:
        try:
            notes = read_json(file)
        except (OSError, ValueError):
            continue
        if isinstance(notes, dict):
            return notes
    return {}


def parse_weights(stages: Sequence[Stage], texts: Mapping[str, str]) -> dict[str, Path]:
    """Weights of stages by stage name: the folder of a stage, or of one checkpoint for FOLDER@STEP.

    Raises UserError for an unknown stage, and for a folder or
    checkpoint that is not there.
    """
    names = [stage.name for stage in stages]
    for name, text in texts.items():
        if text and name not in names:
            raise UserError(f"unknown stage {name!r}; this configuration has {', '.join(names)}")
    return {name: weights_folder(f"--weights.{name}", text) for name, text in texts.items() if text}


def weights_folder(key: str, text: str) -> Path:
    """FOLDER as it is, FOLDER@STEP as FOLDER/checkpoints/STEP. Raises UserError, naming the key."""
    folder, step = expanded(text), ""
    before, at, after = text.rpartition("@")
    if at and after.isdecimal() and not (folder / "checkpoints").is_dir():
        folder, step = expanded(before), after
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise UserError(f"{key}: {folder} has no checkpoints; name a converted or trained stage")
    if step and not (checkpoints / step).is_dir():
        steps = sorted(int(p.name) for p in checkpoints.iterdir() if p.name.isdecimal())
        present = ", ".join(map(str, reversed(steps))) or "none"
        raise UserError(f"{key}: {folder} has no checkpoint of step {step}; there are {present}")
    return checkpoints / step if step else folder

"""What a set of samples was made with, as plain values: samples.json beside the images, and part of
a report.

Two records that differ in nothing but their seeds belong to one set
of images: image i of both is the same.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from relay_jax.errors import UserError, one_line
from relay_jax.runtime.files import read_json, write_json
from relay_jax.sampling.folder import holds_images
from relay_jax.sampling.seeds import parse_seeds, seeds_text
from relay_jax.stage import Guided, Stage, joined, own
from relay_jax.workdir import flat

RECORD = "samples.json"
# How noise follows from the seed: key(0) folded with seed, stage
# index, purpose and step (sampling/chain.py, diffusion/sampler.py
# `seeded_noise`). To be raised when that changes.
NOISE_RULE = 1
# The hash of the weights says more than their step.
_NOT_COMPARED = ("seeds", "checkpoint.step", "checkpoint.images")
# What does not change an image, or what earlier versions wrote under
# another name.
_NO_EFFECT = (
    "network.remat",
    "network.dropout",
    "network.dtype",
    "network.resolution",
)
_RENAMED = {"sampler.sde_scale": "sampler.fresh_noise"}
# What earlier versions did not write,
# with the value that they meant.
_IMPLIED = {
    "sampler.correction": "official",
    "sampler.stop_sigma": 0.0,
    "handoff": "image",
    "network.condition_channels": 0,
}


def parameters_hash(params: Mapping[str, Any]) -> str:
    """SHA-256, in hexadecimal, over names, shapes, types and bytes of all parameters, by name.

    The same for arrays of numpy and of devices, however they are
    laid out. All processes must call it.
    """
    digest = hashlib.sha256()
    leaves = {jax.tree_util.keystr(path): x for path, x in jax.tree.leaves_with_path(params)}
    for path, leaf in sorted(leaves.items()):
        value = np.ascontiguousarray(_whole(leaf))
        little = value.astype(value.dtype.newbyteorder("<"), copy=False)
        digest.update(f"{path} {list(value.shape)} {value.dtype.name}\n".encode())
        digest.update(little.tobytes())
    return digest.hexdigest()


def _whole(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        if leaf.is_fully_replicated:
            return np.asarray(leaf.addressable_data(0))
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def describe_sampling(
    stages: Sequence[Stage],
    weights: Mapping[str, tuple[dict | Guided, Mapping[str, Any]]],
    seeds: Iterable[int],
    class_rule: str,
) -> dict[str, Any]:
    """The record of a sampling, all of it JSON. All processes must call it (`parameters_hash`).

    stages: those that are sampled, in order. weights: by stage name,
    as Chain.weights: the averaged parameters and the notes of their
    checkpoint; a stage without an entry is described without them.
    class_rule: see seeds.py, or 'own' for the classes of the real
    images that a relay starts from.
    """
    stages = joined(stages)
    record = {
        "seeds": seeds_text(seeds),
        "class_rule": class_rule,
        "num_classes": stages[-1].num_classes,
        "stages": {s.name: _describe_stage(s, weights.get(s.name)) for s in stages},
        "pixel_edit": "none",
        "low_res": {},
        "noise": {
            "rule": NOISE_RULE,
            "generator": str(jax.config.jax_default_prng_impl),
        },
    }
    return json.loads(json.dumps(plain(record)))


def _describe_stage(
    stage: Stage, weights: tuple[dict | Guided, Mapping[str, Any]] | None
) -> dict[str, Any]:
    record = stage.describe()
    if weights is None:
        return record
    params, notes = weights
    record["checkpoint"] = _describe_weights(own(params), notes)
    if isinstance(params, Guided) and stage.guide is not None:
        guide = notes.get("guide", {})
        record["guide"]["checkpoint"] = {
            **_describe_weights(params.guide, guide),
            "network": guide.get("network", {}),
        }
    return record


def _describe_weights(params: Mapping[str, Any], notes: Mapping[str, Any]) -> dict[str, Any]:
    record = {
        "step": notes.get("step"),
        "images": notes.get("images"),
        "ema_sha256": parameters_hash(params),
    }
    # Of an average that was made afterwards.
    if "average" in notes:
        record["profile_error"] = notes["average"]["error"]
    return record


def plain(value: Any) -> Any:
    """Tuples as lists, infinities as text: JSON knows neither."""
    if isinstance(value, Mapping):
        return {key: plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [plain(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any] | None:
    """samples.json of a folder, None if there is none. Raises UserError if it is damaged."""
    path = folder / RECORD
    try:
        record = read_json(path)
        parse_seeds(record["seeds"])
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path} cannot be read ({one_line(error)}); use another folder") from error
    return record


def first_difference(
    before: Mapping[str, Any], now: Mapping[str, Any], weights: bool = True
) -> str | None:
    """'KEY is VALUE there and VALUE here' for the first difference, None for one set of images.

    weights: False leaves out what `describe_sampling` says of
    checkpoints, for a record made before they are loaded.
    """
    old, new = flat(before), flat(now)
    for name, renamed in _RENAMED.items():
        for key in [key for key in old if key.endswith(name)]:
            old[key.removesuffix(name) + renamed] = old.pop(key)
    # Records of earlier versions say less of network and sampler;
    # the hash of the weights and the keys that they do have decide.
    says_less = not any(key.endswith("sampler.kind") for key in old)
    for key in [*new, *(key for key in old if key not in new)]:
        if key.endswith((*_NOT_COMPARED, *_NO_EFFECT)):
            continue
        if not weights and ".checkpoint." in key:
            continue
        if says_less and key not in old and (".network." in key or ".sampler." in key):
            continue
        implied = next((v for k, v in _IMPLIED.items() if key.endswith(f".{k}")), None)
        if key not in old and implied is not None and new[key] == implied:
            continue
        if key not in old or key not in new or old[key] != new[key]:
            recorded, current = (
                "not there" if key not in pairs else json.dumps(pairs[key])[:80]
                for pairs in (old, new)
            )
            return f"{key} is {recorded} in its {RECORD} and {current} now"
    return None


def check_folder(folder: Path, record: Mapping[str, Any], weights: bool = True) -> None:
    """Raises UserError if the folder holds images of other settings, or of unknown ones."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    before = read_record(folder)
    if before is None and holds_images(folder):
        raise UserError(
            f"{folder} holds images, but no {RECORD} that says how they were made; name another "
            "--out"
        )
    difference = first_difference(before, record, weights) if before else None
    if difference:
        raise UserError(f"{folder} holds other images: {difference}; name another --out")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes samples.json, or adds the seeds to the one there.

    Its seeds are those asked for: images may still be missing.
    Raises StorageError.
    """
    before = read_record(folder)
    seeds = parse_seeds(record["seeds"]) + (parse_seeds(before["seeds"]) if before else [])
    merged = {**record, "seeds": seeds_text(seeds)}
    if merged != before:
        write_json(folder / RECORD, merged)

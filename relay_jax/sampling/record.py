"""What a set of samples was made with, as plain values: samples.json beside the images, and
part of a report.

Two records that differ in nothing but their seeds belong to one set of images: image i of both
is the same.
"""

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from relay_jax.config import ConfigError, Stage, flat
from relay_jax.diffusion.sampler import EdmSampler
from relay_jax.runtime.logs import write_json
from relay_jax.sampling.folder import cannot_write, holds_images
from relay_jax.sampling.seeds import parse_seeds, seeds_text

RECORD = "samples.json"
# How noise follows from the seed: key(0) folded with seed, stage index, purpose and step
# (sampling/chain.py, diffusion/sampler.py `seeded_noise`). To be raised when that changes.
NOISE_RULE = 1
_NOT_COMPARED = (
    "seeds",
    "checkpoint.step",
    "checkpoint.images",
)  # the hash of the weights says more


def parameters_hash(params: Mapping[str, Any]) -> str:
    """sha256, in hexadecimal, over names, shapes, types and bytes of all parameters, in the
    order of their names.

    The same for arrays of numpy and of devices, however they are laid out. All processes must
    call it.
    """
    digest = hashlib.sha256()
    for path, leaf in sorted(
        (jax.tree_util.keystr(path), leaf) for path, leaf in jax.tree.leaves_with_path(params)
    ):
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
    weights: Mapping[str, tuple[Mapping[str, Any], Mapping[str, Any]]],
    seeds: Iterable[int],
    class_rule: str,
    *,
    pixel_edit: str = "none",
    low_res: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The record of a sampling, all of it JSON. All processes must call it (`parameters_hash`).

    stages: those that are sampled, in order. weights: by stage name, what checkpoint.load_ema
    returns: the averaged parameters and the notes of their checkpoint; a stage without an entry
    is described without them.
    class_rule: see classes.py, or 'own' for the classes of the real images that a relay starts
    from.
    low_res: where a relay that is sampled alone starts from, as plain values.
    """
    record = {
        "seeds": seeds_text(seeds),
        "class_rule": class_rule,
        "num_classes": stages[-1].network.num_classes,
        "stages": {
            s.name: describe_stage(s) | _describe_weights(weights.get(s.name)) for s in stages
        },
        "pixel_edit": pixel_edit,
        "low_res": dict(low_res or {}),
        "noise": {"rule": NOISE_RULE, "generator": str(jax.config.jax_default_prng_impl)},
    }
    return json.loads(json.dumps(_plain(record)))


def describe_stage(stage: Stage) -> dict[str, Any]:
    """What a stage does to its input, but for its weights."""
    net = stage.network
    network = {
        name: getattr(net, name)
        for name in (
            "channels",
            "multipliers",
            "blocks",
            "attention",
            "head_width",
            "num_classes",
            "num_augment",
        )
    }
    kind = "edm" if isinstance(stage.sampler, EdmSampler) else "relay"
    return {
        "resolution": stage.resolution,
        "index": stage.index,
        "dtype": np.dtype(net.dtype).name,
        "network": network,
        "process": {"kind": kind, **asdict(stage.sample_process)},
        "sampler": asdict(stage.sampler) | {"steps": len(stage.sampler.sigmas()) - 1},
        "guidance": asdict(stage.guidance),
    }


def _describe_weights(
    weights: tuple[Mapping[str, Any], Mapping[str, Any]] | None,
) -> dict[str, Any]:
    if weights is None:
        return {}
    params, notes = weights
    return {
        "checkpoint": {
            "step": notes.get("step"),
            "images": notes.get("images"),
            "ema_sha256": parameters_hash(params),
        }
    }


def _plain(value: Any) -> Any:
    """Tuples as lists, infinities as text: JSON knows neither."""
    if isinstance(value, Mapping):
        return {key: _plain(child) for key, child in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(child) for child in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def read_record(folder: Path) -> dict[str, Any] | None:
    """samples.json of a folder, None if there is none. Raises ConfigError if it is damaged."""
    path = folder / RECORD
    try:
        record = json.loads(path.read_text())
        parse_seeds(record["seeds"])
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path} cannot be read ({' '.join(str(error).split())}); use another folder"
        ) from error
    return record


def first_difference(
    theirs: Mapping[str, Any], ours: Mapping[str, Any], weights: bool = True
) -> str | None:
    """'KEY is VALUE there and VALUE here' for the first that differs, None if both belong to
    one set of images.

    weights: False leaves out what `describe_sampling` says of checkpoints, for a record made
    before they are loaded.
    """
    old, new = flat(theirs), flat(ours)
    for key in [*new, *(key for key in old if key not in new)]:
        if key.endswith(_NOT_COMPARED) or (not weights and ".checkpoint." in key):
            continue
        if key not in old or key not in new or old[key] != new[key]:
            there, here = (
                "not there" if key not in of else json.dumps(of[key])[:80] for of in (old, new)
            )
            return f"{key} is {there} in its {RECORD} and {here} now"
    return None


def check_folder(folder: Path, ours: Mapping[str, Any], weights: bool = True) -> None:
    """Raises ConfigError if the folder holds images of other settings than `ours`, or of
    unknown ones."""
    if folder.exists() and not folder.is_dir():
        raise ConfigError(f"--out {folder} is a file; name a folder")
    theirs = read_record(folder)
    if theirs is None and holds_images(folder):
        raise ConfigError(
            f"{folder} holds images, but no {RECORD} that says how they were made; name "
            "another --out"
        )
    difference = first_difference(theirs, ours, weights) if theirs else None
    if difference:
        raise ConfigError(f"{folder} holds other images: {difference}; name another --out")


def write_record(folder: Path, record: Mapping[str, Any]) -> None:
    """Writes samples.json, or adds the seeds to the one there: those asked for, whose images
    may still be missing.

    Raises ConfigError if it cannot be written.
    """
    before = read_record(folder)
    seeds = parse_seeds(record["seeds"]) + (parse_seeds(before["seeds"]) if before else [])
    merged = {**record, "seeds": seeds_text(seeds)}
    if merged != before:
        try:
            write_json(folder / RECORD, merged)
        except OSError as error:
            raise cannot_write(folder / RECORD, error) from error

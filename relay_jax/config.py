"""From a ConfigDict to dataclasses: the only place that knows both.

`build` reads the stages of a relay, `settings_of` all of a
configuration. Both raise UserError before anything is compiled. What
each key means is said in configs/default.py, once.
"""

import importlib
import importlib.util
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from relay_jax.diffusion.augment import NUM_LABELS
from relay_jax.diffusion.guidance import Guidance, Guide
from relay_jax.diffusion.process import EdmProcess
from relay_jax.diffusion.processes import PROCESSES
from relay_jax.diffusion.sampler import SAMPLERS, Sampler
from relay_jax.errors import UserError, one_line
from relay_jax.models.averages import parse_name
from relay_jax.models.network import NETWORKS, Network, shapes_of
from relay_jax.resolution import Resolution, as_resolution, check_enlarged, height_width, size_text
from relay_jax.runtime.files import expanded
from relay_jax.stage import Stage, TrainSettings, joined
from relay_jax.values import (
    at_least,
    at_most,
    check_size,
    check_value,
    check_values,
    keys_of,
    made,
    named_class,
)

MAX_SEED = 2**32 - 1
MAX_BATCH = 2**22  # images at once, over all devices
MAX_GRID = 2**14  # images of a preview
MAX_SAMPLES = 10_000_000  # images of a report
DTYPES = ("float32", "bfloat16")
PIXEL_EDITS = ("none", "imagenet", "celebahq")
HANDOFF_KEYS = ("handoff_sigma", "direct", "exact_first_blur")  # of `sample`, where there is one


@dataclass(frozen=True, kw_only=True)
class DatasetSettings:
    """`config.dataset`: where images come from, and how they are read.

    keys: all of them as plain values; each
    source reads its own (data/source.py).
    """

    keys: Mapping[str, Any]
    num_classes: int
    x_flip: bool
    threads: int
    workers: int

    def __post_init__(self) -> None:
        at_least("dataset", self, num_classes=0, threads=0, workers=0)
        at_most("dataset", self, num_classes=10**6, threads=1024, workers=1024)


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """`config.checkpoint`; lengths in images."""

    every_images: int
    keep: int
    keep_every_images: int = 0
    snapshot_every_images: int = 5_000_000

    def __post_init__(self) -> None:
        at_least("checkpoint", self, every_images=1, keep=1, keep_every_images=0)
        at_least("checkpoint", self, snapshot_every_images=1)


@dataclass(frozen=True, kw_only=True)
class LogSettings:
    """`config.log`: progress, previews, profiles."""

    every_steps: int
    grid_every_images: int
    grid_images: int
    profile_first: int = 0
    profile_steps: int = 5

    def __post_init__(self) -> None:
        at_least("log", self, every_steps=1, grid_every_images=0, grid_images=1)
        at_least("log", self, profile_first=0, profile_steps=1)
        at_most("log", self, grid_images=MAX_GRID)


@dataclass(frozen=True, kw_only=True)
class SampleSettings:
    """`config.sample`: what all stages share when images are generated."""

    batch: int
    pixel_edit: str = "none"

    def __post_init__(self) -> None:
        at_least("sample", self, batch=1)
        at_most("sample", self, batch=MAX_BATCH)
        if self.pixel_edit not in PIXEL_EDITS:
            raise ValueError(
                f"sample.pixel_edit must be one of {', '.join(PIXEL_EDITS)}, "
                f"not {self.pixel_edit!r}"
            )


@dataclass(frozen=True, kw_only=True)
class EvaluateSettings:
    """`config.evaluate`: the same in --mode=evaluate, during a training and at its end."""

    samples: int
    class_check: bool = False
    features: str = "random-conv"
    inception: str = ""
    dinov2: str = ""
    reference_images: int = 10_000
    every: int = 0
    every_samples: int = 1_000
    preset: str = ""
    pictures: bool = True

    def __post_init__(self) -> None:
        at_least("evaluate", self, samples=4, reference_images=0, every=0, every_samples=4)
        at_most("evaluate", self, samples=MAX_SAMPLES, every_samples=MAX_SAMPLES)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """A whole configuration. plain: its keys as JSON values, for records."""

    seed: int
    stages: Sequence[Stage]
    dataset: DatasetSettings
    fsdp: int
    checkpoint: CheckpointSettings
    log: LogSettings
    sample: SampleSettings
    evaluate: EvaluateSettings
    debug: bool
    plain: Mapping[str, Any]

    def __post_init__(self) -> None:
        if self.fsdp < 1:
            raise ValueError(f"mesh.fsdp must be at least 1, not {self.fsdp}")
        if not 0 <= self.seed <= MAX_SEED:
            limit = "at least 0" if self.seed < 0 else f"at most {MAX_SEED}"
            raise ValueError(f"seed must be {limit}, not {self.seed}")

    @property
    def resolutions(self) -> list[Resolution]:
        """Of the stages, rising."""
        return [stage.resolution for stage in self.stages]


def settings_of(config: ConfigDict) -> Settings:
    """All of a configuration, checked. Raises UserError, one line."""
    try:
        dataset = dict(config.dataset.items())
        for key in ("path", "data_dir"):
            # A bucket's address is no path.
            if str(dataset.get(key, "")).startswith("~"):
                dataset[key] = str(expanded(dataset[key]))
        field_names = [field.name for field in fields(DatasetSettings) if field.name != "keys"]
        dataset_keys = {"keys": dataset, **{name: dataset[name] for name in field_names}}
        check_value("seed", int, config.seed)
        check_value("mesh.fsdp", int, config.mesh.fsdp)
        stages = build(config)
        plain = json.loads(config.to_json_best_effort())
        for stage in stages:  # a square is an int in files, however it was written
            plain["stages"][stage.name]["resolution"] = stage.resolution
        return Settings(
            seed=config.seed,
            stages=stages,
            dataset=made(DatasetSettings, "dataset", dataset_keys),
            fsdp=config.mesh.fsdp,
            checkpoint=made(CheckpointSettings, "checkpoint", config.checkpoint),
            log=made(LogSettings, "log", config.log),
            sample=made(SampleSettings, "sample", config.sample),
            evaluate=made(EvaluateSettings, "evaluate", config.evaluate),
            debug=bool(config.get("debug", False)),
            plain=plain,
        )
    except UserError:
        raise
    except (ValueError, TypeError) as error:
        raise UserError(one_line(error)) from error
    except (AttributeError, KeyError) as error:
        raise UserError(f"a key is missing ({error}); start from configs/default.py") from error


def config_file(text: str) -> str:
    """--config as a file that is there: PATH[:VARIANT], or NAME[:VARIANT] of the package.

    demo, demo:smoke, configs/demo.py and /home/me/mine.py:smoke are all
    fine. Raises UserError for one that is not there.
    """
    name, colon, variant = text.partition(":")
    path = Path(name).expanduser()
    if path.suffix != ".py" or not path.is_file():
        # A bare name means the same in a checkout, in an
        # installed package and in any folder, also in one that
        # has a folder of that name.
        files = {file.stem: file for file in configurations()}
        if path.name != name or path.stem not in files:
            names = ", ".join(sorted(files))
            raise UserError(f"no configuration file {name}; the package has {names}")
        path = files[path.stem]
    return f"{path}{colon}{variant}"


def configurations() -> list[Path]:
    """The configuration files of the package, without the default that they share."""
    folder = Path(importlib.import_module("relay_jax.configs.default").__file__ or "").parent
    return sorted(f for f in folder.glob("*.py") if f.stem not in ("__init__", "default"))


def load_config(text: str) -> ConfigDict:
    """The configuration of a name or file, as --config takes it. Raises UserError."""
    file, _, variant = config_file(text).partition(":")
    spec = importlib.util.spec_from_file_location("relay_jax_config", file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        return module.get_config(variant) if variant else module.get_config()
    except Exception as error:  # the file is the user's: it may fail in any way
        raise UserError(f"{file}: {one_line(error)}") from error


def stage_names(config: ConfigDict) -> list[str]:
    """Stage names in order of resolution, the first one before a relay of its own resolution.

    A ConfigDict does not keep the order of its keys when it is copied.
    """

    def rank(name: str) -> tuple[tuple[int, int], bool]:
        size = height_width(as_resolution(config.stages[name].resolution))
        return size, config.stages[name].process.kind != "edm"

    return sorted(config.stages, key=rank)


def build(config: ConfigDict) -> list[Stage]:
    """All stages, low resolution first. Raises UserError for what could not train or sample."""
    stages: list[Stage] = []
    try:
        names = stage_names(config)
    except (AttributeError, KeyError) as error:
        raise UserError(f"a key is missing ({error}); start from configs/default.py") from error
    except (TypeError, ValueError, IndexError) as error:
        raise UserError(f"stages.*.{one_line(error)}") from error
    if not names:
        raise UserError("the configuration has no stages")
    for index, name in enumerate(names):
        try:
            stage = _build_stage(config, name, index)
            stage.check()
            if stages:
                low = stages[-1]
                check_enlarged(stage.resolution, stage.process.patch, low.resolution, low.name)
        except UserError as error:
            raise UserError(f"stage {name}: {error}") from error
        except (ValueError, TypeError) as error:
            raise UserError(f"stage {name}: {one_line(error)}") from error
        except (AttributeError, KeyError) as error:
            raise UserError(
                f"stage {name}: a key is missing ({error}); start from configs/default.py"
            ) from error
        stages.append(stage)
    joined(stages)  # raises for a hand-off that cannot be
    return stages


def rebuild(plain: Mapping[str, Any]) -> list[Stage]:
    """`build` of a configuration that is plain values, such as `Settings.plain`."""
    return build(ConfigDict(plain))


def _build_stage(config: ConfigDict, name: str, index: int) -> Stage:
    node = config.stages[name]
    process_keys = dict(node.process.items())
    sample = dict(node.sample.items())
    process_class = named_class(PROCESSES, process_keys.pop("kind"), "process.kind")
    # First of all: the keys of a stage in the wrong place would give a
    # riddle of an error.
    if process_class.starts_from_images == (index == 0):
        raise ValueError(
            "the first stage has process.kind 'edm', every later one 'relay', 'relay_linear', "
            "'cascade' (or another process that starts from images)"
        )
    process_keys = keys_of(process_class, PROCESSES, process_keys)
    process: EdmProcess = made(process_class, "process", process_keys)
    sample = keys_of(process_class, PROCESSES, sample)
    if index and not process.has_handoff:
        sample = {key: value for key, value in sample.items() if key not in HANDOFF_KEYS}
    # Sampling may change some keys of the process, such as cdf_max:
    # a key of `sample` with its name belongs to it.
    changes = {f.name: sample.pop(f.name) for f in fields(process_class) if f.name in sample}
    check_values("sample", process_class, changes)
    average = parse_name(sample.pop("ema", ""))
    guidance, guide = _guidance_of(sample)
    handoff = sample.pop("handoff", "image")
    sampler_class = named_class(SAMPLERS, sample.pop("kind", "heun"), "sample.kind")
    sampler: Sampler = made(sampler_class, "sample", keys_of(sampler_class, SAMPLERS, sample))
    train: TrainSettings = made(TrainSettings, "train", node.train)
    train = replace(train, ema=tuple(train.ema))
    check_value("dataset.num_classes", int, config.dataset.num_classes)
    model = ({"condition_channels": 3} if process.has_condition else {}) | dict(node.model.items())
    resolution = as_resolution(node.resolution)
    network = _build_network(model, resolution, config.dataset.num_classes)
    if train.augment > 0 and not isinstance(resolution, int):
        raise ValueError(f"train.augment needs squares, not {size_text(resolution)}; use 0")
    if train.augment > 0 and network.num_augment != NUM_LABELS:
        raise ValueError(
            f"train.augment needs model.num_augment={NUM_LABELS}, not {network.num_augment}"
        )
    return Stage(
        name=name,
        index=index,
        network=network,
        process=process,
        sample_process=replace(process, **changes),
        sampler=sampler,
        guidance=guidance,
        train=train,
        handoff=handoff,
        ema=average,
        guide=guide,
    )


def _guidance_of(sample: dict[str, Any]) -> tuple[Guidance, Guide | None]:
    """Takes the keys of guidance and of a guide out of a `sample` section."""
    keys: dict[str, Any] = {"guide": "", "guide_weight": 2.0, "guide_interval": (0.0, math.inf)}
    keys |= {key: sample.pop(key) for key in ("guidance", "guidance_interval")}
    keys |= {key: sample.pop(key) for key in list(sample) if key in keys}
    for key, value in keys.items():
        kind = str if key == "guide" else tuple[float, ...] if "interval" in key else float
        check_value(f"sample.{key}", kind, value)
    guidance = Guidance(weight=keys["guidance"], interval=tuple(keys["guidance_interval"]))
    guide = Guide(
        weights=keys["guide"],
        weight=keys["guide_weight"],
        interval=tuple(keys["guide_interval"]),
        ema=parse_name(sample.pop("guide_ema", "")),
    )
    return guidance, guide if guide.weights and guide.weight > 1 else None


def _build_network(model: dict[str, Any], resolution: Resolution, num_classes: int) -> Network:
    if model.get("dtype", "float32") not in DTYPES:
        raise ValueError(f"model.dtype must be {' or '.join(DTYPES)}, not {model['dtype']!r}")
    kind = model.pop("kind", "unet")
    chosen = named_class(NETWORKS, kind, "model.kind")
    keys = keys_of(chosen, NETWORKS, model)
    check_values("model", chosen, keys)
    network = network_from(
        {"kind": kind, "resolution": resolution, "num_classes": num_classes, **keys}
    )
    network.check()
    check_size(network)
    # The checks of these networks are complete. Another one is tried:
    # only its trace says whether it can be built.
    if chosen not in NETWORKS.values():
        shapes_of(network)
    return network


def network_from(description: Mapping[str, Any]) -> Network:
    """The network that models.network.describe has described, also after a way through JSON.

    Raises UserError for a kind that is not there, TypeError for fields
    that it has not.
    """
    keys = {key: tuple(v) if isinstance(v, list) else v for key, v in description.items()}
    network_class = named_class(NETWORKS, str(keys.pop("kind", "unet")), "model.kind")
    if "dtype" in keys:
        keys["dtype"] = jnp.dtype(keys["dtype"])
    return network_class(**keys)


def parse_stage(stages: Sequence[Stage], name: str) -> Stage | None:
    """The stage of that name, None for ''. Raises UserError for an unknown one."""
    for stage in stages:
        if stage.name == name:
            return stage
    if name:
        names = ", ".join(stage.name for stage in stages)
        raise UserError(f"unknown stage {name!r}; this configuration has {names}")
    return None

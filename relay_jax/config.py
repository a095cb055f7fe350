"""From a ConfigDict to typed stages: the only place that knows both, and where a bad
combination is refused.

`build` reads a whole relay and raises ConfigError with one line for the user before anything is
compiled.
Everything below the outermost functions takes these dataclasses or plain keywords.
"""

import json
import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from relay_jax.data.source import DataError, EdmZip, Source, at_resolution, make_source
from relay_jax.diffusion.augment import NUM_LABELS
from relay_jax.diffusion.dct import check_patch
from relay_jax.diffusion.process import EdmProcess, RelayProcess, check_handoff
from relay_jax.diffusion.sampler import EdmSampler, RelaySampler
from relay_jax.models.blocks import group_count
from relay_jax.models.unet import UNet, normalised_widths

MAX_SEED = 2**32 - 1


class ConfigError(ValueError):
    """The configuration cannot work; the message is one line that says what to change."""


@dataclass(frozen=True, kw_only=True)
class Guidance:
    """Classifier-free guidance of a stage: weight, and the sigmas where it acts."""

    weight: float
    interval: tuple[float, float]

    def __post_init__(self) -> None:
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"sample.guidance must not be negative, not {self.weight}")
        if len(self.interval) != 2 or not self.interval[0] < self.interval[1]:
            raise ValueError(
                f"sample.guidance_interval must be two rising sigmas, not {self.interval}"
            )


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Optimisation of a stage; lengths in images (configs/default.py says what each is)."""

    images: int
    batch: int
    accumulate: int
    learning_rate: float
    warmup_images: int
    adam_beta1: float
    adam_beta2: float
    adam_epsilon: float
    ema_halflife_images: float
    ema_rampup: float
    label_dropout: float
    augment: float
    max_nonfinite: int

    def __post_init__(self) -> None:
        for name in (
            "images",
            "batch",
            "accumulate",
            "learning_rate",
            "adam_epsilon",
            "max_nonfinite",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_images", "ema_halflife_images"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"train.{name} must not be negative, not {getattr(self, name)}")
        for name in ("label_dropout", "augment", "ema_rampup"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"train.{name} must lie in [0, 1], not {getattr(self, name)}")
        for name in ("adam_beta1", "adam_beta2"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"train.{name} must lie in [0, 1), not {getattr(self, name)}")

        if self.batch % self.accumulate:
            raise ValueError(
                f"train.batch {self.batch} is not divisible by train.accumulate {self.accumulate}"
            )

    @property
    def steps(self) -> int:
        return math.ceil(self.images / self.batch)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """One stage of a relay. `sample_process` is `process` with the sampling value of cdf_max."""

    name: str
    index: int
    resolution: int
    network: UNet
    process: EdmProcess
    sample_process: EdmProcess
    sampler: EdmSampler | RelaySampler
    guidance: Guidance
    train: TrainSettings


def stage_names(config: ConfigDict) -> list[str]:
    """Stage names in order of resolution (a ConfigDict does not keep the order of its keys when
    copied)."""
    return sorted(
        config.stages,
        key=lambda name: (
            config.stages[name].resolution,
            config.stages[name].process.kind != "edm",
        ),
    )


def build(config: ConfigDict) -> list[Stage]:
    """All stages, low resolution first. Raises ConfigError for anything that could not train or
    sample."""
    _check_shared(config)
    names = stage_names(config)
    if not names:
        raise ConfigError("the configuration has no stages")
    stages: list[Stage] = []
    for index, name in enumerate(names):
        try:
            stages.append(_build_stage(config, name, index, stages[-1] if stages else None))
        except (ValueError, TypeError) as error:
            raise ConfigError(f"stage {name}: {error}") from error
        except (AttributeError, KeyError) as error:
            raise ConfigError(
                f"stage {name}: a key is missing ({error}); start from configs/default.py"
            ) from error
    return stages


# Least value of the keys that stages share.
_LEAST = {
    "dataset.num_classes": 0,
    "dataset.size": 1,
    "dataset.threads": 0,
    "dataset.workers": 0,
    "mesh.fsdp": 1,
    "checkpoint.every_images": 1,
    "checkpoint.keep": 1,
    "checkpoint.keep_every_images": 0,
    "log.every_steps": 1,
    "log.grid_every_images": 0,
    "log.grid_images": 1,
    "log.profile_first": 0,
    "log.profile_steps": 1,
    "sample.batch": 1,
    "evaluate.samples": 4,
    "evaluate.reference_images": 0,
    "evaluate.every": 0,
    "evaluate.every_samples": 4,
    "seed": 0,
}


def _check_shared(config: ConfigDict) -> None:
    for key, least in _LEAST.items():
        value = config
        for part in key.split("."):
            value = value[part]
        if value < least:
            raise ConfigError(f"{key} must be at least {least}, not {value}")
    if config.seed > MAX_SEED:
        raise ConfigError(f"seed must be at most {MAX_SEED}, not {config.seed}")


def _build_stage(config: ConfigDict, name: str, index: int, before: Stage | None) -> Stage:
    node, num_classes = config.stages[name], config.dataset.num_classes
    kind = node.process.kind
    if kind not in ("edm", "relay"):
        raise ValueError(f"process.kind must be 'edm' or 'relay', not {kind!r}")
    if (kind == "edm") != (before is None):
        raise ValueError("the first stage has process.kind 'edm', every later one 'relay'")
    settings = {k: v for k, v in node.process.items() if k != "kind"}
    sample = dict(node.sample.items())
    guidance = Guidance(
        weight=sample.pop("guidance"), interval=tuple(sample.pop("guidance_interval"))
    )
    train = TrainSettings(**node.train)
    process: EdmProcess
    sampler: EdmSampler | RelaySampler
    if before is None:
        process = sample_process = EdmProcess(**settings)
        sampler = EdmSampler(**sample)
    else:
        process = RelayProcess(**settings)
        if process.cdf_max > 1:
            raise ValueError(
                f"process.cdf_max must be at most 1, not {process.cdf_max}: only sampling may "
                "exceed it"
            )
        sample_process = replace(process, cdf_max=sample.pop("cdf_max"))
        sampler = RelaySampler(**sample)
        check_patch(node.resolution, node.resolution, process.patch)
        check_handoff(sample_process, sampler.handoff_sigma)
        if before.resolution * process.patch != node.resolution:
            raise ValueError(
                f"resolution {node.resolution} is not {process.patch} (patch) times the "
                f"{before.resolution} "
                f"of stage {before.name}"
            )
    if guidance.weight > 1 and not num_classes:
        raise ValueError(
            f"sample.guidance {guidance.weight} needs classes (dataset.num_classes); use 1"
        )
    if guidance.weight > 1 and not train.label_dropout:
        raise ValueError(
            "sample.guidance above 1 needs a network trained with train.label_dropout above 0 "
            "(0.1 is usual)"
        )
    if train.augment > 0 and node.model.augment_labels != NUM_LABELS:
        raise ValueError(
            f"train.augment needs model.augment_labels={NUM_LABELS}, not "
            f"{node.model.augment_labels}"
        )
    return Stage(
        name=name,
        index=index,
        resolution=node.resolution,
        network=_build_network(node.model, node.resolution, num_classes),
        process=process,
        sample_process=sample_process,
        sampler=sampler,
        guidance=guidance,
        train=train,
    )


def _build_network(model: ConfigDict, resolution: int, num_classes: int) -> UNet:
    levels = len(model.multipliers)
    sizes = [resolution >> level for level in range(levels)]
    if not levels or resolution < 1 or resolution % (1 << (levels - 1)):
        raise ValueError(
            f"resolution {resolution} cannot be halved {levels - 1} times (model.multipliers "
            f"has {levels})"
        )
    for name in ("channels", "blocks", "head_width"):
        if not isinstance(model[name], int) or model[name] < 1:
            raise ValueError(f"model.{name} must be a positive whole number, not {model[name]!r}")
    if model.channels % 2:
        raise ValueError(f"model.channels must be even, not {model.channels}")
    if model.augment_labels not in (0, NUM_LABELS):
        raise ValueError(
            f"model.augment_labels must be 0 or {NUM_LABELS}, not {model.augment_labels}"
        )
    widths = [model.channels * m for m in model.multipliers]
    for width in normalised_widths(model.channels, tuple(model.multipliers), model.blocks):
        group_count(width)
    for size in model.attention:
        if size not in sizes:
            raise ValueError(f"model.attention asks for level {size}, but the levels are {sizes}")
        width = widths[sizes.index(size)]
        if width < model.head_width:
            raise ValueError(
                f"model.attention at level {size} needs at least head_width {model.head_width} "
                "channels, it "
                f"has {width}; widen the level, lower model.head_width or leave the level out"
            )
    if model.dtype not in ("float32", "bfloat16"):
        raise ValueError(f"model.dtype must be float32 or bfloat16, not {model.dtype!r}")
    if not 0 <= model.dropout < 1:
        raise ValueError(f"model.dropout must lie in [0, 1), not {model.dropout}")
    return UNet(
        resolution=resolution,
        channels=model.channels,
        multipliers=tuple(model.multipliers),
        blocks=model.blocks,
        attention=tuple(model.attention),
        head_width=model.head_width,
        num_classes=num_classes,
        num_augment=model.augment_labels,
        dropout=model.dropout,
        dtype=jnp.dtype(model.dtype),
        remat=model.remat,
    )


# What may change between two runs in one workdir without making it another relay.
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
)


def flat(node: object, skip: Container[str] = (), path: str = "") -> dict[str, Any]:
    """Nested dictionaries as one: key.key -> value; lists stay whole. skip: keys left out, with
    all below them."""
    if not isinstance(node, Mapping):
        return {path: node}
    found: dict[str, Any] = {}
    for key, child in node.items():
        if key not in skip:
            found |= flat(child, skip, f"{path}.{key}" if path else str(key))
    return found


def claim_workdir(config: ConfigDict, workdir: Path, create: bool) -> None:
    """Ties a workdir to its configuration: writes config.json, or compares with the one there.

    create: False for reading only (sampling). Raises ConfigError naming the first key that
    differs, or the missing run; nothing is overwritten in that case.
    """
    path = workdir / "config.json"
    ours = json.loads(config.to_json_best_effort())
    if path.exists():
        try:
            theirs = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ConfigError(
                f"{path} is damaged ({error}); restore it, or use another --workdir"
            ) from error
        new, old = flat(ours, FREE), flat(theirs, FREE)
        for key in sorted(set(new) | set(old)):
            if new.get(key) != old.get(key):
                raise ConfigError(
                    f"{workdir} belongs to another configuration: {key} is {old.get(key)!r} "
                    "there and "
                    f"{new.get(key)!r} here; use another --workdir, or the configuration it "
                    "was made with"
                )
    elif not create:
        raise ConfigError(
            f"no run in {workdir} (config.json is missing); train one first or correct --workdir"
        )
    elif workdir.exists() and not workdir.is_dir():
        raise ConfigError(f"--workdir {workdir} is a file; name a folder")
    if create:
        workdir.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(".tmp")
        temporary.write_text(json.dumps(ours, indent=1) + "\n")
        temporary.replace(path)


def parse_stage(stages: list[Stage], name: str) -> Stage | None:
    """The stage of that name, None for ''. Raises ConfigError for an unknown one."""
    for stage in stages:
        if stage.name == name:
            return stage
    if name:
        raise ConfigError(
            f"unknown stage {name!r}; this configuration has {', '.join(s.name for s in stages)}"
        )
    return None


def describe_source(config: ConfigDict, stages: list[Stage]) -> dict[str, object]:
    """What dataset.source reads, for the record of a preparation."""
    node = config.dataset
    keys = {"synthetic": ("size",), "tfds": ("name", "split", "data_dir")}.get(
        node.source, ("path",)
    )
    drawn = (
        {"resolution": stages[-1].resolution, "seed": config.seed}
        if node.source == "synthetic"
        else {}
    )
    return {"source": node.source} | {key: node[key] for key in keys} | drawn


def parse_weights(stages: list[Stage], given: dict[str, str]) -> dict[str, Path]:
    """Weights of stages by stage name: the folder of a stage, or of one of its checkpoints for
    FOLDER@STEP.

    Raises ConfigError for an unknown stage, and for a folder or checkpoint that is not there.
    """
    return {
        name: _weights_folder(parse_stage(stages, name), text)
        for name, text in given.items()
        if text
    }


def _weights_folder(stage: Stage | None, text: str) -> Path:
    """FOLDER as it is, FOLDER@STEP as FOLDER/checkpoints/STEP."""
    assert stage is not None  # for the name '' alone
    folder, step = Path(text), ""
    before, at, after = text.rpartition("@")
    if at and after.isdecimal() and not (folder / "checkpoints").is_dir():
        folder, step = Path(before), after
    checkpoints = folder / "checkpoints"
    if not checkpoints.is_dir():
        raise ConfigError(
            f"--weights.{stage.name}: {folder} has no checkpoints; name a converted or trained "
            "stage"
        )
    if step and not (checkpoints / step).is_dir():
        there = sorted(
            (int(path.name) for path in checkpoints.iterdir() if path.name.isdecimal()),
            reverse=True,
        )
        raise ConfigError(
            f"--weights.{stage.name}: {folder} has no checkpoint of step {step}; there are "
            f"{', '.join(map(str, there)) or 'none'}"
        )
    return checkpoints / step if step else folder


def open_source(config: ConfigDict, stages: list[Stage]) -> Source:
    """The data set of a configuration, checked against it. Raises DataError (missing, damaged)
    or ConfigError (other classes than dataset.num_classes, images smaller than the largest
    stage)."""
    node, largest = config.dataset, stages[-1].resolution
    try:
        source = make_source(
            node.source,
            path=node.path,
            name=node.name,
            split=node.split,
            data_dir=node.data_dir,
            resolution=largest,
            size=node.size,
            seed=config.seed,
        )
        for stage in stages:
            at_resolution(source, stage.resolution)
    except DataError as error:
        if node.source == "packed":  # the hint is about originals
            raise
        raise DataError(f"{error}; {node.hint}" if node.hint else str(error)) from error
    if node.num_classes and source.num_classes != node.num_classes:
        found = f"{source.num_classes} classes" if source.num_classes else "no classes"
        raise ConfigError(
            f"the data set has {found}, the configuration "
            f"dataset.num_classes={node.num_classes}; set "
            f"--config.dataset.num_classes={source.num_classes}"
        )
    if isinstance(source, EdmZip) and source.resolution < largest:
        raise ConfigError(
            f"{node.path} has images of {source.resolution} px, stage {stages[-1].name} wants "
            f"{largest}; "
            "use larger images or a smaller stage"
        )
    return source

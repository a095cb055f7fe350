"""What is to be sampled: the user's words, checked, and what every batch starts from."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relay_jax.config import ConfigError, Stage
from relay_jax.data.loader import read
from relay_jax.data.source import Source
from relay_jax.data.transforms import to_float
from relay_jax.diffusion.process import RelayProcess
from relay_jax.sampling.classes import classes_for, parse_class_rule
from relay_jax.sampling.folder import read_images
from relay_jax.sampling.pixels import PIXEL_EDITS
from relay_jax.sampling.record import describe_sampling, read_record
from relay_jax.sampling.seeds import parse_seeds
from relay_jax.sampling.stream import Inputs

OWN = "own"  # class rule: an image has the class of the real image that its relay starts from


@dataclass(frozen=True, kw_only=True)
class Request:
    """stages: the whole relay, or one of its stages. seeds: one image each. class_rule: see
    classes.py, or OWN.

    low_resolution: of the images that a relay stage alone starts from, else 0. low_res: their
    folder, None for real
    images. start: what those images are, as plain values for the record.
    """

    stages: Sequence[Stage]
    num_classes: int
    seeds: Sequence[int]
    class_rule: str
    pixel_edit: str
    low_resolution: int
    low_res: Path | None
    start: Mapping[str, Any]

    @property
    def from_real_images(self) -> bool:
        return bool(self.low_resolution) and self.low_res is None

    def record(self, weights: Mapping[str, tuple[dict, dict]]) -> dict[str, Any]:
        """`describe_sampling` of all this. weights: parameters and notes by stage; empty before
        they are loaded."""
        return describe_sampling(
            self.stages,
            weights,
            self.seeds,
            self.class_rule,
            pixel_edit=self.pixel_edit,
            low_res=self.start,
        )

    def inputs(self, seeds: np.ndarray, source: Source | None) -> Inputs:
        """What the images of some seeds start from. source: the real images, if they are
        needed: number seed mod size.

        Raises ConfigError for a low-resolution image that is missing or damaged, DataError for
        a real one.
        """
        if self.low_res is not None:
            low_res = read_images(self.low_res, seeds.tolist(), self.low_resolution)
            return Inputs(classes_for(seeds, self.num_classes, self.class_rule), low_res)
        if source is None:
            return Inputs(classes_for(seeds, self.num_classes, self.class_rule), None)
        pixels, labels = read(
            source, [int(seed) % len(source) for seed in seeds], self.low_resolution
        )
        own = np.asarray(labels, np.int32)
        classes = (
            own if self.class_rule == OWN else classes_for(seeds, self.num_classes, self.class_rule)
        )
        return Inputs(classes, to_float(pixels))


def of_one_stage(stage: Stage, count: int) -> Request:
    """Seeds 0, 1, ... of a stage by itself, as while it is trained; a relay starts from
    down-sampled real images."""
    num_classes, process = stage.network.num_classes, stage.process
    alone = isinstance(process, RelayProcess)
    return Request(
        stages=[stage],
        num_classes=num_classes,
        seeds=range(count),
        class_rule=OWN if alone and num_classes else "mod",
        pixel_edit="none",
        low_res=None,
        start={},
        low_resolution=stage.resolution // process.patch
        if isinstance(process, RelayProcess)
        else 0,
    )


def parse_request(
    stages: Sequence[Stage],
    only: Stage | None,
    *,
    seeds: str,
    class_rule: str,
    pixel_edit: str,
    low_res: Path | None,
    data: Mapping[str, Any],
) -> Request:
    """Checks what can be checked without data and weights. Raises ConfigError.

    only: a stage alone. class_rule: '' for 'mod', for the rule of the images in `low_res`, or
    for the classes of the real images that a relay stage alone starts from otherwise. data:
    describes those.
    """
    if pixel_edit not in PIXEL_EDITS:
        raise ConfigError(
            f"sample.pixel_edit must be one of {', '.join(PIXEL_EDITS)}, not {pixel_edit!r}"
        )
    chosen = [only] if only else stages
    relay_alone = isinstance(chosen[0].process, RelayProcess)
    num_classes = stages[-1].network.num_classes
    wanted = parse_seeds(seeds)
    rule = parse_class_rule(class_rule, num_classes) if class_rule else ""
    start: dict[str, Any] = {}
    if low_res is not None and not relay_alone:
        raise ConfigError("--low_res is for --stage of a relay; the first stage starts from noise")
    if low_res is not None:
        before = read_record(low_res)
        if before is None:
            start = {"made_by": "unknown"}
        else:
            theirs, kind = (
                str(before.get("class_rule")),
                before.get("output", {}).get("format", "png"),
            )
            if kind != "png":
                raise ConfigError(
                    f"--low_res {low_res} holds {kind} files; write the images before with "
                    "--format=png"
                )
            if rule and rule != theirs:
                raise ConfigError(
                    f"--class={rule}: the images in {low_res} have the classes of rule {theirs!r}"
                )
            start = {"made_by": {key: value for key, value in before.items() if key != "seeds"}}
            rule = theirs
    elif relay_alone:
        start = {"made_by": "down-sampled real images", "data": dict(data)}
        rule = rule or (OWN if num_classes else "mod")
    if rule == OWN and low_res is not None:
        raise ConfigError(
            f"--low_res {low_res} holds images with the classes of real ones; name a rule with "
            "--class"
        )
    return Request(
        stages=chosen,
        num_classes=num_classes,
        seeds=wanted,
        class_rule=rule or "mod",
        pixel_edit=pixel_edit if chosen[-1] is stages[-1] else "none",
        low_resolution=stages[chosen[0].index - 1].resolution if relay_alone else 0,
        low_res=low_res,
        start=start,
    )

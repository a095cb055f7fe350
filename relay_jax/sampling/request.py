"""What is to be sampled: the user's words, checked, and what every batch starts from."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from relay_jax.config import Settings
from relay_jax.data.images import to_float
from relay_jax.data.loader import read
from relay_jax.data.source import Source, describe_source, draw, open_source
from relay_jax.errors import UserError
from relay_jax.resolution import Resolution
from relay_jax.sampling.chain import Inputs
from relay_jax.sampling.folder import read_images
from relay_jax.sampling.record import describe_sampling, read_record
from relay_jax.sampling.seeds import classes_for, parse_class_rule, parse_seeds
from relay_jax.stage import Guided, Stage, joined

REAL_ORDER = "seed mod size, of all drawn once by numpy's default_rng(0)"
OWN = "own"  # class rule: an image has the class of the real image that its relay starts from


@dataclass(frozen=True, kw_only=True)
class Request:
    """Images to sample.

    stages: the whole relay, or one of its stages. seeds: one
    image each. class_rule: see seeds.py, or OWN. low_res:
    folder of the images that a relay stage alone starts from,
    None for real images. start: what those images are, as plain
    values for the record.
    """

    stages: Sequence[Stage]
    seeds: Sequence[int]
    class_rule: str = "mod"
    pixel_edit: str = "none"
    low_res: Path | None = None
    start: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        """Of the networks, 0 if they are unconditional."""
        return self.stages[-1].num_classes

    @property
    def low_resolution(self) -> Resolution:
        """Of the images that the first of the stages continues, else 0."""
        return self.stages[0].low_resolution

    @property
    def from_real_images(self) -> bool:
        """Whether a relay stage alone starts from down-sampled real images."""
        return bool(self.low_resolution) and self.low_res is None

    def open_source(self, settings: Settings) -> Source | None:
        """The real images, if they are needed. Raises DataError or UserError."""
        if not self.from_real_images:
            return None
        return open_source(settings.dataset.keys, settings.resolutions, settings.seed)

    def record(self, weights: Mapping[str, tuple[dict | Guided, dict]]) -> dict[str, Any]:
        """`describe_sampling` of all this.

        weights: parameters and notes by stage (Chain.weights); empty
        before they are loaded.
        """
        record = describe_sampling(self.stages, weights, self.seeds, self.class_rule)
        return record | {"pixel_edit": self.pixel_edit, "low_res": dict(self.start)}

    def inputs(self, seeds: np.ndarray, source: Source | None) -> Inputs:
        """What the images of some seeds start from.

        source: the real images, if they are needed: number seed mod
        size of all in an order drawn once. Raises UserError for a
        low-resolution image that is missing or damaged.
        """
        if self.low_res is not None:
            low_res = read_images(self.low_res, seeds.tolist(), self.low_resolution)
            return Inputs(classes_for(seeds, self.num_classes, self.class_rule), low_res)
        if source is None:
            return Inputs(classes_for(seeds, self.num_classes, self.class_rule), None)
        # In the order of a draw: the first images of a set that is
        # sorted by class are all of one.
        order = _order(len(source))
        positions = [int(order[int(seed) % len(source)]) for seed in seeds]
        pixels, labels = read(source, positions, self.low_resolution)
        if self.class_rule == OWN:
            classes = np.asarray(labels, np.int32)
        else:
            classes = classes_for(seeds, self.num_classes, self.class_rule)
        return Inputs(classes, to_float(pixels))


@functools.lru_cache(maxsize=4)
def _order(total: int) -> np.ndarray:
    """All positions of a set, in the order in which seeds take them."""
    return draw(total, total, 0)


def of_one_stage(stage: Stage, count: int) -> Request:
    """Seeds 0, 1, ... of a stage by itself, as while it is trained.

    A stage that starts from images starts from down-sampled real
    ones, with their classes, whatever a whole relay hands to it.
    """
    rule = OWN if stage.starts_from_images and stage.num_classes else "mod"
    return Request(stages=[stage.alone], seeds=range(count), class_rule=rule)


def parse_request(
    settings: Settings,
    only: Stage | None,
    *,
    seeds: str,
    class_rule: str = "",
    low_res: Path | None = None,
    class_names: Sequence[str] = (),
) -> Request:
    """Checks what can be checked without data and weights. Raises UserError.

    only: a stage alone. class_rule: '' for 'mod', for the rule of
    the images in `low_res`, or for the classes of the real images
    that a relay stage alone starts from otherwise. class_names:
    where they are known.
    """
    stages = settings.stages
    chosen = [only] if only else stages
    joined(chosen)  # raises for a relay alone that continues a state, and has none
    continues = chosen[0].starts_from_images
    num_classes = stages[-1].num_classes
    rule = parse_class_rule(class_rule, num_classes, class_names) if class_rule else ""
    start: dict[str, Any] = {}
    if low_res is not None and not continues:
        raise UserError("--low_res is for --stage of a relay; the first stage starts from noise")
    if low_res is not None:
        rule, start = _continued(low_res, rule)
    elif continues:
        dataset = describe_source(settings.dataset.keys, settings.resolutions[-1], settings.seed)
        # Images of an earlier version started from others: a folder
        # of them is not continued.
        start = {
            "made_by": "down-sampled real images",
            "data": dataset,
            "order": REAL_ORDER,
        }
        rule = rule or (OWN if num_classes else "mod")
    return Request(
        stages=chosen,
        seeds=parse_seeds(seeds),
        class_rule=rule or "mod",
        pixel_edit=settings.sample.pixel_edit if chosen[-1] is stages[-1] else "none",
        low_res=low_res,
        start=start,
    )


def _continued(low_res: Path, rule: str) -> tuple[str, dict[str, Any]]:
    """Class rule and start of samples that continue those of a folder. Raises UserError."""
    record = read_record(low_res)
    if record is None:
        return rule, {"made_by": "unknown"}
    previous, kind = (
        str(record.get("class_rule")),
        record.get("output", {}).get("format", "png"),
    )
    if kind != "png":
        raise UserError(
            f"--low_res {low_res} holds {kind} files; write the images before with --format=png"
        )
    if rule and rule != previous:
        raise UserError(
            f"--class={rule}: the images in {low_res} have the classes of rule {previous!r}"
        )
    if previous == OWN:
        raise UserError(
            f"--low_res {low_res} holds images with the classes of real ones; name a rule with "
            "--class"
        )
    return previous, {"made_by": {key: value for key, value in record.items() if key != "seeds"}}

"""What pictures are made of: real images, samples, parameters; and their numbers as JSON."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from relay_jax.config import Settings
from relay_jax.data.identity import identify
from relay_jax.data.loader import read
from relay_jax.data.source import Source, describe_source, open_source
from relay_jax.errors import DataError
from relay_jax.evaluation.features import RANDOM, FeatureExtractor, make_extractor
from relay_jax.resolution import Resolution
from relay_jax.runtime.checkpoint import has_checkpoint
from relay_jax.runtime.files import write_json
from relay_jax.runtime.sharding import make_mesh
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.seeds import classes_for
from relay_jax.sampling.weights import load_weights
from relay_jax.stage import Guided, Stage, joined
from relay_jax.workdir import warn_of_changes

REAL_IMAGES = 256  # read by default, for spectra and losses


@dataclass(frozen=True, kw_only=True)
class PlotSettings:
    """What `--mode=plot` is asked for. names: of plot.PLOTS, none for all that can be plotted.

    seeds, class_rule: of the samples (sampling.seeds); each picture
    takes as many as it has room for. images: real images to read, 0
    for each picture's default.
    """

    names: Sequence[str] = ()
    seeds: Sequence[int]
    class_rule: str = "mod"
    images: int = 0


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """Everything a picture may need, opened when the first of them asks for it.

    folders: by stage name, with checkpoints and a log or without.
    out: where pictures go. What the caller has already, None if not:
    opened: the real images; chain: of all stages, with their
    parameters; extractor: of any features.
    """

    settings: Settings
    folders: Mapping[str, Path]
    request: PlotSettings
    out: Path
    opened: Source | None = None
    chain: Chain | None = None
    extractor: FeatureExtractor | None = None
    _params: dict[str, tuple[dict | Guided, dict]] = field(default_factory=dict)

    @property
    def stages(self) -> Sequence[Stage]:
        """All of the relay, low resolution first."""
        return self.settings.stages

    @cached_property
    def source(self) -> Source:
        """The real images. Raises DataError."""
        if self.opened is not None:
            return self.opened
        settings = self.settings
        source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
        for name, folder in self.folders.items():
            what = f"the real images are not those that {name} was trained on"
            warn_of_changes(folder, identify(source), what)
        return source

    @cached_property
    def mesh(self) -> Mesh:
        """All devices. Raises UserError where mesh.fsdp does not divide them."""
        return make_mesh(self.settings.fsdp)

    @cached_property
    def trained(self) -> list[Stage]:
        """The stages that have a checkpoint."""
        if self.chain is not None:
            return list(self.stages)
        return [
            stage
            for stage in self.stages
            if stage.name in self.folders and has_checkpoint(self.folders[stage.name])
        ]

    @property
    def logs(self) -> list[tuple[str, Path]]:
        """Stage names with the files that their training logs to, which need not exist."""
        return [
            (stage.name, self.folders[stage.name] / "metrics.jsonl")
            for stage in self.stages
            if stage.name in self.folders
        ]

    def params(self, stage: Stage) -> tuple[dict | Guided, dict]:
        """The averaged parameters of a stage, and the notes of its checkpoint."""
        # Four pictures sample the same stages: reading their weights
        # once saves most of the time.
        if self.chain is not None:
            return self.chain.params[stage.name], self.chain.notes[stage.name]
        if stage.name not in self._params:
            self._params[stage.name] = load_weights(stage, self.folders[stage.name], self.mesh)
        return self._params[stage.name]

    def positions(self, default: int = REAL_IMAGES) -> list[int]:
        """Which real images are read: the same random ones in every picture."""
        count = min(self.request.images or default, len(self.source))
        # The first ones would not do:
        # sources are often sorted by class.
        return np.random.default_rng(0).permutation(len(self.source))[:count].tolist()

    def real(self, resolution: Resolution) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, h, w, 3] and labels int32 [n]."""
        return read(self.source, self.positions(), resolution)

    def seeds(self, most: int) -> list[int]:
        """The first seeds of the request."""
        return list(self.request.seeds[:most])

    def classes(self, seeds: Sequence[int]) -> np.ndarray:
        """The class of each seed, by the rule of the request: int32 [n]."""
        return classes_for(list(seeds), self.stages[-1].num_classes, self.request.class_rule)

    def samples(
        self, seeds: Sequence[int], classes: np.ndarray, until: int | None = None
    ) -> dict[str, np.ndarray]:
        """Images of the first `until` stages by name (default: of all), float32 [n, h, w, c]."""
        stages = self.stages[:until]
        if self.chain and joined(stages) == self.chain.stages[: len(stages)]:
            # A part of it, with the programs that are compiled already.
            part = self.chain.with_params(self.chain.params)
            part.stages = self.chain.stages[: len(stages)]
            return part.images(seeds, classes)
        params = {stage.name: self.params(stage)[0] for stage in stages}
        # No larger a batch than there are seeds: its empty rows
        # would be computed as well.
        chain = Chain(stages, params, self.mesh, min(self.settings.sample.batch, len(seeds)))
        return chain.images(seeds, classes)

    def random_conv(self) -> FeatureExtractor:
        """Random convolutions: features that see structure, and need no download."""
        if self.extractor is not None and not self.extractor.is_trained:
            return self.extractor
        return make_extractor(RANDOM, weights=None, mesh=self.mesh)

    def describe(self) -> dict[str, Any]:
        """Which real images the numbers are from, for the JSON of a picture."""
        settings = self.settings
        largest = settings.resolutions[-1]
        return {"data": describe_source(settings.dataset.keys, largest, settings.seed)}

    def write(self, name: str, numbers: Mapping[str, Any]) -> None:
        """The numbers of a picture beside it, as NAME.json."""
        write_json(self.out / f"{name}.json", plain(numbers))


@dataclass(frozen=True)
class Picture:
    """One entry of plot.PLOTS: `plot` writes its files, if all `needs` (keys of NEEDS) are met.

    ending: of the file's name.
    """

    plot: Callable[[Inputs], None]
    needs: tuple[str, ...]
    ending: str = "png"


def plain(value: Any) -> Any:
    """Arrays and numpy numbers to lists and numbers of six digits, for JSON."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        # JSON has neither infinity nor NaN.
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def _without_relay(inputs: Inputs) -> str:
    return "" if len(inputs.stages) > 1 else "the configuration has no relay stage"


def _without_handoff(inputs: Inputs) -> str:
    if any(stage.process.has_handoff for stage in inputs.stages):
        return ""
    return "no stage starts from a noisy image of the stage before; a cascade starts from noise"


def _without_data(inputs: Inputs) -> str:
    try:
        return "" if len(inputs.source) > 1 else "one real image is not enough"
    except DataError as error:
        return str(error)


def _without_log(inputs: Inputs) -> str:
    if any(path.exists() for _, path in inputs.logs):
        return ""
    return "no training has been logged; name its folder: --workdir=runs/NAME"


def _without_weights(inputs: Inputs) -> str:
    missing = [stage.name for stage in inputs.stages if stage not in inputs.trained]
    if not missing:
        return ""
    return (
        f"no checkpoint of stage {' and '.join(missing)}; train first (--workdir=runs/NAME), "
        f"or name its weights: --weights.{missing[0]}=DIR"
    )


def _without_any_weights(inputs: Inputs) -> str:
    return "" if inputs.trained else _without_weights(inputs)


# What a picture may need, with the reason
# why it is not there, '' if it is.
NEEDS: dict[str, Callable[[Inputs], str]] = {
    "a relay": _without_relay,
    "a hand-off": _without_handoff,
    "real images": _without_data,
    "a log": _without_log,
    "a checkpoint": _without_any_weights,
    "all checkpoints": _without_weights,
}


def lacking(inputs: Inputs, picture: Picture) -> str:
    """The reason why a picture cannot be plotted, '' if it can."""
    # In their order, and only as far as the first that fails:
    # opening a large data set takes long.
    return next((why for need in picture.needs if (why := NEEDS[need](inputs))), "")

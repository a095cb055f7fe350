"""--mode=plot: pictures of the data, the schedules and a trained relay, each with its numbers
beside it as JSON."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax.config import ConfigError, Stage, describe_source, open_source
from relay_jax.data.loader import read
from relay_jax.data.source import DataError, Source
from relay_jax.data.transforms import to_float
from relay_jax.diffusion.process import RelayProcess
from relay_jax.diffusion.sampler import RelaySampler
from relay_jax.evaluation.features import make_extractor
from relay_jax.plots import style as figures
from relay_jax.plots.filmstrip import filmstrip
from relay_jax.plots.grids import loss_curves, relay_picture
from relay_jax.plots.handoff import candidates, compare
from relay_jax.plots.loss import loss_by_sigma
from relay_jax.plots.neighbours import neighbours
from relay_jax.plots.spectra import resolution_ratios
from relay_jax.runtime.checkpoint import has_checkpoint, load_ema
from relay_jax.runtime.logs import Progress, read_jsonl, write_json, write_png
from relay_jax.runtime.sharding import make_mesh
from relay_jax.sampling.chain import StageSampler, generate
from relay_jax.sampling.classes import classes_for
from relay_jax.sampling.pixels import to_uint8

IMAGES, SEARCHED = (
    256,
    10_000,
)  # real images read by default: for spectra and losses, for neighbours
FILM_SEEDS, NEIGHBOUR_SEEDS, GRID_SEEDS = 3, 8, 64
FILM_COLUMNS, NEIGHBOURS = 7, 4


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """What the pictures are made of; opened when the first of them asks for it."""

    config: ConfigDict
    stages: list[Stage]
    folders: dict[str, Path]  # of stages, with checkpoints or without
    out: Path
    seeds: list[int]
    class_rule: str
    images: int  # real images to read, 0 for each picture's own number
    _params: dict[str, tuple[dict, dict]] = field(default_factory=dict)

    @cached_property
    def source(self) -> Source:
        return open_source(self.config, self.stages)

    @cached_property
    def mesh(self) -> Mesh:
        return make_mesh(self.config.mesh.fsdp)

    @cached_property
    def trained(self) -> list[Stage]:
        """The stages that have a checkpoint."""
        return [
            s
            for s in self.stages
            if s.name in self.folders and has_checkpoint(self.folders[s.name])
        ]

    def params(self, stage: Stage) -> tuple[dict, dict]:
        """The averaged parameters of a stage, and the notes of its checkpoint."""
        if stage.name not in self._params:
            self._params[stage.name] = load_ema(self.folders[stage.name], stage.network, self.mesh)
        return self._params[stage.name]

    def positions(self, default: int) -> list[int]:
        """Which real images are read: the same random ones in every picture, as sources are
        often sorted by class."""
        count = min(self.images or default, len(self.source))
        return np.random.default_rng(0).permutation(len(self.source))[:count].tolist()

    def real(self, resolution: int) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, r, r, 3] and labels [n]."""
        return read(self.source, self.positions(IMAGES), resolution)

    def classes(self, seeds: Sequence[int]) -> np.ndarray:
        return classes_for(list(seeds), self.stages[-1].network.num_classes, self.class_rule)

    def samples(
        self, seeds: Sequence[int], classes: np.ndarray, until: int
    ) -> dict[str, np.ndarray]:
        """Images of the first `until` stages by name, float32 [n, h, w, c]."""
        batch = min(self.config.sample.batch, len(seeds))
        samplers = [
            (StageSampler(stage, self.mesh, batch), self.params(stage)[0])
            for stage in self.stages[:until]
        ]
        return generate(samplers, list(seeds), classes)

    def describe(self) -> dict[str, Any]:
        return {"data": describe_source(self.config, self.stages)}

    def write(self, name: str, numbers: dict[str, Any]) -> None:
        write_json(self.out / f"{name}.json", plain(numbers))


def plain(value: Any) -> Any:
    """Arrays and numpy numbers to lists and numbers of six digits, for JSON."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(f"{value:.6g}") if np.isfinite(value) else None
    return int(value) if isinstance(value, np.integer) else value


def snr(inputs: Inputs) -> None:
    """Signal over noise by frequency, for every pair of neighbouring stages (spectra.py)."""
    pairs, numbers = [], []
    for before, stage in zip(inputs.stages, inputs.stages[1:], strict=False):
        assert isinstance(stage.sample_process, RelayProcess) and isinstance(
            stage.sampler, RelaySampler
        )
        sigma = float(stage.sampler.sigmas()[0])
        low, high = (to_float(inputs.real(s.resolution)[0]) for s in (before, stage))
        curves = resolution_ratios(low, high, sigma, stage.sample_process.block_noise_scale)
        pairs.append((f"{before.resolution} and {stage.resolution} px, sigma {sigma:.3g}", curves))
        numbers.append(
            {"stage": stage.name, "sigma": sigma, "curves": [asdict(curve) for curve in curves]}
        )
    count = len(inputs.positions(IMAGES))
    title = f"Power of {count} real images over that of the noise, by DCT frequency"
    figures.save(figures.draw_ratios(pairs, title), inputs.out / "snr.png")
    inputs.write("snr", inputs.describe() | {"images": count, "pairs": numbers})


def handoff(inputs: Inputs) -> None:
    """What each relay starts from against what it was trained on (handoff_check.py)."""
    for index, stage in enumerate(inputs.stages):
        if not isinstance(stage.process, RelayProcess) or not isinstance(
            stage.sampler, RelaySampler
        ):
            continue
        before, start = inputs.stages[index - 1], float(stage.sampler.sigmas()[0])
        real, labels = inputs.real(stage.resolution)
        low_res = to_float(inputs.real(before.resolution)[0])
        sigmas = candidates(stage.process, start)
        kinds = [("down-sampled real images", low_res)]
        if all(s in inputs.trained for s in inputs.stages[:index]):
            logging.info("handoff: draws %d images of stage %s", len(real), before.name)
            drawn = inputs.samples(range(len(real)), labels, index)[before.name]
            kinds.insert(0, (f"samples of stage {before.name}", drawn))
        found = [
            (kind, compare(stage.process, images, to_float(real), sigmas)) for kind, images in kinds
        ]
        title = (
            f"Hand-off from {before.name} ({before.resolution} px) to {stage.name} "
            f"({stage.resolution} px): "
            f"{kinds[0][0]} against {len(real)} real images"
        )
        name = "handoff" if len(inputs.stages) == 2 else f"handoff_{stage.name}"
        figures.save(
            figures.draw_handoff(stage.name, found, start, title), inputs.out / f"{name}.png"
        )
        inputs.write(
            name,
            inputs.describe()
            | {
                "stage": stage.name,
                "images": len(real),
                "handoff_sigma": stage.sampler.handoff_sigma,
                "first_level": start,
                "low_resolution_images": {
                    kind: [asdict(c) | {"decibels": c.decibels} for c in each]
                    for kind, each in found
                },
            },
        )


def loss(inputs: Inputs) -> None:
    """The loss of the trained stages by noise level (loss_by_sigma.py)."""
    found = []
    for stage in inputs.trained:
        logging.info("loss: stage %s", stage.name)
        pixels, labels = inputs.real(stage.resolution)
        params, notes = inputs.params(stage)
        found.append(
            loss_by_sigma(
                stage,
                params,
                inputs.mesh,
                pixels,
                labels,
                notes.get("images", 0),
                inputs.config.sample.batch,
                seed=inputs.config.seed,
            )
        )
    title = f"Training loss by noise level: averaged weights, {len(inputs.positions(IMAGES))} images of the data set"
    figures.save(figures.draw_losses(found, title), inputs.out / "loss.png")
    inputs.write(
        "loss",
        inputs.describe()
        | {
            "stages": [
                {
                    "stage": f.stage,
                    "images_seen": f.images,
                    "images": f.losses.shape[1],
                    "sigma": f.sigma,
                    "share": f.share,
                    "mean": f.mean,
                    "quartiles": f.quartiles,
                    "expected": f.expected,
                }
                for f in found
            ]
        },
    )


def film(inputs: Inputs) -> None:
    """A few samples on their way through all stages (filmstrip.py)."""
    seeds = inputs.seeds[:FILM_SEEDS]
    classes = inputs.classes(seeds)
    strip = filmstrip(
        [(stage, inputs.params(stage)[0]) for stage in inputs.stages], seeds, classes, FILM_COLUMNS
    )
    shown = classes if inputs.stages[-1].network.num_classes else None
    title = "Samples on their way through the stages (states scaled to the contrast of images)"
    figures.save(
        figures.draw_filmstrip(strip, seeds, shown, inputs.stages[0].process.sigma_data, title),
        inputs.out / "filmstrip.png",
    )
    inputs.write(
        "filmstrip",
        {
            "seeds": seeds,
            "classes": classes,
            "stages": [
                {
                    "stage": f.stage,
                    "steps": f.steps,
                    "total_steps": f.total_steps,
                    "sigmas": f.sigmas,
                    "state_std": f.states.std(axis=(2, 3, 4)),
                    "denoised_std": f.denoised.std(axis=(2, 3, 4)),
                    "denoised_rms_to_final": np.sqrt(
                        np.mean((f.denoised - f.final) ** 2, axis=(2, 3, 4))
                    ),
                }
                for f in strip
            ],
        },
    )


def near(inputs: Inputs) -> None:
    """Samples beside their nearest real images (neighbours.py)."""
    seeds = inputs.seeds[:NEIGHBOUR_SEEDS]
    samples = to_uint8(
        inputs.samples(seeds, inputs.classes(seeds), len(inputs.stages))[inputs.stages[-1].name]
    )
    positions = inputs.positions(SEARCHED)
    extract = make_extractor("random-conv", weights=None, mesh=inputs.mesh)
    progress, last = Progress("neighbours", len(positions)), [time.monotonic()]

    def each(done: int) -> None:
        if time.monotonic() - last[0] > 5:
            progress.line(done)
            last[0] = time.monotonic()

    found = neighbours(
        samples,
        inputs.source,
        positions,
        min(NEIGHBOURS, len(positions)),
        mirrored=inputs.config.dataset.x_flip,
        each=each,
        features={"random-conv features": lambda pixels: extract(pixels)["pool"]},
    )
    shape = samples.shape[1:]
    real = [
        read(inputs.source, f.positions.reshape(-1).tolist(), shape[0])[0].reshape(
            *f.positions.shape, *shape
        )
        for f in found
    ]
    title = f"Samples and their nearest of {len(positions):,} real images"
    figures.save(
        figures.draw_neighbours(found, samples, real, seeds, title), inputs.out / "neighbours.png"
    )
    inputs.write(
        "neighbours",
        inputs.describe()
        | {"seeds": seeds, "searched": len(positions), "distances": [asdict(one) for one in found]},
    )


def grid(inputs: Inputs) -> None:
    """Samples of every stage, and the hand-offs between them (plots.py)."""
    seeds = np.asarray(inputs.seeds[:GRID_SEEDS])
    classes = inputs.classes(list(seeds))
    images = inputs.samples(list(seeds), classes, len(inputs.stages))
    write_png(inputs.out / "grid.png", relay_picture(inputs.stages, images, seeds, classes))
    inputs.write("grid", {"seeds": seeds, "classes": classes})


def curves(inputs: Inputs) -> None:
    """The loss by images seen (plots.py)."""
    runs = [
        (stage.name, inputs.folders[stage.name] / "metrics.jsonl")
        for stage in inputs.stages
        if stage.name in inputs.folders
    ]
    loss_curves(runs, inputs.out / "curves.png")
    inputs.write(
        "curves",
        {
            name: [
                {k: line[k] for k in ("images", "loss") if k in line} for line in read_jsonl(path)
            ]
            for name, path in runs
        },
    )


# name: (what draws it, what it needs: relay (a second stage), data, some or all checkpoints, log)
PLOTS: dict[str, tuple[Callable[[Inputs], None], tuple[str, ...]]] = {
    "snr": (snr, ("relay", "data")),
    "handoff": (handoff, ("relay", "data")),
    "loss": (loss, ("data", "some")),
    "filmstrip": (film, ("all",)),
    "neighbours": (near, ("data", "all")),
    "grid": (grid, ("all",)),
    "curves": (curves, ("log",)),
}


def lacking(inputs: Inputs, need: str) -> str:
    """Why a need of PLOTS is not met, '' if it is."""
    if need == "relay":
        return "" if len(inputs.stages) > 1 else "the configuration has no relay stage"
    if need == "data":
        try:
            return "" if len(inputs.source) > 1 else "one real image is not enough"
        except DataError as error:
            return str(error)
    if need == "log":
        found = [
            s.name
            for s in inputs.stages
            if s.name in inputs.folders and (inputs.folders[s.name] / "metrics.jsonl").exists()
        ]
        return "" if found else "no training has been logged; name its folder: --workdir=runs/NAME"
    absent = [stage.name for stage in inputs.stages if stage not in inputs.trained]
    if not absent or (need == "some" and inputs.trained):
        return ""
    return (
        f"no checkpoint of stage {' and '.join(absent)}; train first (--workdir=runs/NAME), or "
        "name its weights: "
        f"--weights.{absent[0]}=DIR"
    )


def plot(
    config: ConfigDict,
    stages: list[Stage],
    weights: dict[str, Path],
    names: list[str],
    *,
    seeds: list[int],
    class_rule: str,
    images: int,
    out: Path,
) -> None:
    """Draws the pictures of PLOTS named, or without names all that can be drawn, into `out`.

    weights: the folder of each stage that may have checkpoints and a log. images: real images
    to read, 0 for each picture's own number. Raises ConfigError for an unknown name, or a named
    picture that cannot be drawn.
    """
    if jax.process_count() > 1:
        raise ConfigError("--mode=plot runs in one process; start it on one host")
    for name in names:
        if name not in PLOTS:
            raise ConfigError(f"unknown plot {name!r}; there are {', '.join(PLOTS)}")
    if images < 0 or images == 1:
        raise ConfigError(f"--plot_images must be at least 2, or 0 for the default, not {images}")
    inputs = Inputs(
        config=config,
        stages=stages,
        folders=weights,
        out=out,
        seeds=seeds,
        class_rule=class_rule,
        images=images,
    )
    reasons = {
        name: next((why for need in PLOTS[name][1] if (why := lacking(inputs, need))), "")
        for name in names or PLOTS
    }
    for name, why in reasons.items():
        if why and (names or all(reasons.values())):
            raise ConfigError(f"cannot draw {name}: {why}")
        if why:
            logging.info("not drawn: %s (%s)", name, why)
    drawn = [name for name, why in reasons.items() if not why]
    for number, name in enumerate(drawn):
        PLOTS[name][0](inputs)
        logging.info("picture %d of %d: %s", number + 1, len(drawn), out / f"{name}.png")

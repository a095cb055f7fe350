"""What a finished relay leaves behind: samples/grid.png, loss.png and summary.json."""

import platform
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
from absl import logging

from relay_jax.config import Stage
from relay_jax.data.loader import read
from relay_jax.data.sources import Source
from relay_jax.diffusion.schedule import RelayProcess
from relay_jax.evaluation.classifier import train_classifier
from relay_jax.logs import read_jsonl, write_json, write_png
from relay_jax.sampling.pipeline import StageSampler, generate, handoff_images
from relay_jax.sampling.pixels import to_uint8
from relay_jax.tools.plots import grid, loss_curves, panels

CLASSIFIER_IMAGES, HELD_OUT_IMAGES = 4096, 1024
GRID_ROWS, GRID_COLUMNS = 8, 4


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished stage: its sampler and averaged parameters, its folder, and the seconds its training took."""
    sampler: StageSampler
    params: dict
    folder: Path
    seconds: float

    @property
    def stage(self) -> Stage:
        return self.sampler.stage


def class_accuracies(source: Source, images: dict[str, np.ndarray], classes: np.ndarray,
                     resolution: int) -> dict[str, float]:
    """Share of the images that a classifier trained on real images gives the class that was asked for.

    images: for each name, float [n, resolution, resolution, 3]. Adds "real": held-out real images, the ceiling.
    """
    total = min(len(source), CLASSIFIER_IMAGES + HELD_OUT_IMAGES)
    held_out = total // 5
    pixels, labels = read(source, range(total), resolution)
    real = pixels.astype(np.float32) / 127.5 - 1
    classify = train_classifier(real[held_out:], labels[held_out:], source.num_classes)
    seen = {name: (to_uint8(x).astype(np.float32) / 127.5 - 1, classes) for name, x in images.items()}
    seen["real"] = (real[:held_out], labels[:held_out])
    return {name: round(float(np.mean(classify(x) == wanted)), 4) for name, (x, wanted) in seen.items()}


def summarize(trained: Sequence[Trained], source: Source, workdir: Path, samples: int, class_check: bool) -> dict:
    """Draws `samples` images (seeds 0, 1, ...; class = seed mod classes) through all stages and writes the summary.

    class_check: also score them with a classifier (needs classes). Returns what summary.json holds.
    """
    stages = [t.stage for t in trained]
    last, num_classes = stages[-1], stages[-1].network.num_classes
    seeds = np.arange(samples)
    classes = seeds % max(num_classes, 1)
    start = time.monotonic()
    images = generate([(t.sampler, t.params) for t in trained], seeds, classes)
    seconds = time.monotonic() - start
    logging.info("drew %d samples through %d stages in %.1f s, compilation included", samples, len(stages), seconds)

    write_png(workdir / "samples" / "grid.png", _relay_picture(stages, images, seeds, classes))
    loss_curves([(t.stage.name, t.folder / "metrics.jsonl") for t in trained], workdir / "loss.png")
    summary = {
        "stages": {t.stage.name: _stage_summary(t) for t in trained},
        "samples": samples, "sampling_seconds": round(seconds, 1),
        "sampling_images_per_second": round(samples / seconds, 2),
        "sampler": {s.name: {"steps": len(s.sampler.sigmas()) - 1, "guidance": s.guidance.weight} for s in stages},
    }
    if class_check and num_classes and len(stages) > 1:
        first = images[stages[0].name]
        factor = last.resolution // stages[0].resolution
        upsampled = first.repeat(factor, axis=1).repeat(factor, axis=2)
        accuracy = class_accuracies(source, {"relay": images[last.name], "upsampled": upsampled}, classes, last.resolution)
        summary.update(class_accuracy=accuracy["relay"], class_accuracy_upsampled=accuracy["upsampled"],
                       class_accuracy_real=accuracy["real"])
    summary.update(seconds=round(sum(t.seconds for t in trained) + time.monotonic() - start, 1),
                   device=f"{jax.device_count()} x {jax.devices()[0].device_kind}", jax=jax.__version__,
                   python=platform.python_version())
    write_json(workdir / "summary.json", summary)
    return summary


def _stage_summary(trained: Trained) -> dict:
    """Length, time, rate and loss of a stage's training; the loss is the mean of the last tenth of the curve."""
    lines = read_jsonl(trained.folder / "metrics.jsonl")
    losses = [line["loss"] for line in lines if "loss" in line]
    rates = [line["images_per_second"] for line in lines]
    tail = losses[-max(len(losses) // 10, 1):]
    return {
        "resolution": trained.stage.resolution,
        "images": lines[-1]["images"] if lines else 0,
        "seconds": round(trained.seconds, 1),
        "images_per_second": float(np.median(rates)) if rates else None,
        "loss": round(float(np.mean(tail)), 5) if tail else None,
        "steps_skipped": lines[-1]["steps_skipped"] if lines else 0,
    }


def _relay_picture(stages: Sequence[Stage], images: dict[str, np.ndarray], seeds: np.ndarray,
                   classes: np.ndarray) -> np.ndarray:
    """Each stage, and each hand-off, as a panel: a row for each of the first classes, a column for each sample."""
    if stages[-1].network.num_classes:
        rows = [np.flatnonzero(classes == c)[:GRID_COLUMNS] for c in range(min(stages[-1].network.num_classes, GRID_ROWS))]
        chosen = np.concatenate([row for row in rows if len(row) == GRID_COLUMNS] or [np.arange(len(seeds))])
    else:
        chosen = np.arange(len(seeds))
    chosen = chosen[:GRID_ROWS * GRID_COLUMNS]
    side = min(stages[-1].resolution * 3, 96) if stages[-1].resolution <= 64 else stages[-1].resolution
    pictures = []
    for before, stage in zip([None, *stages[:-1]], stages, strict=True):
        if before is not None and isinstance(stage.process, RelayProcess):
            start = handoff_images(stage, seeds[chosen], images[before.name][chosen])
            pictures.append((f"hand-off to {stage.name}", grid(start, GRID_COLUMNS, side)))
        pictures.append((f"{stage.name}, {stage.resolution} px", grid(images[stage.name][chosen], GRID_COLUMNS, side)))
    return panels(pictures)

"""What a finished relay leaves behind: samples/grid.png, loss.png, and the report of its
samples."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from relay_jax.config import Stage
from relay_jax.data.loader import read
from relay_jax.data.source import Source
from relay_jax.data.transforms import to_float
from relay_jax.evaluation.classifier import train_classifier
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ArrayImages, ImageSet, chosen
from relay_jax.evaluation.references import Reference, of_source, reference_features
from relay_jax.evaluation.report import averaging, make_report, write_report
from relay_jax.evaluation.scores import NEIGHBOURS, SETTINGS, notes, score
from relay_jax.evaluation.statistics import collect
from relay_jax.plots.grids import loss_curves, relay_picture
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import curve_summary, is_writer, read_jsonl, write_png
from relay_jax.sampling.chain import StageSampler, generate
from relay_jax.sampling.classes import classes_for
from relay_jax.sampling.pixels import to_uint8
from relay_jax.sampling.record import describe_sampling

CLASSIFIER_IMAGES, HELD_OUT_IMAGES = 4096, 1024


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A finished stage: its sampler and averaged parameters, the notes of its checkpoint, and
    its folder."""

    sampler: StageSampler
    params: dict
    notes: Mapping[str, Any]
    folder: Path

    @property
    def stage(self) -> Stage:
        return self.sampler.stage


@dataclass(frozen=True, kw_only=True)
class SummarySettings:
    """samples: images drawn. class_check: score them also with a classifier trained on real
    images (needs classes).
    reference_images: real images that they are compared with, 0 = all. cache: for the features
    of the reference."""

    samples: int
    class_check: bool
    reference_images: int
    threads: int
    cache: Path


def class_accuracies(
    source: Source, images: dict[str, np.ndarray], classes: np.ndarray, resolution: int
) -> dict[str, float]:
    """Share of the images that a classifier trained on real images gives the class that was
    asked for.

    images: for each name, float [n, resolution, resolution, 3]. Adds "real": held-out real
    images, the ceiling.
    """
    total = min(len(source), CLASSIFIER_IMAGES + HELD_OUT_IMAGES)
    held_out = total // 5
    pixels, labels = read(source, range(total), resolution)
    real = to_float(pixels)
    classify = train_classifier(real[held_out:], labels[held_out:], source.num_classes)
    seen = {name: (to_float(to_uint8(x)), classes) for name, x in images.items()}
    seen["real"] = (real[:held_out], labels[:held_out])
    return {
        name: round(float(np.mean(classify(x) == wanted)), 4) for name, (x, wanted) in seen.items()
    }


def summarize(
    trained: Sequence[Trained],
    source: Source,
    description: dict[str, Any],
    extractor: FeatureExtractor,
    workdir: Path,
    settings: SummarySettings,
) -> dict[str, Any]:
    """Draws samples (seeds 0, 1, ...; class = seed mod classes) through all stages, and writes
    pictures and report.

    description: what the configuration says of the data set, which is the reference. All
    processes must call it.
    Returns the report.
    """
    begun = time.monotonic()
    stages = [t.stage for t in trained]
    last, num_classes, seeds = (
        stages[-1],
        stages[-1].network.num_classes,
        np.arange(settings.samples),
    )
    classes = classes_for(seeds, num_classes, "mod")
    images = generate([(t.sampler, t.params) for t in trained], seeds, classes)
    seconds = {"sampling": time.monotonic() - begun}
    logging.info(
        "drew %d samples through %d stages in %.1f s, compilation included",
        len(seeds),
        len(stages),
        seconds["sampling"],
    )
    if is_writer():
        write_png(workdir / "samples" / "grid.png", relay_picture(stages, images, seeds, classes))
        loss_curves(
            [(t.stage.name, t.folder / "metrics.jsonl") for t in trained], workdir / "loss.png"
        )

    record = describe_sampling(
        stages, {t.stage.name: (t.params, t.notes) for t in trained}, seeds.tolist(), "mod"
    )
    samples = ArrayImages(to_uint8(images[last.name]), {"kind": "drawn"})
    reference = of_source(
        source,
        description,
        last.resolution,
        threads=settings.threads,
        limit=settings.reference_images,
    )
    start = time.monotonic()
    scores, told = distances(samples, reference, source, extractor, settings)
    seconds["distances"], start = time.monotonic() - start, time.monotonic()
    if settings.class_check and num_classes and len(stages) > 1:
        first, factor = images[stages[0].name], last.resolution // stages[0].resolution
        upsampled = first.repeat(factor, axis=1).repeat(factor, axis=2)
        accuracy = class_accuracies(
            source, {"relay": images[last.name], "upsampled": upsampled}, classes, last.resolution
        )
        scores |= {
            "class_accuracy": accuracy["relay"],
            "class_accuracy_upsampled": accuracy["upsampled"],
            "class_accuracy_real": accuracy["real"],
        }
        told.append(
            "class_accuracy: share of the samples that a small classifier, trained on real "
            "images, gives the class "
            "that was asked for; _upsampled: of the first stage's images, enlarged; _real: of "
            "held-out real images."
        )
        seconds["classifier"] = time.monotonic() - start

    asked = {
        "samples": {
            **samples.identity,
            "resolution": last.resolution,
            "sampling": record,
            "ema": averaging(stages),
        },
        "reference": reference.identity,
        "features": extractor.identity,
        "metrics": SETTINGS,
    }
    training: dict[str, Any] = {}
    rates: dict[str, float] = {"sampling": round(len(seeds) / seconds["sampling"], 2)}
    for t in trained:
        training[t.stage.name], rates[t.stage.name] = _training(t)
        seconds[f"training {t.stage.name}"] = t.notes["seconds"]
    seconds["total"] = sum(t.notes["seconds"] for t in trained) + time.monotonic() - begun
    report = make_report(scores, told, asked, seconds, training=training)
    report["time"]["images_per_second"] = rates
    if is_writer():
        write_report(workdir, report)
    return report


def distances(
    samples: ImageSet,
    reference: Reference,
    source: Source,
    extractor: FeatureExtractor,
    settings: SummarySettings,
) -> tuple[dict[str, float], list[str]]:
    """Scores of the samples, and of as many real images in their place, with notes; on the
    process that writes."""
    if len(source) <= NEIGHBOURS:
        return {}, [f"{len(source)} real images are too few to compare with."]
    real = reference_features(reference, extractor, cache=settings.cache)
    found = collect(samples, extractor, what="samples", rows=len(samples), probabilities=True)
    others = ArrayImages(
        other_images(source, len(samples), settings.reference_images, samples.resolution), {}
    )
    ideal = (
        collect(others, extractor, what="real images", rows=len(others)) if len(others) else None
    )

    def compare() -> dict[str, float]:
        if real is None or not is_writer():
            return {}
        of_real = score(real, ideal, extractor.name) if ideal else {}
        return score(real, found, extractor.name) | {
            f"{name}_real": value for name, value in of_real.items()
        }

    scores = distributed.everywhere(compare)
    told = notes(real, found, extractor.name) if real else []
    if ideal:
        told.append(
            "Names with _real: as many real images, none of them in the reference, in the "
            "place of the samples."
        )
    return scores, told


def other_images(source: Source, count: int, reference_images: int, resolution: int) -> np.ndarray:
    """Real images that are not in the reference: uint8 [count, r, r, 3], or none if there are
    not enough."""
    rest = np.setdiff1d(
        np.arange(len(source)), chosen(len(source), reference_images or len(source))
    )
    wanted = rest[chosen(len(rest), count)].tolist() if len(rest) >= count else []
    return read(source, wanted, resolution)[0]


def _training(trained: Trained) -> tuple[dict[str, Any], float]:
    """Length and loss of a stage's training, and its rate."""
    curve = curve_summary(read_jsonl(trained.folder / "metrics.jsonl"))
    told = {
        "resolution": trained.stage.resolution,
        "images": trained.notes["images"],
        "loss": curve["loss"],
        "steps_skipped": curve["steps_skipped"],
    }
    return told, curve["images_per_second"]

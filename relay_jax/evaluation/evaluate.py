"""Scores of images against a reference, by the one evaluation of scorer.py, for all who ask.

evaluate_run           --mode=evaluate: images of a folder, or samples of a run; with a report
evaluation_of_stage    the stage that is being trained: a curve of scores beside the loss
summarize              the end of a training: its samples, with a report
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax.config import Settings
from relay_jax.data.decoding import Decoding
from relay_jax.data.source import Source
from relay_jax.errors import UserError
from relay_jax.evaluation.classifier import about_classifier, class_check
from relay_jax.evaluation.dataset import open_data_set, training_set
from relay_jax.evaluation.features import FeatureExtractor, make_extractor
from relay_jax.evaluation.images import (
    ArrayImages,
    GeneratedImages,
    ImageSet,
    Shown,
    SourceImages,
    open_images,
)
from relay_jax.evaluation.neighbours import NEIGHBOURS
from relay_jax.evaluation.references import (
    check_sizes,
    open_reference,
)
from relay_jax.evaluation.report import (
    averaging,
    calls_per_image,
    check_folder,
    evaluation_settings,
    make_report,
    notes_on_record,
    training_summary,
    write_report,
)
from relay_jax.evaluation.scorer import Clock, Scorer, Scores, evaluate
from relay_jax.runtime.distributed import agree, is_first
from relay_jax.runtime.sharding import describe, make_mesh, place
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.pixels import to_uint8
from relay_jax.sampling.record import read_record
from relay_jax.sampling.request import Request, of_one_stage
from relay_jax.sampling.seeds import classes_for
from relay_jax.stage import Stage


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What --mode=evaluate compares with, in the user's words.

    reference: 'dataset', a folder or an npz (references.py);
    reference_images: of it at most, 0 = all; features: name of an
    extractor, weights: the file of its weights, where it takes one
    (features.py); cache: folder for the features of references.
    """

    reference: str
    reference_images: int
    features: str
    weights: Path | None
    cache: Path


def evaluate_run(
    settings: Settings,
    samples: Request | Path,
    weights: Mapping[str, Path],
    comparison: Comparison,
    out: Path,
    shown: Shown | None = None,
) -> dict[str, Any]:
    """Writes out/report.json and out/report.md, and returns the report.

    samples: a folder or npz of images (`open_images`), or a request,
    whose images are generated as --mode=sample would, but written
    nowhere. weights: folders of the request's stages. shown: gets some
    of the images. Raises UserError or DataError for what cannot be
    done, where possible before anything expensive.
    """
    clock, record, ema = Clock(), None, None
    more: dict[str, Any] = {}
    with agree():
        if comparison.reference_images < 0:
            raise UserError(
                f"--reference_images must not be negative, not {comparison.reference_images}"
            )
        mesh = make_mesh(settings.fsdp)
        extractor = make_extractor(comparison.features, weights=comparison.weights, mesh=mesh)
        decoding = Decoding.from_config(settings.dataset.keys)
        if isinstance(samples, Path):
            scored = open_images(samples, settings.dataset.threads, decoding)
            scored.show("samples")
            images: ImageSet = scored
            record = read_record(samples) if samples.is_dir() else None
            resolution = images.resolution
        else:
            source = samples.open_source(settings)
            resolution = samples.stages[-1].resolution
        reference = open_reference(
            comparison.reference,
            resolution,
            data_set=partial(open_data_set, settings, weights),
            threads=settings.dataset.threads,
            limit=comparison.reference_images,
            decoding=decoding,
        )
        if isinstance(reference.images, SourceImages):
            reference.images.show("reference")
    logging.info("%s; features %s", describe(mesh), extractor.name)
    # The weights last: everything that may be a mistake of the user's
    # is known by now.
    if not isinstance(samples, Path):
        chain = Chain.load(samples.stages, weights, mesh, settings.sample.batch)
        images, record = GeneratedImages(samples, chain, source), samples.record(chain.weights)
        ema = averaging(samples.stages)
        more["calls_per_image"] = calls_per_image(samples.stages)
    about = evaluation_settings(images, reference, extractor, record, ema)
    # Two sets that are too small, and a folder with another report:
    # known before the hours begin.
    with agree():
        check_sizes(reference, images)
        check_folder(out, about)
    scorer = Scorer(reference=reference, extractor=extractor, cache=comparison.cache)
    scores = evaluate(shown.watch(images) if shown else images, scorer)
    seconds = {**scores.seconds, "total": clock.total}
    lines = scores.notes + notes_on_record(record, len(images))
    report = make_report(scores.all, lines, about, seconds, **more)
    with agree():
        # Printed before they are written: hours of work, whatever the disk says.
        if is_first():
            logging.info("%s", scores)
            write_report(out, report)
            if shown and reference.images is not None:
                shown.reference = shown.some_of(reference.images)
    return report


@dataclass(frozen=True, kw_only=True)
class StageEvaluation:
    """Averaged parameters of the stage that is trained -> scores (on process 0).

    source: the training set, which is the reference. mesh: of the
    devices that sample. settings: `evaluate` says how many
    images. cache: folder for the features of the reference. All
    processes must call it.
    """

    # Few samples against a part of the training set: the numbers rank
    # the moments of one training and are no published scores.

    stage: Stage
    source: Source
    mesh: Mesh
    extractor: FeatureExtractor
    settings: Settings
    cache: Path

    # Made at the first evaluation: a training without any does not pay
    # for hashing its data set.
    @cached_property
    def _scorer(self) -> Scorer:
        with agree():
            reference = training_set(self.source, self.stage.resolution, self.settings)
        # SIGTERM is answered by the training, which saves.
        return Scorer(reference=reference, extractor=self.extractor, cache=self.cache, stop=False)

    # Kept with its compiled programs: each
    # evaluation gives it other parameters.
    @cached_property
    def _chain(self) -> Chain:
        return Chain([self.stage.alone], {}, self.mesh, self.settings.sample.batch)

    def __call__(self, params: dict) -> dict[str, float]:
        """Seeds 0, 1, ...; a stage that continues images starts from down-sampled real ones."""
        begun = time.monotonic()
        if len(self.source) <= NEIGHBOURS:
            return {}
        request = of_one_stage(self.stage, self.settings.evaluate.every_samples)
        # The training may have fewer devices than sampling, or the
        # parameters elsewhere.
        chain = self._chain.with_params({self.stage.name: place(params, self.mesh)})
        source = self.source if request.from_real_images else None
        images = GeneratedImages(request, chain, source)
        scores = evaluate(images, self._scorer, what=f"samples of stage {self.stage.name}")
        if is_first():
            seconds = time.monotonic() - begun
            logging.info(
                "stage %s: %s (%d samples, %.1f s)", self.stage.name, scores, len(images), seconds
            )
        return scores.curve


@dataclass(frozen=True, kw_only=True)
class Generated:
    """Images of all stages for seeds 0, 1, ..., class = seed mod classes.

    seeds: int64 [n]; classes: int32 [n]; images: by stage name,
    float32 [n, r, r, c], about [-1, 1]; seconds: that it took,
    compilation included.
    """

    seeds: np.ndarray
    classes: np.ndarray
    images: Mapping[str, np.ndarray]
    seconds: float


def generate_first(chain: Chain, count: int) -> Generated:
    """The images of the first `count` seeds, whole on every process. All must call it."""
    begun = time.monotonic()
    seeds = np.arange(count)
    classes = classes_for(seeds, chain.stages[-1].num_classes, "mod")
    chain.compile()
    images = chain.images(seeds, classes)
    seconds = time.monotonic() - begun
    logging.info(
        "generated %d samples through %d stages in %.1f s, compilation included",
        count,
        len(chain.stages),
        seconds,
    )
    return Generated(seeds=seeds, classes=classes, images=images, seconds=seconds)


def summarize(
    generated: Generated,
    chain: Chain,
    source: Source,
    extractor: FeatureExtractor,
    settings: Settings,
    workdir: Path,
) -> dict[str, Any]:
    """Writes workdir/report.json and report.md of a finished relay's samples; returns the report.

    generated: by `generate_first`. chain: all stages with their
    weights, as loaded from the workdir. source: the training set, which
    is the reference. All processes must call it.
    """
    clock, stages, last = Clock(), chain.stages, chain.stages[-1]
    samples = ArrayImages(to_uint8(generated.images[last.name]), {"kind": "drawn"})
    request = Request(stages=stages, seeds=generated.seeds.tolist())
    with agree():
        reference = training_set(source, last.resolution, settings)
    about = evaluation_settings(
        samples, reference, extractor, request.record(chain.weights), averaging(stages)
    )
    scorer = Scorer(reference=reference, extractor=extractor, cache=workdir / "cache")
    if len(source) > NEIGHBOURS:
        scores = evaluate(samples, scorer)
    else:
        scores = Scores(
            values={}, notes=[f"{len(source)} real images are too few to compare with."]
        )
    values, lines = scores.all, list(scores.notes)
    clock.lap("distances")
    if settings.evaluate.class_check and last.num_classes and len(stages) > 1:
        values |= class_check(source, stages, generated.images, generated.classes, extractor)
        lines.append(
            f"{about_classifier(extractor)}; _upsampled: of the first stage's images, enlarged; "
            "_real: of held-out real images."
        )
        clock.lap("classifier")
    training = {s.name: training_summary(s, chain.notes[s.name], workdir / s.name) for s in stages}
    rates = {"sampling": round(len(samples) / generated.seconds, 2)}
    rates |= {name: part.pop("images_per_second") for name, part in training.items()}
    lengths = {s.name: chain.notes[s.name]["seconds"] for s in stages}
    seconds = {
        "sampling": generated.seconds,
        **clock.seconds,
        **{f"training {name}": value for name, value in lengths.items()},
        "total": sum(lengths.values()) + generated.seconds + clock.total,
    }
    calls = calls_per_image(stages)
    report = make_report(values, lines, about, seconds, training=training, calls_per_image=calls)
    report["time"]["images_per_second"] = rates
    with agree():
        if is_first():
            logging.info("%s", Scores(values=values))
            write_report(workdir, report)
    return report

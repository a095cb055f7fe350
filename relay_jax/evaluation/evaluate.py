"""--mode=evaluate: scores of a set of images, or of samples drawn from a run, against a
reference; with a report."""

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax.config import ConfigError, Stage, describe_source, open_source
from relay_jax.data.source import DataError
from relay_jax.evaluation.drawn import DrawnSamples
from relay_jax.evaluation.features import FeatureExtractor, make_extractor
from relay_jax.evaluation.images import ImageSet, open_images
from relay_jax.evaluation.references import Reference, open_reference, reference_features
from relay_jax.evaluation.report import averaging, check_folder, make_report, write_report
from relay_jax.evaluation.scores import NEIGHBOURS, SETTINGS, notes, score
from relay_jax.evaluation.statistics import collect
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import load_ema
from relay_jax.runtime.logs import is_writer
from relay_jax.runtime.sharding import describe, make_mesh
from relay_jax.sampling.chain import StageSampler
from relay_jax.sampling.record import read_record
from relay_jax.sampling.request import Request, parse_request
from relay_jax.sampling.seeds import parse_seeds


def evaluate(
    config: ConfigDict,
    stages: list[Stage],
    only: Stage | None,
    weights: Mapping[str, Path],
    *,
    images: Path | None,
    seeds: str,
    class_rule: str,
    low_res: Path | None,
    reference: str,
    reference_images: int,
    features: str,
    inception: Path | None,
    out: Path,
    cache: Path,
) -> None:
    """Writes out/report.json and out/report.md.

    images: what to score: a folder or npz; None: samples drawn from the stages, whose folders
    are `weights`, as --mode=sample would draw them with these `only`, seeds, class_rule and
    low_res, but written nowhere.
    reference, reference_images: see `open_reference`. cache: folder for the features of references.
    Raises ConfigError, DataError, FeatureError or MeshError for what cannot be done, where
    possible before anything
    expensive.
    """
    begun = time.monotonic()

    def open_all() -> tuple[
        Mesh, FeatureExtractor, Request, ImageSet | None, Reference, dict[str, Any] | None
    ]:
        if reference_images < 0:
            raise ConfigError(f"--reference_images must not be negative, not {reference_images}")
        mesh = make_mesh(config.mesh.fsdp)
        request = parse_request(
            stages,
            only,
            seeds=seeds,
            class_rule=class_rule,
            pixel_edit=config.sample.pixel_edit,
            low_res=low_res,
            data=describe_source(config, stages),
        )
        extractor = make_extractor(features, weights=inception, mesh=mesh)
        given = open_images(images, config.dataset.threads) if images else None
        record = read_record(images) if images and images.is_dir() else None
        resolution = given.resolution if given else request.stages[-1].resolution
        ours = open_reference(
            reference,
            resolution,
            limit=reference_images,
            threads=config.dataset.threads,
            data_set=lambda: (open_source(config, stages), describe_source(config, stages)),
        )
        return mesh, extractor, request, given, ours, record

    mesh, extractor, request, given, compared, record = distributed.everywhere(open_all)
    logging.info("%s; features %s", describe(mesh), extractor.name)
    if given is None:
        drawn, record = draw(config, stages, weights, mesh, request)
        samples: ImageSet = drawn
        ema = averaging(request.stages)
    else:
        samples, ema = given, None
    settings = {
        "samples": {
            **samples.identity,
            "resolution": samples.resolution,
            "sampling": record,
            "ema": ema,
        },
        "reference": compared.identity,
        "features": extractor.identity,
        "metrics": SETTINGS,
    }

    def check() -> None:
        enough(compared, samples)
        check_folder(out, settings)

    distributed.everywhere(check)
    real = reference_features(compared, extractor, cache=cache)
    seconds = {"reference": time.monotonic() - begun}
    start = time.monotonic()
    found = collect(samples, extractor, what="samples", rows=len(samples), probabilities=True)
    seconds["samples"] = time.monotonic() - start

    def finish() -> None:
        if real is None or not is_writer():
            return
        start = time.monotonic()
        scores = score(real, found, extractor.name)
        seconds.update(scores=time.monotonic() - start, total=time.monotonic() - begun)
        told = notes(real, found, extractor.name) + about_record(record, len(samples))
        write_report(out, make_report(scores, told, settings, seconds))
        logging.info("%s", ", ".join(f"{name} {value:.5g}" for name, value in scores.items()))
        logging.info("look at %s", out / "report.md")

    distributed.everywhere(finish)  # the others wait here


def about_record(record: Mapping[str, Any] | None, images: int) -> list[str]:
    """Notes for a reader who would trust samples.json too much."""
    if record is None:
        return ["How the samples were made is not known: there is no samples.json beside them."]
    seeds = len(parse_seeds(record["seeds"]))
    return (
        [f"samples.json speaks of {seeds:,} images, and there are {images:,}."]
        if seeds != images
        else []
    )


def enough(reference: Reference, samples: ImageSet) -> None:
    """Raises DataError if a set has fewer images than the scores need."""
    least, why = (
        (NEIGHBOURS + 1, f"{NEIGHBOURS} neighbours")
        if reference.images is not None
        else (2, "a covariance")
    )
    sets = {"samples": samples, "reference": reference.images}
    for what, count in ((name, len(images)) for name, images in sets.items() if images is not None):
        if count < least:
            raise DataError(
                f"{count} image{'s' * (count != 1)} as {what}: {why} need at least {least}"
            )


def draw(
    config: ConfigDict,
    stages: list[Stage],
    weights: Mapping[str, Path],
    mesh: Mesh,
    request: Request,
) -> tuple[DrawnSamples, dict[str, Any]]:
    """The samples of a request, and the record of how they are made."""
    source = distributed.everywhere(
        lambda: open_source(config, stages) if request.from_real_images else None
    )
    loaded = {
        stage.name: load_ema(weights[stage.name], stage.network, mesh) for stage in request.stages
    }
    samplers = [
        (StageSampler(stage, mesh, config.sample.batch), loaded[stage.name][0])
        for stage in request.stages
    ]
    return DrawnSamples(request, samplers, source), request.record(loaded)

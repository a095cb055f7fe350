"""--mode=train: every stage in order, then the summary."""

import json
from pathlib import Path

import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax.config import ConfigError, Stage, describe_source
from relay_jax.data.source import Source
from relay_jax.evaluation.during import EvaluationSettings, make_evaluation
from relay_jax.evaluation.features import FeatureExtractor, make_extractor
from relay_jax.evaluation.summary import SummarySettings, Trained, summarize
from relay_jax.plots.grids import grid
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import load_ema
from relay_jax.runtime.devices import training_devices
from relay_jax.runtime.environment import environment
from relay_jax.runtime.sharding import describe, make_mesh, place
from relay_jax.sampling.chain import StageSampler
from relay_jax.sampling.request import of_one_stage
from relay_jax.training.loop import LoopSettings, Preview, is_finished, train_stage


def train(
    config: ConfigDict,
    stages: list[Stage],
    only: Stage | None,
    source: Source,
    workdir: Path,
    weights: dict[str, Path],
) -> None:
    """Trains `only`, or all stages in order, and draws samples when every stage is finished.

    weights: folders from whose averaged weights a stage starts, if it has no checkpoint of its
    own yet. Stages do not depend on each other for training; finished ones are skipped.
    """
    mesh = distributed.everywhere(lambda: make_training_mesh(config, stages))
    all_devices = distributed.everywhere(
        lambda: make_mesh(config.mesh.fsdp)
    )  # more on CPU: see cpu_devices.py
    batches = ", ".join(
        f"{s.name} {s.train.batch} = {mesh.size} x {s.train.batch // mesh.size}" for s in stages
    )
    logging.info("%s; batches: %s", describe(mesh), batches)
    settings = LoopSettings(
        seed=config.seed,
        x_flip=config.dataset.x_flip,
        threads=config.dataset.threads,
        workers=config.dataset.workers,
        checkpoint_every_images=config.checkpoint.every_images,
        keep=config.checkpoint.keep,
        keep_every_images=config.checkpoint.keep_every_images,
        log_every_steps=config.log.every_steps,
        grid_every_images=config.log.grid_every_images,
        profile_first=config.log.profile_first,
        profile_steps=config.log.profile_steps,
        evaluate_every_images=config.evaluate.every,
        about={
            "config": json.loads(config.to_json_best_effort()),
            "environment": environment(mesh),
        },
    )
    extractor = distributed.everywhere(lambda: make_features(config, all_devices))
    evaluating = EvaluationSettings(
        samples=config.evaluate.every_samples,
        reference_images=config.evaluate.reference_images,
        batch=config.sample.batch,
        threads=config.dataset.threads,
        cache=workdir / "cache",
        description=describe_source(config, stages),
    )
    for stage in [only] if only else stages:
        preview = make_preview(stage, source, all_devices, config.log.grid_images)
        evaluation = make_evaluation(stage, source, all_devices, extractor, evaluating)
        train_stage(
            stage,
            source,
            mesh,
            workdir / stage.name,
            settings,
            preview,
            weights.get(stage.name),
            evaluation,
        )
        distributed.barrier(f"trained {stage.name}")  # its last checkpoint is there for all
        if distributed.stop_requested():
            raise distributed.Stopped(f"stopped by SIGTERM after stage {stage.name}")

    waiting = [stage.name for stage in stages if not is_finished(stage, workdir / stage.name)]
    reported = distributed.of_first((workdir / "report.json").exists())
    if waiting:
        logging.info("still to train: %s", ", ".join(waiting))
    elif reported:
        logging.info(
            "all stages are finished; see %s (remove report.json to draw the samples again)",
            workdir / "report.md",
        )
    else:
        trained = []
        for stage in stages:
            params, meta = load_ema(workdir / stage.name, stage.network, all_devices)
            sampler = StageSampler(stage, all_devices, config.sample.batch)
            trained.append(
                Trained(sampler=sampler, params=params, notes=meta, folder=workdir / stage.name)
            )
        report = summarize(
            trained,
            source,
            describe_source(config, stages),
            extractor,
            workdir,
            SummarySettings(
                samples=config.evaluate.samples,
                class_check=config.evaluate.class_check,
                threads=config.dataset.threads,
                reference_images=config.evaluate.reference_images,
                cache=workdir / "cache",
            ),
        )
        logging.info(
            "done: %s", ", ".join(f"{name} {value:.4g}" for name, value in report["scores"].items())
        )
        logging.info("look at %s and %s", workdir / "samples" / "grid.png", workdir / "report.md")


def make_features(config: ConfigDict, mesh: Mesh) -> FeatureExtractor:
    """What evaluate.features and evaluate.inception name. Raises FeatureError."""
    weights = Path(config.evaluate.inception) if config.evaluate.inception else None
    return make_extractor(config.evaluate.features, weights=weights, mesh=mesh)


def make_training_mesh(config: ConfigDict, stages: list[Stage]) -> Mesh:
    """The mesh of the devices, whose number must divide every stage's batch. Raises ConfigError
    or MeshError."""
    mesh = make_mesh(config.mesh.fsdp, training_devices())
    for stage in stages:
        if stage.train.batch % mesh.size:
            raise ConfigError(
                f"stage {stage.name}: train.batch {stage.train.batch} is not divisible by "
                f"{mesh.size} devices"
            )
    return mesh


def make_preview(stage: Stage, source: Source, mesh: Mesh, count: int) -> Preview:
    """params -> a grid of `count` samples of one stage; a relay stage starts from down-sampled
    real images."""
    request, seeds = of_one_stage(stage, count), np.arange(count)
    given = request.inputs(seeds, source if request.from_real_images else None)
    sampler = StageSampler(stage, mesh, count)

    def preview(params: dict) -> np.ndarray:
        return grid(sampler(place(params, mesh), seeds, given.classes, given.low_res), columns=8)

    return preview

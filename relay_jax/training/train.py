"""--mode=train: every stage in order, then samples of the whole relay and a report.

WORKDIR/STAGE/              each stage's training (training/loop.py, training/report.py)
WORKDIR/samples/grid.png    samples of all stages
WORKDIR/loss.png            the loss of all stages
WORKDIR/report.{json,md}    their scores (evaluation/evaluate.py)
WORKDIR/report.html         a page of all that (plots/run_page.py), also on the way
"""

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax.config import Settings
from relay_jax.data.description import describe as describe_data
from relay_jax.data.source import Source
from relay_jax.errors import Stopped, UserError
from relay_jax.evaluation.evaluate import StageEvaluation, generate_first, summarize
from relay_jax.evaluation.features import FeatureExtractor, file_of, make_extractor
from relay_jax.evaluation.words import sentences
from relay_jax.plots.commands import next_commands
from relay_jax.plots.finished import plot_finished, write_grids
from relay_jax.plots.grids import grid, loss_curves, relay_picture
from relay_jax.plots.page import PAGE
from relay_jax.plots.run_page import write_run_page
from relay_jax.presets import with_preset
from relay_jax.runtime import distributed
from relay_jax.runtime.devices import training_devices
from relay_jax.runtime.files import is_writable, read_json, try_folder, write_png
from relay_jax.runtime.sharding import describe, make_mesh, place
from relay_jax.sampling.chain import Chain, Inputs
from relay_jax.sampling.request import of_one_stage
from relay_jax.stage import Stage
from relay_jax.training.loop import Observers, is_finished, train_stage
from relay_jax.training.report import SUMMARY
from relay_jax.workdir import claim_dataset, class_names

PREVIEW_COLUMNS = 8


def train(
    settings: Settings,
    only: Stage | None,
    source: Source,
    workdir: Path,
    weights: Mapping[str, Path],
) -> None:
    """Trains `only`, or all stages in order, and generates samples when every stage is finished.

    weights: folders by stage name from whose averaged weights a
    stage starts, if it has no checkpoint of its own yet. Stages
    do not depend on each other for training; finished ones are
    skipped. Raises UserError, DataError, StorageError, and
    Stopped after SIGTERM.
    """
    # Everything that may be a mistake of the user's, before the
    # first stage trains for days.
    with distributed.agree():
        mesh = training_mesh(settings)
        # On CPU sampling uses more devices than
        # training: see runtime/devices.py.
        sampling_mesh = make_mesh(settings.fsdp)
        extractor = features_of(settings, sampling_mesh)
        sampled = _as_trained(with_preset(settings, settings.evaluate.preset))
        Chain(sampled.stages, {}, sampling_mesh, settings.sample.batch).check_memory()
        # One process looks at the files, and says what is there.
        if distributed.is_first():
            data = describe_data(source, settings.dataset.keys, settings.resolutions, settings.seed)
            claim_dataset(workdir, data.show())
    batches = ", ".join(
        f"{s.name} {s.train.batch} = {mesh.size} x {s.train.batch // mesh.size}"
        for s in settings.stages
    )
    logging.info("%s; batches: %s", describe(mesh), batches)
    for stage in [only] if only else settings.stages:
        # The same weights, sampled as evaluate.preset says: previews
        # are many, and need not be exact.
        quick = sampled.stages[stage.index]
        evaluation = StageEvaluation(
            stage=quick,
            source=source,
            mesh=sampling_mesh,
            extractor=extractor,
            settings=settings,
            cache=workdir / "cache",
        )
        preview = Preview(quick, source, sampling_mesh, settings.log.grid_images)
        page = partial(write_run_page, sampled.stages, workdir)
        observers = Observers(preview=preview, evaluation=evaluation, page=page)
        folder, start_from = workdir / stage.name, weights.get(stage.name)
        train_stage(stage, source, mesh, folder, settings, observers, start_from)
        # The stage's last checkpoint is there for all before one of
        # them looks for it.
        distributed.barrier(f"trained {stage.name}")
        if distributed.stop_requested():
            raise Stopped(f"stopped by SIGTERM after stage {stage.name}")
    finish(sampled, source, extractor, sampling_mesh, workdir)


def _as_trained(settings: Settings) -> Settings:
    """The relay without guides and other averages, which a training may not have made yet."""
    chosen = [s.name for s in settings.stages if s.guide is not None or s.ema]
    if chosen:
        logging.info(
            "stage %s: sample.guide and sample.ema are for --mode=sample and evaluate; the "
            "training itself samples without them",
            ", ".join(chosen),
        )
    stages = [replace(stage, guide=None, ema="") for stage in settings.stages]
    return replace(settings, stages=stages)


def is_reported(workdir: Path) -> bool:
    """Whether the report of the whole relay is there and can be read."""
    try:
        return "scores" in read_json(workdir / "report.json")
    except (OSError, ValueError, TypeError):
        return False


def try_places(stages: Sequence[Stage], workdir: Path) -> None:
    """Raises StorageError if what the training of these stages writes cannot be written."""
    results = ["report.json", "report.md", PAGE, "loss.png", "samples/grid.png"]
    try_folder(workdir, ["samples", "plots", "cache"], results)
    for stage in stages:
        folders = ["checkpoints", "grids", "profile", "debug"]
        try_folder(workdir / stage.name, folders, [SUMMARY])


def may_only_be_read(stages: Sequence[Stage], workdir: Path) -> bool:
    """Whether nothing can be written to a run, and nothing need be: it is finished, and says so.

    All processes must call it.
    """
    readable = is_reported(workdir) and not is_writable(workdir)
    if not distributed.of_first(readable):
        return False
    if not all(is_finished(stage, workdir / stage.name) for stage in stages):
        return False
    logging.info(
        "all stages are finished; see %s (nothing can be written there)",
        workdir / (PAGE if (workdir / PAGE).exists() else "report.md"),
    )
    return True


def finish(
    settings: Settings,
    source: Source,
    extractor: FeatureExtractor,
    mesh: Mesh,
    workdir: Path,
) -> None:
    """Samples, pictures and report of a relay whose stages are all finished, once."""
    stages = settings.stages
    unfinished = [stage.name for stage in stages if not is_finished(stage, workdir / stage.name)]
    # Process 0 has written it, and the others may not see it yet.
    reported = distributed.of_first(is_reported(workdir))
    if unfinished:
        logging.info("still to train: %s", ", ".join(unfinished))
        return
    if reported:
        logging.info(
            "all stages are finished; remove report.json to generate the samples again",
        )
        with distributed.agree():
            if distributed.is_first():
                # Of a run that was killed before its page, or
                # that an earlier version has made.
                if not (workdir / PAGE).exists():
                    write_run_page(stages, workdir)
                logging.info("look at %s", workdir / PAGE)
        return
    folders = {stage.name: workdir / stage.name for stage in stages}
    chain = Chain.load(stages, folders, mesh, settings.sample.batch)
    for stage in stages:
        # Read as an older one: the report
        # would be of unfinished weights.
        if chain.notes[stage.name]["step"] < stage.train.steps:
            last = folders[stage.name] / "checkpoints" / str(stage.train.steps)
            raise UserError(f"{last} cannot be read; remove it, and the same command trains again")
    generated = generate_first(chain, settings.evaluate.samples)
    # The pictures before the report: they need no features, which
    # may take long or fail.
    with distributed.agree():
        if distributed.is_first():
            images, seeds, classes = (
                dict(generated.images),
                generated.seeds,
                generated.classes,
            )
            picture = relay_picture(stages, images, seeds, classes)
            write_png(workdir / "samples" / "grid.png", picture)
            logs = [(name, folder / "metrics.jsonl") for name, folder in folders.items()]
            loss_curves(logs, workdir / "loss.png")
            write_grids(settings, source, images, classes, workdir)
    report = summarize(generated, chain, source, extractor, settings, workdir)
    if settings.evaluate.pictures:
        plot_finished(settings, source, chain, extractor, workdir)
    with distributed.agree():
        if distributed.is_first():
            tell(write_run_page(stages, workdir), report, workdir)


def tell(page: Path, report: Mapping[str, Any], workdir: Path) -> None:
    """The end of the story: what was reached, what to do next, and where to look."""
    lines = ["done.", *(f"  {line}" for line in sentences(report["scores"])), "next:"]
    look = ("Look at the page:", f"python -m webbrowser {shlex.quote(str(page))}")
    for what, command in [*next_commands(workdir, class_names(workdir, {}))[:2], look]:
        lines += [f"  {what}", f"    {command}"]
    logging.info("%s", "\n".join(lines))
    logging.info("look at %s", page)


def features_of(settings: Settings, mesh: Mesh) -> FeatureExtractor:
    """What `evaluate` names: features, and the file of their weights. Raises UserError."""
    features = settings.evaluate.features
    weights = file_of(features, settings.evaluate)
    return make_extractor(features, weights=weights, mesh=mesh)


def training_mesh(settings: Settings) -> Mesh:
    """The mesh that trains. Raises UserError if its devices do not divide every stage's batch."""
    mesh = make_mesh(settings.fsdp, training_devices())
    for stage in settings.stages:
        if stage.train.batch % mesh.size:
            raise UserError(
                f"stage {stage.name}: train.batch {stage.train.batch} is not divisible by "
                f"{mesh.size} devices"
            )
    return mesh


@dataclass(frozen=True)
class Preview:
    """Averaged parameters -> a grid of `count` samples of one stage, uint8 [H, W, 3].

    A stage that continues images starts from down-sampled real ones.
    All processes must call it.
    """

    stage: Stage
    source: Source
    mesh: Mesh
    count: int

    # Kept with its compiled programs: each
    # preview gives it other parameters.
    @cached_property
    def _chain(self) -> Chain:
        chain = Chain([self.stage.alone], {}, self.mesh, self.count)
        chain.compile()
        return chain

    @cached_property
    def _inputs(self) -> Inputs:
        request = of_one_stage(self.stage, self.count)
        source = self.source if request.from_real_images else None
        return request.inputs(np.arange(self.count), source)

    def __call__(self, params: dict) -> np.ndarray:
        """Seeds 0, 1, ..., so that what changes between previews is what the training does."""
        name, seeds, inputs = self.stage.name, np.arange(self.count), self._inputs
        chain = self._chain.with_params({name: place(params, self.mesh)})
        images = chain.images(seeds, inputs.classes, inputs.low_res)[name]
        return grid(images, columns=PREVIEW_COLUMNS)

"""Trains one stage: one path from nothing, or from the newest checkpoint, to the last image."""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax.config import Stage
from relay_jax.data.loader import Loader
from relay_jax.data.source import Source
from relay_jax.models.unet import parameter_count
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import CheckpointError, Checkpoints, load_ema
from relay_jax.runtime.devices import compiler_options
from relay_jax.runtime.flops import matmul_flops
from relay_jax.runtime.sharding import (
    batch_sharding,
    host_rows,
    replicated,
    state_shardings,
    to_devices,
)
from relay_jax.training.optimizer import optimizer_of
from relay_jax.training.profile import Profiler
from relay_jax.training.report import StageProgress
from relay_jax.training.state import TrainState, make_init
from relay_jax.training.step import make_train_step


class TrainingError(RuntimeError):
    """The training cannot go on; the message is one line for the user."""


@dataclass(frozen=True, kw_only=True)
class LoopSettings:
    """What does not change the result: reading, saving, telling."""

    seed: int
    x_flip: bool
    threads: int
    workers: int
    checkpoint_every_images: int
    keep: int
    keep_every_images: int
    log_every_steps: int
    profile_first: int
    profile_steps: int
    grid_every_images: int
    evaluate_every_images: int = 0
    about: Mapping[str, Any] = field(default_factory=dict)  # plain values to keep with the logs


RUN_AHEAD = 2  # steps queued on the devices beyond the one that they compute
Preview = Callable[[dict], np.ndarray]  # averaged parameters -> picture, uint8 [H, W, 3]
Evaluation = Callable[
    [dict], dict[str, float]
]  # averaged parameters -> scores, on the process that writes


def _split(state: TrainState) -> dict[str, dict]:
    """The state as checkpoint items: the average apart, since sampling reads only that."""
    fields = state._asdict()
    return {"ema": fields.pop("ema"), "train": fields}


def is_finished(stage: Stage, folder: Path) -> bool:
    """Whether the stage has a checkpoint of its last step, and not a plainly damaged one."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return any(
            step >= stage.train.steps and checkpoints.looks_whole(step)
            for step in checkpoints.steps()
        )


def train_stage(
    stage: Stage,
    source: Source,
    mesh: Mesh,
    folder: Path,
    settings: LoopSettings,
    preview: Preview,
    start_from: Path | None = None,
    evaluation: Evaluation | None = None,
) -> None:
    """Trains `stage` to its end; a stage that is finished returns at once.

    start_from: folder of another training, or of converted weights, whose averaged parameters
    replace the random ones.
    folder: of this stage (checkpoints, logs, grids). Continues from the newest readable
    checkpoint there, with the
    batches that an uninterrupted run would have had.
    Raises Stopped after SIGTERM, at the end of a step and with a checkpoint of it;
    TrainingError when too many steps in
    a row were not finite, CheckpointError when no checkpoint of several can be read, DataError
    for an unreadable image.
    """
    if is_finished(stage, folder):
        logging.info("stage %s is finished (%s)", stage.name, folder)
        return
    train = stage.train
    # Made by a compiled program, so that the keys belong to all processes, like everything else
    # that is computed with.
    init_key, step_key = jax.jit(
        lambda: tuple(
            jax.random.split(jax.random.fold_in(jax.random.key(settings.seed), stage.index))
        ),
        out_shardings=replicated(mesh),
    )()
    optimizer = optimizer_of(train)
    init = make_init(stage.network, optimizer)
    shapes = jax.eval_shape(init, init_key)
    shardings = state_shardings(shapes, mesh)

    def stays(step: int) -> bool:
        return _due((step - 1) * train.batch, step * train.batch, settings.keep_every_images)

    with Checkpoints(folder / "checkpoints", settings.keep, keep_always=stays) as checkpoints:
        restored = checkpoints.restore(_split(shapes), _split(shardings))
        if restored is None:
            state, step, seconds = jax.jit(init, out_shardings=shardings)(init_key), 0, 0.0
            if start_from is not None:
                params, _ = load_ema(start_from, stage.network, mesh)
                logging.info(
                    "stage %s starts from the averaged weights in %s", stage.name, start_from
                )
                state = state._replace(params=params, ema=jax.tree.map(jnp.copy, params))
        else:
            step, items = restored
            state, seconds = (
                TrainState(ema=items["ema"], **items["train"]),
                items["meta"]["seconds"],
            )

        def open_loader() -> Loader:
            loader = Loader(
                source,
                resolution=stage.resolution,
                batch_size=train.batch,
                seed=settings.seed,
                x_flip=settings.x_flip,
                start=step,
                rows=host_rows(train.batch, mesh),
                threads=settings.threads,
                workers=settings.workers,
            )
            if restored is not None and items["meta"]["data"] != loader.state:
                loader.close()
                raise CheckpointError(
                    f"the data set has changed since {folder} was begun (was "
                    f"{items['meta']['data']}, "
                    f"is {loader.state}); use the same data or another --workdir"
                )
            return loader

        loader = distributed.everywhere(open_loader)
        logging.info(
            "stage %s: %d px, %.2fM parameters, batch %d, %s, %s",
            stage.name,
            stage.resolution,
            parameter_count(state.params) / 1e6,
            train.batch,
            f"{mesh.size} x {jax.devices()[0].device_kind}",
            f"continues at {step * train.batch:,} images" if step else "begins",
        )
        train_step = jax.jit(
            make_train_step(stage, optimizer, mesh),
            donate_argnums=0,
            in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
            out_shardings=(shardings, replicated(mesh)),
            compiler_options=compiler_options(mesh),
        )

        progress = StageProgress(stage, mesh, folder, step * train.batch)
        progress.begin(settings.about, step * train.batch)
        # Steps that may wait in the queue: each holds a batch on the devices and delays the
        # answer to SIGTERM. Queued collectives of virtual devices deadlock.
        ahead = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else RUN_AHEAD
        begun, asked = time.monotonic() - seconds, False
        pending: list[dict] = []
        with (
            loader,
            progress,
            Profiler(folder, settings.profile_first, settings.profile_steps) as profiler,
        ):
            while step < train.steps:
                profiler.before(step + 1, asked, pending)
                asked = False
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    with progress.waiting():
                        host_batch = next(loader)
                    batch = to_devices(dict(host_batch), mesh)
                    if (
                        progress.step_flops is None
                    ):  # the program that the next line compiles is this trace
                        progress.step_flops = matmul_flops(
                            train_step.trace(state, batch, step_key).jaxpr.jaxpr
                        )
                    state, metrics = train_step(state, batch, step_key)
                    pending.append(metrics)
                    before, step = step * train.batch, step + 1
                    images, last = step * train.batch, step == train.steps
                    if len(pending) > ahead:
                        jax.block_until_ready(pending[-1 - ahead])

                if step % settings.log_every_steps == 0 or last:
                    asked = progress.report(images, state, pending, profiler.requested())
                    pending = []
                    row = int(state.nonfinite_row)
                    if row >= train.max_nonfinite:
                        raise TrainingError(
                            f"stage {stage.name}: {row} steps in a row had a loss or gradient "
                            "that is not "
                            f"finite, last at {images:,} images; lower train.learning_rate, or "
                            "continue "
                            f"from the checkpoint in {folder} with other settings"
                        )
                stop = distributed.stop_requested() and not last
                if (
                    _due(before, images, settings.checkpoint_every_images)
                    or stays(step)
                    or last
                    or stop
                ):
                    meta = {
                        "images": images,
                        "data": dict(loader.state),
                        "seconds": time.monotonic() - begun,
                    }
                    checkpoints.save(step, **_split(state), meta=meta)
                if stop:
                    if pending:
                        progress.report(images, state, pending, False)
                    raise distributed.Stopped(
                        f"stage {stage.name}: stopped by SIGTERM and saved at {images:,} images"
                    )
                if settings.grid_every_images and (
                    _due(before, images, settings.grid_every_images) or last
                ):
                    progress.picture(images, preview(state.ema))
                if (
                    evaluation
                    and settings.evaluate_every_images
                    and (_due(before, images, settings.evaluate_every_images) or last)
                ):
                    progress.scores(images, evaluation(state.ema))
        seconds = time.monotonic() - begun
    progress.finish(seconds)  # its last checkpoint is complete


def _due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` images was reached in this step."""
    return every > 0 and now // every > before // every

"""Trains one stage: one path from nothing, or from the newest checkpoint, to the last image."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax import distributed
from relay_jax.checkpoint import CheckpointError, Checkpoints, load_ema
from relay_jax.config import Stage
from relay_jax.data.loader import Loader
from relay_jax.data.sources import Source
from relay_jax.logs import Progress, ScalarLog, is_writer, write_png
from relay_jax.models.unet import parameter_count
from relay_jax.sharding import batch_sharding, replicated, state_shardings, stream_order, to_devices
from relay_jax.training.optimizer import make_optimizer
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
    log_every_steps: int
    grid_every_images: int


RUN_AHEAD = 2       # steps queued on the devices beyond the one that they compute
Preview = Callable[[dict], np.ndarray]      # averaged parameters -> picture, uint8 [H, W, 3]


def _split(state: TrainState) -> dict[str, dict]:
    """The state as checkpoint items: the average apart, since sampling reads only that."""
    fields = state._asdict()
    return {"ema": fields.pop("ema"), "train": fields}


def is_finished(stage: Stage, folder: Path) -> bool:
    """Whether the stage has a checkpoint of its last step."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return any(step >= stage.train.steps for step in checkpoints.steps()[:1])


def train_stage(stage: Stage, source: Source, mesh: Mesh, folder: Path, settings: LoopSettings,
                preview: Preview, start_from: Path | None = None) -> None:
    """Trains `stage` to its end; a stage that is finished returns at once.

    start_from: folder of another training, or of converted weights, whose averaged parameters replace the random ones.
    folder: of this stage (checkpoints, metrics.jsonl, TensorBoard events, grids). Continues from the newest readable
    checkpoint there, with the batches that an uninterrupted run would have had.
    Raises Stopped after SIGTERM, at the end of a step and with a checkpoint of it; TrainingError when too many steps in
    a row were not finite, CheckpointError when no checkpoint of several can be read, DataError for an unreadable image.
    """
    if is_finished(stage, folder):
        logging.info("stage %s is finished (%s)", stage.name, folder)
        return
    train = stage.train
    # Made by a compiled program, so that the keys belong to all processes, like everything else that is computed with.
    init_key, step_key = jax.jit(lambda: tuple(jax.random.split(
        jax.random.fold_in(jax.random.key(settings.seed), stage.index))), out_shardings=replicated(mesh))()
    optimizer = make_optimizer(learning_rate=train.learning_rate, batch=train.batch, warmup_images=train.warmup_images,
                               beta1=train.adam_beta1, beta2=train.adam_beta2, epsilon=train.adam_epsilon)
    init = make_init(stage.network, optimizer)
    shapes = jax.eval_shape(init, init_key)
    shardings = state_shardings(shapes, mesh)

    with Checkpoints(folder / "checkpoints", settings.keep) as checkpoints:
        restored = checkpoints.restore(_split(shapes), _split(shardings))
        if restored is None:
            state, step, seconds = jax.jit(init, out_shardings=shardings)(init_key), 0, 0.0
            if start_from is not None:
                params, _ = load_ema(start_from, stage.network, mesh)
                state = state._replace(params=params, ema=jax.tree.map(jnp.copy, params))
        else:
            step, items = restored
            state, seconds = TrainState(ema=items["ema"], **items["train"]), items["meta"]["seconds"]

        def open_loader() -> Loader:
            loader = Loader(source, resolution=stage.resolution, batch_size=train.batch, seed=settings.seed,
                            x_flip=settings.x_flip, start=step, host=jax.process_index(), hosts=jax.process_count(),
                            threads=settings.threads, workers=settings.workers)
            if restored is not None and items["meta"]["data"] != loader.state:
                loader.close()
                raise CheckpointError(f"the data set has changed since {folder} was begun (was {items['meta']['data']}, "
                                      f"is {loader.state}); use the same data or another --workdir")
            return loader

        loader = distributed.everywhere(open_loader)
        logging.info("stage %s: %d px, %.2fM parameters, batch %d, %s, %s", stage.name, stage.resolution,
                     parameter_count(state.params) / 1e6, train.batch, f"{mesh.size} x {jax.devices()[0].device_kind}",
                     f"continues at {step * train.batch:,} images" if step else "begins")
        train_step = jax.jit(_in_stream_order(make_train_step(stage, optimizer), train.batch, mesh), donate_argnums=0,
                             in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
                             out_shardings=(shardings, replicated(mesh)))

        log = ScalarLog(folder, step * train.batch)
        progress = Progress(stage.name, train.steps * train.batch, step * train.batch)
        # Steps that may wait in the queue: each holds a batch on the devices and delays the answer to SIGTERM. Queued
        # collectives of virtual devices deadlock.
        ahead = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else RUN_AHEAD
        begun, pending = time.monotonic() - seconds, []
        with loader:
            while step < train.steps:
                state, metrics = train_step(state, to_devices(dict(next(loader)), mesh), step_key)
                pending.append(metrics)
                before, step = step * train.batch, step + 1
                images, last = step * train.batch, step == train.steps
                if len(pending) > ahead:
                    jax.block_until_ready(pending[-1 - ahead])

                if step % settings.log_every_steps == 0 or last:
                    _report(log, progress, images, state, pending)
                    pending = []
                    row = int(state.nonfinite_row)
                    if row >= train.max_nonfinite:
                        raise TrainingError(f"stage {stage.name}: {row} steps in a row had a loss or gradient that is not "
                                            f"finite, last at {images:,} images; lower train.learning_rate, or continue "
                                            f"from the checkpoint in {folder} with other settings")
                stop = distributed.stop_requested() and not last
                if _due(before, images, settings.checkpoint_every_images) or last or stop:
                    meta = {"images": images, "data": dict(loader.state), "seconds": time.monotonic() - begun}
                    checkpoints.save(step, **_split(state), meta=meta)
                if stop:
                    if pending:
                        _report(log, progress, images, state, pending)
                    raise distributed.Stopped(f"stage {stage.name}: stopped by SIGTERM and saved at {images:,} images")
                if settings.grid_every_images and (_due(before, images, settings.grid_every_images) or last):
                    picture = preview(state.ema)
                    if is_writer():
                        write_png(folder / "grids" / f"{images:012d}.png", picture)
                    log.picture(images, "samples", picture)
        log.close()


def _in_stream_order(step: Callable[..., Any], batch: int, mesh: Mesh) -> Callable[..., Any]:
    """The training step for batches as the hosts have put them together.

    Moves the pixels of a batch (8 bits each) between hosts: an image meets the same noise on any number of them.
    """
    order = stream_order(batch, mesh)
    if order is None:
        return step

    def ordered(state: TrainState, parts: dict[str, jax.Array], key: jax.Array) -> Any:
        moved = {k: jax.lax.with_sharding_constraint(v[order], batch_sharding(mesh)) for k, v in parts.items()}
        return step(state, moved, key)

    return ordered


def _due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` images was reached in this step."""
    return every > 0 and now // every > before // every


def _report(log: ScalarLog, progress: Progress, images: int, state: TrainState, pending: list[dict]) -> None:
    """One console line and one line of scalars for the steps since the last report."""
    values = {k: np.asarray([float(m[k]) for m in pending]) for k in pending[0]}
    finite = values.pop("finite") > 0
    scalars = {k: float(v[finite].mean()) if finite.any() else None for k, v in values.items()}
    skipped = int(state.nonfinite_total)
    extra = "loss " + (f"{scalars['loss']:.4f}" if finite.any() else "not finite")
    rate = progress.line(images, extra + (f", {skipped} steps skipped" if skipped else ""))
    known = {k: v for k, v in scalars.items() if v is not None}
    log.write(images, {**known, "images_per_second": round(rate, 3), "steps_skipped": skipped})

"""Trains one stage: one path from nothing, or from the newest checkpoint, to the last image.

    open   state (fresh, or of the checkpoint) and loader (at the same batch)
    step   next batch -> devices -> train_step; the host runs ahead of the devices
    then   report -> give up? -> checkpoint -> stop? -> preview -> evaluation

The order after a step is that of what may not be lost. The report
comes first, since it fetches the numbers that say whether the
training is worth saving: a checkpoint of a training that has
diverged would push a good one out. The checkpoint comes before the
answer to SIGTERM, which promises one, and before previews and
evaluations, which take long: a machine may be taken away meanwhile.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax.config import Settings
from relay_jax.data.identity import from_summary, summary
from relay_jax.data.loader import Loader, Stream
from relay_jax.data.source import Source
from relay_jax.errors import Stopped, UserError
from relay_jax.models.averages import item_of
from relay_jax.models.network import describe as describe_network
from relay_jax.models.network import parameter_count
from relay_jax.resolution import size_text
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import Checkpoints, load_ema
from relay_jax.runtime.flops import matmul_flops
from relay_jax.runtime.lease import Lease
from relay_jax.runtime.sharding import host_rows, replicated, state_shardings, to_devices
from relay_jax.stage import Stage
from relay_jax.training.layers import not_finite, parts_table
from relay_jax.training.profile import Profiler
from relay_jax.training.report import SUMMARY, StageProgress
from relay_jax.training.snapshots import Snapshots
from relay_jax.training.state import TrainState, init_state
from relay_jax.training.step import jit_step, make_train_step
from relay_jax.workdir import kept_identity, refuse_changes

RUN_AHEAD = 2  # steps queued on the devices beyond the one that they compute


@dataclass(frozen=True, kw_only=True)
class Observers:
    """What looks at the averaged parameters now and then; all processes call them.

    preview: -> picture, uint8 [H, W, 3]; every
    log.grid_every_images. evaluation: -> scores by name, on process
    0; every evaluate.every images. page: writes the run's page, after
    each picture, on process 0. None: never.
    """

    preview: Callable[[dict], np.ndarray] | None = None
    evaluation: Callable[[dict], dict[str, float]] | None = None
    page: Callable[[], object] | None = None


class Start(NamedTuple):
    """Where a training begins: its state, steps and seconds so far, and the notes on its data.

    data: of the loader; dataset: of
    what it reads (data/identity.py).
    """

    state: TrainState
    step: int
    seconds: float
    data: dict[str, Any] | None
    dataset: dict[str, Any] | None = None


def is_finished(stage: Stage, folder: Path) -> bool:
    """Whether the stage has a checkpoint of its last step, and a whole one: its arrays are read."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        return any(
            step >= stage.train.steps and checkpoints.is_whole(step) for step in checkpoints.steps()
        )


def train_stage(
    stage: Stage,
    source: Source,
    mesh: Mesh,
    folder: Path,
    settings: Settings,
    observers: Observers = Observers(),
    start_from: Path | None = None,
) -> None:
    """Trains `stage` to its end; a stage that is finished returns at once.

    folder: of this stage (checkpoints, logs, grids). Continues from
    the newest readable checkpoint there, with the batches that an
    uninterrupted run would have had. start_from: folder of another
    training, or of converted weights, whose averaged parameters
    replace the random ones. Raises Stopped after SIGTERM, at the end
    of a step and with a checkpoint of it; UserError when too many
    steps in a row were not finite or no checkpoint of several can be
    read, DataError for an unreadable image, StorageError for what
    cannot be written.
    """
    if is_finished(stage, folder):
        _finish_late(stage, mesh, folder, settings, observers)
        logging.info("stage %s is finished (%s)", stage.name, folder)
        return
    train, log = stage.train, settings.log
    # Made by a compiled program, so that the keys belong to all
    # processes, like everything else that is computed with.
    make_keys = partial(_keys, settings.seed, stage.index)
    init_key, step_key = jax.jit(make_keys, out_shardings=replicated(mesh))()
    shapes = jax.eval_shape(partial(init_state, stage), init_key)
    shardings = state_shardings(shapes, mesh)
    stays = partial(_stays, train.batch, settings.checkpoint.keep_every_images)
    every = partial(_stays, train.batch, settings.checkpoint.snapshot_every_images)

    # The lease before the checkpoints: opening them removes the
    # unfinished one of another training of this stage.
    with (
        Lease(folder, f"stage {stage.name}") as lease,
        Checkpoints(folder / "checkpoints", settings.checkpoint.keep, keep_always=stays) as saved,
        Snapshots(folder, train, every) as snapshots,
    ):
        # The state before the loader: its checkpoint says at which
        # batch the data goes on.
        state, step, seconds, data, earlier = _continued(saved, shapes, shardings) or _fresh(
            stage, shapes, shardings, mesh, init_key, start_from
        )
        snapshots.begin(step)
        with distributed.agree():
            # Written by `train` before the first stage: what each
            # checkpoint says of the data that its weights come from.
            identity = kept_identity(folder.parent)
            dataset = summary(identity) if identity else None
            if identity and earlier and distributed.is_first():
                refuse_changes(from_summary(earlier), identity, folder)
            loader = _open_loader(stage, source, mesh, settings, step)
            _check_data(loader, data, folder)
        _describe_start(stage, mesh, shapes, step)
        train_step = jit_step(make_train_step(stage, mesh), mesh, shardings)
        progress = StageProgress(stage, mesh, folder, step * train.batch)
        # Each step that waits in the queue holds a batch on the
        # devices and delays the answer to SIGTERM. Queued
        # collectives of virtual devices deadlock.
        ahead = 0 if mesh.size > 1 and jax.default_backend() == "cpu" else RUN_AHEAD
        begun, requested = time.monotonic() - seconds, False
        pending: list[dict] = []  # metrics of the steps since the last report, still on the devices
        profiler = Profiler(folder, log.profile_first, log.profile_steps)
        # Opened before anything is written: whatever fails from
        # here on, a full disk too, closes the loader's threads
        # and the event file.
        with loader, progress, profiler:
            progress.begin(settings.plain, step * train.batch)
            if step:
                _observe(progress, stage, settings, observers, state.ema, step, again=True)
            while step < train.steps:
                # Before the step, so that a trace holds whole steps,
                # their loading included.
                profiler.before(step + 1, requested, pending)
                requested = False
                with jax.profiler.StepTraceAnnotation("train", step_num=step + 1):
                    with progress.waiting():
                        host_batch = next(loader)
                    batch = to_devices(dict(host_batch), mesh)
                    # Counted in the trace that the first call
                    # compiles, and so traced only once.
                    with progress.compiling():
                        if progress.step_flops is None:
                            traced = train_step.trace(state, batch, step_key)
                            progress.step_flops = matmul_flops(traced.jaxpr.jaxpr)
                        state, metrics = train_step(state, batch, step_key)
                    pending.append(metrics)
                    before, step = step * train.batch, step + 1
                    images, last = step * train.batch, step == train.steps
                    # The devices compute while the host loads and
                    # reports, but not arbitrarily far behind it.
                    if len(pending) > ahead:
                        jax.block_until_ready(pending[-1 - ahead])
                    progress.show(images)

                # Such a step has left the parameters as they
                # were, so that it can be looked into. To ask
                # waits for every step, which only a search for a
                # mistake can afford.
                if settings.debug and not float(metrics["finite"]):
                    raise not_finite(stage, state.params, batch, step, step_key, folder, mesh)

                if step % log.every_steps == 0 or last:
                    lease.check()
                    requested = progress.report(images, state, pending, profiler.requested())
                    pending = []
                    _check_finite(stage, state, images, folder)

                # Asked at every step by all processes alike: JAX
                # lets them agree on one.
                stop = distributed.stop_requested() and not last
                save = _due(before, images, settings.checkpoint.every_images) or stays(step)
                save = save or last or stop
                if save or snapshots.due(step):
                    lease.check()
                    notes = {
                        "images": images,
                        "data": dict(loader.state),
                        "seconds": time.monotonic() - begun,
                        "network": describe_network(stage.network),
                        "dataset": dataset,
                    }
                    snapshots.save(step, state.averages, notes, saved)
                if save:
                    saved.save(step, **_items(state), meta=notes)
                if stop:
                    # The steps since the last report would be
                    # missing in the curve.
                    if pending:
                        progress.report(images, state, pending, False)
                    raise Stopped(
                        f"stage {stage.name}: stopped by SIGTERM and saved at {images:,} images"
                    )

                _observe(progress, stage, settings, observers, state.ema, step)
        seconds = time.monotonic() - begun
    # After the context of the checkpoints:
    # now the last one is complete.
    progress.finish(seconds)


def _observe(
    progress: StageProgress,
    stage: Stage,
    settings: Settings,
    observers: Observers,
    ema: dict,
    step: int,
    again: bool = False,
) -> None:
    """The preview and the evaluation that are due after a step.

    again: only what a run that was killed after the checkpoint of
    this step has not made.
    """
    before, images = (step - 1) * stage.train.batch, step * stage.train.batch
    last = step == stage.train.steps
    every = settings.log.grid_every_images
    due = bool(every) and (last or _due(before, images, every))
    if observers.preview and due and not (again and progress.has_picture(images)):
        progress.picture(images, observers.preview(ema))
        if observers.page and distributed.is_first():
            observers.page()
    every = settings.evaluate.every
    due = bool(every) and (last or _due(before, images, every))
    if observers.evaluation and due and not (again and progress.has_scores(images)):
        progress.scores(images, observers.evaluation(ema))


def _finish_late(
    stage: Stage, mesh: Mesh, folder: Path, settings: Settings, observers: Observers
) -> None:
    """What a run that was killed after its last checkpoint has not made: its summary at least."""
    if distributed.of_first((folder / SUMMARY).is_file()):
        return
    with Lease(folder, f"stage {stage.name}"):
        params, notes = load_ema(folder, stage.shapes(), mesh)
        with StageProgress(stage, mesh, folder, notes["step"] * stage.train.batch) as progress:
            # A training that has become
            # shorter since has other images.
            if notes["step"] == stage.train.steps:
                _observe(
                    progress,
                    stage,
                    settings,
                    observers,
                    params,
                    notes["step"],
                    again=True,
                )
        progress.finish(notes.get("seconds", 0.0))


def _keys(seed: int, index: int) -> tuple[jax.Array, jax.Array]:
    """Keys of a stage, for its initial parameters and for its steps."""
    init_key, step_key = jax.random.split(jax.random.fold_in(jax.random.key(seed), index))
    return init_key, step_key


def _items(state: TrainState) -> dict[str, dict]:
    """The state as items of a checkpoint."""
    # The averages apart: sampling reads nothing else.
    fields = state._asdict()
    averages = {item_of(name): tree for name, tree in fields.pop("averages").items()}
    return {"ema": fields.pop("ema"), "train": fields, **averages}


def _continued(saved: Checkpoints, shapes: TrainState, shardings: TrainState) -> Start | None:
    """The newest readable checkpoint, None if there is none at all. Raises UserError."""
    # What the loop goes on with; of checkpoints without checksums.
    notes_needed = {"seconds": (int, float), "data": (dict,)}
    restored = saved.restore(_items(shapes), _items(shardings), notes=notes_needed)
    if restored is None:
        return None
    step, items = restored
    averages = {name: items[item_of(name)] for name in shapes.averages}
    state = TrainState(ema=items["ema"], averages=averages, **items["train"])
    notes = items["meta"]
    return Start(state, step, notes["seconds"], notes["data"], notes.get("dataset"))


def _fresh(
    stage: Stage,
    shapes: TrainState,
    shardings: TrainState,
    mesh: Mesh,
    key: jax.Array,
    start_from: Path | None,
) -> Start:
    """Random parameters, or the averaged ones of another folder. Raises UserError."""
    state = jax.jit(partial(init_state, stage), out_shardings=shardings)(key)
    if start_from is not None:
        params, _ = load_ema(start_from, shapes.params, mesh)
        logging.info("stage %s starts from the averaged weights in %s", stage.name, start_from)
        copies = {name: jax.tree.map(jnp.copy, params) for name in state.averages}
        state = state._replace(params=params, ema=jax.tree.map(jnp.copy, params), averages=copies)
    return Start(state, 0, 0.0, None)


def _open_loader(stage: Stage, source: Source, mesh: Mesh, settings: Settings, step: int) -> Loader:
    return Loader(
        source,
        Stream(
            resolution=stage.resolution,
            batch_size=stage.train.batch,
            seed=settings.seed,
            x_flip=settings.dataset.x_flip,
        ),
        start=step,
        rows=host_rows(stage.train.batch, mesh),
        threads=settings.dataset.threads,
        workers=settings.dataset.workers,
    )


def _check_data(loader: Loader, data: dict[str, Any] | None, folder: Path) -> None:
    """Raises UserError if a run would go on with other batches than it was begun with."""
    if data is not None and data != loader.state:
        loader.close()
        raise UserError(
            f"the data set has changed since {folder} was begun (was {data}, is {loader.state}); "
            "use the same data or another --workdir"
        )


def _describe_start(stage: Stage, mesh: Mesh, shapes: TrainState, step: int) -> None:
    # Before the compilation, which takes minutes: a network of the
    # wrong size is seen at once.
    if distributed.is_first():
        logging.info("stage %s:\n%s", stage.name, parts_table(stage, shapes.params))
    logging.info(
        "stage %s: %s px, %.2fM parameters, batch %d, %s, %s",
        stage.name,
        size_text(stage.resolution),
        parameter_count(shapes.params) / 1e6,
        stage.train.batch,
        f"{mesh.size} x {jax.devices()[0].device_kind}",
        f"continues at {step * stage.train.batch:,} images" if step else "begins",
    )


def _check_finite(stage: Stage, state: TrainState, images: int, folder: Path) -> None:
    """Raises UserError if too many steps in a row were skipped."""
    # The same number on all processes, so that all of them end here.
    row = int(state.nonfinite_row)
    if row >= stage.train.max_nonfinite:
        raise UserError(
            f"stage {stage.name}: {row} steps in a row had a loss or gradient that is not finite, "
            f"last at {images:,} images; lower train.learning_rate, look for the layer with "
            f"--debug, or continue from the checkpoint in {folder} with other settings",
            agreed=True,
        )


def _due(before: int, now: int, every: int) -> bool:
    """Whether a multiple of `every` images was reached in a step; never for 0."""
    return every > 0 and now // every > before // every


def _stays(batch: int, every: int, step: int) -> bool:
    """Whether the checkpoint of a step stays for ever."""
    return _due((step - 1) * batch, step * batch, every)

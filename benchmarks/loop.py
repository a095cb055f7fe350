"""What the training loop costs beside the step: the real loop around a step that only waits.

    python -m benchmarks.loop --config=configs/demo.py --stage=relay

The device is busy for a known time in each step; whatever else passes between the end of one step
and the begin of the next is what loader, transfers, dispatch, logs and saves cost the training. On
a machine that others use as well, that is mostly their doing; the loop's own processor time is not:
it bounds the cost from above, as if no step hid any of it.
"""

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from ml_collections import config_flags

from benchmarks.programs import random_batch
from relay_jax.config import Settings, parse_stage, settings_of
from relay_jax.data.source import Source, open_source
from relay_jax.runtime.sharding import make_mesh
from relay_jax.stage import Stage
from relay_jax.training import loop
from relay_jax.training.state import TrainState, init_state


@dataclass(frozen=True)
class Idle:
    """Before each step but the first: seconds for which the device waited, and processor
    seconds of the loop's thread since the step before; whether there was a report, or a save,
    to do."""

    gaps: np.ndarray
    work: np.ndarray
    after_report: np.ndarray
    after_save: np.ndarray


def waiting_step(
    seconds: float, times: list[tuple[float, float, float]]
) -> Callable[..., Callable[..., Any]]:
    """In place of `make_train_step`: steps that do nothing but last so long.

    times: gets begin, end (`time.perf_counter`) and the caller's processor time of each.
    """
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def busy(_: Any) -> np.ndarray:
        begun = time.perf_counter()
        time.sleep(seconds)
        times.append((begun, time.perf_counter(), time.clock_gettime(clock)))
        return np.ones((), np.float32)

    def train_step(
        state: TrainState, batch: dict[str, jax.Array], key: jax.Array
    ) -> tuple[TrainState, dict]:
        one = jax.pure_callback(
            busy, jax.ShapeDtypeStruct((), jnp.float32), (state.step, batch["label"][0])
        )
        # The next step needs this one.
        state = state._replace(step=state.step + one.astype(jnp.int32))
        return state, {"loss": one, "gradient_norm": one, "finite": one}

    return lambda *_: train_step


def measure(
    settings: Settings, stage: Stage, source: Source, steps: int, step_seconds: float
) -> Idle:
    """Trains `stage` for so many steps that do nothing but last `step_seconds` each."""
    times: list[tuple[float, float, float]] = []
    stage = replace(stage, train=replace(stage.train, images=steps * stage.train.batch))
    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(loop, "make_train_step", waiting_step(step_seconds, times)),
    ):
        loop.train_stage(stage, source, make_mesh(), Path(folder), settings)
    begun, ended, worked = np.asarray(times).T
    number = np.arange(1, len(times))  # of the step before a gap
    save_every = settings.checkpoint.every_images // stage.train.batch
    return Idle(
        gaps=begun[1:] - ended[:-1],
        work=np.diff(worked),
        after_report=number % settings.log.every_steps == 0,
        after_save=number % save_every == 0,
    )


def bare_calls(stage: Stage, steps: int, step_seconds: float) -> np.ndarray:
    """Processor seconds of one call each of the jitted step with the state of `stage`, in a
    loop without anything else."""
    times: list[tuple[float, float, float]] = []
    state = jax.jit(partial(init_state, stage))(jax.random.key(0))
    batch = random_batch(stage, stage.train.batch)
    step, key = jax.jit(waiting_step(step_seconds, times)(), donate_argnums=0), jax.random.key(0)
    for _ in range(steps):
        state, metrics = step(state, batch, key)
        jax.block_until_ready(metrics)
    return np.diff(np.asarray(times)[:, 2])


def main(_: Sequence[str]) -> None:
    settings, values = settings_of(_CONFIG.value), flags.FLAGS
    stage = parse_stage(settings.stages, values.stage) or settings.stages[-1]
    # Reports and saves as asked for, and no trace, which would be measured as well.
    settings = replace(
        settings,
        log=replace(settings.log, every_steps=values.report_every, profile_first=0),
        checkpoint=replace(settings.checkpoint, every_images=values.save_every * stage.train.batch),
    )
    source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    idle = measure(settings, stage, source, values.steps, values.step_seconds)
    bare = 1e3 * np.median(bare_calls(stage, values.steps // 4, values.step_seconds))
    plain = ~(idle.after_report | idle.after_save)
    print(
        f"{jax.devices()[0].device_kind}, stage {stage.name}, batch {stage.train.batch}, "
        f"{values.steps} steps of "
        f"{1e3 * values.step_seconds:g} ms, a report every {values.report_every}, a save every "
        f"{values.save_every}"
    )
    for name, chosen in (
        ("all steps", np.ones_like(plain)),
        ("neither", plain),
        ("after a report", idle.after_report & ~idle.after_save),
        ("after a save", idle.after_save),
    ):
        if chosen.any():
            gaps, work = 1e3 * idle.gaps[chosen], 1e3 * idle.work[chosen]
            print(
                f"{name:15}{chosen.sum():4}: device idle {np.quantile(gaps, 0.1):.2f} ms "
                "(lowest tenth), "
                f"{np.median(gaps):.2f} (median); processor time of the loop "
                f"{np.median(work):.2f} ms (median), "
                f"{work.mean():.2f} (mean), {work.mean() / 10 / values.step_seconds:.2f}% of "
                "the step"
            )
    print(f"a call of the step alone: {bare:.2f} ms (median) of processor time")


if __name__ == "__main__":
    _CONFIG = config_flags.DEFINE_config_file(
        "config", "configs/demo.py", "Configuration.", lock_config=True
    )
    flags.DEFINE_string("stage", "", "This stage (default: the last).")
    flags.DEFINE_integer("steps", 200, "Steps in all.", 2)
    flags.DEFINE_float("step_seconds", 0.2, "How long the device is busy in each.", 0.001)
    flags.DEFINE_integer("report_every", 50, "Steps between progress lines.", 1)
    flags.DEFINE_integer("save_every", 100, "Steps between checkpoints.", 1)
    app.run(main, argv=sys.argv)

"""What a stage reports while it trains, and at its end: to the console and to its folder.

STAGE/starts.jsonl    configuration and environment of every start
STAGE/metrics.jsonl   a line for every few steps; the same for TensorBoard
STAGE/grids/          previews
STAGE/training.json   the whole training in a few numbers
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh

from relay_jax.runtime import distributed
from relay_jax.runtime.compiling import compiling
from relay_jax.runtime.distributed import is_first
from relay_jax.runtime.environment import environment
from relay_jax.runtime.files import append_jsonl, read_jsonl, write_json, write_png
from relay_jax.runtime.flops import peak_flops, si
from relay_jax.runtime.logs import (
    Progress,
    ScalarLog,
    curve_summary,
    duration,
    read_curve,
)
from relay_jax.runtime.sharding import describe
from relay_jax.stage import Stage
from relay_jax.training.state import TrainState

SUMMARY = "training.json"  # the last file of a stage


class StageProgress:
    """One report for every few steps of a stage; to be used as a context.

    images: those seen before this start; later lines of the curve,
    of a run that was killed, are dropped. step_flops: of a step, on
    all devices together; set by the loop when it is traced. All
    methods that write raise StorageError.
    """

    def __init__(self, stage: Stage, mesh: Mesh, folder: Path, images: int) -> None:
        self.step_flops: int | None = None
        self._stage, self._mesh, self._folder = stage, mesh, folder
        self._peak = peak_flops(mesh.devices.flat[0].device_kind)
        self._log = ScalarLog(folder, images)
        self._loader_share = self._waited = 0.0
        self._since = time.monotonic()
        self._progress = Progress(
            stage.name,
            stage.train.steps * stage.train.batch,
            images,
            of_rate=self._cost,
        )

    def __enter__(self) -> "StageProgress":
        return self

    def __exit__(self, *_: object) -> None:
        self._log.close()

    def begin(self, config: Mapping[str, Any], images: int) -> None:
        """Keeps the configuration and the environment of this start."""
        # A training that is continued on other machines, or with
        # another version, has a record of each: a kink in the curve
        # can be explained later.
        record = {"config": dict(config), "environment": environment(self._mesh)}
        if is_first():
            line = {"images": images, "time": round(time.time(), 3), **record}
            append_jsonl(self._folder / "starts.jsonl", line)
        for name, value in record.items():
            self._log.text(images, name, value)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Around the time that the loop waits for the loader."""
        begun = time.monotonic()
        with jax.profiler.TraceAnnotation("loader"):
            yield
        self._waited += time.monotonic() - begun

    def compiling(self) -> AbstractContextManager[None]:
        """Around a step: the first one compiles, and says so."""
        if self.step_flops is not None:
            return nullcontext()
        stage = self._stage
        return compiling(
            f"the training step of stage {stage.name}, {stage.resolution} px, batch "
            f"{stage.train.batch}, {self._mesh.size} devices"
        )

    def show(self, images: int) -> None:
        """The live line of a terminal, after every step."""
        self._progress.show(images)

    def report(self, images: int, state: TrainState, pending: list[dict], requested: bool) -> bool:
        """One console line and one line of scalars for the steps since the last report.

        pending: metrics of those steps. requested: whether this process
        was asked for something. Returns whether process 0 was. All
        processes must call it.
        """
        # Fetched all at once, and only here: each transfer would
        # make the loop wait.
        metrics, skipped = jax.device_get((pending, state.nonfinite_total))
        now = time.monotonic()
        share = self._waited / max(now - self._since, 1e-9)
        everyone = distributed.of_all(np.asarray([share, requested]))
        # The slowest host makes all of them wait.
        self._loader_share = float(everyone[:, 0].max())
        self._since, self._waited = now, 0.0

        values = {k: np.asarray([float(m[k]) for m in metrics]) for k in metrics[0]}
        # Steps that were skipped would make
        # the mean NaN, which is no JSON.
        finite = values.pop("finite") > 0
        means = {k: float(v[finite].mean()) for k, v in values.items()} if finite.any() else {}
        loss = f"loss {means['loss']:.4f}" if means else "loss not finite"
        if "clipped" in means:  # a mean of zeros and ones: a share of the steps
            means["clipped_share"] = means.pop("clipped")
            loss += f", {means['clipped_share']:.0%} clipped"
        extra = loss + (f", {skipped} steps skipped" if skipped else "")
        rate = self._progress.line(images, extra, f"loader {self._loader_share:.1%}")
        scalars = {
            **means,
            "images_per_second": round(rate, 3),
            "steps_skipped": int(skipped),
            "loader_share": round(self._loader_share, 4),
            "tflops_per_device": round(self._flops(rate) / 1e12, 6),
        }
        if self._peak:
            scalars["utilisation"] = round(self._flops(rate) / self._peak, 4)
        self._log.write(images, scalars)
        return bool(everyone[0, 1])

    def scores(self, images: int, values: dict[str, float]) -> None:
        """Further scalars, for the same curve."""
        self._log.write(images, values)

    def picture(self, images: int, pixels: np.ndarray) -> None:
        """A grid of samples, uint8 [H, W, 3]: PNG and TensorBoard."""
        if is_first():
            write_png(self._picture(images), pixels)
        self._log.picture(images, "samples", pixels)

    def has_picture(self, images: int) -> bool:
        """Whether the grid of so many images is there, as process 0 sees it."""
        return distributed.of_first(self._picture(images).exists())

    def has_scores(self, images: int) -> bool:
        """Whether the curve has scores of so many images, as process 0 sees it."""
        curve = read_curve(self._folder / "metrics.jsonl")
        # Lines of the training have a rate, those of an evaluation
        # have scores alone.
        scores = [x for x in curve if x["images"] == images and "images_per_second" not in x]
        return distributed.of_first(bool(scores))

    def _picture(self, images: int) -> Path:
        return self._folder / "grids" / f"{images:012d}.png"

    def finish(self, seconds: float) -> None:
        """Sums up the whole training of the stage. seconds: of all its starts together."""
        if not is_first():
            return
        train = self._stage.train
        summary = {
            "stage": self._stage.name,
            "images": train.steps * train.batch,
            "steps": train.steps,
            "seconds": round(seconds, 1),
            # From the files, which hold the earlier starts too.
            **curve_summary(read_curve(self._folder / "metrics.jsonl")),
            "starts": len(read_jsonl(self._folder / "starts.jsonl")),
            "devices": describe(self._mesh),
            "checkpoint": f"checkpoints/{train.steps}",
        }
        write_json(self._folder / SUMMARY, summary)
        share = summary["utilisation"]
        loss = f"{summary['loss']:.4f}" if summary["loss"] is not None else "not finite"
        logging.info(
            "stage %s is trained: %s images in %s, median %.4g img/s, %sFLOP/s per device, "
            "%sloader %.1f%%, %d steps skipped, loss %s, last checkpoint %s",
            summary["stage"],
            f"{summary['images']:,}",
            duration(seconds),
            summary["images_per_second"],
            si(summary["tflops_per_device"] * 1e12),
            f"{share:.1%} of the peak, " if share is not None else "",
            100 * summary["loader_share"],
            summary["steps_skipped"],
            loss,
            self._folder / summary["checkpoint"],
        )

    def _flops(self, rate: float) -> float:
        """FLOP/s of each device at so many images per second."""
        return rate / self._stage.train.batch * (self.step_flops or 0) / self._mesh.size

    def _cost(self, rate: float) -> str:
        flops = self._flops(rate)
        share = f" ({flops / self._peak:.1%} of the peak)" if self._peak else ""
        return f"{si(flops)}FLOP/s per device{share}, loader {self._loader_share:.1%}"

"""Experiments: arms that are trained with the same FLOPs, sampled and scored; a table and curves.

    python -m benchmarks.experiment equal_compute --data=cifar10-train-32x32.zip --out=runs/equal
    python -m benchmarks.experiment equal_compute --data=FILE --out=DIR --arm=relay   (array job)
    python -m benchmarks.experiment equal_compute --out=DIR --collect                 (table alone)

An experiment is a module of benchmarks/experiments: arms, budget, seeds, ways to sample, scores.
Every arm is trained by `relay_jax.main` and sampled by its --mode=sweep, each in a process of its
own; what is finished is not done again, so the same command continues after any stop.

    OUT/ARM/seed0/                 the run: checkpoints, curves, config.json
    OUT/ARM/seed0/NAME-0.25/       samples and scores with a quarter of the budget
    OUT/NAME.json, NAME.md         all rows: arm, seed, training FLOPs, sampler, calls, scores
    OUT/NAME.png                   scores against training FLOPs, calls, and FLOPs per image
    OUT/grid-ARM.png               images of the same seeds
    OUT/report.html                a page of all that
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.experiment_page import write_experiment_page
from benchmarks.experiment_results import as_markdown, figure, summary
from relay_jax.config import build, load_config
from relay_jax.errors import UserError
from relay_jax.planning.cost import train_flops
from relay_jax.runtime.files import read_json, write_json, write_png, write_text
from relay_jax.runtime.logs import fail
from relay_jax.stage import Stage


@dataclass(frozen=True)
class Arm:
    """What is compared. shares: of the training FLOPs, by stage. overrides: by key of the
    configuration. config, sweep: instead of the experiment's. base: the arm before it whose first
    stage it takes over, from the same seed; they must not differ in it."""

    name: str
    shares: Mapping[str, float]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    config: str = ""
    sweep: tuple[str, ...] = ()
    base: str = ""


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """flops: of the training of one arm, all stages. budgets: shares of it after which an arm is
    scored, rising to 1. sweep: ways to sample, as --sweep takes them; the first one is scored at
    every budget, all of them at the last. seeds: of the trainings. reference_images: real images
    that samples are compared with; as many as there are samples must be left beside them (of
    CIFAR-10's 50,000, 10,000), which are scored as if they were samples."""

    name: str
    config: str
    arms: tuple[Arm, ...]
    flops: float
    samples: int
    features: str
    sweep: tuple[str, ...]
    overrides: Mapping[str, Any] = field(default_factory=dict)
    budgets: tuple[float, ...] = (1.0,)
    seeds: tuple[int, ...] = (0,)
    reference_images: int = 40_000


@dataclass(frozen=True)
class Trial:
    """One training of an arm, in a folder of its own, with what the command line adds."""

    experiment: Experiment
    arm: Arm
    seed: int
    out: Path
    added: Mapping[str, Any]

    @property
    def workdir(self) -> Path:
        return self.out / self.arm.name.replace(" ", "-") / f"seed{self.seed}"

    @property
    def grid(self) -> Path:
        """Images of the arm's first training."""
        return self.out / f"grid-{self.workdir.parent.name}.png"

    @property
    def overrides(self) -> dict[str, Any]:
        """Of the configuration, by key, but for the images of the stages."""
        own = {**self.experiment.overrides, **self.arm.overrides}
        return {**own, **self.added, "seed": self.seed}

    @property
    def config(self) -> str:
        return self.arm.config or self.experiment.config

    @cached_property
    def stages(self) -> list[Stage]:
        """Raises UserError for a configuration that cannot be."""
        config = load_config(self.config)
        config.update_from_flattened_dict(self.overrides)
        return build(config)

    @property
    def samplers(self) -> tuple[str, ...]:
        return self.arm.sweep or self.experiment.sweep

    def images(self, budget: float) -> dict[str, int]:
        """Of each stage, in whole batches, for this share of the FLOPs."""
        images = {}
        for stage in self.stages:
            flops = self.experiment.flops * budget * self.arm.shares[stage.name]
            batch = stage.train.batch
            images[stage.name] = max(round(flops / train_flops(stage) / batch), 1) * batch
        return images

    def folder(self, budget: float) -> Path:
        return self.workdir / f"{self.experiment.name}-{budget:g}"

    def run(self, budget: float) -> None:
        """Trains to a budget and scores it. Raises SystemExit with the status of what failed."""
        if (self.folder(budget) / "sweep.json").exists():
            return
        images = {f"stages.{s}.train.images": n for s, n in self.images(budget).items()}
        # One for all trials: the features of the same real images.
        cache = self.workdir / "cache"
        if not cache.is_symlink():
            (self.out / "cache").mkdir(parents=True, exist_ok=True)
            self.workdir.mkdir(parents=True, exist_ok=True)
            cache.symlink_to(self.out / "cache")
        self._take_base(budget)
        # Few: a report is made once for a run, here with the first budget.
        keys = {**self.overrides, **images, "evaluate.samples": 64}
        main(
            f"--config={self.config}",
            f"--workdir={self.workdir}",
            *(f"--config.{key}={value}" for key, value in keys.items()),
        )
        samplers = self.samplers if budget == 1 else self.samplers[:1]
        main(
            f"--workdir={self.workdir}",
            "--mode=sweep",
            f"--out={self.folder(budget)}",
            f"--sweep={','.join(samplers)}",
            f"--seeds=0-{self.experiment.samples - 1}",
            f"--features={self.experiment.features}",
            f"--reference_images={self.experiment.reference_images}",
        )

    def _take_base(self, budget: float) -> None:
        """Copies the first stage of the arm's base, once that is scored; else it is trained here,
        to the same weights."""
        first = self.workdir / self.stages[0].name
        if not self.arm.base or first.exists():
            return
        arms = {arm.name: arm for arm in self.experiment.arms}
        source = replace(self, arm=arms[self.arm.base])
        if (source.folder(budget) / "sweep.json").exists():
            copy = first.with_suffix(".tmp")
            shutil.rmtree(copy, ignore_errors=True)
            shutil.copytree(source.workdir / first.name, copy)
            copy.rename(first)

    def rows(self) -> list[dict[str, Any]]:
        """What is scored so far: a row for each budget and sampler."""
        rows = []
        for path in sorted(self.workdir.glob(f"{self.experiment.name}-*/sweep.json")):
            report = read_json(path)
            weights = report["samples"]["weights"]
            trained = {name: about["images"] for name, about in weights.items()}
            flops = sum(
                trained[stage.name] * train_flops(stage)
                for stage in self.stages
                if stage.name in trained
            )
            for row in report["rows"]:
                kept = {key: row[key] for key in ("sampler", "calls", "evaluations", "scores")}
                budget = float(path.parent.name.removeprefix(f"{self.experiment.name}-"))
                about = {"arm": self.arm.name, "seed": self.seed, "budget": budget}
                about["images"] = trained
                rows.append({**about, "training_flops": flops, "flops": row["flops"], **kept})
                rows[-1]["real"] = (report["real"] or {}).get("scores", {})
        return rows


def main(*arguments: str) -> None:
    """relay_jax.main in a process of its own. Raises SystemExit with its status."""
    print("+ relay_jax.main", *arguments, flush=True)
    asked, processes, status = list[int](), list[subprocess.Popen](), None

    def pass_on(number: int, _: object) -> None:
        asked.append(number)
        for process in processes:
            process.terminate()

    before = signal.signal(signal.SIGTERM, pass_on)
    try:
        process = subprocess.Popen([sys.executable, "-m", "relay_jax.main", *arguments])
        processes.append(process)
        if asked:  # before there was a process
            process.terminate()
        while status is None:
            # Ctrl-C of a terminal goes to both, SIGTERM is passed on: the command saves.
            with suppress(KeyboardInterrupt):
                status = process.wait()
    finally:
        signal.signal(signal.SIGTERM, before)
    if status:
        raise SystemExit(status)


# What comes out


def grids(trials: Sequence[Trial]) -> None:
    """The samples of the first training of each arm, of its largest budget: the same seeds."""
    from relay_jax.plots.grids import grid

    for trial in trials:
        if trial.seed != trial.experiment.seeds[0]:
            continue
        first = trial.samplers[0].replace(":", "-")
        for budget in reversed(trial.experiment.budgets):
            if files := sorted(trial.folder(budget).glob(f"{first}/*.npz")):
                with np.load(files[0]) as kept:
                    images = kept["exact"][:100].astype(np.float32)
                write_png(trial.grid, grid(images, columns=10))
                break


def collect(experiment: Experiment, trials: Sequence[Trial], out: Path) -> None:
    """Writes table, rows, curves, grids and the page of what is there."""
    rows = [row for trial in trials for row in trial.rows()]
    if not rows:
        fail(f"nothing is scored in {out}")
    means = summary(rows)
    write_json(out / f"{experiment.name}.json", {"rows": rows})
    text = as_markdown(experiment.name, rows, experiment.features)
    write_text(out / f"{experiment.name}.md", text)
    figure(means, out / f"{experiment.name}.png")
    grids(trials)
    print(f"\n{text}\nwritten to {out}")
    print(f"look at {write_experiment_page(experiment, trials, means, out)}", flush=True)


def parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder = Path(__file__).parent / "experiments"
    names = sorted(path.stem for path in folder.glob("[a-z]*.py"))
    parser.add_argument("name", choices=names)
    parser.add_argument("--out", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--data", default="", help="the data set's file: dataset.path")
    parser.add_argument("--arm", default="", help="this arm alone")
    parser.add_argument("--collect", action="store_true", help="the table of what is there, alone")
    parser.add_argument("--flops", type=float, help="training FLOPs of an arm")
    parser.add_argument("--samples", type=int, help="images of each sampler")
    parser.add_argument("--features", help="of the scores")
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help="of every configuration"
    )
    return parser.parse_args(argv)


def run(argv: Sequence[str]) -> None:
    """The command line."""
    options = parse(argv)
    experiment = import_module(f"benchmarks.experiments.{options.name}").EXPERIMENT
    asked = {key: getattr(options, key) for key in ("flops", "samples", "features")}
    experiment = replace(experiment, **{k: v for k, v in asked.items() if v is not None})
    arms = [arm.name for arm in experiment.arms]
    if options.arm and options.arm not in arms:
        fail(f"--arm knows {', '.join(arms)}, not {options.arm}")
    added: dict[str, Any] = {"dataset.path": options.data} if options.data else {}
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals:
            fail(f"--set takes KEY=VALUE, not {text!r}")
        try:
            added[key] = json.loads(value)
        except ValueError:
            added[key] = value
    out = options.out.expanduser().absolute()
    # The table is of all of them, whichever arm is run. Every arm before the next seed: a first
    # table of all comes early.
    trials = [
        Trial(experiment, arm, seed, out, added)
        for seed in experiment.seeds
        for arm in experiment.arms
    ]
    try:
        for trial in trials:
            trial.images(1.0)  # an impossible configuration ends here, before anything is trained
        if not options.collect:
            # All arms with the first budget, then all go on: so early tables compare.
            for budget in experiment.budgets:
                for trial in trials:
                    if options.arm in ("", trial.arm.name):
                        trial.run(budget)
    except (UserError, ValueError, AttributeError) as error:
        fail(error)
    collect(experiment, trials, out)


if __name__ == "__main__":
    run(sys.argv[1:])

"""Command line: flags -> configuration -> one verb.

    python -m relay_jax.main --config=demo --workdir=runs/demo
    python -m relay_jax.main --workdir=runs/demo --mode=sample --seeds=0-63 --out=images
    python -m relay_jax.main --config=imagenet256 --mode=sample --weights.base=A --weights.relay=B

--config takes a name of the package or a file; a run in --workdir opens
itself without one. Bad input ends with one line and exit status 2,
before anything is compiled or written; status 1 where trying again may
help, such as for a full disk. SIGTERM saves and ends with status 75:
start the same command again. Several processes: see
relay_jax/runtime/distributed.py and launch/.
"""

import os
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict

from relay_jax import commandline
from relay_jax.commandline import CONFIG_FLAG, WEIGHTS, parse_flags, path_of, value_of
from relay_jax.config import Settings, parse_stage, settings_of
from relay_jax.data.prepare import prepare
from relay_jax.data.source import describe_source, open_source
from relay_jax.errors import Stopped, StorageError, UserError, one_line
from relay_jax.evaluation.evaluate import Comparison, evaluate_run
from relay_jax.planning.plan import PlanSettings, plan
from relay_jax.plots.inputs import PlotSettings
from relay_jax.plots.plot import plot
from relay_jax.relay import set_up_devices
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import Progress, fail, quieten
from relay_jax.sampling.generate import generate
from relay_jax.sampling.request import Request, parse_request
from relay_jax.sampling.seeds import parse_class_rule, parse_seeds
from relay_jax.stage import Stage
from relay_jax.training.train import train
from relay_jax.workdir import CONFIG, claim_workdir, parse_weights

flags.adopt_module_key_flags(commandline)  # for --help, which shows those of the main module


class Command:
    """What all verbs start from: the settings and the flags that several of them use.

    Raises UserError for anything that can be refused without data,
    devices and weights.
    """

    def __init__(self, config: ConfigDict) -> None:
        if value_of("debug"):
            with config.unlocked():
                config.debug = True
        self.mode: str = value_of("mode")
        self.settings: Settings = settings_of(config)
        stages = self.settings.stages
        self.only: Stage | None = parse_stage(stages, value_of("stage"))
        self.stages: Sequence[Stage] = [self.only] if self.only else stages
        self.workdir = path_of("workdir")
        texts = {
            name.removeprefix(WEIGHTS): str(path_of(name) or "")
            for name in flags.FLAGS
            if name.startswith(WEIGHTS)
        }
        self.weights = parse_weights(stages, texts)

    def claim(self, create: bool) -> None:
        """`claim_workdir` for all processes: the first writes config.json, the others compare."""
        assert self.workdir is not None
        with distributed.agree():
            if distributed.is_first():
                claim_workdir(self.settings.plain, self.workdir, create)
        with distributed.agree():
            if not distributed.is_first():
                if create and not (self.workdir / CONFIG).exists():
                    raise UserError(
                        f"{self.workdir} is not the same folder on all hosts; use a file system "
                        "that they share"
                    )
                claim_workdir(self.settings.plain, self.workdir, create=False)
        use_compilation_cache(self.workdir)

    def open_run(self) -> dict[str, Path]:
        """Where each stage's weights are: in the run, unless --weights says otherwise."""
        if self.workdir is None:
            return self.weights
        self.claim(create=False)
        folders = {stage.name: self.workdir / stage.name for stage in self.settings.stages}
        return folders | self.weights

    def out(self, default: str) -> Path:
        """--out, or a folder of the run. Raises UserError if neither is named."""
        out = path_of("out")
        if out is not None:
            return out
        if self.workdir is None:
            raise UserError(
                f"name the run or a folder for what --mode={self.mode} makes: "
                "--workdir=runs/NAME or --out=DIR"
            )
        return self.workdir / default

    def request(self, default_seeds: str) -> Request:
        """The samples that --seeds, --class and --low_res ask for. Raises UserError."""
        return parse_request(
            self.settings,
            self.only,
            seeds=value_of("seeds") or default_seeds,
            class_rule=value_of("class") or "",
            low_res=path_of("low_res"),
        )

    def needs_weights(self, advice: str) -> None:
        """Raises UserError where neither a run nor --weights says what to sample from."""
        if self.workdir is None and any(s.name not in self.weights for s in self.stages):
            raise UserError(advice)


def use_compilation_cache(workdir: Path) -> None:
    """Compiled programs are kept in the workdir, unless the user has chosen a place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str((workdir / "cache").absolute()))


# The verbs


def train_verb(command: Command) -> None:
    """--mode=train: the run in the workdir."""
    settings = command.settings
    if command.workdir is None:
        raise UserError("name the folder of the run: --workdir=runs/NAME")
    with distributed.agree():
        source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    command.claim(create=True)
    train(settings, command.only, source, command.workdir, command.weights)


def sample_verb(command: Command) -> None:
    """--mode=sample: images of --seeds into --out."""
    command.needs_weights("name the folder of the run: --workdir=runs/NAME")
    out = path_of("out") or (command.workdir or Path()) / "samples" / "images"
    with distributed.agree():
        request = command.request("0-63")
    generate(command.settings, request, command.open_run(), out, value_of("format"))


def evaluate_verb(command: Command) -> None:
    """--mode=evaluate: scores of --images, or of samples of the run, into --out."""
    settings, images = command.settings.evaluate, path_of("images")
    if images is None:
        command.needs_weights(
            "name what to score: --images=DIR, or the run with --workdir=runs/NAME"
        )
    out = command.out("evaluation")
    weights: dict[str, Path] = {}
    with distributed.agree():
        samples = images or command.request(f"0-{settings.samples - 1}")
    if images is None:
        weights = command.open_run()
    elif command.workdir is not None:
        use_compilation_cache(command.workdir)
    limit, inception = value_of("reference_images"), path_of("inception")
    if inception is None and settings.inception:
        inception = Path(settings.inception).expanduser()
    comparison = Comparison(
        reference=value_of("reference"),
        reference_images=settings.reference_images if limit is None else limit,
        features=value_of("features") or settings.features,
        inception=inception,
        cache=path_of("cache") or (command.workdir or out) / "cache",
    )
    evaluate_run(command.settings, samples, weights, comparison, out)


def plot_verb(command: Command) -> None:
    """--mode=plot: pictures into --out. Without a workdir those that need none of it."""
    out = command.out("plots")
    num_classes = command.settings.stages[-1].num_classes
    request = PlotSettings(
        names=value_of("plot"),
        seeds=parse_seeds(value_of("seeds") or "0-63"),
        class_rule=parse_class_rule(value_of("class") or "mod", num_classes),
        images=value_of("plot_images"),
    )
    plot(command.settings, command.open_run(), request, out)


def prepare_verb(command: Command) -> None:
    """--mode=prepare: packs the data set, cropped and resized for every stage, into --out."""
    if jax.process_count() > 1:
        raise UserError("--mode=prepare runs in one process; start it on one host")
    out = value_of("out")
    if not out:
        raise UserError("name the folder to prepare into: --out=DIR or --out=gs://BUCKET/PATH")
    settings = command.settings
    dataset, seed = settings.dataset.keys, settings.seed
    prepare(
        open_source(dataset, settings.resolutions, seed),
        settings.resolutions,
        out if "://" in out else Path(out).expanduser(),
        description=describe_source(dataset, settings.resolutions[-1], seed),
        threads=settings.dataset.threads,
        report=PrepareProgress(),
    )


class PrepareProgress:
    """Lines of progress of a preparation, and its answer to SIGTERM."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress("prepare", total, done, every=10.0)
        self._progress.update(done)
        if distributed.stop_requested():
            raise Stopped("stopped by SIGTERM while preparing")


def plan_verb(command: Command) -> None:
    """--mode=plan: the costs of a training, printed and as WORKDIR/plan.json."""
    request = PlanSettings(
        devices=value_of("devices"),
        utilisation=value_of("utilisation"),
        hardware=value_of("hardware"),
        topology=value_of("topology"),
    )
    plan(command.settings, command.only, request, command.workdir)


# How it ends


def run(config: ConfigDict) -> None:
    """Checks everything that can be checked cheaply, then does what --mode says."""
    with distributed.agree():
        command = Command(config)
    if command.mode in ("train", "sample", "evaluate", "plot"):
        set_up_devices(command.settings)
    verbs = {
        "train": train_verb,
        "sample": sample_verb,
        "evaluate": evaluate_verb,
        "prepare": prepare_verb,
        "plan": plan_verb,
        "plot": plot_verb,
    }
    verbs[command.mode](command)


def give_up(error: UserError) -> NoReturn:
    """Ends with one line, also where other processes are waiting in a collective."""
    if not distributed.joined():
        fail(error, error.status)
    try:
        if not error.agreed or jax.process_index() == 0:
            fail(error, error.status)
    finally:
        if error.agreed:
            distributed.leave()
        else:
            # Leaving in order would wait for the others; the launcher, or
            # JAX's heartbeat, ends them.
            os._exit(error.status)
    sys.exit(error.status)


def main(_: Sequence[str]) -> None:
    """Runs the verb of the parsed flags; every way to end has its exit status."""
    quieten()
    try:
        distributed.initialize()
        with distributed.sigterm_asks():
            run(CONFIG_FLAG.value)
        distributed.leave()
    except Stopped as stop:
        logging.info("%s; the same command continues", stop)
        distributed.leave()
        sys.exit(distributed.STOPPED)
    except UserError as error:
        give_up(error)
    except OSError as error:
        give_up(StorageError(f"{one_line(error)}; the same command continues"))
    except KeyboardInterrupt:
        logging.info("interrupted; the same command continues from the last checkpoint")
        if distributed.joined():
            os._exit(130)
        sys.exit(130)
    except Exception:
        if not distributed.joined():
            raise
        # The interpreter's own way out would wait for processes that wait
        # for this one.
        traceback.print_exc()
        os._exit(1)


def console() -> None:
    """The console command `relay-jax`."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()

"""Command line: flags -> configuration -> one verb.

    python -m relay_jax.main --config=demo --workdir=runs/demo
    python -m relay_jax.main --workdir=runs/demo --mode=sample --seeds=0-63 --out=images
    python -m relay_jax.main --config=imagenet256 --mode=sample --weights.base=A --weights.relay=B
    python -m relay_jax.main --mode=sample --weights=cifar10 --out=images

--config takes a name of the package or a file; a run in --workdir
opens itself without one. Bad input ends with one line and exit
status 2, before anything is compiled or written; status 1 where
trying again may help, such as for a full disk. SIGTERM saves and
ends with status 75: start the same command again. Several processes:
see relay_jax/runtime/distributed.py and launch/.
"""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

# Started as a file, `python relay_jax/main.py`: Python looks for
# packages beside the file, and this one is a folder above.
if not __package__:
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from relay_jax.runtime import start

# Before JAX, whose import takes seconds and may fail.
if start.is_command(__name__):
    start.begin()

from absl import app, flags, logging
from ml_collections import ConfigDict

from relay_jax import commandline
from relay_jax.commandline import (
    CONFIG_FLAG,
    WEIGHTS,
    overridden_keys,
    parse_flags,
    path_of,
    value_of,
)
from relay_jax.config import Settings, parse_stage, settings_of
from relay_jax.data.description import describe
from relay_jax.data.prepare import prepare
from relay_jax.data.source import open_source
from relay_jax.errors import UserError
from relay_jax.evaluation.evaluate import Comparison, evaluate_run
from relay_jax.evaluation.features import file_of
from relay_jax.evaluation.images import Shown
from relay_jax.evaluation.sweep import Contender, sweep
from relay_jax.planning.cost import forward_flops, sampling_cost
from relay_jax.planning.plan import PlanSettings, plan
from relay_jax.plots.inputs import PlotSettings
from relay_jax.plots.page import PAGE
from relay_jax.plots.plot import plot
from relay_jax.plots.report_page import evaluation_page, sweep_page
from relay_jax.plots.run_page import write_run_page
from relay_jax.plots.sweep import plot_sweep
from relay_jax.presets import (
    by_preset,
    check_preset,
    settings_for,
    split_samplers,
    with_ema,
    with_preset,
)
from relay_jax.relay import set_up_devices
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import verify_all
from relay_jax.runtime.devices import use_compilation_cache
from relay_jax.runtime.ending import to_the_end
from relay_jax.runtime.files import expanded, is_writable, try_folder
from relay_jax.runtime.logs import PrepareProgress
from relay_jax.sampling.generate import generate
from relay_jax.sampling.request import Request, parse_request
from relay_jax.sampling.seeds import CLASS_RULES, parse_class_rule, parse_seeds
from relay_jax.sampling.weights import with_guides
from relay_jax.stage import Stage, joined
from relay_jax.training.snapshots import reconstruct_all, with_averages
from relay_jax.training.train import may_only_be_read, train, try_places
from relay_jax.weights.unpack import weights_run
from relay_jax.workdir import CONFIG, claim_workdir, class_names, parse_weights

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
        self.configured: Settings = settings_of(config)
        if self.configured.evaluate.preset:
            check_preset(self.configured.evaluate.preset)
        # A key that the same command names is
        # meant; the preset sets the others.
        preset = value_of("preset")
        keep, ema = overridden_keys(), "" if self.mode == "average" else value_of("ema")
        self.settings = with_ema(with_preset(self.configured, preset, keep), ema, keep)
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
            if value_of("weights"):
                use_compilation_cache(weights_run(value_of("weights")))
            return self.weights
        self.claim(create=False)
        folders = {stage.name: self.workdir / stage.name for stage in self.settings.stages}
        return folders | self.weights

    def out(self, default: str, *files: str) -> Path:
        """--out, or a folder of the run, tried before anything is computed.

        files: those that will be replaced in it. Raises
        UserError if neither is named, and StorageError where
        nothing can be written.
        """
        out = path_of("out") or (self.workdir and self.workdir / default)
        if out is None:
            raise UserError(
                f"name the run or a folder for what --mode={self.mode} makes: "
                "--workdir=runs/NAME or --out=DIR"
            )
        with distributed.agree():
            if distributed.is_first():
                try_folder(out, files=files)
        return out

    def request(self, default_seeds: str) -> Request:
        """The samples that --seeds, --class and --low_res ask for. Raises UserError."""
        return parse_request(
            self.settings,
            self.only,
            seeds=value_of("seeds") or default_seeds,
            class_rule=value_of("class") or "",
            low_res=path_of("low_res"),
            class_names=self.class_names(),
        )

    def class_names(self) -> list[str]:
        """Of the run or the weights, if --class may need them: a rule or a number does not."""
        text = value_of("class") or "mod"
        return [] if text in CLASS_RULES else class_names(self.workdir, self.weights)

    def comparison(self, out: Path) -> Comparison:
        """What --reference, --features and their like name. out: of a command without a run."""
        settings = self.settings.evaluate
        limit, features = value_of("reference_images"), value_of("features") or settings.features
        # A run that may only be read keeps nothing.
        cache = (self.workdir or out) / "cache"
        if not distributed.of_first(is_writable(cache)):
            cache = out / "cache"
        return Comparison(
            reference=str(expanded(value_of("reference"))),
            reference_images=settings.reference_images if limit is None else limit,
            features=features,
            weights=file_of(features, settings, path_of),
            cache=path_of("cache") or cache,
        )

    def needs_weights(self, advice: str) -> None:
        """Raises UserError where neither a run nor --weights says what to sample from."""
        if self.workdir is None and any(s.name not in self.weights for s in self.stages):
            raise UserError(advice)


# The verbs


def train_verb(command: Command) -> None:
    """--mode=train: the run in the workdir."""
    settings = command.settings
    if command.workdir is None:
        raise UserError("name the folder of the run: --workdir=runs/NAME")
    if may_only_be_read(settings.stages, command.workdir):
        command.claim(create=False)
        return
    with distributed.agree():
        if distributed.is_first():
            try_places(command.stages, command.workdir)
        source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    command.claim(create=True)
    train(settings, command.only, source, command.workdir, command.weights)


def sample_verb(command: Command) -> None:
    """--mode=sample: images of --seeds into --out."""
    command.needs_weights("name the folder of the run: --workdir=runs/NAME")
    out = command.out("samples/images")
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
    out = command.out("evaluation", "report.json", "report.md", PAGE)
    weights: dict[str, Path] = {}
    with distributed.agree():
        samples = images or command.request(f"0-{settings.samples - 1}")
    if images is None:
        weights = command.open_run()
    elif command.workdir is not None:
        use_compilation_cache(command.workdir)
    shown = Shown()
    evaluate_run(command.settings, samples, weights, command.comparison(out), out, shown)
    with distributed.agree():
        if distributed.is_first():
            logging.info("look at %s", evaluation_page(out, shown))


def sweep_verb(command: Command) -> None:
    """--mode=sweep: the samplers of --sweep, scored on the same seeds, into --out."""
    command.needs_weights("name the run: --workdir=runs/NAME")
    out = command.out("sweep", "sweep.json", "sweep.md", "sweep.png", PAGE)
    with distributed.agree():
        names = split_samplers(value_of("sweep"))
        baseline = value_of("sweep_reference") or names[0]
        if baseline not in names:
            names.append(baseline)
        forward = {stage.name: forward_flops(stage) for stage in command.stages}
    weights, contenders = command.open_run(), []
    with distributed.agree():
        for name in names:
            sampled = settings_for(command.settings, name)
            sampled = replace(sampled, stages=with_guides(sampled.stages, weights))
            request = parse_request(
                sampled,
                parse_stage(sampled.stages, value_of("stage")),
                seeds=value_of("seeds") or f"0-{sampled.evaluate.samples - 1}",
                class_rule=value_of("class") or "",
                class_names=command.class_names(),
            )
            cost = sampling_cost(joined(request.stages), forward)
            contenders.append(Contender(name=name, request=request, cost=cost))
    report = sweep(
        command.settings,
        contenders,
        baseline,
        weights,
        command.comparison(out),
        out,
    )
    with distributed.agree():
        if distributed.is_first():
            plot_sweep(report, out / "sweep.png")
            logging.info("look at %s", sweep_page(out, contenders))


def plot_verb(command: Command) -> None:
    """--mode=plot: pictures into --out. Without a workdir those that need none of it."""
    out = command.out("plots")
    num_classes = command.settings.stages[-1].num_classes
    request = PlotSettings(
        names=value_of("plot"),
        seeds=parse_seeds(value_of("seeds") or "0-63"),
        class_rule=parse_class_rule(value_of("class") or "mod", num_classes, command.class_names()),
        images=value_of("plot_images"),
    )
    folders = command.open_run()
    stages = with_guides(command.settings.stages, folders)
    plot(replace(command.settings, stages=stages), folders, request, out)
    # What lies elsewhere is no part of the run.
    if command.workdir and out.resolve() == (command.workdir / "plots").resolve():
        logging.info("look at %s", write_run_page(command.settings.stages, command.workdir))


def prepare_verb(command: Command) -> None:
    """--mode=prepare: packs the data set, cropped and resized for every stage, into --out."""
    if distributed.joined():
        raise UserError("--mode=prepare runs in one process; start it on one host")
    out = value_of("out")
    if not out:
        raise UserError("name the folder to prepare into: --out=DIR or --out=gs://BUCKET/PATH")
    if "://" not in out:
        out = str(command.out(""))
    settings = command.settings
    source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    description = describe(source, settings.dataset.keys, settings.resolutions, settings.seed)
    description.show()
    prepare(
        source,
        settings.resolutions,
        out if "://" in out else Path(out),
        description=description.source | {"identity": description.identity},
        threads=settings.dataset.threads,
        report=PrepareProgress(),
    )


def plan_verb(command: Command) -> None:
    """--mode=plan: the costs of a training, printed and as WORKDIR/plan.json."""
    request = PlanSettings(
        devices=value_of("devices"),
        utilisation=value_of("utilisation"),
        hardware=value_of("hardware"),
        topology=value_of("topology"),
    )
    workdir = command.workdir
    if workdir is not None:
        try_folder(workdir, files=["plan.json"])
    presets = {n: with_guides(each, {}) for n, each in by_preset(command.configured).items()}
    settings = replace(command.settings, stages=with_guides(command.settings.stages, {}))
    plan(settings, command.only, request, workdir, presets)


def average_verb(command: Command) -> None:
    """--mode=average: the average of each stage's weights that --ema names, from its snapshots."""
    command.needs_weights("name the run: --workdir=runs/NAME")
    reconstruct_all(command.stages, command.open_run(), value_of("ema"))


def verify_verb(command: Command) -> None:
    """--mode=verify: compares every checkpoint of the run, or of --weights, with its checksums."""
    command.needs_weights("name the run: --workdir=runs/NAME")
    base = command.workdir or Path()
    folders = [command.weights.get(s.name, base / s.name) for s in command.stages]
    verify_all([place for folder in folders for place in with_averages(folder)])


# How it ends


def run(config: ConfigDict) -> None:
    """Checks everything that can be checked cheaply, then does what --mode says."""
    with distributed.agree():
        command = Command(config)
    if command.mode in ("train", "sample", "evaluate", "sweep", "plot"):
        set_up_devices(command.settings)
    verbs = {
        "train": train_verb,
        "sample": sample_verb,
        "evaluate": evaluate_verb,
        "sweep": sweep_verb,
        "average": average_verb,
        "prepare": prepare_verb,
        "plan": plan_verb,
        "plot": plot_verb,
        "verify": verify_verb,
    }
    verbs[command.mode](command)


def main(_: Sequence[str]) -> None:
    """Runs the verb of the parsed flags; every way to end has its exit status."""
    to_the_end(lambda: run(CONFIG_FLAG.value))


def console() -> None:
    """The console command `relay-jax`."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    console()

"""Command line: flags -> configuration -> one verb.

    python -m relay_jax.main --config=configs/demo.py --workdir=runs/demo
    python -m relay_jax.main --config=configs/demo.py --workdir=runs/demo --mode=sample
    --seeds=0-63 --out=images
    python -m relay_jax.main --config=configs/imagenet256.py --mode=sample --weights.base=DIR
    --weights.relay=DIR

Bad input ends with one line and exit status 2, before anything is compiled or written. SIGTERM
saves and ends with
status 75: start the same command again. Several processes: see relay_jax/runtime/distributed.py
and launch/.
"""

import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import NoReturn

import jax
from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags

from relay_jax.config import (
    ConfigError,
    Stage,
    build,
    claim_workdir,
    describe_source,
    open_source,
    parse_stage,
    parse_weights,
)
from relay_jax.data.prepare import prepare
from relay_jax.data.source import DataError
from relay_jax.evaluation.evaluate import evaluate
from relay_jax.evaluation.features import FeatureError
from relay_jax.models.unet import init_params, parameter_count
from relay_jax.planning.plan import DEFAULT_UTILISATION, plan
from relay_jax.plots.plot import PLOTS, plot
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import CheckpointError, SaveError
from relay_jax.runtime.devices import device_per_core, reuse_memory
from relay_jax.runtime.logs import fail, quieten
from relay_jax.runtime.sharding import MeshError
from relay_jax.sampling.classes import parse_class_rule
from relay_jax.sampling.folder import FORMATS
from relay_jax.sampling.generate import sample
from relay_jax.sampling.seeds import parse_seeds
from relay_jax.training.loop import TrainingError
from relay_jax.training.train import train

_CONFIG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration file, e.g. configs/demo.py (:smoke for a tiny "
    "variant); override keys with --config.KEY=VALUE.",
    lock_config=True,
)
_WORKDIR = flags.DEFINE_string("workdir", "", "Folder of the run: checkpoints, logs, samples.")
_MODE = flags.DEFINE_enum(
    "mode",
    "train",
    ["train", "sample", "evaluate", "prepare", "plan", "plot"],
    "What to do; "
    "evaluate scores images, or samples of the run, and writes a report, prepare packs the data "
    "set for all stages into --out, plan says what a training costs before it is launched, plot "
    "draws pictures of the data, the schedules and the run into --out.",
)
_STAGE = flags.DEFINE_string(
    "stage", "", "Train, sample or evaluate this stage alone (default: all, in order)."
)
_SEEDS = flags.DEFINE_string(
    "seeds", "0-63", "Samples: seeds, one image each, e.g. 0-63 or 1,5,10-12."
)
_OUT = flags.DEFINE_string(
    "out",
    "",
    "Folder for what is made (default: samples/images, evaluation or plots in WORKDIR; "
    "prepare needs one).",
)
# --weights.STAGE=DIR: a converted or trained stage to sample, or to start training, from
_WEIGHTS = "weights."
_FORMAT = flags.DEFINE_enum(
    "format",
    "png",
    FORMATS,
    "Sampling: numbered PNG files, npz files as ADM's, and all of them "
    "in one, or ArrayRecord files, a data set for dataset.source=packed.",
)
_CLASS = flags.DEFINE_string(
    "class",
    None,
    "Samples: the class of a seed's image: mod (seed mod classes, the default), "
    "balanced, random, or a number for all.",
)
_LOW_RES = flags.DEFINE_string(
    "low_res",
    "",
    "Samples of --stage of a relay: folder of low-resolution images written "
    "before (default: down-sampled real images).",
)

_REFERENCE = flags.DEFINE_string(
    "reference",
    "dataset",
    "Evaluate: what to compare with: dataset (the configuration's), a "
    "folder of images, ADM's VIRTUAL_*.npz or EDM's fid-refs npz.",
)
_REFERENCE_IMAGES = flags.DEFINE_integer(
    "reference_images", 0, "Evaluate: images of the reference at most, 0 = all."
)
_IMAGES = flags.DEFINE_string(
    "images",
    "",
    "Evaluate: folder of images, or npz (default: samples drawn from the run, with "
    "--seeds and --class).",
)
_FEATURES = flags.DEFINE_string(
    "features",
    "",
    "Evaluate: inception, random-conv or package.module:function (default: "
    "evaluate.features of the configuration).",
)
_INCEPTION = flags.DEFINE_string(
    "inception", "", "Evaluate: file of the Inception weights (default: evaluate.inception)."
)
_CACHE = flags.DEFINE_string(
    "cache", "", "Evaluate: folder for the features of references (default: WORKDIR/cache)."
)

_PLOT = flags.DEFINE_list(
    "plot", [], f"Plot: only these pictures, of {','.join(PLOTS)} (default: all that can be drawn)."
)
_PLOT_IMAGES = flags.DEFINE_integer(
    "plot_images", 0, "Plot: real images to read (default: 256; neighbours: 10,000)."
)

_TOPOLOGY = flags.DEFINE_string(
    "topology", "", "Plan: ask the TPU compiler for this slice, e.g. v5e:4x4 (needs libtpu)."
)
_DEVICES = flags.DEFINE_integer(
    "devices", 0, "Plan: chips or cards of the training (default: up to 64)."
)
_UTILISATION = flags.DEFINE_float(
    "utilisation", DEFAULT_UTILISATION, "Plan: assumed share of the peak."
)
_HARDWARE = flags.DEFINE_list("hardware", [], "Plan: only these devices, e.g. v5e,H100.")

USER_ERRORS = (
    ConfigError,
    DataError,
    CheckpointError,
    FeatureError,
    MeshError,
    TrainingError,
    distributed.DistributedError,
)


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing, with its errors and those of the configuration file as one line."""
    if any(arg in ("--help", "-help", "--helpfull", "--helpshort") for arg in argv):
        return app.parse_flags_with_usage(list(argv))
    try:
        for stage in re.findall(rf"^--?{_WEIGHTS}(\w+)", "\n".join(argv), re.MULTILINE):
            if _WEIGHTS + stage not in flags.FLAGS:
                flags.DEFINE_string(
                    _WEIGHTS + stage, "", f"Folder with the weights of stage {stage}."
                )
        rest = flags.FLAGS(list(argv))
        config = _CONFIG.value
        if config is not None:
            file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
            if not Path(file).exists():  # ml_collections would tell later, in a traceback
                fail(f"no configuration file {file}")
    except (
        flags.Error,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        SyntaxError,
        ImportError,
    ) as error:
        fail(error)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags look like --name=value")
    if config is None:
        fail("name a configuration: --config=configs/demo.py")
    return rest


def check_folders() -> None:
    """Raises ConfigError where a flag names a bucket: pathlib would make a local folder `gs:`
    of it."""
    places = ("workdir", "out", "low_res", "images", "reference", "inception", "cache")
    given = {
        name: flags.FLAGS[name].value
        for name in flags.FLAGS
        if name in places or name.startswith(_WEIGHTS)
    }
    for name, value in given.items():
        if (
            value and re.match(r"\w+://", value) and (_MODE.value, name) != ("prepare", "out")
        ):  # it has its own advice
            raise ConfigError(
                f"--{name}={value}: only folders can be used; mount the bucket (gcsfuse "
                "--implicit-dirs "
                "BUCKET DIR, as launch/tpu_pod.sh does) and name a folder in it"
            )


def use_compilation_cache(workdir: Path) -> None:
    """Compiled programs are kept in the workdir, unless the user has chosen a place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR"):
        jax.config.update("jax_compilation_cache_dir", str((workdir / "cache").absolute()))


def claim(config: ConfigDict, workdir: Path, create: bool) -> None:
    """`claim_workdir` for all processes: the first one writes config.json, the others find and
    compare it."""

    def action(first: bool) -> None:
        if not first and create and not (workdir / "config.json").exists():
            raise ConfigError(
                f"{workdir} is not the same folder on all hosts; use a file system that they share"
            )
        claim_workdir(config, workdir, create and first)

    distributed.first_then_others(action)


def prepare_data(config: ConfigDict, stages: list[Stage]) -> None:
    """--mode=prepare: packs the data set, cropped and resized for every stage, into --out."""
    if jax.process_count() > 1:
        raise ConfigError("--mode=prepare runs in one process; start it on one host")
    if not _OUT.value:
        raise ConfigError("name the folder to prepare into: --out=DIR or --out=gs://BUCKET/PATH")

    def each() -> None:
        if distributed.stop_requested():
            raise distributed.Stopped("stopped by SIGTERM while preparing")

    prepare(
        open_source(config, stages),
        [stage.resolution for stage in stages],
        _OUT.value,
        description=describe_source(config, stages),
        threads=config.dataset.threads,
        each=each,
    )


def open_run(
    config: ConfigDict, stages: list[Stage], weights: dict[str, Path], workdir: Path | None
) -> dict[str, Path]:
    """Where each stage's weights are: in the run of the workdir, if one is named, unless
    --weights says otherwise."""
    if workdir is None:
        return weights
    claim(config, workdir, create=False)
    use_compilation_cache(workdir)
    return {stage.name: workdir / stage.name for stage in stages} | weights


def out_folder(workdir: Path | None, default: str) -> Path:
    """--out, or a folder of the run. Raises ConfigError if neither is named."""
    if _OUT.value:
        return Path(_OUT.value)
    if workdir is None:
        raise ConfigError(
            f"name the run or a folder for what --mode={_MODE.value} makes: "
            "--workdir=runs/NAME or --out=DIR"
        )
    return workdir / default


def given(flag: flags.FlagHolder) -> Path | None:
    """The path that a flag names, if it names one."""
    return Path(flag.value) if flag.value else None


def draw_samples(
    config: ConfigDict,
    stages: list[Stage],
    only: Stage | None,
    weights: dict[str, Path],
    workdir: Path | None,
) -> None:
    """--mode=sample: images of --seeds into --out."""
    if workdir is None and any(stage.name not in weights for stage in ([only] if only else stages)):
        raise ConfigError("name the folder of the run: --workdir=runs/NAME")
    out = out_folder(workdir or Path(), "samples/images")
    sample(
        config,
        stages,
        only,
        open_run(config, stages, weights, workdir),
        seeds=_SEEDS.value,
        out=out,
        class_rule=_CLASS.value or "",
        low_res=given(_LOW_RES),
        image_format=_FORMAT.value,
    )


def draw_plots(
    config: ConfigDict, stages: list[Stage], weights: dict[str, Path], workdir: Path | None
) -> None:
    """--mode=plot: pictures into --out. Without a workdir those that need none of it."""
    if _STAGE.value:
        raise ConfigError("--mode=plot draws all stages; leave --stage out")
    out = out_folder(workdir, "plots")
    rule = parse_class_rule(_CLASS.value or "mod", stages[-1].network.num_classes)
    plot(
        config,
        stages,
        open_run(config, stages, weights, workdir),
        _PLOT.value,
        seeds=parse_seeds(_SEEDS.value),
        class_rule=rule,
        images=_PLOT_IMAGES.value,
        out=out,
    )


def score(
    config: ConfigDict,
    stages: list[Stage],
    only: Stage | None,
    weights: dict[str, Path],
    workdir: Path | None,
) -> None:
    """--mode=evaluate: scores of --images, or of samples drawn from the run or from --weights,
    into --out."""
    images = given(_IMAGES)
    if (
        workdir is None
        and images is None
        and any(s.name not in weights for s in ([only] if only else stages))
    ):
        raise ConfigError("name what to score: --images=DIR, or the run with --workdir=runs/NAME")
    out = out_folder(workdir, "evaluation")
    if images is None:
        weights = open_run(config, stages, weights, workdir)
    elif workdir is not None:
        use_compilation_cache(workdir)
    features, inception = (
        _FEATURES.value or config.evaluate.features,
        _INCEPTION.value or config.evaluate.inception,
    )
    evaluate(
        config,
        stages,
        only,
        weights,
        images=images,
        seeds=_SEEDS.value,
        class_rule=_CLASS.value or "",
        low_res=given(_LOW_RES),
        reference=_REFERENCE.value,
        reference_images=_REFERENCE_IMAGES.value,
        features=features,
        inception=Path(inception) if inception else None,
        out=out,
        cache=given(_CACHE) or (workdir or out) / "cache",
    )


def train_run(
    config: ConfigDict,
    stages: list[Stage],
    only: Stage | None,
    weights: dict[str, Path],
    workdir: Path | None,
) -> None:
    """--mode=train: the run in the workdir."""
    if workdir is None:
        raise ConfigError("name the folder of the run: --workdir=runs/NAME")
    source = distributed.everywhere(lambda: open_source(config, stages), errors=USER_ERRORS)
    claim(config, workdir, create=True)
    use_compilation_cache(workdir)
    train(config, stages, only, source, workdir, weights)


def run(config: ConfigDict, workdir: Path | None) -> None:
    """Checks everything that can be checked cheaply, then does what --mode says."""
    gc.set_threshold(
        100_000, 50, 100
    )  # tracing makes millions of objects that stay: the collector took a third of it
    together = partial(distributed.everywhere, errors=USER_ERRORS)
    together(check_folders)
    stages = together(lambda: build(config))
    only = together(lambda: parse_stage(stages, _STAGE.value))
    named = {
        name.removeprefix(_WEIGHTS): flags.FLAGS[name].value
        for name in flags.FLAGS
        if name.startswith(_WEIGHTS)
    }
    weights = together(lambda: parse_weights(stages, named))
    mode = _MODE.value
    if mode == "plan":
        plan(
            [only] if only else stages,
            fsdp=config.mesh.fsdp,
            devices=_DEVICES.value,
            utilisation=_UTILISATION.value,
            hardware=_HARDWARE.value,
            topology=_TOPOLOGY.value,
            workdir=workdir,
        )
        return
    if mode == "prepare":
        prepare_data(config, stages)
        return
    if not distributed.joined():  # the collectives of several processes need XLA's own threads
        if config.mesh.fsdp == 1:
            shapes = jax.eval_shape(
                lambda: [init_params(stage.network, jax.random.key(0)) for stage in stages]
            )
            device_per_core(most=config.sample.batch, bytes_on_each=4 * parameter_count(shapes))
        reuse_memory()
    if mode == "plot":
        draw_plots(config, stages, weights, workdir)
    elif mode == "evaluate":
        score(config, stages, only, weights, workdir)
    elif mode == "sample":
        draw_samples(config, stages, only, weights, workdir)
    else:
        train_run(config, stages, only, weights, workdir)


def give_up(error: Exception) -> NoReturn:
    """Ends with one line, also where other processes are waiting in a collective. Status 2, or
    1 where launchers may try again."""
    status = 1 if isinstance(error, SaveError) else 2
    if not distributed.joined():
        fail(error, status)
    agreed = isinstance(error, TrainingError) or (
        isinstance(error, distributed.DistributedError) and error.agreed
    )
    try:
        if not agreed or jax.process_index() == 0:
            fail(error, status)
    finally:
        if agreed:
            distributed.leave()
        else:
            os._exit(
                status
                # leaving in order would wait for the others; the launcher, or JAX's heartbeat, ends
                # them
            )
    sys.exit(status)


def main(_: Sequence[str]) -> None:
    quieten()
    try:
        distributed.initialize()
        with distributed.sigterm_asks():
            run(_CONFIG.value, Path(_WORKDIR.value) if _WORKDIR.value else None)
        distributed.leave()
    except distributed.Stopped as stop:
        logging.info("%s; the same command continues", stop)
        distributed.leave()
        sys.exit(distributed.STOPPED)
    except USER_ERRORS as error:
        give_up(error)
    except KeyboardInterrupt:
        logging.info("interrupted; the same command continues from the last checkpoint")
        if distributed.joined():
            os._exit(130)
        sys.exit(130)
    except Exception:
        if not distributed.joined():
            raise
        # the interpreter's own way out would wait for processes that wait for this one
        traceback.print_exc()
        os._exit(1)


if __name__ == "__main__":
    app.run(main, flags_parser=parse_flags)

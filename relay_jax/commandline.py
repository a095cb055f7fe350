"""The flags of the command line: what they are, which verbs use them, and how they are read.

A flag that the chosen verb does not use is refused, so that nobody
believes in an effect that it has not. --config takes a name of the
package or a file; a run in --workdir opens itself without it.
"""

import re
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from absl import app, flags
from ml_collections import config_flags

from relay_jax import workdir as workdir_module
from relay_jax.config import config_file
from relay_jax.errors import UserError
from relay_jax.planning.plan import DEFAULT_UTILISATION
from relay_jax.plots.plot import PLOTS
from relay_jax.presets import PRESET_HELP
from relay_jax.runtime import start
from relay_jax.runtime.files import expanded
from relay_jax.runtime.logs import fail
from relay_jax.sampling.folder import FORMATS
from relay_jax.weights.unpack import stages_in, weights_run
from relay_jax.workdir import CONFIG, RENAMED

VERBS = ("train", "sample", "evaluate", "sweep", "average", "prepare", "plan", "plot", "verify")
WEIGHTS = "weights."  # --weights.STAGE=DIR
WEIGHTS_VERBS = ("train", "sample", "evaluate", "sweep", "average", "plot", "verify")

# Which verbs use a flag; another verb refuses it. The help text of a
# flag begins with them.
USED_BY: dict[str, tuple[str, ...]] = {"config": VERBS, "mode": VERBS}


_TEXT, _COUNT, _SHARE = flags.DEFINE_string, flags.DEFINE_integer, flags.DEFINE_float
_SWITCH, _LIST = flags.DEFINE_bool, flags.DEFINE_list
_FORMAT = partial(flags.DEFINE_enum, enum_values=FORMATS)

CONFIG_FLAG = config_flags.DEFINE_config_file(
    "config",
    None,
    "Configuration: a name of the package (demo, imagenet256, ...) or a file, with :smoke a tiny "
    "variant, or the folder of a run for another one like it; override keys with "
    "--config.KEY=VALUE. A run in --workdir needs none.",
    lock_config=True,
)
flags.DEFINE_enum(
    "mode",
    "train",
    VERBS,
    "What to do; sample writes images of a run, evaluate scores images or samples of a run and "
    "writes a report, sweep compares ways to sample a run, average makes an average of the weights "
    "of any width from snapshots, prepare packs the data set for all stages into --out, plan says "
    "what a training costs before it is launched, plot makes pictures of data, schedules and the "
    "run, verify compares its checkpoints with their checksums.",
)
# fmt: off
for _define, _name, _default, _verbs, _text in (
    (_TEXT, "workdir", "", "train sample evaluate sweep average plan plot verify",
     "Folder of the run."),
    (_TEXT, "stage", "", "train sample evaluate sweep average plan verify",
     "This stage alone (default: all, in order)."),
    (_TEXT, "weights", "", "train sample evaluate sweep plot verify",
     "Weights of all stages: a name of the package (cifar10), a file .safetensors, or a run. "
     "Without --config and --workdir of a run it is their configuration. --weights.STAGE=DIR "
     "for those of one stage."),
    (_SWITCH, "debug", False, "train",
     "Name the first layer that is not finite, and keep the batch."),
    (_TEXT, "preset", "", "sample evaluate plan plot",
     f"Sample by one word: {PRESET_HELP} (default: as configured)."),
    (_TEXT, "ema", "", "sample evaluate sweep average plot",
     "The average of the weights of all stages: a relative width such as 0.08, a half-life of "
     "train.ema, or ema (default: as configured); average makes a width from snapshots."),
    (_TEXT, "sweep", "official,safe,fast,draft", "sweep",
     "Samplers to compare: presets, or multistep or heun with KEY=VALUE of all stages or "
     "STAGE.KEY=VALUE of one, e.g. fast,fast:relay.num_steps=9,heun:num_steps=20."),
    (_TEXT, "sweep_reference", "", "sweep",
     "The sampler that the others are compared with (default: the first)."),
    (_TEXT, "seeds", "", "sample evaluate sweep plot",
     "Seeds, one image each, e.g. 0-63 or 1,5,10-12 (default: 0-63; evaluate and sweep: "
     "as many as evaluate.samples)."),
    (_TEXT, "class", None, "sample evaluate sweep plot",
     "The class of a seed's image: mod (seed mod classes, the default), balanced, "
     "random, or the name or number of a class for all."),
    (_TEXT, "low_res", "", "sample evaluate",
     "With --stage of a relay: folder of low-resolution images written before "
     "(default: down-sampled real images)."),
    (_TEXT, "out", "", "sample evaluate sweep prepare plot",
     "Folder for what is made (default: samples/images, evaluation, sweep or plots in "
     "WORKDIR)."),
    (_FORMAT, "format", "png", "sample",
     "Numbered PNG files, npz files as ADM's, and all of them in one, or ArrayRecord "
     "files, a data set for dataset.source=packed."),
    (_TEXT, "reference", "dataset", "evaluate sweep",
     "What to compare with: dataset (the configuration's), a folder of images, ADM's "
     "VIRTUAL_*.npz or EDM's fid-refs npz."),
    (_COUNT, "reference_images", None, "evaluate sweep",
     "Images of the reference at most, 0 = all (default: evaluate.reference_images)."),
    (_TEXT, "images", "", "evaluate",
     "Folder of images, or npz, to score (default: samples of the run, with --seeds)."),
    (_TEXT, "features", "", "evaluate sweep",
     "inception, dinov2-vitl14, efficientnet-lite0, random-conv or package.module:function "
     "(default: evaluate.features)."),
    (_TEXT, "inception", "", "evaluate sweep",
     "File of the Inception weights (default: evaluate.inception)."),
    (_TEXT, "dinov2", "", "evaluate sweep",
     "File of the DINOv2 weights (default: evaluate.dinov2)."),
    (_TEXT, "cache", "", "evaluate sweep",
     "Folder for the features of references (default: WORKDIR/cache)."),
    (_LIST, "plot", [], "plot",
     f"Only these pictures, of {','.join(PLOTS)} (default: all that can be plotted)."),
    (_COUNT, "plot_images", 0, "plot",
     "Real images to read (default: 256; neighbours: 10,000)."),
    (_TEXT, "topology", "", "plan",
     "Ask the TPU compiler for this slice, e.g. v5e:4x4 (needs libtpu)."),
    (_COUNT, "devices", 0, "plan",
     "Chips or cards of the training (default: up to 64)."),
    (_SHARE, "utilisation", DEFAULT_UTILISATION, "plan",
     "Assumed share of the peak."),
    (_LIST, "hardware", [], "plan",
     "Only these devices, e.g. v5e,H100."),
):
    # fmt: on
    USED_BY[_name] = tuple(_verbs.split())
    _define(_name, _default, help=f"[{', '.join(USED_BY[_name])}] {_text}")


# From words to values


def parse_flags(argv: Sequence[str]) -> list[str]:
    """absl's parsing, with its errors and those of the configuration file as one line."""
    reset()
    if any(arg in ("--help", "-help", "--helpfull", "--helpshort") for arg in argv):
        return app.parse_flags_with_usage(list(argv))
    try:
        start.refuse_bytes(argv)
        # ml_collections looks for the overrides
        # of the configuration in sys.argv.
        sys.argv = with_config(list(argv))
        for stage in re.findall(r"^--?weights\.(\w+)", "\n".join(sys.argv), re.MULTILINE):
            if WEIGHTS + stage not in flags.FLAGS:
                verbs = ", ".join(WEIGHTS_VERBS)
                text = f"[{verbs}] Folder with the weights of stage {stage}."
                flags.DEFINE_string(WEIGHTS + stage, "", text)
        words = flags.FLAGS(sys.argv)
        if len(words) > 1:
            fail(f"unexpected argument {words[1]!r}; flags look like --name=value")
        check_verb(flags.FLAGS.mode)
        if CONFIG_FLAG.value is None:
            fail("name a configuration, --config=demo, or a run, --workdir=runs/NAME")
    except (UserError, flags.Error) as error:
        fail(error)
    except Exception as error:
        # Of ml_collections, of the configuration file, which is a
        # program, or of a folder that cannot be read.
        fail(unknown_key(error) or (error if str(error) else type(error).__name__))
    return words


def unknown_key(error: Exception) -> str:
    """What to say of a key that ml_collections does not find; '' for another error."""
    # It says the last part of the key alone, as `"'heads'"`.
    cause = error.args[0] if isinstance(error, AttributeError) and error.args else error
    if not isinstance(cause, KeyError) or not cause.args:
        return ""
    name, *advice = str(cause.args[0]).split(maxsplit=1)
    for arg in sys.argv:
        key, *parts = arg.partition("=")[0].lstrip("-").split(".")
        if key == "config" and name.strip("'\"") in parts:
            hint = f" ({advice[0]})" if advice else ""
            return f"the configuration has no key {'.'.join(parts)}{hint}"
    return ""


def reset() -> None:
    """Forgets an earlier command line of this process, such as of a cell run twice."""
    for name in list(flags.FLAGS):
        if name.startswith(("config.", WEIGHTS)):
            delattr(flags.FLAGS, name)
    if flags.FLAGS.is_parsed():
        for flag in flags.FLAGS.get_flags_for_module(__name__):
            flag.unparse()


def with_config(argv: list[str]) -> list[str]:
    """The arguments with --config as a file that is there: a name of the package, or the run's own.

    --weights is there for each stage as well. Raises UserError for a
    configuration or weights that are not there, and for keys of
    earlier versions.
    """
    texts = {}
    for place, arg in enumerate(argv):
        match = re.fullmatch(r"--?(config|workdir|weights)(?:=(.*))?", arg, re.DOTALL)
        if match and (match[2] is not None or place + 1 < len(argv)):
            inline = match[2] is not None
            texts[match[1]] = place, inline, match[2] if inline else argv[place + 1]
        for (section, old), new in RENAMED.items():
            if re.match(rf"--?config\.stages\.\w+\.{section}\.{old}\b", arg):
                raise UserError(f"{section}.{old} is called {section}.{new} now")
    named = texts["weights"][2] if "weights" in texts else ""
    run = weights_run(named) if named else None
    # Before the others: --weights.STAGE of the same command is meant.
    stages = [f"--{WEIGHTS}{stage}={run / stage}" for stage in stages_in(run)] if run else []
    if "config" in texts:
        place, inline, text = texts["config"]
        other = run_folder(text)
        file = f"{workdir_module.__file__}:{other}" if other else config_file(text)
        argv[place if inline else place + 1] = ("--config=" if inline else "") + file
    elif run or "workdir" in texts:
        folder = expanded(texts["workdir"][2]) if "workdir" in texts else None
        if folder is None or not (folder / CONFIG).exists():
            if run is None and texts["workdir"][2]:
                raise UserError(
                    f"no run in {folder} ({CONFIG} is missing); name a configuration, such as "
                    "--config=demo, or correct --workdir"
                )
            folder = run
        if folder is not None:
            # Read once here, because an error inside of the flag's
            # file would name that file.
            workdir_module.open_config(folder)
            stages.append(f"--config={workdir_module.__file__}:{folder}")
    argv[1:1] = stages
    return argv


def run_folder(text: str) -> Path | None:
    """The folder of a run, if --config names one by a path: its configuration, for another run."""
    if "/" not in text or text.endswith(".py"):
        return None
    folder = expanded(text)
    if not (folder / CONFIG).is_file():
        return None
    workdir_module.open_config(folder)
    return folder


def check_verb(mode: str) -> None:
    """Raises UserError for a flag that the verb does not use."""
    for name in flags.FLAGS:
        if not flags.FLAGS[name].present or not (name in USED_BY or name.startswith(WEIGHTS)):
            continue
        verbs = USED_BY.get(name, WEIGHTS_VERBS)
        if mode not in verbs:
            raise UserError(
                f"--{name} is not used by --mode={mode}, only by {', '.join(verbs)}; leave it out"
            )
    if mode == "evaluate" and flags.FLAGS.images:
        for name in ("seeds", "class", "low_res", "stage", "preset", "ema"):
            if flags.FLAGS[name].present:
                raise UserError(
                    f"--{name} is about samples of a run, and --images names others; leave one out"
                )


def overridden_keys() -> set[str]:
    """The keys of the configuration that this command line sets: `stages.relay.sample.rho`."""
    return {
        name.removeprefix("config.")
        for name in flags.FLAGS
        if name.startswith("config.") and flags.FLAGS[name].present
    }


def value_of(name: str) -> Any:
    """The value of a flag."""
    return flags.FLAGS[name].value


def path_of(name: str) -> Path | None:
    """The path that a flag names, with ~ expanded, None where it names none.

    Raises UserError for a bucket: pathlib
    would make a local folder `gs:` of it.
    """
    text = value_of(name)
    if not text:
        return None
    if re.match(r"\w+://", text):
        raise UserError(
            f"--{name}={text}: only folders can be used; mount the bucket (gcsfuse --implicit-dirs "
            "BUCKET DIR, as launch/tpu_pod.sh does) and name a folder in it"
        )
    return expanded(text)

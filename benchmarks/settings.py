"""Flags that the benchmarks share, and how they end: a table on the console and a JSON file."""

import json
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
from absl import flags
from ml_collections import ConfigDict, config_flags

from benchmarks.programs import markdown, with_settings
from relay_jax.config import build, config_file, parse_stage
from relay_jax.errors import UserError
from relay_jax.runtime import devices
from relay_jax.runtime.logs import fail
from relay_jax.stage import Stage

FLAGS = flags.FlagValues()  # apart from those of relay_jax.main
HERE: dict[str, Any] = {"flag_values": FLAGS}
_CONFIG = config_flags.DEFINE_config_file(
    "config",
    "configs/demo.py",
    "Configuration; override keys with --config.KEY=VALUE.",
    lock_config=True,
    **HERE,
)
_STAGE = flags.DEFINE_string("stage", "", "This stage alone (default: all).", **HERE)
_BATCH = flags.DEFINE_integer(
    "batch", 0, "Images per device (default: the config's batch over the devices).", 0, **HERE
)
_DTYPE = flags.DEFINE_enum(
    "dtype", "", ["", "float32", "bfloat16"], "Precision (default: the config's).", **HERE
)
_REMAT = flags.DEFINE_enum(
    "remat", "", ["", "on", "off"], "Recomputation (default: the config's).", **HERE
)
_STEPS = flags.DEFINE_integer(
    "steps", 0, "Levels of the sampling grid (default: the config's).", 0, **HERE
)
_KINDS = flags.DEFINE_list(
    "what", [], "What to measure: forward, train, sample (default: all three).", **HERE
)
_ROUNDS = flags.DEFINE_integer("rounds", 10, "Measurements of each; the median counts.", 1, **HERE)
_REUSE = flags.DEFINE_bool(
    "reuse_memory", True, "Keep freed memory of CPU programs, as relay_jax.main does.", **HERE
)
_OUT = flags.DEFINE_string("out", "", "JSON file for the results.", **HERE)


def run(main: Callable[[], None]) -> None:
    """Parses the command line and calls main; bad flags end with one line and status 2."""
    try:
        rest = FLAGS(with_config_file(sys.argv))
    except (flags.Error, AttributeError, KeyError, TypeError, ValueError, ImportError) as error:
        fail(error)
    if len(rest) > 1:
        fail(f"unexpected argument {rest[1]!r}; flags look like --name=value")
    main()


def with_config_file(argv: Sequence[str]) -> list[str]:
    """A command line with --config=NAME as --config=FILE. Raises UserError for an unknown one."""
    name = "--config="
    return [name + config_file(a.removeprefix(name)) if a.startswith(name) else a for a in argv]


def cores() -> set[int]:
    """The cores this process may use."""
    return os.sched_getaffinity(0)


def kinds(possible: Sequence[str]) -> list[str]:
    """--what, of those that a benchmark knows."""
    chosen = _KINDS.value or [kind for kind in possible if kind != "trace"]
    for kind in chosen:
        if kind not in possible:
            fail(f"--what knows {', '.join(possible)}, not {kind}")
    return list(chosen)


def rounds() -> int:
    """--rounds."""
    return _ROUNDS.value


def stages(
    change: Callable[[ConfigDict], ConfigDict] = lambda config: config, only: str = ""
) -> list[Stage]:
    """The stages to measure, as the flags change them; to be called before any use of a device.

    change: done to the configuration first; only: instead of --stage.
    """
    if _REUSE.value:
        devices.setup()
    remat = {"": None, "on": True, "off": False}[_REMAT.value]
    try:
        built = build(change(_CONFIG.value))
        chosen = parse_stage(built, only or _STAGE.value)
        count = jax.device_count()
        return [
            with_settings(
                stage,
                (_BATCH.value or stage.train.batch // count or 1) * count,
                _DTYPE.value,
                remat,
                _STEPS.value,
            )
            for stage in ([chosen] if chosen else built)
        ]
    except (UserError, ValueError) as error:
        fail(error)


def out() -> Path | None:
    """--out."""
    return Path(_OUT.value) if _OUT.value else None


def finish(facts: dict[str, Any], rows: Sequence[dict[str, Any]], out: Path | None) -> None:
    """Prints facts and table, and writes them to a file."""
    print(
        "\n" + ", ".join(f"{key} {value}" for key, value in facts.items()) + "\n\n" + markdown(rows)
    )
    if out is not None:
        out.write_text(json.dumps({**facts, "rows": list(rows)}, indent=1) + "\n")

"""Two settings of a configuration in alternation, A B A B ..., and their ratio pair by pair.

    python -m benchmarks.compare --config=configs/demo.py --stage=relay --b=model.dtype=bfloat16
    python -m benchmarks.compare --config=configs/imagenet256.py --stage=relay --what=train
        --batch=8 --a=model.remat=True --b=model.remat=False

A and B are keys below the stage with their values, comma-separated; nothing is the
configuration as it stands.
"""

import ast
import json
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from absl import flags
from ml_collections import ConfigDict

from benchmarks import settings
from benchmarks.programs import (
    Program,
    forward_program,
    machine,
    random_params,
    sample_program,
    train_program,
)
from benchmarks.timing import in_turns, ratio
from relay_jax.errors import UserError
from relay_jax.runtime.sharding import make_mesh
from relay_jax.stage import Stage

_A = flags.DEFINE_string(
    "a", "", "Keys of the stage, e.g. model.remat=True,train.accumulate=2.", **settings.HERE
)
_B = flags.DEFINE_string("b", "", "As --a, for the second setting.", **settings.HERE)


def changed(config: ConfigDict, stage: str, text: str) -> ConfigDict:
    """A copy of the configuration with `text` set in one stage.

    Raises UserError for an unknown key.
    """
    config = config.copy_and_resolve_references()
    for part in filter(None, text.split(",")):
        key, _, value = part.partition("=")
        node, *path = config.stages[stage], *key.split(".")
        for name in path[:-1]:
            node = node.get(name)
        if not isinstance(node, ConfigDict) or path[-1] not in node:
            raise UserError(f"no key {key!r} in a stage of the configuration")
        try:
            parsed = ast.literal_eval(value)
        except (ValueError, SyntaxError):
            parsed = value
        try:
            node[path[-1]] = parsed
        except TypeError as error:
            raise UserError(f"{key}: {error}") from error
    return config


def make(stage: Stage, kind: str) -> Program:
    """The program of that kind, on all devices."""
    mesh = make_mesh()
    if kind == "train":
        return train_program(stage, mesh)
    return {"forward": forward_program, "sample": sample_program}[kind](
        stage, mesh, random_params(stage, mesh)
    )


def compare(a: Stage, b: Stage, kinds: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """A row for each kind of program. The ratio is time of A over time of B per image: above 1,
    B is faster."""
    rows = []
    for kind in kinds:
        programs = {"a": make(a, kind), "b": make(b, kind)}
        seconds = in_turns(
            {name: p.run for name, p in programs.items()}, rounds, 1 if kind == "sample" else 3
        )
        seconds = {name: times / programs[name].images for name, times in seconds.items()}
        middle, low, high = ratio(seconds["a"], seconds["b"])
        rows.append(
            {
                "stage": a.name,
                "what": kind,
                "batch": a.train.batch,
                **{
                    f"{name} ms/image": f"{np.median(times) * 1e3:.4g}"
                    for name, times in seconds.items()
                },
                "a / b": f"{middle:.3f}",
                "quartiles": f"{low:.3f}-{high:.3f}",
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    rows, kinds = [], settings.kinds(("forward", "train", "sample"))
    names = [stage.name for stage in settings.stages()]
    for name in names:
        a, b = (
            settings.stages(partial(changed, stage=name, text=text), name)[0]
            for text in (_A.value, _B.value)
        )
        rows += compare(a, b, kinds, settings.rounds())
    settings.finish(
        {**machine(), "a": _A.value or "as it stands", "b": _B.value or "as it stands"},
        rows,
        settings.out(),
    )


if __name__ == "__main__":
    settings.run(main)

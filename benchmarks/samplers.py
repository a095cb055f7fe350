"""Images per second of a trained run's whole chain, by samplers of the sweep, taken in turns.

    python -m benchmarks.samplers --workdir=runs/demo
        --samplers=heun:base.num_steps=80:relay.num_steps=240,official,safe,fast --rounds=5

Samplers are named as for --mode=sweep, whose table has their scores (docs/experiments.md). The
ratio is that of the seconds of the first sampler, round by round: above 1 a sampler is faster.
"""

import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from absl import flags

from benchmarks.programs import machine, markdown
from benchmarks.timing import in_turns, ratio
from relay_jax.errors import UserError
from relay_jax.planning.cost import forward_flops, sampling_cost
from relay_jax.presets import settings_for, split_samplers
from relay_jax.relay import Relay, load
from relay_jax.runtime.files import expanded, write_json
from relay_jax.runtime.flops import si
from relay_jax.runtime.logs import fail
from relay_jax.stage import joined

FLAGS = flags.FlagValues()  # apart from those of relay_jax.main
HERE: dict[str, Any] = {"flag_values": FLAGS}
_WORKDIR = flags.DEFINE_string("workdir", "runs/demo", "A run that has been trained.", **HERE)
_SAMPLERS = flags.DEFINE_string("samplers", "official,safe,fast,draft", "As --sweep.", **HERE)
_IMAGES = flags.DEFINE_integer("images", 64, "Images of a call.", 1, **HERE)
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Calls of each sampler that count.", 1, **HERE)
_OUT = flags.DEFINE_string("out", "", "JSON file for the results.", **HERE)


def rows(relay: Relay, names: list[str], images: int, rounds: int) -> list[dict[str, Any]]:
    """A row for each sampler, as the first one of which all others are compared with."""
    assert relay.settings is not None
    seeds, forward = np.arange(images), {s.name: forward_flops(s) for s in relay.stages}
    samplers = {
        name: replace(relay, stages=settings_for(relay.settings, name).stages, batch=images)
        for name in names
    }
    runs = {name: partial(sampler.sample, seeds) for name, sampler in samplers.items()}
    seconds = in_turns(runs, rounds, calls=1)
    table = []
    for name, sampler in samplers.items():
        cost = sampling_cost(joined(sampler.stages), forward)
        middle, low, high = ratio(seconds[names[0]], seconds[name])
        table.append(
            {
                "sampler": name,
                "calls": cost["calls"],
                "FLOP": si(cost["flops"]),
                "images/s": f"{images / np.median(seconds[name]):.4g}",
                "faster than the first": f"{middle:.2f}",
                "quartiles": f"{low:.2f}-{high:.2f}",
            }
        )
    return table


def main() -> None:
    """Measures what the flags name, and prints the table."""
    try:
        rest = FLAGS(sys.argv)
        if len(rest) > 1:
            fail(f"unexpected argument {rest[1]!r}; flags look like --name=value")
        relay = load(expanded(_WORKDIR.value))
        names = split_samplers(_SAMPLERS.value)
        table = rows(relay, names, _IMAGES.value, _ROUNDS.value)
    except (UserError, flags.Error) as error:
        fail(error)
    facts = {**machine(), "images of a call": _IMAGES.value, "rounds": _ROUNDS.value}
    print("\n" + ", ".join(f"{key} {value}" for key, value in facts.items()))
    print("\n" + markdown(table))
    if _OUT.value:
        write_json(Path(_OUT.value), {**facts, "rows": table})


if __name__ == "__main__":
    main()

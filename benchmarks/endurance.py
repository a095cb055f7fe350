"""How much a run withstands: many kills, damages, hostile files and impossible settings.

    python -m benchmarks.endurance --kills=1000 --mutants=10000 --damages=2000 --out=runs/endurance

What is asked for is divided among the trials of benchmarks/trials.py.
Stopped at any moment, the same command, or one with larger numbers,
continues from OUT/state.json. At the end it prints the figures that
docs/running.md states, writes them to OUT/figures.json and figures.md,
and ends with status 1 if anything was a fault. Every case is a function
of --seed and its number.
"""

import os

# Before JAX is imported. One device: what is tried here is not speed; and
# compilation, which would dominate, with half of the effort.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("JAX_NUM_CPU_DEVICES", "1")
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

import json
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib import import_module
from itertools import islice
from pathlib import Path
from typing import Any, Protocol

from absl import flags

from benchmarks.damages import Damages, Flips
from benchmarks.programs import markdown
from benchmarks.trials import (
    SHARD,
    InChildren,
    Outcome,
    SamplingKills,
    Straight,
    TrainingKills,
)
from relay_jax.runtime.files import write_json, write_text
from relay_jax.runtime.logs import fail
from relay_jax.sampling import shards

MOST_GB = 2.0  # of memory, for a hostile file of some KB
KEPT_FAULTS = 100  # of each trial, in the state
FLAGS = flags.FlagValues()  # apart from those of relay_jax.main, which the trials parse
HERE: dict[str, Any] = {"flag_values": FLAGS}
_KILLS = flags.DEFINE_integer("kills", 0, "Kills while training and sampling.", 0, **HERE)
_MUTANTS = flags.DEFINE_integer("mutants", 0, "Hostile files for every reader.", 0, **HERE)
_DAMAGES = flags.DEFINE_integer("damages", 0, "Damaged files of a run.", 0, **HERE)
_FLIPS = flags.DEFINE_integer("flips", 0, "Flips and cuts in a checkpoint.", 0, **HERE)
_OVERRIDES = flags.DEFINE_integer("overrides", 0, "Overrides of the configuration.", 0, **HERE)
_OUT = flags.DEFINE_string("out", "", "Folder for the runs, the state and the figures.", **HERE)
_SEED = flags.DEFINE_integer("seed", 0, "Of all random numbers.", **HERE)


class Trial(Protocol):
    """Something that can be tried as often as one likes. unit: what it is counted in."""

    name: str
    unit: str

    def case(self, number: int, most: int) -> Outcome:
        """The case of a number, which counts for at most `most` units."""
        ...


@dataclass
class Record:
    """What a trial has given so far. cases: the number of the next; tried: units."""

    cases: int = 0
    tried: int = 0
    seconds: float = 0.0
    results: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    bad: int = 0

    def add(self, outcome: Outcome, seconds: float) -> None:
        """Counts a case."""
        self.cases += 1
        self.tried += outcome.count
        self.seconds += seconds
        for result, times in (outcome.results or {outcome.result: 1}).items():
            self.results[result] = self.results.get(result, 0) + times
        if outcome.bad:
            self.bad += 1
            self.faults = [*self.faults, outcome.says][:KEPT_FAULTS]


class State:
    """OUT/state.json: the records of all trials by their name, written after every case."""

    def __init__(self, out: Path, seed: int) -> None:
        self.path, self.seed = out / "state.json", seed
        self.records: dict[str, Record] = {}
        if self.path.exists():
            content = json.loads(self.path.read_text())
            if content["seed"] != seed:
                fail(f"{out} was begun with --seed={content['seed']}; name another --out")
            self.records = {name: Record(**record) for name, record in content["trials"].items()}

    def run(self, trial: Trial, units: int) -> None:
        """Cases of a trial until it has been tried so often."""
        record = self.records.setdefault(trial.name, Record())
        reported = time.monotonic()
        while record.tried < units:
            began = time.monotonic()
            outcome = trial.case(record.cases, units - record.tried)
            record.add(outcome, time.monotonic() - began)
            # After every case: a night's series is more often stopped than
            # it ends.
            trials = {name: asdict(record) for name, record in self.records.items()}
            write_json(self.path, {"seed": self.seed, "trials": trials})
            if outcome.bad:
                print(f"FAULT {outcome.says}", flush=True)
            if time.monotonic() - reported > 10 or record.tried >= units:
                reported = time.monotonic()
                progress = f"{record.tried:,} of {units:,} {trial.unit}"
                print(f"{trial.name}: {progress}, {record.bad} faults", flush=True)

    def rows(self) -> list[dict[str, str]]:
        """The table of figures."""
        return [
            {
                "what": name,
                "tried": f"{record.tried:,}",
                "runs": f"{record.cases:,}",
                "how they ended": ", ".join(
                    f"{n:,} {r}" for r, n in sorted(record.results.items())
                ),
                "faults": f"{record.bad}",
                "minutes": f"{record.seconds / 60:.1f}",
            }
            for name, record in self.records.items()
        ]


def override_case(seed: int, number: int) -> Outcome:
    """One value of one key (tests/overrides.py): it works, or is refused in a line."""
    # Late, as all that the children alone need: it sets JAX up.
    from tests.overrides import overrides, try_override

    key, value = next(islice(overrides(number + 1, seed), number, None))
    wrong = try_override(key, value)
    return Outcome("answered wrongly" if wrong else "works or one line", bool(wrong), wrong)


def mutant_case(seed: int, number: int) -> Outcome:
    """One hostile file for one reader, each reader as often (benchmarks/mutants.py): it is read,
    or refused in a line, at a bounded cost."""
    from benchmarks.mutants import READERS, fuzz

    reader, place = list(READERS)[number % len(READERS)], number // len(READERS)
    with tempfile.TemporaryDirectory() as folder:
        outcome = fuzz(reader, Path(folder), [seed * 10**9 + place])
    if outcome.faults:
        return Outcome("answered wrongly", True, outcome.faults[0])
    if outcome.grown > MOST_GB:
        return Outcome("memory", True, f"{reader} {place}: {outcome.grown:.1f} GB")
    return Outcome("read" if outcome.read else "refused in one line")


def plan(straight: Straight) -> list[tuple[Trial, int]]:
    """The trials, and how often each is asked for."""
    kills, place = _KILLS.value, (straight.out, straight.seed)
    # Trainings have more moments to be killed in than samplings. What needs
    # milliseconds runs a hundred at a time in one process.
    return [
        (TrainingKills(straight), kills - kills // 3),
        (SamplingKills(straight), kills // 3),
        (Damages(straight), _DAMAGES.value),
        (Flips(*place), _FLIPS.value),
        (InChildren(*place, "hostile files", "files", mutant_case, 100), _MUTANTS.value),
        (InChildren(*place, "overrides", "values", override_case), _OVERRIDES.value),
    ]


def main(argv: Sequence[str]) -> int:
    """Runs what the flags ask for; 1 if anything was a fault, else 0."""
    try:
        rest = FLAGS(list(argv))
    except flags.Error as error:
        fail(error)
    if len(rest) > 1 or not _OUT.value:
        fail(f"unexpected argument {rest[1]!r}" if len(rest) > 1 else "name a folder: --out=DIR")
    out = Path(_OUT.value).expanduser().absolute()
    out.mkdir(parents=True, exist_ok=True)
    # The processes of the trials are forked from this one.
    shards.shard_size = lambda resolution: SHARD
    for name in ("matplotlib.pyplot", "orbax.checkpoint", "tensorboardX"):
        import_module(name)  # once, and not in each process again
    state, straight = State(out, _SEED.value), Straight(out, _SEED.value)
    if _KILLS.value or _DAMAGES.value:
        print("a run without interruption, to compare with", flush=True)
        straight.make()
    for trial, units in plan(straight):
        if units:
            state.run(trial, units)
    table = markdown(state.rows())
    print(f"\n{table}", flush=True)
    write_json(out / "figures.json", state.rows())
    write_text(out / "figures.md", table + "\n")
    return int(any(record.bad for record in state.records.values()))


if __name__ == "__main__":
    sys.exit(main(sys.argv))

"""What endurance.py does to a small relay: kills while it trains and samples.

A trial is a class whose cases are functions of a seed and a number, so
that an interrupted series goes on where it was. All of them work on one
small relay, trained once without interruption (`Straight`), and run
every command line in a process of its own (tests/supervised.py).
"""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from tests.supervised import command, end, forked, wait_until

STAGES = ("base", "relay")
FORMATS = ("png", "npz", "arrayrecord")
SEEDS = "3-92"  # of the samples whose making is killed
FEW = "0-7"  # of the samples that show whether weights are the right ones
SHARD = 12  # images to a file, so that there are files enough to be killed between
LONGEST_LINE = 400
PATIENCE = 300  # seconds for one command; it needs 1 to 10 on an idle machine
CONFIG = """
from relay_jax.configs import demo


def get_config(_=''):
    config = demo.get_config("smoke")
    for stage in (config.stages.base, config.stages.relay):
        stage.model.update(channels=8, head_width=8, multipliers=(1,), attention=())
        stage.train.update(images=240, batch=4)
    config.stages.relay.resolution = 16
    config.stages.relay.process.patch = 2
    config.dataset.update(size=64, threads=1)
    config.checkpoint.every_images = 16
    config.log.update(every_steps=1, grid_every_images=0)
    return config
"""


@dataclass(frozen=True)
class Outcome:
    """How one case ended. result: a word or two to count by; bad: whether it is a fault; says:
    what was done and the line that matters; count: what the case counts for, such as its kills;
    results: several words with how often each, in place of `result`."""

    result: str
    bad: bool = False
    says: str = ""
    count: int = 1
    results: dict[str, int] = field(default_factory=dict)


def random_of(*words: object) -> random.Random:
    """Random numbers of a case: the same for the same words, in every process and version."""
    return random.Random("/".join(map(str, words)))


def run_command(log: Path, *arguments: str, seconds: float = PATIENCE) -> int:
    """A command line in a process of its own; its exit status. Raises TimeoutError."""
    return end(forked(log, partial(command, *arguments)), seconds)


# What must be the same


def digest_of(workdir: Path) -> dict[str, str]:
    """Hashes of what a finished run holds: weights and optimiser of each stage, the curves, the
    samples and the scores. What cannot be read says so instead."""
    digest = {}
    for stage in STAGES:
        state = partial(state_hash, workdir / stage)
        digest[f"weights of {stage}"] = in_child(workdir, state)
        digest[f"curve of {stage}"] = readable(curve, workdir / stage / "metrics.jsonl")
    digest["samples"] = readable(picture, workdir / "samples" / "grid.png")
    digest["scores"] = readable(scores, workdir / "report.json")
    return digest


def readable(function: Callable[[Path], str], path: Path) -> str:
    """What a function makes of a file, or why it cannot."""
    try:
        return function(path)
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        return f"unreadable: {type(error).__name__}"


def curve(path: Path) -> str:
    """The loss by images."""
    lines = map(json.loads, path.read_text().splitlines())
    return sha256(repr([(line["images"], line["loss"]) for line in lines]).encode()).hexdigest()


def picture(path: Path) -> str:
    """The hash of a file."""
    return sha256(path.read_bytes()).hexdigest()


def scores(path: Path) -> str:
    """The scores of a report."""
    return json.dumps(json.loads(path.read_text())["scores"])


def in_child(workdir: Path, function: Callable[[], str]) -> str:
    """The text that a function makes in a process of its own: whatever uses JAX must not run in
    the one that forks."""
    answer = workdir.parent / f"{workdir.name}.answer"
    answer.unlink(missing_ok=True)
    log = workdir.parent / f"{workdir.name}.answer.log"
    status = end(forked(log, lambda: answer.write_text(function())), PATIENCE)
    return answer.read_text() if status == 0 else f"unreadable: {last_line(log)}"


def state_hash(folder: Path) -> str:
    """Of all arrays of a stage's newest checkpoint: averaged weights, weights and optimiser."""
    import jax
    import orbax.checkpoint as ocp

    steps = [int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdecimal()]
    digest = sha256(str(max(steps)).encode())
    for item in ("ema", "train"):
        # Orbax itself, not the package's reader: what is on the disk counts.
        with ocp.PyTreeCheckpointer() as reader:
            tree = reader.restore((folder / "checkpoints" / str(max(steps)) / item).absolute())
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            array = np.asarray(leaf)
            digest.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode())
            digest.update(array.tobytes())
    return digest.hexdigest()


def files_of(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, by its path."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def differing(one: dict[str, Any], other: dict[str, Any]) -> str:
    """The names whose values are not the same, '' if all are."""
    return ", ".join(k for k in sorted(one.keys() | other.keys()) if one.get(k) != other.get(k))


def last_line(log: Path) -> str:
    """Of what a command has printed."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else ""


class Straight:
    """The run that nothing interrupts, and its samples; made once, in OUT/straight."""

    def __init__(self, out: Path, seed: int) -> None:
        self.out, self.seed = out, seed
        self.run = out / "straight" / "run"
        self.config = f"--config={out / 'config.py'}"

    def make(self) -> None:
        """Trains, samples and scores, if that was not done before. Raises RuntimeError."""
        complete = self.out / "straight" / "digest.json"
        if not complete.exists():
            shutil.rmtree(self.out / "straight", ignore_errors=True)
            self.run.parent.mkdir(parents=True)
            (self.out / "config.py").write_text(CONFIG)
            began = time.monotonic()
            self._do(self.config, f"--workdir={self.run}")
            seconds = time.monotonic() - began
            for kind in FORMATS:
                self._do(*self.sampling(kind, self.run / "samples" / kind, SEEDS))
            self._do(*self.sampling("png", self.out / "straight" / "few", FEW))
            self._do(*self.verb("evaluate", self.run, self.out / "straight" / "scores"))
            self._do(*self.verb("plot", self.run, self.out / "straight" / "plots"))
            record = {"digest": digest_of(self.run), "seconds": seconds}
            complete.write_text(json.dumps(record))
        record = json.loads(complete.read_text())
        self.digest, self.seconds = record["digest"], record["seconds"]

    def _do(self, *arguments: str) -> None:
        log = self.out / "straight" / "log"
        if status := run_command(log, *arguments, seconds=600):
            raise RuntimeError(f"status {status} without any damage: {last_line(log)}; see {log}")

    def sampling(self, kind: str, out: Path, seeds: str, run: Path | None = None) -> list[str]:
        """Arguments that sample from a run, by default the one without interruption."""
        run = run or self.run
        return [
            "--mode=sample",
            f"--workdir={run}",
            f"--format={kind}",
            f"--seeds={seeds}",
            f"--out={out}",
        ]

    def verb(self, mode: str, run: Path, out: Path) -> list[str]:
        """Arguments that score or plot a run."""
        plots = ["--plot=grid,curves"] if mode == "plot" else []
        return [f"--mode={mode}", f"--workdir={run}", f"--out={out}", *plots]


# Kills


class Killed:
    """A command that is killed at random moments until a number of kills is reached or it ends."""

    def __init__(self, log: Path, arguments: list[str], rng: random.Random, longest: float) -> None:
        self.log, self.arguments, self.rng, self.longest = log, arguments, rng, longest
        self.kills, self.faults = 0, list[str]()

    def __call__(self, kills: int, watched: Path) -> None:
        """Kills, and starts again; the last start is left to end by itself, with status 0."""
        while self.kills < kills:
            pid = forked(self.log, partial(command, *self.arguments))
            # Half of the kills meet the writing of a file: as soon as there
            # is a new entry; the others come whenever.
            before = entries(watched) if self.rng.random() < 0.5 else None
            wait, begun = self.rng.uniform(0, self.longest), time.monotonic()
            moment = partial(self._moment, watched, before, begun, wait)
            status = wait_until(pid, moment, PATIENCE + self.longest)
            if status is None:
                if before is not None:
                    time.sleep(self.rng.choice([0, 0.005, 0.05, 0.2]))
                chosen = signal.SIGTERM if self.rng.random() < 0.2 else signal.SIGKILL
                os.kill(pid, chosen)
                status = end(pid, PATIENCE)
                self.kills += 1
                # SIGTERM before main has begun is the harness's own, not a fault.
                fine = (-chosen,) if chosen == signal.SIGKILL else (75, 0, -chosen)
                if status not in (*fine, 0):
                    self.faults.append(f"status {status} after {chosen.name}")
            if status == 0:  # it had ended by itself
                break
            if status not in (75, -signal.SIGKILL, -signal.SIGTERM):
                self.faults.append(f"status {status}: {last_line(self.log)}")
                return
        status = end(forked(self.log, partial(command, *self.arguments)), 600)
        if status:
            self.faults.append(f"the last start: status {status}: {last_line(self.log)}")

    @staticmethod
    def _moment(watched: Path, before: set[str] | None, begun: float, wait: float) -> bool:
        passed = time.monotonic() - begun
        if before is None:
            return passed > wait
        return bool(entries(watched) - before) or passed > 4 * wait + 2


def entries(folder: Path) -> set[str]:
    """Names of what lies two levels below a folder: checkpoints and their parts, and images."""
    return {str(path) for path in folder.glob("*/*")}


@dataclass
class TrainingKills:
    """Trainings of the whole relay, each killed several times; the end must be that of Straight."""

    straight: Straight
    name: str = "kills while training"
    unit: str = "kills"

    def case(self, number: int, most: int) -> Outcome:
        straight, rng = self.straight, random_of(self.straight.seed, self.name, number)
        folder = straight.out / "killed" / "run"
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.mkdir(parents=True)
        if number % 8:  # every eighth compiles anew, and is killed while it does
            shutil.copytree(straight.run / "cache", folder / "cache")
        log = folder.parent / "log"
        longest = straight.seconds * (0.2 if number % 8 else 0.5)
        killed = Killed(log, [straight.config, f"--workdir={folder}"], rng, longest)
        killed(min(most, rng.randint(4, 12)), folder / rng.choice(STAGES))
        faults = killed.faults
        if not faults:
            other = differing(straight.digest, digest_of(folder))
            faults = [f"differs in {other}"] if other else []
        return ended(faults, killed.kills, log, f"training {number}")


@dataclass
class SamplingKills:
    """Samplings to each format, killed; the files must be those of Straight, byte for byte."""

    straight: Straight
    name: str = "kills while sampling"
    unit: str = "kills"

    def case(self, number: int, most: int) -> Outcome:
        straight, rng = self.straight, random_of(self.straight.seed, self.name, number)
        kind = FORMATS[number % len(FORMATS)]
        folder = straight.out / "killed" / kind
        shutil.rmtree(folder.parent, ignore_errors=True)
        folder.parent.mkdir(parents=True)
        log = folder.parent / "log"
        arguments = straight.sampling(kind, folder, SEEDS)
        killed = Killed(log, arguments, rng, straight.seconds * 0.15)
        # The files of an npz sampling lie one level higher than those of others.
        watched = folder.parent if kind == "npz" else folder
        killed(min(most, rng.randint(2, 6)), watched)
        faults = killed.faults
        if not faults:
            other = differing(files_of(folder), files_of(straight.run / "samples" / kind))
            faults = [f"other files: {other}"[:LONGEST_LINE]] if other else []
        return ended(faults, killed.kills, log, f"sampling {number} to {kind}")


def ended(faults: list[str], kills: int, log: Path, what: str) -> Outcome:
    """The outcome of a killed command."""
    if "Traceback" in log.read_text(errors="replace"):
        faults = [*faults, "traceback"]
    if faults:
        return Outcome("another end", True, f"{what}: {'; '.join(faults)}", max(kills, 1))
    return Outcome("the same end", count=max(kills, 1))


# Cases that need no command of their own


@dataclass
class InChildren:
    """A function's cases, `together` of them in one process, which may hang, die or eat memory.

    function: (seed, number) -> Outcome; an exception is a fault.
    """

    out: Path
    seed: int
    name: str
    unit: str
    function: Callable[[int, int], Outcome]
    together: int = 25
    seconds: float = PATIENCE  # for all that run together
    _outcomes: dict[int, Outcome] = field(default_factory=dict)

    def case(self, number: int, most: int) -> Outcome:
        if number not in self._outcomes:
            self._run(number, min(self.together, most))
        return self._outcomes.pop(number)

    def _run(self, first: int, count: int) -> None:
        folder = self.out / "children"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        answers = folder / "answers.jsonl"
        pid = forked(folder / "log", partial(self._answer, answers, range(first, first + count)))
        try:
            ending = f"the process ended with status {end(pid, self.seconds)}"
        except TimeoutError:
            ending = f"more than {self.seconds:g} s"
        lines = answers.read_text().splitlines() if answers.exists() else []
        for number, line in enumerate(lines, first):
            self._outcomes[number] = Outcome(**json.loads(line))
        if len(lines) < count:  # the case after the last answer is the one
            number = first + len(lines)
            says = f"{self.name}, case {number}: {ending}: {last_line(folder / 'log')}"
            self._outcomes[number] = Outcome("hangs or dies", True, says)

    def _answer(self, answers: Path, numbers: range) -> None:
        with answers.open("a") as file:
            for number in numbers:
                try:
                    outcome = self.function(self.seed, number)
                except BaseException as error:
                    says = f"{self.name}, case {number}: {type(error).__name__}: {error}"
                    outcome = Outcome("foreign error", True, says[: 2 * LONGEST_LINE])
                file.write(json.dumps(asdict(outcome)) + "\n")
                file.flush()

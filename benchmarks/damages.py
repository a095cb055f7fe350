"""Damage to the files of a run: each sort of file replaced by something that no program wrote, and
one verb on the run.

The end that is right: the result of the undamaged run with status 0, or
another one that the log warns of (the checkpoint before), or one line
that says what is wrong. Everything else is a fault, and a wrong result
with status 0 and no warning is the worst.
"""

import json
import random
import re
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from benchmarks.trials import (
    FEW,
    FORMATS,
    LONGEST_LINE,
    PATIENCE,
    SEEDS,
    STAGES,
    Outcome,
    Straight,
    differing,
    digest_of,
    files_of,
    last_line,
    random_of,
    run_command,
)
from tests.supervised import end, forked

# Files that only a run that was killed leaves behind, with some content.
LEFT_OVER = {
    "base/lease.json": '{"host": "nowhere", "process": 1, "token": "0", "time": 0}',
    "relay/profile.request": "",
}
FLIPS = 50  # in one process
JSONS = (
    "{}", "[]", "null", "3", '"text"', "[[1], {}]", '{"images": "many"}', "NaN", "1e999",
    '{"seeds": [[0, 99999999999]]}', "[" * 100_000, '{"a":' * 50_000,
)  # fmt: skip
# What a training leaves as it is where it is damaged, and the parts of the
# digest that are made of it.
DERIVED = {
    "samples": "samples/grid.png",
    **{f"curve of {stage}": f"{stage}/metrics.jsonl" for stage in STAGES},
}
KINDS = ("empty", "cut", "random bytes", "a bit", "other JSON", "a folder", "gone")


def damage(path: Path, rng: random.Random) -> str:
    """Replaces a file by something that a program did not write; what."""
    kind = rng.choice(KINDS)
    content = path.read_bytes()
    path.unlink()
    if kind == "empty":
        path.write_bytes(b"")
    elif kind == "cut":
        path.write_bytes(content[: rng.randrange(max(len(content), 1))])
    elif kind == "random bytes":
        path.write_bytes(rng.randbytes(min(max(len(content), 1), 1 << 16)))
    elif kind == "a bit":
        place = rng.randrange(max(len(content), 1))
        changed = bytearray(content or b"\0")
        changed[place] ^= 1 << rng.randrange(8)
        path.write_bytes(changed)
    elif kind == "other JSON":
        text = rng.choice(JSONS)
        kind = f"{kind} {text[:20]}"
        path.write_text(text)
    elif kind == "a folder":
        path.mkdir()
        (path / "something").write_text("text")
    return kind


def unfinish(run: Path, damaged: str) -> None:
    """Takes the newest checkpoints and the report away, so that a training has something to do;
    all but the damaged file."""
    for stage in STAGES:
        steps = [p for p in (run / stage / "checkpoints").iterdir() if p.name.isdecimal()]
        newest = max(steps, key=lambda path: int(path.name))
        if newest not in (run / damaged).parents:
            shutil.rmtree(newest)
    if damaged != "report.json":
        (run / "report.json").unlink()


def sort_of(path: str) -> str:
    """The sort of a file of a run: its path without stage, numbers and hashes."""
    return re.sub(r"[0-9a-f]{8,}|\d+", "#", re.sub(r"^(base|relay)/", "STAGE/", path))


@dataclass
class Damages:
    """One damaged file of a finished run, and one verb on it: the right result, or one line."""

    straight: Straight
    name: str = "damaged files of a run"
    unit: str = "files"
    _sorts: dict[str, list[str]] = field(default_factory=dict)

    def case(self, number: int, most: int) -> Outcome:
        straight, rng = self.straight, random_of(self.straight.seed, self.name, number)
        if not self._sorts:
            for path in [*files_of(straight.run), *LEFT_OVER]:
                self._sorts.setdefault(sort_of(path), []).append(path)
        # Each sort of file as often as the others: data files of
        # checkpoints would be nearly all.
        file = rng.choice(self._sorts[rng.choice(sorted(self._sorts))])
        folder = straight.out / "damaged" / "run"
        shutil.rmtree(folder.parent, ignore_errors=True)
        shutil.copytree(straight.run, folder)
        if file in LEFT_OVER:
            (folder / file).write_text(LEFT_OVER[file])
        kind = damage(folder / file, rng)
        sampled = file.split("/")[1] if file.startswith("samples/") else ""
        verbs = ["train", "sample", "evaluate", "plot"]
        verb = "again" if sampled in FORMATS else rng.choice(verbs)
        if verb == "train" and rng.random() < 0.5:
            unfinish(folder, file)
        log, made = folder.parent / "log", folder.parent / "made"
        arguments = {
            "train": [straight.config, f"--workdir={folder}"],
            "sample": straight.sampling("png", made, FEW, folder),
            "again": straight.sampling(sampled, folder / "samples" / sampled, SEEDS, folder),
            "evaluate": straight.verb("evaluate", folder, made),
            "plot": straight.verb("plot", folder, made),
        }[verb]
        result, bad, line = self._judge(log, arguments, verb, folder, file)
        says = f"{verb} with {file}: {kind}: {result}: {line}" if bad else ""
        return Outcome(result, bad, says[: 2 * LONGEST_LINE])

    def _judge(
        self, log: Path, arguments: list[str], verb: str, run: Path, file: str
    ) -> tuple[str, bool, str]:
        try:
            status = run_command(log, *arguments)
        except TimeoutError:
            return "hangs", True, f"after {PATIENCE} s"
        text = log.read_text(errors="replace")
        line = last_line(log)
        if "Traceback" in text:
            return "traceback", True, line
        if status < 0:
            return "killed", True, f"signal {-status}"
        if status:
            errors = [e for e in text.splitlines() if e.startswith("error: ")]
            if len(errors) != 1 or len(errors[0]) > LONGEST_LINE:
                return "not one line", True, line[:LONGEST_LINE]
            return "refused in one line", False, line
        other = self._wrong(verb, run, file)
        if not other:
            return "right result", False, ""
        # absl's letter of a warning, and of an error that was survived.
        if re.search(r"^[WE]\d{4} ", text, re.MULTILINE):
            return "another result, with a warning", False, line
        return "silent", True, f"differs in {other}"

    def _wrong(self, verb: str, run: Path, file: str) -> str:
        """What differs from Straight's; '' if nothing does. The damaged file itself may, where it
        is a picture or log that nothing is made of."""
        straight = self.straight
        if verb == "train":
            after = digest_of(run)
            for name, damaged in DERIVED.items():
                if file == damaged:
                    after[name] = straight.digest[name]
            return differing(straight.digest, after)
        made = run.parent / "made"
        if verb == "sample":
            names = [files_of(made), files_of(straight.out / "straight" / "few")]
            return differing(*({k: v for k, v in n.items() if ".png" in k} for n in names))
        if verb == "again":
            kind = file.split("/")[1]
            return differing(
                files_of(run / "samples" / kind), files_of(straight.run / "samples" / kind)
            )
        if verb == "evaluate":
            paths = (made, straight.out / "straight" / "scores")
            return differing(
                *(json.loads((p / "report.json").read_text())["scores"] for p in paths)
            )
        return "" if (made / "grid.png").exists() else "grid.png"


# Damage to a checkpoint


@dataclass
class Flips:
    """Bits flipped and parts cut in the files of a checkpoint (tests/damage.py): it comes back as
    it was, or the damage is detected."""

    out: Path
    seed: int
    name: str = "flips and cuts in a checkpoint"
    unit: str = "damages"

    def case(self, number: int, most: int) -> Outcome:
        folder, count = self.out / "flips", min(FLIPS, most)
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        action = partial(self._damage, folder, count, random_of(self.seed, number).randrange(2**32))
        try:
            status = end(forked(folder / "log", action), 10 * PATIENCE)
        except TimeoutError:
            status = -1
        if status:
            says = f"flips, case {number}: status {status}: {last_line(folder / 'log')}"
            return Outcome("dies", True, says, count)
        record = json.loads((folder / "results.json").read_text())
        says = f"flips, case {number}: silent in {record['silent']}" if record["silent"] else ""
        return Outcome("", bool(says), says, count, record["results"])

    @staticmethod
    def _damage(folder: Path, count: int, seed: int) -> None:
        # Late: it imports JAX's devices, which the process that forks must
        # not have.
        from tests.damage import damage_checkpoint

        silent = list[str]()
        results = damage_checkpoint(
            folder / "checkpoints", count, seed, lambda path: silent.append(path.name)
        )
        # "whole for verify": the reader saw a damage that --verify does not.
        silent += [kind for kind, times in results.items() if times and "whole for" in kind]
        record = {"results": {k: n for k, n in results.items() if n}, "silent": silent}
        (folder / "results.json").write_text(json.dumps(record))

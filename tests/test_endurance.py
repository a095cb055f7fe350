"""The endurance of a run, small: damaged files, and that the harness (benchmarks/endurance.py) sees
faults and continues. Kills: tests/training/test_resume.py and tests/sampling/test_generate.py."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import damages, trials
from benchmarks.damages import JSONS, KINDS, Damages, damage, sort_of
from benchmarks.endurance import State
from benchmarks.trials import Outcome, differing, random_of

ROOT = Path(__file__).parents[1]
COUNTS = {"damages": 5, "mutants": 8, "overrides": 8}


@dataclass
class Counted:
    """A trial whose cases count for their number, and are a fault for 2."""

    seen: list[int] = field(default_factory=list)
    name: str = "counted"
    unit: str = "units"

    def case(self, number: int, most: int) -> Outcome:
        self.seen.append(number)
        return Outcome("odd" if number % 2 else "even", number == 2, f"case {number}", min(2, most))


def test_a_series_in_two_parts_is_that_in_one(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    once, first, second = Counted(), Counted(), Counted()
    whole, parts = State(tmp_path / "whole", 1), State(tmp_path / "parts", 1)
    whole.run(once, 9)
    parts.run(first, 4)
    # As after a kill: nothing is left but the file.
    parts = State(tmp_path / "parts", 1)
    parts.run(second, 9)
    assert first.seen + second.seen == once.seen == [0, 1, 2, 3, 4]
    records = [asdict(state.records["counted"]) | {"seconds": 0} for state in (whole, parts)]
    assert records[0] == records[1]
    assert records[0]["tried"] == 9 and records[0]["faults"] == ["case 2"]
    assert parts.rows()[0]["how they ended"] == "3 even, 2 odd"
    assert "FAULT case 2" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        State(tmp_path / "parts", 2)


def test_damages_are_those_of_their_seed_and_change_every_file(tmp_path: Path) -> None:
    kinds = set()
    for number in range(60):
        results = []
        for name in ("a", "b"):
            path = tmp_path / f"{name}{number}"
            path.write_bytes(b"some text of a file")
            kind = damage(path, random_of(0, number))
            results.append((kind, path.read_bytes() if path.is_file() else path.exists()))
        assert results[0] == results[1]
        assert results[0][1] != b"some text of a file"
        kinds.add(kind.split(" {")[0] if kind.startswith("other JSON") else kind)
    assert {kind[:10] for kind in kinds} == {kind[:10] for kind in KINDS}
    assert any(len(text) > 90_000 for text in JSONS)


def test_files_are_of_one_sort_whatever_stage_step_and_hash() -> None:
    one = "base/checkpoints/3/ema/d/6667a2cdd9f18d9058970cd2331d1831"
    other = "relay/checkpoints/12/ema/d/66a6b431480277e277e542970fd32a1c"
    assert sort_of(one) == sort_of(other) != sort_of(one.replace("ema", "train"))


@pytest.mark.parametrize(
    ("status", "log", "differs", "result", "bad"),
    [
        (0, "I1126 done", "", "right result", False),
        (0, "I1126 done", "weights", "silent", True),
        (0, "W1126 checkpoint 6 is unreadable", "weights", "another result, with a warning", False),
        (2, "I1126 begun\nerror: config.json is damaged", "", "refused in one line", False),
        (2, f"error: {'x' * 500}", "", "not one line", True),
        (1, "nothing", "", "not one line", True),
        (1, "Traceback (most recent call last):\nKeyError: 3", "", "traceback", True),
        (0, "Traceback (most recent call last):\nKeyError: 3", "", "traceback", True),
        (-9, "", "", "killed", True),
        (None, "", "", "hangs", True),
    ],
)
def test_every_end_has_its_name(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    status: int | None,
    log: str,
    differs: str,
    result: str,
    bad: bool,
) -> None:
    def run(path: Path, *_: str) -> int:
        path.write_text(log)
        if status is None:
            raise TimeoutError
        return status

    monkeypatch.setattr(damages, "run_command", run)
    monkeypatch.setattr(Damages, "_wrong", lambda *_: differs)
    trial = Damages(SimpleNamespace(seed=0))  # type: ignore[arg-type]
    assert trial._judge(tmp_path / "log", [], "train", tmp_path, "x")[:2] == (result, bad)


def test_what_differs_is_named() -> None:
    assert differing({"a": 1, "b": 2}, {"a": 1, "b": 3, "c": 4}) == "b, c"
    assert differing({"a": 1}, {"a": 1}) == ""


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small series, which was killed once itself and continued."""
    folder = tmp_path_factory.mktemp("endurance")
    arguments = [
        sys.executable,
        "-m",
        "benchmarks.endurance",
        f"--out={folder}",
        *(f"--{name}={count}" for name, count in COUNTS.items()),
    ]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    with (folder / "log").open("w") as log:
        first = subprocess.Popen(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log)
        # The run without damage, which both parts compare with, comes first.
        deadline = time.monotonic() + 300
        while first.poll() is None and tried(folder).get("damaged files of a run", 0) < 2:
            assert time.monotonic() < deadline, (folder / "log").read_text()[-2000:]
            time.sleep(random.uniform(0.02, 0.1))
        assert first.poll() is None, (folder / "log").read_text()[-2000:]
        # In the middle of a case: SIGTERM would give it time to end.
        first.send_signal(signal.SIGKILL)
        first.wait()
        subprocess.run(arguments, cwd=ROOT, env=environment, stdout=log, stderr=log, timeout=300)
    return folder


def tried(folder: Path) -> dict[str, int]:
    """Units tried so far, by trial."""
    state = folder / "state.json"
    content = json.loads(state.read_text()) if state.exists() else {"trials": {}}
    return {name: record["tried"] for name, record in content["trials"].items()}


def test_a_run_withstands_damaged_files_and_the_readers_hostile_ones(out: Path) -> None:
    rows = json.loads((out / "figures.json").read_text())
    faults = [
        fault
        for record in json.loads((out / "state.json").read_text())["trials"].values()
        for fault in record["faults"]
    ]
    assert faults == [] and all(row["faults"] == "0" for row in rows)
    assert tried(out) == {
        Damages.name: COUNTS["damages"],
        "hostile files": COUNTS["mutants"],
        "overrides": COUNTS["overrides"],
    }
    assert "| damaged files of a run | 5 | 5 |" in (out / "figures.md").read_text()


def hostile(seed: int, number: int) -> Outcome:
    """Cases that are fine, raise, and kill their process."""
    if number == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    if number == 2:
        raise KeyError("foreign")
    return Outcome(f"of seed {seed}")


def test_cases_in_children_are_counted_though_one_of_them_kills_its_process(tmp_path: Path) -> None:
    trial = trials.InChildren(tmp_path, 5, "hostile", "files", hostile, together=3)
    outcomes = [trial.case(number, 8 - number) for number in range(8)]
    results = [outcome.result for outcome in outcomes]
    assert results.count("of seed 5") == 6
    assert results[2] == "foreign error" and "KeyError: 'foreign'" in outcomes[2].says
    assert results[4] == "hangs or dies" and "status -9" in outcomes[4].says

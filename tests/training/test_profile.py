"""Profiler traces: planned ones, those asked for, one that the end of the training cuts off."""

import threading
import time
from pathlib import Path

import jax

from relay_jax.runtime.files import read_jsonl
from relay_jax.stage import Stage
from relay_jax.training.profile import REQUEST
from tests.training.test_loop import stage_of
from tests.training.test_report import wait


def traces(folder: Path) -> list[str]:
    return sorted(
        path.parent.name
        for path in (folder / "profile").rglob("*.xplane.pb")
        if path.stat().st_size
    )


def test_a_planned_trace_appears(tmp_path: Path, base: Stage, lines: list[str]) -> None:
    wait(tmp_path, base, log__profile_first=2, log__profile_steps=2)
    assert traces(tmp_path) == ["step_2"]
    assert sum("profiler trace of 2 steps" in line for line in lines) == 1


def test_a_trace_is_taken_of_a_running_training_when_the_file_is_touched(
    tmp_path: Path, lines: list[str]
) -> None:
    def ask() -> None:
        while not read_jsonl(tmp_path / "metrics.jsonl"):
            time.sleep(0.01)
        (tmp_path / REQUEST).touch()

    asking = threading.Thread(target=ask)
    asking.start()
    wait(tmp_path, stage_of(960, "base"))
    asking.join()
    assert len(traces(tmp_path)) == 1 and not (tmp_path / REQUEST).exists()


def test_a_trace_that_the_end_cuts_off_is_still_written(tmp_path: Path, base: Stage) -> None:
    wait(tmp_path, base, log__profile_first=6, log__profile_steps=10)
    assert traces(tmp_path) == ["step_6"]
    jax.profiler.start_trace(tmp_path / "another")  # none is running any more
    jax.profiler.stop_trace()

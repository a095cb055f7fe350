"""What a training tells: rates, FLOPs, the loader's share, starts, traces, the summary; and
what the loop costs itself.

Steps that only wait stand in for training where no number of theirs is looked at.
"""

import json
import threading
import time
from pathlib import Path
from unittest import mock

import jax
import numpy as np
import pytest
from absl import logging

from benchmarks import loop as benchmark
from relay_jax.config import Stage
from relay_jax.data.source import SyntheticShapes
from relay_jax.planning.plan import train_flops
from relay_jax.runtime import logs
from relay_jax.runtime.logs import read_jsonl
from relay_jax.training import loop
from relay_jax.training import report as progress
from relay_jax.training.profile import REQUEST
from tests.conftest import mesh_of
from tests.runtime.test_logs import events
from tests.training.test_loop import SETTINGS, stage_of, train

STEP_SECONDS = 0.03


@pytest.fixture(scope="module")
def base() -> Stage:
    return stage_of(96, "base")


class SlowShapes(SyntheticShapes):
    """Each image takes a while."""

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        time.sleep(0.005)
        return super().__getitem__(position)


def wait(
    folder: Path,
    stage: Stage,
    seconds: float = STEP_SECONDS,
    devices: int = 1,
    source: SyntheticShapes | None = None,
    **settings: object,
) -> None:
    """Trains with steps that only wait."""
    with mock.patch.object(loop, "make_train_step", benchmark.waiting_step(seconds, [])):
        train(folder, stage, mesh_of(devices), source, **settings)


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed."""
    lines: list[str] = []

    def info(text: object, *values: object) -> None:
        if isinstance(text, str):  # Orbax tells dictionaries
            lines.append(text % values if values else text)

    monkeypatch.setattr(logging, "info", info)
    return lines


# FLOPs


class Counted(Exception):
    pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_counts_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    class Spy(progress.StageProgress):
        def __setattr__(self, name: str, value: object) -> None:
            if name == "step_flops" and value is not None:
                raise Counted(value)  # before anything is compiled
            super().__setattr__(name, value)

    stage = stage_of(32, "base", accumulate=accumulate)
    monkeypatch.setattr(loop, "StageProgress", Spy)
    with pytest.raises(Counted) as counted:
        train(tmp_path, stage, mesh_of(8))
    assert counted.value.args[0] == train_flops(stage) * stage.train.batch > 0


@pytest.mark.parametrize("devices", [1, 8])
def test_flops_are_those_of_one_device(
    tmp_path: Path, base: Stage, monkeypatch: pytest.MonkeyPatch, devices: int
) -> None:
    class Known(progress.StageProgress):
        step_flops = property(
            lambda self: 16 * 10**9, lambda self, value: None
        )  # 1 GFLOP for each image

    monkeypatch.setattr(loop, "StageProgress", Known)
    monkeypatch.setattr(progress, "peak_flops", lambda kind: 1e12 if kind == "cpu" else None)
    wait(tmp_path, base, devices=devices)
    for line in read_jsonl(tmp_path / "metrics.jsonl"):
        each = line["images_per_second"] * 1e9 / devices
        assert line["tflops_per_device"] == pytest.approx(each / 1e12, abs=2e-6)
        assert line["utilisation"] == pytest.approx(each / 1e12, abs=1e-4) and each > 0


def test_utilisation_is_said_where_the_peak_is_known_alone(
    tmp_path: Path, base: Stage, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(tmp_path / "unknown", base)
    assert not any("of the peak" in line for line in said) and any(
        "FLOP/s per device, loader" in line for line in said
    )
    assert "utilisation" not in read_jsonl(tmp_path / "unknown" / "metrics.jsonl")[0]
    monkeypatch.setattr(progress, "peak_flops", lambda _: 1e9)
    wait(tmp_path / "known", base)
    assert any("of the peak), loader" in line for line in said)
    assert "utilisation" in read_jsonl(tmp_path / "known" / "metrics.jsonl")[0]


# The loader


def test_the_loader_is_blamed_where_it_is_slow_and_not_where_it_is_not(
    tmp_path: Path, base: Stage
) -> None:
    shapes = dict(resolution=8, size=64, seed=0)
    wait(tmp_path / "slow", base, 0.005, source=SlowShapes(**shapes))  # 80 ms for each batch of 16
    wait(tmp_path / "fast", base, 0.1, source=SyntheticShapes(**shapes))
    slow, fast = (
        json.loads((tmp_path / name / "training.json").read_text())["loader_share"]
        for name in ("slow", "fast")
    )
    assert slow > 0.4 and fast < slow / 2


# Summary


def test_a_curve_is_summed_up_by_hand() -> None:
    lines = [
        {
            "images": 100,
            "images_per_second": 10.0,
            "tflops_per_device": 1.0,
            "utilisation": 0.1,
            "steps_skipped": 0,
            "loader_share": 0.8,
            "loss": 3.0,
        },  # 10 s
        {
            "images": 200,
            "images_per_second": 100.0,
            "tflops_per_device": 10.0,
            "utilisation": 0.5,
            "steps_skipped": 0,
            "loader_share": 0.0,
            "loss": 2.0,
        },  # 1 s
        {"images": 200, "fid": 5.0},  # an evaluation
        {
            "images": 300,
            "images_per_second": 50.0,
            "tflops_per_device": 5.0,
            "utilisation": 0.3,
            "steps_skipped": 4,
            "loader_share": 0.5,
        },
    ]  # 2 s, no step was finite
    assert logs.curve_summary(lines) == {
        "images_per_second": 50.0,
        "tflops_per_device": 5.0,
        "utilisation": 0.3,
        "loader_share": round(9 / 13, 4),
        "steps_skipped": 4,
        "loss": 2.0,
    }
    assert logs.curve_summary([])["loss"] is None


def test_a_stage_in_two_starts_is_summed_up_as_one(tmp_path: Path, said: list[str]) -> None:
    for images, about in (
        (48, {"config": {"seed": 0}}),
        (96, {"config": {"seed": 0}, "environment": {"git": "abc"}}),
    ):
        wait(tmp_path, stage_of(images, "base"), about=about)
    summary = json.loads((tmp_path / "training.json").read_text())
    rates = [line["images_per_second"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(rates) == 6 and summary["images_per_second"] == np.median(rates)
    assert summary["seconds"] >= round(6 * STEP_SECONDS, 1)
    assert [
        summary[key]
        for key in ("stage", "images", "steps", "starts", "steps_skipped", "loss", "utilisation")
    ] == ["base", 96, 6, 2, 0, 1.0, None]
    assert (tmp_path / summary["checkpoint"] / "train").is_dir()
    assert said[-1].startswith("stage base is trained: 96 images in ") and said[-1].endswith(
        "checkpoints/6"
    )
    starts = read_jsonl(tmp_path / "starts.jsonl")
    assert [start["images"] for start in starts] == [0, 48] and starts[1]["environment"] == {
        "git": "abc"
    }


def test_the_record_of_a_start_is_in_the_event_file(tmp_path: Path, base: Stage) -> None:
    wait(tmp_path, base, about={"config": {"seed": 7}, "environment": {"git": "abc"}})
    tags = {value.tag.split("/")[0] for event in events(tmp_path) for value in event.summary.value}
    assert {"config", "environment", "loss", "loader_share", "tflops_per_device"} <= tags


# Checkpoints that stay


def test_a_checkpoint_stays_for_each_multiple_of_images(tmp_path: Path) -> None:
    wait(
        tmp_path,
        stage_of(160, "base"),
        0.0,
        checkpoint_every_images=64,
        keep=1,
        keep_every_images=40,
    )
    # 16 images per step: 40, 80, 120 and 160 images are reached in steps 3, 5, 8 and 10; 10 is
    # the newest as well
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 5, 8, 10]


# Traces


def traces(folder: Path) -> list[str]:
    return sorted(
        path.parent.name
        for path in (folder / "profile").rglob("*.xplane.pb")
        if path.stat().st_size
    )


def test_a_planned_trace_appears(tmp_path: Path, base: Stage, said: list[str]) -> None:
    wait(tmp_path, base, profile_first=2)
    assert traces(tmp_path) == ["step_2"]
    assert sum("profiler trace of 2 steps" in line for line in said) == 1


def test_a_trace_is_taken_of_a_running_training_when_the_file_is_touched(
    tmp_path: Path, said: list[str]
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
    wait(tmp_path, base, profile_first=6, profile_steps=10)
    assert traces(tmp_path) == ["step_6"]
    jax.profiler.start_trace(tmp_path / "another")  # none is running any more
    jax.profiler.stop_trace()


# The loop's own cost


@pytest.mark.skipif(
    not hasattr(time, "pthread_getcpuclockid"), reason="needs the processor time of a thread"
)
def test_the_loop_costs_less_than_two_percent_of_a_long_step(base: Stage) -> None:
    def measured() -> float:
        idle = benchmark.measure(
            base,
            SyntheticShapes(8, 64, 0),
            steps=40,
            step_seconds=0.02,
            report_every=10,
            save_every=100,
        )
        assert len(idle.gaps) == 39 and idle.after_report.sum() == 3
        return float(np.median(idle.work))

    # Of a step of 200 ms; gaps hold waits for the interpreter's lock. Up to three times: other
    # tests run beside this one.
    assert any(measured() < 0.02 * 0.2 for _ in range(3))


def test_settings_of_these_tests_are_complete() -> None:
    assert loop.LoopSettings(**SETTINGS).about == {}

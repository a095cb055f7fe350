"""Reports: rates, FLOPs, the loader's share, the record of starts, the summary, a full disk.

Steps that only wait stand in for training where no number of theirs is looked at.
"""

import json
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import pytest

from benchmarks import loop as benchmark
from relay_jax.errors import StorageError
from relay_jax.planning.cost import train_flops
from relay_jax.runtime.files import read_jsonl
from relay_jax.stage import Stage
from relay_jax.training import loop, report
from tests.conftest import mesh_of
from tests.runtime.test_logs import events
from tests.training.test_loop import stage_of, train

STEP_SECONDS = 0.03


def wait(
    folder: Path,
    stage: Stage,
    seconds: float = STEP_SECONDS,
    devices: int = 1,
    **changes: object,
) -> None:
    """Trains with steps that only wait."""
    with mock.patch.object(loop, "make_train_step", benchmark.waiting_step(seconds, [])):
        train(folder, stage, mesh_of(devices), **changes)


# FLOPs


class Counted(Exception):
    pass


@pytest.mark.parametrize("accumulate", [1, 2])
def test_the_loop_counts_what_the_plan_says(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, accumulate: int
) -> None:
    class Spy(report.StageProgress):
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
    class Known(report.StageProgress):
        step_flops = property(
            lambda self: 16 * 10**9, lambda self, value: None
        )  # 1 GFLOP for each image

    monkeypatch.setattr(loop, "StageProgress", Known)
    monkeypatch.setattr(report, "peak_flops", lambda kind: 1e12 if kind == "cpu" else None)
    wait(tmp_path, base, devices=devices)
    for line in read_jsonl(tmp_path / "metrics.jsonl"):
        each = line["images_per_second"] * 1e9 / devices
        assert line["tflops_per_device"] == pytest.approx(each / 1e12, abs=2e-6)
        assert line["utilisation"] == pytest.approx(each / 1e12, abs=1e-4) and each > 0


def test_utilisation_is_said_where_the_peak_is_known_alone(
    tmp_path: Path, base: Stage, lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    wait(tmp_path / "unknown", base)
    assert not any("of the peak" in line for line in lines) and any(
        "FLOP/s per device, loader" in line for line in lines
    )
    assert "utilisation" not in read_jsonl(tmp_path / "unknown" / "metrics.jsonl")[0]
    monkeypatch.setattr(report, "peak_flops", lambda _: 1e9)
    wait(tmp_path / "known", base)
    assert any("of the peak), loader" in line for line in lines)
    assert "utilisation" in read_jsonl(tmp_path / "known" / "metrics.jsonl")[0]


# The loader


def test_the_loader_is_blamed_for_the_time_that_the_loop_waits_for_it(
    tmp_path: Path, base: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = iter([0.0, 1.0, 4.0, 5.0, 10.0, 20.0])  # 3 of 5 s, then nothing of 10 s
    monkeypatch.setattr(
        report, "time", SimpleNamespace(monotonic=lambda: next(clock), time=lambda: 0.0)
    )
    one, state = np.float32(1), SimpleNamespace(nonfinite_total=np.int32(0))
    metrics = [{"loss": one, "gradient_norm": one, "finite": one}]
    with report.StageProgress(base, mesh_of(1), tmp_path, 0) as progress:
        with progress.waiting():
            pass
        progress.report(16, state, metrics, False)
        progress.report(32, state, metrics, False)
    shares = [line["loader_share"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert shares == [0.6, 0.0]


# Summary


def test_a_stage_in_two_starts_is_summed_up_as_one(tmp_path: Path, lines: list[str]) -> None:
    for images in (48, 96):
        wait(tmp_path, stage_of(images, "base"))
    summary = json.loads((tmp_path / "training.json").read_text())
    rates = [line["images_per_second"] for line in read_jsonl(tmp_path / "metrics.jsonl")]
    assert len(rates) == 6 and summary["images_per_second"] == np.median(rates)
    assert summary["seconds"] >= round(6 * STEP_SECONDS, 1)
    assert [
        summary[key]
        for key in ("stage", "images", "steps", "starts", "steps_skipped", "loss", "utilisation")
    ] == ["base", 96, 6, 2, 0, 1.0, None]
    assert (tmp_path / summary["checkpoint"] / "train").is_dir()
    assert lines[-1].startswith("stage base is trained: 96 images in ") and lines[-1].endswith(
        "checkpoints/6"
    )
    starts = read_jsonl(tmp_path / "starts.jsonl")
    assert [start["images"] for start in starts] == [0, 48]
    assert starts[1]["config"]["seed"] == 0 and starts[1]["environment"]["devices"]


def test_the_record_of_a_start_is_in_the_event_file(tmp_path: Path, base: Stage) -> None:
    wait(tmp_path, base)
    tags = {value.tag.split("/")[0] for event in events(tmp_path) for value in event.summary.value}
    assert {"config", "environment", "loss", "loader_share", "tflops_per_device"} <= tags


def test_a_table_of_the_network_stands_at_the_beginning(
    tmp_path: Path, base: Stage, lines: list[str]
) -> None:
    wait(tmp_path, base)
    [table] = [line for line in lines if "enc_8x8_conv" in line]
    assert table.startswith("stage base:\n  part ")


def test_a_full_disk_is_one_line_that_says_so(tmp_path: Path, base: Stage) -> None:
    """/dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    progress = report.StageProgress(base, mesh_of(1), tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device") as error, progress:
        progress.scores(16, {"fid": 1.0})
    assert error.value.status == 1 and "\n" not in str(error.value)

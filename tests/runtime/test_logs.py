"""Logs: durations, rates by a clock of the test, gapless curves after a kill, a full disk."""

import io
import json
import math
import os
import re
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image

from relay_jax.errors import StorageError
from relay_jax.runtime import counting, distributed
from relay_jax.runtime.files import read_jsonl
from relay_jax.runtime.logs import (
    Count,
    Progress,
    ScalarLog,
    curve_summary,
    duration,
    fail,
    read_curve,
)


@pytest.mark.parametrize(
    "seconds, text",
    [
        (0, "0:00"),
        (9.4, "0:09"),
        (59.6, "1:00"),
        (61, "1:01"),
        (3599.4, "59:59"),
        (3599.6, "1:00:00"),
        (3723, "1:02:03"),
        (100 * 3600, "100:00:00"),
        (math.inf, "?"),
        (math.nan, "?"),
    ],
)
def test_durations_are_hours_minutes_and_seconds(seconds: float, text: str) -> None:
    assert duration(seconds) == text


# Progress


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed."""
    printed: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *values: printed.append(text % values))
    return printed


def test_rates_are_of_the_last_interval_and_the_time_left_leaves_out_the_first(
    lines: list[str],
) -> None:
    times: Iterator[float] = iter([100.0, 160.0, 170.0, 174.0])
    progress = Progress("stage base", total=10_000, clock=lambda: next(times))
    assert progress.line(600) == 10  # a minute, compilation included
    assert progress.line(1600, "loss 0.5") == 100
    assert progress.line(2600) == 250
    assert lines == [
        "stage base: 600 of 10,000 images, 10 img/s, 15:40 left",  # 9400 / 10
        "stage base: 1,600 of 10,000 images, loss 0.5, 100 img/s, 1:24 left",  # 8400 / 100
        "stage base: 2,600 of 10,000 images, 250 img/s, 0:52 left",
    ]  # 7400 / (2000 / 14)


def test_what_follows_from_the_rate_is_said_beside_it(lines: list[str]) -> None:
    times = iter([0.0, 10.0])
    progress = Progress(
        "x", total=1000, clock=lambda: next(times), of_rate=lambda rate: f"{2 * rate:g} FLOP/s"
    )
    progress.line(500, "loss 1")
    assert lines == ["x: 500 of 1,000 images, loss 1, 50 img/s, 100 FLOP/s, 0:10 left"]


def test_a_continued_run_counts_only_its_own_images(lines: list[str]) -> None:
    times = iter([0.0, 10.0, 20.0])
    progress = Progress("sample", total=1000, done=800, clock=lambda: next(times))
    assert progress.line(900) == 10
    assert progress.line(1000) == 10
    assert lines[-1].endswith("10 img/s, 0:00 left")


def test_a_steady_loop_tells_its_rate_since_the_beginning(lines: list[str]) -> None:
    times = iter([0.0, 10.0, 10.5])
    progress = Progress("sample", total=300, done=100, clock=lambda: next(times), steady=True)
    assert progress.line(200) == 10
    assert progress.line(300) == pytest.approx(200 / 10.5)  # the second half was waiting already
    assert lines[0] == "sample: 200 of 300 images, 10 img/s, 0:10 left"


def test_what_has_no_known_end_says_how_much_is_done(
    lines: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(counting, "_show", None)
    with counting.counting("listing x") as add:  # of a library: nobody shows it
        add(1)
    counting.show_by(Count)
    assert list(counting.counted("abc", "a short loop")) == ["a", "b", "c"]
    assert not lines
    count = Count("listing x", None, "images")
    monkeypatch.setattr(count, "_every", -1.0)
    count.update(1200)
    whole = Count("hashing a.pt", 12.5, "MB")
    monkeypatch.setattr(whole, "_every", -1.0)
    whole.update(5.1)
    assert re.fullmatch(r"listing x: 1,200 images, \S+ images/s", lines[0]), lines
    assert re.fullmatch(r"hashing a.pt: 5 of 12 MB, \S+ MB/s, 0:00 left", lines[1]), lines


def test_no_progress_and_no_time_are_no_errors(lines: list[str]) -> None:
    progress = Progress("x", total=10, clock=lambda: 5.0)
    assert progress.line(0) == 0
    assert lines[-1].endswith("0 img/s, ? left")
    assert progress.line(1) > 0


# Scalars


def write(folder: Path, resume_at: int, images: list[int], value: float) -> None:
    log = ScalarLog(folder, resume_at)
    for n in images:
        log.write(n, {"loss": value})
    log.close()


def curve(folder: Path) -> list[tuple[int, float]]:
    return [(line["images"], line["loss"]) for line in read_jsonl(folder / "metrics.jsonl")]


def test_a_continued_run_leaves_one_gapless_curve(tmp_path: Path) -> None:
    folder = tmp_path / "base"
    write(folder, 0, [64, 128, 192, 256], 1.0)
    write(folder, 128, [192, 256, 320], 2.0)  # killed after 256, its last checkpoint was at 128
    assert curve(folder) == [(64, 1.0), (128, 1.0), (192, 2.0), (256, 2.0), (320, 2.0)]
    assert all(line["time"] > 0 for line in read_jsonl(folder / "metrics.jsonl"))
    assert list(folder.glob("events.out.tfevents*")) and not list(folder.glob("*.tmp"))


def test_half_a_line_of_a_killed_run_is_dropped(tmp_path: Path) -> None:
    write(tmp_path, 0, [64, 128], 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"images": 192, "lo')
    assert curve(tmp_path) == [(64, 1.0), (128, 1.0)]
    write(tmp_path, 192, [256], 2.0)
    assert curve(tmp_path) == [(64, 1.0), (128, 1.0), (256, 2.0)]
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


def test_a_run_from_the_start_drops_the_old_curve(tmp_path: Path) -> None:
    write(tmp_path, 0, [64, 128], 1.0)
    write(tmp_path, 0, [32], 2.0)
    assert curve(tmp_path) == [(32, 2.0)]


def events(folder: Path) -> list:
    """The records of the one event file: length, its checksum, protocol buffer, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    [path] = folder.glob("events.out.tfevents*")
    data, records = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        records.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return records


def test_scalars_pictures_and_texts_can_be_read_from_the_event_file(tmp_path: Path) -> None:
    log, values = ScalarLog(tmp_path, 0), {"seed": 3, "stages": {"base": {"batch": 32}}}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    log.text(0, "config", values)
    log.write(64, {"loss": 0.25})
    log.picture(64, "samples", pixels)
    log.close()
    shown = {
        (value.tag, event.step): value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert len(shown) == 3 and shown["loss", 64].simple_value == 0.25
    np.testing.assert_array_equal(
        Image.open(io.BytesIO(shown["samples", 64].image.encoded_image_string)), pixels
    )
    text = next(
        value for (tag, step), value in shown.items() if tag.startswith("config") and step == 0
    )
    assert text.metadata.plugin_data.plugin_name == "text"
    words = text.tensor.string_val[0].decode()
    assert (
        words.startswith("```json\n")
        and json.loads(words.removeprefix("```json").removesuffix("```")) == values
    )


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "is_first", lambda: False)
    write(tmp_path / "base", 0, [64], 1.0)
    log = ScalarLog(tmp_path / "base", 0)
    log.picture(64, "samples", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert not (tmp_path / "base").exists()


@pytest.mark.parametrize(
    "line",
    ["7", '{"images": "x"}', '{"loss": 1.0}', '{"images": 64, "loss": [1]}', "\x00"]
    + ['{"images": 64, "loss": 1' + "0" * 400 + "}", '{"images": true}', '{"images": -1}'],
)
def test_a_line_that_is_no_measure_is_set_aside_and_the_curve_goes_on(
    tmp_path: Path, line: str
) -> None:
    write(tmp_path, 0, [64, 128], 1.0)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    assert [x["images"] for x in read_curve(tmp_path / "metrics.jsonl")] == [64, 128]
    write(tmp_path, 128, [192], 1.0)
    assert [x["images"] for x in read_curve(tmp_path / "metrics.jsonl")] == [64, 128, 192]
    assert line in (tmp_path / "metrics.jsonl.damaged-1").read_text()


# What is printed


def printed_by(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", "from relay_jax.runtime.logs import *\n" + script],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    return done.stderr


def test_errors_are_one_line_of_less_than_400_characters(
    capsys: pytest.CaptureFixture[str],
) -> None:
    for text in ("short", "begin " + "x" * 10**6 + "\nwhat to do", KeyError("k" * 500)):
        with pytest.raises(SystemExit):
            fail(text)
        line = capsys.readouterr().err
        assert line.startswith("error: ") and line.endswith("\n") and line.count("\n") == 1
        assert len(line) < 400
        if "begin" in str(text):
            assert "begin" in line and "what to do" in line


def test_a_thread_that_cannot_write_says_nothing_and_other_failures_are_shown() -> None:
    script = (
        "import threading\nquieten()\ndef fail(error): raise error\n"
        "for e in (OSError(28, 'full'), KeyError('mine')):\n"
        "    t = threading.Thread(target=fail, args=(e,)); t.start(); t.join()\n"
    )
    output = printed_by(script)
    assert "KeyError: 'mine'" in output and "full" not in output


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
    assert curve_summary(lines) == {
        "images_per_second": 50.0,
        "tflops_per_device": 5.0,
        "utilisation": 0.3,
        "loader_share": round(9 / 13, 4),
        "steps_skipped": 4,
        "loss": 2.0,
    }
    assert curve_summary([])["loss"] is None


def test_a_full_disk_is_one_line_and_status_1(tmp_path: Path) -> None:
    """/dev/full takes no byte."""
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    log = ScalarLog(tmp_path, 0)
    (tmp_path / "metrics.jsonl").unlink()
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with pytest.raises(StorageError, match="No space left on device") as error:
        log.write(16, {"loss": 1.0})
    assert error.value.status == 1 and "\n" not in str(error.value)
    log.close()


def test_an_event_file_that_cannot_be_written_ends_the_run_instead_of_blocking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = ScalarLog(tmp_path, 0)
    worker = log._events.file_writer.event_writer._worker
    worker.stop()  # as after an error in it
    with pytest.raises(StorageError, match="event file"):
        log.write(16, {"loss": 1.0})
    with pytest.raises(StorageError, match="event file"):
        log.close()

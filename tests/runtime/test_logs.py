"""Logs: durations, rates by a clock of our own, gapless curves after a kill, whole files or
none."""

import io
import json
import math
import struct
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from absl import logging
from PIL import Image

from relay_jax.runtime import logs
from relay_jax.runtime.logs import (
    Progress,
    ScalarLog,
    append_jsonl,
    duration,
    read_jsonl,
    write_json,
    write_png,
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
    data, found = path.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_scalars_pictures_and_texts_can_be_read_from_the_event_file(tmp_path: Path) -> None:
    log, told = ScalarLog(tmp_path, 0), {"seed": 3, "stages": {"base": {"batch": 32}}}
    pixels = np.random.default_rng(0).integers(0, 256, (4, 5, 3), np.uint8)
    log.text(0, "config", told)
    log.write(64, {"loss": 0.25})
    log.picture(64, "samples", pixels)
    log.close()
    found = {
        (value.tag, event.step): value
        for event in events(tmp_path)
        for value in event.summary.value
    }
    assert len(found) == 3 and found["loss", 64].simple_value == 0.25
    np.testing.assert_array_equal(
        Image.open(io.BytesIO(found["samples", 64].image.encoded_image_string)), pixels
    )
    text = next(
        value for (tag, step), value in found.items() if tag.startswith("config") and step == 0
    )
    assert text.metadata.plugin_data.plugin_name == "text"
    shown = text.tensor.string_val[0].decode()
    assert (
        shown.startswith("```json\n")
        and json.loads(shown.removeprefix("```json").removesuffix("```")) == told
    )


def test_a_line_is_added_to_a_file_that_stays_whole(tmp_path: Path) -> None:
    path = tmp_path / "stage" / "starts.jsonl"
    append_jsonl(path, {"images": 0})
    with path.open("a") as file:
        file.write('{"images": 6')
    append_jsonl(path, {"images": 64})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"images": 0},
        {"images": 64},
    ]


def test_other_processes_write_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logs, "is_writer", lambda: False)
    write(tmp_path / "base", 0, [64], 1.0)
    log = ScalarLog(tmp_path / "base", 0)
    log.picture(64, "samples", np.zeros((4, 4, 3), np.uint8))
    log.close()
    assert not (tmp_path / "base").exists()


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []


# Whole files


def test_json_is_written_whole_and_replaces_the_old(tmp_path: Path) -> None:
    path = tmp_path / "new" / "summary.json"
    for value in ({"a": [1, 2]}, {"b": None}):
        write_json(path, value)
        assert json.loads(path.read_text()) == value
        assert [file.name for file in path.parent.iterdir()] == ["summary.json"]


def test_pictures_are_written_whole_and_lossless(tmp_path: Path) -> None:
    path = tmp_path / "grids" / "000000000064.png"
    pixels = np.random.default_rng(0).integers(0, 256, (5, 7, 3), np.uint8)
    write_png(path, pixels)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(np.asarray(image), pixels)
    assert [file.name for file in path.parent.iterdir()] == [path.name]


def test_what_cannot_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "summary.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "summary.json", {"a": object()})
    assert json.loads((tmp_path / "summary.json").read_text()) == {"a": 1}
    write_png(tmp_path / "x.png", np.zeros((2, 2, 3), np.uint8))
    before = (tmp_path / "x.png").read_bytes()
    with pytest.raises(TypeError):
        write_png(tmp_path / "x.png", np.zeros((2, 2, 5), np.uint8))
    assert (tmp_path / "x.png").read_bytes() == before

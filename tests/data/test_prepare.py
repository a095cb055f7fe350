"""A preparation may be stopped at any moment: the same files come out in the end."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from absl import logging as absl_logging

from relay_jax.data import prepare as module
from relay_jax.data.packed import PackedDataset, read_manifest
from relay_jax.data.prepare import prepare
from relay_jax.data.source import DataError, SyntheticShapes
from tests.conftest import content, error_of

SET = SyntheticShapes(16, 22, 1)
OPTIONS: dict[str, Any] = {
    "description": {"source": "synthetic", "size": 22},
    "shard_images": 4,
    "threads": 2,
}
ROOT = Path(__file__).parents[2]


class Recorded:
    """SET, noting what is read; `broken` cannot be, and `slow` seconds pass for each image."""

    num_classes, class_names = SET.num_classes, SET.class_names

    def __init__(self, broken: int = -1, slow: float = 0.0) -> None:
        self.read: list[int] = []
        self.broken, self.slow, self._lock = broken, slow, threading.Lock()

    def __len__(self) -> int:
        return len(SET)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        time.sleep(self.slow)
        with self._lock:
            self.read.append(position)
        if position == self.broken:
            raise DataError(
                f"images/{position}.jpg: cannot decode this image; replace or remove it"
            )
        return SET[position]


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    found: list[str] = []
    for name in ("info", "warning"):
        monkeypatch.setattr(absl_logging, name, lambda text, *values: found.append(text % values))
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An uninterrupted preparation."""
    out = tmp_path_factory.mktemp("whole") / "set"
    prepare(SET, [8, 16], out, **OPTIONS)
    return out


def test_the_folder_holds_shards_by_resolution_their_checksums_and_a_description(
    whole: Path,
) -> None:
    names = [f"{n:05d}-of-00006.array_record" for n in range(6)]
    for resolution in (8, 16):
        expected = sorted([*names, *(f"{name}.json" for name in names)])
        assert sorted(path.name for path in (whole / str(resolution)).iterdir()) == expected
    manifest = json.loads((whole / "dataset.json").read_text())
    assert manifest == read_manifest(whole)
    shards = manifest.pop("shards")
    assert manifest == {
        "version": 1,
        "complete": True,
        "source": {"source": "synthetic", "size": 22},
        "images": 22,
        "class_names": list(SET.class_names),
        "resolutions": [8, 16],
        "shard_images": 4,
    }
    for resolution, files in shards.items():
        assert [shard["images"] for shard in files] == [4, 4, 4, 4, 4, 2]
        for shard, name in zip(files, names, strict=True):
            raw = (whole / shard["file"]).read_bytes()
            assert shard["file"] == f"{resolution}/{name}"
            assert (shard["bytes"], shard["sha256"]) == (len(raw), hashlib.sha256(raw).hexdigest())
            assert json.loads((whole / f"{shard['file']}.json").read_text()) == shard


@pytest.mark.parametrize("threads", [0, 1, 5])
def test_the_files_do_not_depend_on_the_threads(whole: Path, tmp_path: Path, threads: int) -> None:
    prepare(SET, (16, 8, 8), tmp_path, **OPTIONS | {"threads": threads})
    assert content(tmp_path) == content(whole)


def test_an_unreadable_image_is_named_and_finished_files_stay(whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "set"
    message = error_of(lambda: prepare(Recorded(broken=14), [8, 16], out, **OPTIONS))
    assert message == "images/14.jpg: cannot decode this image; replace or remove it"
    kept = content(out)
    assert sorted(name for name in kept if name.startswith("8/") and name.endswith("record")) == [
        f"8/{n:05d}-of-00006.array_record" for n in range(3)
    ]
    assert not [name for name in kept if name.endswith(".tmp")]
    assert "has not finished" in error_of(lambda: PackedDataset(out, 8))

    again = Recorded()
    prepare(again, [8, 16], out, **OPTIONS)
    assert sorted(again.read) == list(range(12, 22))
    assert content(out) == content(whole)


def test_stopped_between_two_images_it_leaves_no_half_file(whole: Path, tmp_path: Path) -> None:
    class Stopped(Exception):
        pass

    images = iter(range(9))

    def each() -> None:
        if next(images, None) is None:
            raise Stopped

    with pytest.raises(Stopped):
        prepare(SET, [8, 16], tmp_path, **OPTIONS, each=each)
    kept = content(tmp_path)
    assert (
        len([name for name in kept if name.endswith(".array_record")]) == 4
        and "8/00002-of-00006.tmp" not in kept
    )
    prepare(SET, [8, 16], tmp_path, **OPTIONS)
    assert content(tmp_path) == content(whole)


def test_killed_at_any_moment_it_goes_on_to_the_same_files(whole: Path, tmp_path: Path) -> None:
    script = (
        "from tests.data.test_prepare import *; print('ready', flush=True);"
        f"prepare(Recorded(slow=0.05), [8, 16], Path({str(tmp_path)!r}), **OPTIONS)"
    )
    for wait in (0.0, 0.15, 0.15):
        environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
        with subprocess.Popen(
            [sys.executable, "-c", script], stdout=subprocess.PIPE, env=environment
        ) as process:
            assert process.stdout is not None and process.stdout.readline() == b"ready\n"
            time.sleep(wait)
            process.send_signal(signal.SIGKILL)
    prepare(SET, [8, 16], tmp_path, **OPTIONS)
    assert {k: v for k, v in content(tmp_path).items() if not k.endswith(".tmp")} == content(whole)


@pytest.mark.parametrize(
    "defect", ["no note", "bad note", "truncated", "flipped", "gone", "half-written"]
)
def test_a_file_that_is_not_whole_is_made_again_and_no_other(
    whole: Path, tmp_path: Path, lines: list[str], defect: str
) -> None:
    prepare(SET, [8, 16], tmp_path, **OPTIONS)
    file = tmp_path / "16" / "00002-of-00006.array_record"
    note = tmp_path / "16" / "00002-of-00006.array_record.json"
    raw = file.read_bytes()
    if defect == "no note":
        note.unlink()
    elif defect == "bad note":
        note.write_text("{")
    elif defect == "truncated":
        file.write_bytes(raw[:100])
    elif defect == "flipped":
        file.write_bytes(raw[:100] + bytes([raw[100] ^ 1]) + raw[101:])
    else:
        file.unlink()
        if defect == "half-written":
            note.unlink()
            (tmp_path / "16" / "00002-of-00006.tmp").write_bytes(raw[:100])
    again = Recorded()
    prepare(again, [8, 16], tmp_path, **OPTIONS)
    assert sorted(again.read) == [8, 9, 10, 11]
    assert content(tmp_path) == content(whole)
    assert any(f"{file} is damaged" in line for line in lines) == (
        defect in ("truncated", "flipped")
    )


def test_a_finished_set_is_checked_and_nothing_is_read_or_written(
    tmp_path: Path, lines: list[str]
) -> None:
    first = prepare(SET, [8], tmp_path, **OPTIONS)
    times = {file: file.stat().st_mtime_ns for file in (tmp_path / "8").iterdir()}
    again = Recorded()
    assert prepare(again, [8], tmp_path, **OPTIONS) == first
    assert not again.read and times == {
        file: file.stat().st_mtime_ns for file in (tmp_path / "8").iterdir()
    }
    assert "22 of 22 images are there" in lines[-2]


def test_progress_says_how_far_how_fast_and_how_long(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lines: list[str]
) -> None:
    monkeypatch.setattr(module, "PROGRESS_SECONDS", 0.0)
    prepare(SET, [8, 16], tmp_path, **OPTIONS)
    assert (
        lines[0].startswith("prepare: 1 of 22 images, ")
        and "img/s" in lines[0]
        and lines[0].endswith(" left")
    )
    assert lines[-2].startswith("prepare: 22 of 22 images, ") and lines[-2].endswith("0:00 left")
    assert f"--config.dataset.source=packed --config.dataset.path={tmp_path}" in lines[-1]

"""A preparation may be stopped at any moment: the same files come out in the end."""

import fcntl
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

from relay_jax.data import packed
from relay_jax.data.folder import ImageFolder
from relay_jax.data.identity import identify
from relay_jax.data.images import ImageSource
from relay_jax.data.packed import PackedDataset, read_manifest
from relay_jax.data.prepare import prepare
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import DataError, Stopped, StorageError
from tests.conftest import content, error_of
from tests.data.pictures import colour, png

SET = SyntheticShapes(16, 22, 1)
OPTIONS: dict[str, Any] = {
    "description": {"source": "synthetic", "size": 22},
    "shard_images": 4,
    "threads": 2,
}
ROOT = Path(__file__).parents[2]


class Recorded(ImageSource):
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

    def fingerprint(self) -> str:
        return SET.fingerprint()


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is logged."""
    messages: list[str] = []
    for name in ("info", "warning"):
        monkeypatch.setattr(
            absl_logging, name, lambda text, *values: messages.append(text % values)
        )
    return messages


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


def stop_after_nine(done: int, total: int) -> None:
    if done == 9:
        raise Stopped


def test_stopped_between_two_images_it_leaves_no_half_file(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(Stopped):
        prepare(SET, [8, 16], tmp_path, **OPTIONS, report=stop_after_nine)
    kept = content(tmp_path)
    assert len([name for name in kept if name.endswith(".array_record")]) == 4
    assert not [name for name in kept if name.endswith(".tmp")]
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


def test_the_report_says_how_far_it_is_and_the_log_what_to_do_next(
    tmp_path: Path, lines: list[str]
) -> None:
    reports: list[tuple[int, int]] = []
    with pytest.raises(Stopped):
        prepare(SET, [8, 16], tmp_path, **OPTIONS, report=stop_after_nine)
    prepare(SET, [8, 16], tmp_path, **OPTIONS, report=lambda *values: reports.append(values))
    assert reports == [(done, 22) for done in range(8, 23)]
    assert f"--config.dataset.source=packed --config.dataset.path={tmp_path}" in lines[-1]


def test_half_files_of_a_killed_run_go_once_nobody_can_be_writing_them(tmp_path: Path) -> None:
    (tmp_path / ".dataset.json.1-2.tmp").touch()
    prepare(SET, [8], tmp_path, **OPTIONS)
    half = tmp_path / "8" / ".00000-of-00006.array_record.1-2.tmp"
    half.touch()
    prepare(SET, [8], tmp_path, **OPTIONS)
    assert not half.exists()


# Where a preparation must not begin: one line, and nothing is changed.


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    """A finished set."""
    prepare(SET, [8, 16], tmp_path / "set", **OPTIONS)
    return tmp_path / "set"


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("source", {"description": {"source": "folder"}}),
        ("shard_images", {"shard_images": 5}),
        ("resolutions", {"resolutions": [8]}),
        ("images", {"source": SyntheticShapes(16, 21, 1)}),
    ],
)
def test_the_folder_of_another_preparation_is_refused_and_left_alone(
    prepared: Path, key: str, change: dict[str, Any]
) -> None:
    before = content(prepared)
    arguments = {"source": SET, "resolutions": [8, 16], "out": prepared} | OPTIONS | change
    message = error_of(lambda: prepare(**arguments))
    assert message.startswith(f"{prepared}: belongs to another preparation: {key} is ")
    assert content(prepared) == before


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    """Originals of two classes."""
    for name in ("cat/0", "cat/1", "dog/0"):
        (tmp_path / "pets" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "pets" / f"{name}.png").write_bytes(png(colour(len(name))))
    return tmp_path / "pets"


def prepare_pets(pets: Path, out: Path) -> dict[str, Any]:
    """As --mode=prepare does; returns what is kept of the originals."""
    source = ImageFolder(pets)
    about = {"source": "folder", "path": str(pets), "identity": identify(source)}
    return prepare(source, [8], out, **OPTIONS | {"description": about})["source"]


def test_originals_that_were_moved_are_the_same_and_changed_ones_are_named(
    pets: Path, tmp_path: Path
) -> None:
    kept = prepare_pets(pets, tmp_path / "set")
    assert PackedDataset(tmp_path / "set", 8).class_counts() == [2, 1]
    moved = pets.rename(tmp_path / "moved")
    assert prepare_pets(moved, tmp_path / "set")["identity"] == kept["identity"]
    (moved / "cat").rename(moved / "zebra")
    message = error_of(lambda: prepare_pets(moved, tmp_path / "set"))
    assert "the originals have changed since it was prepared: class 'cat' is called" in message


def test_a_set_of_an_earlier_version_goes_on_where_its_originals_are(
    pets: Path, tmp_path: Path
) -> None:
    source, about = ImageFolder(pets), {"source": "folder", "path": str(pets)}
    prepare(source, [8], tmp_path / "set", **OPTIONS | {"description": about})
    before = PackedDataset(tmp_path / "set", 8)
    assert before.class_counts() is None and "identity" in prepare_pets(pets, tmp_path / "set")
    # Described better, it is the same set to those who train on it.
    assert PackedDataset(tmp_path / "set", 8).identity() == before.identity()
    about["path"] = "/elsewhere"
    prepare(source, [8], tmp_path / "other", **OPTIONS | {"description": about})
    assert "source is " in error_of(lambda: prepare_pets(pets, tmp_path / "other"))


def test_a_folder_with_anything_else_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("x")
    assert "holds something else" in error_of(lambda: prepare(SET, [8], tmp_path, **OPTIONS))
    assert "holds something else" in error_of(
        lambda: prepare(SET, [8], tmp_path / "thesis.txt", **OPTIONS)
    )
    assert content(tmp_path) == {"thesis.txt": b"x"}
    (tmp_path / "dataset.json").write_text('{"labels": null}')  # EDM's, of an unpacked zip
    assert "not a description" in error_of(lambda: prepare(SET, [8], tmp_path, **OPTIONS))


def test_two_processes_do_not_write_into_one_folder(tmp_path: Path) -> None:
    with (tmp_path / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "another process" in error_of(lambda: prepare(SET, [8], tmp_path, **OPTIONS))
    prepare(SET, [8], tmp_path, **OPTIONS)


def test_what_cannot_be_prepared_is_refused_before_anything_is_written(
    prepared: Path, tmp_path: Path
) -> None:
    out, packed_set = tmp_path / "out", PackedDataset(prepared, 16)
    assert "is packed already" in error_of(lambda: prepare(packed_set, [8], out, **OPTIONS))
    for resolutions, change in (
        ([], {}),
        ([0], {}),
        ([8], {"shard_images": 0}),
        ([8], {"threads": -1}),
    ):
        assert "cannot prepare" in error_of(
            lambda r=resolutions, c=change: prepare(SET, r, out, **OPTIONS | c)
        )
    assert "mount or copy it" in error_of(lambda: prepare(SET, [8], "s3://bucket/set", **OPTIONS))
    assert not out.exists() and not Path("s3:").exists()


class Full:
    """A writer of a full disk."""

    def __init__(self, path: str, _: str) -> None:
        Path(path).touch()
        self._left = 3

    def write(self, _: bytes) -> None:
        self._left -= 1
        if not self._left:
            raise RuntimeError("write() failed: No space left on device\nat byte 0")

    def close(self) -> None:
        raise RuntimeError("write() failed: No space left on device")


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed.array_record_module, "ArrayRecordWriter", Full)
    with pytest.raises(StorageError, match=r"No space left on device") as caught:
        prepare(SET, [8], tmp_path, **OPTIONS)
    assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)
    assert caught.value.status == 1
    assert sorted(content(tmp_path)) == [".lock", "dataset.json"]

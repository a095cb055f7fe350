"""Where a preparation must not begin, and what it says instead: one line, and nothing is
changed."""

import fcntl
from pathlib import Path
from typing import Any

import pytest

from relay_jax.data import prepare as module
from relay_jax.data.packed import PackedDataset
from relay_jax.data.prepare import prepare
from relay_jax.data.source import SyntheticShapes
from tests.conftest import content, error_of

SET = SyntheticShapes(16, 22, 1)
OPTIONS: dict[str, Any] = {
    "description": {"source": "synthetic", "size": 22},
    "shard_images": 4,
    "threads": 2,
}


@pytest.fixture
def whole(tmp_path: Path) -> Path:
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
    whole: Path, key: str, change: dict[str, Any]
) -> None:
    before = content(whole)
    arguments = {"source": SET, "resolutions": [8, 16], "out": whole} | OPTIONS | change
    message = error_of(lambda: prepare(**arguments))
    assert message.startswith(f"{whole}: belongs to another preparation: {key} is ")
    assert content(whole) == before


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
    whole: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    packed = PackedDataset(whole, 16)
    assert "is packed already" in error_of(lambda: prepare(packed, [8], out, **OPTIONS))
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


def test_a_full_disk_is_one_line_and_leaves_no_half_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Full:
        def __init__(self, path: str, _: str) -> None:
            Path(path).touch()
            self._left = 3

        def write(self, _: bytes) -> None:
            self._left -= 1
            if not self._left:
                raise RuntimeError("write() failed: No space left on device\nat byte 0")

        def close(self) -> None:
            raise RuntimeError("write() failed: No space left on device")

    monkeypatch.setattr(module.array_record_module, "ArrayRecordWriter", Full)
    message = error_of(lambda: prepare(SET, [8], tmp_path, **OPTIONS))
    assert (
        message
        == f"{tmp_path}: cannot be written (write() failed: No space left on device at byte 0)"
    )
    assert sorted(content(tmp_path)) == [".lock", "dataset.json"]

"""Files: whole or not there, whatever happens; hashes that do not depend on order."""

import json
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.errors import StorageError
from relay_jax.runtime.files import (
    append_jsonl,
    digest,
    file_sha256,
    read_jsonl,
    replacing,
    write_bytes,
    write_json,
    write_png,
)


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


def test_a_missing_file_has_no_lines(tmp_path: Path) -> None:
    assert read_jsonl(tmp_path / "none.jsonl") == []


def test_a_block_that_fails_leaves_the_old_file_and_no_temporary_one(tmp_path: Path) -> None:
    path = tmp_path / "folder" / "a.bin"
    write_bytes(path, b"old")
    for error, expected in ((KeyError("mine"), KeyError), (OSError(28, "full"), StorageError)):
        with pytest.raises(expected), replacing(path) as temporary:
            temporary.write_bytes(b"half")
            raise error
    assert path.read_bytes() == b"old" and list(path.parent.iterdir()) == [path]


def write_shared(path: Path, content: bytes) -> None:
    with replacing(path, shared=True) as temporary:
        temporary.write_bytes(content)


def test_threads_that_write_a_shared_file_leave_one_whole_version(tmp_path: Path) -> None:
    path, contents = tmp_path / "a.bin", [bytes([n]) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=write_shared, args=(path, text)) for text in contents]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert path.read_bytes() in contents and list(tmp_path.iterdir()) == [path]


def test_a_place_that_cannot_be_written_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be written") as error:
        write_json(tmp_path / "file" / "a.json", {})
    assert "\n" not in str(error.value) and error.value.status == 1


def test_hashes_are_those_of_content(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1})
    write_bytes(tmp_path / "a", b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")

"""Files: whole or not there, whatever happens; hashes that do not depend on order."""

import errno
import json
import os
import re
import threading
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.errors import StorageError, UserError
from relay_jax.runtime.files import (
    append_jsonl,
    digest,
    expanded,
    file_sha256,
    is_writable,
    read_json,
    read_jsonl,
    replacing,
    storage_reason,
    try_folder,
    write_bytes,
    write_json,
    write_png,
    write_text,
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
    assert "\n" not in str(error.value) and error.value.status == 2


# Places that are tried


def nowhere(tmp_path: Path, kind: str) -> Path:
    """A place of a kind where no folder can be."""
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "gone").symlink_to(tmp_path / "nothing")
    return tmp_path / {"file": "file", "below": "file/a/b", "loop": "loop/a", "gone": "gone"}[kind]


@pytest.mark.parametrize("kind", ["file", "below", "loop", "gone"])
def test_a_place_where_no_folder_can_be_is_refused_and_left_as_it_was(
    tmp_path: Path, kind: str
) -> None:
    place = nowhere(tmp_path, kind)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(StorageError, match=r"a file, not a folder|leads nowhere") as error:
        try_folder(place)
    assert error.value.status == 2 and str(place) in str(error.value)
    assert sorted(tmp_path.iterdir()) == before and not is_writable(place)


def test_a_place_that_vanishes_meanwhile_is_tried_again_but_not_for_ever(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another command tries the same place; in /proc no folder can be made at all."""
    calls, make = [], Path.mkdir

    def mkdir(path: Path, *arguments: object, **options: object) -> None:
        calls.append(path)
        if len(calls) % 6 < 3:
            raise FileNotFoundError(errno.ENOENT, "No such file or directory")
        make(path)

    monkeypatch.setattr(Path, "mkdir", mkdir)
    try_folder(tmp_path / "run")
    with pytest.raises(StorageError, match="nothing can be made there") as error:
        try_folder(Path("/proc/relay"), attempts=1)
    assert error.value.status == 2 and len(calls) == 4 and not list(tmp_path.iterdir())


def test_the_reason_is_found_between_what_a_library_says_of_itself() -> None:
    text = f'Error opening "zarr" driver: {"{}" * 300} [OS error 28: No space left on device] {{}}'
    assert storage_reason(ValueError(text)) == "No space left on device"
    assert storage_reason(ValueError("of its own")) == "of its own"


def test_a_place_that_can_be_written_is_left_without_a_trace(tmp_path: Path) -> None:
    (tmp_path / "run" / "base").mkdir(parents=True)
    try_folder(tmp_path / "run", ["base", "samples"], ["report.json"])
    try_folder(tmp_path / "new" / "deep" / "out")
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "run", tmp_path / "run" / "base"]


def test_a_file_for_a_folder_and_a_folder_for_a_file_are_found_first(tmp_path: Path) -> None:
    (tmp_path / "grids").write_text("")
    (tmp_path / "report.json").mkdir()
    for arguments, name in ((["grids"], "grids"), ([], "report.json")):
        with pytest.raises(StorageError, match=name) as error:
            try_folder(tmp_path, arguments, ["report.json"])
        assert error.value.status == 2


@pytest.mark.parametrize(
    ("number", "status"),
    [(errno.EACCES, 2), (errno.EROFS, 2), (errno.ENOSPC, 1), (errno.EDQUOT, 1), (errno.EIO, 1)],
)
def test_the_status_says_whether_the_same_command_may_succeed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, status: int
) -> None:
    def fail(_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    for action in (lambda: try_folder(tmp_path), lambda: write_json(tmp_path / "a.json", 1)):
        with pytest.raises(StorageError, match=re.escape(os.strerror(number))) as error:
            action()
        assert error.value.status == status
    assert not list(tmp_path.iterdir())


def test_home_is_expanded_and_nobodys_home_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    assert expanded("~/x") == Path("/home/me/x") and expanded("a/~") == Path("a/~")
    with pytest.raises(UserError, match="~nobody-of-that-name/x"):
        expanded("~nobody-of-that-name/x")


# Files that others have written on

DAMAGE = [b"\xff\xfe\x00", b"[1]\n", b'"text"\n', b"7\n", b"[" * 100_000 + b"\n", b"{}\x00{}\n"]


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_log_is_set_aside_and_its_readable_lines_stay(
    tmp_path: Path, damage: bytes
) -> None:
    path = tmp_path / "starts.jsonl"
    content = b'{"images": 1}\n' + damage + b'\n{"images": 2}\n'
    path.write_bytes(content)
    assert read_jsonl(path) == [{"images": 1}, {"images": 2}]
    append_jsonl(path, {"images": 3})
    assert read_jsonl(path) == [{"images": 1}, {"images": 2}, {"images": 3}]
    assert (tmp_path / "starts.jsonl.damaged-1").read_bytes() == content
    append_jsonl(path, {"images": 4})
    assert len(list(tmp_path.iterdir())) == 2, "what is whole was set aside"


def test_a_folder_or_a_pipe_in_the_place_of_a_log_is_set_aside(tmp_path: Path) -> None:
    path = tmp_path / "starts.jsonl"
    for number, make in enumerate((path.mkdir, lambda: os.mkfifo(path)), 1):
        path.unlink(missing_ok=True)
        make()
        assert read_jsonl(path) == []
        append_jsonl(path, {"images": number})
        assert read_jsonl(path) == [{"images": number}]
        assert os.path.lexists(tmp_path / f"starts.jsonl.damaged-{number}")


def test_json_is_of_bounded_size_and_depth(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    deep, nested = "[" * 200 + "]" * 200, "[" * 90 + "]" * 90
    path.write_text(nested)
    assert read_json(path)
    for text, most in ((deep, 1000), ("[" * 10**6, 10**7), (nested, 100), ("\ud800x", 9)):
        path.write_text(text, errors="surrogatepass")
        with pytest.raises(ValueError):
            read_json(path, most)
    path.unlink()
    os.mkfifo(path)
    with pytest.raises(OSError, match="no file"):
        read_json(path)


def test_a_text_with_bytes_of_file_names_is_written(tmp_path: Path) -> None:
    write_text(tmp_path / "a", os.fsdecode(b"caf\xe9"))
    assert (tmp_path / "a").read_text() == "caf\\udce9"


def test_hashes_are_those_of_content(tmp_path: Path) -> None:
    assert digest({"a": 1, "b": [2]}) == digest({"b": [2], "a": 1}) != digest({"a": 1})
    write_bytes(tmp_path / "a", b"abc")
    assert file_sha256(tmp_path / "a").startswith("ba7816bf8f01cfea")

"""A packed set in a bucket is read and made as in a folder: shown against a server that speaks
as much as needed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlparse

import pytest

from relay_jax.data.loader import read
from relay_jax.data.prepare import prepare
from relay_jax.data.storage import storage
from relay_jax.data.synthetic import SyntheticShapes
from tests.conftest import content, error_of

ROOT = Path(__file__).parents[2]
SET = SyntheticShapes(16, 22, 1)
SCRIPT = """
import hashlib, json, sys
from relay_jax.data.loader import read
from relay_jax.errors import DataError
from relay_jax.data.packed import PackedDataset
try:
    source = PackedDataset(sys.argv[1], 16)
    if sys.argv[2] == "verify":
        source.verify()
    images, labels = read(source, range(len(source)), 8)
    print(json.dumps([hashlib.sha256(images.tobytes()).hexdigest(), labels.tolist()]))
except DataError as error:
    print("error:", error)
"""


class Bucket(BaseHTTPRequestHandler):
    """Files below `folder` as objects: GET .../o/NAME?alt=media with or without a range; GET
    .../o lists names by prefix; POST .../o?name=NAME writes; DELETE. What was written is noted
    in `written`."""

    folder: Path
    written: list[str]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, code: int, value: object) -> None:
        body = json.dumps(value).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        name = parse_qs(urlparse(self.path).query)["name"][0]
        content = self.rfile.read(int(self.headers["Content-Length"]))
        (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
        (self.folder / name).write_bytes(content)
        self.written.append(name)
        self._answer(200, {"name": name, "generation": "1", "size": str(len(content))})

    def do_DELETE(self) -> None:
        file = self.folder / unquote(urlparse(self.path).path).rpartition("/o/")[2]
        exists = file.is_file()
        file.unlink(missing_ok=True)
        self._answer(200 if exists else 404, {})

    def do_GET(self) -> None:
        url = urlparse(self.path)
        if url.path.endswith("/o"):
            prefix = parse_qs(url.query).get("prefix", [""])[0]
            names = sorted(
                str(file.relative_to(self.folder))
                for file in self.folder.rglob("*")
                if file.is_file()
            )
            self._answer(
                200, {"items": [{"name": name} for name in names if name.startswith(prefix)]}
            )
            return
        file = self.folder / unquote(urlparse(self.path).path).rpartition("/o/")[2]
        body = file.read_bytes() if file.is_file() else b""
        code, part, size = (200 if body else 404), self.headers.get("Range"), len(body)
        if body and part:
            first, _, last = part.removeprefix("bytes=").partition("-")
            start, stop = (
                (int(first), int(last or size - 1) + 1)
                if first
                else (max(0, size - int(last)), size)
            )
            code, body = 206, body[start:stop]
        self.send_response(code)
        if code == 206:
            self.send_header("Content-Range", f"bytes {start}-{min(stop, size) - 1}/{size}")
        self.send_header("x-goog-generation", "1")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


class Quiet(ThreadingHTTPServer):
    def handle_error(self, *_: object) -> None:
        """Readers hang up when they have what they want."""


@contextmanager
def serve(folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The address of a server of that folder as gs://bucket, and the names written there so far."""
    handler = type("Here", (Bucket,), {"folder": folder, "written": []})
    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", handler.written
        server.shutdown()


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The folder behind gs://bucket, which holds a packed set named `set`, and the address of
    its server."""
    prepare(SET, [8, 16], tmp_path / "set", description={}, shard_images=5)
    with serve(tmp_path) as (address, _):
        yield tmp_path, address


def run_there(address: str, script: str, *arguments: str) -> str:
    """In a process of its own: the clients look for the address once."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
    }
    command = [sys.executable, "-c", script, *arguments]
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=400
    ).stdout.strip()


def read_there(address: str, path: str, action: str = "read") -> str:
    return run_there(address, SCRIPT, path, action)


PREPARE = """
import sys
from relay_jax.errors import DataError
from tests.data.test_prepare import SET, Recorded, prepare
source = Recorded(broken=int(sys.argv[2]))
try:
    prepare(source, [8, 16], sys.argv[1], description={}, shard_images=int(sys.argv[3]))
except DataError as error:
    print("error:", error)
print(len(source.read))
"""


def test_a_set_is_prepared_into_a_bucket_as_into_a_folder_and_resumed_there(tmp_path: Path) -> None:
    prepare(SET, [8, 16], tmp_path / "here", description={}, shard_images=5)
    expected = {name: raw for name, raw in content(tmp_path / "here").items() if name != ".lock"}
    bucket = tmp_path / "there"
    bucket.mkdir()
    with serve(bucket) as (address, written):
        output = run_there(address, PREPARE, "gs://bucket/sets/one", "12", "5")
        assert output.startswith("error: images/12.jpg: cannot decode")
        assert "8/00001-of-00005.array_record.json" in content(bucket / "sets/one")
        assert "8/00002-of-00005.array_record" not in content(bucket / "sets/one")
        damaged = bucket / "sets/one/16/00000-of-00005.array_record"
        damaged.write_bytes(damaged.read_bytes()[:-1])
        written.clear()
        output = run_there(address, PREPARE, "gs://bucket/sets/one/", "-1", "5")
        assert output == "17", output  # all but the one file that was there and whole
        assert "sets/one/8/00001-of-00005.array_record" not in written
        assert content(bucket / "sets/one") == expected
        written.clear()
        assert run_there(address, PREPARE, "gs://bucket/sets/one", "-1", "5") == "0"
        assert written == ["sets/one/dataset.json"]
        assert "belongs to another" in run_there(
            address, PREPARE, "gs://bucket/sets/one", "-1", "6"
        )
        assert "holds something else" in run_there(address, PREPARE, "gs://bucket/sets", "-1", "5")


def test_a_set_in_a_bucket_reads_as_in_a_folder(bucket: tuple[Path, str]) -> None:
    _, address = bucket
    images, labels = read(SET, range(22), 8)
    expected = [hashlib.sha256(images.tobytes()).hexdigest(), labels.tolist()]
    for path in ("gs://bucket/set", "gs://bucket/set/"):
        assert json.loads(read_there(address, path, "verify")) == expected
    assert "error: gs://bucket/other: no packed data set" in read_there(
        address, "gs://bucket/other"
    )


@pytest.mark.parametrize("defect", ["gone", "damaged"])
def test_defects_in_a_bucket_are_one_line_that_names_the_object(
    bucket: tuple[Path, str], defect: str
) -> None:
    folder, address = bucket
    for resolution in (8, 16):
        file = folder / "set" / str(resolution) / "00002-of-00005.array_record"
        raw = file.read_bytes()
        file.unlink()
        if defect == "damaged":
            file.write_bytes(bytes(len(raw)))
    for action, resolution in (("read", 8), ("verify", 16)):
        message = read_there(address, "gs://bucket/set", action)
        assert message.startswith(
            f"error: gs://bucket/set/{resolution}/00002-of-00005.array_record"
        ), message
        assert "\n" not in message


def test_a_folder_takes_whole_files_and_tells_of_them(tmp_path: Path) -> None:
    place = storage(tmp_path / "set")
    assert place.occupants() == set()
    place.write("8/note.json", "text")
    assert place.occupants() == {"8"} and place.read("8/note.json") == b"text"
    assert place.checksum("8/note.json") == (4, hashlib.sha256(b"text").hexdigest())
    place.forget("8/note.json")
    place.forget("8/note.json")
    with pytest.raises(FileNotFoundError):
        place.read("8/note.json")
    (tmp_path / "file").touch()
    assert storage(tmp_path / "file").occupants() == {"file"}
    assert "mount or copy it" in error_of(lambda: storage("s3://bucket/set"))

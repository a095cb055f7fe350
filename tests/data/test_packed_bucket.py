"""A packed set in a bucket reads as it does in a folder: shown against a server that speaks as much as needed."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from relay_jax.data.loader import read
from relay_jax.data.sources import SyntheticShapes
from relay_jax.tools.prepare import prepare

ROOT = Path(__file__).parents[2]
SET = SyntheticShapes(16, 22, 1)
SCRIPT = """
import hashlib, json, sys
from relay_jax.data.loader import read
from relay_jax.data.sources import DataError, make_source
try:
    source = make_source("packed", path=sys.argv[1], resolution=16, size=1, seed=0)
    if sys.argv[2] == "verify":
        source.verify()
    images, labels = read(source, range(len(source)), 8)
    print(json.dumps([hashlib.sha256(images.tobytes()).hexdigest(), labels.tolist()]))
except DataError as error:
    print("error:", error)
"""


class Bucket(BaseHTTPRequestHandler):
    """GET .../o/NAME?alt=media with or without a range, of the files below `folder`, whose name is `set`."""

    folder: Path
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        file = self.folder / unquote(urlparse(self.path).path).rpartition("/o/")[2]
        body = file.read_bytes() if file.is_file() else b""
        code, wanted, size = (200 if body else 404), self.headers.get("Range"), len(body)
        if body and wanted:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            start, stop = (int(first), int(last or size - 1) + 1) if first else (max(0, size - int(last)), size)
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


@pytest.fixture
def bucket(tmp_path: Path) -> Iterator[tuple[Path, str]]:
    """The folder behind gs://bucket, which holds a packed set named `set`, and the address of its server."""
    prepare(SET, [8, 16], tmp_path / "set", description={}, shard_images=5)
    handler = type("Here", (Bucket,), {"folder": tmp_path})
    with Quiet(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield tmp_path, f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


def read_there(address: str, path: str, action: str = "read") -> str:
    """In a process of its own: the clients look for the address once."""
    environment = os.environ | {
        "PYTHONPATH": str(ROOT),
        "CLOUD_STORAGE_EMULATOR_ENDPOINT": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
    }
    command = [sys.executable, "-c", SCRIPT, path, action]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120).stdout.strip()


def test_a_set_in_a_bucket_reads_as_in_a_folder(bucket: tuple[Path, str]) -> None:
    _, address = bucket
    images, labels = read(SET, range(22), 8)
    expected = [hashlib.sha256(images.tobytes()).hexdigest(), labels.tolist()]
    for path in ("gs://bucket/set", "gs://bucket/set/"):
        assert json.loads(read_there(address, path, "verify")) == expected
    assert "error: gs://bucket/other: no packed data set" in read_there(address, "gs://bucket/other")


@pytest.mark.parametrize("defect", ["gone", "damaged"])
def test_defects_in_a_bucket_are_one_line_that_names_the_object(bucket: tuple[Path, str], defect: str) -> None:
    folder, address = bucket
    for resolution in (8, 16):
        file = folder / "set" / str(resolution) / "00002-of-00005.array_record"
        raw = file.read_bytes()
        file.unlink()
        if defect == "damaged":
            file.write_bytes(bytes(len(raw)))
    for action, resolution in (("read", 8), ("verify", 16)):
        message = read_there(address, "gs://bucket/set", action)
        assert message.startswith(f"error: gs://bucket/set/{resolution}/00002-of-00005.array_record"), message
        assert "\n" not in message

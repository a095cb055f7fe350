"""A folder, or gs://BUCKET/PATH, as a place for whole files: what packed sets need of either.

Buckets are reached through tensorstore (which orbax brings) with the
application's default credentials. An object appears when it is
whole, as a file does here.
"""

import errno
import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from relay_jax.data.files import read_file
from relay_jax.errors import DataError, one_line
from relay_jax.runtime.files import MAX_TEXT, file_sha256, write_text


class Folder:
    """Files below a folder, by path from there.

    Raises OSError, FileNotFoundError for what is not there, and
    StorageError from `write`.
    """

    def __init__(self, path: str) -> None:
        self.path = path

    def occupants(self) -> set[str]:
        """Names of the files and folders here; if a file has the folder's name, its own."""
        root = Path(self.path)
        if not root.exists():
            return set()
        return {entry.name for entry in root.iterdir()} if root.is_dir() else {root.name}

    def read(self, name: str) -> bytes:
        return read_file(Path(self.path, name), MAX_TEXT)

    def checksum(self, name: str) -> tuple[int, str]:
        """Size and SHA-256, in hexadecimal."""
        path = Path(self.path, name)
        return path.stat().st_size, file_sha256(path)

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        """Where files are made, under the names that they are to have here."""
        # The folder itself: to move a file to another disk would be
        # to write it again.
        yield Path(self.path)

    def take(self, workshop: Path, name: str) -> None:
        """Brings a whole file of the workshop to its place; it is gone from the workshop then."""

    def write(self, name: str, text: str) -> None:
        """A small file, whole or not at all."""
        write_text(Path(self.path, name), text)

    def forget(self, name: str) -> None:
        Path(self.path, name).unlink(missing_ok=True)


class Bucket(Folder):
    """Objects below gs://BUCKET/PATH."""

    def __init__(self, path: str) -> None:
        super().__init__(path.rstrip("/"))
        self._opened: Any = None

    def _store(self) -> Any:
        if self._opened is None:
            # Imported late: it takes a second,
            # and most sets are in folders.
            import tensorstore

            bucket, _, path = self.path.removeprefix("gs://").partition("/")
            # The default keeps a user without network waiting for
            # many minutes.
            retries = {"max_retries": 5, "max_delay": "2s"}
            spec = {
                "driver": "gcs",
                "bucket": bucket,
                "path": f"{path}/" if path else "",
                "context": {"gcs_request_retries": retries},
            }
            self._opened = tensorstore.KvStore.open(spec).result()
        return self._opened

    def read(self, name: str) -> bytes:
        try:
            result = self._store().read(name).result()
        # It raises whatever fits: ValueError, RuntimeError,
        # ImportError ...
        except Exception as error:
            raise OSError(one_line(error)) from error
        if result.state != "value":
            raise FileNotFoundError(errno.ENOENT, "No such object")
        return result.value

    def occupants(self) -> set[str]:
        try:
            return {key.decode().split("/")[0] for key in self._store().list().result()}
        except Exception as error:
            raise OSError(one_line(error)) from error

    # A bucket tells a checksum of its own kind, not SHA-256: the
    # object has to be read.
    def checksum(self, name: str) -> tuple[int, str]:
        content = self.read(name)
        return len(content), hashlib.sha256(content).hexdigest()

    @contextmanager
    def workshop(self) -> Iterator[Path]:
        with tempfile.TemporaryDirectory(prefix="relay-prepare-") as folder:
            yield Path(folder)

    def take(self, workshop: Path, name: str) -> None:
        self._write(name, Path(workshop, name).read_bytes())
        Path(workshop, name).unlink()

    def write(self, name: str, text: str) -> None:
        self._write(name, text.encode())

    def forget(self, name: str) -> None:
        self._write(name, None)

    def _write(self, name: str, content: bytes | None) -> None:
        try:
            self._store().write(name, content).result()
        except Exception as error:
            raise OSError(one_line(error)) from error


def storage(path: str | os.PathLike[str]) -> Folder:
    """The place that a path names. Raises DataError for a bucket of another kind."""
    path = os.fspath(path)
    if not re.match(r"\w+:/", path):
        return Folder(path)
    if not path.startswith("gs://"):
        raise DataError(
            f"{path}: packed sets lie in folders and gs://BUCKET/PATH; mount or copy it"
        )
    return Bucket(path)

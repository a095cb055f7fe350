"""Files that are whole or not there: atomic writes, hashes, JSON, JSON lines and PNG.

Everything that this program writes goes through `replacing`: the
content is made under a temporary name beside its place, is flushed to
the disk, and only then gets its name. A killed run leaves a temporary
file at most, never half a result. No JAX here: `data` imports this
module.
"""

import contextlib
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relay_jax.errors import StorageError, one_line


def cannot_write(path: Path | str, error: Exception) -> StorageError:
    """For a full disk, a read-only folder and the like."""
    why = getattr(error, "strerror", None) or one_line(error)
    return StorageError(
        f"{path} cannot be written ({why}); what is finished stays, the same command continues"
    )


@contextlib.contextmanager
def replacing(path: Path | str, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A temporary path to write to; when the block ends it takes the place of `path`.

    Folders above are made. If the block raises, `path` is as before and
    the temporary file is gone. durable: on the disk before it gets its
    name, for what must survive a loss of power. shared: several
    processes or threads may write this file at once, such as a cache.
    Raises StorageError for an OSError, also one of the block, and for
    the RuntimeErrors by which ArrayRecord and TensorStore say that the
    disk is full.
    """
    path = Path(path)
    # A fixed name, so that what a killed run has left is overwritten and
    # does not pile up.
    writer = f"{os.getpid()}-{threading.get_ident()}." if shared else ""
    temporary = path.with_name(f".{path.name}.{writer}tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield temporary
        if durable:
            with temporary.open("rb") as file:
                os.fsync(file.fileno())
        temporary.replace(path)
    except (OSError, RuntimeError) as error:
        raise cannot_write(path, error) from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def write_bytes(path: Path | str, content: bytes) -> None:
    """A whole file or nothing. Raises StorageError."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_text(path: Path | str, text: str) -> None:
    """A whole file or nothing, UTF-8. Raises StorageError."""
    write_bytes(path, text.encode())


def write_json(path: Path | str, value: Any) -> None:
    """A whole file or nothing. Raises StorageError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_png(path: Path | str, pixels: np.ndarray) -> None:
    """uint8 [h, w, 3] or [h, w] as a PNG, whole or not at all. Raises StorageError."""
    # Not durable: a sampling run writes thousands, and each flush waits
    # for the disk.
    with replacing(path, durable=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a JSON lines file; a half-written last line and a missing file are no lines."""
    # A run that is killed while it appends leaves half a line; its
    # continuation writes it anew.
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def append_jsonl(path: Path, value: dict) -> None:
    """Adds a line to a file that stays whole, whatever happens. Raises StorageError."""
    write_text(path, "".join(json.dumps(line) + "\n" for line in [*read_jsonl(path), value]))


def file_sha256(path: Path | str) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. Raises OSError."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def digest(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

"""Files that are whole or not there: atomic writes, hashes, JSON, JSON lines and PNG.

Everything that this program writes goes through `replacing`: the
content is made under a temporary name beside its place, is flushed
to the disk, and only then gets its name. A killed run leaves a
temporary file at most, never half a result. Places are tried by
`try_folder` before the work whose result they are for. No JAX here:
`data` imports this module.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import stat
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging
from PIL import Image

from relay_jax.errors import StorageError, UserError, one_line
from relay_jax.runtime.counting import Add

MAX_TEXT = 2**28  # bytes of a text that is read whole; a log of a million lines has less
MAX_DEPTH = 100  # levels of nested JSON, far below what Python can recurse into

# What stays as it is until the user changes it: the same command
# would fail again. Everything else, such as a full disk or a lost
# connection, may pass.
_MENDABLE = frozenset(
    (
        errno.EACCES,
        errno.EPERM,
        errno.EROFS,
        errno.ENOTDIR,
        errno.EISDIR,
        errno.EEXIST,
    )
    + (errno.ELOOP, errno.ENAMETOOLONG, errno.EINVAL)
)


def expanded(text: str | os.PathLike[str]) -> Path:
    """A path as a user writes it, with ~ expanded. Raises UserError for ~NAME of nobody."""
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        raise UserError(f"{text}: {one_line(error)}") from error


def storage_error(message: str, error: BaseException) -> StorageError:
    """With status 2 where the user has to change something first, else 1."""
    failure = StorageError(message)
    if getattr(error, "errno", None) in _MENDABLE or isinstance(error, UnicodeError):
        failure.status = UserError.status
    return failure


def storage_reason(error: BaseException) -> str:
    """What the file system said, by an error of whatever library."""
    if strerror := getattr(error, "strerror", None):
        return str(strerror)
    # TensorStore puts it between pages of its own settings.
    text = str(error)
    for number in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EIO):
        if os.strerror(number) in text:
            return os.strerror(number)
    return one_line(error)


def cannot_write(path: Path | str, error: Exception) -> StorageError:
    """For a full disk (status 1), a read-only folder (status 2) and the like."""
    why = storage_reason(error)
    failure = storage_error("", error)
    advice = "what is finished stays, the same command continues"
    if failure.status == UserError.status:
        advice = "name another place, or make this one writable"
    failure.args = (f"{path} cannot be written ({why}); {advice}",)
    return failure


def try_folder(
    path: Path | str,
    folders: Sequence[str] = (),
    files: Sequence[str] = (),
    attempts: int = 5,
) -> None:
    """Finds out whether results can be written to a folder, before they are computed.

    Makes the folder, writes a probe and removes both again. folders:
    names inside of it that will be written to, tried likewise where
    they exist. files: names inside of it that will be replaced.
    attempts: while other commands try the same place. Raises
    StorageError: status 2 for what the user has to change, 1 for a
    full disk.
    """
    place = path = Path(path)
    made: list[Path] = []
    try:
        for folder in reversed((path, *path.parents)):
            if not folder.is_dir():
                _refuse_other(folder)
                # Another command may make it at the same time.
                with contextlib.suppress(FileExistsError):
                    folder.mkdir()
                    made.append(folder)
        for place in (path, *(path / name for name in folders)):
            if not place.is_dir():
                _refuse_other(place)
            else:
                _probe(place)
        for place in (path / name for name in files):
            if place.is_dir():
                raise IsADirectoryError(errno.EISDIR, "it is a folder")
    except FileNotFoundError as error:
        # Another command has made the folder, and has just removed it
        # again. In /proc and its like nobody can make one.
        if attempts <= 1:
            refusal = PermissionError(errno.EPERM, "nothing can be made there")
            raise cannot_write(place, refusal) from error
        try_folder(path, folders, files, attempts - 1)
    except OSError as error:
        raise cannot_write(place, error) from error
    finally:
        # Other mistakes may be found after this, and a command that
        # is refused leaves nothing.
        for folder in reversed(made):
            with contextlib.suppress(OSError):
                folder.rmdir()


def _refuse_other(place: Path) -> None:
    """Raises NotADirectoryError if something that is no folder has this name."""
    if os.path.lexists(place):
        kind = "a link that leads nowhere" if place.is_symlink() else "a file, not a folder"
        raise NotADirectoryError(errno.ENOTDIR, f"{place} is {kind}")


def _probe(folder: Path) -> None:
    # One name per host: what a killed run has left is overwritten.
    probe = folder / f".probe-{platform.node()}.tmp"
    try:
        with probe.open("wb") as file:
            # As much as a block: an empty file has room on a full disk.
            file.write(bytes(4096))
            file.flush()
            os.fsync(file.fileno())
    finally:
        with contextlib.suppress(OSError):
            probe.unlink(missing_ok=True)  # two processes of a host share it


def is_writable(path: Path) -> bool:
    """Whether something can be written to a folder, for what a command can do without."""
    try:
        try_folder(path)
    except StorageError:
        return False
    return True


@contextlib.contextmanager
def replacing(path: Path | str, durable: bool = True, shared: bool = False) -> Iterator[Path]:
    """A temporary path to write to; when the block ends it takes the place of `path`.

    Folders above are made. If the block raises, `path` is as before
    and the temporary file is gone. durable: on the disk before it
    gets its name, for what must survive a loss of power. shared:
    several processes or threads may write this file at once, such as
    a cache. Raises StorageError for an OSError, also one of the
    block, and for the RuntimeErrors by which ArrayRecord and
    TensorStore say that the disk is full.
    """
    path = Path(path)
    # A fixed name, so that what a killed run has left is overwritten
    # and does not pile up.
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
    # Names of files may hold bytes that are no UTF-8: a report with
    # one of them must not be lost.
    write_bytes(path, text.encode(errors="backslashreplace"))


def write_json(path: Path | str, value: Any) -> None:
    """A whole file or nothing. Raises StorageError."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_png(path: Path | str, pixels: np.ndarray) -> None:
    """uint8 [h, w, 3] or [h, w] as a PNG, whole or not at all. Raises StorageError."""
    # Not durable: a sampling run writes thousands, and each flush
    # waits for the disk.
    with replacing(path, durable=False) as temporary:
        Image.fromarray(pixels).save(temporary, format="png")


def _without_waiting(path: str, flags: int) -> int:
    # A pipe of that name would never answer.
    return os.open(path, flags | os.O_NONBLOCK)


def read_text(path: Path, most: int = MAX_TEXT) -> str:
    """A whole text. Raises OSError; ValueError if it is no UTF-8 or longer than `most` bytes."""
    with open(path, "rb", opener=_without_waiting) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode):
            raise OSError(errno.EINVAL, "it is no file", str(path))
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"it is longer than {most:,} bytes")
    return content.decode()


def read_json(path: Path, most: int = MAX_TEXT) -> Any:
    """A JSON value of bounded size and depth. Raises OSError, and ValueError for what is none."""
    return parse_json(read_text(path, most))


def parse_json(text: str) -> Any:
    """A JSON value of bounded depth. Raises ValueError for what is none."""
    try:
        value = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    # Whoever walks through the value recurses too.
    level: list[Any] = [value]
    for _ in range(MAX_DEPTH):
        parents = [node for node in level if isinstance(node, dict | list)]
        level = [
            child
            for node in parents
            for child in (node.values() if isinstance(node, dict) else node)
            if isinstance(child, dict | list)
        ]
        if not level:
            return value
    raise ValueError("it is nested too deeply")


def _any(_: dict) -> bool:
    return True


def _parse_lines(path: Path, valid: Callable[[dict], bool] = _any) -> tuple[list[dict], bool]:
    """The readable lines of a JSON lines file, and whether nothing but its end is missing."""
    lines, whole = [], True
    # Byte by byte what it is: one damaged
    # line must not hide the others.
    with open(path, "rb", opener=_without_waiting) as file:
        about = os.fstat(file.fileno())
        if not stat.S_ISREG(about.st_mode) or about.st_size > MAX_TEXT:
            raise OSError(errno.EINVAL, "it is no file of JSON lines", str(path))
        content = file.read(MAX_TEXT)
    *texts, last = content.split(b"\n")
    # A run that is killed while it appends leaves half a line; its
    # continuation writes it anew.
    for text, is_last in [*((text, False) for text in texts), (last, True)]:
        if is_last and not text:
            continue
        try:
            value = parse_json(text.decode())
        except ValueError:
            whole = whole and is_last
            continue
        if isinstance(value, dict) and valid(value):
            lines.append(value)
        else:
            whole = whole and is_last
    return lines, whole


def read_jsonl(path: Path) -> list[dict]:
    """The readable lines of a JSON lines file; none of a missing or damaged one."""
    # Logs are looked at, not computed
    # with: nothing ends because of one.
    try:
        return _parse_lines(path)[0]
    except FileNotFoundError:
        return []
    except OSError as error:
        logging.warning("%s is left out: %s", path, one_line(error))
        return []


def mend_jsonl(path: Path, valid: Callable[[dict], bool] = _any) -> list[dict]:
    """The readable lines of a log that will be written on; a damaged file is set aside first.

    valid: whether a line is one of this log. Raises StorageError
    where the damaged file cannot be renamed.
    """
    try:
        lines, whole = _parse_lines(path, valid)
    except (FileNotFoundError, NotADirectoryError):
        return []
    except OSError:
        lines, whole = [], False
    if not whole:
        kept = set_aside(path)
        logging.warning(
            "%s was damaged; it is kept as %s, and its %d readable lines stay",
            path,
            kept.name,
            len(lines),
        )
    return lines


def set_aside(path: Path) -> Path:
    """Renames a file or folder to NAME.damaged-N, N the first free number. Raises StorageError."""
    number = 1
    while os.path.lexists(kept := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    try:
        path.rename(kept)
    except OSError as error:
        raise cannot_write(path, error) from error
    return kept


def append_jsonl(path: Path, value: dict) -> None:
    """Adds a line to a file that stays whole, whatever happens. Raises StorageError."""
    write_text(
        path,
        "".join(json.dumps(line) + "\n" for line in [*mend_jsonl(path), value]),
    )


def file_sha256(path: Path | str, add: Add = lambda more: None) -> str:
    """SHA-256 of a file's bytes, in hexadecimal. add: told of every MB. Raises OSError."""
    state = hashlib.sha256()
    with Path(path).open("rb") as file:
        while part := file.read(1 << 20):
            state.update(part)
            add(len(part) / 1e6)
    return state.hexdigest()


def digest(value: object) -> str:
    """SHA-256 of a JSON value, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()

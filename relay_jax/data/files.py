"""Bytes of files that others have made: regular files, of bounded size, and one kind of error.

A data set may hold anything: a pipe under the name of a picture, a
member that claims terabytes, JSON of a million brackets. Whatever
reads such files reads them here.
"""

import contextlib
import errno
import os
import stat
import zipfile
from collections.abc import Iterable, Iterator

from relay_jax.errors import DataError, StorageError, one_line

MAX_PICTURE = 1 << 29  # bytes of one encoded picture
# Labels become names and counts of classes: one of 2^60 would fill
# the memory with them.
MAX_CLASSES = 1 << 20
# What zip tools write by themselves. Decompressors of the others
# cannot be asked for a part of their output.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
_DEFLATE_RATIO = 1100  # a little above what the format can reach


@contextlib.contextmanager
def refusing(what: str, advice: str = "") -> Iterator[None]:
    """Turns every error of the block into a DataError 'what (why)advice'."""
    try:
        yield
    except (DataError, StorageError):
        raise
    # Codecs, zipfile, json and protocol buffers raise whatever
    # their authors thought of for a damaged file: no list of
    # it is ever complete.
    except Exception as error:
        why = getattr(error, "strerror", None) or one_line(error, 160)
        raise DataError(f"{what} ({why}){advice}") from error


def read_file(path: str | os.PathLike[str], most: int = MAX_PICTURE) -> bytes:
    """The bytes of a regular file of at most so many. Raises OSError."""
    # Without waiting: a pipe that nobody writes to would be opened
    # for ever. No buffer: one call reads all.
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "Not a regular file")
        if status.st_size > most:
            raise OSError(errno.EFBIG, f"{status.st_size:,} bytes are more than {most:,}")
        return file.read()


def check_member(member: zipfile.ZipInfo, most: int) -> None:
    """Raises ValueError for a member of a zip that cannot be read within bounds."""
    if member.compress_type not in _COMPRESSIONS:
        kind = {12: "bzip2", 14: "LZMA"}.get(member.compress_type, f"way {member.compress_type}")
        raise ValueError(f"compressed by {kind}; write the zip with deflate or without compression")
    if member.file_size > most:
        raise ValueError(f"{member.file_size:,} bytes are more than {most:,}")
    # The directory of a damaged zip may say anything of the size.
    if member.file_size > _DEFLATE_RATIO * member.compress_size + 1024:
        raise ValueError("its sizes contradict each other")


def read_member(archive: zipfile.ZipFile, name: str, most: int = MAX_PICTURE) -> bytes:
    """A member of a zip. Raises what zipfile raises, and ValueError for one that is too large."""
    member = archive.getinfo(name)
    check_member(member, most)
    with archive.open(member) as stream:
        # By number: a call without one asks the decompressor for
        # everything, whatever the directory says of the size.
        data = stream.read(member.file_size)
    if len(data) != member.file_size:
        raise ValueError("it ends early")
    return data


def several(names: Iterable[str], most: int = 5) -> str:
    """Names for a message: the first ones, each cut where it is long, and how many there are."""
    listed = list(names)
    short = [name if len(name) <= 40 else f"{name[:18]}...{name[-19:]}" for name in listed[:most]]
    rest = f" ... ({len(listed):,} in all)" if len(listed) > most else ""
    return (", ".join(short) or "nothing") + rest


def show(value: object) -> str:
    """A value from a file for a message: its beginning on one line."""
    # repr of a nested list may recurse for ever, that of a long
    # number may be refused.
    if not isinstance(value, (str, int, float, type(None))):
        return f"a {type(value).__name__}"
    if isinstance(value, int) and abs(value) >= 1 << 64:
        return "a huge number"
    return one_line(ValueError(repr(value[:60] if isinstance(value, str) else value)), 70)

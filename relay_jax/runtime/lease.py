"""Who trains a stage: a file that its owner renews, and that others take over once it is stale.

    STAGE/lease.json    host, process, start of the process, token, beats

Two trainings of one stage would delete each other's checkpoints.
Locks do not work on every file system and stay behind on some;
so the owner rewrites a small file every BEAT seconds, and
whoever finds one asks:

- of this machine: does the process still exist, with the same start?
  After SIGKILL it does not, and the stage is free at once;
- of another machine: does the file change within STALE seconds, by the
  clock of the one who asks? Clocks of hosts differ, so times in the
  file decide nothing but what is very old.

A process that was suspended until others took over sees their token
at its next beat and ends.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from pathlib import Path
from typing import Any

from absl import logging

from relay_jax.errors import Stopped, StorageError, UserError
from relay_jax.runtime import distributed
from relay_jax.runtime.files import cannot_write, read_json, set_aside, write_json

LEASE = "lease.json"
BEAT = 10.0  # seconds between two renewals
# Seconds without a renewal after which a stage is free. Longer than
# network file systems keep what they know of a file (60 s).
STALE = 90.0
ANCIENT = 1200.0  # no clock is wrong by so many seconds: free without waiting
CLAIM = 10.0  # seconds after which who was about to write has been killed
POLL = 1.0  # seconds between two looks at the lease of another machine


class Lease:
    """Holds a stage while it is a context; all processes of a run use it together.

    folder: of the stage; made if it is missing. what: names it in
    messages. Entering raises UserError, with status 2, if another
    process trains it; StorageError where the lease cannot be
    written; Stopped for SIGTERM meanwhile.
    """

    def __init__(self, folder: Path, what: str) -> None:
        self._path, self._what, self._token = folder / LEASE, what, uuid.uuid4().hex
        self._beats, self._ended = 0, threading.Event()
        self._lost = ""  # why it is no longer this process's
        self._thread: threading.Thread | None = None
        # What was seen last of another one's lease, and since when.
        self._seen: object = None
        self._since = 0.0
        self._claim: tuple[object, float] = None, 0.0

    def __enter__(self) -> "Lease":
        waited = False
        while True:
            with distributed.agree():
                free = not distributed.is_first() or self._try()
            # Agreed on at every look: the others must not wait in
            # one collective for longer than its time limit.
            if distributed.of_first(free):
                break
            if self._seen is not None and not waited:
                logging.info(
                    "%s was trained by %s; waiting up to %.0f s for a sign of life",
                    self._what,
                    _who(self._seen),
                    STALE,
                )
                waited = True
            if distributed.stop_requested():
                raise Stopped(f"stopped by SIGTERM while waiting for {self._path}")
            time.sleep(POLL)
        if distributed.is_first():
            self._thread = threading.Thread(target=self._renew, name="lease", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._thread is None:
            return
        self._thread.join()
        with contextlib.suppress(OSError, ValueError):
            if _token(read_json(self._path)) == self._token:
                self._path.unlink()

    def check(self) -> None:
        """Raises UserError on all processes if another one has taken the stage over."""
        with distributed.agree():
            if self._lost:
                raise UserError(self._lost)

    def _try(self) -> bool:
        """Takes the lease if it is free; False: look again. Raises UserError if it is not free."""
        seen = self._read()
        if seen is not None and not self._is_stale(seen):
            return False
        return self._take(seen)

    def _read(self) -> Any:
        """The lease that lies there: a dict, None for none, something else for a damaged one."""
        try:
            lease = read_json(self._path, most=2**16)
        except FileNotFoundError:
            return None
        except (OSError, ValueError) as error:
            return str(error)
        return lease if isinstance(lease, dict) and _token(lease) else repr(lease)[:200]

    def _is_stale(self, lease: Any) -> bool:
        """Whether its owner is gone. Raises UserError if it is not."""
        if isinstance(lease, dict):
            if lease.get("machine") == machine():
                if _started(lease.get("process")) != lease.get("started"):
                    return True
                raise self._refusal(lease)
            beat = lease.get("time")
            if isinstance(beat, int | float) and time.time() - beat > ANCIENT:
                return True
        now = time.monotonic()
        if self._seen is None:
            self._seen, self._since = lease, now
        elif self._seen != lease:
            raise self._refusal(lease)
        # An owner mends what was damaged at its next beat.
        limit = STALE if isinstance(lease, dict) else 2 * BEAT
        return now - self._since >= limit

    def _refusal(self, lease: Any) -> UserError:
        return UserError(
            f"another process trains {self._what}: {_who(lease)} ({self._path}); wait for its "
            "end, or stop it first"
        )

    def _take(self, seen: Any) -> bool:
        """Writes the lease if it is still as it was seen; False: look again."""
        claim = self._path.with_name(f".{LEASE}.claim")
        # For some milliseconds one process alone may look and write:
        # a file is made by one alone, on every file system.
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            os.close(os.open(claim, os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        except FileExistsError:
            self._forget_old(claim)
            return False
        except OSError as error:
            raise cannot_write(self._path, error) from error
        try:
            if self._read() != seen:
                return False
            if seen is not None and not isinstance(seen, dict):
                kept = set_aside(self._path)
                logging.warning("%s was damaged; it is kept as %s", self._path, kept.name)
            self._write()
            return True
        finally:
            with contextlib.suppress(OSError):
                claim.unlink()

    def _forget_old(self, claim: Path) -> None:
        """Removes a claim whose process was killed just then."""
        with contextlib.suppress(OSError):
            about, now = claim.stat(), time.monotonic()
            identity = about.st_ino, about.st_mtime_ns
            if self._claim[0] != identity:
                self._claim = identity, now
            elif now - self._claim[1] > CLAIM:
                claim.unlink()

    def _write(self) -> None:
        write_json(self._path, self._content())

    def _content(self) -> dict[str, Any]:
        return {
            "token": self._token,
            "host": socket.gethostname(),
            "machine": machine(),
            "process": os.getpid(),
            "started": _started(os.getpid()),
            "beats": self._beats,
            "time": round(time.time(), 1),
        }

    def _renew(self) -> None:
        """The thread of the owner."""
        while not self._ended.wait(BEAT):
            lease = self._read()
            if isinstance(lease, dict) and _token(lease) != self._token:
                self._lost = (
                    f"{self._what} was taken over by {_who(lease)} while this process stood "
                    "still; it goes on there, and this one ends"
                )
                return
            self._beats += 1
            # A full disk, or a network that is away: the training
            # itself says so where it matters.
            with contextlib.suppress(StorageError, OSError):
                self._write()


def _token(lease: Any) -> str:
    token = lease.get("token") if isinstance(lease, dict) else None
    return token if isinstance(token, str) else ""


def _who(lease: Any) -> str:
    if not isinstance(lease, dict):
        return "an unknown process"
    return f"process {str(lease.get('process'))[:20]} on {str(lease.get('host'))[:60]}"


def machine() -> str:
    """What tells whether a process number means a process here: host, boot and name space."""
    # Containers of one host may have its name, but count their
    # processes from 1 each.
    parts = [socket.gethostname()]
    with contextlib.suppress(OSError):
        parts.append(Path("/proc/sys/kernel/random/boot_id").read_text().strip())
    with contextlib.suppress(OSError):
        parts.append(os.readlink("/proc/self/ns/pid"))
    return " ".join(parts)


def _started(process: Any) -> str:
    """When a process of this machine was started; '' if there is none of that number."""
    # Numbers are given to new processes
    # again, so a number alone says little.
    if not isinstance(process, int) or process <= 0:
        return ""
    try:
        state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        pass
    else:
        # A killed process stays as a zombie until its parent looks.
        return "" if state in "ZX" else fields[18]
    if os.path.isdir("/proc/self"):
        return ""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return ""
    except OSError:
        pass
    return "running"

"""Who trains a stage: one process, whatever was killed, damaged, suspended or on another host."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from relay_jax.errors import UserError
from relay_jax.runtime import distributed, lease
from relay_jax.runtime.lease import LEASE, Lease

HOLDS = """
import sys, time
from pathlib import Path
from relay_jax.runtime.lease import Lease
with Lease(Path(sys.argv[1]), "stage base"):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seconds as tenths of them, or less."""
    for name, seconds in (("BEAT", 0.05), ("STALE", 0.6), ("CLAIM", 0.5), ("POLL", 0.02)):
        monkeypatch.setattr(lease, name, seconds)


def holder(folder: Path) -> subprocess.Popen:
    """Another process that holds the lease of a folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def written(folder: Path, **changes: object) -> dict:
    """A lease that another host has left behind, with an old beat."""
    about = {"token": "x", "host": "far", "machine": "far 1", "process": 7, "started": "1"}
    about |= {"beats": 3, "time": time.time() - 5, **changes}
    folder.mkdir(exist_ok=True)
    (folder / LEASE).write_text(json.dumps(about))
    return about


def refusal(folder: Path) -> str:
    with pytest.raises(UserError) as error, Lease(folder, "stage base"):
        pytest.fail("was taken")
    assert error.value.status == 2 and "\n" not in str(error.value)
    return str(error.value)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stage_has_one_owner_until_it_ends_and_after_a_kill_at_once(tmp_path: Path) -> None:
    process = holder(tmp_path)
    try:
        assert f"process {process.pid} on" in refusal(tmp_path)
        # Another stage is another matter.
        with Lease(tmp_path / "relay", "stage relay"):
            pass
        process.send_signal(signal.SIGKILL)
        # Not waited for: the zombie of a killed process trains nothing.
        until(lambda: Path(f"/proc/{process.pid}/stat").read_text().split()[2] == "Z")
        begun = time.monotonic()
        with Lease(tmp_path, "stage base"):
            assert json.loads((tmp_path / LEASE).read_text())["process"] == os.getpid()
        assert time.monotonic() - begun < lease.STALE
    finally:
        process.kill()
        process.wait()
    assert not list(tmp_path.glob("*lease*")), "something was left behind"


def test_of_several_that_start_at_once_one_has_the_stage(tmp_path: Path) -> None:
    written(tmp_path, machine=lease.machine(), process=2**22 + 1)  # the next ones take it over
    barrier, ends = threading.Barrier(6), threading.Event()
    owners: list[int] = []
    refused: list[str] = []

    def start(number: int) -> None:
        barrier.wait()
        try:
            with Lease(tmp_path, "stage base"):
                owners.append(number)
                ends.wait(20)
        except UserError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=start, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    until(lambda: len(owners) + len(refused) == 6)
    ends.set()
    for thread in threads:
        thread.join()
    assert len(owners) == 1 and len(refused) == 5


def test_another_hosts_lease_is_free_when_nothing_renews_it(tmp_path: Path) -> None:
    written(tmp_path, time=time.time() + 3600)  # its clock is wrong, which says nothing
    begun = time.monotonic()
    with Lease(tmp_path, "stage base"):
        assert time.monotonic() - begun >= lease.STALE
    written(tmp_path, time=time.time() - 10 * lease.ANCIENT)
    begun = time.monotonic()
    with Lease(tmp_path, "stage base"):
        assert time.monotonic() - begun < lease.STALE


def test_another_hosts_lease_that_is_renewed_is_respected(tmp_path: Path) -> None:
    written(tmp_path, time=time.time() - 300)  # its clock is slow
    timer = threading.Timer(0.2, lambda: written(tmp_path, beats=4))
    timer.start()
    assert "process 7 on far" in refusal(tmp_path)
    assert json.loads((tmp_path / LEASE).read_text())["beats"] == 4, "it was changed"


def test_sigterm_is_answered_while_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    written(tmp_path)
    monkeypatch.setattr(distributed, "stop_requested", lambda: True)
    with pytest.raises(lease.Stopped), Lease(tmp_path, "stage base"):
        pytest.fail("was taken")


def test_a_process_whose_stage_was_taken_over_ends_with_one_line(tmp_path: Path) -> None:
    with Lease(tmp_path, "stage base") as lease:
        lease.check()
        written(tmp_path, token="y")
        until(lambda: bool(lease._lost))
        with pytest.raises(UserError, match="taken over by process 7 on far"):
            lease.check()
    assert json.loads((tmp_path / LEASE).read_text())["token"] == "y", "the new owner's was removed"


@pytest.mark.parametrize("content", [b"", b"\xff\x00", b"[[[", b"null", b'{"token": 3}', None])
def test_a_damaged_lease_is_mended_by_its_owner_and_set_aside_without_one(
    tmp_path: Path, content: bytes | None
) -> None:
    path = tmp_path / LEASE
    with Lease(tmp_path, "stage base"):
        if content is not None:
            path.write_bytes(content)
            until(lambda: path.read_bytes().startswith(b"{\n"))
    if content is None:
        path.mkdir()
    else:
        path.write_bytes(content)
    with Lease(tmp_path, "stage base"):
        assert path.is_file()
    assert [file.name for file in tmp_path.iterdir()] == [f"{LEASE}.damaged-1"]

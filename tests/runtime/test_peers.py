"""Processes find out who has not come and who is gone: as threads, and as small programs without
JAX. With JAX: test_distributed.py."""

import socket
import threading
import time

import pytest

from relay_jax.errors import UserError
from relay_jax.runtime.peers import Peers
from tests.processes import free_port, launched, together


def met(port: int, count: int, indices: list[int], seconds: float) -> list[Peers | str]:
    """What comes of the processes with these numbers, which all begin now."""
    results: list[Peers | str] = ["did not end"] * len(indices)

    def meet(place: int, index: int) -> None:
        try:
            results[place] = Peers(f"localhost:{port}", count, index, seconds)
        except UserError as error:
            results[place] = str(error)

    threads = [threading.Thread(target=meet, args=pair) for pair in enumerate(indices)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return results


def test_all_meet_in_any_order_and_leave_without_a_word() -> None:
    peers = [one for one in met(free_port(), 4, [3, 1, 0, 2], 20) if isinstance(one, Peers)]
    assert len(peers) == 4
    for one in peers:
        one.leave()
    for one in peers:
        one.close()
    assert [one.gone(0.05) for one in peers] == [""] * 4


@pytest.mark.parametrize(
    ("indices", "missing"),
    [([0, 2], "processes 1, 3 of 4"), ([1, 2], "process 0 of 4"), ([0, 3, 1], "process 2 of 4")],
)
def test_who_does_not_come_is_named_to_all(indices: list[int], missing: str) -> None:
    for text in met(free_port(), 4, indices, 0.5):
        assert isinstance(text, str) and text.startswith(f"{missing} did not come")
        assert len(text) < 390


def test_a_number_that_two_processes_have_is_named() -> None:
    first, *others = met(free_port(), 4, [0, 1, 1], 5)
    assert first == "two processes of the run have the number 1"
    assert all("process 0 of 4" in str(other) for other in others)


def test_strangers_are_let_go() -> None:
    port, done = free_port(), threading.Event()

    def disturb() -> None:
        for words in (b"GET / HTTP/1.1\r\n\r\n", b"hello 7 of 3\n", b"hello 1 of 9\n", b""):
            while not done.is_set():
                try:
                    with socket.create_connection(("localhost", port), 1) as stranger:
                        stranger.sendall(words)
                    break
                except OSError:
                    time.sleep(0.01)

    thread = threading.Thread(target=disturb)
    thread.start()
    try:
        peers = met(port, 2, [0], 0.8) + met(port, 2, [0, 1], 20)
    finally:
        done.set()
        thread.join()
    assert peers[0] == (
        "process 1 of 2 did not come; start all of them, or for a run of one process set "
        "RELAY_NUM_PROCESSES=1"
    )
    for one in peers[1:]:
        assert isinstance(one, Peers)
        one.leave()


DIES = """
import os, signal, sys, time
from relay_jax.runtime.peers import Peers
index, (victim, ending) = int(os.environ["RELAY_PROCESS_ID"]), sys.argv[1:]
peers = Peers(os.environ["RELAY_COORDINATOR"], 4, index, 30)
if index == int(victim):
    if ending == "bye":
        peers.leave()
        sys.exit(0)
    os.kill(os.getpid(), signal.SIGKILL)
time.sleep(0.5 if ending == "bye" else 60)
peers.leave()
"""


@pytest.mark.parametrize("victim", [0, 2])
def test_all_others_name_the_one_that_is_gone_at_once(victim: int) -> None:
    begun = time.monotonic()
    ends = together(launched(4), "-c", DIES, str(victim), "kill")
    assert time.monotonic() - begun < 30
    line = (
        f"error: process {victim} of 4 is gone; its own log says why. Start all again: the same "
        "command\n"
    )
    assert [end for n, end in enumerate(ends) if n != victim] == [(1, line)] * 3


def test_who_leaves_in_order_is_not_missed() -> None:
    assert together(launched(4), "-c", DIES, "2", "bye") == [(0, "")] * 4

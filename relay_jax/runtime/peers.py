"""The processes of a run know of each other: who has not come, and who is gone, by number.

JAX's own service says neither. Where a process never starts, or process
0 dies, it ends the others by SIGABRT under pages of C++; the death of
another one is seen after 100 seconds, or where a collective happens to
fail. So every process first connects with process 0 at the address that
JAX's service has afterwards, and stays connected: the kernel closes a
connection when a process ends, however it ends.

    hello 2 of 3    from process 2, which process 0 answers with welcome
    all             from process 0, when all are there
    missing 1       from process 0, when it waits no longer
    gone 1          from process 0, when one has ended without a bye
    bye             from any, before it ends in order
"""

import contextlib
import os
import re
import selectors
import socket
import sys
import threading
import time

from absl import logging

from relay_jax.errors import UserError, one_line

PATIENCE = 10.0  # seconds of waiting before a line says for whom
GRACE = 1.0  # seconds that process 0 outlives who is gone: its end would abort the others
ANSWER = 5.0  # seconds within which whoever connects has to say who it is
# A host without power closes nothing: probes after IDLE seconds without a
# word, before JAX's heartbeats (100 s) would abort all.
IDLE, INTERVAL, PROBES = 20, 10, 5


class Peers:
    """This process's connections with the others: process 0 has all, the others have that one.

    address: host:port of process 0. seconds: how long to wait for
    those that have not come. Raises UserError that names them.
    """

    def __init__(self, address: str, count: int, index: int, seconds: float) -> None:
        self._count, self._index = count, index
        self._lost, self._known = 0, threading.Event()
        self._leaving, self._speaking = False, threading.Lock()
        host, _, port = address.rpartition(":")
        deadline = time.monotonic() + seconds
        if index == 0:
            self._connections = self._gather(int(port), deadline)
        else:
            self._connections = {0: self._join((host.strip("[]"), int(port)), deadline, seconds)}
        threading.Thread(target=self._watch, name="peers", daemon=True).start()

    def leave(self) -> None:
        """Says that this process ends in order; from now on nobody's end ends it."""
        self._leaving = True
        for connection in self._connections.values():
            _send(connection, b"bye\n")

    def close(self) -> None:
        """Closes the connections; after `leave`."""
        for connection in self._connections.values():
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
                connection.close()

    def gone(self, seconds: float) -> str:
        """A line about the process that has ended, or does so within these seconds; else ''.

        Who gets it says it: this process says nothing more of others.
        """
        if not self._known.wait(seconds):
            return ""
        if not self._may_speak():
            time.sleep(ANSWER)  # the other thread is about to end this process
        return self._says()

    def ends_alone(self) -> None:
        """This process ends with an error of its own, and with a line of its own."""
        self._may_speak()

    # How they meet

    def _gather(self, port: int, deadline: float) -> dict[int, socket.socket]:
        """Process 0: the connections with all others, by their number."""
        connections: dict[int, socket.socket] = {}
        patient_until = time.monotonic() + PATIENCE
        with _listener(port) as listener:
            while len(connections) < self._count - 1:
                now = time.monotonic()
                missing = sorted(set(range(1, self._count)) - connections.keys())
                if now > deadline:
                    for connection in connections.values():
                        _send(connection, f"missing {' '.join(map(str, missing))}\n".encode())
                    raise UserError(self._not_come(missing))
                if now > patient_until:
                    patient_until = deadline
                    logging.info("waiting for %s", self._names(missing))
                listener.settimeout(min(max(deadline - now, 0.01), 0.5))
                with contextlib.suppress(OSError):
                    connection, _ = listener.accept()
                    number = self._greet(connection)
                    if number in connections:
                        raise UserError(f"two processes of the run have the number {number}")
                    if number:
                        connections[number] = connection
        for connection in connections.values():
            _send(connection, b"all\n")
        return connections

    def _greet(self, connection: socket.socket) -> int:
        """The number of who has connected; 0 for a stranger, whose connection is closed."""
        connection.settimeout(ANSWER)
        hello = re.fullmatch(rb"hello (\d{1,9}) of (\d{1,9})\n", _line(connection))
        number = int(hello[1]) if hello and int(hello[2]) == self._count else 0
        if not 0 < number < self._count:
            connection.close()
            return 0
        _keep(connection)
        _send(connection, b"welcome\n")
        return number

    def _join(self, address: tuple[str, int], deadline: float, seconds: float) -> socket.socket:
        """The others: the connection with process 0, once all are there."""
        error: BaseException | None = None
        while time.monotonic() < deadline:
            try:
                connection = socket.create_connection(address, timeout=ANSWER)
                _send(connection, f"hello {self._index} of {self._count}\n".encode())
                if _line(connection) == b"welcome\n":
                    break
                connection.close()
            # Process 0 may come later; what answers may be the end of an earlier run.
            except OSError as caught:
                error = caught
            time.sleep(0.2)
        else:
            why = f" ({one_line(error, 80)})" if error else ""
            raise UserError(f"{self._not_come([0])}; {':'.join(map(str, address))} was tried{why}")
        _keep(connection)
        # Process 0 may have begun to wait later than this one.
        connection.settimeout(2 * seconds + ANSWER)
        answer = _line(connection)
        if answer.startswith(b"missing "):
            raise UserError(self._not_come(sorted(map(int, answer.split()[1:]))))
        if answer != b"all\n":
            raise UserError(f"{self._names([0])} is gone; its own log says why")
        return connection

    # How they watch

    def _watch(self) -> None:
        """The thread that waits for the end of others."""
        heard = dict.fromkeys(self._connections, b"")
        with selectors.DefaultSelector() as selector:
            for number, connection in self._connections.items():
                connection.settimeout(ANSWER)
                selector.register(connection, selectors.EVENT_READ, number)
            while selector.get_map() and not self._leaving:
                for key, _ in selector.select():
                    try:
                        data = self._connections[key.data].recv(4096)
                    except OSError:
                        data = b""
                    heard[key.data] += data
                    if told := re.search(rb"gone (\d{1,9})\n", heard[key.data]):
                        return self._end(int(told[1]))
                    if not data:
                        selector.unregister(key.fileobj)
                        if b"bye\n" not in heard[key.data]:
                            return self._end(key.data)

    def _end(self, number: int) -> None:
        """Ends this process because another one is gone: nothing of the run can go on."""
        if self._leaving:
            return
        self._lost = number
        if self._index == 0:
            for connection in self._connections.values():
                _send(connection, f"gone {number}\n".encode())
            time.sleep(GRACE)
        self._known.set()
        if self._may_speak():
            # Not by an exception in the main thread: it may wait in a
            # collective for the one that is gone, for ever.
            _say_last(f"error: {self._says()}\n")
            os._exit(1)

    def _may_speak(self) -> bool:
        """Once, for one of the threads."""
        with self._speaking:
            before, self._leaving = self._leaving, True
        return not before

    # What they say

    def _names(self, numbers: list[int]) -> str:
        words = ", ".join(map(str, numbers[:8])) + (" ..." if len(numbers) > 8 else "")
        return f"process{'es' if len(numbers) > 1 else ''} {words} of {self._count}"

    def _not_come(self, numbers: list[int]) -> str:
        return (
            f"{self._names(numbers)} did not come; start all of them, or for a run of one process "
            "set RELAY_NUM_PROCESSES=1"
        )

    def _says(self) -> str:
        return (
            f"{self._names([self._lost])} is gone; its own log says why. Start all again: the "
            "same command"
        )


def _listener(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port))


def _keep(connection: socket.socket) -> None:
    """Has the kernel find out whether the other host is still there."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("KEEPIDLE", IDLE), ("KEEPINTVL", INTERVAL), ("KEEPCNT", PROBES)):
        if hasattr(socket, f"TCP_{name}"):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"), value)


def _say_last(line: str) -> None:
    """Writes to stderr, and lets nothing follow: threads of JAX say at length what they miss."""
    sys.stderr.flush()
    stderr = os.dup(2)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
    os.write(stderr, line.encode())


def _send(connection: socket.socket, words: bytes) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(words)


def _line(connection: socket.socket) -> bytes:
    """A line of at most 100,000 bytes, without what follows; what has come of it at an end."""
    line = b""
    with contextlib.suppress(OSError):
        while not line.endswith(b"\n") and len(line) < 100_000:
            byte = connection.recv(1)
            if not byte:
                break
            line += byte
    return line

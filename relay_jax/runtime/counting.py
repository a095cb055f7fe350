"""Long loops over files, arrays or bytes say how far they are; logs.py shows it.

    for file in counted(files, "opening photographs"): ...
    with counting("hashing a.pt", total=4700, unit="MB") as add: ...; add(1.5)

Apart from logs.py, which imports JAX: reading data needs none, least of all in worker processes.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Protocol, TypeVar

T = TypeVar("T")
Add = Callable[[float], None]  # takes how much more is done


class Count(Protocol):
    """How a task is shown."""

    def update(self, done: float) -> None: ...

    def close(self) -> None: ...


# (what, total or None, unit) -> Count; None where nothing is shown.
_show: Callable[[str, float | None, str], Count] | None = None


def show_by(show: Callable[[str, float | None, str], Count]) -> None:
    """From now on every task is shown so."""
    global _show
    _show = show


@contextmanager
def counting(what: str, total: float | None = None, unit: str = "files") -> Iterator[Add]:
    """Around a task that may take long; total: None where nobody knows it before.

    On the main thread, or on one alone: a terminal has one line.
    """
    if _show is None:
        yield lambda more: None
        return
    count, done = _show(what, total, unit), 0.0

    def add(more: float) -> None:
        nonlocal done
        done += more
        count.update(done)

    try:
        yield add
    finally:
        count.close()


def counted(
    items: Iterable[T], what: str, total: float | None = None, unit: str = "files"
) -> Iterator[T]:
    """The items, counted while they are taken; each counts when the next one is asked for."""
    with counting(what, total, unit) as add:
        for item in items:
            yield item
            add(1)

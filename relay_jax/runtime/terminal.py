"""What a person at a terminal sees: one live line of the task that runs, and log lines above it.

Elsewhere, in a file or a pipe, there is no live line: `Progress`
(logs.py) writes log lines instead.
"""

import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from relay_jax.runtime import distributed

if TYPE_CHECKING:
    from tqdm import tqdm

_BAR = "{desc} {percentage:3.0f}%|{bar}|"
_NO_BAR = "{desc}{bar}"  # nothing but blanks, where the end is not known
_shown: "tqdm | None" = None  # there is one line


def is_terminal() -> bool:
    """Whether somebody may be watching: progress is a live line, not log lines."""
    try:
        watched = sys.stderr.isatty() and os.environ.get("TERM") != "dumb"
    except (AttributeError, ValueError):  # a notebook's stream, or a closed one
        return False
    return watched and distributed.is_first()


def show(text: str, done: float, total: float) -> None:
    """Shows the live line, or changes it: a few times per second at most.

    total: math.inf where it is not known.
    """
    global _shown
    if _shown is None:
        # Imported here: most commands run where nobody watches.
        from tqdm import tqdm

        _shown = tqdm(
            desc=text,
            total=total,
            initial=done,
            bar_format=_BAR if total < math.inf else _NO_BAR,
            nrows=20,
            leave=False,
            file=sys.stderr,
            mininterval=0.1,
        )
    _shown.total, _shown.bar_format = (total, _BAR) if total < math.inf else (None, _NO_BAR)
    _shown.ncols = _width()
    _shown.set_description_str(text, refresh=False)
    _shown.update(done - _shown.n)
    if not done:
        _shown.refresh()  # whatever was shown just now: the next change may come late


def _width() -> int:
    """Columns of the terminal, which may be resized at any time."""
    # Not tqdm's own way: some consoles say that they have none,
    # nor rows (nrows), and it would show nothing there.
    try:
        columns = os.get_terminal_size(sys.stderr.fileno()).columns
    except (OSError, ValueError):
        columns = 0
    return max((columns or 80) - 1, 20)


def close() -> None:
    """Removes the live line."""
    global _shown
    if _shown is not None:
        _shown.close()
        _shown = None


@contextmanager
def above() -> Iterator[None]:
    """Around the writing of other lines: the live line goes away, and comes back below them."""
    if _shown is None:
        yield
        return
    _shown.clear()
    try:
        yield
    finally:
        if _shown is not None:
            _shown.refresh()


class Plain(logging.Formatter):
    """Time and message, for people: absl's prefix has threads, files and lines of code."""

    def __init__(self) -> None:
        super().__init__("%(asctime)s %(message)s", "%Y-%m-%d %H:%M:%S")

    def formatMessage(self, record: logging.LogRecord) -> str:
        text = super().formatMessage(record)
        if record.levelno < logging.WARNING:
            return text
        level = "warning" if record.levelno < logging.ERROR else "error"
        return text.replace(record.asctime, f"{record.asctime} {level}:", 1)

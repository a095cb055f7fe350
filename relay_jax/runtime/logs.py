"""What a run says while it runs: progress lines, and scalars to JSON lines and TensorBoard."""

import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from logging import Handler, LogRecord
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
from absl import flags, logging

from relay_jax.errors import Stopped, StorageError, one_line
from relay_jax.runtime import counting, distributed, terminal
from relay_jax.runtime.files import cannot_write, mend_jsonl, read_jsonl, write_text

PACKAGE = str(Path(__file__).parents[1])
# Libraries whose errors this package raises itself, in one line.
RAISED_ELSEWHERE = ("orbax", "tensorstore", "tensorboardX")
LIVE_SECONDS = 0.5  # between two changes of rates on a terminal
MAX_MESSAGE = 390  # characters of an error, `error: ` included


def quieten() -> None:
    """Keeps the lines of this package, with their time, and of the libraries errors alone.

    --verbosity brings absl's prefixes back.
    """
    counting.show_by(Count)
    handler = logging.get_absl_handler()
    handler.addFilter(_is_wanted)
    if not flags.FLAGS["verbosity"].present:
        handler.setFormatter(terminal.Plain())
    _write_above(handler.python_handler)
    # A full disk ends threads of Orbax and TensorBoard as well, each
    # with a traceback above the line that matters.
    threading.excepthook = _of_thread


def _write_above(handler: Handler) -> None:
    """Log lines come above the live line."""
    if "emit" not in vars(handler):
        emit = handler.emit

        def above(record: LogRecord) -> None:
            with terminal.above():
                emit(record)

        vars(handler)["emit"] = above


def _is_wanted(line: LogRecord) -> bool:
    # Orbax and JAX log several lines for every checkpoint: the
    # progress would be buried.
    if line.pathname.startswith(PACKAGE):
        return True
    return line.levelno >= 40 and not any(name in line.pathname for name in RAISED_ELSEWHERE)


def _of_thread(arguments: threading.ExceptHookArgs) -> None:
    if not isinstance(arguments.exc_value, OSError):
        threading.__excepthook__(arguments)


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one short line on stderr; status 2 is for a mistake of the user's."""
    # Libraries put whole lists and files into their messages: the
    # beginning says what is wrong, the end what to do.
    terminal.close()
    text = one_line(ValueError(message), MAX_MESSAGE - len("error: "))
    print(f"error: {text}", file=sys.stderr, flush=True)
    sys.exit(status)


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ScalarLog:
    """metrics.jsonl and TensorBoard's event files in one folder, on process 0; nothing elsewhere.

    images: those that the run has seen. Lines past them, of a run
    that was killed after its last checkpoint, are dropped, so that a
    continued run leaves one gapless curve. All methods raise
    StorageError for what cannot be written.
    """

    def __init__(self, folder: Path, images: int) -> None:
        self._folder, self._path, self._events = (
            folder,
            folder / "metrics.jsonl",
            None,
        )
        if not distributed.is_first():
            return
        # Imported here: slow, and only one process of a run writes.
        from tensorboardX import SummaryWriter

        lines = [line for line in mend_jsonl(self._path, is_measure) if line["images"] <= images]
        write_text(self._path, "".join(json.dumps(line) + "\n" for line in lines))
        with self._writing():
            self._events = SummaryWriter(str(folder), purge_step=images + 1)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise cannot_write(self._folder, error) from error

    @contextmanager
    def _event_file(self) -> Iterator[Any]:
        """TensorBoard's writer, if this process has one that works."""
        # It writes in a thread of its own, which a full disk ends:
        # further events would wait for it in a queue for ever.
        assert self._events is not None
        if not self._events.file_writer.event_writer._worker.is_alive():
            raise StorageError(
                f"the event file in {self._folder} cannot be written; the same command continues"
            )
        with self._writing():
            yield self._events

    def write(self, images: int, scalars: dict[str, float]) -> None:
        """One line: the images seen, the time, and the scalars."""
        if self._events is None:
            return
        line = {"images": images, "time": round(time.time(), 3), **scalars}
        # Appended, not replaced like other files: there is a line
        # for every few steps, and half a line at the end is dropped
        # by the next start.
        with self._writing(), self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")
        with self._event_file() as events:
            for name, value in scalars.items():
                events.add_scalar(name, value, images)

    def picture(self, images: int, name: str, pixels: np.ndarray) -> None:
        """pixels: uint8 [h, w, 3], for TensorBoard."""
        if self._events is not None:
            with self._event_file() as events:
                events.add_image(name, pixels, images, dataformats="HWC")

    def text(self, images: int, name: str, value: Any) -> None:
        """Plain values, for TensorBoard: JSON in a block of Markdown."""
        if self._events is not None:
            with self._event_file() as events:
                events.add_text(name, f"```json\n{json.dumps(value, indent=1)}\n```", images)

    def close(self) -> None:
        """Writes what waits, and closes the event file."""
        if self._events is None:
            return
        writer = self._events.file_writer.event_writer
        try:
            with self._event_file() as events:
                events.close()
        finally:
            # Where it failed, TensorBoard and its thread would try
            # again at the interpreter's exit, and print tracebacks
            # under the one line that says what is wrong.
            writer._closed = True
            if writer._worker is not None and writer._worker.is_alive():
                writer._worker.stop()


def is_measure(line: dict) -> bool:
    """Whether a line of metrics.jsonl is one: numbers alone, among them the images seen."""
    numbers = (not isinstance(x, bool) and isinstance(x, int | float) for x in line.values())
    if not all(numbers):
        return False
    images = line.get("images")
    return isinstance(images, int) and 0 <= images < 2**53 and all(map(_is_small, line.values()))


def _is_small(value: float) -> bool:
    # JSON has whole numbers of any length, and arrays have not.
    return isinstance(value, float) or abs(value) < 2**53


def read_curve(path: Path) -> list[dict]:
    """The lines of a metrics.jsonl; what is no such line is left out."""
    return [line for line in read_jsonl(path) if is_measure(line)]


def curve_summary(lines: list[dict]) -> dict[str, Any]:
    """The lines of metrics.jsonl in a few numbers.

    They are medians of the rates, the mean loss of the last tenth,
    and the loader's share of the time.
    """
    # Lines of an evaluation hold scores alone.
    lines = [line for line in lines if "images_per_second" in line]
    losses = [line["loss"] for line in lines if "loss" in line]
    tail = losses[-max(len(losses) // 10, 1) :]
    rates = np.asarray([line["images_per_second"] for line in lines])
    images = np.diff([0, *(line["images"] for line in lines)])
    seconds = images / np.maximum(rates, 1e-9)
    shares = np.asarray([line.get("loader_share", 0.0) for line in lines])
    return {
        "images_per_second": _median(lines, "images_per_second") or 0.0,
        "tflops_per_device": _median(lines, "tflops_per_device") or 0.0,
        "utilisation": _median(lines, "utilisation"),
        "loader_share": round(float((shares * seconds).sum() / max(seconds.sum(), 1e-9)), 4),
        "steps_skipped": lines[-1].get("steps_skipped", 0) if lines else 0,
        "loss": round(float(np.mean(tail)), 5) if tail else None,
    }


def _median(lines: list[dict], key: str) -> float | None:
    values = [line[key] for line in lines if key in line]
    return float(np.median(values)) if values else None


class Progress:
    """Rate and time left of a long loop: a live line on a terminal, else a log line now and then.

    total, done: images. of_rate: further words that follow from the
    rate. steady: nothing is compiled on the way and results come in
    bursts, so every rate is that since the beginning. every: seconds
    between the lines of `update`.
    """

    _unit, _per_second = "images", "img/s"

    def __init__(
        self,
        what: str,
        total: float,
        done: float = 0,
        *,
        clock: Callable[[], float] = time.monotonic,
        of_rate: Callable[[float], str] = lambda rate: "",
        steady: bool = False,
        every: float = 5.0,
    ) -> None:
        self._what, self._total, self._clock = what, total, clock
        self._of_rate, self._steady, self._every = of_rate, steady, every
        self._start_done, self._last_done, self._last = done, done, clock()
        self._start: float | None = self._last if steady else None
        self._spoken = False
        self._extra = self._brief = ""
        self._rate = self._overall = 0.0

    def update(self, done: float) -> None:
        """A line if `every` seconds have passed since the last, and at the end of a long loop."""
        waited = self._clock() - self._last
        ends = done >= self._total and (self._spoken or self._steady) and done > self._last_done
        if waited > self._every or ends or (waited > LIVE_SECONDS and terminal.is_terminal()):
            self.line(done)

    def line(self, done: float, extra: str = "", brief: str = "") -> float:
        """Says where the loop is, and returns the rate since the last time, images per second.

        brief: what the live line has in the place of of_rate's words.
        """
        now = self._clock()
        self._spoken = True
        rate = (done - self._last_done) / max(now - self._last, 1e-9)
        # The first interval holds the compilation: the time left is
        # counted from its end.
        if self._start is None:
            self._start, self._start_done, overall = now, done, rate
        else:
            overall = (done - self._start_done) / max(now - self._start, 1e-9)
        rate = overall if self._steady else rate
        self._last_done, self._last = done, now
        self._extra, self._brief = extra, brief
        self._rate, self._overall = rate, overall
        if terminal.is_terminal():
            self.show(done)
        elif distributed.is_first():
            logging.info("%s", self._text(done, " of ", self._of_rate(rate)))
        return rate

    def show(self, done: float) -> None:
        """Moves the live line on, on a terminal; the rates are those of the last `line`."""
        if not terminal.is_terminal():
            return
        if done >= self._total:
            terminal.close()
        else:
            # Short, for terminals of 80 columns.
            terminal.show(self._text(done, "/", self._brief), done, self._total)

    def _text(self, done: float, of: str, further: str) -> str:
        total = f"{of}{self._total:,.0f}" if self._total < math.inf else ""
        parts = [f"{self._what}: {done:,.0f}{total} {self._unit}"]
        if self._spoken:
            left = (self._total - done) / self._overall if self._overall > 0 else math.inf
            parts += [self._extra, f"{self._rate:.4g} {self._per_second}", further]
            parts += [f"{duration(left)} left"] if total else []
        return ", ".join(part for part in parts if part)


class Count(Progress):
    """Progress of anything that is counted (counting.py); total: None where nobody knows it."""

    def __init__(self, what: str, total: float | None, unit: str) -> None:
        super().__init__(what, math.inf if total is None else total)
        self._unit, self._per_second = unit, f"{unit}/s"
        # What cannot be counted may be one call of a library: this
        # is all that is seen of it.
        if total is None and terminal.is_terminal():
            terminal.show(what, 0, math.inf)

    def close(self) -> None:
        """The task is over, or has failed."""
        # Of one that took no time the line is that of the task around it.
        if self._spoken or self._total == math.inf:
            terminal.close()


class PrepareProgress:
    """Lines of progress of a preparation, and its answer to SIGTERM."""

    def __init__(self) -> None:
        self._progress: Progress | None = None

    def __call__(self, done: int, total: int) -> None:
        if self._progress is None:
            self._progress = Progress("prepare", total, done, every=10.0)
        self._progress.update(done)
        if distributed.stop_requested():
            raise Stopped("stopped by SIGTERM while preparing")

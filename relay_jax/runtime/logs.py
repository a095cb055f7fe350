"""Progress on the console, scalars to JSONL and TensorBoard, pictures as PNG."""

import json
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from PIL import Image


def quieten() -> None:
    """Keeps our lines and drops those of the libraries, which would bury them, up to warnings."""
    ours = str(Path(__file__).parents[1])
    logging.get_absl_handler().addFilter(lambda r: r.levelno >= 40 or r.pathname.startswith(ours))


def fail(message: object, status: int = 2) -> NoReturn:
    """Ends the program with one line on stderr and an exit status: 2 for a mistake of the
    user's."""
    print("error: " + " ".join(str(message).split()), file=sys.stderr, flush=True)
    sys.exit(status)


def is_writer() -> bool:
    """True on the one process that writes files and console lines."""
    return jax.process_index() == 0


def duration(seconds: float) -> str:
    """Seconds as 1:02:03 or 2:03."""
    if not math.isfinite(seconds):
        return "?"
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


class ScalarLog:
    """metrics.jsonl and TensorBoard event files in one folder. Lines past `images` (of a run
    that was killed after its last checkpoint) are dropped at the start, so a continued run
    leaves one gapless curve."""

    def __init__(self, folder: Path, images: int) -> None:
        self._path, self._events = folder / "metrics.jsonl", None
        if not is_writer():
            return
        from tensorboardX import SummaryWriter  # imported late: only one process of a run writes

        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in read_jsonl(self._path) if line["images"] <= images]
        _replace_text(self._path, "".join(json.dumps(line) + "\n" for line in kept))
        self._events = SummaryWriter(str(folder), purge_step=images + 1)

    def write(self, images: int, scalars: dict[str, float]) -> None:
        """One line: the images seen, the time, and the scalars."""
        if self._events is None:
            return
        with self._path.open("a") as file:
            file.write(
                json.dumps({"images": images, "time": round(time.time(), 3), **scalars}) + "\n"
            )
        for name, value in scalars.items():
            self._events.add_scalar(name, value, images)

    def picture(self, images: int, name: str, pixels: np.ndarray) -> None:
        """pixels: uint8 [h, w, 3], for TensorBoard."""
        if self._events is not None:
            self._events.add_image(name, pixels, images, dataformats="HWC")

    def text(self, images: int, name: str, value: Any) -> None:
        """Plain values, for TensorBoard: JSON in a block of Markdown."""
        if self._events is not None:
            self._events.add_text(name, f"```json\n{json.dumps(value, indent=1)}\n```", images)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


def read_jsonl(path: Path) -> list[dict]:
    """The lines of a JSONL file; a half-written last line and a missing file are no lines."""
    lines = []
    for text in path.read_text().splitlines() if path.exists() else []:
        try:
            lines.append(json.loads(text))
        except json.JSONDecodeError:
            break
    return lines


def curve_summary(lines: list[dict]) -> dict[str, Any]:
    """The lines of metrics.jsonl in a few numbers: medians of the rates, loss of the last
    tenth, the loader's share of the time."""
    lines = [line for line in lines if "images_per_second" in line]  # not those of an evaluation
    losses = [line["loss"] for line in lines if "loss" in line]
    tail = losses[-max(len(losses) // 10, 1) :]
    rates = np.asarray([line["images_per_second"] for line in lines])
    images = np.diff([0, *(line["images"] for line in lines)])
    seconds = images / np.maximum(rates, 1e-9)
    shares = np.asarray([line.get("loader_share", 0.0) for line in lines])

    def median(key: str) -> float | None:
        found = [line[key] for line in lines if key in line]
        return float(np.median(found)) if found else None

    return {
        "images_per_second": median("images_per_second") or 0.0,
        "tflops_per_device": median("tflops_per_device") or 0.0,
        "utilisation": median("utilisation"),
        "loader_share": round(float((shares * seconds).sum() / max(seconds.sum(), 1e-9)), 4),
        "steps_skipped": lines[-1]["steps_skipped"] if lines else 0,
        "loss": round(float(np.mean(tail)), 5) if tail else None,
    }


def append_jsonl(path: Path, value: dict) -> None:
    """Adds a line to a file that stays whole, whatever happens."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(path, "".join(json.dumps(line) + "\n" for line in [*read_jsonl(path), value]))


def _replace_text(path: Path, text: str) -> None:
    temporary = path.with_suffix(".tmp")
    temporary.write_text(text)
    temporary.replace(path)


def write_text(path: Path, text: str) -> None:
    """Writes a whole file or nothing."""
    path.parent.mkdir(parents=True, exist_ok=True)
    _replace_text(path, text)


def write_json(path: Path, value: dict) -> None:
    """Writes a whole file or nothing."""
    write_text(path, json.dumps(value, indent=1) + "\n")


def write_png(path: Path, pixels: np.ndarray) -> None:
    """uint8 [h, w, 3] to a PNG; the file appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    Image.fromarray(pixels).save(temporary, format="png")
    temporary.replace(path)


class Progress:
    """Rate and time left of a long loop, as one console line now and then.

    of_rate: what else to say that follows from the rate. steady: nothing is compiled on the way
    and results come in
    bursts, so every rate is that since the beginning.
    """

    def __init__(
        self,
        what: str,
        total: int,
        done: int = 0,
        clock: Callable[[], float] = time.monotonic,
        of_rate: Callable[[float], str] = lambda rate: "",
        steady: bool = False,
    ) -> None:
        self._what, self._total, self._clock, self._of_rate, self._steady = (
            what,
            total,
            clock,
            of_rate,
            steady,
        )
        self._start_done, self._last_done, self._last = done, done, clock()
        self._start: float | None = self._last if steady else None

    def line(self, done: int, extra: str = "") -> float:
        """Prints one line and returns the rate since the last one. The first interval holds the
        compilation and does not count towards the time left."""
        now = self._clock()
        rate = (done - self._last_done) / max(now - self._last, 1e-9)
        if self._start is None:
            self._start, self._start_done, overall = now, done, rate
        else:
            overall = (done - self._start_done) / max(now - self._start, 1e-9)
        rate = overall if self._steady else rate
        self._last_done, self._last = done, now
        left = (self._total - done) / overall if overall > 0 else math.inf
        if is_writer():
            further = self._of_rate(rate)
            logging.info(
                "%s: %s of %s images%s, %.4g img/s%s, %s left",
                self._what,
                f"{done:,}",
                f"{self._total:,}",
                f", {extra}" if extra else "",
                rate,
                f", {further}" if further else "",
                duration(left),
            )
        return rate

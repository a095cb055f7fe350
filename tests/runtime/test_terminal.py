"""What is seen while a command runs: a live line on a terminal, plain log lines elsewhere."""

import json
import os
import pty
import re
import signal
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from absl import logging

from relay_jax.errors import Stopped
from relay_jax.runtime import distributed
from relay_jax.runtime.compiling import FILE, compiling
from relay_jax.runtime.ending import to_the_end

ROOT = Path(__file__).parents[2]
# A loop of ten seconds, with a log line in the middle; `logging` as the program has it.
SCRIPT = """
import time
from absl import app, logging
from relay_jax.runtime import counting, logs
def main(_):
    logs.quieten()
    logs.PACKAGE = ""  # this script's lines are wanted too
    times = iter([float(t) for t in range(1000)])
    progress = logs.Progress(
        "base", 1000, clock=lambda: next(times), of_rate=lambda rate: "9 FLOP/s",
    )
    for done in range(100, 1001, 100):
        if done % 200 == 0:
            progress.line(done, "loss 0.5", "loader 1%")
        progress.show(done)
        if done == 500:
            logging.warning("something")
    with counting.counting("listing photographs", unit="images") as add:
        logs.LIVE_SECONDS = 0.0
        for _ in range(2):
            time.sleep(0.15)
            add(1000)
    logging.info("finished")
app.run(main)
"""


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "TERM": "xterm"}


def in_a_terminal(*arguments: str) -> str:
    """What a program writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    with subprocess.Popen(
        [sys.executable, "-c", SCRIPT, *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        env=environment(),
    ):
        os.close(theirs)
        written = b""
        try:
            while part := os.read(ours, 1 << 16):
                written += part
        except OSError:  # the other end is closed
            pass
    os.close(ours)
    return written.decode()


def elsewhere(*arguments: str) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, *arguments],
        capture_output=True,
        text=True,
        env=environment(),
    )
    return done.stderr.splitlines()


def test_a_terminal_has_one_live_line_and_whole_log_lines_above_it() -> None:
    written = in_a_terminal()
    seen = r"\rbase: \d00/1,000 images, loss 0.5, \S+ img/s, loader 1%, \d:\d\d left +\d+%\|"
    assert re.search(seen, written), written
    # Where the end is not known, there is no bar.
    assert re.search(r"\rlisting photographs +\r", written), written
    assert re.search(r"\rlisting photographs: 2,000 images, \S+ images/s +\r", written), written
    # The log line begins where the live line was, and takes no part of it.
    lines = [line.rpartition("\r")[2] for line in written.replace("\r\n", "\n").split("\n")]
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert any(re.fullmatch(rf"{stamp} warning: something", line) for line in lines), written
    assert any(re.fullmatch(rf"{stamp} finished", line) for line in lines)
    # It is gone in the end, and no progress was logged.
    assert written.count("\n") == 2


def test_elsewhere_lines_have_time_and_message() -> None:
    lines = elsewhere()
    stamp = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"
    assert len(lines) == 7 and all(re.match(rf"{stamp} ", line) for line in lines)
    assert re.fullmatch(
        rf"{stamp} base: 400 of 1,000 images, loss 0.5, 200 img/s, 9 FLOP/s, 0:03 left", lines[1]
    )
    assert lines[2].endswith(" warning: something") and lines[-1].endswith(" finished")


def test_verbosity_brings_files_and_threads_back() -> None:
    lines = elsewhere("--verbosity=0")
    assert re.match(r"I\d{4} \d\d:\d\d:\d\d\.\d+ \d+ logs.py:\d+\] base: ", lines[0])


def test_a_compilation_says_how_long_it_took_last_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *values: said.append(text % values))
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path))
    try:
        with compiling("the step"):  # in no time: it was compiled before
            pass
        assert said.pop() == "compiles the step, cpu" and not (tmp_path / FILE).exists()
        monkeypatch.setattr("relay_jax.runtime.compiling.SHORT", 0.0)
        with compiling("the sampler of base"):
            pass
        assert said[0] == "compiles the sampler of base, cpu"
        assert re.fullmatch(r"compiled in \d+ s", said[1])
        (key,) = json.loads((tmp_path / FILE).read_text())
        (tmp_path / FILE).write_text(json.dumps({key: 71.2}))
        with compiling("the sampler of base"):
            pass
        assert said[2] == "compiles the sampler of base, cpu (71 s last time)"
        (tmp_path / FILE).write_text("half a li")  # of a full disk
        with compiling("the sampler of base"):
            pass
        assert list(json.loads((tmp_path / FILE).read_text())) == [key]
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


# Ctrl-C


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is asked of this process is forgotten afterwards."""
    for name in ("_stop_flag", "_by_user", "_asked"):
        monkeypatch.setattr(distributed, name, False)


def interrupt() -> None:
    os.kill(os.getpid(), signal.SIGINT)


@pytest.mark.usefixtures("asked")
def test_ctrl_c_asks_once_and_then_ends(capfd: pytest.CaptureFixture[str]) -> None:
    before = signal.getsignal(signal.SIGINT)  # a shell's background jobs ignore it
    with distributed.sigterm_asks():
        with pytest.raises(KeyboardInterrupt):  # nothing asks: nothing would be saved
            interrupt()
        assert not distributed.stop_requested()
        interrupt()
        assert distributed.stop_requested() and distributed.stopped_by() == "Ctrl-C"
        assert "saves and stops" in capfd.readouterr().err
        with pytest.raises(KeyboardInterrupt):
            interrupt()
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.usefixtures("asked")
@pytest.mark.parametrize(
    "number, status, by", [(signal.SIGINT, 130, "Ctrl-C"), (signal.SIGTERM, 75, "SIGTERM")]
)
def test_the_end_says_who_stopped_it_and_how_to_continue(
    number: int, status: int, by: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    said: list[str] = []
    monkeypatch.setattr(logging, "info", lambda text, *values: said.append(text % values))

    def action() -> None:
        assert not distributed.stop_requested()
        os.kill(os.getpid(), number)
        assert distributed.stop_requested()
        raise Stopped("stage base: stopped by SIGTERM and saved at 64 images")

    monkeypatch.setattr(sys, "orig_argv", ["/usr/bin/python", "-m", "relay_jax.main", "--x=a b"])
    with pytest.raises(SystemExit) as end:
        to_the_end(action)
    assert end.value.code == status
    assert said == [
        f"stage base: stopped by {by} and saved at 64 images; the same command continues: "
        "python -m relay_jax.main '--x=a b'"
    ]

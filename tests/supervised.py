"""What trials that kill a program need: a supervisor in a process of its own, and command lines
that it forks.

The supervisor imports the package once and forks for each start, so
that a start costs a second and not ten. Used by the tests and by
benchmarks/endurance.py.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

from absl import logging

from relay_jax import commandline, main

ROOT = Path(__file__).parents[1]
PR_SET_PDEATHSIG = 1


def supervise(supervisor: str, folder: Path, config: str) -> dict:
    """Runs the file `supervisor` on a folder with config.py; its last line, JSON, and the
    folder."""
    (folder / "config.py").write_text(config)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, supervisor, str(folder)],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=1200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise AssertionError(f"hung: {process.communicate()[0][-3000:]}") from None
    assert process.returncode == 0, output[-3000:]
    return {**json.loads(output.splitlines()[-1]), "folder": folder}


def forked(log: Path, action: Callable[[], object]) -> int:
    """Forks a process that does something and ends, and appends what it prints to a file; its
    number."""
    pid = os.fork()
    if pid:
        return pid
    # On Linux it ends with its supervisor, and does not go on in its folder
    # while the next one begins.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    status = 1
    try:
        with log.open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        action()
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        # Not sys.exit: the supervisor's own ways out must not run here.
        os._exit(status)


def command(*arguments: str) -> None:
    """The command line with these arguments, to its end: SystemExit, or nothing for status 0."""
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    sys.argv = ["main", *arguments]
    commandline.parse_flags(sys.argv)
    main.main([])


def start(folder: Path, name: str, *arguments: str) -> int:
    """Forks a process that runs the command line with FOLDER/config.py, and tells into
    FOLDER/NAME.log; its number."""
    config = f"--config={folder / 'config.py'}"
    return forked(folder / f"{name}.log", partial(command, config, *arguments))


def end(pid: int, seconds: float = 600) -> int:
    """Waits for a process; its exit status, or minus the signal that ended it.

    Raises TimeoutError, and kills it, if it needs longer.
    """
    status = wait_until(pid, lambda: False, seconds)
    assert status is not None
    return status


def wait_until(pid: int, condition: Callable[[], bool], seconds: float = 300) -> int | None:
    """Waits until the condition holds; the exit status if the process ended before, None if not.

    Raises TimeoutError, and kills the process, if it needs longer.
    """
    deadline = time.monotonic() + seconds
    while not condition():
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            raise TimeoutError(f"process {pid} has not come so far within {seconds:g} s")
        time.sleep(0.002)
    return None

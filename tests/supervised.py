"""What tests that kill a program need: a supervisor in a process of its own, and command lines
that it forks.

The supervisor imports the package once and forks for each start, so that a start costs a second
and not ten.
"""

import json
import os
import signal
import subprocess
import sys
import traceback
from pathlib import Path

import pytest
from absl import logging

from relay_jax import commandline, main

ROOT = Path(__file__).parents[1]


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
        said, _ = process.communicate(timeout=1200)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hung: {process.communicate()[0][-3000:]}")
    assert process.returncode == 0, said[-3000:]
    return {**json.loads(said.splitlines()[-1]), "folder": folder}


def start(folder: Path, name: str, *arguments: str) -> int:
    """Forks a process that runs the command line with FOLDER/config.py, and tells into
    FOLDER/NAME.log; its number."""
    pid = os.fork()
    if pid:
        return pid
    status = 1
    try:
        with (folder / f"{name}.log").open("a") as file:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
        logging.use_absl_handler()
        logging.set_verbosity(logging.INFO)
        sys.argv = ["main", f"--config={folder / 'config.py'}", *arguments]
        commandline.parse_flags(sys.argv)
        main.main([])
        status = 0
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(status)


def end(pid: int) -> int:
    """Waits for a process; its exit status, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

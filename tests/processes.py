"""Programs of several processes of this machine, and what they print."""

import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
SECONDS = 400  # for one program; a hang is a failure


def free_port() -> int:
    """A port that nobody uses at the moment."""
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def launched(count: int, devices: int = 1) -> list[dict[str, str]]:
    """The environments of `count` processes as the launchers set them, in their order."""
    common = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices),
        "RELAY_COORDINATOR": f"localhost:{free_port()}",
        "RELAY_NUM_PROCESSES": str(count),
        "RELAY_TIMEOUT": "60",
    }
    return [{**common, "RELAY_PROCESS_ID": str(index)} for index in range(count)]


def together(environments: Sequence[Mapping[str, str]], *arguments: str) -> list[tuple[int, str]]:
    """Runs `python ARGUMENTS` once in each environment, at the same time: statuses and outputs."""
    processes = [
        subprocess.Popen(
            [sys.executable, *arguments],
            cwd=ROOT,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        for environment in environments
    ]
    ends = []
    try:
        for process in processes:
            output = process.communicate(timeout=SECONDS)[0]
            ends.append((process.returncode, output))
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return ends

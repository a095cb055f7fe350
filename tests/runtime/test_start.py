"""The first seconds of a command: one line for what JAX cannot read, status 75 for SIGTERM."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMMANDS = {
    "module": ["-m", "relay_jax.main", "--config=demo"],
    "file": [str(ROOT / "relay_jax" / "main.py"), "--config=demo"],
    "converter": ["-m", "relay_jax.official.convert", "file", "--out=x"],
    "its old name": ["-m", "relay_jax.tools.convert", "file", "--out=x"],
}


def run(folder: Path, command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Runs a command in a folder; the file alone must find the package by itself."""
    path = {} if command == "file" else {"PYTHONPATH": str(ROOT)}
    kept = {k: v for k, v in os.environ.items() if k not in ("JAX_NUM_CPU_DEVICES", "PYTHONPATH")}
    return subprocess.run(
        [sys.executable, *COMMANDS[command]],
        cwd=folder,
        capture_output=True,
        text=True,
        env=kept | path | variables,
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_a_variable_that_jax_cannot_read_is_one_line(tmp_path: Path, command: str) -> None:
    done = run(tmp_path, command, JAX_NUM_CPU_DEVICES="abc")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("error: JAX cannot be imported")
    assert "JAX_NUM_CPU_DEVICES" in done.stderr and len(done.stderr) < 400


def test_a_device_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    code = (
        "from relay_jax.runtime import devices, logs\n"
        "try:\n    devices.setup(4, 1)\nexcept ValueError as error:\n    logs.fail(error)\n"
    )
    for platform in ("cuda", "nonsense"):
        done = subprocess.run(
            [sys.executable, "-c", code],
            capture_output=True,
            text=True,
            env={**os.environ, "JAX_PLATFORMS": platform, "PYTHONPATH": str(ROOT)},
        )
        assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
        assert f"JAX_PLATFORMS={platform}" in done.stderr and len(done.stderr) < 400


def test_sigterm_in_the_first_seconds_asks_for_a_new_start(tmp_path: Path) -> None:
    """An import of JAX that never ends stands for one that takes seconds."""
    (tmp_path / "jax.py").write_text("print('imports', flush=True)\nimport time\ntime.sleep(60)\n")
    process = subprocess.Popen(
        [sys.executable, "-m", "relay_jax.main", "--config=demo"],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": f"{tmp_path}:{ROOT}"},
    )
    try:
        assert process.stdout is not None and process.stdout.readline() == "imports\n"
        process.send_signal(signal.SIGTERM)
        _, output = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 75 and output.count("\n") == 1 and "SIGTERM" in output

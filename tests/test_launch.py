"""The launchers without a cloud: what they print, what they pass on, when they start again.

Programs that are not there (gcloud, srun, and Python itself where it does not matter) are
replaced by small scripts.
"""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[1]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])
RUN = ["--config=configs/demo.py:smoke", "--workdir=runs/a b"]


def launch(
    script: str, *arguments: str, status: int = 0, seconds: int = 300, **environ: str
) -> str:
    result = subprocess.run(
        ["bash", str(LAUNCH / script), *arguments],
        cwd=ROOT,
        env={**os.environ, **environ},
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        timeout=seconds,
    )
    assert result.returncode == status, result.stdout[-3000:]
    return result.stdout


def program(folder: Path, name: str, text: str) -> Path:
    """An executable script in folder/bin."""
    path = folder / "bin" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/usr/bin/env bash\n{text}\n")
    path.chmod(0o755)
    return path


def with_programs(folder: Path) -> str:
    return f"{folder / 'bin'}:{os.environ['PATH']}"


def fake_python(folder: Path, *statuses: int) -> Path:
    """Notes its process number and arguments in FOLDER/calls; ends with each status in turn,
    then with 0."""
    (folder / "statuses").write_text("".join(f"{s}\n" for s in statuses))
    return program(
        folder,
        "fake-python",
        f"""cd {folder}
echo "${{RELAY_PROCESS_ID:-}} ${{RELAY_COORDINATOR:-}} $*" >>calls
status=$(head -n 1 statuses); sed -i 1d statuses; exit "${{status:-0}}" """,
    )


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_scripts_are_strict_and_pass_shellcheck(script: Path) -> None:
    assert "set -euo pipefail" in script.read_text().splitlines()
    assert os.access(script, os.X_OK)
    passes("shellcheck", script)


def passes(linter: str, file: Path) -> None:
    """Skips where the linter is not installed."""
    bundled = Path(sys.executable).with_name(linter)  # where pip puts it; PATH may not have it
    program = str(bundled) if bundled.exists() else shutil.which(linter)
    if not program:
        pytest.skip(f"needs {linter} (requirements-dev.txt)")
    result = subprocess.run([program, str(file)], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_help_says_how_and_nothing_to_run_is_refused(script: Path) -> None:
    assert launch(script.name, "--help").startswith("Usage: ")
    assert launch(script.name, status=2).startswith("error: ")


def test_dry_runs_need_nothing_and_print_the_commands() -> None:
    output = launch(
        "local_processes.sh", "--dry-run", "-n", "2", "-k", "3", "--port", "1234", "--", *RUN
    ).splitlines()
    assert (
        len(output) == 2
        and "JAX_NUM_CPU_DEVICES=3 RELAY_COORDINATOR=localhost:1234 RELAY_NUM_PROCESSES=2"
        in output[0]
    )
    assert "RELAY_PROCESS_ID=1" in output[1] and output[1].endswith(r"--workdir=runs/a\ b")

    output = launch(
        "gpu_node.sh", "--dry-run", "--gpus", "0,1", "--log", "a.log", "--", *RUN, JAX_PLATFORMS=""
    )
    assert (
        r"JAX_PLATFORMS=cuda\,cpu" in output
        and r"CUDA_VISIBLE_DEVICES=0\,1" in output
        and ">> a.log" in output
    )

    output = launch("slurm.sbatch", *RUN, DRY_RUN="1", SLURM_NNODES="4", SLURM_JOB_ID="20005")
    assert (
        "RELAY_NUM_PROCESSES=4" in output
        and ":20005" in output
        and "scontrol requeue 20005" in output
    )
    assert "srun" in output and r"runs/a\ b" in output
    assert "#SBATCH --signal=B:TERM@120" in (LAUNCH / "slurm.sbatch").read_text()


def test_the_dry_run_for_a_tpu_pod_shows_every_gcloud_command() -> None:
    slice_ = ["--spot", "--type", "v6e-64", "--zone", "z", "--bucket", "b"]
    output = launch("tpu_pod.sh", "--dry-run", *slice_, "keep", "--", *RUN)
    commands = [line for line in output.splitlines() if line.startswith("+ ")]
    assert (
        "queued-resources create relay --node-id=relay --zone=z --accelerator-type=v6e-64"
        in commands[0]
    )
    assert commands[0].endswith("--runtime-version=v2-alpha-tpuv6e --spot")
    assert (
        commands[1].startswith("+ tar ")
        and "scp" in commands[2]
        and "requirements.txt" in commands[3]
    )
    assert (
        "gcsfuse" in commands[4]
        and "relay_jax.main" in commands[5]
        and "and again while the status is 75" in output
    )
    assert "delete" in launch("tpu_pod.sh", "--dry-run", "down")
    renewed = launch("tpu_pod.sh", "--dry-run", "up", DRY_STATE="SUSPENDED")
    assert renewed.index("delete") < renewed.index("create"), "a pre-empted slice was not replaced"
    assert "create" not in launch("tpu_pod.sh", "--dry-run", "up", DRY_STATE="ACTIVE"), (
        "requested what is there"
    )
    assert "host-0.log" in launch("tpu_pod.sh", "--dry-run", "logs")
    assert "kill -s TERM" in launch("tpu_pod.sh", "--dry-run", "stop").replace("\\", "")
    for wrong in (["fly"], ["up", "down"], ["run"], ["up", "--", "x"]):
        assert "error: " in launch("tpu_pod.sh", "--dry-run", *wrong, status=2)


def test_a_tpu_run_is_kept_up_through_preemptions(tmp_path: Path) -> None:
    """The real script against a gcloud that has one host, this one; the run asks for another
    start twice."""
    fake_python(tmp_path, 75, 75, 0)
    home = tmp_path / "home"
    (home / "venv" / "bin").mkdir(parents=True)
    shutil.copy(tmp_path / "bin" / "fake-python", home / "venv" / "bin" / "python")
    program(
        tmp_path,
        "gcloud",
        f"""cd {home}; echo "$*" >>{tmp_path}/gcloud
case "$*" in
  *describe*) cat state 2>/dev/null ;;
  *create*) echo ACTIVE >state ;;
  *ssh*requirements*) ;;
  *ssh*) for a in "$@"; do case $a in --command=*) HOME={home} bash -c "${{a#--command=}}" ;; esac; done ;;
esac""",  # noqa: E501
    )
    output = launch(
        "tpu_pod.sh",
        "keep",
        "--",
        *RUN,
        PATH=with_programs(tmp_path),
        POLL_SECONDS="0.2",
        TMPDIR=str(tmp_path),
    )
    assert output.count("ended with status 75") == 2 and "ended with status 0" in output
    calls = (tmp_path / "calls").read_text().splitlines()
    assert len(calls) == 3 and all(
        c.strip() == "-m relay_jax.main --config=configs/demo.py:smoke --workdir=runs/a b"
        for c in calls
    )
    assert (tmp_path / "gcloud").read_text().count("queued-resources create") == 1


@pytest.mark.parametrize(
    ("status", "queued", "requeues"),
    [(75, 0, True), (75, 100, False), (0, 0, False), (2, 0, False)],
)
def test_a_slurm_job_goes_into_the_queue_again_when_the_run_asks_for_it(
    tmp_path: Path, status: int, queued: int, requeues: bool
) -> None:
    python = fake_python(tmp_path, status)
    program(tmp_path, "srun", 'while [[ $1 == --* ]]; do shift; done; SLURM_PROCID=1 exec "$@"')
    program(
        tmp_path,
        "scontrol",
        f'if [[ $1 == show ]]; then echo node7; else echo "$*" >{tmp_path}/scontrol; fi',
    )
    output = launch(
        "slurm.sbatch",
        *RUN,
        status=0 if requeues else status,
        PATH=with_programs(tmp_path),
        PYTHON=str(python),
        SLURM_JOB_ID="5",
        SLURM_NNODES="2",
        SLURM_JOB_NODELIST="node[7-8]",
        SLURM_RESTART_COUNT=str(queued),
    )
    assert (tmp_path / "calls").read_text() == (
        "1 node7:20005 -m relay_jax.main --config=configs/demo.py:smoke --workdir=runs/a b\n"
    )
    assert (tmp_path / "scontrol").exists() == requeues, output
    if requeues:
        assert (tmp_path / "scontrol").read_text() == "requeue 5\n"


@pytest.mark.parametrize("script", ["local_processes.sh", "gpu_node.sh"])
def test_status_75_starts_again_and_others_do_not(tmp_path: Path, script: str) -> None:
    one = ["-n", "1"] if script.startswith("local") else []
    launch(script, *one, "--restarts", "3", "--", *RUN, PYTHON=str(fake_python(tmp_path, 75, 75)))
    assert len((tmp_path / "calls").read_text().splitlines()) == 3
    launch(
        script,
        *one,
        "--restarts",
        "1",
        "--",
        *RUN,
        PYTHON=str(fake_python(tmp_path, 75, 75)),
        status=75,
    )
    launch(
        script, *one, "--restarts", "3", "--", *RUN, PYTHON=str(fake_python(tmp_path, 2)), status=2
    )
    assert len((tmp_path / "calls").read_text().splitlines()) == 6


@pytest.mark.parametrize("script", ["local_processes.sh", "gpu_node.sh"])
def test_sigterm_is_passed_on_and_does_not_start_again(tmp_path: Path, script: str) -> None:
    python = program(
        tmp_path,
        "fake-python",
        f"""trap 'exit 75' TERM
echo x >>{tmp_path}/calls; while :; do sleep 0.05; done""",
    )
    process = subprocess.Popen(
        ["bash", str(LAUNCH / script), "--restarts", "3", "--", *RUN],
        env={**os.environ, "PYTHON": str(python)},
    )
    count = 2 if script.startswith("local") else 1
    deadline = time.monotonic() + 20
    while (
        not (tmp_path / "calls").exists()
        or len((tmp_path / "calls").read_text().splitlines()) < count
    ):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    assert process.wait(20) == 75
    assert len((tmp_path / "calls").read_text().splitlines()) == count


def test_when_one_process_fails_the_others_are_ended(tmp_path: Path) -> None:
    python = program(
        tmp_path, "fake-python", "if ((RELAY_PROCESS_ID == 1)); then exit 3; fi; exec sleep 100"
    )
    began = time.monotonic()
    launch("local_processes.sh", "-n", "3", "--", *RUN, PYTHON=str(python), status=3)
    assert time.monotonic() - began < 40


def test_each_process_has_a_log_of_its_own(tmp_path: Path) -> None:
    python = program(tmp_path, "fake-python", 'echo "process $RELAY_PROCESS_ID"')
    logs = tmp_path / "logs"
    launch("local_processes.sh", "-n", "2", "--logs", str(logs), "--", *RUN, PYTHON=str(python))
    for i in range(2):
        assert (logs / f"process-{i}.log").read_text().strip() == f"process {i}"


def test_the_jobset_of_gke_is_one_consistent_slice() -> None:
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    job = spec["spec"]["replicatedJobs"][0]["template"]["spec"]
    pod = job["template"]["spec"]
    container = pod["containers"][0]
    chips = int(container["resources"]["limits"]["google.com/tpu"])
    sides = [int(n) for n in pod["nodeSelector"]["cloud.google.com/gke-tpu-topology"].split("x")]
    assert job["parallelism"] == job["completions"] == sides[0] * sides[1] // chips
    assert container["command"][:3] == ["python", "-m", "relay_jax.main"]
    assert (
        75 not in job["podFailurePolicy"]["rules"][0]["onExitCodes"]["values"]
        and job["backoffLimit"] == 0
    )
    assert pod["terminationGracePeriodSeconds"] >= 60


def test_the_container_recipe_passes_hadolint() -> None:
    passes("hadolint", LAUNCH / "Dockerfile")


def test_the_container_recipe_copies_what_the_program_needs(tmp_path: Path) -> None:
    """Its steps without a container: what is copied, which JAX is installed, what is started."""
    text = (LAUNCH / "Dockerfile").read_text().replace("\\\n", "")
    steps = [line.partition(" ")[::2] for line in text.splitlines() if line[:1].isupper()]
    kept = (LAUNCH / "Dockerfile.dockerignore").read_text().splitlines()
    for source, place in (value.split() for step, value in steps if step == "COPY"):
        assert f"!{source}" in kept
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, tmp_path / place)
        else:
            shutil.copy(ROOT / source, tmp_path / place)
    (install,) = (value for step, value in steps if step == "RUN")
    program(tmp_path, "pip", 'printf "%s\\n" "$@"')
    for platform, package in (("cpu", "jax>=0.10.0"), ("tpu", "jax[tpu]>=0.10.0")):
        environ = {"PATH": with_programs(tmp_path), "JAX": platform}
        words = subprocess.check_output(["sh", "-c", install], env=environ, text=True).split("\n")
        assert words[:4] == ["install", "--no-cache-dir", "-r", "requirements.txt"]
        assert words[4].startswith(package + ",")
    environ = {"PATH": with_programs(tmp_path), "JAX": "gpu"}
    assert subprocess.run(["sh", "-c", install], env=environ, stderr=-1).returncode == 2
    (entry,) = (yaml.safe_load(value) for step, value in steps if step == "ENTRYPOINT")
    spec = yaml.safe_load((LAUNCH / "gke_jobset.yaml").read_text())
    job = spec["spec"]["replicatedJobs"][0]["template"]["spec"]
    (container,) = job["template"]["spec"]["containers"]
    assert container["command"][:3] == entry == ["python", "-m", "relay_jax.main"]
    assert container["workingDir"] == dict(steps)["WORKDIR"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, *entry[1:], "--config=demo:smoke", "--mode=plan"]
    done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
    assert done.returncode == 0 and "stage relay: 32 px" in done.stdout, done.stderr[-2000:]

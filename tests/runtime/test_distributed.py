"""Several processes with real collectives give what one process gives, and go on from each
other's checkpoints."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.errors import UserError
from relay_jax.runtime import distributed
from relay_jax.runtime.distributed import arguments
from relay_jax.runtime.files import read_jsonl
from tests.processes import ROOT, free_port, launched, together

CONFIG = """
from relay_jax.configs import demo


def get_config(_=''):
    config = demo.get_config("smoke")
    for stage in (config.stages.base, config.stages.relay):
        stage.model.update(channels=8, head_width=8, multipliers=(1,), attention=())
        stage.train.update(images=48, batch=16)
        stage.sample.num_steps = 6
    config.stages.relay.resolution = 16
    config.stages.relay.process.patch = 2
    config.dataset.update(size=64, threads=1)
    config.checkpoint.every_images = 32
    config.log.update(every_steps=1, grid_every_images=48, grid_images=4)
    config.evaluate.update(samples=8, every=48, every_samples=6, pictures=False)
    return config
"""


def run(config: Path, processes: int, *arguments: str, status: int = 0, seconds: int = 600) -> str:
    """The output of the real command line in so many processes with one device each.

    A hang is a failure.
    """
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "JAX_NUM_CPU_DEVICES": "1",
        "RELAY_TIMEOUT": "60",
    }
    launcher = [
        str(ROOT / "launch/local_processes.sh"),
        "-n",
        str(processes),
        "--port",
        str(free_port()),
        "--",
    ]
    command = launcher if processes > 1 else [sys.executable, "-m", "relay_jax.main"]
    process = subprocess.Popen(
        [*command, f"--config={config}", *arguments],
        cwd=ROOT,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"hung: {process.communicate()[0][-3000:]}")
    assert process.returncode == status, output[-3000:]
    return output


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "config.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(scope="module")
def runs(config: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The whole relay, trained by one and two processes. Do not write into it."""
    folder = tmp_path_factory.mktemp("runs")
    profile = ["--config.log.profile_first=2", "--config.log.profile_steps=1"]
    for processes, more in (
        (1, ["--config.evaluate.pictures=False"]),
        (2, ["--config.evaluate.pictures=True", *profile]),
    ):
        output = run(config, processes, f"--workdir={folder / str(processes)}", *more)
        first = next(line for line in output.splitlines() if "mesh data" in line)
        assert (
            f"mesh data {processes} x fsdp 1" in first
            and f"base 16 = {processes} x {16 // processes}" in first
        )
        assert output.count("look at") == 1, "several processes spoke"
    return {processes: folder / str(processes) for processes in (1, 2)}


def losses(stage: Path) -> np.ndarray:
    return np.asarray(
        [
            [line["loss"], line["gradient_norm"]]
            for line in read_jsonl(stage / "metrics.jsonl")
            if "loss" in line
        ]
    )


def pixels(folder: Path) -> np.ndarray:
    return np.stack([np.asarray(Image.open(path), int) for path in sorted(folder.rglob("*.png"))])


@pytest.mark.parametrize("stage", ["base", "relay"])
def test_several_processes_train_as_one(runs: dict[int, Path], stage: str) -> None:
    several, one = losses(runs[2] / stage), losses(runs[1] / stage)
    assert several.shape == (3, 2)
    np.testing.assert_allclose(several, one, rtol=2e-5)


def test_one_process_writes_pictures_and_report(runs: dict[int, Path]) -> None:
    names = [
        sorted(
            str(p.relative_to(runs[n]))
            for p in runs[n].rglob("*")
            if p.is_file()
            and p.suffix in (".png", ".json", ".jsonl")
            and "checkpoints" not in p.parts  # each process writes checksums of its parts
            and "plots" not in p.parts
        )
        for n in (1, 2)
    ]
    assert names[0] == names[1]
    assert len(list(runs[2].glob("base/events.*"))) == 1
    # Those that need the whole relay are made by process 0, on its own devices.
    plots = {path.stem for path in (runs[2] / "plots").glob("*.json")}
    assert plots == {"animation", "handoff", "neighbours", "snr"}
    assert "Pictures not made" not in (runs[2] / "report.html").read_text()
    assert "Pictures not made: animation," in (runs[1] / "report.html").read_text()
    for picture in ("samples/grid.png", "relay/grids/000000000048.png"):
        several, one = (np.asarray(Image.open(runs[n] / picture), int) for n in (2, 1))
        assert np.abs(several - one).max() <= 1 and one.std() > 5


def test_each_process_leaves_its_profiler_trace(runs: dict[int, Path]) -> None:
    traces = list((runs[2] / "relay" / "profile").rglob("*.xplane.pb"))
    assert len(traces) == 2 and all(trace.stat().st_size for trace in traces)
    assert not list(runs[1].rglob("*.xplane.pb"))


def scores(folder: Path) -> np.ndarray:
    """Distance, precision and recall."""
    scores = json.loads((folder / "report.json").read_text())["scores"]
    return np.asarray([value for name, value in scores.items() if name.endswith("random-conv")])


def test_several_processes_score_as_one(
    config: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    one = scores(runs[1])
    for stage in ("base", "relay"):
        several, single = (
            [
                line
                for line in read_jsonl(runs[n] / stage / "metrics.jsonl")
                if "FD-random-conv" in line
            ]
            for n in (2, 1)
        )
        assert [line["images"] for line in several] == [line["images"] for line in single] == [48]
        np.testing.assert_allclose(
            several[0]["FD-random-conv"], single[0]["FD-random-conv"], rtol=2e-3
        )
    np.testing.assert_allclose(
        scores(runs[2]), one, rtol=2e-3
    )  # a pixel may round to its neighbour
    run(
        config,
        2,
        f"--workdir={runs[1]}",
        "--mode=evaluate",
        "--seeds=0-7",
        "--reference_images=10000",
        f"--out={tmp_path / 'drawn'}",
        f"--cache={tmp_path / 'cache'}",
    )
    np.testing.assert_allclose(scores(tmp_path / "drawn"), one, rtol=2e-3)
    assert one[0] > 0 and len(list((tmp_path / "cache").glob("reference-*.npz"))) == 1


def test_an_image_that_one_process_cannot_read_ends_all(config: Path, tmp_path: Path) -> None:
    for number in range(9):  # number 5 is one of the second process
        Image.fromarray(np.zeros((8 if number == 5 else 16,) * 2 + (3,), np.uint8)).save(
            tmp_path / f"{number}.png"
        )
    output = run(
        config, 2, f"--images={tmp_path}", "--mode=evaluate", f"--out={tmp_path / 'out'}", status=2
    )
    errors = [line for line in output.splitlines() if line.startswith("error: ")]
    assert (
        len(errors) == 1 and "5.png has 8 x 8 pixels" in errors[0] and "process 1 of 2" in errors[0]
    )


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_training_continues_on_another_number_of_processes(
    config: Path, runs: dict[int, Path], tmp_path: Path, before: int, after: int
) -> None:
    shutil.copytree(
        runs[before], tmp_path / "run", ignore=shutil.ignore_patterns("cache", "report.*")
    )
    newest, images = tmp_path / "run" / "relay" / "checkpoints" / "3", 48
    if after == 2:  # and the newest checkpoint is damaged: all must fall back to the same one
        (newest / "train" / "manifest.ocdbt").unlink()
        images = 32
    longer = ["--config.stages.relay.train.images=80", "--config.log.grid_every_images=0"]
    output = run(config, after, f"--workdir={tmp_path / 'run'}", "--stage=relay", *longer)
    assert f"continues at {images} images" in output and ("3 is unreadable" in output) == (
        images == 32
    )
    curve = losses(tmp_path / "run" / "relay")
    assert len(curve) == 5
    if before == 1:  # the other way round is checked against this one
        return
    shutil.copytree(runs[1], tmp_path / "one", ignore=shutil.ignore_patterns("cache", "report.*"))
    run(config, 1, f"--workdir={tmp_path / 'one'}", "--stage=relay", *longer)
    np.testing.assert_allclose(curve, losses(tmp_path / "one" / "relay"), rtol=2e-5)


def test_several_processes_share_the_images_of_one_sampling(
    config: Path, runs: dict[int, Path], tmp_path: Path
) -> None:
    arguments = [f"--workdir={runs[1]}", "--mode=sample", "--seeds=995-1004"]
    run(config, 1, *arguments, f"--out={tmp_path / 'one'}")
    kept = tmp_path / "two" / "000000" / "000996.png"
    kept.parent.mkdir(parents=True)
    shutil.copy(tmp_path / "one" / "samples.json", tmp_path / "two")
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(kept)
    before = kept.read_bytes()
    run(config, 2, *arguments, f"--out={tmp_path / 'two'}")
    assert kept.read_bytes() == before, "an existing image was made again"
    several, one = pixels(tmp_path / "two"), pixels(tmp_path / "one")
    assert several.shape == one.shape == (10, 16, 16, 3)
    keep = np.arange(10) != 1
    assert np.abs(several[keep] - one[keep]).max() <= 1

    run(config, 2, *arguments, f"--out={tmp_path / 'npz'}", "--format=npz")
    names = [
        "000995-000999.npz",
        "001000-001004.npz",
        "samples.json",
        "samples_10x16x16x3.npz",
    ]  # a file each, and all
    assert sorted(path.name for path in (tmp_path / "npz").iterdir()) == names
    with np.load(tmp_path / "npz" / names[-1]) as merged:
        assert np.abs(merged["arr_0"].astype(int) - one).max() <= 1
        assert merged["arr_1"].tolist() == [seed % 8 for seed in range(995, 1005)]


def test_a_mistake_ends_all_processes_with_one_line(config: Path, tmp_path: Path) -> None:
    output = run(
        config, 2, f"--workdir={tmp_path}", "--config.stages.base.train.batch=15", status=2
    )
    assert [line for line in output.splitlines() if line.startswith("error: ")] == [
        "error: stage base: train.batch 15 is not divisible by 2 devices"
    ]


def test_sigterm_at_one_process_stops_all_at_the_same_step(config: Path, tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "relay_jax.main",
        f"--config={config}",
        f"--workdir={tmp_path}",
        "--stage=base",
        "--config.stages.base.train.images=160000",
        "--config.checkpoint.every_images=160000",
        "--config.log.grid_every_images=0",
    ]
    output = tmp_path / "output.txt"
    with output.open("w") as file:
        processes = [
            subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdout=file,
                stderr=file,
            )
            for environment in launched(2)
        ]
    metrics, deadline = tmp_path / "base" / "metrics.jsonl", time.monotonic() + 120
    try:
        while len(read_jsonl(metrics)) < 3:
            assert time.monotonic() < deadline and processes[0].poll() is None, output.read_text()[
                -3000:
            ]
            time.sleep(0.05)
        processes[1].send_signal(signal.SIGTERM)
        assert [process.wait(60) for process in processes] == [75, 75], output.read_text()[-3000:]
    finally:
        for process in processes:
            process.kill()
    steps = [
        int(p.name) for p in (tmp_path / "base" / "checkpoints").iterdir() if p.name.isdecimal()
    ]
    assert len(steps) == 1 and f"saved at {steps[0] * 16:,} images" in output.read_text()
    assert read_jsonl(metrics)[-1]["images"] == steps[0] * 16


SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "a[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "0",
    "SLURM_STEP_NUM_TASKS": "2",
    "SLURM_STEP_NUM_NODES": "2",
}
LAUNCHED = {"RELAY_COORDINATOR": "a:1234", "RELAY_NUM_PROCESSES": "2", "RELAY_PROCESS_ID": "1"}
ARGUMENTS = {
    "coordinator_address": "a:1234",
    "num_processes": 2,
    "process_id": 1,
    "cluster_detection_method": "deactivate",
}


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        ({}, None),
        (LAUNCHED, ARGUMENTS),
        ({**SLURM, **LAUNCHED}, ARGUMENTS),
        ({**SLURM, "RELAY_NUM_PROCESSES": "1"}, None),
        (SLURM, {"cluster_detection_method": "slurm"}),
        (
            {**SLURM, "SLURM_GPUS_ON_NODE": "4"},
            {"cluster_detection_method": "slurm", "local_device_ids": [0, 1, 2, 3]},
        ),
        (
            {**SLURM, "SLURM_STEP_NUM_NODES": "1", "SLURM_GPUS_ON_NODE": "2"},
            {"cluster_detection_method": "slurm"},
        ),
        ({**SLURM, "SLURM_STEP_NUM_TASKS": "1"}, None),  # an interactive shell of a job
        (
            {k: v for k, v in SLURM.items() if k != "SLURM_STEP_NODELIST"},
            None,
        ),  # a batch script itself
        (
            {"OMPI_COMM_WORLD_SIZE": "2", "OMPI_MCA_orte_hnp_uri": "0.0;tcp://10.0.0.1:1"},
            {"cluster_detection_method": "ompi"},
        ),
        (
            {
                "OMPI_COMM_WORLD_SIZE": "2",
                "OMPI_COMM_WORLD_RANK": "1",
                "RELAY_COORDINATOR": "a:1234",
            },
            ARGUMENTS,
        ),
        ({"OMPI_COMM_WORLD_SIZE": "1"}, None),
    ],
)
def test_the_environment_says_who_takes_part(
    monkeypatch: pytest.MonkeyPatch, environ: Mapping[str, str], expected: dict | None
) -> None:
    monkeypatch.setattr(distributed, "_on_cloud_tpu", lambda _: False)
    assert arguments(environ) == expected


@pytest.mark.parametrize(
    ("environ", "says"),
    [
        ({**LAUNCHED, "RELAY_COORDINATOR": "a"}, "host:port"),
        ({**LAUNCHED, "RELAY_COORDINATOR": ""}, "host:port"),
        ({**LAUNCHED, "RELAY_PROCESS_ID": "2"}, "below"),
        ({**LAUNCHED, "RELAY_PROCESS_ID": ""}, "numbers"),
        ({**LAUNCHED, "RELAY_NUM_PROCESSES": "two"}, "numbers"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, "RELAY_COORDINATOR"),
    ],
)
def test_a_contradictory_environment_is_refused(environ: Mapping[str, str], says: str) -> None:
    with pytest.raises(UserError, match=says):
        arguments(environ)


def test_a_request_to_stop_is_not_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    """JAX says so at one call alone, which may be one where nobody can stop."""
    monkeypatch.setattr(distributed, "_joined", True)
    monkeypatch.setattr(distributed, "_stop_flag", False)
    points = iter([False, True])
    monkeypatch.setattr(
        distributed.multihost_utils, "reached_preemption_sync_point", lambda _: next(points)
    )
    assert [distributed.stop_requested() for _ in range(4)] == [False, True, True, True]


LOSES = """
import os, signal, sys
import jax
from relay_jax.runtime import distributed
from relay_jax.runtime.ending import to_the_end

def action():
    distributed.tell("here")
    if jax.process_index() == int(sys.argv[1]):
        os.kill(os.getpid(), signal.SIGKILL)
    while True:     # a collective that waits for the one that is gone, or fails
        distributed.tell("still here")

to_the_end(action)
"""


@pytest.mark.parametrize("victim", [0, 1])
def test_the_process_that_was_killed_is_named_by_the_others(victim: int) -> None:
    begun = time.monotonic()
    status, output = together(launched(2), "-c", LOSES, str(victim))[1 - victim]
    assert status == 1 and time.monotonic() - begun < 60, output[-3000:]
    last = output.strip().splitlines()[-1]
    assert last.startswith(f"error: process {victim} of 2 is gone") and len(last) < 400
    assert "Traceback" not in output and "stack trace" not in output


@pytest.mark.parametrize("present", [0, 1])
def test_a_process_that_never_starts_is_named_in_one_line(
    config: Path, tmp_path: Path, present: int
) -> None:
    environment = launched(2)[present] | {"RELAY_TIMEOUT": "1"}
    command = ("-m", "relay_jax.main", f"--config={config}", f"--workdir={tmp_path}")
    [(status, output)] = together([environment], *command)
    assert status == 2 and len(output.splitlines()) == 1 and len(output) < 400, output
    assert output.startswith(f"error: process {1 - present} of 2 did not come")


JOINS = """
import os, sys
import jax
from jax._src.clusters import cloud_tpu_cluster
from relay_jax.runtime import distributed
if "tpu" in sys.argv:       # what libtpu on a TPU host makes of these two
    cloud_tpu_cluster.running_in_cloud_tpu_vm = True
    distributed._on_cloud_tpu = lambda _: True
    if "gce" in sys.argv:
        os.environ.pop("TPU_SKIP_MDS_QUERY", None)      # JAX has set it, having seen no chips
distributed.initialize()
texts = distributed.tell(f"p{jax.process_index()}")
print("joined", jax.process_index(), "of", jax.process_count(), texts, flush=True)
distributed.leave()
"""


class Metadata(BaseHTTPRequestHandler):
    """The metadata server of a Google Cloud TPU host, as far as JAX asks it."""

    values: Mapping[str, str]

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.send_response(200 if name in self.values else 404)
        self.end_headers()
        self.wfile.write(self.values.get(name, "").encode())


@contextmanager
def metadata(index: int) -> Iterator[str]:
    """The address of a server that answers as on host `index` of two on this machine."""
    values = {
        "agent-worker-number": str(index),
        "worker-network-endpoints": "x:1:127.0.0.1,x:2:127.0.0.1",
        "tpu-env": "",
    }
    with ThreadingHTTPServer(
        ("127.0.0.1", 0), type("Here", (Metadata,), {"values": values})
    ) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def of_slurm(index: int) -> dict[str, str]:
    return {
        **SLURM,
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_PROCID": str(index),
        "SLURM_LOCALID": str(index),
        "SLURM_STEP_NUM_NODES": "1",
    }


def of_open_mpi(index: int) -> dict[str, str]:
    return {
        "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://127.0.0.1:34911",
        "OMPI_COMM_WORLD_SIZE": "2",
        "OMPI_COMM_WORLD_RANK": str(index),
        "OMPI_COMM_WORLD_LOCAL_RANK": str(index),
    }


def of_gke(index: int) -> dict[str, str]:
    return {
        "TPU_WORKER_HOSTNAMES": "localhost,localhost",
        "TPU_WORKER_ID": str(index),
        "TPU_SKIP_MDS_QUERY": "1",
        "MEGASCALE_COORDINATOR_ADDRESS": "localhost",
        "MEGASCALE_NUM_SLICES": "1",
        "MEGASCALE_SLICE_ID": "0",
    }


@pytest.mark.parametrize("kind", ["slurm", "open mpi", "gke tpu", "gce tpu"])
def test_two_processes_find_each_other_by_what_the_cluster_sets(kind: str) -> None:
    with ExitStack() as stack:
        of_process = {
            "slurm": of_slurm,
            "open mpi": of_open_mpi,
            "gke tpu": of_gke,
            "gce tpu": lambda index: {"GCE_METADATA_IP": stack.enter_context(metadata(index))},
        }[kind]
        kept = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("RELAY_", "SLURM_", "OMPI_", "TPU_"))
        }
        common = {
            **kept,
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": "1",
            "RELAY_TIMEOUT": "60",
            "JAX_COORDINATOR_PORT": str(free_port()),
        }
        environments = [{**common, **of_process(index)} for index in range(2)]
        ends = together(environments, "-c", JOINS, *kind.split())
    output = [text for _, text in ends]
    for index in range(2):
        assert f"joined {index} of 2 ['p0', 'p1']" in output[index], output[index][-3000:]


def test_a_cloud_tpu_host_is_recognised_by_its_chips(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda _: object())
    for chips, environ, expected in (
        (["/dev/accel0"], {}, {}),
        ([], {}, None),
        (["/dev/accel0"], {"JAX_PLATFORMS": "cpu"}, None),
        (["/dev/accel0"], {"RELAY_NUM_PROCESSES": "1"}, None),
    ):
        monkeypatch.setattr(distributed.glob, "glob", lambda _, chips=chips: chips)
        assert arguments(environ) == expected

"""Several processes as one run: how they find each other, agree, and stop together.

Every process runs the same command and owns some of the devices.
Collectives wait for all of them, so nothing may happen on one
process alone that changes which collectives come next: errors, stop
requests and what is on the disk are agreed on.

The launchers set RELAY_COORDINATOR=host:port (of process 0),
RELAY_NUM_PROCESSES and RELAY_PROCESS_ID. Without them, Cloud TPU, SLURM
(srun) and Open MPI are detected, and anything else is one process.
RELAY_NUM_PROCESSES=1 forbids detection.
"""

import glob
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax._src.clusters import ClusterEnv
from jax.experimental import multihost_utils

from relay_jax.errors import StorageError, UserError, one_line
from relay_jax.runtime.files import storage_error
from relay_jax.runtime.peers import Peers

MESSAGE_BYTES = 2000  # longest text that processes send each other

T = TypeVar("T")

_peers: Peers | None = None  # several processes: the others
_joined = False  # whether initialize() has connected this process with others
_stop_flag = False  # SIGTERM has come; several processes: and they have agreed on it
_by_user = False  # ... and by Ctrl-C, not SIGTERM
_asked = False  # whether anything has called stop_requested: else there is nothing to save
_checks = 0  # several processes: calls of stop_requested so far, equal on all


def initialize() -> None:
    """Connects with the other processes of the run, if any; to be called before any JAX operation.

    Raises UserError if the environment is contradictory or the
    others do not answer.
    """
    global _joined
    if _joined:
        return
    try:
        options = arguments(os.environ)
        if options is None:
            return
        seconds = int(os.environ.get("RELAY_TIMEOUT", "300"))
        _meet(options, seconds)
        jax.distributed.initialize(
            **options, shutdown_timeout_seconds=60, initialization_timeout=seconds
        )
        # The first use of a device: it
        # may be the one that is missing.
        _joined = jax.process_count() > 1
    except UserError:
        raise
    # JAX raises many types: no metadata
    # server, no free port, no answer.
    except Exception as error:
        raise UserError(
            f"the processes of the run cannot be connected: {one_line(error)}; for a run of one "
            "process set RELAY_NUM_PROCESSES=1"
        ) from error
    # Process 0 speaks for all: the same lines from every host would
    # say nothing more.
    if jax.process_index() > 0:
        logging.set_verbosity(logging.ERROR)


def _meet(options: Mapping[str, Any], seconds: int) -> None:
    """Waits for the other processes, and watches over them from now on. Raises UserError."""
    global _peers
    names = ("coordinator_address", "num_processes", "process_id")
    address, count, index = (options.get(name) for name in names)
    if address is None:
        # What `initialize` itself finds out.
        address, count, index, _ = ClusterEnv.auto_detect_unset_distributed_params(
            None, None, None, None, options.get("cluster_detection_method"), seconds
        )
    if address and index is not None and count is not None and count > 1:
        _peers = Peers(address, count, index, seconds)


def arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize in this environment; None for a single process.

    Raises UserError for variables that contradict each other.
    """
    names = ("coordinator", "num_processes", "process_id")
    launch = {name: environ.get("RELAY_" + name.upper(), "") for name in names}
    # Open MPI 5 gives each process its number, but does not say
    # where the first one is.
    if launch["coordinator"]:
        launch["num_processes"] = launch["num_processes"] or environ.get("OMPI_COMM_WORLD_SIZE", "")
        launch["process_id"] = launch["process_id"] or environ.get("OMPI_COMM_WORLD_RANK", "")
    if launch["num_processes"] == "1" and not launch["coordinator"]:
        return None
    # What the launcher says comes before what the cluster says: it
    # was started by the user.
    if any(launch.values()):
        return _launched(launch)
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise UserError(
                "this Open MPI does not say where process 0 is; set RELAY_COORDINATOR=host:port"
            )
        return {"cluster_detection_method": "ompi"}
    slurm = (
        "SLURM_JOB_ID",
        "SLURM_STEP_NODELIST",
        "SLURM_NTASKS",
        "SLURM_PROCID",
        "SLURM_LOCALID",
    )
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    if all(name in environ for name in slurm) and tasks > 1:
        return {
            "cluster_detection_method": "slurm",
            **_devices_of_task(environ, tasks),
        }
    if _on_cloud_tpu(environ):
        return {}
    return None


def _launched(launch: Mapping[str, str]) -> dict[str, Any]:
    """The launcher's variables, checked."""
    coordinator = launch["coordinator"]
    host, _, port = coordinator.rpartition(":")
    count, index = launch["num_processes"], launch["process_id"]
    if not host or not port.isdecimal():
        raise UserError(f"RELAY_COORDINATOR must be host:port of process 0, not {coordinator!r}")
    if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
        raise UserError(
            "RELAY_NUM_PROCESSES and RELAY_PROCESS_ID must be numbers, the second below the first, "
            f"not {count!r} and {index!r}"
        )
    # Without `deactivate`, JAX inside a SLURM job would give each
    # process one GPU, whatever it was started with.
    return {
        "coordinator_address": coordinator,
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _devices_of_task(environ: Mapping[str, str], tasks: int) -> dict[str, Any]:
    """Which GPUs a SLURM task uses: all of them, where it has a node for itself."""
    # JAX would give it one.
    alone = tasks == int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "0")))
    gpus = int(environ.get("SLURM_GPUS_ON_NODE", "0"))
    return {"local_device_ids": list(range(gpus))} if alone and gpus > 1 else {}


def _on_cloud_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU host whose TPU will be used."""
    # JAX then asks the metadata server for the other hosts, which
    # does not answer elsewhere.
    if "tpu" not in environ.get("JAX_PLATFORMS", "tpu"):
        return False
    if importlib.util.find_spec("libtpu") is None:
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def joined() -> bool:
    """Whether this run has several processes."""
    return _joined


def leave() -> None:
    """Waits until all processes have come here, and disconnects."""
    global _joined, _peers
    if _joined:
        _joined = False
        if _peers:
            _peers.leave()
        jax.distributed.shutdown()
        if _peers:
            _peers.close()
            _peers = None


def tell(text: str) -> list[str]:
    """The text of every process, in their order, cut at MESSAGE_BYTES; all must call it."""
    if not _joined:
        return [text]
    # Collectives move arrays of one shape.
    message = np.zeros(MESSAGE_BYTES, np.uint8)
    data = text.encode(errors="replace")[:MESSAGE_BYTES]
    message[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(message)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_first(value: T) -> T:
    """The value of process 0, small and JSON; all processes must call it."""
    return json.loads(tell(json.dumps(value))[0]) if _joined else value


def array_of_first(value: np.ndarray) -> np.ndarray:
    """The array of process 0, of the same shape and type on all."""
    return multihost_utils.broadcast_one_to_all(value) if _joined else value


def of_all(value: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of one shape and type, in their order: [processes, ...]."""
    if not _joined:
        return value[None]
    # As bytes, since JAX would make float32 of float64.
    rows = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return np.frombuffer(rows.tobytes(), value.dtype).reshape(len(rows), *value.shape)


@contextmanager
def agree(errors: tuple[type[Exception], ...] = (Exception,)) -> Iterator[None]:
    """Around what every process does: if it fails on any of them, all raise its error.

    errors: those that end all. Raises UserError, with the status of
    the first error.
    """
    # Without it a process that fails would leave the others waiting
    # in their next collective.
    if not _joined:
        yield
        return
    message, status = "", UserError.status
    try:
        yield
    except errors as error:
        message = str(error) or type(error).__name__
        status = getattr(error, "status", UserError.status)
        if isinstance(error, OSError):
            status = storage_error(message, error).status
    messages = tell(f"{status}{message}" if message else "")
    failed = [index for index, text in enumerate(messages) if text]
    if failed:
        first = messages[failed[0]]
        place = "" if len(failed) == len(messages) else f" (process {failed[0]} of {len(messages)})"
        kind = StorageError if int(first[0]) == StorageError.status else UserError
        raise kind(first[1:] + place, agreed=True)


def gone(seconds: float) -> str:
    """After a collective has failed: `process 1 of 4 is gone ...`, or '' if all are there."""
    return _peers.gone(seconds) if _peers else ""


def ends_alone() -> None:
    """Before this process ends with a line of its own: the end of others adds none."""
    if _peers:
        _peers.ends_alone()


def is_first() -> bool:
    """Whether this is process 0, which writes what all share."""
    return not _joined or jax.process_index() == 0


def barrier(name: str) -> None:
    """Waits for all processes: afterwards the others see what process 0 has written before."""
    if _joined:
        multihost_utils.sync_global_devices(name)


@contextmanager
def sigterm_asks() -> Iterator[None]:
    """Within it SIGTERM no longer ends the program: `stop_requested` says that it has come.

    Nor does the first Ctrl-C, where something asks. With several
    processes JAX has installed its own handler of SIGTERM, which
    tells the other processes too.
    """
    global _stop_flag, _by_user, _asked
    _stop_flag = _by_user = _asked = False
    if _joined or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {
        number: signal.signal(number, _ask_to_stop) for number in (signal.SIGTERM, signal.SIGINT)
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ask_to_stop(number: int, _: object) -> None:
    global _stop_flag, _by_user
    if number == signal.SIGINT:
        # A second time, or where nothing is saved: at once.
        if _stop_flag or not _asked:
            raise KeyboardInterrupt
        _by_user = True
        # Not print, which the signal may have interrupted.
        os.write(2, b"\nCtrl-C: saves and stops; press it again to stop at once\n")
    _stop_flag = True


def stopped_by() -> str:
    """What asked the program to stop: SIGTERM or Ctrl-C."""
    return "Ctrl-C" if _by_user else "SIGTERM"


def stop_requested() -> bool:
    """Whether to save and raise Stopped now; it must be obeyed.

    All processes must call it equally often: it is true from the
    same call of each on.
    """
    # With several processes JAX chooses a call that none of them has
    # reached yet, and says so at that call alone: who cannot stop
    # just there, such as in the last step of a stage, asks again.
    global _checks, _stop_flag, _asked
    _asked = True
    if _joined and not _stop_flag:
        _checks += 1
        _stop_flag = multihost_utils.reached_preemption_sync_point(_checks)
    return _stop_flag

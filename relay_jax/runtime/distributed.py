"""Several processes as one run: how they find each other, agree, and stop together.

Every process runs the same command and owns some of the devices. Collectives wait for all of
them, so nothing may happen on one process alone that changes which collectives come next:
errors, stop requests and what was found on disk
are agreed on.

The launchers set RELAY_COORDINATOR=host:port (of process 0), RELAY_NUM_PROCESSES and
RELAY_PROCESS_ID. Without them, Cloud TPU, SLURM (srun) and Open MPI are detected, and anything
else is one process. RELAY_NUM_PROCESSES=1 forbids
detection.
"""

import glob
import importlib.util
import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

STOPPED = (
    75  # exit status EX_TEMPFAIL of sysexits.h: saved after SIGTERM; the same command continues
)
MESSAGE_BYTES = 2000  # longest text that processes tell each other

T = TypeVar("T")


class DistributedError(RuntimeError):
    """The processes cannot work together, or one of them told the others of its error; one line
    for the user.

    agreed: every process raises it at the same place, so that none is left waiting.
    """

    def __init__(self, message: str, agreed: bool = False) -> None:
        super().__init__(message)
        self.agreed = agreed


class Stopped(Exception):
    """SIGTERM was answered: everything is saved, the same command continues."""


_joined = False  # whether initialize() has connected this process with others
_asked_to_stop = False  # one process: SIGTERM has come
_checks = 0  # several processes: calls of stop_requested so far, equal on all


def initialize() -> None:
    """Connects with the other processes of the run, if there are any. To be called before any
    JAX operation.

    Raises DistributedError if the environment is contradictory or the others do not answer.
    """
    global _joined
    if _joined:
        return
    try:
        options = arguments(os.environ)
        if options is None:
            return
        jax.distributed.initialize(
            **options,
            shutdown_timeout_seconds=60,
            initialization_timeout=int(os.environ.get("RELAY_TIMEOUT", "300")),
        )
    except Exception as error:  # JAX raises many types: no metadata server, no free port, no answer
        known = isinstance(error, DistributedError)
        raise (
            error
            if known
            else DistributedError(
                "the processes of the run cannot be connected: "
                f"{' '.join(str(error).split())[:300]}; for a run of one "
                "process set RELAY_NUM_PROCESSES=1"
            )
        ) from error
    _joined = jax.process_count() > 1
    if jax.process_index() > 0:
        logging.set_verbosity(logging.ERROR)  # process 0 speaks for all


def arguments(environ: Mapping[str, str]) -> dict[str, Any] | None:
    """Arguments for jax.distributed.initialize in this environment, or None for a run of one
    process."""
    own = {
        name: environ.get("RELAY_" + name.upper(), "")
        for name in ("coordinator", "num_processes", "process_id")
    }
    if own[
        "coordinator"
    ]:  # Open MPI 5 tells each process its number, but not where the first one is
        own["num_processes"] = own["num_processes"] or environ.get("OMPI_COMM_WORLD_SIZE", "")
        own["process_id"] = own["process_id"] or environ.get("OMPI_COMM_WORLD_RANK", "")
    if own["num_processes"] == "1" and not own["coordinator"]:
        return None
    if any(own.values()):
        return _named(own)
    if int(environ.get("OMPI_COMM_WORLD_SIZE", "1")) > 1:
        if "OMPI_MCA_orte_hnp_uri" not in environ:
            raise DistributedError(
                "this Open MPI does not say where process 0 is; set RELAY_COORDINATOR=host:port"
            )
        return {"cluster_detection_method": "ompi"}
    slurm = ("SLURM_JOB_ID", "SLURM_STEP_NODELIST", "SLURM_NTASKS", "SLURM_PROCID", "SLURM_LOCALID")
    tasks = int(environ.get("SLURM_STEP_NUM_TASKS", environ.get("SLURM_NTASKS", "1")))
    if all(name in environ for name in slurm) and tasks > 1:
        return {"cluster_detection_method": "slurm", **_devices_of_task(environ, tasks)}
    if _on_cloud_tpu(environ):
        return {}
    return None


def _named(own: Mapping[str, str]) -> dict[str, Any]:
    """The launcher's variables, checked."""
    host, _, port = own["coordinator"].rpartition(":")
    count, index = own["num_processes"], own["process_id"]
    if not host or not port.isdecimal():
        raise DistributedError(
            f"RELAY_COORDINATOR must be host:port of process 0, not {own['coordinator']!r}"
        )
    if not count.isdecimal() or not index.isdecimal() or int(index) >= int(count):
        raise DistributedError(
            "RELAY_NUM_PROCESSES and RELAY_PROCESS_ID must be numbers, the second below the first, "
            f"not {count!r} and {index!r}"
        )
    # Without `deactivate`, JAX inside a SLURM job would give each process one GPU, whatever it
    # was started with.
    return {
        "coordinator_address": own["coordinator"],
        "num_processes": int(count),
        "process_id": int(index),
        "cluster_detection_method": "deactivate",
    }


def _devices_of_task(environ: Mapping[str, str], tasks: int) -> dict[str, Any]:
    """JAX gives each SLURM task one GPU; a task that has a node for itself gets all of them
    instead."""
    alone = tasks == int(environ.get("SLURM_STEP_NUM_NODES", environ.get("SLURM_NNODES", "0")))
    gpus = int(environ.get("SLURM_GPUS_ON_NODE", "0"))
    return {"local_device_ids": list(range(gpus))} if alone and gpus > 1 else {}


def _on_cloud_tpu(environ: Mapping[str, str]) -> bool:
    """Whether this is a Cloud TPU host whose TPU will be used; JAX then asks the metadata
    server for the others."""
    if (
        "tpu" not in environ.get("JAX_PLATFORMS", "tpu")
        or importlib.util.find_spec("libtpu") is None
    ):
        return False
    return bool(glob.glob("/dev/accel*") or glob.glob("/dev/vfio/[0-9]*"))


def joined() -> bool:
    """Whether this run has several processes."""
    return _joined


def leave() -> None:
    """Waits until all processes have come here, and disconnects."""
    global _joined
    if _joined:
        _joined = False
        jax.distributed.shutdown()


def tell(text: str) -> list[str]:
    """The text of every process, in their order, cut at MESSAGE_BYTES. All processes must call
    it."""
    if not _joined:
        return [text]
    own = np.zeros(MESSAGE_BYTES, np.uint8)
    data = text.encode()[:MESSAGE_BYTES]
    own[: len(data)] = np.frombuffer(data, np.uint8)
    rows = multihost_utils.process_allgather(own)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in rows]


def of_first(value: T) -> T:
    """What process 0 has found: a small JSON value. All processes must call it."""
    return json.loads(tell(json.dumps(value))[0]) if _joined else value


def array_of_first(value: np.ndarray) -> np.ndarray:
    """The array of process 0, of the same shape and type on all."""
    return multihost_utils.broadcast_one_to_all(value) if _joined else value


def of_all(value: np.ndarray) -> np.ndarray:
    """The arrays of all processes, of one shape and type, stacked in their order: [processes, ...].

    Bit for bit: float64 travels as bytes, since JAX would make float32 of it.
    """
    if not _joined:
        return value[None]
    rows = multihost_utils.process_allgather(np.frombuffer(value.tobytes(), np.uint8))
    return np.frombuffer(rows.tobytes(), value.dtype).reshape(len(rows), *value.shape)


def everywhere(action: Callable[[], T], errors: tuple[type[Exception], ...] = (Exception,)) -> T:
    """The result of an action that every process performs; if it fails on any of them, all
    raise its error."""
    if not _joined:
        return action()
    result, message = None, ""
    try:
        result = action()
    except errors as error:
        message = str(error) or type(error).__name__
    told = tell(message)
    failed = [index for index, text in enumerate(told) if text]
    if failed:
        where = "" if len(failed) == len(told) else f" (process {failed[0]} of {len(told)})"
        raise DistributedError(told[failed[0]] + where, agreed=True)
    return result  # type: ignore[return-value]    # no process failed, so there is one


def first_then_others(action: Callable[[bool], None]) -> None:
    """action(True) on process 0, then action(False) on the others; errors as in `everywhere`."""
    first = jax.process_index() == 0 if _joined else True
    everywhere(lambda: action(True) if first else None)
    everywhere(lambda: None if first else action(False))


def barrier(name: str) -> None:
    """Waits for all processes: what process 0 has written before is there for the others
    afterwards."""
    if _joined:
        multihost_utils.sync_global_devices(name)


@contextmanager
def sigterm_asks() -> Iterator[None]:
    """Within it SIGTERM no longer ends the program: `stop_requested` says that it has come.

    With several processes JAX has installed its own handler, which tells the other processes too.
    """
    global _asked_to_stop
    _asked_to_stop = False

    def ask(*_: object) -> None:
        global _asked_to_stop
        _asked_to_stop = True

    if _joined or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, ask)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def stop_requested() -> bool:
    """Whether to save and raise Stopped now. All processes must call it equally often; it is
    true at the same call.

    With several processes JAX chooses a call that none of them has reached yet: it is true
    once, and must be obeyed.
    """
    global _checks
    if not _joined:
        return _asked_to_stop
    _checks += 1
    return multihost_utils.reached_preemption_sync_point(_checks)

"""Profiler traces of a few training steps: planned ones, and those asked for while the training
runs."""

import socket
from pathlib import Path
from typing import Any

import jax
from absl import logging

from relay_jax.runtime import distributed
from relay_jax.runtime.logs import is_writer

REQUEST = "profile.request"  # created in a stage's folder by the user


class Profiler:
    """Traces below FOLDER/profile, of all processes and the same steps; to be used as a context.

    first: step where the planned trace begins, 0 for none; steps: length of each trace.
    """

    def __init__(self, folder: Path, first: int, steps: int) -> None:
        self._folder, self._first, self._steps = folder, first, steps
        self._end: int | None = None  # the running trace ends before this step

    def __enter__(self) -> "Profiler":
        return self

    def __exit__(self, *_: object) -> None:
        if self._end is not None:
            self._stop()

    def requested(self) -> bool:
        """On the process that writes: whether a trace was asked for. The request is taken away."""
        path = self._folder / REQUEST
        if not is_writer() or not path.exists():
            return False
        path.unlink(missing_ok=True)
        return True

    def before(self, step: int, asked: bool, running: Any) -> None:
        """Starts or ends a trace before a step, once what is `running` on the devices is done.

        All processes must call it with the same `asked`.
        """
        if self._end == step:
            jax.block_until_ready(running)
            self._stop()
        if self._end is None and (asked or step == self._first):
            jax.block_until_ready(running)
            options = jax.profiler.ProfileOptions()
            options.session_id, options.python_tracer_level = self._session(step), 0
            try:
                jax.profiler.start_trace(self._folder / "profile", profiler_options=options)
            except RuntimeError as error:
                logging.warning("no profiler trace: %s", error)
            else:
                self._end = step + self._steps

    def _session(self, step: int) -> str:
        """Folder of a trace. One for all hosts, whose files bear their names; further processes
        of a host have others."""
        hosts, own = distributed.tell(socket.gethostname()), jax.process_index()
        return f"step_{step}" if hosts[own] not in hosts[:own] else f"step_{step}_process_{own}"

    def _stop(self) -> None:
        self._end = None
        try:
            jax.profiler.stop_trace()
        except RuntimeError as error:
            logging.warning("no profiler trace: %s", error)
        else:
            logging.info(
                "profiler trace of %d steps in %s; open it with xprof or ui.perfetto.dev",
                self._steps,
                self._folder / "profile",
            )

"""Profiler traces of a few training steps: planned ones, and those asked for during a training.

All processes trace the same steps, so
that waits of one for another can be seen.
"""

import socket
from pathlib import Path
from typing import Any

import jax
from absl import logging

from relay_jax.runtime import distributed
from relay_jax.runtime.distributed import is_first
from relay_jax.runtime.files import cannot_write

# Created in a stage's folder by the user: a long training need not
# be stopped to be looked into.
REQUEST = "profile.request"


class Profiler:
    """Traces below FOLDER/profile, of all processes and the same steps; to be used as a context.

    first: step where the planned trace begins, 0 for none; steps:
    length of each trace.
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
        """On process 0: whether a trace was asked for; the request is removed.

        Raises StorageError where it cannot be.
        """
        path = self._folder / REQUEST
        if not is_first() or not path.is_file():
            return False
        # A request that stays would be answered after every report.
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            raise cannot_write(path, error) from error
        return True

    def before(self, step: int, requested: bool, running: Any) -> None:
        """Starts or ends a trace before a step, once what is `running` on the devices is done.

        All processes must call it with the same `requested`.
        """
        if self._end == step:
            jax.block_until_ready(running)
            self._stop()
        if self._end is None and (requested or step == self._first):
            jax.block_until_ready(running)
            options = jax.profiler.ProfileOptions()
            options.session_id, options.python_tracer_level = self._session(step), 0
            # A training is worth more than a
            # trace of it: it goes on without.
            try:
                jax.profiler.start_trace(self._folder / "profile", profiler_options=options)
            except (RuntimeError, OSError) as error:
                logging.warning("no profiler trace: %s", error)
            else:
                self._end = step + self._steps

    def _session(self, step: int) -> str:
        """The name of a trace's folder, the same for all hosts."""
        # Their files bear the hosts' names; only further processes
        # of one host need folders of their own.
        hosts, index = distributed.tell(socket.gethostname()), jax.process_index()
        alone = hosts[index] not in hosts[:index]
        return f"step_{step}" if alone else f"step_{step}_process_{index}"

    def _stop(self) -> None:
        self._end = None
        try:
            jax.profiler.stop_trace()
        except (RuntimeError, OSError) as error:
            logging.warning("no profiler trace: %s", error)
        else:
            logging.info(
                "profiler trace of %d steps in %s; open it with xprof or ui.perfetto.dev",
                self._steps,
                self._folder / "profile",
            )

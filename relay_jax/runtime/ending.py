"""How a command ends: one line and an exit status, also where other processes wait for this one.

0 done; 75 stopped by SIGTERM and saved; 130 by Ctrl-C, saved
likewise where something is; 2 the user has to change something; 1 the
same command may succeed later, or the program has failed.
"""

import os
import sys
import traceback
from collections.abc import Callable
from typing import NoReturn

import jax
from absl import logging

from relay_jax.errors import Stopped, UserError, one_line
from relay_jax.runtime import distributed, start, terminal
from relay_jax.runtime.files import storage_error
from relay_jax.runtime.logs import fail, quieten
from relay_jax.runtime.start import STOPPED

INTERRUPTED = 130  # as shells say it of Ctrl-C


def to_the_end(action: Callable[[], None]) -> None:
    """Connects the processes and runs what a command does; every way to end has its status."""
    quieten()
    try:
        distributed.initialize()
        with distributed.sigterm_asks():
            action()
        distributed.leave()
    except Stopped as stop:
        terminal.close()
        # Whoever raised it did not ask which of the two it was.
        by = distributed.stopped_by()
        said = str(stop).replace("SIGTERM", by)
        logging.info("%s; the same command continues: %s", said, start.command_of())
        distributed.leave()
        sys.exit(STOPPED if by == "SIGTERM" else INTERRUPTED)
    except UserError as error:
        give_up(error)
    # Of a place that nobody has thought
    # of; what was written is whole.
    except (OSError, UnicodeError) as error:
        give_up(storage_error(f"{one_line(error)}; what is finished stays", error))
    except KeyboardInterrupt:
        terminal.close()
        logging.info(
            "interrupted; the same command continues from what is saved: %s", start.command_of()
        )
        if distributed.joined():
            os._exit(INTERRUPTED)
        sys.exit(INTERRUPTED)
    except Exception as error:
        terminal.close()
        if not distributed.joined():
            raise
        _end_alone(error)


def give_up(error: UserError) -> NoReturn:
    """Ends with one line, also where other processes are waiting in a collective."""
    if not distributed.joined():
        fail(error, error.status)
    try:
        distributed.ends_alone()
        if not error.agreed or jax.process_index() == 0:
            fail(error, error.status)
    finally:
        if error.agreed:
            distributed.leave()
        else:
            # Leaving in order would wait for the others; the
            # launcher, or JAX's heartbeat, ends them.
            os._exit(error.status)
    sys.exit(error.status)


def _end_alone(error: Exception) -> NoReturn:
    """Ends one process of several with a failure that it does not share with the others."""
    # The interpreter's own way out would wait for processes that
    # wait for this one.
    try:
        # Within a moment: a collective fails because another one has ended.
        if says := distributed.gone(2.0):
            fail(says, 1)
        distributed.ends_alone()
        traceback.print_exception(error)
    finally:
        sys.stderr.flush()
        os._exit(1)

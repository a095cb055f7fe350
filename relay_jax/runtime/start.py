"""The first lines of a command: SIGTERM is answered, and JAX is imported in one line or none.

The commands import this module before JAX, which takes seconds
and reads variables of the environment meanwhile. It imports
nothing that takes time.
"""

import importlib
import os
import shlex
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from relay_jax.errors import UserError

STOPPED = 75  # EX_TEMPFAIL of sysexits.h: the same command continues
COMMANDS = ("relay-jax",)  # console commands of the package


def is_command(name: str) -> bool:
    """Whether a module of this `__name__` is the program, and not imported by one."""
    spec = getattr(sys.modules["__main__"], "__spec__", None)
    is_module = spec is not None and spec.name.startswith("relay_jax.")
    return name == "__main__" or is_module or Path(sys.argv[0]).name in COMMANDS


def begin() -> None:
    """For commands, before all other imports. Ends the program if JAX cannot be imported."""
    # Launchers start again what ends with this status; the
    # default of the first seconds would be 143, which they
    # take for a failure.
    signal.signal(signal.SIGTERM, _stop)
    try:
        importlib.import_module("jax")
    # ValueError for a variable that it cannot read; ImportError and
    # others for an installation that does not fit together.
    except Exception as error:
        text = " ".join(str(error).split())[:200]
        names = ", ".join(sorted(name for name in os.environ if name.startswith("JAX_"))[:8])
        variables = f"; look at {names} in the environment" if names else ""
        print(
            f"error: JAX cannot be imported: {text}{variables}",
            file=sys.stderr,
            flush=True,
        )
        sys.exit(2)


def command_of() -> str:
    """The command line of this process, as a line for a shell."""
    # As it was typed: absl and ml_collections change sys.argv.
    program, *arguments = sys.orig_argv
    return shlex.join([Path(program).name, *arguments])


def refuse_bytes(argv: Sequence[str]) -> None:
    """Raises UserError for an argument that is no UTF-8: records and reports are."""
    for arg in argv:
        try:
            arg.encode()
        except UnicodeEncodeError:
            text = os.fsencode(arg).decode(errors="replace")
            raise UserError(
                f"{text} holds bytes that are no UTF-8 text; rename the file or folder, or name "
                "a link to it"
            ) from None


@contextmanager
def argv_is(argv: Sequence[str]) -> Iterator[None]:
    """sys.argv is this meanwhile: ml_collections looks there for overrides of a configuration."""
    before = sys.argv
    sys.argv = list(argv)
    try:
        yield
    finally:
        sys.argv = before


def _stop(_: int, __: FrameType | None) -> None:
    # Nothing was begun, so there is nothing to save; JAX's import
    # has threads that an orderly end would wait for.
    print(
        "stopped by SIGTERM before it began; the same command continues",
        file=sys.stderr,
        flush=True,
    )
    os._exit(STOPPED)

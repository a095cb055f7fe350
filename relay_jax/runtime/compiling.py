"""Compilations say that they compile, and how long it took last time.

The seconds lie beside the compiled programs, so that who continues a
run, or starts another one like it, knows how long to wait.
"""

import contextlib
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
from absl import logging

from relay_jax.errors import StorageError
from relay_jax.runtime import distributed
from relay_jax.runtime.files import read_json, replacing

FILE = "compile_seconds.json"  # in the folder of the compilation cache
SHORT = 2.0  # seconds that nobody wonders about


@contextmanager
def compiling(what: str) -> Iterator[None]:
    """Around a compilation. what: names it, with all that its length depends on."""
    what = f"{what}, {jax.default_backend()}"
    before = _seconds().get(what)
    last = f" ({before:.0f} s last time)" if isinstance(before, int | float) else ""
    logging.info("compiles %s%s", what, last)
    begun = time.monotonic()
    yield
    seconds = time.monotonic() - begun
    # Less is what a program takes that is in the cache: it
    # says nothing about the next one that is not.
    if seconds >= SHORT:
        logging.info("compiled in %.0f s", seconds)
        if distributed.is_first():
            _remember(what, seconds)


def _path() -> Path | None:
    folder = jax.config.jax_compilation_cache_dir
    # A bucket is a place for JAX alone.
    return Path(folder) / FILE if folder and "://" not in folder else None


def _seconds() -> dict[str, float]:
    path = _path()
    try:
        known = read_json(path) if path else {}
    except (OSError, ValueError):
        known = {}
    return known if isinstance(known, dict) else {}


def _remember(what: str, seconds: float) -> None:
    path = _path()
    if path is None:
        return
    # A command can do without: the folder may be full or read-only.
    with contextlib.suppress(StorageError), replacing(path, durable=False, shared=True) as new:
        new.write_text(json.dumps(_seconds() | {what: round(seconds, 1)}, indent=1))

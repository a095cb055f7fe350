"""Keeps the memory of CPU programs from step to step.

XLA asks malloc for all temporaries of a program at once and gives them back after each call. Above 32 MiB, or outside of
the main thread, glibc maps fresh pages every time, which the kernel fills with zeros: a quarter of the demo's training
step (docs/benchmarks.md).
"""

import ctypes
import os

import jax

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4     # malloc.h


def reuse_on_cpu() -> None:
    """Call before the first use of a device. Changes nothing on accelerators, nor where malloc is not glibc's.

    Programs then run in the thread that calls them, so that malloc serves them from its main arena, and freed memory
    stays with the process.
    """
    if jax.config.jax_num_cpu_devices > 1 or "host_platform_device_count" in os.environ.get("XLA_FLAGS", ""):
        return      # the programs of several devices wait for each other: each needs its own thread
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)

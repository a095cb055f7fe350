"""How programs run: one set-up of the process, and one `jit` with the devices' compiler options.

On CPU sampling has a device on each core, convolutions use all
cores, and memory stays with the process between steps. XLA shares
out every operation of a program among the cores. A network's small
operations gain little by that, where two programs on a core each,
with half of the images, do not wait for each other: sampling is 1.3
times as fast (docs/lab/cpu.md). Training stays on one device:
there the exchange of gradients and a second optimiser cost as much.
"""

import contextlib
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from relay_jax.errors import UserError, one_line
from relay_jax.runtime import distributed
from relay_jax.runtime.files import is_writable

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
# Whether the devices after the first were made here, and not asked
# for by the user.
_for_sampling = False


def setup(sampling_devices: int = 1, bytes_on_each: int = 1) -> None:
    """Prepares the process for JAX programs; to be called once, before the first use of a device.

    sampling_devices: CPU devices at most, for programs that
    sample (`device_per_core`). bytes_on_each: what each of them
    holds a copy of. Raises UserError where the devices asked
    for are not there.
    """
    # Tracing makes millions of objects that stay: the collector took
    # a third of its time. Nothing here makes cycles as fast as that,
    # so rarer collections cost no memory that counts.
    gc.set_threshold(100_000, 50, 100)
    # The collectives of several processes need XLA's own
    # threads. In a notebook that has used JAX before, the
    # devices are what they are.
    if not distributed.joined():
        with contextlib.suppress(RuntimeError):
            if sampling_devices > 1:
                device_per_core(sampling_devices, bytes_on_each)
            reuse_memory()
    first_use()


def first_use() -> None:
    """Makes JAX start its devices. Raises UserError where those asked for are not there."""
    try:
        jax.devices()
    # RuntimeError, AssertionError and others, by the version of JAX.
    except Exception as error:
        platforms = jax.config.jax_platforms or ""
        source = f"JAX_PLATFORMS={platforms}: " if platforms else ""
        why = "" if isinstance(error, AssertionError) else f" ({one_line(error, 160)})"
        raise UserError(
            f"{source}JAX finds no such device{why}; leave the variable out, set "
            "JAX_PLATFORMS=cpu, or install JAX for the device (docs/running.md)"
        ) from error


def jit(function: Callable[..., Any], mesh: Mesh, **options: Any) -> Any:
    """jax.jit with the compiler options of the mesh's devices, so that nobody has to remember."""
    return jax.jit(function, compiler_options=compiler_options(mesh), **options)


def device_per_core(most: int, bytes_on_each: int) -> None:
    """Makes a CPU device of each core; to be called before the first use of a device.

    Changes nothing on accelerators, nor where the user has chosen a
    number of CPU devices (JAX_NUM_CPU_DEVICES or XLA_FLAGS). most:
    devices at most. bytes_on_each: what each one holds a copy of;
    all copies stay below a quarter of the memory.
    """
    global _for_sampling
    if _chosen():
        return
    # A container or a job may use fewer cores than the machine has;
    # macOS cannot say.
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jax.config.update(
        "jax_num_cpu_devices",
        max(1, min(cores, most, memory // 4 // bytes_on_each)),
    )
    _for_sampling = True


def training_devices() -> list[jax.Device]:
    """All devices, but the first alone where `device_per_core` has made the others."""
    return jax.devices()[:1] if _for_sampling and jax.default_backend() == "cpu" else jax.devices()


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """For jax.jit of programs with 3 x 3 convolutions. Empty on accelerators.

    XLA leaves products, reductions and convolutions to its library
    YNNPACK, whose convolutions use one core (jaxlib 0.10) or share
    the work less well (0.11). Those of Eigen use all cores. Where
    each core has a device YNNPACK's are faster.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return {}
    kinds = ("INDIVIDUAL_DOT", "REDUCE")  # all of YNNPACK's but convolutions
    return {
        "xla_cpu_experimental_ynn_fusion_type": ",".join(
            f"LIBRARY_FUSION_TYPE_{kind}" for kind in kinds
        )
    }


def in_haste() -> dict[str, int]:
    """For jax.jit of programs that run for a few images: on CPU they are compiled in half the time.

    Empty on accelerators, where images are large and compilers need
    their optimisations.
    """
    return {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else {}


def reuse_memory() -> None:
    """Keeps freed memory with the process; to be called after `device_per_core`, before any use.

    Changes nothing on accelerators, nor where malloc is not glibc's.
    """
    # XLA asks malloc for all temporaries of a program at once and
    # gives them back after each call. Above 32 MiB, or outside of
    # the main thread, glibc maps fresh pages every time, which the
    # kernel fills with zeros: a quarter of the demo's training step
    # (docs/lab/cpu.md). So programs of one device run in the
    # thread that calls them, where malloc serves them from its main
    # arena. Those of several devices wait for each other, and each
    # needs a thread of its own.
    if _chosen() and jax.config.jax_num_cpu_devices != 1 and not _for_sampling:
        return
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    first_use()
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _chosen() -> bool:
    """Whether a number of CPU devices is set."""
    return jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )


def use_compilation_cache(workdir: Path) -> None:
    """Compiled programs are kept in the workdir, unless the user has chosen a place."""
    if not os.environ.get("JAX_COMPILATION_CACHE_DIR") and is_writable(workdir / "cache"):
        jax.config.update("jax_compilation_cache_dir", str((workdir / "cache").absolute()))

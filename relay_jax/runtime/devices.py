"""How programs run on CPU: a device on each core for sampling, convolutions on all cores,
memory kept between steps.

XLA shares out every operation of a program among the cores. A network's small operations gain
little by that, where two programs on a core each, with half of the images, do not wait for each
other: sampling is 1.3 times as fast (docs/benchmarks.md). Training stays on one device: there
the exchange of gradients and a second optimiser cost as much.
"""

import ctypes
import os

import jax
from jax.sharding import Mesh

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # malloc.h
_for_sampling = False  # whether the devices after the first are ours, not asked for by the user


def device_per_core(most: int, bytes_on_each: int) -> None:
    """Call before the first use of a device. Changes nothing on accelerators, nor where the
    user has chosen a number of CPU devices (JAX_NUM_CPU_DEVICES or XLA_FLAGS).

    most: devices at most. bytes_on_each: what each one holds a copy of; all copies stay below a
    quarter of the memory.
    """
    global _for_sampling
    if _chosen():
        return
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    jax.config.update("jax_num_cpu_devices", max(1, min(cores, most, memory // 4 // bytes_on_each)))
    _for_sampling = True


def training_devices() -> list[jax.Device]:
    """All devices, but the first alone where `device_per_core` has made the others."""
    return jax.devices()[:1] if _for_sampling and jax.default_backend() == "cpu" else jax.devices()


def compiler_options(mesh: Mesh) -> dict[str, str]:
    """For jax.jit of programs with 3 x 3 convolutions. Empty on accelerators.

    XLA leaves products, reductions and convolutions to its library YNNPACK, whose convolutions
    use one core (jaxlib 0.10) or share the work less well (0.11). Those of Eigen use all cores.
    Where each core has a device YNNPACK's are faster.
    """
    if mesh.size > 1 or mesh.devices.flat[0].platform != "cpu":
        return {}
    return {
        "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"
    }


def reuse_memory() -> None:
    """Call before the first use of a device, after `device_per_core`. Changes nothing on
    accelerators, nor where malloc is not glibc's.

    XLA asks malloc for all temporaries of a program at once and gives them back after each
    call. Above 32 MiB, or outside of the main thread, glibc maps fresh pages every time, which
    the kernel fills with zeros: a quarter of the demo's training step (docs/benchmarks.md). Now
    programs of one device run in the thread that calls them, so that malloc
    serves them from its main arena, and freed memory stays with the process.
    """
    if _chosen() and jax.config.jax_num_cpu_devices != 1 and not _for_sampling:
        return  # the programs of several devices wait for each other: each needs its own thread
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None and jax.default_backend() == "cpu":
        mallopt(_M_MMAP_MAX, 0)
        mallopt(_M_TRIM_THRESHOLD, 2**31 - 1)


def _chosen() -> bool:
    """Whether a number of CPU devices is set."""
    return jax.config.jax_num_cpu_devices > 0 or "host_platform_device_count" in os.environ.get(
        "XLA_FLAGS", ""
    )

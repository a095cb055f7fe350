"""Whether a batch of samples fits into memory, before days are spent on weights to sample from.

A batch that is small for any network is let through. Otherwise the
program that will sample is compiled, and says how much it takes; the
compilation is not lost, the cache of the run keeps it.
"""

import math
from typing import Any

from jax.sharding import Mesh

from relay_jax.errors import UserError
from relay_jax.resolution import height_width
from relay_jax.stage import Stage
from relay_jax.values import memory_of_machine

# Copies of an image at the width of the highest level, and of an
# image of 16 channels, that no program has at the same time.
_SURELY_FITS = 64


def memory_of_device(mesh: Mesh) -> float:
    """Bytes of one device of this process; CPU devices share the machine's."""
    device = mesh.local_devices[0]
    limit = (device.memory_stats() or {}).get("bytes_limit") if device.platform != "cpu" else None
    return limit or memory_of_machine() / len(mesh.local_devices)


def surely_fits(stage: Stage, batch: int, mesh: Mesh) -> bool:
    """Whether `batch` images over all devices are few enough for any network of this width."""
    width = getattr(stage.network, "channels", 256) + 16
    each = 4 * math.prod(height_width(stage.resolution)) * width * _SURELY_FITS
    return -(-batch // mesh.size) * each < memory_of_device(mesh)


def check_program(program: Any, stage: Stage, batch: int, mesh: Mesh) -> None:
    """Raises UserError if a compiled program of a stage takes more memory than a device has.

    batch: its images, over all devices.
    """
    analysis = program.memory_analysis()
    if analysis is None:  # not every platform says
        return
    memory = memory_of_device(mesh)
    fixed = analysis.argument_size_in_bytes + analysis.output_size_in_bytes
    needed = analysis.temp_size_in_bytes + fixed
    if needed <= memory:
        return
    # What a smaller batch takes is about its share of this.
    fits = int(batch * max(memory - fixed, 0) / max(analysis.temp_size_in_bytes, 1))
    advice = f"use --config.sample.batch={1 << fits.bit_length() - 1}" if fits else "use fewer"
    raise UserError(
        f"sample.batch {batch} does not fit: stage {stage.name} takes {needed / 1e9:.3g} GB of a "
        f"device that has {memory / 1e9:.3g} GB; {advice} (an image then differs by 1e-6)"
    )

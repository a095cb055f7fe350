"""Device mesh and placement: a batch is split over both axes, parameters over `fsdp` alone.

A rule on shapes places every array of the state, so that
parameters, optimiser and average of a layer lie alike and their
update needs no communication.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from relay_jax.errors import UserError

# Elements; smaller arrays are copied: the communication would cost
# more than it saves.
MIN_SHARDED_SIZE = 2**14


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all) as (data, fsdp).

    Raises UserError if fsdp does not divide their number.
    """
    devices = devices or jax.devices()
    if fsdp < 1 or len(devices) % fsdp:
        raise UserError(f"mesh.fsdp {fsdp} does not divide the {len(devices)} devices")
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf, array or ShapeDtypeStruct, by its shape alone."""
    return jax.tree.map(partial(_sharding_of, mesh=mesh), tree)


def _sharding_of(leaf: jax.ShapeDtypeStruct, mesh: Mesh) -> NamedSharding:
    """Split along the largest axis that fsdp divides, the last of equals."""
    count = mesh.shape["fsdp"]
    axes = [(size, axis) for axis, size in enumerate(leaf.shape) if size % count == 0]
    if count == 1 or math.prod(leaf.shape) < MIN_SHARDED_SIZE or not axes:
        return replicated(mesh)
    chosen = max(axes)[1]
    names = ("fsdp" if axis == chosen else None for axis in range(len(leaf.shape)))
    return NamedSharding(mesh, PartitionSpec(*names))


def gathered(params: Any, mesh: Mesh) -> Any:
    """Whole copies of split parameters, for a computation whose batch alone is split.

    params: in the precision in which they travel
    (models.network.in_travel_dtype). Their gradient is split again.
    """
    # Without this XLA splits the channels of activations like the
    # weights, and exchanges activations at every layer.
    split = state_shardings(params, mesh)

    @jax.custom_vjp
    def whole(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    def divide(_: None, gradient: Any) -> tuple[Any]:
        # Whole first: else XLA computes it in pieces, each from a
        # copy of some channels of the activations.
        return (jax.lax.with_sharding_constraint(whole(gradient), split),)

    whole.defvjp(lambda params: (whole(params), None), divide)
    return whole(params)


def place(params: Any, mesh: Mesh) -> Any:
    """Arrays of a state, as `state_shardings` places them; those that lie so stay as they are."""
    return jax.device_put(params, state_shardings(params, mesh))


def host_rows(batch: int, mesh: Mesh) -> np.ndarray:
    """Which images of a batch this process's devices hold, ascending: int [batch / hosts]."""
    # They need not be neighbours: where a device stands in the mesh
    # depends on the machine's wiring.
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.sort(np.concatenate([np.arange(batch)[place] for place in places]))


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch (`host_rows`) as global arrays, first axis over all devices.

    Every row is in its place, and nothing moves between hosts.
    """
    sharding, arrays = batch_sharding(mesh), {}
    for key, values in batch.items():
        total = len(values) * mesh.size // len(mesh.local_devices)
        part = partial(_rows_of_device, values, host_rows(total, mesh))
        shape = (total, *values.shape[1:])
        arrays[key] = jax.make_array_from_callback(shape, sharding, part)
    return arrays


def _rows_of_device(values: np.ndarray, rows: np.ndarray, index: tuple[slice, ...]) -> np.ndarray:
    """The rows that a device holds, of this host's `values`, which are rows `rows` of the batch."""
    # A device's rows are neighbours in the batch, and so they are
    # among the host's.
    part = index[0]
    first, last = np.searchsorted(rows, [part.start or 0, part.stop or rows[-1] + 1])
    return values[first:last]


def from_all(values: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Whole arrays, the same on every process, as global ones, first axis over all devices."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        for key, value in values.items()
    }


def padded(rows: np.ndarray, count: int) -> np.ndarray:
    """The rows [n, ...] followed by rows of zeros, [count, ...]; the same array where n = count."""
    # Batches of one size: a compiled program would be compiled again
    # for the last, smaller one.
    if len(rows) == count:
        return rows
    return np.concatenate([rows, np.zeros((count - len(rows), *rows.shape[1:]), rows.dtype)])


def to_host(array: jax.Array) -> np.ndarray:
    """A global array as numpy, whole on every process; one on this process's devices, alone."""
    if array.is_fully_addressable:
        return np.asarray(array)
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def describe(mesh: Mesh) -> str:
    """Hosts, devices and mesh in a few words."""
    hosts = jax.process_count()
    each = f" ({mesh.size // hosts} on each)" if hosts > 1 else ""
    return (
        f"{hosts} host{'s' if hosts > 1 else ''}, {mesh.size} x "
        f"{jax.devices()[0].device_kind}{each}, mesh data "
        f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}"
    )

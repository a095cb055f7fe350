"""Device mesh and placement: axes `data` and `fsdp`, a batch split over both, parameters split over `fsdp`.

A rule on shapes places every array of the state, so parameters, optimiser and average get the same one.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MIN_SHARDED_SIZE = 2**14    # smaller arrays are copied: the communication would cost more than it saves


def make_mesh(fsdp: int = 1) -> Mesh:
    """All devices as (data, fsdp). Raises ValueError if fsdp does not divide their number."""
    devices = jax.device_count()
    if fsdp < 1 or devices % fsdp:
        raise ValueError(f"mesh.fsdp {fsdp} does not divide the {devices} devices")
    return jax.make_mesh((devices // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf (array or ShapeDtypeStruct): the largest axis divisible by fsdp, the last of equals."""
    count = mesh.shape["fsdp"]

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [(size, axis) for axis, size in enumerate(leaf.shape) if size % count == 0]
        if count == 1 or math.prod(leaf.shape) < MIN_SHARDED_SIZE or not axes:
            return replicated(mesh)
        chosen = max(axes)[1]
        return NamedSharding(mesh, PartitionSpec(*("fsdp" if a == chosen else None for a in range(leaf.ndim))))

    return jax.tree.map(rule, tree)


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's part of a batch -> global arrays, first axis over all devices."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_process_local_data(sharding, value) for key, value in batch.items()}


def from_all(values: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Whole arrays that every process has alike -> global arrays, first axis over all devices."""
    sharding = batch_sharding(mesh)
    return {key: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
            for key, value in values.items()}


def to_host(array: jax.Array) -> np.ndarray:
    """A global array as numpy, whole on every process."""
    return np.asarray(multihost_utils.process_allgather(array, tiled=True))


def stream_order(batch: int, mesh: Mesh) -> np.ndarray | None:
    """Where the images of a batch, in the order of the stream, lie in the array of `to_devices`; None if in place.

    Host k of m loads the images k, k + m, ... of a batch, and its devices hold them in the order of their place in the
    mesh. The noise of training depends on the place in the batch, so a result that does not depend on the number of
    hosts needs the order of the stream: int [batch], image i is at [i].
    """
    if jax.process_count() == 1:
        return None
    host = np.empty(batch, int)
    for device, index in batch_sharding(mesh).devices_indices_map((batch,)).items():
        host[index] = device.process_index
    places = [np.flatnonzero(host == k) for k in range(jax.process_count())]
    return np.stack(places, axis=1).reshape(-1)


def describe(mesh: Mesh) -> str:
    """Hosts, devices and mesh in a few words."""
    hosts = jax.process_count()
    each = f" ({mesh.size // hosts} on each)" if hosts > 1 else ""
    return (f"{hosts} host{'s' if hosts > 1 else ''}, {mesh.size} x {jax.devices()[0].device_kind}{each}, mesh data "
            f"{mesh.shape['data']} x fsdp {mesh.shape['fsdp']}")

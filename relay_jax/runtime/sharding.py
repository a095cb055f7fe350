"""Device mesh and placement: axes `data` and `fsdp`, a batch split over both, parameters split
over `fsdp`.

A rule on shapes places every array of the state, so parameters, optimiser and average get the
same one.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

MIN_SHARDED_SIZE = (
    2**14
)  # smaller arrays are copied: the communication would cost more than it saves


class MeshError(ValueError):
    """The devices cannot be arranged as the configuration says; one line for the user."""


def make_mesh(fsdp: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The devices (default: all) as (data, fsdp). Raises MeshError if fsdp does not divide
    their number."""
    devices = devices or jax.devices()
    if fsdp < 1 or len(devices) % fsdp:
        raise MeshError(f"mesh.fsdp {fsdp} does not divide the {len(devices)} devices")
    return jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """First axis over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """A sharding for each leaf (array or ShapeDtypeStruct): the largest axis divisible by fsdp,
    the last of equals."""
    count = mesh.shape["fsdp"]

    def rule(leaf: jax.ShapeDtypeStruct) -> NamedSharding:
        axes = [(size, axis) for axis, size in enumerate(leaf.shape) if size % count == 0]
        if count == 1 or math.prod(leaf.shape) < MIN_SHARDED_SIZE or not axes:
            return replicated(mesh)
        chosen = max(axes)[1]
        return NamedSharding(
            mesh, PartitionSpec(*("fsdp" if a == chosen else None for a in range(leaf.ndim)))
        )

    return jax.tree.map(rule, tree)


def gathered(params: Any, mesh: Mesh, dtype: jnp.dtype) -> Any:
    """Whole copies of split parameters, for a computation on a batch that is split alone; its
    gradient is split again.

    Without this XLA splits the channels of activations like the weights, and exchanges
    activations at every layer.
    dtype: what kernels of convolutions are used in, and therefore travel in.
    """
    split = state_shardings(params, mesh)

    @jax.custom_vjp
    def whole(params: Any) -> Any:
        return jax.lax.with_sharding_constraint(params, replicated(mesh))

    def divide(_: None, gradient: Any) -> tuple[Any]:
        # Whole first: or XLA computes it in pieces, each from a copy of some channels of the
        # activations.
        return (jax.lax.with_sharding_constraint(whole(gradient), split),)

    whole.defvjp(lambda params: (whole(params), None), divide)
    return whole(jax.tree.map(lambda leaf: leaf.astype(dtype) if leaf.ndim == 4 else leaf, params))


def place(params: Any, mesh: Mesh) -> Any:
    """Arrays of a state, as `state_shardings` places them on a mesh; the same arrays if they
    are there."""
    return jax.device_put(params, state_shardings(params, mesh))


def host_rows(batch: int, mesh: Mesh) -> np.ndarray:
    """Which images of a batch this process's devices hold under `batch_sharding`, ascending:
    int [batch / hosts].

    They need not be neighbours: where a device stands in the mesh depends on the machine's wiring.
    """
    places = batch_sharding(mesh).addressable_devices_indices_map((batch,)).values()
    return np.sort(np.concatenate([np.arange(batch)[place] for place in places]))


def to_devices(batch: Mapping[str, Any], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch (`host_rows`) -> global arrays, first axis over all devices,
    every row in its place.

    Nothing moves between hosts.
    """
    sharding = batch_sharding(mesh)

    def place(own: np.ndarray) -> jax.Array:
        total = len(own) * mesh.size // len(mesh.local_devices)
        rows = host_rows(total, mesh)

        def of_device(
            index: tuple[slice, ...],
        ) -> np.ndarray:  # a device's rows are neighbours, there and here
            first, stop, _ = index[0].indices(total)
            begin = int(np.searchsorted(rows, first))
            return own[begin : begin + stop - first]

        return jax.make_array_from_callback((total, *own.shape[1:]), sharding, of_device)

    return {key: place(value) for key, value in batch.items()}


def from_all(values: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Whole arrays that every process has alike -> global arrays, first axis over all devices."""
    sharding = batch_sharding(mesh)
    return {
        key: jax.make_array_from_callback(value.shape, sharding, value.__getitem__)
        for key, value in values.items()
    }


def to_host(array: jax.Array) -> np.ndarray:
    """A global array as numpy, whole on every process."""
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

"""Mesh and placement: the rule on shapes, batches to devices and back, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from relay_jax.runtime import sharding
from relay_jax.runtime.sharding import (
    batch_sharding,
    host_rows,
    make_mesh,
    padded,
    replicated,
    state_shardings,
    to_devices,
)
from tests.processes import launched, together


def mesh_of_four() -> Mesh:
    if jax.device_count() % 4:
        pytest.skip("needs a multiple of 4 devices")
    return make_mesh(fsdp=4)


def spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    return state_shardings({"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh)["x"].spec


def test_a_part_of_a_batch_is_filled_with_zeros() -> None:
    rows = np.ones((2, 3), np.uint8)
    filled = padded(rows, 4)
    assert filled.dtype == np.uint8 and filled.tolist() == [[1, 1, 1], [1, 1, 1], [0] * 3, [0] * 3]
    assert padded(rows, 2) is rows and padded(rows[:0], 2).shape == (2, 3)


def test_all_devices_are_in_the_mesh() -> None:
    devices = jax.device_count()
    assert dict(make_mesh().shape) == {"data": devices, "fsdp": 1}
    assert dict(make_mesh(devices).shape) == {"data": 1, "fsdp": devices}


@pytest.mark.parametrize("fsdp", [0, -1, 3, 5, 1000])
def test_an_fsdp_that_does_not_divide_the_devices_is_refused(fsdp: int) -> None:
    if fsdp > 0 and jax.device_count() % fsdp == 0:
        pytest.skip(f"{fsdp} divides the devices")
    with pytest.raises(
        ValueError, match=rf"mesh\.fsdp {fsdp} does not divide the {jax.device_count()} devices"
    ):
        make_mesh(fsdp)


@pytest.mark.parametrize(
    "shape, expected",
    [
        ((3, 3, 64, 128), (None, None, None, "fsdp")),  # the largest axis
        ((3, 3, 256, 64), (None, None, "fsdp", None)),
        ((3, 3, 128, 128), (None, None, None, "fsdp")),  # the last of equals
        ((1022, 64), (None, "fsdp")),  # the largest that is divisible
        ((130, 130), ()),  # none is divisible
        ((2**14,), ("fsdp",)),
        ((2**14 - 4,), ()),  # small ones are copied
        ((1000,), ()),
        ((), ()),
    ],
)
def test_large_arrays_are_split_along_their_largest_divisible_axis(
    shape: tuple[int, ...], expected: tuple[str | None, ...]
) -> None:
    assert spec(shape, AbstractMesh((2, 4), ("data", "fsdp"))) == PartitionSpec(*expected)


def test_without_fsdp_everything_is_on_every_device() -> None:
    assert spec((512, 512), make_mesh()) == PartitionSpec()


def test_the_rule_places_every_leaf_and_keeps_the_tree() -> None:
    mesh = mesh_of_four()
    tree = {
        "params": {"kernel": jnp.zeros((128, 128)), "bias": jnp.zeros(128)},
        "moments": (jnp.zeros((128, 128)),),
    }
    places = state_shardings(tree, mesh)
    assert jax.tree.structure(places) == jax.tree.structure(tree)
    put = jax.device_put(tree, places)
    assert put["params"]["kernel"].addressable_shards[0].data.shape == (128, 32)
    assert put["moments"][0].sharding == put["params"]["kernel"].sharding
    assert put["params"]["bias"].sharding.is_fully_replicated


def test_the_smallest_size_that_is_split_can_be_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sharding, "MIN_SHARDED_SIZE", 1)
    assert spec((4,), AbstractMesh((2, 4), ("data", "fsdp"))) == PartitionSpec("fsdp")


@pytest.mark.parametrize("fsdp", [1, 4])
def test_batches_are_split_over_all_devices_and_come_back_whole(fsdp: int) -> None:
    mesh = make_mesh() if fsdp == 1 else mesh_of_four()
    count = 2 * mesh.size
    batch = {
        "image": np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8),
        "label": np.arange(count, dtype=np.int32),
    }
    got = to_devices(batch, mesh)
    assert set(got) == set(batch)
    assert host_rows(count, mesh).tolist() == list(range(count))  # one process holds all
    for key, value in batch.items():
        assert got[key].sharding == batch_sharding(mesh) and got[key].dtype == value.dtype
        assert [shard.data.shape[0] for shard in got[key].addressable_shards] == [2] * mesh.size
        np.testing.assert_array_equal(got[key], value)
    assert {shard.device for shard in got["label"].addressable_shards} == set(mesh.devices.flat)


def test_replicated_is_a_whole_copy_on_every_device() -> None:
    mesh = make_mesh()
    x = jax.device_put(np.arange(3), replicated(mesh))
    assert x.sharding.is_fully_replicated and len(x.addressable_shards) == mesh.size


ROWS = """
import jax, numpy as np
from jax.sharding import AxisType
from relay_jax.runtime import distributed
from relay_jax.data.loader import Loader, Stream
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.runtime.sharding import host_rows, to_devices

distributed.initialize()
source = SyntheticShapes(8, 30, 0)
stream = Stream(resolution=8, batch_size=12, seed=1, x_flip=True)
with Loader(source, stream, threads=0) as whole:
    expected = next(whole)
for fsdp, order in ((1, [0, 1, 2, 3]), (2, [0, 2, 1, 3]), (4, [3, 0, 2, 1]), (1, [1, 2, 3, 0])):
    mesh = jax.make_mesh((4 // fsdp, fsdp), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2,
                         devices=[jax.devices()[n] for n in order])
    rows = host_rows(12, mesh)
    assert len(rows) == 6
    with Loader(source, stream, rows=rows, threads=0) as loader:
        batch = to_devices(dict(next(loader)), mesh)
    held = []
    for key, value in batch.items():
        assert value.shape == expected[key].shape and len(value.addressable_shards) == 2
        for shard in value.addressable_shards:
            np.testing.assert_array_equal(np.asarray(shard.data), expected[key][shard.index])
            held += range(12)[shard.index[0]] if key == "label" else []
    assert sorted(held) == rows.tolist()
    print("rows", order, jax.process_index(), *rows, flush=True)
distributed.leave()
"""


def test_each_host_loads_what_its_devices_hold_in_any_order_of_the_devices() -> None:
    ends = together(launched(2, devices=2), "-c", ROWS)
    output = "".join(text for _, text in ends)
    assert [status for status, _ in ends] == [0, 0], output[-3000:]
    for line in (
        "[0, 1, 2, 3] 0 0 1 2 3 4 5",
        "[0, 2, 1, 3] 0 0 1 2 6 7 8",
        "[3, 0, 2, 1] 1 0 1 2 6 7 8",
        "[1, 2, 3, 0] 0 0 1 2 9 10 11",
    ):
        assert f"rows {line}" in output

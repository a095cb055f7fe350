"""Mesh and placement: the rule on shapes, batches to devices and back, what is refused."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from relay_jax import sharding
from relay_jax.sharding import batch_sharding, make_mesh, replicated, state_shardings, to_devices


def mesh_of_four() -> Mesh:
    if jax.device_count() % 4:
        pytest.skip("needs a multiple of 4 devices")
    return make_mesh(fsdp=4)


def spec(shape: tuple[int, ...], mesh: Mesh | AbstractMesh) -> PartitionSpec:
    return state_shardings({"x": jax.ShapeDtypeStruct(shape, jnp.float32)}, mesh)["x"].spec


def test_all_devices_are_in_the_mesh() -> None:
    devices = jax.device_count()
    assert dict(make_mesh().shape) == {"data": devices, "fsdp": 1}
    assert dict(make_mesh(devices).shape) == {"data": 1, "fsdp": devices}


@pytest.mark.parametrize("fsdp", [0, -1, 3, 5, 1000])
def test_an_fsdp_that_does_not_divide_the_devices_is_refused(fsdp: int) -> None:
    if fsdp > 0 and jax.device_count() % fsdp == 0:
        pytest.skip(f"{fsdp} divides the devices")
    with pytest.raises(ValueError, match=rf"mesh\.fsdp {fsdp} does not divide the {jax.device_count()} devices"):
        make_mesh(fsdp)


@pytest.mark.parametrize("shape, expected", [
    ((3, 3, 64, 128), (None, None, None, "fsdp")),      # the largest axis
    ((3, 3, 256, 64), (None, None, "fsdp", None)),
    ((3, 3, 128, 128), (None, None, None, "fsdp")),     # the last of equals
    ((1022, 64), (None, "fsdp")),                       # the largest that is divisible
    ((130, 130), ()),                                   # none is divisible
    ((2**14,), ("fsdp",)),
    ((2**14 - 4,), ()),                                 # small ones are copied
    ((1000,), ()), ((), ())])
def test_large_arrays_are_split_along_their_largest_divisible_axis(shape: tuple[int, ...],
                                                                   expected: tuple[str | None, ...]) -> None:
    assert spec(shape, AbstractMesh((2, 4), ("data", "fsdp"))) == PartitionSpec(*expected)


def test_without_fsdp_everything_is_on_every_device() -> None:
    assert spec((512, 512), make_mesh()) == PartitionSpec()


def test_the_rule_places_every_leaf_and_keeps_the_tree() -> None:
    mesh = mesh_of_four()
    tree = {"params": {"kernel": jnp.zeros((128, 128)), "bias": jnp.zeros(128)}, "moments": (jnp.zeros((128, 128)),)}
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
    batch = {"image": np.random.default_rng(0).integers(0, 256, (count, 4, 4, 3), np.uint8),
             "label": np.arange(count, dtype=np.int32)}
    got = to_devices(batch, mesh)
    assert set(got) == set(batch)
    for key, value in batch.items():
        assert got[key].sharding == batch_sharding(mesh) and got[key].dtype == value.dtype
        assert [shard.data.shape[0] for shard in got[key].addressable_shards] == [2] * mesh.size
        np.testing.assert_array_equal(got[key], value)
    assert {shard.device for shard in got["label"].addressable_shards} == set(mesh.devices.flat)


def test_replicated_is_a_whole_copy_on_every_device() -> None:
    mesh = make_mesh()
    x = jax.device_put(np.arange(3), replicated(mesh))
    assert x.sharding.is_fully_replicated and len(x.addressable_shards) == mesh.size

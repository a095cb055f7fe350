"""Networks: a description that survives JSON, shapes and number of parameters, their precision."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import pytest

from relay_jax.config import network_from
from relay_jax.errors import UserError
from relay_jax.models.network import (
    describe,
    in_travel_dtype,
    init_params,
    parameter_count,
    shapes_of,
)
from relay_jax.models.unet import UNet

NETWORK = UNet(
    resolution=8,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention=(4,),
    head_width=8,
    num_classes=4,
    dropout=0.1,
    dtype=jnp.bfloat16,
)


def test_a_description_has_every_field_and_survives_json() -> None:
    description = describe(NETWORK)
    fields = {field.name for field in dataclasses.fields(UNet)} - {"parent", "name"}
    assert set(description) == {"kind"} | fields
    assert description["kind"] == "unet" and description["dtype"] == "bfloat16"
    again = network_from(json.loads(json.dumps(description)))
    assert again == NETWORK and describe(again) == description


def test_a_description_without_a_kind_is_that_of_a_unet() -> None:
    description = describe(NETWORK)
    del description["kind"]
    assert network_from(description) == NETWORK


@pytest.mark.parametrize(
    "change, message",
    [
        ({"kind": "resnet"}, "model.kind must be 'unet' or package.module:Class, not 'resnet'"),
        ({"depth": 3}, "unexpected keyword argument 'depth'"),
    ],
)
def test_descriptions_of_no_network_are_refused(change: dict, message: str) -> None:
    with pytest.raises((UserError, TypeError), match=message):
        network_from(describe(NETWORK) | change)


def test_shapes_are_those_of_fresh_parameters_all_float32() -> None:
    shapes = shapes_of(NETWORK)
    params = jax.jit(lambda key: init_params(NETWORK, key))(jax.random.key(0, impl="rbg"))
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(lambda leaf: leaf.shape, shapes)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert parameter_count(params) == parameter_count(shapes) == count


def test_only_parameters_that_are_used_in_the_dtype_travel_in_it() -> None:
    cast = jax.eval_shape(lambda params: in_travel_dtype(NETWORK, params), shapes_of(NETWORK))
    for path, leaf in jax.tree_util.tree_leaves_with_path(cast):
        # Kernels of convolutions alone have four axes; the embedding is computed in float32.
        is_conv = path[-1].key == "kernel" and leaf.ndim == 4
        assert leaf.dtype == (jnp.bfloat16 if is_conv else jnp.float32), path

"""Official parameters <-> params: names, layouts, order of attention channels, what is refused."""

import chex
import jax
import numpy as np
import pytest

from relay_jax.models.network import shapes_of
from relay_jax.models.unet import UNet
from relay_jax.official.parameters import from_official, official_shapes, to_official

HEAD_WIDTH = 4
NETWORK = UNet(
    resolution=8,
    channels=8,
    multipliers=(1, 2),
    blocks=1,
    attention=(4,),
    head_width=HEAD_WIDTH,
    num_classes=3,
    num_augment=9,
)


@pytest.fixture(scope="module")
def params() -> dict:
    """Parameters of NETWORK with a different number in every place."""
    leaves, structure = jax.tree.flatten(shapes_of(NETWORK))
    starts = np.cumsum([0] + [leaf.size for leaf in leaves])
    return jax.tree.unflatten(
        structure,
        [
            np.arange(start, start + leaf.size, dtype=np.float32).reshape(leaf.shape)
            for start, leaf in zip(starts, leaves, strict=False)
        ],
    )


@pytest.fixture(scope="module")
def official(params: dict) -> dict[str, np.ndarray]:
    return to_official(params, HEAD_WIDTH)


def test_to_official_and_back_is_the_identity(params: dict, official: dict) -> None:
    back = from_official(official, HEAD_WIDTH)
    chex.assert_trees_all_equal(back, params)
    again = to_official(back, HEAD_WIDTH)
    assert set(again) == set(official)
    for name, value in official.items():
        np.testing.assert_array_equal(again[name], value)


def test_shapes_are_those_of_the_official_arrays(official: dict) -> None:
    assert official_shapes(NETWORK) == {name: value.shape for name, value in official.items()}


def test_names_are_those_of_the_official_network(official: dict) -> None:
    block = {
        f"{layer}.{leaf}"
        for layer in ("norm0", "conv0", "affine", "norm1", "conv1")
        for leaf in ("weight", "bias")
    }
    skip = {"skip.weight", "skip.bias"}
    attention = {
        f"{layer}.{leaf}" for layer in ("norm2", "qkv", "proj") for leaf in ("weight", "bias")
    }
    blocks = {
        "enc.8x8_block0": block,
        "enc.4x4_down": block,
        "enc.4x4_block0": block | skip | attention,
        "dec.4x4_in0": block | attention,
        "dec.4x4_in1": block,
        "dec.4x4_block0": block | skip | attention,
        "dec.4x4_block1": block | skip | attention,
        "dec.8x8_up": block,
        "dec.8x8_block0": block | skip,
        "dec.8x8_block1": block | skip,
    }
    names = {f"model.{name}.{leaf}" for name, leaves in blocks.items() for leaf in leaves}
    names |= {
        f"model.{name}.{leaf}"
        for name in ("map_layer0", "map_layer1", "enc.8x8_conv", "out_norm", "out_conv")
        for leaf in ("weight", "bias")
    }
    names |= {"model.map_label.weight", "model.map_augment.weight"}
    assert set(official) == names


def test_layouts_are_output_channel_first(params: dict, official: dict) -> None:
    conv, linear = (
        official["model.enc.4x4_block0.conv0.weight"],
        official["model.enc.4x4_block0.affine.weight"],
    )
    assert conv.shape == (16, 8, 3, 3) and linear.shape == (32, 32)
    assert official["model.map_label.weight"].shape == (32, 3)
    kernel = params["enc_4x4_block0"]["conv0"]["kernel"]
    for o, i, y, x in np.ndindex(16, 8, 3, 3):
        assert conv[o, i, y, x] == kernel[y, x, i, o]
    np.testing.assert_array_equal(linear, params["enc_4x4_block0"]["affine"]["kernel"].T)
    np.testing.assert_array_equal(official["model.out_norm.weight"], params["out_norm"]["scale"])
    norm = params["dec_4x4_in0"]["attention"]["norm2"]
    np.testing.assert_array_equal(official["model.dec.4x4_in0.norm2.bias"], norm["bias"])


def test_official_attention_channels_are_by_head_then_channel_then_qkv(
    params: dict, official: dict
) -> None:
    # Of 16 channels in 4 heads, the official number (head * 4 + channel) * 3 + part is our number
    # part * 16 + head * 4 + channel.
    params = params["enc_4x4_block0"]["attention"]["qkv"]
    weight, bias = (official[f"model.enc.4x4_block0.qkv.{leaf}"] for leaf in ("weight", "bias"))
    assert weight.shape == (48, 16, 1, 1)
    for head, channel, part in np.ndindex(4, 4, 3):
        row = (head * 4 + channel) * 3 + part
        np.testing.assert_array_equal(
            weight[row, :, 0, 0], params["kernel"][0, 0, :, part * 16 + head * 4 + channel]
        )
        assert bias[row] == params["bias"][part * 16 + head * 4 + channel]


@pytest.mark.parametrize("channels, heads", [(32, 1), (64, 1), (128, 2), (160, 2), (192, 3)])
def test_published_networks_have_a_head_for_every_64_channels_which_share_all(
    channels: int, heads: int
) -> None:
    bias = np.arange(3 * channels)
    got = from_official({"model.dec.8x8_in0.qkv.bias": bias})["dec_8x8_in0"]["attention"]["qkv"][
        "bias"
    ]
    np.testing.assert_array_equal(
        got, bias.reshape(heads, channels // heads, 3).transpose(2, 0, 1).ravel()
    )


def test_constant_resample_filters_are_ignored(params: dict, official: dict) -> None:
    filters = {
        f"model.{name}.resample_filter": np.full((1, 1, 2, 2), 0.25, np.float32)
        for name in ("enc.4x4_down.conv0", "enc.4x4_down.skip", "dec.8x8_up.conv0")
    }
    chex.assert_trees_all_equal(from_official({**filters, **official}, HEAD_WIDTH), params)


@pytest.mark.parametrize(
    "name",
    [
        "map_layer0.weight",
        "net.map_layer0.weight",
        "model.map_layer0",
        "model.weight",
        "model.map_layer0.running_mean",
        "model.enc.8x8_conv.kernel",
        "",
    ],
)
def test_names_of_no_parameter_are_refused_by_name(name: str) -> None:
    with pytest.raises(ValueError, match="not the name of an official") as error:
        from_official({name: np.zeros(1)})
    assert repr(name) in str(error.value)

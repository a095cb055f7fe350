"""Official networks by their constructor arguments, and which U-Nets have the same parameters."""

from typing import Any

import numpy as np
import pytest

from relay_jax.errors import UserError
from relay_jax.models.unet import UNet
from relay_jax.official.files import Network
from relay_jax.official.network import check_same_network, network_of
from relay_jax.official.parameters import official_shapes

UNET = UNet(resolution=16, channels=32, multipliers=(1, 2), blocks=1, attention=(8,))


def pickled(**arguments: Any) -> Network:
    """A network with enough parameters for any number of blocks."""
    return Network(
        class_name="EDMPrecond",
        params=dict.fromkeys(map(str, range(99)), np.zeros(1)),
        arguments={"img_channels": 3, **arguments},
    )


def test_absent_arguments_have_their_defaults() -> None:
    assert network_of(pickled(img_resolution=64)) == UNet(
        resolution=64,
        channels=192,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        attention=(32, 16, 8),
        dropout=0.1,
    )


@pytest.mark.parametrize(
    ("arguments", "count"),
    [
        ({"img_resolution": 64}, 295_899_267),
        (
            {
                "img_resolution": 256,
                "model_channels": 256,
                "channel_mult": [1, 1, 2, 2, 4, 4],
                "num_blocks": 2,
            },
            553_831_171,
        ),
    ],
    ids=["64 px", "256 px"],
)
def test_published_parameter_counts(arguments: dict[str, Any], count: int) -> None:
    shapes = official_shapes(network_of(pickled(label_dim=1000, **arguments)))
    assert sum(np.prod(shape, dtype=int) for shape in shapes.values()) == count


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": np.dtype("float16"), "remat": True, "dropout": 0.5},
        {"head_width": 48},  # 64 channels are one head, as with 64
    ],
)
def test_fields_that_change_no_parameters_may_differ(changes: dict[str, Any]) -> None:
    check_same_network(UNET.clone(**changes), UNET, "base")


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"resolution": 32}, "resolution is 32 in the file and 16 in stage base"),
        ({"num_classes": 3}, "dataset.num_classes is 3"),
        ({"blocks": 2}, "model.blocks is 2"),
        ({"attention": ()}, "model.attention, model.head_width"),
        ({"head_width": 32}, "model.attention, model.head_width"),
    ],
)
def test_the_first_field_that_differs_is_named(changes: dict[str, Any], says: str) -> None:
    with pytest.raises(UserError, match=says):
        check_same_network(UNET.clone(**changes), UNET, "base")

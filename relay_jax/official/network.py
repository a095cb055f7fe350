"""Which U-Net an official network is: from its constructor arguments, or a checkpoint's notes.

Also whether two U-Nets have the same parameters, and a U-Net in
words. The fields of a U-Net are nowhere listed here:
models.network.describe says what they are.
"""

from collections.abc import Mapping
from typing import Any

from relay_jax.config import network_from
from relay_jax.errors import UserError, one_line
from relay_jax.models.network import Network as AnyNetwork
from relay_jax.models.network import describe
from relay_jax.models.unet import UNet
from relay_jax.official.files import Network
from relay_jax.official.pickle import show
from relay_jax.resolution import size_text

# Constructor arguments that mean something
# here; the last two change no weights.
_KNOWN = {
    "img_resolution",
    "img_channels",
    "label_dim",
    "augment_dim",
    "model_channels",
    "channel_mult",
    "channel_mult_emb",
    "num_blocks",
    "attn_resolutions",
    "dropout",
    "in_channels",
    "out_channels",
    "model_type",
    "sigma_data",
    "use_fp16",
    "label_dropout",
}
# Fields in which two networks may differ and have the
# same parameters. Attention is compared by its heads on
# each level: levels listed in another order, or none
# there, are the same network.
_NOT_IN_PARAMETERS = {"attention", "head_width", "dropout", "dtype", "remat"}
# Keys of a configuration that do not lie below `model`.
_KEYS = {"resolution": "resolution", "num_classes": "dataset.num_classes"}


def _whole(
    arguments: Mapping[str, Any],
    name: str,
    default: int | None,
    low: int,
    high: int,
) -> int:
    value = arguments.get(name, default)
    # Not isinstance: True is an int.
    if type(value) is not int or not low <= value <= high:
        raise UserError(
            f"its constructor argument {name} is {show(value)}, not a whole number from {low} "
            f"to {high}"
        )
    return value


def _wholes(
    arguments: Mapping[str, Any], name: str, default: list[int], high: int
) -> tuple[int, ...]:
    values = arguments.get(name, default)
    if not isinstance(values, list) or not all(type(v) is int and 1 <= v <= high for v in values):
        raise UserError(
            f"its constructor argument {name} is not a list of whole numbers from 1 to {high}"
        )
    return tuple(values)


def network_of(official: Network) -> UNet:
    """The U-Net that the constructor arguments of an official network describe.

    Absent arguments have the defaults of the official classes.
    Raises UserError for another kind of network, or arguments that
    no network can have.
    """
    arguments = dict(official.arguments)
    if "in_channels" in arguments and arguments.get("out_channels") == arguments["in_channels"]:
        arguments.setdefault("img_channels", arguments["in_channels"])
    kind = arguments.get("model_type", "DhariwalUNet")
    if official.class_name not in ("EDMPrecond", "DhariwalUNet") or kind != "DhariwalUNet":
        raise UserError(
            f"its network is a {show(kind)} in a {show(official.class_name)}; only the "
            "DhariwalUNet in an EDMPrecond, which all published relay networks are, can be "
            "converted"
        )
    if arguments.get("sigma_data", 0.5) != 0.5:
        raise UserError(f"its sigma_data is {show(arguments['sigma_data'])}, not 0.5")
    multipliers = _wholes(arguments, "channel_mult", [1, 2, 3, 4], 64)
    blocks = _whole(arguments, "num_blocks", 3, 1, 64)
    # Before the network is traced: a hostile file could ask for one
    # that takes hours.
    if not 1 <= len(multipliers) <= 10 or 2 * blocks * len(multipliers) > len(official.params):
        raise UserError(
            f"it has {len(official.params)} parameters, too few for {blocks} blocks on each of "
            f"{len(multipliers)} levels"
        )
    resolution = _whole(arguments, "img_resolution", None, 1, 4096)
    if resolution % (1 << (len(multipliers) - 1)):
        raise UserError(
            f"its resolution {resolution} cannot be halved {len(multipliers) - 1} times"
        )
    dropout = arguments.get("dropout", 0.1)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise UserError(f"its constructor argument dropout is {show(dropout)}")
    return UNet(
        resolution=resolution,
        channels=_whole(arguments, "model_channels", 192, 2, 4096),
        multipliers=multipliers,
        blocks=blocks,
        attention=_wholes(arguments, "attn_resolutions", [32, 16, 8], 4096),
        num_classes=_whole(arguments, "label_dim", 0, 0, 10**6),
        num_augment=_whole(arguments, "augment_dim", 0, 0, 1000),
        image_channels=_whole(arguments, "img_channels", None, 1, 64),
        dropout=float(dropout),
        embedding_multiplier=_whole(arguments, "channel_mult_emb", 4, 1, 64),
    )


def unused_arguments(official: Network) -> list[str]:
    """Constructor arguments that nothing here knows."""
    return sorted(set(official.arguments) - _KNOWN)


def noted_network(meta: Mapping[str, Any]) -> UNet | None:
    """The U-Net that the notes of a checkpoint describe, None where they say nothing.

    The notes of earlier versions lack the kind, the precision and
    remat: all were U-Nets, and the defaults of the others change no
    parameters. Raises UserError for another kind, and for notes that
    make no network.
    """
    description = meta.get("network")
    if description is None:
        return None
    try:
        # Other kinds are refused before they are built: a kind may
        # name any class that can be imported, and the checkpoint may
        # be somebody else's.
        _require_unet(description.get("kind", "unet"), "the checkpoint")
        return unet(network_from(description), "the checkpoint")
    except UserError:
        raise
    except (TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"the checkpoint's notes describe no network ({one_line(error)}); add --config and "
            "--stage"
        ) from error


def unet(network: AnyNetwork, owner: str) -> UNet:
    """The network itself, if it is one that official names and layouts exist for.

    owner: what the message calls it. Raises UserError for another
    kind.
    """
    _require_unet(describe(network)["kind"], owner)
    assert isinstance(network, UNet)
    return network


def _require_unet(kind: object, owner: str) -> None:
    if kind != "unet":
        raise UserError(
            f"the network of {owner} is of the kind {show(kind)}; official weights are a U-Net's"
        )


def heads_at(network: UNet, head_width: int) -> dict[int, int]:
    """Attention heads of each level that has any, if they had so many channels each.

    0 stands for the block of the lowest level, which has attention
    whether or not it is listed.
    """
    levels = {
        min(network.level_size(i)): network.channels * m // head_width
        for i, m in enumerate(network.multipliers)
    }
    listed = {size: heads for size, heads in levels.items() if size in network.attention}
    return {size: heads for size, heads in (listed | {0: min(levels.items())[1]}).items() if heads}


def check_same_network(network: UNet, expected: UNet, stage: str, place: str = "file") -> None:
    """Raises UserError naming the first setting in which a network differs from that of a stage.

    place: where `network` was read, for the message.
    """
    fields, stage_fields = describe(network), describe(expected)
    for field in fields:
        if field not in _NOT_IN_PARAMETERS and fields[field] != stage_fields[field]:
            raise UserError(
                f"{_KEYS.get(field, f'model.{field}')} is {fields[field]} in the {place} and "
                f"{stage_fields[field]} in stage {stage} of the configuration"
            )
    heads = heads_at(network, network.head_width)
    stage_heads = heads_at(expected, expected.head_width)
    if heads != stage_heads:
        raise UserError(
            f"the heads by attention level are {heads} in the {place} and {stage_heads} in stage "
            f"{stage} of the configuration (model.attention, model.head_width)"
        )


def in_words(network: UNet) -> str:
    """Resolution and conditioning of a network."""
    classes = f"{network.num_classes} classes" if network.num_classes else "unconditional"
    augment = f"{network.num_augment or 'no'} augmentation labels"
    size = size_text(network.resolution)
    return f"{size} px, {network.image_channels} channels, {classes}, {augment}"

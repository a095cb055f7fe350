"""Which U-Net an official network is: from its constructor arguments, compared with a
configuration, in words."""

from collections.abc import Mapping
from typing import Any

from relay_jax.models.unet import UNet
from relay_jax.official.files import Network
from relay_jax.official.pickle import FileError, show

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
}  # the last two change no weights


def _whole(
    arguments: Mapping[str, Any], name: str, default: int | None, low: int, high: int
) -> int:
    value = arguments.get(name, default)
    if type(value) is not int or not low <= value <= high:
        raise FileError(
            f"its constructor argument {name} is {show(value)}, not a whole number from {low} "
            f"to {high}"
        )
    return value


def _wholes(
    arguments: Mapping[str, Any], name: str, default: list[int], high: int
) -> tuple[int, ...]:
    values = arguments.get(name, default)
    if not isinstance(values, list) or not all(type(v) is int and 1 <= v <= high for v in values):
        raise FileError(
            f"its constructor argument {name} is not a list of whole numbers from 1 to {high}"
        )
    return tuple(values)


def network_of(official: Network) -> UNet:
    """The U-Net that the constructor arguments of an official network describe; absent ones
    have their defaults.

    Raises FileError for another kind of network, or arguments that no network can have.
    """
    given = dict(official.arguments)
    if "in_channels" in given and given.get("out_channels") == given["in_channels"]:
        given.setdefault("img_channels", given["in_channels"])
    kind = given.get("model_type", "DhariwalUNet")
    if official.class_name not in ("EDMPrecond", "DhariwalUNet") or kind != "DhariwalUNet":
        raise FileError(
            f"its network is a {show(kind)} in a {show(official.class_name)}; only the "
            "DhariwalUNet in an "
            "EDMPrecond, which all published relay networks are, can be converted"
        )
    if given.get("sigma_data", 0.5) != 0.5:
        raise FileError(f"its sigma_data is {show(given['sigma_data'])}, not 0.5")
    multipliers = _wholes(given, "channel_mult", [1, 2, 3, 4], 64)
    blocks = _whole(given, "num_blocks", 3, 1, 64)
    if not 1 <= len(multipliers) <= 10 or 2 * blocks * len(multipliers) > len(official.params):
        raise FileError(
            f"it has {len(official.params)} parameters, too few for {blocks} blocks on each of "
            f"{len(multipliers)} levels"
        )
    resolution = _whole(given, "img_resolution", None, 1, 4096)
    if resolution % (1 << (len(multipliers) - 1)):
        raise FileError(
            f"its resolution {resolution} cannot be halved {len(multipliers) - 1} times"
        )
    dropout = given.get("dropout", 0.1)
    if not isinstance(dropout, (int, float)) or not 0 <= dropout < 1:
        raise FileError(f"its constructor argument dropout is {show(dropout)}")
    return UNet(
        resolution=resolution,
        channels=_whole(given, "model_channels", 192, 2, 4096),
        multipliers=multipliers,
        blocks=blocks,
        attention=_wholes(given, "attn_resolutions", [32, 16, 8], 4096),
        num_classes=_whole(given, "label_dim", 0, 0, 10**6),
        num_augment=_whole(given, "augment_dim", 0, 0, 1000),
        image_channels=_whole(given, "img_channels", None, 1, 64),
        dropout=float(dropout),
        embedding_multiplier=_whole(given, "channel_mult_emb", 4, 1, 64),
    )


# What a converted checkpoint notes about its network, and what two networks must share to have
# the same parameters
_SHAPE_FIELDS = {
    "resolution": "resolution",
    "channels": "model.channels",
    "multipliers": "model.multipliers",
    "blocks": "model.blocks",
    "num_classes": "dataset.num_classes",
    "num_augment": "model.augment_labels",
    "image_channels": "image channels",
    "embedding_multiplier": "width of the embedding",
}
NOTED_FIELDS = (*_SHAPE_FIELDS, "attention", "head_width", "dropout")


def heads_at(network: UNet, head_width: int) -> dict[int, int]:
    """Attention heads of each level that has any; 0 is the block of the lowest level that
    always wants attention."""
    levels = {
        network.resolution >> i: network.channels * m // head_width
        for i, m in enumerate(network.multipliers)
    }
    wanted = {size: heads for size, heads in levels.items() if size in network.attention}
    return {size: heads for size, heads in (wanted | {0: min(levels.items())[1]}).items() if heads}


def check_same_network(found: UNet, wanted: UNet, stage: str) -> None:
    """Raises FileError naming the first setting in which the file's network differs from that
    of a stage."""
    for field, key in _SHAPE_FIELDS.items():
        if getattr(found, field) != getattr(wanted, field):
            raise FileError(
                f"{key} is {getattr(found, field)} in the file and {getattr(wanted, field)} in "
                "stage "
                f"{stage} of the configuration"
            )
    ours, theirs = heads_at(wanted, wanted.head_width), heads_at(found, found.head_width)
    if ours != theirs:
        raise FileError(
            f"the heads by attention level are {theirs} in the file and {ours} in stage "
            f"{stage} of the "
            "configuration (model.attention, model.head_width)"
        )


def describe(network: UNet) -> str:
    """Resolution and conditioning in words."""
    classes = f"{network.num_classes} classes" if network.num_classes else "unconditional"
    augment = (
        f"{network.num_augment} augmentation labels"
        if network.num_augment
        else "no augmentation labels"
    )
    return f"{network.resolution} px, {network.image_channels} channels, {classes}, {augment}"


def note(network: UNet) -> dict[str, Any]:
    """What a checkpoint says about its network, as JSON."""
    return {field: getattr(network, field) for field in NOTED_FIELDS}


def noted_network(meta: Mapping[str, Any]) -> UNet:
    """The network of a checkpoint with this `meta`. Raises FileError if it does not say."""
    noted = meta.get("network")
    if not isinstance(noted, dict) or set(noted) != set(NOTED_FIELDS):
        raise FileError(
            "the checkpoint does not say what network it is of; add --config and --stage"
        )
    return UNet(
        **{key: tuple(value) if isinstance(value, list) else value for key, value in noted.items()}
    )


def unused_arguments(official: Network) -> list[str]:
    """Constructor arguments that nothing here knows."""
    return sorted(set(official.arguments) - _KNOWN)

"""Official parameters <-> parameters here: names and layouts, no arithmetic; do they fit a U-Net?

Official names read `model.enc.64x64_block0.conv0.weight`; here they
are the nested dict params["enc_64x64_block0"]["conv0"]["kernel"].
Layouts: convolutions OIHW -> HWIO, linear layers [out, in] ->
[in, out], and the channels of the qkv projection from (head,
channel, q/k/v) to (q/k/v, head, channel). Constant
`resample_filter` entries are left out.
"""

from collections.abc import Mapping

import jax
import numpy as np

from relay_jax.errors import UserError
from relay_jax.models.network import shapes_of
from relay_jax.models.unet import UNet
from relay_jax.official.pickle import show

HEAD_WIDTH = 64  # channels per attention head of every published network
_ATTENTION = ("norm2", "qkv", "proj")


def flax_path(name: str) -> tuple[str, ...]:
    """model.enc.64x64_block0.conv0.weight -> (enc_64x64_block0, conv0, kernel).

    Raises ValueError for other names.
    """
    parts = name.split(".")
    if parts[0] != "model" or len(parts) < 3 or parts[-1] not in ("weight", "bias"):
        raise ValueError(f"{name!r} is not the name of an official U-Net parameter")
    if parts[1] in ("enc", "dec"):
        parts[1:3] = [f"{parts[1]}_{parts[2]}"]
    *modules, leaf = parts[1:]
    # torch calls the gain of a normalisation
    # its weight, Flax its scale.
    is_norm = modules[-1].startswith("norm") or modules[-1] == "out_norm"
    if leaf == "weight":
        leaf = "scale" if is_norm else "kernel"
    if modules[-1] in _ATTENTION:
        modules.insert(-1, "attention")
    return (*modules, leaf)


def official_name(path: tuple[str, ...]) -> str:
    """The inverse of `flax_path`."""
    parts = [part for part in path[:-1] if part != "attention"]
    if parts[0].startswith(("enc_", "dec_")):
        parts[0] = parts[0].replace("_", ".", 1)
    return ".".join(["model", *parts, "bias" if path[-1] == "bias" else "weight"])


def from_official(params: Mapping[str, np.ndarray], head_width: int = HEAD_WIDTH) -> dict:
    """Official names and layouts -> nested parameters of Flax, views where the layout allows.

    head_width: channels per attention head of the network. Raises
    ValueError for a name that no U-Net has.
    """
    tree: dict = {}
    for name, official in params.items():
        if name.endswith(".resample_filter"):
            continue
        path, value = flax_path(name), np.asarray(official)
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        # After the transposition the 3C output channels are the last
        # axis, also of the bias.
        if path[-2] == "qkv":
            value = _swap_qkv(value, _heads(value, head_width), to_flax=True)
        node = tree
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return tree


def to_official(params: Mapping, head_width: int = HEAD_WIDTH) -> dict[str, np.ndarray]:
    """Nested parameters of Flax, or their gradients -> official names and layouts."""
    official: dict[str, np.ndarray] = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        path, value = tuple(key.key for key in keys), np.asarray(leaf)
        if path[-2] == "qkv":
            value = _swap_qkv(value, _heads(value, head_width), to_flax=False)
        if value.ndim == 4:
            value = value.transpose(3, 2, 0, 1)
        elif value.ndim == 2:
            value = value.T
        official[official_name(path)] = value
    return official


def _heads(value: np.ndarray, head_width: int) -> int:
    # A level narrower than a head still
    # has one, with all its channels.
    return max(value.shape[-1] // 3 // head_width, 1)


def _swap_qkv(value: np.ndarray, heads: int, to_flax: bool) -> np.ndarray:
    """Reorders the last axis, 3C channels, between the two orders of the module's docstring."""
    width = value.shape[-1] // (3 * heads)
    sizes, axes = ((heads, width, 3), (2, 0, 1)) if to_flax else ((3, heads, width), (1, 2, 0))
    lead = value.shape[:-1]
    split = value.reshape(*lead, *sizes)
    order = [*range(len(lead)), *(len(lead) + axis for axis in axes)]
    return np.ascontiguousarray(split.transpose(order)).reshape(*lead, -1)


def official_shapes(network: UNet) -> dict[str, tuple[int, ...]]:
    """Official name -> official shape of every parameter of a U-Net; nothing is computed."""
    shapes = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(shapes_of(network))[0]:
        shape = leaf.shape
        shape = (shape[3], shape[2], shape[0], shape[1]) if len(shape) == 4 else shape[::-1]
        shapes[official_name(tuple(key.key for key in keys))] = shape
    return shapes


def filters(network: UNet) -> dict[str, np.ndarray]:
    """The constant entries of an official state dict: means of 2 x 2 pixels.

    They stand in every block that changes the resolution.
    """
    sizes = ["x".join(map(str, network.level_size(n))) for n in range(len(network.multipliers))]
    blocks = [f"enc.{size}_down" for size in sizes[1:]]
    blocks += [f"dec.{size}_up" for size in sizes[:-1]]
    return {
        f"model.{block}.{layer}.resample_filter": np.full((1, 1, 2, 2), 0.25, np.float32)
        for block in blocks
        for layer in ("conv0", "skip")
    }


def check_parameters(params: Mapping[str, np.ndarray], network: UNet) -> None:
    """Raises UserError unless these official parameters are those of the U-Net.

    Names and shapes must agree, none may be missing or left over,
    and filters be the usual ones.
    """
    try:
        expected = official_shapes(network)
    except (ValueError, TypeError, ZeroDivisionError) as error:
        raise UserError(f"its constructor arguments make no network ({error})") from error
    constants = {name for name in params if name.endswith(".resample_filter")}
    for name in sorted(constants):
        # Only their values say whether the network resamples as this
        # one does: any filter would load.
        if params[name].shape != (1, 1, 2, 2) or not np.all(params[name] == 0.25):
            raise UserError(
                f"{show(name)} is not the mean of 2 x 2 pixels: the network resamples unlike ours"
            )
    for what, names in (
        ("misses", set(expected) - set(params)),
        ("has left over", set(params) - set(expected) - constants),
        ("has left over", constants - set(filters(network))),
    ):
        if names:
            # Names come from the file:
            # shortened, and escaped by `show`.
            first = ", ".join(name[:80] for name in sorted(names)[:3])
            more = " and more" if len(names) > 3 else ""
            raise UserError(
                f"it {what} {len(names)} parameters of the network: {show(first)}{more}"
            )
    for name, shape in expected.items():
        if params[name].shape != shape:
            raise UserError(
                f"{show(name)} has shape {show(params[name].shape)} where the network has {shape}"
            )

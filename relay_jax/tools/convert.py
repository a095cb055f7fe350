"""Official parameters <-> ours (SPEC sections 6 and 11): names and layouts, no arithmetic.

Official names read `model.enc.64x64_block0.conv0.weight`; ours are the nested dict
params["enc_64x64_block0"]["conv0"]["kernel"]. Layouts: convolutions OIHW -> HWIO, linear layers
[out, in] -> [in, out], and the channels of the qkv projection from (head, channel, q/k/v) to (q/k/v, head, channel).
Constant `resample_filter` entries are left out.
"""

from collections.abc import Mapping

import numpy as np

HEAD_WIDTH = 64
_ATTENTION = ("norm2", "qkv", "proj")


def _our_path(name: str) -> tuple[str, ...]:
    """model.enc.64x64_block0.conv0.weight -> (enc_64x64_block0, conv0, kernel). Raises ValueError for other names."""
    parts = name.split(".")
    if parts[0] != "model" or len(parts) < 3 or parts[-1] not in ("weight", "bias"):
        raise ValueError(f"{name!r} is not the name of an official U-Net parameter")
    if parts[1] in ("enc", "dec"):
        parts[1:3] = [f"{parts[1]}_{parts[2]}"]
    *modules, leaf = parts[1:]
    is_norm = modules[-1].startswith("norm") or modules[-1] == "out_norm"
    if leaf == "weight":
        leaf = "scale" if is_norm else "kernel"
    if modules[-1] in _ATTENTION:
        modules.insert(-1, "attention")
    return (*modules, leaf)


def _official_name(path: tuple[str, ...]) -> str:
    """The inverse of `_our_path`."""
    parts = [part for part in path[:-1] if part != "attention"]
    if parts[0].startswith(("enc_", "dec_")):
        parts[0] = parts[0].replace("_", ".", 1)
    return ".".join(["model", *parts, "bias" if path[-1] == "bias" else "weight"])


def _swap_qkv(value: np.ndarray, heads: int, to_ours: bool) -> np.ndarray:
    """Reorders the last axis, 3C channels, between (head, channel, q/k/v) and (q/k/v, head, channel)."""
    width = value.shape[-1] // (3 * heads)
    sizes, axes = ((heads, width, 3), (2, 0, 1)) if to_ours else ((3, heads, width), (1, 2, 0))
    lead = value.shape[:-1]
    split = value.reshape(*lead, *sizes)
    order = [*range(len(lead)), *(len(lead) + axis for axis in axes)]
    return np.ascontiguousarray(split.transpose(order)).reshape(*lead, -1)


def _heads(value: np.ndarray, head_width: int) -> int:
    return max(value.shape[-1] // 3 // head_width, 1)


def from_official(params: Mapping[str, np.ndarray], head_width: int = HEAD_WIDTH) -> dict:
    """Official names and layouts -> our nested parameter dict.

    head_width: channels per attention head of the network (64 in every published one).
    Raises ValueError for a name that no U-Net has.
    """
    ours: dict = {}
    for name, value in params.items():
        if name.endswith(".resample_filter"):
            continue
        path, value = _our_path(name), np.asarray(value)
        if value.ndim == 4:
            value = value.transpose(2, 3, 1, 0)
        elif value.ndim == 2:
            value = value.T
        if path[-2] == "qkv":
            value = _swap_qkv(value, _heads(value, head_width), to_ours=True)
        node = ours
        for part in path[:-1]:
            node = node.setdefault(part, {})
        node[path[-1]] = value
    return ours


def to_official(params: Mapping, head_width: int = HEAD_WIDTH) -> dict[str, np.ndarray]:
    """Our nested parameter dict (or one of its gradients) -> official names and layouts."""
    official: dict[str, np.ndarray] = {}

    def visit(node: Mapping, path: tuple[str, ...]) -> None:
        for key, child in node.items():
            if isinstance(child, Mapping):
                visit(child, (*path, key))
                continue
            value = np.asarray(child)
            if path[-1] == "qkv":
                value = _swap_qkv(value, _heads(value, head_width), to_ours=False)
            if value.ndim == 4:
                value = value.transpose(3, 2, 0, 1)
            elif value.ndim == 2:
                value = value.T
            official[_official_name((*path, key))] = value

    visit(params, ())
    return official

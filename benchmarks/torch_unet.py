"""The ADM U-Net in PyTorch (arXiv 2105.05233), written apart from relay_jax as the baseline of
benchmarks.pytorch.

Images are [b, c, h, w]. Module names are those of the flax network, so that `load_flax` is a
loop over its parameters.
"""

import math
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn


def frequencies(c_noise: torch.Tensor, channels: int) -> torch.Tensor:
    """Cosines, then sines. [b] -> [b, channels]."""
    half = channels // 2
    scale = torch.exp(torch.arange(half, device=c_noise.device) * (-math.log(10000.0) / half))
    angle = c_noise.float()[:, None] * scale
    return torch.cat([angle.cos(), angle.sin()], dim=1)


class Attention(nn.Module):
    """Residual self-attention over pixels."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm2 = nn.GroupNorm(min(32, width // 4), width)
        self.qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        b, c, h, w = x.shape
        qkv = (
            self.qkv(self.norm2(x))
            .reshape(b, 3, self.heads, c // self.heads, h * w)
            .transpose(3, 4)
        )
        out = F.scaled_dot_product_attention(*qkv.unbind(1))
        return x + self.proj(out.transpose(2, 3).reshape(b, c, h, w))


class Block(nn.Module):
    """Residual block with scale and shift from the embedding."""

    def __init__(
        self, inputs: int, width: int, embedding: int, resample: str, heads: int, dropout: float
    ) -> None:
        super().__init__()
        self.resample, self.dropout = resample, dropout
        self.norm0 = nn.GroupNorm(min(32, inputs // 4), inputs)
        self.conv0 = nn.Conv2d(inputs, width, 3, padding=1)
        self.affine = nn.Linear(embedding, 2 * width)
        self.norm1 = nn.GroupNorm(min(32, width // 4), width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.skip = nn.Conv2d(inputs, width, 1) if inputs != width else None
        self.attention = Attention(width, heads) if heads else None

    def _resampled(self, x: torch.Tensor) -> torch.Tensor:
        if self.resample == "down":
            return F.avg_pool2d(x, 2)
        return F.interpolate(x, scale_factor=2, mode="nearest") if self.resample == "up" else x

    def forward(self, x: torch.Tensor, embedding: torch.Tensor) -> torch.Tensor:
        h = self.conv0(self._resampled(F.silu(self.norm0(x))))
        scale, shift = self.affine(embedding)[:, :, None, None].chunk(2, dim=1)
        h = F.silu(torch.addcmul(shift, self.norm1(h), 1 + scale))
        h = self.conv1(F.dropout(h, self.dropout, self.training))
        x = self._resampled(x)
        h = h + (x if self.skip is None else self.skip(x))
        return h if self.attention is None else self.attention(h)


class TorchUNet(nn.Module):
    """Takes the fields of relay_jax.models.unet.UNet as keywords."""

    def __init__(
        self,
        *,
        resolution: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        attention: tuple[int, ...],
        head_width: int,
        num_classes: int,
        num_augment: int = 0,
        image_channels: int = 3,
        embedding_multiplier: int = 4,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        width = channels * embedding_multiplier
        self.channels, self.multipliers, self.blocks, self.resolution = (
            channels,
            multipliers,
            blocks,
            resolution,
        )
        self.map_layer0, self.map_layer1 = nn.Linear(channels, width), nn.Linear(width, width)
        self.map_label = nn.Linear(num_classes, width, bias=False) if num_classes else None
        self.map_augment = nn.Linear(num_augment, channels, bias=False) if num_augment else None
        self.encoder: list[str] = []
        self.decoder: list[str] = []

        def block(
            names: list[str],
            name: str,
            inputs: int,
            outputs: int,
            resample: str = "",
            attend: bool = False,
        ) -> int:
            heads = outputs // head_width if attend else 0
            self.add_module(name, Block(inputs, outputs, width, resample, heads, dropout))
            names.append(name)
            return outputs

        now, skips = image_channels, []
        for level, multiplier in enumerate(multipliers):
            size, outputs = resolution >> level, channels * multiplier
            if level == 0:
                self.add_module(
                    f"enc_{size}x{size}_conv", nn.Conv2d(image_channels, outputs, 3, padding=1)
                )
                self.encoder.append(f"enc_{size}x{size}_conv")
                now = outputs
            else:
                now = block(self.encoder, f"enc_{size}x{size}_down", now, now, "down")
            skips.append(now)
            for i in range(blocks):
                now = block(
                    self.encoder,
                    f"enc_{size}x{size}_block{i}",
                    now,
                    outputs,
                    attend=size in attention,
                )
                skips.append(now)
        for level in reversed(range(len(multipliers))):
            size, outputs = resolution >> level, channels * multipliers[level]
            if level == len(multipliers) - 1:
                now = block(self.decoder, f"dec_{size}x{size}_in0", now, outputs, attend=True)
                now = block(self.decoder, f"dec_{size}x{size}_in1", now, outputs)
            else:
                now = block(self.decoder, f"dec_{size}x{size}_up", now, now, "up")
            for i in range(blocks + 1):
                now = block(
                    self.decoder,
                    f"dec_{size}x{size}_block{i}",
                    now + skips.pop(),
                    outputs,
                    attend=size in attention,
                )
        self.out_norm = nn.GroupNorm(min(32, now // 4), now)
        self.out_conv = nn.Conv2d(now, image_channels, 3, padding=1)

    def forward(
        self,
        x: torch.Tensor,
        c_noise: torch.Tensor,
        class_labels: torch.Tensor | None = None,
        augment_labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """x: [b, c, h, w]; c_noise: [b]; labels: vectors or None. Returns the shape of x."""
        embedding = frequencies(c_noise, self.channels)
        if self.map_augment is not None and augment_labels is not None:
            embedding = embedding + self.map_augment(augment_labels)
        embedding = self.map_layer1(F.silu(self.map_layer0(embedding)))
        if self.map_label is not None and class_labels is not None:
            embedding = embedding + self.map_label(class_labels)
        embedding = F.silu(embedding)

        skips = []
        for name in self.encoder:
            module = self.get_submodule(name)
            x = module(x, embedding) if isinstance(module, Block) else module(x)
            skips.append(x)
        for name in self.decoder:
            if "_block" in name:
                x = torch.cat([x, skips.pop()], dim=1)
            x = self.get_submodule(name)(x, embedding)
        return self.out_conv(F.silu(self.out_norm(x)))

    def load_flax(self, params: Mapping) -> None:
        """Takes the parameters of the flax network. Raises RuntimeError unless names and shapes
        all match."""
        state: dict[str, torch.Tensor] = {}

        def visit(node: Mapping, path: str) -> None:
            for name, leaf in node.items():
                if isinstance(leaf, Mapping):
                    visit(leaf, f"{path}{name}.")
                    continue
                array = np.asarray(leaf)
                if name == "kernel":
                    array = array.transpose(3, 2, 0, 1) if array.ndim == 4 else array.T
                state[path + ("bias" if name == "bias" else "weight")] = torch.tensor(array.copy())

        visit(params, "")
        self.load_state_dict(state, strict=True)

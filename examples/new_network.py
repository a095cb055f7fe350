"""A network of your own: a small transformer on patches (after DiT, arXiv 2212.09748).

Fields of the class are keys of `model` in a configuration. A configuration file with

    config.stages.base.model = dict(
        kind="examples.new_network:Transformer", width=128, depth=6, dtype="float32", remat=False
    )

trains it; from the command line, with the defaults of this file,

    python -m relay_jax.main --config=demo --workdir=runs/transformer \\
        --config.stages.base.model.kind=examples.new_network:Transformer

In Python: rx.build(config), or a Stage with network=Transformer(resolution=32, num_classes=8).

    tokens = patches x W + positions
    c      = MLP(cosines and sines of c_noise) + labels
    block  : x += gate(c) attention(norm(x) (1 + scale(c)) + shift(c));  the same with an MLP
    output = norm(x) (1 + scale(c)) + shift(c), projected to the pixels of the patch

All gates and the output are zero at initialisation: the network begins as the zero function, and
each block as the identity. Nothing here knows of noise levels, blur or preconditioning.
"""

from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from relay_jax.resolution import Resolution, height_width, size_text


class Block(nn.Module):
    """Attention and an MLP over tokens [b, n, width], both steered by c [b, width]."""

    heads: int
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, c: jax.Array) -> jax.Array:
        width = x.shape[-1]
        # float32: the steering is cheap, and small shifts would be lost in bfloat16.
        steering = nn.Dense(6 * width, kernel_init=nn.initializers.zeros, name="steering")(c)
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = jnp.split(steering[:, None], 6, axis=2)
        y = (modulated(x, shift, scale)).astype(self.dtype)
        attention = nn.MultiHeadDotProductAttention(self.heads, dtype=self.dtype, name="attention")
        x = x + gate * attention(y)
        y = (modulated(x, shift_mlp, scale_mlp)).astype(self.dtype)
        y = nn.Dense(4 * width, dtype=self.dtype, name="mlp_in")(y)
        return x + gate_mlp * nn.Dense(width, dtype=self.dtype, name="mlp_out")(nn.gelu(y))


def modulated(x: jax.Array, shift: jax.Array, scale: jax.Array) -> jax.Array:
    """Tokens [b, n, width] of mean 0 and variance 1, then scaled and shifted [b, 1, width]."""
    return nn.LayerNorm(use_bias=False, use_scale=False)(x) * (1 + scale) + shift


class Transformer(nn.Module):
    """F(x, c_noise, class_labels, augment_labels): all that relay_jax asks of a network.

    patch: pixels per side of a token. width, depth, heads: of the blocks. The other fields are
    those of every network (models/network.py).
    """

    resolution: Resolution
    patch: int = 2
    width: int = 64
    depth: int = 4
    heads: int = 4
    num_classes: int = 0
    num_augment: int = 0
    image_channels: int = 3
    dtype: Any = jnp.float32
    remat: bool = False

    def check(self) -> None:
        """Raises ValueError for fields that make no transformer, naming the key of `model`."""
        if any(side % self.patch for side in height_width(self.resolution)):
            size = size_text(self.resolution)
            raise ValueError(f"model.patch {self.patch} does not divide {size} pixels")
        if self.width % 2 or self.width % self.heads:
            raise ValueError(f"model.width {self.width} must be even and divisible by model.heads")

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """x: [b, h, w, image_channels]; c_noise: [b]; labels [b, n] or None. Like x, float32."""
        # Positions are learned, so the size is fixed; another one would fail in a reshape.
        height, width = height_width(self.resolution)
        chex.assert_shape(x, (None, height, width, self.image_channels))
        b, p = x.shape[0], self.patch
        rows, columns = height // p, width // p
        patches = x.reshape(b, rows, p, columns, p, -1).swapaxes(2, 3)
        patches = patches.reshape(b, rows * columns, -1)
        tokens = nn.Dense(self.width, name="patches")(patches)
        spread = nn.initializers.normal(0.02)
        tokens += self.param("positions", spread, (1, rows * columns, self.width))

        # c_noise = ln(sigma) / 4 spans three units: periods from a part of that to far beyond.
        frequency = jnp.geomspace(0.25, 16.0, self.width // 2)
        angle = c_noise[:, None] * frequency
        c = nn.Dense(self.width, name="level_in")(
            jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], 1)
        )
        c = nn.Dense(self.width, name="level_out")(nn.silu(c))
        # None means "no label", which guidance and unconditional sampling also write as zeros.
        for name, labels, size in (
            ("classes", class_labels, self.num_classes),
            ("augment", augment_labels, self.num_augment),
        ):
            if size:
                labels = jnp.zeros((b, size)) if labels is None else labels
                c += nn.Dense(self.width, use_bias=False, name=name)(labels)
        c = nn.silu(c)

        block = nn.remat(Block) if self.remat else Block
        for i in range(self.depth):
            tokens = block(self.heads, self.dtype, name=f"block{i}")(tokens, c)
        zeros = nn.initializers.zeros
        shift, scale = jnp.split(
            nn.Dense(2 * self.width, kernel_init=zeros, name="out_steering")(c)[:, None], 2, axis=2
        )
        pixels = nn.Dense(p * p * self.image_channels, kernel_init=zeros, name="out")(
            modulated(tokens, shift, scale)
        )
        grid = pixels.reshape(b, rows, columns, p, p, -1).swapaxes(2, 3)
        return grid.reshape(x.shape).astype(jnp.float32)

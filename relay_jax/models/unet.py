"""The ADM U-Net of both stages (SPEC section 6; arXiv 2105.05233, appendix).

embedding  = silu(L1(silu(L0(frequencies(c_noise) + A augment_labels))) + M class_labels)
encoder    : 3x3 conv, then per level [down] and `blocks` residual blocks; every output is kept as a skip
decoder    : per level in0 (with attention), in1 or [up], then `blocks` + 1 blocks on [x, skip]
output     = 3x3 conv(silu(norm(x))), zero at initialisation
"""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from relay_jax.models.blocks import Conv, GroupNorm, Linear, UNetBlock


def noise_embedding(c_noise: jax.Array, channels: int) -> jax.Array:
    """Cosines, then sines, of c_noise [b] times 10000^(-i / (channels/2)). Returns float32 [b,
    channels]."""
    frequency = jnp.exp(
        -math.log(10000.0) * jnp.arange(channels // 2, dtype=jnp.float32) / (channels // 2)
    )
    angle = c_noise.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


class UNet(nn.Module):
    """The raw network F(x, c_noise, class_labels, augment_labels).

    channels: base width; multipliers: width of each level, highest resolution first; blocks:
    per level.
    attention: resolutions (pixels per side) with attention; heads = width // head_width, none
    where that is 0.
    num_classes, num_augment: sizes of the label vectors, 0 = unconditional.
    dtype: precision of activations; remat: recompute each block in the backward pass to save
    memory.
    """

    resolution: int
    channels: int
    multipliers: tuple[int, ...]
    blocks: int
    attention: tuple[int, ...] = ()
    head_width: int = 64
    num_classes: int = 0
    num_augment: int = 0
    image_channels: int = 3
    embedding_multiplier: int = 4
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """x: [b, resolution, resolution, image_channels]; c_noise: [b]; class_labels: [b,
        num_classes] or None (no label); augment_labels: [b, num_augment] or None (zeros).
        Returns the shape of x, float32."""
        embedding = self._embed(c_noise, class_labels, augment_labels)
        x = x.astype(self.dtype)

        skips = []
        for level, multiplier in enumerate(self.multipliers):
            size, width = self.resolution >> level, self.channels * multiplier
            if level == 0:
                x = Conv(width, dtype=self.dtype, name=f"enc_{size}x{size}_conv")(x)
            else:
                x = self._block(f"enc_{size}x{size}_down", x.shape[-1], size, resample="down")(
                    x, embedding, train
                )
            skips.append(x)
            for i in range(self.blocks):
                x = self._block(
                    f"enc_{size}x{size}_block{i}", width, size, attention=size in self.attention
                )(x, embedding, train)
                skips.append(x)

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            size, width = self.resolution >> level, self.channels * multiplier
            if level == len(self.multipliers) - 1:
                x = self._block(f"dec_{size}x{size}_in0", width, size, attention=True)(
                    x, embedding, train
                )
                x = self._block(f"dec_{size}x{size}_in1", width, size)(x, embedding, train)
            else:
                x = self._block(f"dec_{size}x{size}_up", x.shape[-1], size, resample="up")(
                    x, embedding, train
                )
            for i in range(self.blocks + 1):
                x = jnp.concatenate([x, skips.pop()], axis=-1)
                x = self._block(
                    f"dec_{size}x{size}_block{i}", width, size, attention=size in self.attention
                )(x, embedding, train)

        x = nn.silu(GroupNorm(name="out_norm")(x))
        return Conv(self.image_channels, zero_init=True, dtype=self.dtype, name="out_conv")(
            x
        ).astype(jnp.float32)

    def _embed(
        self, c_noise: jax.Array, class_labels: jax.Array | None, augment_labels: jax.Array | None
    ) -> jax.Array:
        embedding = noise_embedding(c_noise, self.channels)
        if self.num_augment:
            if augment_labels is None:
                augment_labels = jnp.zeros((c_noise.shape[0], self.num_augment))
            embedding += Linear(self.channels, use_bias=False, zero_init=True, name="map_augment")(
                augment_labels
            )
        width = self.channels * self.embedding_multiplier
        embedding = Linear(width, name="map_layer0")(embedding)
        embedding = Linear(width, name="map_layer1")(nn.silu(embedding))
        if self.num_classes:
            if class_labels is None:
                class_labels = jnp.zeros((c_noise.shape[0], self.num_classes))
            embedding += Linear(
                width, use_bias=False, kernel_init=nn.initializers.normal(1.0), name="map_label"
            )(class_labels)
        return nn.silu(embedding)

    def _block(
        self, name: str, width: int, size: int, resample: str = "", attention: bool = False
    ) -> nn.Module:
        """A residual block; remat counts the module itself as argument 0, so `train` is 3."""
        block = nn.remat(UNetBlock, static_argnums=(3,)) if self.remat else UNetBlock
        return block(
            width,
            resample,
            width // self.head_width if attention else 0,
            self.dropout,
            self.dtype,
            name=name,
        )


def normalised_widths(channels: int, multipliers: tuple[int, ...], blocks: int) -> set[int]:
    """Channels that some normalisation of a UNet sees: the widths of its levels, and of their
    sums with the skips."""
    widths = [channels * m for m in multipliers]
    skips = [
        w
        for level, width in enumerate(widths)
        for w in [widths[max(level - 1, 0)], *[width] * blocks]
    ]
    seen, x = set(widths), widths[-1]
    for width in reversed(widths):
        for _ in range(blocks + 1):
            seen.add(x + skips.pop())
            x = width
    return seen


def init_params(network: UNet, key: jax.Array) -> dict:
    """Fresh parameters. Under jax.eval_shape: their shapes."""
    image = jnp.zeros((1, network.resolution, network.resolution, network.image_channels))
    return network.init(key, image, jnp.zeros((1,)))["params"]


def parameter_count(params: object) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

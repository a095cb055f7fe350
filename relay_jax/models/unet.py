"""The ADM U-Net of both stages (arXiv 2105.05233, appendix; docs/math.md section 5).

embedding = silu(L1(silu(L0(frequencies(c_noise) + A augment_labels))) + M class_labels)
            with a condition, whose images are channels beside x, L0 also takes
            C frequencies(c_noise of the condition)
encoder   : 3x3 conv, then per level [down] and `blocks` residual blocks;
            every output is kept as a skip
decoder   : per level in0 (with attention) and in1, or [up],
            then `blocks` + 1 residual blocks on [x, skip]
output    = 3x3 conv(silu(norm(x))), zero at initialisation
"""

import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp

from relay_jax.models.blocks import Conv, GroupNorm, Linear, UNetBlock, group_count
from relay_jax.resolution import Resolution, height_width, size_text

MAX_BLOCKS = 64  # per level; the published networks have 2 and 3


def noise_embedding(c_noise: jax.Array, channels: int) -> jax.Array:
    """Cosines, then sines, of c_noise [b] times 10000^(-i / (channels/2)).

    Returns float32 [b, channels].
    """
    frequency = jnp.exp(
        -math.log(10000.0) * jnp.arange(channels // 2, dtype=jnp.float32) / (channels // 2)
    )
    angle = c_noise.astype(jnp.float32)[:, None] * frequency
    return jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], axis=1)


class UNet(nn.Module):
    """The raw network F(x, c_noise, class_labels, augment_labels) of docs/math.md section 5.

    resolution: of its images. channels: base width.
    multipliers: width of each level in units of it, highest
    resolution first. blocks: per level. attention: resolutions
    (pixels of the shorter side) with attention; heads = width //
    head_width, none where that is 0. embedding_multiplier: width
    of the embedding in units of `channels`. num_classes,
    num_augment: sizes of the label vectors, 0 = none.
    condition_channels: of images that are given beside x, 0 = none.
    dtype: precision of activations. remat: recompute each block in
    the backward pass to save memory.
    """

    resolution: Resolution
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
    condition_channels: int = 0

    def check(self) -> None:
        """Raises ValueError for fields that make no U-Net, naming the key of `model` to change."""
        for name in (
            "channels",
            "blocks",
            "head_width",
            "embedding_multiplier",
        ):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"model.{name} must be a positive whole number, not {value!r}")
        for name, least in (("multipliers", 1), ("attention", 1)):
            for value in getattr(self, name):
                if not isinstance(value, int) or isinstance(value, bool) or value < least:
                    raise ValueError(
                        f"model.{name} must be positive whole numbers, not {getattr(self, name)}"
                    )
        if self.num_classes < 0 or self.num_augment < 0:
            raise ValueError("numbers of classes and augmentation labels must not be negative")
        if self.condition_channels < 0:
            raise ValueError("model.condition_channels must not be negative")
        # Each block is compiled by itself: thousands of them never
        # end, however small they are.
        if self.blocks > MAX_BLOCKS:
            raise ValueError(f"model.blocks must be at most {MAX_BLOCKS}, not {self.blocks}")
        if self.channels % 2:
            raise ValueError(f"model.channels must be even, not {self.channels}")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"model.dropout must lie in [0, 1), not {self.dropout}")
        # Every level but the first halves the image.
        halvings = len(self.multipliers) - 1
        if halvings < 0 or any(side % (1 << halvings) for side in height_width(self.resolution)):
            raise ValueError(
                f"resolution {size_text(self.resolution)} cannot be halved {halvings} times "
                f"(model.multipliers has {halvings + 1})"
            )
        for width in normalised_widths(self.channels, self.multipliers, self.blocks):
            group_count(width)
        widths = {
            min(self.level_size(level)): self.channels * multiplier
            for level, multiplier in enumerate(self.multipliers)
        }
        for size in self.attention:
            if size not in widths:
                raise ValueError(
                    f"model.attention asks for level {size}, but the levels are {list(widths)}"
                )
            if widths[size] < self.head_width:
                raise ValueError(
                    f"model.attention at level {size} needs at least head_width {self.head_width} "
                    f"channels, it has {widths[size]}; widen the level, lower model.head_width or "
                    "leave the level out"
                )
        # The lowest level has attention
        # in the decoder, listed or not.
        for size in {*self.attention, min(widths)}:
            heads = widths[size] // self.head_width
            if heads and widths[size] % heads:
                raise ValueError(
                    f"model.head_width {self.head_width} makes {heads} heads at level {size}, "
                    f"which do not divide its {widths[size]} channels; use a divisor of them"
                )

    def least_numbers(self) -> int:
        """A lower bound of the numbers of the weights, or of one image at the highest level."""
        widths = [self.channels * multiplier for multiplier in self.multipliers]
        embedding = self.channels * self.embedding_multiplier
        # Two 3x3 convolutions in each block of encoder and decoder,
        # and the embedding's layers.
        blocks = sum((2 * self.blocks + 1) * (18 * width + embedding) * width for width in widths)
        weights = blocks + embedding * (embedding + self.num_classes)
        return max(weights, math.prod(height_width(self.resolution)) * widths[0])

    def level_size(self, level: int) -> tuple[int, int]:
        """Height and width of the images at a level, 0 the highest."""
        height, width = height_width(self.resolution)
        return height >> level, width >> level

    def travels_in_dtype(self, leaf: jax.Array) -> bool:
        """Whether a parameter is used in `dtype` alone: the kernels of convolutions."""
        # Alone they have four axes. Gains, biases and the
        # embedding's layers are used in float32.
        return leaf.ndim == 4

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
        condition: tuple[jax.Array, jax.Array] | None = None,
    ) -> jax.Array:
        """x: [b, h, w, image_channels]; c_noise: [b]. Returns float32 like x.

        class_labels: [b, num_classes]; augment_labels:
        [b, num_augment]; None stands for zeros. train: dropout acts,
        with the rng "dropout". condition: images
        [b, h, w, condition_channels] and the c_noise
        of their noise [b]. Raises ValueError where it is missing, or
        not asked for.
        """
        self._check_inputs(x, c_noise, class_labels, augment_labels)
        if (condition is not None) != bool(self.condition_channels):
            raise ValueError(f"the network has {self.condition_channels} channels of a condition")
        embedding = self._embed(c_noise, class_labels, augment_labels, condition)
        if condition is not None:
            x = jnp.concatenate([x, condition[0]], axis=-1)
        x = x.astype(self.dtype)

        skips = []
        for level, multiplier in enumerate(self.multipliers):
            (h, w), width = self.level_size(level), self.channels * multiplier
            attention = min(h, w) in self.attention
            if level == 0:
                x = Conv(width, dtype=self.dtype, name=f"enc_{h}x{w}_conv")(x)
            else:
                down = self._block(f"enc_{h}x{w}_down", x.shape[-1], resample="down")
                x = down(x, embedding, train)
            skips.append(x)
            for i in range(self.blocks):
                block = self._block(f"enc_{h}x{w}_block{i}", width, attention=attention)
                x = block(x, embedding, train)
                skips.append(x)

        for level, multiplier in reversed(list(enumerate(self.multipliers))):
            (h, w), width = self.level_size(level), self.channels * multiplier
            attention = min(h, w) in self.attention
            if level == len(self.multipliers) - 1:
                # The lowest level has attention here whether or not
                # it is listed, as in ADM.
                in0 = self._block(f"dec_{h}x{w}_in0", width, attention=True)
                in1 = self._block(f"dec_{h}x{w}_in1", width)
                x = in1(in0(x, embedding, train), embedding, train)
            else:
                up = self._block(f"dec_{h}x{w}_up", x.shape[-1], resample="up")
                x = up(x, embedding, train)
            for i in range(self.blocks + 1):
                block = self._block(f"dec_{h}x{w}_block{i}", width, attention=attention)
                x = block(jnp.concatenate([x, skips.pop()], axis=-1), embedding, train)

        x = nn.silu(GroupNorm(name="out_norm")(x))
        x = Conv(self.image_channels, zero_init=True, dtype=self.dtype, name="out_conv")(x)
        return x.astype(jnp.float32)

    def _check_inputs(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None,
        augment_labels: jax.Array | None,
    ) -> None:
        """Refuses inputs of other shapes while the network is traced."""
        # x may be of another size: the network is convolutional, and
        # its parameters fit any.
        shape = (None, None, None, self.image_channels)
        message = f"x must be [b, h, w, {self.image_channels}]"
        chex.assert_shape(x, shape, custom_message=message)
        chex.assert_shape(c_noise, (x.shape[0],), custom_message="c_noise must be [b]")
        for name, labels, size in (
            ("class_labels", class_labels, self.num_classes),
            ("augment_labels", augment_labels, self.num_augment),
        ):
            # A network without labels ignores them, so that callers
            # need not ask for its kind.
            if size and labels is not None:
                message = f"{name} must be [b, {size}]"
                chex.assert_shape(labels, (x.shape[0], size), custom_message=message)

    def _embed(
        self,
        c_noise: jax.Array,
        class_labels: jax.Array | None,
        augment_labels: jax.Array | None,
        condition: tuple[jax.Array, jax.Array] | None,
    ) -> jax.Array:
        """silu(...) of the module's docstring: float32 [b, channels * embedding_multiplier]."""
        embedding = noise_embedding(c_noise, self.channels)
        if self.num_augment:
            if augment_labels is None:
                augment_labels = jnp.zeros((c_noise.shape[0], self.num_augment))
            embedding += Linear(self.channels, use_bias=False, zero_init=True, name="map_augment")(
                augment_labels
            )
        if condition is not None:
            level = noise_embedding(condition[1], self.channels)
            embedding += Linear(self.channels, use_bias=False, name="map_condition")(level)
        width = self.channels * self.embedding_multiplier
        embedding = Linear(width, name="map_layer0")(embedding)
        embedding = Linear(width, name="map_layer1")(nn.silu(embedding))
        if self.num_classes:
            if class_labels is None:
                class_labels = jnp.zeros((c_noise.shape[0], self.num_classes))
            embedding += Linear(
                width,
                use_bias=False,
                kernel_init=nn.initializers.normal(1.0),
                name="map_label",
            )(class_labels)
        return nn.silu(embedding)

    def _block(
        self, name: str, width: int, resample: str = "", attention: bool = False
    ) -> nn.Module:
        # nn.remat counts the module itself
        # as argument 0, so `train` is 3.
        block = nn.remat(UNetBlock, static_argnums=(3,)) if self.remat else UNetBlock
        heads = width // self.head_width if attention else 0
        return block(width, resample, heads, self.dropout, self.dtype, name=name)


def normalised_widths(channels: int, multipliers: tuple[int, ...], blocks: int) -> set[int]:
    """Channels that some normalisation of a U-Net sees: of its levels, and of [x, skip]."""
    widths = [channels * multiplier for multiplier in multipliers]
    skips: list[int] = []
    for level, width in enumerate(widths):
        # The first skip of a level has the width of the level above,
        # which `down` keeps.
        skips += [widths[max(level - 1, 0)], *[width] * blocks]
    seen, x = set(widths), widths[-1]
    for width in reversed(widths):
        for _ in range(blocks + 1):
            seen.add(x + skips.pop())
            x = width
    return seen

"""Building blocks of the ADM U-Net (arXiv 2105.05233, appendix), for images [b, h, w, c].

Parameters are float32. `dtype` is the precision of activations and
of the weights as used; the statistics of normalisations, softmax and
embeddings are float32 always.
"""

from collections.abc import Callable
from functools import partial

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from relay_jax.models.ops import (
    add_bias,
    attend,
    conv,
    conv1x1,
    conv3x3,
    downsample,
    gradient_once,
    up_conv3x3,
    upsample,
)

Initializer = Callable[..., jax.Array]


def fan_in_uniform(fan_in: int) -> Initializer:
    """Initializer of weights and biases alike: uniform on +-1/sqrt(fan_in).

    That is a standard deviation of sqrt(1/3)/sqrt(fan_in), as in the
    published networks.
    """
    return partial(_uniform, fan_in)


def _uniform(
    fan_in: int,
    key: jax.Array,
    shape: tuple[int, ...],
    dtype: jnp.dtype = jnp.float32,
) -> jax.Array:
    return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / fan_in**0.5


class Linear(nn.Module):
    """x W + b on the last axis: [..., c] -> [..., features]."""

    features: int
    use_bias: bool = True
    zero_init: bool = False
    kernel_init: Initializer | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        init = nn.initializers.zeros if self.zero_init else fan_in_uniform(x.shape[-1])
        x = x @ self.param("kernel", self.kernel_init or init, (x.shape[-1], self.features))
        return x + self.param("bias", init, (self.features,)) if self.use_bias else x


class Conv(nn.Module):
    """Convolution of odd width with zeros outside: [b, h, w, c] -> [b, h, w, features].

    up: of the image enlarged by two, -> [b, 2h, 2w, features]; for
    width 3 alone.
    """

    features: int
    width: int = 3
    zero_init: bool = False
    up: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        chex.assert_rank(x, 4, custom_message="x must be [b, h, w, c]")
        fan_in = x.shape[-1] * self.width**2
        init = nn.initializers.zeros if self.zero_init else fan_in_uniform(fan_in)
        kernel = self.param("kernel", init, (self.width, self.width, x.shape[-1], self.features))
        bias = self.param("bias", init, (self.features,))
        x, kernel = x.astype(self.dtype), kernel.astype(self.dtype)
        if self.width == 1:
            return add_bias(conv1x1(x, kernel[0, 0]), bias)
        function = conv if self.width != 3 else up_conv3x3 if self.up else conv3x3
        return add_bias(function(x, kernel), bias)


def group_count(channels: int) -> int:
    """Groups of every normalisation: min(32, channels // 4).

    Raises ValueError for channels that do not divide into them.
    """
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{channels} channels cannot be normalised in {groups} groups; use multiples of 4 "
            "up to 128 and of 32 above"
        )
    return groups


@partial(jax.jit, static_argnames=("groups", "epsilon"))  # traced once per shape
def group_affine(
    x: jax.Array, gain: jax.Array, bias: jax.Array, groups: int, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """Group normalisation as one multiply-add per pixel: norm(x) = x m + o.

    x: [b, h, w, c]; gain, bias: [c] or [b, c]. Returns m and o,
    float32 [b, 1, 1, c].
    """
    # Statistics over the pixels of each channel first, then over the
    # few channels of a group: seven times faster on CPU than one
    # reduction with a small axis, no slower elsewhere.
    mean = _group_mean(jnp.mean(x, axis=(1, 2), dtype=jnp.float32), groups)
    if x.dtype == jnp.float32:
        # Two passes, because E[x^2] - E[x]^2
        # cancels where the mean dominates.
        deviations = jnp.square(x - mean[:, None, None, :])
        variance = _group_mean(jnp.mean(deviations, axis=(1, 2)), groups)
    else:
        # 16-bit numbers have lost as much already; on TPU both sums
        # then ride on the convolution that makes x.
        squares = jnp.square(x.astype(jnp.float32))
        square = _group_mean(jnp.mean(squares, axis=(1, 2)), groups)
        variance = jnp.maximum(square - jnp.square(mean), 0)
    deviation = jnp.sqrt(variance + epsilon)
    # Both results end in a division: XLA does not repeat one in
    # every pixel, as it does with a product, and the rest of these
    # few numbers with it.
    multiplier, offset = (
        gain / deviation,
        (bias * deviation - mean * gain) / deviation,
    )
    return multiplier[:, None, None, :], offset[:, None, None, :]


def _group_mean(per_channel: jax.Array, groups: int) -> jax.Array:
    """The mean of its group for each channel: [b, c] -> [b, c]."""
    b, c = per_channel.shape
    mean = per_channel.reshape(b, groups, c // groups).mean(axis=2, keepdims=True)
    return jnp.broadcast_to(mean, (b, groups, c // groups)).reshape(b, c)


class GroupNorm(nn.Module):
    """Group normalisation, optionally adaptive: norm(x) (1 + scale) + shift, of [b, h, w, c].

    scale, shift: [b, c], both or neither.
    """

    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        scale: jax.Array | None = None,
        shift: jax.Array | None = None,
    ) -> jax.Array:
        channels = x.shape[-1]
        gain = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if scale is not None and shift is not None:
            gain, bias = gain * (1 + scale), bias * (1 + scale) + shift
        multiplier, offset = group_affine(x, gain, bias, group_count(channels), self.epsilon)
        return (x.astype(jnp.float32) * multiplier + offset).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the numbers of [b, h, w, c]; scales the others to keep the mean.

    What is zeroed is a hash of a number's place with two random
    words of its image (Wellons' lowbias32, of an affine sequence).
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        # A tenth of threefry's work, which on TPU costs as much as a
        # convolution, and cheap enough to be computed again wherever
        # the mask is used.
        b, h, w, c = x.shape
        row, column, channel = (
            lax.broadcasted_iota(jnp.uint32, (1, h, w, c), axis) for axis in (1, 2, 3)
        )
        factor, offset = jnp.moveaxis(
            jax.random.bits(self.make_rng("dropout"), (b, 1, 1, 1, 2), jnp.uint32),
            -1,
            0,
        )
        word = ((row * w + column) * c + channel) * (factor | 1) + offset
        word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
        word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
        keep = (word ^ (word >> 16)) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """Residual self-attention over the pixels of [b, h, w, c]: x + proj(attend(qkv(norm(x)))).

    The heads share all channels. It adds zero at initialisation.
    """

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        proj = Conv(c, 1, zero_init=True, dtype=self.dtype, name="proj")
        qkv = Conv(3 * c, 1, dtype=self.dtype, name="qkv")(GroupNorm(name="norm2")(x))
        out = attend(qkv.reshape(b, h * w, 3 * c), self.heads)
        return x + proj(out.reshape(b, h, w, c))


class UNetBlock(nn.Module):
    """Residual block with adaptive normalisation, optional resampling and attention.

    h = conv(resample(silu(norm(x))))
    h = conv(dropout(silu(norm(h) (1 + scale) + shift)))     scale, shift = affine(embedding)
    y = h + skip(resample(x)),  then attention

    x: [b, h, w, c] -> [b, h, w, channels], half or twice the size
    with resample "down" or "up". embedding: [b, width], float32.
    heads: 0 means no attention. skip is a 1x1 convolution where the
    width changes, else nothing. train: whether dropout acts.
    """

    channels: int
    resample: str = ""
    heads: int = 0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        chex.assert_rank(x, 4, custom_message="x must be [b, h, w, c]")
        chex.assert_rank(embedding, 2, custom_message="embedding must be [b, width]")
        up, down = self.resample == "up", self.resample == "down"
        x = gradient_once(x)

        h = nn.silu(GroupNorm(name="norm0")(x))
        h = downsample(h) if down else h
        # Upsampling is part of the convolution: every pixel stands
        # twice in each direction, which saves work where the
        # platform makes use of it.
        h = Conv(self.channels, up=up, dtype=self.dtype, name="conv0")(h)

        scale, shift = jnp.split(Linear(2 * self.channels, name="affine")(embedding), 2, axis=-1)
        h = nn.silu(GroupNorm(name="norm1")(h, scale, shift))
        h = Dropout(self.dropout)(h, train)
        h = Conv(self.channels, zero_init=True, dtype=self.dtype, name="conv1")(h)

        x = downsample(x) if down else upsample(x) if up else x
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, 1, dtype=self.dtype, name="skip")(x)
        h = h + x
        return Attention(self.heads, self.dtype, name="attention")(h) if self.heads else h

"""Building blocks of the ADM U-Net (SPEC section 6; arXiv 2105.05233), [b, h, w, c], parameters
in float32.

`dtype` is the precision of activations and of the weights as used; normalisation statistics,
softmax and
embeddings are float32 always.
"""

from collections.abc import Callable
from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from relay_jax.models.kernels.cpu import conv, conv1x1, conv3x3, gradient_once, up_conv3x3
from relay_jax.models.kernels.tpu import add_bias, attend
from relay_jax.models.resample import downsample, upsample

Initializer = Callable[..., jax.Array]


def fan_in_uniform(fan_in: int) -> Initializer:
    """Uniform on +-1/sqrt(fan_in), standard deviation sqrt(1/3)/sqrt(fan_in): weights and
    biases alike."""

    def init(key: jax.Array, shape: tuple[int, ...], dtype: jnp.dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -1.0, 1.0) / fan_in**0.5

    return init


class Linear(nn.Module):
    """x W + b on the last axis. [..., c] -> [..., features]."""

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
    """Convolution of odd width, stride 1, zero padding to the same size. [b, h, w, c] -> [b, h,
    w, features].

    up: of the image enlarged by two, [b, 2h, 2w, features]; width 3 alone.
    """

    features: int
    width: int = 3
    zero_init: bool = False
    up: bool = False
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
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
    """Groups of every normalisation: min(32, channels // 4). Raises ValueError if channels does
    not divide."""
    groups = min(32, channels // 4)
    if groups == 0 or channels % groups:
        raise ValueError(
            f"{channels} channels cannot be normalised in {groups} groups; use multiples of 4 "
            "up to 128 "
            "and of 32 above"
        )
    return groups


@partial(jax.jit, static_argnames=("groups", "epsilon"))  # traced once per shape
def group_affine(
    x: jax.Array, gain: jax.Array, bias: jax.Array, groups: int, epsilon: float
) -> tuple[jax.Array, jax.Array]:
    """GroupNorm folded into one multiply-add per pixel: returns m, o [b, 1, 1, c] with norm(x)
    = x m + o.

    x: [b, h, w, c]; gain, bias: [c] or [b, c]. Statistics in float32, first over the pixels of
    each channel,
    then over the few channels of a group: seven times faster on CPU than one small-axis
    reduction, no slower elsewhere. Two passes, because E[x^2] - E[x]^2 cancels where the mean
    dominates; one for 16-bit numbers, which have
    lost as much already: on TPU both sums then ride on the convolution that makes x. Both
    results end in a division:
    XLA does not repeat one in every pixel, as it does with a product, and the rest of these few
    numbers with it.
    """
    b, _, _, c = x.shape

    def over_group(per_channel: jax.Array) -> jax.Array:
        mean = per_channel.reshape(b, groups, c // groups).mean(axis=2, keepdims=True)
        return jnp.broadcast_to(mean, (b, groups, c // groups)).reshape(b, c)

    mean = over_group(jnp.mean(x, axis=(1, 2), dtype=jnp.float32))
    if x.dtype == jnp.float32:
        variance = over_group(jnp.mean(jnp.square(x - mean[:, None, None, :]), axis=(1, 2)))
    else:
        square = over_group(jnp.mean(jnp.square(x.astype(jnp.float32)), axis=(1, 2)))
        variance = jnp.maximum(square - jnp.square(mean), 0)
    deviation = jnp.sqrt(variance + epsilon)
    multiplier, offset = gain / deviation, (bias * deviation - mean * gain) / deviation
    return multiplier[:, None, None, :], offset[:, None, None, :]


class GroupNorm(nn.Module):
    """Group normalisation, optionally adaptive: norm(x) (1 + scale) + shift with scale, shift
    [b, c]."""

    epsilon: float = 1e-5

    @nn.compact
    def __call__(
        self, x: jax.Array, scale: jax.Array | None = None, shift: jax.Array | None = None
    ) -> jax.Array:
        channels = x.shape[-1]
        gain = self.param("scale", nn.initializers.ones, (channels,))
        bias = self.param("bias", nn.initializers.zeros, (channels,))
        if scale is not None and shift is not None:
            gain, bias = gain * (1 + scale), bias * (1 + scale) + shift
        multiplier, offset = group_affine(x, gain, bias, group_count(channels), self.epsilon)
        return (x.astype(jnp.float32) * multiplier + offset).astype(x.dtype)


class Dropout(nn.Module):
    """Zeroes a share `rate` of the numbers of [b, h, w, c] and scales the others to keep the mean.

    What is zeroed is a hash of a number's place with two random words of its image (Wellons'
    lowbias32, of an affine sequence): a tenth of threefry's work, which on TPU costs as much as
    a convolution, and cheap enough to be computed
    again wherever the mask is used.
    """

    rate: float

    @nn.compact
    def __call__(self, x: jax.Array, train: bool) -> jax.Array:
        if not train or self.rate == 0:
            return x
        b, h, w, c = x.shape
        row, column, channel = (
            lax.broadcasted_iota(jnp.uint32, (1, h, w, c), axis) for axis in (1, 2, 3)
        )
        factor, offset = jnp.moveaxis(
            jax.random.bits(self.make_rng("dropout"), (b, 1, 1, 1, 2), jnp.uint32), -1, 0
        )
        word = ((row * w + column) * c + channel) * (factor | 1) + offset
        word = (word ^ (word >> 16)) * jnp.uint32(0x7FEB352D)
        word = (word ^ (word >> 15)) * jnp.uint32(0x846CA68B)
        keep = (word ^ (word >> 16)) >= jnp.uint32(round(self.rate * 2**32))
        return jnp.where(keep, x / (1 - self.rate), 0).astype(x.dtype)


class Attention(nn.Module):
    """Residual self-attention over the pixels with `heads` heads that share all channels; zero
    at init."""

    heads: int
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        b, h, w, c = x.shape
        qkv = Conv(3 * c, 1, dtype=self.dtype, name="qkv")(GroupNorm(name="norm2")(x))
        out = attend(qkv.reshape(b, h * w, 3 * c), self.heads)
        return x + Conv(c, 1, zero_init=True, dtype=self.dtype, name="proj")(
            out.reshape(b, h, w, c)
        )


class UNetBlock(nn.Module):
    """Residual block with adaptive normalisation, optional resampling ('down' or 'up') and
    attention.

    heads = 0 means no attention. The 3x3 convolutions come after normalisation and silu;
    resampling comes
    before the first one, and on the skip path, which has a 1x1 convolution only where the width
    changes.
    """

    channels: int
    resample: str = ""
    heads: int = 0
    dropout: float = 0.0
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array, embedding: jax.Array, train: bool) -> jax.Array:
        x, up, down = gradient_once(x), self.resample == "up", self.resample == "down"
        h = nn.silu(GroupNorm(name="norm0")(x))
        h = Conv(self.channels, up=up, dtype=self.dtype, name="conv0")(downsample(h) if down else h)
        scale, shift = jnp.split(Linear(2 * self.channels, name="affine")(embedding), 2, axis=-1)
        h = nn.silu(GroupNorm(name="norm1")(h, scale, shift))
        h = Dropout(self.dropout)(h, train)
        h = Conv(self.channels, zero_init=True, dtype=self.dtype, name="conv1")(h)
        x = downsample(x) if down else upsample(x) if up else x
        if x.shape[-1] != self.channels:
            x = Conv(self.channels, 1, dtype=self.dtype, name="skip")(x)
        h = h + x
        return Attention(self.heads, self.dtype, name="attention")(h) if self.heads else h

"""Blocks, each against a float64 reference from its definition; initialisation; refusals."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.signal import correlate2d

from relay_jax.models.blocks import (
    Attention,
    Conv,
    Dropout,
    GroupNorm,
    Linear,
    UNetBlock,
    fan_in_uniform,
    group_count,
)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def fast_key() -> jax.Array:
    """Of the generator that compiles fastest."""
    return jax.random.key(0, impl="rbg")


def filled(module: object, *inputs: object) -> dict:
    """Random parameters of a module, without compiling its initialisation."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *inputs))["params"]
    rng = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: (0.3 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


def apply(module: object, params: dict, *inputs: object) -> np.ndarray:
    return jax.jit(lambda p, *arrays: module.apply({"params": p}, *arrays))(params, *inputs)


def silu(x: np.ndarray) -> np.ndarray:
    return x / (1 + np.exp(-x))


def norm_by_hand(x: np.ndarray, gain: np.ndarray, bias: np.ndarray, groups: int) -> np.ndarray:
    x = np.asarray(x, np.float64)
    b, h, w, c = x.shape
    split = x.reshape(b, h, w, groups, c // groups)
    mean, variance = split.mean((1, 2, 4), keepdims=True), split.var((1, 2, 4), keepdims=True)
    return ((split - mean) / np.sqrt(variance + 1e-5)).reshape(x.shape) * gain + bias


def conv_by_hand(x: np.ndarray, kernel: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """Sum over input channels of a correlation that sees zeros outside of the image."""
    x, kernel = np.asarray(x, np.float64), np.asarray(kernel, np.float64)
    inputs, outputs = kernel.shape[2:]
    return bias + np.stack(
        [
            np.stack(
                [
                    sum(
                        correlate2d(image[..., i], kernel[..., i, o], mode="same")
                        for i in range(inputs)
                    )
                    for o in range(outputs)
                ],
                axis=-1,
            )
            for image in x
        ]
    )


def attention_by_hand(x: np.ndarray, p: dict, heads: int) -> np.ndarray:
    """One image, one head and one pixel at a time; channels of qkv ordered (q/k/v, head,
    channel)."""
    b, h, w, c = x.shape
    width = c // heads
    normed = norm_by_hand(x, p["norm2"]["scale"], p["norm2"]["bias"], group_count(c)).reshape(
        b, h * w, c
    )
    qkv = normed @ p["qkv"]["kernel"][0, 0].astype(np.float64) + p["qkv"]["bias"]
    out = np.zeros((b, h * w, c))
    for head in range(heads):
        q, k, v = (
            qkv[..., part * c + head * width : part * c + (head + 1) * width] for part in range(3)
        )
        for image in range(b):
            for pixel in range(h * w):
                score = np.exp(k[image] @ q[image, pixel] / np.sqrt(width))
                out[image, pixel, head * width : (head + 1) * width] = (
                    score @ v[image] / score.sum()
                )
    return x + (out @ p["proj"]["kernel"][0, 0] + p["proj"]["bias"]).reshape(x.shape)


def resampled_by_hand(x: np.ndarray, resample: str) -> np.ndarray:
    if resample == "up":
        return x.repeat(2, axis=1).repeat(2, axis=2)
    return (
        (x[:, ::2, ::2] + x[:, 1::2, ::2] + x[:, ::2, 1::2] + x[:, 1::2, 1::2]) / 4
        if resample
        else x
    )


def block_by_hand(
    x: np.ndarray, embedding: np.ndarray, p: dict, resample: str = "", heads: int = 0
) -> np.ndarray:
    """norm, silu, resampling, conv; norm scaled and shifted by the embedding, silu, conv; skip
    path; attention."""
    h = silu(norm_by_hand(x, p["norm0"]["scale"], p["norm0"]["bias"], group_count(x.shape[-1])))
    h = conv_by_hand(resampled_by_hand(h, resample), **p["conv0"])
    affine = (embedding @ p["affine"]["kernel"] + p["affine"]["bias"])[:, None, None]
    c = h.shape[-1]
    h = norm_by_hand(h, p["norm1"]["scale"], p["norm1"]["bias"], group_count(c))
    h = h * (1 + affine[..., :c]) + affine[..., c:]
    x = resampled_by_hand(x, resample)
    h = conv_by_hand(silu(h), **p["conv1"]) + (conv_by_hand(x, **p["skip"]) if "skip" in p else x)
    return attention_by_hand(h, p["attention"], heads) if heads else h


# Group normalisation


@pytest.mark.parametrize(
    "channels, groups", [(4, 1), (12, 3), (64, 16), (128, 32), (192, 32), (256, 32), (1024, 32)]
)
def test_group_count_is_a_quarter_of_the_channels_up_to_32(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


@pytest.mark.parametrize("channels", [0, 3, 9, 130, 144])
def test_widths_that_do_not_divide_into_their_groups_are_refused(channels: int) -> None:
    with pytest.raises(ValueError, match=rf"{channels} channels .* multiples of 4"):
        group_count(channels)


@pytest.mark.parametrize("channels, groups", [(4, 1), (12, 3), (192, 32)])
def test_group_norm_equals_its_definition_plain_and_adaptive(channels: int, groups: int) -> None:
    x = 2 * normal(2, 5, 3, channels) + 1
    gain, bias = normal(channels, seed=2), normal(channels, seed=3)
    scale, shift = normal(2, channels, seed=4), normal(2, channels, seed=5)
    params = {"scale": gain, "bias": bias}
    plain = norm_by_hand(x, gain, bias, groups)
    np.testing.assert_allclose(apply(GroupNorm(), params, x), plain, atol=2e-5)
    adaptive = plain * (1 + scale[:, None, None]) + shift[:, None, None]
    np.testing.assert_allclose(apply(GroupNorm(), params, x, scale, shift), adaptive, atol=5e-5)


def test_group_norm_is_precise_where_the_mean_is_a_thousand_times_the_spread() -> None:
    x = 10 + 0.01 * normal(2, 16, 16, 8)
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    got = apply(GroupNorm(), {"scale": ones, "bias": zeros}, x)
    np.testing.assert_allclose(got, norm_by_hand(x, ones, zeros, 2), atol=1e-3)


def test_group_norm_of_bfloat16_has_float32_statistics_and_rounds_only_its_result() -> None:
    x = jnp.asarray(1 + 0.1 * normal(2, 32, 32, 8), jnp.bfloat16)
    gain, bias = normal(8, seed=2), normal(8, seed=3)
    got = apply(GroupNorm(), {"scale": gain, "bias": bias}, x)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(
        np.asarray(got, np.float64),
        norm_by_hand(np.asarray(x, np.float64), gain, bias, 2),
        rtol=2**-8,
        atol=1e-4,
    )


def test_group_norm_of_bfloat16_is_precise_where_the_mean_is_fifty_times_the_spread() -> None:
    x = jnp.asarray(50 + normal(2, 32, 32, 8), jnp.bfloat16)  # one pass: E[x^2] - E[x]^2 in float32
    ones, zeros = np.ones(8, np.float32), np.zeros(8, np.float32)
    got = np.asarray(apply(GroupNorm(), {"scale": ones, "bias": zeros}, x), np.float64)
    np.testing.assert_allclose(
        got, norm_by_hand(np.asarray(x, np.float64), ones, zeros, 2), rtol=2**-7, atol=0.01
    )


# Dropout


def test_dropout_keeps_its_share_and_the_mean_and_draws_each_number_for_itself() -> None:
    x, rate = jnp.ones((16, 8, 32, 64)), 0.3
    draw = jax.jit(lambda key: Dropout(rate).apply({}, x, True, rngs={"dropout": key}))
    got = np.asarray(draw(fast_key()))
    kept = got != 0
    np.testing.assert_allclose(got[kept], 1 / (1 - rate), rtol=1e-6)
    spread = np.sqrt(rate * (1 - rate))
    assert abs(kept.mean() - (1 - rate)) < 4 * spread / np.sqrt(kept.size)
    for axis in range(
        4
    ):  # the share in each image, row, column and channel, and no two of them alike
        lines = np.moveaxis(kept, axis, 0).reshape(kept.shape[axis], -1)
        limit = 4.5 / np.sqrt(lines.shape[1])
        np.testing.assert_allclose(lines.mean(axis=1), 1 - rate, atol=limit * spread)
        assert abs(np.corrcoef(lines) - np.eye(len(lines))).max() < limit
    other = np.asarray(draw(jax.random.key(1))) != 0
    assert abs(np.corrcoef(kept.ravel(), other.ravel())[0, 1]) < 4 / np.sqrt(kept.size)
    waves = np.abs(np.fft.rfft(kept.reshape(16, -1) - (1 - rate), axis=1)[:, 1:]) ** 2 / (
        spread**2 * kept[0].size
    )
    assert (
        waves.max() < np.log(waves.size) + 8
    )  # exponentially distributed, so that no frequency stands out
    np.testing.assert_array_equal(Dropout(rate).apply({}, x, False), x)


# Layers


@pytest.mark.parametrize("width", [1, 3])
def test_conv_equals_its_definition_with_zeros_outside_of_the_image(width: int) -> None:
    x, params = normal(2, 5, 4, 3), filled(Conv(2, width), jnp.zeros((1, 5, 4, 3)))
    assert params["kernel"].shape == (width, width, 3, 2)
    want = conv_by_hand(x, params["kernel"], params["bias"])
    np.testing.assert_allclose(apply(Conv(2, width), params, x), want, atol=1e-5)


def test_fan_in_uniform_has_its_bounds_and_standard_deviation() -> None:
    draws = np.asarray(fan_in_uniform(36)(jax.random.key(0), (200, 200)))
    assert abs(draws).max() <= 1 / 6 and draws.max() > 0.999 / 6 and draws.min() < -0.999 / 6
    np.testing.assert_allclose(draws.std(), np.sqrt(1 / 3) / 6, rtol=0.01)
    np.testing.assert_allclose(draws.mean(), 0, atol=0.002)


def test_layers_are_initialised_by_their_fan_in_biases_too() -> None:
    for module, shape, fan_in in ((Conv(512, 3), (1, 1, 1, 8), 72), (Linear(4096), (1, 8), 8)):
        params = jax.jit(lambda key, m=module, s=shape: m.init(key, jnp.zeros(s)))(fast_key())[
            "params"
        ]
        for leaf in (params["kernel"], params["bias"]):
            assert abs(leaf).max() <= fan_in**-0.5
            np.testing.assert_allclose(leaf.std(), np.sqrt(1 / 3) / np.sqrt(fan_in), rtol=0.06)
    for module, shape in (
        (Conv(2, zero_init=True), (1, 1, 1, 8)),
        (Linear(2, zero_init=True), (1, 8)),
    ):
        params = module.init(fast_key(), jnp.zeros(shape))["params"]
        assert all(not np.any(leaf) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_attention_equals_its_definition(heads: int) -> None:
    x = normal(2, 3, 5, 8)
    params = filled(Attention(heads), jnp.zeros_like(x))
    np.testing.assert_allclose(
        apply(Attention(heads), params, x), attention_by_hand(x, params, heads), atol=2e-5
    )


# The residual block


@pytest.mark.parametrize("resample", ["", "down", "up"])
def test_block_equals_its_definition(resample: str) -> None:
    x, embedding = normal(2, 4, 6, 8), normal(2, 10, seed=4)
    block = UNetBlock(12, resample, heads=3)
    params = filled(block, x, embedding, False)
    got = jax.jit(lambda p: block.apply({"params": p}, x, embedding, False))(params)
    np.testing.assert_allclose(
        got, block_by_hand(x, embedding, params, resample, heads=3), atol=1e-4
    )


@pytest.mark.parametrize("resample, features", [("", 8), ("down", 8), ("up", 8), ("", 12)])
def test_block_is_its_skip_path_at_initialisation(resample: str, features: int) -> None:
    x, embedding = normal(1, 4, 4, 8), normal(1, 6)
    block = UNetBlock(features, resample, heads=2)

    params = jax.jit(lambda key: block.init(key, x, embedding, False))(fast_key())["params"]
    got = jax.jit(lambda p: block.apply({"params": p}, x, embedding, False))(params)
    want = resampled_by_hand(x, resample)
    assert ("skip" in params) == (features != 8)
    if "skip" in params:
        np.testing.assert_allclose(got, conv_by_hand(want, **params["skip"]), atol=1e-5)
    else:
        np.testing.assert_allclose(got, want, atol=1e-6)

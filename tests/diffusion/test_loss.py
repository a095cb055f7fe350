"""Losses: both forward processes by hand, the sharp target, known losses of known denoisers,
the draws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from scipy.special import ndtri

from relay_jax.diffusion.loss import Draws, corrupt, draw, loss, loss_map
from relay_jax.diffusion.precondition import precondition
from relay_jax.diffusion.process import EdmProcess, RelayProcess

EDM, RELAY = EdmProcess(), RelayProcess(patch=4, block_noise_scale=0.5)
SHAPE = (4, 8, 12, 3)
BOTH = pytest.mark.parametrize("process", [EDM, RELAY], ids=["edm", "relay"])
fast_corrupt = jax.jit(corrupt, static_argnums=0)
fast_draw = jax.jit(draw, static_argnums=(0, 2))


def images(shape: tuple[int, ...] = SHAPE) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, shape).astype(np.float32)


def column(value: np.ndarray) -> np.ndarray:
    return np.asarray(value, np.float64).reshape(-1, 1, 1, 1)


def factors(blur_sigma: np.ndarray) -> np.ndarray:
    """Attenuation of RELAY, [b, p, p]."""
    squares = np.square(np.pi * np.arange(4) / 4)
    exponent = (squares[:, None] + squares[None, :]) * np.square(blur_sigma)[:, None, None] / 2
    return 0.999 * np.exp(-exponent) + 0.001


def by_hand(process: EdmProcess, x: np.ndarray, draws: Draws) -> tuple[np.ndarray, ...]:
    """noisy, sigma, blurred in float64, from the definitions."""
    level, gaussian = np.asarray(draws.level, np.float64), np.asarray(draws.gaussian, np.float64)
    if not isinstance(process, RelayProcess):
        sigma = np.exp(-1.2 + 1.2 * level)
        return x + column(sigma) * gaussian, sigma, x
    u = np.maximum(level, process.u_min)
    sigma, blur_sigma = np.exp(-1.2 + 1.2 * ndtri(0.93 * u)), 3 * np.sin(np.pi * u / 2) ** 2
    b, h, w, c = x.shape
    coefficients = scipy.fft.dctn(
        x.astype(np.float64).reshape(b, h // 4, 4, w // 4, 4, c), axes=(2, 4), norm="ortho"
    )
    coefficients *= factors(blur_sigma)[:, None, :, None, :, None]
    blurred = scipy.fft.idctn(coefficients, axes=(2, 4), norm="ortho").reshape(x.shape)
    block = (
        sum(np.roll(draws.block_gaussian, (i, j), (1, 2)) for i in range(4) for j in range(4)) / 4
    )
    return blurred + column(sigma) * (gaussian + 0.5 * block), sigma, blurred


@BOTH
def test_corruption_loss_map_and_loss_by_hand(process: EdmProcess) -> None:
    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        return jnp.tanh(x) / (1 + sigma[:, None, None, None])

    x, key = images(), jax.random.key(3)
    draws = fast_draw(process, key, SHAPE)
    got = fast_corrupt(process, x, draws)
    noisy, sigma, blurred = by_hand(process, x, draws)
    np.testing.assert_allclose(got.noisy, noisy, atol=2e-5)
    np.testing.assert_allclose(got.sigma, sigma, rtol=1e-5)
    np.testing.assert_allclose(got.blurred, blurred, atol=1e-5)
    want = column((sigma**2 + 0.25) / (0.5 * sigma) ** 2) * np.square(
        np.tanh(noisy) / (1 + column(sigma)) - x
    )
    np.testing.assert_allclose(loss_map(denoise, x, got), want, rtol=1e-3, atol=1e-4)
    each = jax.jit(lambda x, key: loss(process, denoise, x, key))(x, key)
    assert each.shape == SHAPE[:1]
    np.testing.assert_allclose(each, want.mean(axis=(1, 2, 3)), rtol=1e-4)


def test_draws_at_or_below_the_floor_give_the_smallest_sigma() -> None:
    zeros = jnp.zeros(SHAPE)
    got = fast_corrupt(RELAY, zeros, Draws(jnp.array([0.0, RELAY.u_min, 0.01, 0.9]), zeros, zeros))
    np.testing.assert_allclose(got.sigma[:2], 0.00712, atol=5e-6)
    assert np.all(np.diff(got.sigma[1:]) > 0) and np.all(np.diff(got.blur_sigma[1:]) > 0)


@BOTH
def test_the_denoiser_of_a_single_image_has_no_loss(process: EdmProcess) -> None:
    point = images()[:1]
    x = np.repeat(point, SHAPE[0], axis=0)
    np.testing.assert_array_equal(
        loss(process, lambda noisy, sigma: point, x, jax.random.key(0)), 0
    )


def test_the_target_is_the_sharp_image_not_the_blurred_one() -> None:
    x = images()
    corrupted = fast_corrupt(RELAY, x, fast_draw(RELAY, jax.random.key(0), SHAPE))
    np.testing.assert_array_equal(loss_map(lambda *_: x, x, corrupted), 0)
    for_blurred = loss_map(lambda *_: corrupted.blurred, x, corrupted)
    want = column(corrupted.weight) * np.square(np.asarray(corrupted.blurred, np.float64) - x)
    assert np.all(want.mean(axis=(1, 2, 3)) > 0)
    np.testing.assert_allclose(for_blurred, want, rtol=1e-3, atol=1e-5)


@BOTH
def test_a_silent_network_on_gaussian_data_has_the_expected_loss(process: EdmProcess) -> None:
    """White gaussian images of variance sd^2: per coefficient the error is (c_skip a - 1) x0 +
    c_skip sigma n."""
    shape = (32, 64, 64, 1)
    x = 0.5 * np.random.default_rng(1).normal(size=shape).astype(np.float32)
    draws = fast_draw(process, jax.random.key(5), shape)
    corrupted = fast_corrupt(process, x, draws)
    denoise = precondition(lambda x, *_: jnp.zeros_like(x))
    got = np.asarray(loss_map(denoise, x, corrupted)).mean(axis=(1, 2, 3))

    sigma = np.asarray(corrupted.sigma, np.float64)
    c_skip = 0.25 / (sigma**2 + 0.25)
    want = np.ones(shape[0])  # EDM: the weight is 1 / c_out^2
    block = 0.0
    if isinstance(process, RelayProcess):
        block = process.block_noise_scale**2
        a = factors(np.asarray(corrupted.blur_sigma))
        error = 0.25 * np.square(column(c_skip)[..., 0] * a - 1).mean(axis=(1, 2)) + (
            c_skip * sigma
        ) ** 2 * (1 + block)
        want = (sigma**2 + 0.25) / (0.5 * sigma) ** 2 * error
    # 4096 pixels per image: relative standard error sqrt(2 / 4096) = 0.022 for white noise, 5
    # of them per image. Correlated noise (here at most a fifth of the variance) has a sixteenth
    # of the independent pixels.
    np.testing.assert_allclose(got, want, rtol=0.11)
    np.testing.assert_allclose(np.mean(got / want), 1, atol=0.02)


def test_the_weight_is_capped_in_the_loss_of_the_relay() -> None:
    process = RelayProcess(weight_max=10.0)
    zeros = jnp.zeros(SHAPE)
    corrupted = fast_corrupt(process, zeros, Draws(jnp.array([0.0, 0.1, 0.9, 0.999]), zeros, zeros))
    sigma = np.asarray(corrupted.sigma)
    want = np.minimum(4 + 1 / sigma**2, 10)
    assert want[0] == 10 and want[-1] < 10
    np.testing.assert_allclose(
        loss_map(lambda x, _: x + 1, zeros, corrupted)[:, 0, 0, 0], want, rtol=1e-5
    )


def test_draws_are_uniform_or_normal_levels_and_unit_fields_of_their_own() -> None:
    shape = (256, 8, 8, 3)
    relay, edm = (fast_draw(process, jax.random.key(7), shape) for process in (RELAY, EDM))
    level = np.asarray(relay.level)
    assert level.shape == (256,) and level.min() >= 0 and level.max() < 1
    # 1.95 / sqrt(256): exceeded by uniform numbers once in a thousand samples.
    assert np.abs(np.sort(level) - (np.arange(256) + 0.5) / 256).max() < 1.95 / 16
    assert np.asarray(edm.level).min() < 0 and np.abs(np.mean(edm.level)) < 4 / 16
    for field in (relay.gaussian, relay.block_gaussian):
        assert field.shape == shape
        assert (
            abs(float(jnp.mean(field))) < 0.02 and abs(float(jnp.var(field)) - 1) < 0.03
        )  # 4 standard errors
    correlation = np.corrcoef(np.ravel(relay.gaussian), np.ravel(relay.block_gaussian))[0, 1]
    assert abs(correlation) < 0.02
    per_image = np.asarray(relay.gaussian).reshape(256, -1)
    assert (
        np.abs(np.corrcoef(per_image[:16]) - np.eye(16)).max() < 0.4
    )  # 192 numbers each: 5 standard errors


def test_the_block_field_is_drawn_only_where_it_counts() -> None:
    for process in (EDM, RelayProcess(block_noise_scale=0.0)):
        assert draw(process, jax.random.key(0), SHAPE).block_gaussian is None


def test_draws_depend_on_the_key_alone() -> None:
    draws = (fast_draw(RELAY, jax.random.key(seed), SHAPE) for seed in (0, 0, 1))
    first, again, other = map(jax.tree.leaves, draws)  # without the fields that it has not
    for a, b, c in zip(first, again, other, strict=True):
        np.testing.assert_array_equal(a, b)
        assert np.all(np.asarray(a) != np.asarray(c))


def test_a_relay_without_blocks_blur_or_floor_corrupts_as_the_first_stage_does() -> None:
    x, draws = images(), fast_draw(EDM, jax.random.key(2), SHAPE)
    plain = RelayProcess(patch=1, block_noise_scale=0.0, cdf_max=1.0, sigma_floor=1e-9)
    uniform = jax.scipy.special.ndtr(draws.level)
    want, got = fast_corrupt(EDM, x, draws), fast_corrupt(plain, x, draws._replace(level=uniform))
    np.testing.assert_allclose(got.noisy, want.noisy, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(got.weight, want.weight, rtol=1e-4)


def test_other_images_and_draws_are_refused_by_name() -> None:
    x, draws = images(), jax.eval_shape(lambda key: draw(RELAY, key, SHAPE), jax.random.key(0))
    draws = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), draws)
    for wrong, message in (
        ((x[0], draws), r"images must be \[b, h, w, c\]"),
        ((x.astype(np.uint8), draws), r"images must be floating-point, in \[-1, 1\]"),
        ((x, draws._replace(gaussian=x[:, :4])), r"draws\.gaussian must have the shape"),
        ((x, draws._replace(block_gaussian=x[:1])), r"draws\.block_gaussian must have the shape"),
        ((x, draws._replace(level=draws.level[:2])), r"draws\.level must be \[b\]"),
    ):
        with pytest.raises(AssertionError, match=message):
            corrupt(RELAY, *wrong)

"""What the pictures show: spectra, the hand-off check, losses by sigma, neighbours, against
closed forms and draws."""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.config import Stage, build
from relay_jax.diffusion.block_noise import block_noise, relay_noise
from relay_jax.diffusion.dct import dct_matrix
from relay_jax.diffusion.loss import draw, relay_corrupt
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.plots import neighbours as neighbours_module
from relay_jax.plots.handoff import candidates, compare, divergence
from relay_jax.plots.loss import level_draws, loss_by_sigma, shares
from relay_jax.plots.neighbours import nearest, neighbours, reduce
from relay_jax.plots.spectra import (
    block_noise_power,
    dct_power,
    frequencies,
    radial_bands,
    ratio,
    relay_noise_power,
    resolution_ratios,
    square_bands,
)
from tests.conftest import mesh_of, tiny_relay

RNG = np.random.default_rng(0)
PROCESS = RelayProcess(patch=2, block_noise_scale=0.5)


def white(*shape: int) -> np.ndarray:
    return RNG.standard_normal(shape).astype(np.float32)


def up(x: np.ndarray, patch: int) -> np.ndarray:
    return x.repeat(patch, axis=1).repeat(patch, axis=2)


def box(x: np.ndarray, patch: int) -> np.ndarray:
    n, h, w, c = x.shape
    return x.reshape(n, h // patch, patch, w // patch, patch, c).mean((2, 4))


def test_white_images_in_white_noise_have_a_flat_ratio() -> None:
    found = ratio("", 3 * white(64, 32, 32, 3), np.full((32, 32), 0.25))
    np.testing.assert_allclose(found.decibels, 10 * math.log10(9 / 0.25), atol=0.6)
    np.testing.assert_allclose(found.decibels[3:], 10 * math.log10(9 / 0.25), atol=0.2)


@pytest.mark.parametrize("patch", [1, 2, 4, 16])
def test_power_of_block_noise_is_that_of_its_draws(patch: int) -> None:
    exact = block_noise_power(16, patch)
    assert exact[0, 0] == pytest.approx(patch**2) and exact.sum() == pytest.approx(16**2)
    drawn = dct_power(np.asarray(block_noise(jnp.asarray(white(4096, 16, 16, 3)), patch)))
    np.testing.assert_allclose(drawn, exact, rtol=0.08, atol=1e-6)


def test_power_of_a_relays_noise_is_that_of_its_draws() -> None:
    drawn = dct_power(
        np.asarray(
            relay_noise(
                jnp.asarray(white(4096, 8, 8, 3)), jnp.asarray(white(4096, 8, 8, 3)), 4, 0.5
            )
        )
    )
    np.testing.assert_allclose(drawn, relay_noise_power(8, 4, 0.5), rtol=0.08)


def test_a_wave_keeps_its_frequency_and_is_patch_times_stronger_at_the_higher_resolution() -> None:
    n, p, (row, column) = 32, 4, (1, 3)
    c = dct_matrix(n)
    high = (c[row][:, None] * c[column][None, :])[None, :, :, None]

    def averaged(k: int) -> float:  # a cosine averaged over p pixels: Dirichlet's kernel
        return math.sin(math.pi * k * p / (2 * n)) / (p * math.sin(math.pi * k / (2 * n)))

    power_high, power_low = dct_power(high), dct_power(box(high, p))
    assert power_high[row, column] == pytest.approx(
        1, rel=1e-5
    ) and power_high.sum() == pytest.approx(1, rel=1e-5)
    assert power_low[row, column] == pytest.approx(
        (averaged(row) * averaged(column)) ** 2 / p**2, rel=1e-5
    )
    assert frequencies(n)[row, column] == frequencies(n // p)[row, column] == math.sqrt(10) / 2


def test_white_noise_leaves_low_frequencies_patch_squared_stronger_and_block_noise_does_not() -> (
    None
):
    c = dct_matrix(256)[:5].astype(np.float32)
    high = np.einsum("ky,nklc,lx->nyxc", c, white(8, 5, 5, 3), c, optimize=True)
    curves = resolution_ratios(box(high, 4), high, sigma=0.7, block_noise_scale=0.15)
    low, white_high, block_high, relay_high = (curve.decibels[:3] for curve in curves)
    np.testing.assert_allclose(white_high - low, 10 * math.log10(16), atol=0.02)
    np.testing.assert_allclose(block_high - low, 0, atol=0.2)
    np.testing.assert_allclose(
        relay_high - white_high, -10 * math.log10(1 + 0.15**2 * 16), atol=0.05
    )
    np.testing.assert_allclose(curves[0].frequency[:3], curves[1].frequency[:3])


def test_bands_hold_every_coefficient_once() -> None:
    for bands, outside in ((radial_bands(16), 1), (square_bands(16), 0)):
        assert bands.count.min() > 0 and bands.count.sum() == 256 - outside == np.sum(
            bands.label >= 0
        )
        np.testing.assert_allclose(
            bands.mean(bands.label.astype(float)), np.arange(len(bands.count))
        )
    assert radial_bands(16).label[0, 0] == -1
    label = square_bands(16).label
    assert np.sum(label == label[0, 0]) == 1 and label[9, 0] != label[0, 9] != label[6, 6]


def test_images_without_detail_start_exactly_as_trained() -> None:
    low = white(6, 8, 8, 3)
    for found in compare(PROCESS, low, up(low, 2), [0.2, 0.9]):
        assert abs(found.nats) < 1e-6 and found.floor > 1e-2
        np.testing.assert_allclose(found.decibels, 0, atol=1e-5)
        np.testing.assert_allclose(found.start_std, found.forward_std, rtol=1e-6)
        np.testing.assert_allclose(found.start_mean, found.forward_mean, atol=1e-6)


def test_powers_and_moments_of_the_states_are_those_of_drawn_states() -> None:
    n, sigma = 1000, 0.4
    real, low = 0.5 * white(n, 8, 8, 3) + np.float32(0.3), 0.7 * white(n, 4, 4, 3)
    found = compare(PROCESS, low, real, [sigma])[0]
    uniform = jnp.full(n, float(PROCESS.u_from_sigma(sigma)))
    forward = np.asarray(
        relay_corrupt(
            PROCESS,
            jnp.asarray(real),
            uniform,
            jnp.asarray(white(n, 8, 8, 3)),
            jnp.asarray(white(n, 8, 8, 3)),
        ).noisy
    )
    noise = relay_noise(jnp.asarray(white(n, 8, 8, 3)), jnp.asarray(white(n, 8, 8, 3)), 2, 0.5)
    start = up(low, 2) + sigma * np.asarray(noise)
    bands = radial_bands(8)
    np.testing.assert_allclose(found.forward, bands.mean(dct_power(forward)), rtol=0.05)
    np.testing.assert_allclose(found.start, bands.mean(dct_power(start)), rtol=0.05)
    for state, mean, std in (
        (forward, found.forward_mean, found.forward_std),
        (start, found.start_mean, found.start_std),
    ):
        np.testing.assert_allclose(mean, state.mean((0, 1, 2)), atol=0.01)
        np.testing.assert_allclose(std, state.std((0, 1, 2)), rtol=0.01)


def test_the_divergence_is_that_of_gaussians() -> None:
    power = 1 + RNG.random((8, 8))
    assert divergence(power, power, square_bands(8), 3) == 0
    assert divergence(2 * power, power, square_bands(8), 3) == pytest.approx(
        3 * 64 * 0.5 * (1 - math.log(2))
    )


def test_the_discrepancy_falls_with_sigma_and_ends_where_training_does() -> None:
    real = white(16, 16, 16, 3)
    sigmas = candidates(PROCESS, 0.9, 6)
    assert len(sigmas) == 7 and 0.9 in sigmas and sigmas[-1] <= PROCESS.sigma_full_blur
    nats = [found.nats for found in compare(PROCESS, box(real, 2), real, sigmas)]
    assert np.all(np.diff(nats) < 0) and nats[0] > 10 * nats[-1]
    with pytest.raises(ValueError, match="beyond"):
        compare(PROCESS, box(real, 2), real, [1.01 * PROCESS.sigma_full_blur])


@pytest.mark.parametrize("others", [30, 120])
def test_the_floor_is_what_another_set_of_the_same_kind_gives(others: int) -> None:
    pairs = [
        compare(PROCESS, white(others, 8, 8, 3), up(white(60, 8, 8, 3), 2), [0.5])[0]
        for _ in range(6)
    ]
    assert (
        0.7 < np.mean([pair.nats for pair in pairs]) / np.mean([pair.floor for pair in pairs]) < 1.4
    )


class Silent:
    """A network that always answers 0: the denoiser is c_skip x."""

    num_classes = 0

    def apply(self, variables: dict, x: jax.Array, *_: object) -> jax.Array:
        return jnp.zeros_like(x)


def silent(kind: int) -> Stage:
    return replace(build(tiny_relay())[kind], network=Silent())  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", [0, 1])
def test_the_loss_of_a_silent_network_by_sigma(kind: int) -> None:
    stage, count = silent(kind), 64  # of white images: blur changes nothing
    pixels = np.full((count, 16, 16, 3), 255, np.uint8)
    found = loss_by_sigma(stage, {}, mesh_of(1), pixels, np.zeros(count, np.int32), 96, batch=count)
    s2, d2 = found.sigma**2, 0.25
    noise = 1 + (
        stage.process.block_noise_scale**2 if isinstance(stage.process, RelayProcess) else 0
    )
    skip = d2 / (s2 + d2)
    expected = (s2 + d2) / (s2 * d2) * ((1 - skip) ** 2 + skip**2 * s2 * noise)
    np.testing.assert_allclose(found.mean, expected, rtol=0.03)
    assert found.losses.shape == (len(found.sigma), count) and np.all(
        np.diff(found.quartiles, axis=0) >= 0
    )
    assert found.expected == pytest.approx(float(found.share @ expected), rel=0.03)
    parts = loss_by_sigma(stage, {}, mesh_of(8), pixels[:20], np.zeros(20, np.int32), 96, batch=8)
    np.testing.assert_allclose(parts.losses, found.losses[:, :20], rtol=2e-4)


@pytest.mark.parametrize("process", [EdmProcess(), RelayProcess(), RelayProcess(cdf_max=1.0)])
def test_shares_are_how_often_training_draws_a_level(process: EdmProcess) -> None:
    sigma, level = level_draws(process)
    share = shares(process, sigma)
    drawn = draw(process, jax.random.key(0), (20_000, 1, 1, 1)).level
    if isinstance(process, RelayProcess):
        values = np.asarray(process.sigma_from_u(process.clamp(drawn)))
        np.testing.assert_allclose(
            process.sigma_from_u(process.clamp(jnp.float32(level))), sigma, rtol=1e-3
        )
    else:
        values = np.asarray(process.sigma_from_normal(drawn))
        np.testing.assert_allclose(process.sigma_from_normal(level), sigma, rtol=1e-5)
    nearest_level = np.abs(np.log(values)[:, None] - np.log(sigma)).argmin(axis=1)
    np.testing.assert_allclose(
        share, np.bincount(nearest_level, minlength=len(sigma)) / len(values), atol=0.01
    )
    assert share.sum() == pytest.approx(1)


def test_the_nearest_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours_module, "BLOCK", 7)
    a, b, c = white(5, 3, 2), white(40, 3, 2), white(40, 3, 2)
    index, distance = nearest(a, [b, c], 4)
    every = np.minimum(*(np.sqrt(np.square(a[:, None] - x).mean((2, 3))) for x in (b, c)))
    np.testing.assert_array_equal(index, np.argsort(every, axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(every, axis=1)[:, :4], rtol=1e-5)


class Pictures:
    """Eleven random images as a data set."""

    num_classes, class_names = 0, ()
    pixels = RNG.integers(0, 256, (11, 64, 64, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return self.pixels[position], 0


def test_copies_are_found_mirrored_ones_only_where_training_mirrors() -> None:
    source, seen = Pictures(), []
    samples = np.stack([source.pixels[7], source.pixels[2][:, ::-1]])
    for mirrored in (False, True):
        pixels, means = neighbours(
            samples,
            source,
            [9, 7, 2, 4, 0],
            2,
            mirrored=mirrored,
            each=seen.append,
            features={"means": lambda x: x.mean((1, 2))},
        )
        assert (
            pixels.positions[0, 0] == 7
            and pixels.distances[0, 0] < 1e-4 < 0.05 < pixels.distances[0, 1]
        )
        assert (pixels.positions[1, 0] == 2 and pixels.distances[1, 0] < 1e-4) == mirrored
        assert means.positions[:, 0].tolist() == [7, 2] and means.distances[:, 0].max() < 1e-4
        assert 0.05 < pixels.typical < 1 and set(pixels.positions.ravel()) <= {9, 7, 2, 4, 0}
    assert seen == [5, 5]


@pytest.mark.parametrize("resolution, size", [(8, 8), (64, 32), (96, 32), (256, 32), (100, 25)])
def test_reduction_is_a_box_average(resolution: int, size: int) -> None:
    x = white(2, resolution, resolution, 3)
    np.testing.assert_allclose(reduce(x, 32), box(x, resolution // size), atol=1e-5)

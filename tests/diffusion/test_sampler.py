"""The Heun sampler: known distributions of known data, the published updates in float64, calls."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft
from scipy.special import ndtr

from relay_jax.diffusion.blur import attenuation
from relay_jax.diffusion.dct import patch_dct, patch_idct
from relay_jax.diffusion.grid import BoundDenoiser, Samples, edm_sigmas, relay_sigmas
from relay_jax.diffusion.process import EdmProcess, NoiseFn, Purpose, RelayProcess
from relay_jax.diffusion.sampler import Heun


def relay_heun(num_steps: int, handoff_sigma: float = 0.9, **options: float) -> Heun:
    """A sampler of a relay stage with the published settings."""
    published = {"sigma_min": 0.008, "fresh_noise": 0.2}
    return Heun(num_steps=num_steps, handoff_sigma=handoff_sigma, **published | options)


IMAGENET_EDM = Heun(num_steps=256, s_churn=40, s_min=0.05, s_max=50, s_noise=1.003)
CELEBA_EDM = Heun(num_steps=120, fresh_noise=0.05)
IMAGENET_RELAY = relay_heun(200, 0.9, rho=100)
CELEBA_RELAY = relay_heun(150, 0.95)
EDM = EdmProcess()
RELAY = RelayProcess(patch=4)
PLAIN_RELAY = RelayProcess(patch=4, block_noise_scale=0.0)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def sample_edm(
    denoise: BoundDenoiser,
    latents: jax.Array,
    noise_fn: NoiseFn,
    sampler: Heun,
    states: bool = False,
) -> Samples:
    """From given starting noise of level 1."""
    start = EDM.initial_state(sampler.levels()[0], lambda step, purpose: latents)
    return sampler(denoise, start, EDM, noise_fn, states)


def sample_relay(
    denoise: BoundDenoiser,
    low_res: jax.Array,
    noise_fn: NoiseFn,
    process: RelayProcess,
    sampler: Heun,
    states: bool = False,
) -> Samples:
    """From images of the stage before."""
    sampler.check(process)
    start = process.initial_state(sampler.levels()[0], noise_fn, low_res)
    return sampler(denoise, start, process, noise_fn, states)


def silence(step: jax.Array | int, purpose: Purpose) -> jax.Array:
    """Noise that is 0, for whichever shape."""
    return jnp.zeros((1, 1, 1, 1))


def fixed_noise(
    steps: int, shape: tuple[int, ...], seed: int = 0
) -> tuple[NoiseFn, dict[Purpose, np.ndarray]]:
    """A noise_fn that reads from given fields, and the fields: purpose to [steps, b, h, w, c]."""
    fields = {purpose: normal(steps, *shape, seed=seed + purpose) for purpose in Purpose}
    return lambda step, purpose: jnp.asarray(fields[purpose])[step], fields


def impulse_noise(purposes: list[Purpose], steps: int, unit: np.ndarray) -> tuple[NoiseFn, int]:
    """Noise that is `unit` [h, w, c] in exactly one draw of each row but the first two, and the
    number of rows.

    A sampler whose denoiser is affine turns noise into images by an affine map. Row 0 gets no
    noise, row 1 is for the starting noise, each further row one draw. The squares of the
    differences to row 0 then sum to the exact variance of every state and of the result: a test
    without sampling error.
    """
    rows = 2 + len(purposes) * steps

    def noise_fn(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        return (jnp.arange(rows) == 2 + purposes.index(purpose) * steps + step)[
            :, None, None, None
        ] * unit

    return noise_fn, rows


def first_noise(rows: int, unit: np.ndarray) -> np.ndarray:
    return (np.arange(rows) == 1)[:, None, None, None] * unit


def variance(images: np.ndarray) -> np.ndarray:
    """Sum of squared responses to the impulses, over the batch axis."""
    return np.square(
        np.asarray(images, np.float64)[..., 1:, :, :, :] - images[..., :1, :, :, :]
    ).sum(axis=-4)


# Data that is a single image: whatever the noise and the options, the end is that image.

POINT = normal(1, 8, 4, 3, seed=9)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"s_churn": 5.0, "s_min": 0.05, "s_max": 50, "s_noise": 1.003},
        {"fresh_noise": 0.3},
        {"s_churn": 2.0, "fresh_noise": 0.9},
        {"num_steps": 1},
    ],
)
def test_edm_of_a_single_image_ends_at_it(options: dict[str, float]) -> None:
    sampler = Heun(**{"num_steps": 6} | options)
    noise_fn, _ = fixed_noise(6, (2, 8, 4, 3))
    got = jax.jit(
        lambda z: (
            sample_edm(
                lambda x, sigma: jnp.broadcast_to(POINT, x.shape), z, noise_fn, sampler
            ).final
        )
    )
    np.testing.assert_array_equal(got(normal(2, 8, 4, 3, seed=5)), np.repeat(POINT, 2, 0))


@pytest.mark.parametrize(
    "options", [{"fresh_noise": 0.0}, {}, {"fresh_noise": 1.0}, {"rho": 100.0}]
)
def test_relay_of_a_single_image_ends_at_it(options: dict[str, float]) -> None:
    sampler = relay_heun(14, **options)
    noise_fn, _ = fixed_noise(14, (2, 8, 4, 3))
    got = jax.jit(
        lambda low: (
            sample_relay(
                lambda x, sigma: jnp.broadcast_to(POINT, x.shape), low, noise_fn, RELAY, sampler
            ).final
        )
    )
    np.testing.assert_allclose(got(normal(2, 2, 1, 3)), np.repeat(POINT, 2, 0), atol=2e-6)


def test_edm_states_of_a_single_image_have_the_variance_of_their_level_also_under_churn() -> None:
    sampler, point = (
        Heun(num_steps=12, sigma_max=20.0, s_churn=4.0, s_min=0.05, s_max=10.0),
        0.3,
    )
    assert 0 < np.count_nonzero(sampler.churn()) < 12
    sigmas, unit = sampler.levels(), np.ones((1, 1, 1), np.float32)
    noise_fn, rows = impulse_noise([Purpose.CHURN_GAUSS], 12, unit)
    latents = point / sigmas[0] + first_noise(rows, unit)
    states = jax.jit(
        lambda z: (
            sample_edm(lambda x, _: jnp.full(x.shape, point), z, noise_fn, sampler, True).states
        )
    )
    states = np.asarray(states(latents))
    np.testing.assert_allclose(states[:, 0], point, atol=1e-5)
    np.testing.assert_allclose(variance(states)[:, 0, 0, 0], sigmas[:-1] ** 2, rtol=1e-4)


# Gaussian data, whose ideal denoiser is known.

MEAN, SPREAD = np.array([0.4, -0.3, 0.1]), np.array([0.04, 0.25, 1.0])  # per channel


def gaussian_denoiser(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[x0 | x] for x0 ~ N(MEAN, SPREAD), x = x0 + sigma n."""
    variance = jnp.square(sigma)
    return (SPREAD * x + variance * MEAN) / (SPREAD + variance)


def test_edm_ode_carries_gaussian_data_along_the_exact_flow_to_second_order() -> None:
    latents = normal(4, 1, 1, 3)
    errors = []
    for num_steps in (24, 48):
        sampler = Heun(num_steps=num_steps)
        got = jax.jit(lambda z, s=sampler: sample_edm(gaussian_denoiser, z, silence, s).final)(
            latents
        )
        want = MEAN + (80 * latents - MEAN) * np.sqrt(SPREAD / (SPREAD + 80**2))
        errors.append(np.abs(got - want).max())
    assert errors[1] < 5e-3
    assert errors[0] > 3 * errors[1]  # 4 for a method of second order, 2 for Euler's


@pytest.mark.parametrize(
    "options, purposes",
    [
        ({"s_churn": 20.0, "s_min": 0.05, "s_max": 50.0}, [Purpose.CHURN_GAUSS]),
        ({"fresh_noise": 0.05}, [Purpose.EULER_GAUSS, Purpose.HEUN_GAUSS]),
    ],
    ids=["churn", "sde"],
)
def test_stochastic_edm_keeps_mean_and_variance_of_gaussian_data(
    options: dict[str, float], purposes: list[Purpose]
) -> None:
    sampler, unit = Heun(num_steps=200, **options), np.ones((1, 1, 3), np.float32)
    noise_fn, rows = impulse_noise(purposes, 200, unit)
    final = jax.jit(lambda z: sample_edm(gaussian_denoiser, z, noise_fn, sampler).final)
    final = np.asarray(final(first_noise(rows, unit)))
    shares = np.square(final[1:] - final[:1]).sum(axis=(1, 2, 3))
    assert shares[1:].sum() > 0.1 * shares.sum()  # the added noise matters, not the start alone
    # No sampling error: what is left is discretisation (with churn it falls to a quarter per
    # doubling of the steps), and in the mean that the sampler starts at 0 and not at MEAN,
    # which weighs at most 0.4 / 80.
    np.testing.assert_allclose(variance(final)[0, 0], SPREAD, rtol=0.01)
    np.testing.assert_allclose(final[0, 0, 0], MEAN, atol=0.005)


FREQUENCY = np.add.outer(np.arange(4.0) ** 2, np.arange(4.0) ** 2)
PATCH_SPREAD = np.tile(0.4 / (1 + FREQUENCY), (1, 2))[
    None, :, :, None
]  # of every DCT coefficient, 4 x 8 pixels
PATCH_MEAN = 0.3 * normal(1, 4, 8, 1, seed=3).astype(np.float64)


def blur_at(sigma: np.ndarray, process: RelayProcess) -> np.ndarray:
    """Attenuation of every coefficient of a 4 x 8 image at a noise level, from the definitions,
    [1, 4, 8, 1]."""
    u = ndtr((math.log(sigma) + 1.2) / 1.2) / process.cdf_max
    blur_sigma = process.blur_sigma_max * math.sin(math.pi * u / 2) ** 2
    decay = np.exp(-FREQUENCY * (math.pi / 4 * blur_sigma) ** 2 / 2)
    return np.tile((1 - process.min_scale) * decay + process.min_scale, (1, 2))[None, :, :, None]


def relay_gaussian_denoiser(x: jax.Array, sigma: jax.Array) -> jax.Array:
    """E[x0 | x] for independent gaussian DCT coefficients, x = B_s x0 + sigma n."""
    u = jax.scipy.special.ndtr((jnp.log(sigma) + 1.2) / 1.2) / 0.93
    a = jnp.tile(attenuation(3 * jnp.sin(0.5 * jnp.pi * u) ** 2, 4), (1, 2))[None, :, :, None]
    gain = a * PATCH_SPREAD / (a**2 * PATCH_SPREAD + sigma**2)
    return patch_idct(PATCH_MEAN + gain * (patch_dct(x, 4) - a * PATCH_MEAN), 4)


def coefficients_after_relay(
    num_steps: int, kappa: float, start: np.ndarray, noise_fn: NoiseFn
) -> np.ndarray:
    """DCT coefficients of the relay's result from a start in DCT coefficients."""
    sampler = relay_heun(num_steps, fresh_noise=kappa)
    run = jax.jit(
        lambda u: patch_dct(
            sampler(relay_gaussian_denoiser, patch_idct(u, 4), PLAIN_RELAY, noise_fn).final, 4
        )
    )
    return np.asarray(run(start.astype(np.float32)), np.float64)


def test_deterministic_relay_carries_gaussian_data_along_the_exact_flow_in_every_coefficient() -> (
    None
):
    """x - a mean stays proportional to the deviation sqrt(a^2 S + sigma^2) of its marginal,
    down to sqrt(S)."""
    errors = []
    for num_steps in (500, 1000):
        sigma = float(relay_sigmas(num_steps, 0.008, 80, 7, 0.9)[0])
        a = blur_at(sigma, PLAIN_RELAY)
        deviation, z = np.sqrt(a**2 * PATCH_SPREAD + sigma**2), normal(3, 4, 8, 1)
        got = coefficients_after_relay(num_steps, 0.0, a * PATCH_MEAN + deviation * z, silence)
        errors.append(np.abs((got - PATCH_MEAN) / np.sqrt(PATCH_SPREAD) - z).max())
    assert errors[1] < 0.025
    # The published correction averages slopes of the unblurred estimate: first order where the
    # blur acts.
    assert errors[0] > 1.7 * errors[1]


def test_relay_with_fresh_noise_keeps_mean_and_variance_of_gaussian_data_in_every_coefficient() -> (
    None
):
    num_steps = 800
    sigmas = relay_sigmas(num_steps, 0.008, 80, 7, 0.9)
    a, ones = blur_at(float(sigmas[0]), PLAIN_RELAY), np.ones((4, 8, 1), np.float32)
    unit = np.asarray(patch_idct(ones[None], 4))[
        0
    ]  # white noise in pixels is white noise in coefficients
    noise_fn, rows = impulse_noise([Purpose.EULER_GAUSS, Purpose.HEUN_GAUSS], len(sigmas) - 1, unit)
    deviation = np.sqrt(a**2 * PATCH_SPREAD + sigmas[0] ** 2)
    final = coefficients_after_relay(
        num_steps, 0.2, a * PATCH_MEAN + deviation * first_noise(rows, ones), noise_fn
    )
    np.testing.assert_allclose(final[:1], PATCH_MEAN, atol=0.01)
    # Fresh noise of share kappa is a Langevin step of relative size kappa^2 / 2 = 0.02: errors
    # of that order may stay.
    np.testing.assert_allclose(variance(final), PATCH_SPREAD[0], rtol=0.025)


# The published updates, word for word, in float64.


def bumpy(x: np.ndarray, sigma: float, xp: object = np) -> np.ndarray:
    """A nonlinear denoiser that mixes pixels and colours and depends on sigma."""
    return xp.tanh(1.5 * x + 0.4 * xp.roll(x, 1, 1) - 0.3 * xp.roll(x, 1, 3)) / (
        1 + sigma**2
    ) + 0.1 * xp.sin(3 * sigma)


def device_bumpy(x: jax.Array, sigma: jax.Array) -> jax.Array:
    return bumpy(x, sigma, jnp)


def edm_reference(x: np.ndarray, sampler: Heun, fields: dict[Purpose, np.ndarray]) -> np.ndarray:
    """Algorithm 2 of EDM, with the SDE step of the official first stage in place of Euler's
    where asked for."""
    sigmas = edm_sigmas(sampler.num_steps, sampler.sigma_min, sampler.sigma_max, sampler.rho)
    x = sigmas[0] * x.astype(np.float64)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        gamma = 0.0
        if sampler.s_min <= sigma <= sampler.s_max:
            gamma = min(sampler.s_churn / sampler.num_steps, math.sqrt(2) - 1)
        hat = sigma + gamma * sigma
        x = x + math.sqrt(hat**2 - sigma**2) * sampler.s_noise * fields[Purpose.CHURN_GAUSS][i]
        g = sampler.fresh_noise * sigma_next
        a = math.sqrt((sigma_next**2 - g**2) / hat**2)
        slope = (x - bumpy(x, hat)) / hat
        x_next = x + (a - 1) * hat * slope + g * fields[Purpose.EULER_GAUSS][i]
        if sigma_next > 0:
            slope_next = (x_next - bumpy(x_next, sigma_next)) / sigma_next
            x_next = (
                x + (a - 1) * hat * (slope + slope_next) / 2 + g * fields[Purpose.HEUN_GAUSS][i]
            )
        x = x_next
    return x


@pytest.mark.parametrize(
    "options",
    [
        {"s_churn": 4.0, "s_min": 0.1, "s_max": 5.0, "s_noise": 1.1},
        {"fresh_noise": 0.4},
        {"s_churn": 100.0},
    ],
    ids=["churn", "sde", "most churn"],
)
def test_edm_equals_algorithm_2(options: dict[str, float]) -> None:
    sampler = Heun(num_steps=7, sigma_min=0.02, sigma_max=8.0, rho=5.0, **options)
    latents = normal(2, 3, 4, 3, seed=20)
    noise_fn, fields = fixed_noise(7, latents.shape)
    got = jax.jit(lambda z: sample_edm(device_bumpy, z, noise_fn, sampler).final)(latents)
    np.testing.assert_allclose(got, edm_reference(latents, sampler, fields), atol=2e-5)


def dct(x: np.ndarray, inverse: bool = False) -> np.ndarray:
    """DCT of every 4 x 4 patch in float64."""
    b, h, w, c = x.shape
    transform = scipy.fft.idctn if inverse else scipy.fft.dctn
    patches = np.asarray(x, np.float64).reshape(b, h // 4, 4, w // 4, 4, c)
    return transform(patches, axes=(2, 4), norm="ortho").reshape(x.shape)


def relay_reference(
    low: np.ndarray, process: RelayProcess, sampler: Heun, fields: dict[Purpose, np.ndarray]
) -> np.ndarray:
    """The official relay sampler: updates of DCT coefficients with the slope of the unblurred
    estimate."""

    def noise(moment: str, i: int) -> np.ndarray:
        block = fields[Purpose[f"{moment}_BLOCK"]][i].astype(np.float64)
        block = sum(np.roll(block, (y, x), (1, 2)) for y in range(4) for x in range(4)) / 4
        return fields[Purpose[f"{moment}_GAUSS"]][i] + process.block_noise_scale * block

    def step(u: np.ndarray, slope: np.ndarray, sigma: float, sigma_next: float) -> np.ndarray:
        gamma = math.sqrt(1 - sampler.fresh_noise**2) * sigma_next / sigma
        a, a_next = blur_at(sigma, process), blur_at(sigma_next, process) if sigma_next else 1.0
        return (a_next + gamma - gamma * a) * u + sigma * (gamma * a - a_next) * slope

    sigmas = edm_sigmas(sampler.num_steps, sampler.sigma_min, sampler.sigma_max, sampler.rho)
    sigmas = sigmas[sigmas < sampler.handoff_sigma]
    x = low.astype(np.float64).repeat(4, 1).repeat(4, 2) + sigmas[0] * noise("INITIAL", 0)
    for i, (sigma, sigma_next) in enumerate(itertools.pairwise(sigmas)):
        fresh = sampler.fresh_noise * sigma_next
        slope = dct(x - bumpy(x, sigma)) / sigma
        x_next = dct(step(dct(x), slope, sigma, sigma_next), inverse=True) + fresh * noise(
            "EULER", i
        )
        if sigma_next > 0:
            slope_next = dct(x_next - bumpy(x_next, sigma_next)) / sigma_next
            x_next = dct(step(dct(x), (slope + slope_next) / 2, sigma, sigma_next), inverse=True)
            x_next += fresh * noise("HEUN", i)
        x = x_next
    return x


@pytest.mark.parametrize(
    "process, options",
    [
        (RelayProcess(block_noise_scale=0.4), {"handoff_sigma": 0.9, "rho": 100.0}),
        (
            RelayProcess(cdf_max=1.05, blur_sigma_max=2.0, min_scale=0.05),
            {"handoff_sigma": 5.0, "fresh_noise": 0.5},
        ),
    ],
    ids=["imagenet", "celeba"],
)
def test_relay_equals_the_official_update_of_dct_coefficients(
    process: RelayProcess, options: dict[str, float]
) -> None:
    sampler, low = relay_heun(14, **options), normal(2, 1, 2, 3, seed=21)
    noise_fn, fields = fixed_noise(14, (2, 4, 8, 3))
    got = jax.jit(lambda low: sample_relay(device_bumpy, low, noise_fn, process, sampler).final)(
        low
    )
    np.testing.assert_allclose(got, relay_reference(low, process, sampler, fields), atol=1e-5)


@pytest.mark.parametrize("patch", [1, 4])
def test_a_relay_without_blur_and_blocks_is_the_edm_sampler_with_the_same_fresh_noise(
    patch: int,
) -> None:
    process = RelayProcess(patch=patch, blur_sigma_max=0.0, block_noise_scale=0.0)
    sampler, x = relay_heun(14), normal(2, 4, 8, 3)
    noise_fn, _ = fixed_noise(14, x.shape)
    relay, edm = (
        jax.jit(lambda x, p=p: sampler(device_bumpy, x, p, noise_fn).final)(x)
        for p in (process, EDM)
    )
    np.testing.assert_allclose(relay, edm, atol=5e-6)


# Starts and states.


def test_relay_starts_from_the_handoff_and_edm_from_scaled_latents_and_states_hold_every_step() -> (
    None
):
    sampler, low = (
        relay_heun(14),
        3 * normal(2, 1, 2, 3),
    )  # outside [-1, 1]: no clip
    noise_fn, _ = fixed_noise(14, (2, 4, 8, 3))
    relay = jax.jit(lambda low: sample_relay(device_bumpy, low, noise_fn, RELAY, sampler, True))(
        low
    )
    assert relay.states.shape == (len(sampler.levels()) - 1, 2, 4, 8, 3)
    np.testing.assert_allclose(
        relay.states[0], RELAY.initial_state(sampler.levels()[0], noise_fn, low), atol=1e-6
    )
    last_sigma = sampler.levels()[-2]
    np.testing.assert_allclose(
        relay.final, bumpy(np.asarray(relay.states[-1]), last_sigma), atol=1e-5
    )

    sampler = Heun(num_steps=5, s_churn=2.0)
    latents = normal(2, 4, 8, 3)
    edm = jax.jit(lambda z: sample_edm(device_bumpy, z, noise_fn, sampler, True))(latents)
    assert edm.states.shape == (5, 2, 4, 8, 3)
    np.testing.assert_allclose(edm.states[0], 80 * latents, rtol=1e-6)  # before churn
    assert (
        jax.eval_shape(lambda z: sample_edm(device_bumpy, z, noise_fn, sampler), latents).states
        is None
    )


# Calls and levels.


@pytest.mark.parametrize(
    "sampler, process, calls",
    [
        (IMAGENET_EDM, EDM, 511),
        (CELEBA_EDM, EDM, 239),
        (IMAGENET_RELAY, RELAY, 199),
        (CELEBA_RELAY, RELAY, 107),
    ],
)
def test_published_samplers_call_the_denoiser_twice_a_step_but_once_in_the_last(
    sampler: Heun, process: EdmProcess, calls: int
) -> None:
    seen: list[float] = []

    def watched(x: jax.Array, sigma: jax.Array) -> jax.Array:
        jax.debug.callback(lambda s: seen.append(float(s)), sigma, ordered=True)
        return x / (1 + sigma)

    image = jnp.zeros((1, process.patch, process.patch, 1))
    jax.block_until_ready(sampler(watched, image, process, silence).final)
    jax.effects_barrier()
    sigmas = sampler.levels()
    hat = sigmas[:-1] * (1 + sampler.churn())
    # Each level after churn, then the next; never 0.
    want = np.ravel(np.column_stack([hat, sigmas[1:]]))[:-1]
    assert len(seen) == calls == 2 * (len(sigmas) - 1) - 1
    np.testing.assert_allclose(seen, want, rtol=1e-6)
    # What guidance counts its calls by, in another order.
    np.testing.assert_allclose(np.sort(sampler.call_sigmas()), np.sort(want))


def test_churn_acts_between_its_ends_and_is_capped() -> None:
    sigma, churn = IMAGENET_EDM.levels()[:-1], IMAGENET_EDM.churn()
    np.testing.assert_array_equal(churn, np.where((sigma >= 0.05) & (sigma <= 50), 40 / 256, 0))
    assert churn[0] == churn[-1] == 0 < churn[128]
    np.testing.assert_allclose(Heun(num_steps=4, s_churn=40).churn(), math.sqrt(2) - 1)
    np.testing.assert_array_equal(CELEBA_EDM.churn(), 0)


def test_steps_are_the_factors_of_the_update() -> None:
    sampler = Heun(
        num_steps=3,
        sigma_min=0.25,
        sigma_max=2.25,
        rho=2.0,
        fresh_noise=0.6,
        s_churn=0.75,
        s_max=2.0,
        s_noise=1.1,
    )
    sigmas, hat = np.array([2.25, 1.0, 0.25, 0.0]), np.array([2.25, 1.25, 0.3125])
    np.testing.assert_allclose(sampler.levels(), sigmas)
    steps = sampler.steps(RelayProcess(cdf_max=1.05, blur_sigma_max=2.0))
    np.testing.assert_allclose(steps.sigma, hat)
    np.testing.assert_allclose(steps.sigma_next, sigmas[1:])
    np.testing.assert_allclose(steps.gamma, 0.8 * sigmas[1:] / hat)
    np.testing.assert_allclose(steps.ratio, [2.25, 5.0, 0.0])
    np.testing.assert_allclose(steps.churn_amount, 1.1 * np.sqrt(hat**2 - sigmas[:-1] ** 2))
    np.testing.assert_allclose(steps.noise_amount, 0.6 * sigmas[1:])
    for blur_sigma, at in [(steps.blur_sigma, hat), (steps.blur_sigma_next, sigmas[1:3])]:
        want = 2 * np.sin(np.pi / 2 * ndtr((np.log(at) + 1.2) / 1.2) / 1.05) ** 2
        np.testing.assert_allclose(blur_sigma[: len(at)], want)
    assert steps.blur_sigma_next[-1] == 0
    assert not np.any(sampler.steps(EDM).blur_sigma)

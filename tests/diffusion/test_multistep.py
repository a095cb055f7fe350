"""The multistep sampler: its weights from the definition, its order, known laws, calls; and the
hand-off of noise."""

import itertools
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.fft

from relay_jax.diffusion.block_noise import block_noise
from relay_jax.diffusion.dct import patch_dct, patch_idct
from relay_jax.diffusion.grid import BoundDenoiser
from relay_jax.diffusion.multistep import Multistep, exact_weights, rate_of_share
from relay_jax.diffusion.process import EdmProcess, NoiseFn, Purpose, RelayProcess
from relay_jax.diffusion.sampler import Heun

EDM = EdmProcess()
RELAY = RelayProcess()  # ImageNet's
TOP = 0.8691227  # ImageNet's first relay level
RATES = (0.0, 0.43, 1.0)


@dataclass(frozen=True, kw_only=True)
class OnLevels(Multistep):
    """On levels of a test's own."""

    num_steps: int = 1
    sigmas: tuple[float, ...] = (1.0, 0.0)

    def levels(self) -> np.ndarray:
        return np.asarray(self.sigmas, np.float64)


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def recorded(steps: int, shape: tuple[int, ...]) -> tuple[NoiseFn, dict[Purpose, np.ndarray]]:
    """A noise_fn that reads given fields, [steps, b, h, w, c] by purpose."""
    purposes = (Purpose.EULER_GAUSS, Purpose.EULER_BLOCK)
    table = {purpose: normal(steps, *shape, seed=purpose) for purpose in purposes}
    return lambda step, purpose: jnp.asarray(table[purpose])[step], table


def silence(step: jax.Array | int, purpose: Purpose) -> jax.Array:
    raise AssertionError("a deterministic sampler drew noise")


def dct(x: np.ndarray, patch: int, inverse: bool = False) -> np.ndarray:
    """DCT of every patch of [b, h, w, c] in float64."""
    b, h, w, c = x.shape
    transform = scipy.fft.idctn if inverse else scipy.fft.dctn
    patches = np.asarray(x, np.float64).reshape(b, h // patch, patch, w // patch, patch, c)
    return transform(patches, axes=(2, 4), norm="ortho").reshape(x.shape)


def scaled(x: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Every patch-DCT coefficient of x [b, h, w, c] times factors [p, p]."""
    patch = len(factors)
    tiles = (x.shape[1] // patch, x.shape[2] // patch)
    return dct(dct(x, patch) * np.tile(factors, tiles)[..., None], patch, inverse=True)


def factors_at(process: EdmProcess, sigma: float) -> np.ndarray:
    """b_k at a level, float64 [p, p]."""
    return process.attenuation(process.blur_sigma_at(np.asarray(sigma)))


def mean_only(patch: int) -> np.ndarray:
    """The factors of the patch mean."""
    return np.pad([[1.0]], (0, patch - 1))


# The weights


def by_definition(
    process: EdmProcess, nodes: list[float], sigma: float, after: float, eta: float
) -> np.ndarray:
    """sigma'^(1+eta) INT l_j d[b tau^-(1+eta)], as a sum over small changes of the measure."""
    w = np.linspace(-math.log(sigma), -math.log(after), 40_001)
    measure = process.attenuation(process.blur_sigma_at(np.exp(-w)))
    measure = measure * (after * np.exp(w))[:, None, None] ** (1 + eta)
    middle, places = (w[1:] + w[:-1]) / 2, -np.log(nodes)
    rows = []
    for j, place in enumerate(places):
        others = np.delete(places, j)
        lagrange = np.prod((middle[:, None] - others) / (place - others), axis=1)
        rows.append(np.tensordot(lagrange, np.diff(measure, axis=0), 1))
    return np.stack(rows)


@pytest.mark.parametrize("eta", RATES)
@pytest.mark.parametrize("nodes", [[0.5], [0.5, 0.8], [0.3, 0.5], [0.3, 0.5, 0.8]])
def test_exact_weights_are_the_integral_of_the_exact_process(
    nodes: list[float], eta: float
) -> None:
    for process in (RELAY, RelayProcess(patch=2, cdf_max=1.05, blur_sigma_max=2.0), EDM):
        weights = exact_weights(process, nodes, 0.5, 0.3, eta)
        np.testing.assert_allclose(weights, by_definition(process, nodes, 0.5, 0.3, eta), atol=2e-8)
        gamma = (0.3 / 0.5) ** (1 + eta)
        change = factors_at(process, 0.3) - gamma * factors_at(process, 0.5)
        np.testing.assert_allclose(weights.sum(0), change, atol=1e-13)


def test_in_the_first_step_the_blur_now_is_the_patch_mean() -> None:
    weights = exact_weights(RELAY, [0.5], 0.5, 0.3, 0.0, mean_at=0.5)
    np.testing.assert_allclose(weights[0], factors_at(RELAY, 0.3) - 0.6 * mean_only(4), atol=1e-13)
    np.testing.assert_array_equal(
        exact_weights(RELAY, [0.5], 0.5, 0.3, 0.0, mean_at=0.9),
        exact_weights(RELAY, [0.5], 0.5, 0.3, 0.0),
    )


def bumpy(x: np.ndarray, sigma: float, xp: object = np) -> np.ndarray:
    """A nonlinear denoiser that mixes pixels and colours and depends on sigma."""
    mixed = xp.tanh(1.5 * x + 0.4 * xp.roll(x, 1, 1) - 0.3 * xp.roll(x, 1, 3))
    return mixed / (1 + sigma**2) + 0.1 * xp.sin(3 * sigma)


def device_bumpy(x: jax.Array, sigma: jax.Array) -> jax.Array:
    return bumpy(x, sigma, jnp)


@pytest.mark.parametrize("eta", RATES)
@pytest.mark.parametrize("process", [EDM, RelayProcess(patch=1, block_noise_scale=0.0)])
def test_with_patches_of_one_pixel_it_is_dpm_solver_plus_plus_2m(
    process: EdmProcess, eta: float
) -> None:
    sigmas = np.array([8.0, 3.0, 1.7, 0.5, 0.06, 0.02])
    start = 8 * normal(2, 4, 6, 3, seed=20)
    noise_fn, table = recorded(6, start.shape)
    sampler = OnLevels(sigmas=(*sigmas, 0.0), fresh_noise_rate=eta)
    final = jax.jit(lambda x: sampler(device_bumpy, x, process, noise_fn).final)(start)
    # With alpha = 1 and lambda = -ln sigma, arXiv 2211.01095, and the SDE form of its appendix.
    x, steps = start.astype(np.float64), -np.diff(np.log(sigmas))
    images = [bumpy(x, sigmas[0])]
    for i, h in enumerate(steps):
        k, noise = 1 - math.exp(-h * (1 + eta)), table[Purpose.EULER_GAUSS][i]
        r = steps[i - 1] / h if i else math.inf
        x = (1 - k) * x + k * (1 + 1 / (2 * r)) * images[-1]
        if i:
            x = x - k / (2 * r) * images[-2]
        x = x + sigmas[i + 1] * math.sqrt(1 - math.exp(-2 * eta * h)) * noise
        images.append(bumpy(x, sigmas[i + 1]))
    np.testing.assert_allclose(final, images[-1], atol=2e-5)


# The loop, in float64 and on the device


def walk(
    sampler: Multistep,
    process: EdmProcess,
    x: np.ndarray,
    denoise: BoundDenoiser,
    noise: np.ndarray | None = None,
    exact: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Equations (2) to (5) in float64 from x [b, h, w, c]: state and denoised image at the last
    level above 0.

    noise: unit noise of each step. exact: the step of (3) in place of (2). With the corrector the
    last state is corrected, too.
    """
    sigmas = sampler.levels()[sampler.levels() > 0]
    eta = sampler.fresh_noise_rate
    images = [denoise(x, sigmas[0])]  # newest first
    for i, (sigma, after) in enumerate(itertools.pairwise(sigmas)):
        ratio = after / sigma
        mean_at = sigma if sampler.exact_first_blur and i == 0 else None
        kept = x * ratio ** (1 + eta)
        if noise is not None:
            kept = kept + after * math.sqrt(1 - ratio ** (2 * eta)) * noise[i]
        nodes = [sigma, *sigmas[max(i - 1, 0) : i]]
        if exact or sampler.corrector:
            weights = exact_weights(process, nodes, sigma, after, eta, mean_at)
            x = kept + sum(map(scaled, images, weights))
        else:
            tilde = images[0]
            if i:
                share = math.log(ratio) / (2 * math.log(sigma / sigmas[i - 1]))
                tilde = tilde + share * (images[0] - images[1])
            now = factors_at(process, sigma)
            now = mean_only(len(now)) if mean_at else now
            x = kept + scaled(tilde, factors_at(process, after) - ratio ** (1 + eta) * now)
        images = [denoise(x, after), *images]
        if sampler.corrector:
            weights = exact_weights(process, [after, *nodes], sigma, after, eta, mean_at)
            x = kept + sum(map(scaled, images, weights))
    return x, images[0]


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize(
    "process, settings",
    [
        (RELAY, {"exact_first_blur": True}),
        (RelayProcess(block_noise_scale=0.4, cdf_max=1.05), {"fresh_noise_rate": 0.43}),
        (RelayProcess(patch=2), {"fresh_noise_rate": 1.0, "exact_first_blur": True}),
        (EDM, {"fresh_noise_rate": 0.43, "handoff_sigma": math.inf, "sigma_max": 20.0}),
    ],
    ids=["relay", "block noise", "patch 2", "edm"],
)
def test_the_compiled_loop_is_the_formulas(
    process: EdmProcess, settings: dict[str, float], corrector: bool
) -> None:
    base = {"num_steps": 7, "sigma_min": 0.01, "handoff_sigma": 0.8, "corrector": corrector}
    sampler = Multistep(**base | settings)
    sampler.check(process)
    start = sampler.levels()[0] * normal(2, 4, 8, 3, seed=5)
    noise_fn, table = recorded(7, start.shape)
    white, block = (table[p].astype(np.float64) for p in (Purpose.EULER_GAUSS, Purpose.EULER_BLOCK))
    noise = white
    if process.has_block_noise:
        p = process.patch
        field = sum(np.roll(block, (y, x), (2, 3)) for y in range(p) for x in range(p)) / p
        noise = white + process.block_noise_scale * field
    run = jax.jit(lambda x: sampler(device_bumpy, x, process, noise_fn, True))
    final, states = run(start.astype(np.float32))
    _, expected = walk(sampler, process, start, bumpy, noise)
    np.testing.assert_allclose(final, expected, atol=2e-5)
    assert states.shape == (7, *start.shape)
    # A state is the point where the denoiser was called: the last one gives the image.
    np.testing.assert_allclose(states[0], start, atol=1e-6)
    np.testing.assert_array_equal(final, jax.jit(device_bumpy)(states[-1], sampler.levels()[-2]))


# Order of convergence


FREQUENCY = np.add.outer(*[(np.pi * np.arange(4) / 4) ** 2] * 2)
SPREAD = 2 / (1 + 40 * FREQUENCY)  # variance of each coefficient of the data
LARGE = 1e4  # rho: levels even in ln sigma


def gain(sigma: float) -> np.ndarray:
    """The ideal denoiser of independent gaussian coefficients, per coefficient [4, 4]."""
    b = factors_at(RELAY, sigma)
    return b * SPREAD / (b**2 * SPREAD + sigma**2)


def error_at_the_end(state: np.ndarray, start: np.ndarray) -> float:
    """Largest relative error of a coefficient at level 0.02, carried from TOP."""
    deviation = [
        np.sqrt(factors_at(RELAY, sigma) ** 2 * SPREAD + sigma**2) for sigma in (TOP, 0.02)
    ]
    exact = dct(start, 4)[0, ..., 0] * deviation[1] / deviation[0]
    return float(np.abs(dct(state, 4)[0, ..., 0] / exact - 1).max())


@pytest.mark.parametrize(
    "corrector, exact, order, error",
    [(False, False, 2, 1e-4), (False, True, 2, 2e-4), (True, True, 3, 3e-5)],
    ids=["extrapolated", "exact weights", "corrector"],
)
def test_order_of_convergence(corrector: bool, exact: bool, order: int, error: float) -> None:
    start, errors = np.ones((1, 4, 4, 1)) + normal(1, 4, 4, 1), []
    for steps in (160, 480):
        sampler = Multistep(
            num_steps=steps, sigma_min=0.02, handoff_sigma=TOP, rho=LARGE, corrector=corrector
        )
        denoise = lambda x, sigma: scaled(x, gain(sigma))  # noqa: E731
        state, _ = walk(sampler, RELAY, start, denoise, exact=exact)
        errors.append(error_at_the_end(state, start))
    assert errors[0] < error
    assert math.log(errors[0] / errors[1], 3) == pytest.approx(order, abs=0.1)


@pytest.mark.parametrize("correction, order", [("official", 1), ("second_order", 2)])
def test_heun_is_of_second_order_without_the_official_third_term(
    correction: str, order: int
) -> None:
    start, errors = np.ones((1, 4, 4, 1)) + normal(1, 4, 4, 1), []
    for steps in (20, 80):
        sampler = Heun(
            num_steps=steps,
            sigma_min=0.02,
            sigma_max=TOP,
            rho=LARGE,
            handoff_sigma=1.0,
            correction=correction,
        )
        gains = jnp.asarray([gain(sigma) for sigma in sampler.levels()[:-1]], jnp.float32)
        levels = jnp.asarray(sampler.levels()[:-1], jnp.float32)

        def denoise(
            x: jax.Array, sigma: jax.Array, levels: jax.Array = levels, gains: jax.Array = gains
        ) -> jax.Array:
            factors = gains[jnp.argmin(jnp.abs(levels - sigma))]
            return patch_idct(factors[..., None] * patch_dct(x, 4), 4)

        run = jax.jit(lambda x, s=sampler, d=denoise: s(d, x, RELAY, silence, True).states)
        errors.append(error_at_the_end(run(start.astype(np.float32))[-1], start))
    assert math.log(errors[0] / errors[1], 4) == pytest.approx(order, abs=0.25)


# Known laws


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("exact_first_blur", [False, True])
def test_a_single_image_is_exact_on_any_grid_and_the_first_blur_says_how_the_start_was_made(
    corrector: bool, exact_first_blur: bool
) -> None:
    sampler = OnLevels(
        sigmas=(0.9, 0.7, 0.69, 0.2, 0.05, 0.0),
        corrector=corrector,
        exact_first_blur=exact_first_blur,
    )
    image, noise = normal(1, 8, 8, 3, seed=1), normal(2, 8, 8, 3, seed=2)
    means = np.asarray(RELAY.mean_blur(jnp.asarray(image)), np.float64)
    blurred = [scaled(image, factors_at(RELAY, sigma)) for sigma in sampler.levels()[:-1]]
    run = jax.jit(
        lambda x: sampler(
            lambda x, sigma: jnp.broadcast_to(image, x.shape), x, RELAY, silence, True
        )
    )
    for start in (means, blurred[0]):
        final, states = run((start + 0.9 * noise).astype(np.float32))
        np.testing.assert_array_equal(final, np.repeat(image, 2, 0))
        # What the blur of the first step takes away, if it is not what the start holds.
        bias = start - (means if exact_first_blur else blurred[0])
        for i, sigma in list(enumerate(sampler.levels()[:-1]))[1:]:
            expected = blurred[i] + sigma * noise + sigma / 0.9 * bias
            np.testing.assert_allclose(states[i], expected, atol=3e-6)
    assert np.abs(means - blurred[0]).max() > 0.05


PIXELS = 16
SMALL = RelayProcess(patch=2, block_noise_scale=0.4)


def as_matrix(images: np.ndarray) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), PIXELS)


def pixels() -> np.ndarray:
    """Every image of 4 x 4 pixels with a single one of them, [16, 4, 4, 1]."""
    return np.eye(PIXELS).reshape(PIXELS, 4, 4, 1)


def gaussian_data() -> np.ndarray:
    """Covariance of smooth images of 4 x 4 pixels."""
    y, x = np.divmod(np.arange(PIXELS), 4)
    distance = np.hypot(np.subtract.outer(y, y), np.subtract.outer(x, x))
    return 0.3 * np.exp(-distance / 2)


def noise_covariance() -> np.ndarray:
    field = as_matrix(block_noise(jnp.asarray(pixels(), jnp.float32), 2))
    return np.eye(PIXELS) + 0.4**2 * field.T @ field


def wrong_laws(
    sampler: Multistep | Heun, process: EdmProcess = SMALL, low_res: bool = False
) -> tuple[float, float]:
    """Share of the covariance of the last state that is wrong, and the share that fresh noise
    has in it, for gaussian data.

    Without sampling error: the sampler is linear, so impulses give the exact covariance.
    process: with the noise of SMALL. low_res: from the hand-off of the patch means of the data, and
    not from the law of the process at the first level.
    """
    sigmas, data, unit = sampler.levels()[:-1], gaussian_data(), noise_covariance()
    laws, denoisers = [], []
    for sigma in sigmas:
        blur = as_matrix(scaled(pixels(), factors_at(process, sigma)))
        laws.append(blur @ data @ blur.T + sigma**2 * unit)
        denoisers.append(data @ blur.T @ np.linalg.inv(laws[-1]))
    table = jnp.asarray(np.stack(denoisers), jnp.float32)
    levels, rows = jnp.asarray(sigmas, jnp.float32), PIXELS * (2 * len(sigmas) - 1)

    def denoise(x: jax.Array, sigma: jax.Array) -> jax.Array:
        matrix = table[jnp.argmin(jnp.abs(levels - sigma))]
        flat = jnp.matmul(x.reshape(len(x), PIXELS), matrix.T, precision="highest")
        return flat.reshape(x.shape)

    def noise_fn(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        place = PIXELS * (1 + 2 * step + (purpose == Purpose.EULER_BLOCK)) + np.arange(PIXELS)
        return (jnp.arange(rows)[:, None] == place).astype(jnp.float32).reshape(rows, 4, 4, 1)

    start = np.zeros((rows, PIXELS), np.float32)
    first = laws[0]
    if low_res:
        means = as_matrix(scaled(pixels(), mean_only(process.patch)))
        first = means @ data @ means.T + sigmas[0] ** 2 * unit
    start[:PIXELS] = np.linalg.cholesky(first).T
    states = jax.jit(lambda x: sampler(denoise, x, process, noise_fn, True).states)(
        start.reshape(rows, 4, 4, 1)
    )
    last = as_matrix(states[-1])
    wrong = np.linalg.norm(last.T @ last - laws[-1]) / np.linalg.norm(laws[-1])
    return float(wrong), float(np.square(last[PIXELS:]).sum() / np.square(last).sum())


@pytest.mark.parametrize("corrector", [False, True])
@pytest.mark.parametrize("eta", [0.0, 0.6])
def test_the_law_of_gaussian_data_with_block_noise_is_kept_to_second_order(
    eta: float, corrector: bool
) -> None:
    settings = {"sigma_min": 0.02, "handoff_sigma": 0.8, "fresh_noise_rate": eta}
    coarse, fine = (
        wrong_laws(Multistep(num_steps=steps, corrector=corrector, **settings))
        for steps in (28, 112)
    )
    assert fine[0] < (1e-4 if corrector else 4e-4) and coarse[0] > 8 * fine[0]
    assert (fine[1] > 0.02) == (eta > 0), "noise that is added must matter"


# The relay from noise


def handoff_covariance(process: RelayProcess, sigma: float, from_noise: bool) -> np.ndarray:
    """Covariance of the noise at the hand-off on 8 x 8 pixels, from impulses."""
    pixels, side = 64, 8 // process.patch
    low = side**2 if from_noise else 0
    fields = {}
    for n, purpose in enumerate((Purpose.INITIAL_GAUSS, Purpose.INITIAL_BLOCK)):
        field = np.zeros((low + 2 * pixels, pixels), np.float32)
        field[low + n * pixels :][:pixels] = np.eye(pixels)
        fields[purpose] = jnp.asarray(field.reshape(-1, 8, 8, 1))
    state = np.zeros((low + 2 * pixels, side**2), np.float32)
    state[:low] = sigma / process.patch * np.eye(low, side**2)
    start = process.initial_state_from_noise if from_noise else process.initial_state
    response = start(
        sigma, lambda step, p: fields[p], jnp.asarray(state.reshape(-1, side, side, 1))
    )
    response = np.asarray(response, np.float64).reshape(-1, pixels)
    return response.T @ response


@pytest.mark.parametrize("patch, block", [(4, 0.15), (2, 0.4), (4, 0.0), (1, 0.3)])
def test_a_noisy_state_is_handed_over_with_the_law_of_the_official_start(
    patch: int, block: float
) -> None:
    process = RelayProcess(patch=patch, block_noise_scale=block)
    official = handoff_covariance(process, TOP, from_noise=False)
    noisy = handoff_covariance(process, TOP, from_noise=True)
    np.testing.assert_allclose(noisy, official, atol=1e-6)
    # In numbers that a reader knows: the variance of each coefficient of the whole image.
    basis = scipy.fft.dctn(np.eye(64).reshape(64, 8, 8), axes=(1, 2), norm="ortho").reshape(64, 64)
    variances = np.diag(basis.T @ noisy @ basis).reshape(8, 8)
    np.testing.assert_allclose(variances, TOP**2 * process.noise_power(8), rtol=1e-5)


def test_an_image_is_handed_over_as_it_is() -> None:
    low, zero = normal(2, 2, 2, 3), jnp.zeros((2, 8, 8, 3))
    start = RELAY.initial_state_from_noise(0.9, lambda step, purpose: zero, jnp.asarray(low))
    np.testing.assert_array_equal(start, low.repeat(4, 1).repeat(4, 2))


# Grids, calls, refusals


def test_all_levels_lie_between_the_handoff_and_the_least_one() -> None:
    sampler = Multistep(num_steps=13, sigma_min=0.008, handoff_sigma=0.9)
    levels = sampler.levels()
    assert len(levels) == 14 and levels[-1] == 0
    np.testing.assert_allclose(levels[[0, -2]], [0.9, 0.008])
    np.testing.assert_allclose(np.diff(levels[:-1] ** (1 / 7), 2), 0, atol=1e-12)
    published = Multistep(
        num_steps=200, sigma_min=0.008, rho=100.0, handoff_sigma=0.9, direct=False
    )
    heun = Heun(num_steps=200, sigma_min=0.008, rho=100.0, handoff_sigma=0.9)
    np.testing.assert_array_equal(published.levels(), heun.levels())
    stopped = Multistep(num_steps=12).until(0.225).levels()
    assert len(stopped) == 13 and stopped[-1] == 0.225
    assert stopped[0] == pytest.approx(80) and np.all(np.diff(stopped) < 0)
    np.testing.assert_allclose(np.diff(stopped ** (1 / 7), 2), 0, atol=1e-12)


@pytest.mark.parametrize(
    "sampler, calls",
    [
        (Multistep(num_steps=18), 18),
        (Multistep(num_steps=18, corrector=True, fresh_noise_rate=0.5), 18),
        (Multistep(num_steps=12, corrector=True).until(0.2), 12),
        (Multistep(num_steps=1), 1),
        (Heun(num_steps=9, s_churn=3.0).until(0.2), 18),
    ],
)
def test_calls_are_counted_by_the_denoiser(sampler: Multistep | Heun, calls: int) -> None:
    seen: list[float] = []

    def watched(x: jax.Array, sigma: jax.Array) -> jax.Array:
        jax.debug.callback(lambda s: seen.append(float(s)), sigma, ordered=True)
        return x / (1 + sigma)

    zeros = jnp.zeros((1, 2, 2, 1))
    jax.block_until_ready(sampler(watched, zeros, EDM, lambda *_: zeros).final)
    jax.effects_barrier()
    assert len(seen) == len(sampler.call_sigmas()) == calls
    np.testing.assert_allclose(np.sort(seen), np.sort(sampler.call_sigmas()), rtol=1e-6)


@pytest.mark.parametrize("corrector", [False, True])
def test_a_sampler_that_stops_gives_the_state_of_its_last_level(corrector: bool) -> None:
    point = normal(1, 2, 2, 3, seed=4)
    sampler = Multistep(num_steps=6, corrector=corrector).until(0.3)
    noise = normal(1, 2, 2, 3, seed=6)
    run = jax.jit(
        lambda x: sampler(lambda x, s: jnp.broadcast_to(point, x.shape), x, EDM, silence).final
    )
    np.testing.assert_allclose(run(point + 80 * noise), point + 0.3 * noise, atol=1e-5)


def test_the_rate_of_a_share_gives_it_back() -> None:
    for share, sigma, after in ((0.2, 0.9, 0.82), (0.9, 1.0, 0.1)):
        rate = rate_of_share(share, sigma, after)
        assert math.sqrt(1 - (after / sigma) ** (2 * rate)) == pytest.approx(share)
    # ImageNet's share of 0.2 with its 100 levels.
    sigmas = Heun(num_steps=200, sigma_min=0.008, rho=100.0, handoff_sigma=0.9).levels()
    rates = [rate_of_share(0.2, *pair) for pair in itertools.pairwise(sigmas[:-1])]
    assert np.mean(rates) == pytest.approx(0.431, abs=2e-3)


class Milder(RelayProcess):
    """A process with a blur of its own, and no factors of it."""

    def blur(self, x: jax.Array, blur_sigma: jax.Array) -> jax.Array:
        return super().blur(x, 0.5 * blur_sigma)


def test_a_blur_without_factors_is_sampled_but_not_with_the_corrector() -> None:
    process, settings = Milder(), {"num_steps": 5, "sigma_min": 0.01, "handoff_sigma": 0.9}
    sampler = Multistep(**settings, exact_first_blur=True)
    sampler.check(process)
    point = normal(1, 4, 4, 1)
    means = np.asarray(process.mean_blur(jnp.asarray(point)))
    run = jax.jit(
        lambda x: (
            sampler(lambda x, s: jnp.broadcast_to(point, x.shape), x, process, silence, True).states
        )
    )
    blur_sigma = jnp.float32(process.blur_sigma_at(sampler.levels()[3]))
    np.testing.assert_allclose(
        run(means)[3], process.blur(jnp.asarray(point), blur_sigma), atol=1e-6
    )
    with pytest.raises(ValueError, match=r"corrector needs the factors .* Milder"):
        Multistep(**settings, corrector=True).check(process)
    Multistep(**settings, corrector=True).check(RELAY)
    assert process.continues_noise and not EDM.continues_noise


@pytest.mark.parametrize(
    "settings, process, message",
    [
        ({"handoff_sigma": 2.0}, RELAY, "handoff_sigma 2.0 lies above"),
        ({}, RELAY, "handoff_sigma must be positive and finite"),
        ({"handoff_sigma": 0.9}, EDM, "handoff_sigma is for a stage that continues"),
        ({"exact_first_blur": True}, EDM, "exact_first_blur is for a stage that continues"),
        ({"handoff_sigma": 0.9, "stop_sigma": 0.1}, RELAY, "stop_sigma is for a stage that starts"),
        ({"fresh_noise_rate": -0.1}, EDM, "fresh_noise_rate must be 0 or positive, not -0.1"),
        ({"num_steps": 0}, EDM, "num_steps"),
    ],
)
def test_what_cannot_be_is_refused_by_name(
    settings: dict[str, float], process: EdmProcess, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        Multistep(**{"num_steps": 4} | settings).check(process)


def test_the_factors_are_those_of_the_blur_and_the_mean_that_of_a_patch() -> None:
    x = normal(2, 8, 12, 3)
    for process in (RELAY, RelayProcess(patch=1), RelayProcess(patch=2, min_scale=0.1), EDM):
        blur_sigma = np.asarray(1.3)
        factors = process.attenuation(blur_sigma)
        tiled = np.tile(factors, np.array([8, 12]) // len(factors))[..., None]
        blurred = process.inverse(tiled * process.transform(jnp.asarray(x)))
        np.testing.assert_allclose(blurred, process.blur(x, jnp.float32(1.3)), atol=2e-6)
        means = scaled(x, mean_only(len(factors)))
        np.testing.assert_allclose(process.mean_blur(jnp.asarray(x)), means, atol=1e-6)

"""Both samplers, as one stochastic Heun loop (SPEC section 5; EDM algorithm 2; RDM algorithm 1).

From the state x at level sigma to the next level sigma', with D(x) the denoised image:
(1)  x_next = gamma (x - B D) + B' D + kappa sigma' n,        gamma = sqrt(1 - kappa^2) sigma' / sigma
     B = B_{s(sigma)}, B' = B_{s(sigma')} (relay; identity for EDM),   kappa = fresh_noise (relay), sde_scale (EDM)
     n = g + block_noise_scale block_noise(g')
     Keep the noise estimate, scaled; re-blur the denoised image less; add a share of fresh noise.
(2)  correction: (1) again from x, with the mean of the slopes d = (x - D)/sigma at x and at the
prediction
     (which includes its own noise), and with new noise. In terms of D:  D <- (D + x - sigma d') / 2
(3)  churn (EDM only), at the start of a step:  x <- x + sigma sqrt(c (2 + c)) S_noise g,  sigma
<- (1 + c) sigma

EDM's update is (1) without blur: x + (sigma' - sigma) d = gamma x + (1 - gamma) D. At sigma' =
0 both give D, so the last step needs no case of its own and no correction: N levels cost 2N - 1
calls of the denoiser.

The loop runs over these 2N - 1 calls, not over steps: the network then stands once in the
compiled program
instead of three times. Levels and factors are float64 tables made on the host, cast to float32
once.

Noise comes from `noise_fn(step, purpose)`, step traced, purpose one of `NOISE_PURPOSES`: the
caller decides what it depends on (here: on the key of each image), so a run does not depend on
the batch or on devices.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.block_noise import relay_noise
from relay_jax.diffusion.blur import blur
from relay_jax.diffusion.process import (
    EdmProcess,
    RelayProcess,
    check_handoff,
    edm_sigmas,
    relay_sigmas,
)

NoiseFn = Callable[[jax.Array | int, str], jax.Array]
NOISE_PURPOSES = (
    "latents",
    "initial_gauss",
    "initial_block",
    "churn_gauss",
    "euler_gauss",
    "euler_block",
    "heun_gauss",
    "heun_block",
)


@dataclass(frozen=True, kw_only=True)
class EdmSampler:
    """Settings of the first stage's sampler (SPEC section 5.1). `sde_scale` is CelebA-HQ's
    share of fresh noise."""

    num_steps: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    sde_scale: float = 0.0

    def __post_init__(self) -> None:
        if self.s_churn < 0 or self.s_noise < 0:
            raise ValueError(
                f"s_churn and s_noise must not be negative, not {self.s_churn} and {self.s_noise}"
            )
        if not 0 <= self.sde_scale < 1:
            raise ValueError(f"sde_scale must lie in [0, 1), not {self.sde_scale}")
        self.sigmas()

    def sigmas(self) -> np.ndarray:
        """float64 [steps + 1] with the closing 0."""
        return edm_sigmas(self.num_steps, self.sigma_min, self.sigma_max, self.rho)

    def churn(self) -> np.ndarray:
        """The factor c of equation (3) for each step, float64 [steps]."""
        sigma = self.sigmas()[:-1]
        inside = (self.s_min <= sigma) & (sigma <= self.s_max)
        return np.where(inside, min(self.s_churn / self.num_steps, math.sqrt(2) - 1), 0.0)


@dataclass(frozen=True, kw_only=True)
class RelaySampler:
    """Settings of a relay stage's sampler (SPEC section 5.3): of the grid, only levels below
    `handoff_sigma`."""

    num_steps: int
    handoff_sigma: float
    sigma_min: float = 0.008
    sigma_max: float = 80.0
    rho: float = 7.0
    fresh_noise: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.fresh_noise <= 1:
            raise ValueError(f"fresh_noise must lie in [0, 1], not {self.fresh_noise}")
        self.sigmas()

    def sigmas(self) -> np.ndarray:
        """float64 [kept steps + 1] with the closing 0."""
        return relay_sigmas(
            self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.handoff_sigma
        )


class Samples(NamedTuple):
    """Result of a sampler: `final` images [b, h, w, c], not clipped, and on request `states`
    [steps, b, h, w, c], the state at the start of every step before churn."""

    final: jax.Array
    states: jax.Array | None


class Levels(NamedTuple):
    """What the loop needs of each step, float32 [steps]; made by `levels` in float64."""

    sigma: jax.Array  # after churn
    sigma_next: jax.Array
    ratio: jax.Array  # sigma / sigma_next, 0 in the last step, which has no correction
    gamma: jax.Array
    churn_amount: jax.Array
    noise_amount: jax.Array
    blur_sigma: jax.Array
    blur_sigma_next: jax.Array


def levels(
    process: EdmProcess,
    sigmas: np.ndarray,
    kappa: float,
    churn: np.ndarray | float = 0.0,
    s_noise: float = 1.0,
) -> Levels:
    """The tables behind equations (1) to (3), float64 on the host. sigmas: [steps + 1]; churn:
    [steps]."""
    sigma, sigma_next = sigmas[:-1] * (1 + np.asarray(churn)), sigmas[1:]
    churn_amount = (
        s_noise * sigmas[:-1] * np.sqrt(churn * (2 + np.asarray(churn))) * np.ones_like(sigma)
    )
    ratio = np.divide(sigma, sigma_next, out=np.zeros_like(sigma), where=sigma_next > 0)
    blur_sigma, blur_sigma_next = np.zeros_like(sigma), np.zeros_like(sigma)
    if isinstance(process, RelayProcess):
        blur_sigma = process.blur_sigma(process.u_from_sigma(sigma))
        blur_sigma_next = process.blur_sigma(process.u_from_sigma(sigma_next))
    return Levels(
        sigma,
        sigma_next,
        ratio,
        math.sqrt(1 - kappa**2) * sigma_next / sigma,
        churn_amount,
        kappa * sigma_next,
        blur_sigma,
        blur_sigma_next,
    )


def draws(
    process: EdmProcess, noise_fn: NoiseFn, step: jax.Array | int, moment: str
) -> list[jax.Array]:
    """The white fields that a stage's noise is made of: one, or two with block noise. moment:
    'initial', 'euler', 'heun'."""
    has_blocks = isinstance(process, RelayProcess) and process.block_noise_scale != 0
    return [
        noise_fn(step, f"{moment}_{kind}")
        for kind in (("gauss", "block") if has_blocks else ("gauss",))
    ]


def stage_noise(
    process: EdmProcess, gaussian: jax.Array, block_gaussian: jax.Array | None = None
) -> jax.Array:
    """Unit noise of a stage from `draws`: white, plus block noise in a relay stage."""
    if block_gaussian is None or not isinstance(process, RelayProcess):
        return gaussian
    return relay_noise(gaussian, block_gaussian, process.patch, process.block_noise_scale)


def heun(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    x: jax.Array,
    process: EdmProcess,
    table: Levels,
    noise_fn: NoiseFn,
    return_states: bool = False,
) -> Samples:
    """Equations (1) to (3) from the state x [b, h, w, c] down to sigma 0, compiled as one loop.

    denoise: (x, scalar sigma) -> x0. Noise whose factor is zero in every step is never drawn.
    """
    churns, adds_noise = bool(np.any(table.churn_amount)), bool(np.any(table.noise_amount))
    num_steps = len(table.sigma)
    table = Levels(*(jnp.asarray(column, jnp.float32) for column in table))

    def update(
        x: jax.Array, denoised: jax.Array, at: Levels, noise: jax.Array | float
    ) -> jax.Array:
        now = next_ = denoised
        if isinstance(process, RelayProcess):
            now = blur(denoised, at.blur_sigma, process.patch, process.min_scale)
            next_ = blur(denoised, at.blur_sigma_next, process.patch, process.min_scale)
        return at.gamma * (x - now) + next_ + at.noise_amount * noise

    def call(
        carry: tuple[jax.Array, ...], index: jax.Array
    ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
        state, prediction, first = carry
        step, correcting = index // 2, index % 2 == 1
        at = Levels(*(column[step] for column in table))
        x = state
        if churns:
            x = lax.cond(
                correcting,
                lambda: state,
                lambda: state + at.churn_amount * noise_fn(step, "churn_gauss"),
            )
        point = jnp.where(correcting, prediction, x)
        denoised = denoise(point, jnp.where(correcting, at.sigma_next, at.sigma))
        corrected = (first + x - at.ratio * (point - denoised)) / 2
        estimate = jnp.where(correcting, corrected, denoised)
        noise: jax.Array | float = 0.0
        # both fields leave the branches: drawn in one loop with their sum they take three times
        # as long
        if adds_noise:
            noise = stage_noise(
                process,
                *lax.cond(
                    correcting,
                    lambda: draws(process, noise_fn, step, "heun"),
                    lambda: draws(process, noise_fn, step, "euler"),
                ),
            )
        x_next = update(x, estimate, at, noise)
        return (
            jnp.where(correcting, x_next, x),
            x_next,
            denoised,
        ), state if return_states else None

    x = x.astype(jnp.float32)
    (_, final, _), states = lax.scan(call, (x, x, x), jnp.arange(2 * num_steps - 1))
    return Samples(final, states[::2] if states is not None else None)


def sample_edm(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    latents: jax.Array,
    noise_fn: NoiseFn,
    sampler: EdmSampler,
    return_states: bool = False,
) -> Samples:
    """First stage (SPEC section 5.1) from unit gaussian latents [b, h, w, c]. denoise: (x,
    scalar sigma) -> x0."""
    sigmas = sampler.sigmas()
    table = levels(EdmProcess(), sigmas, sampler.sde_scale, sampler.churn(), sampler.s_noise)
    return heun(denoise, float(sigmas[0]) * latents, EdmProcess(), table, noise_fn, return_states)


def upsample(low_res: jax.Array, patch: int) -> jax.Array:
    """Nearest-neighbour up-sampling: every pixel of [b, h, w, c] becomes patch x patch pixels."""
    return jnp.repeat(jnp.repeat(low_res, patch, axis=1), patch, axis=2)


def handoff(
    low_res: jax.Array, noise_fn: NoiseFn, process: RelayProcess, sampler: RelaySampler
) -> jax.Array:
    """The relay's first state (SPEC section 5.2): the up-sampled low-resolution image, neither
    clipped nor quantised, plus noise at the first kept level. low_res: [b, h, w, c]. Returns
    [b, h p, w p, c]."""
    start = float(sampler.sigmas()[0])
    return upsample(low_res, process.patch) + start * stage_noise(
        process, *draws(process, noise_fn, 0, "initial")
    )


def sample_relay(
    denoise: Callable[[jax.Array, jax.Array], jax.Array],
    low_res: jax.Array,
    noise_fn: NoiseFn,
    process: RelayProcess,
    sampler: RelaySampler,
    return_states: bool = False,
) -> Samples:
    """Relay stage (SPEC section 5.3) from the images of the stage before, [b, h, w, c]; result
    [b, h p, w p, c].

    denoise: (x, scalar sigma) -> x0. `process.cdf_max` is the sampling one, which may differ
    from training's.
    Raises ValueError for a handoff_sigma at which the blur schedule has turned back.
    """
    check_handoff(process, sampler.handoff_sigma)
    table = levels(process, sampler.sigmas(), sampler.fresh_noise)
    return heun(
        denoise,
        handoff(low_res, noise_fn, process, sampler),
        process,
        table,
        noise_fn,
        return_states,
    )


def seeded_noise(keys: jax.Array, shape: tuple[int, ...]) -> NoiseFn:
    """A noise_fn whose row i depends on keys[i] alone. keys: typed random keys [b]; shape: (h,
    w, c)."""

    def noise_fn(step: jax.Array | int, purpose: str) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, NOISE_PURPOSES.index(purpose)), step)
            return jax.random.normal(
                key, (math.prod(shape),)
            )  # in rows of 3 colours CPUs take twice as long

        return jax.vmap(one)(keys).reshape(-1, *shape)

    return noise_fn

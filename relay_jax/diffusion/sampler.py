"""The stochastic Heun sampler of both stages (docs/math.md section 6).

Sources: EDM, arXiv 2206.00364, algorithm 2; Relay Diffusion, arXiv
2309.03350, algorithm 1.

From the state x at level sigma to the next level sigma', with D(x) the denoised image:
(1)  x_next = gamma (x - B D) + B' D + kappa sigma' n,
     gamma = sqrt(1 - kappa^2) sigma' / sigma,   kappa = fresh_noise,
     B = B_{s(sigma)}, B' = B_{s(sigma')} and n the blur and the noise of the process
     Keep the noise estimate, scaled; re-blur the denoised image less; add a share of fresh noise.
(2)  correction: (1) again from x, with the mean of the slopes d = (x - D)/sigma at x and at the
     prediction (which includes its own noise), and with new noise.
     In terms of D:  D <- (D + x - sigma d') / 2
(2') correction="second_order": the same less its term without D', which makes it first order
     where the blur acts:  D <- ... - (sigma / 2) ((1 - B')/sigma' - (1 - B)/sigma) D
(3)  churn (a stage that starts from noise), at the start of a step:
     x <- x + sigma sqrt(c (2 + c)) S_noise g,  sigma <- (1 + c) sigma

EDM's update is (1) without blur:
     x + (sigma' - sigma) d = gamma x + (1 - gamma) D
At sigma' = 0 both give D, so the last step needs no case of its own and
no correction: N levels cost 2N - 1 calls of the denoiser.
Where a stage stops at a level above 0 (stop_sigma), every step has its
correction: 2N calls.

A sampler is chosen and called: a frozen dataclass with `levels`,
`call_sigmas`, `check` and `__call__`, and `until` where it can
stop early. multistep.py is the other one. SAMPLERS, or
`package.module:Class`, names it in a configuration; plan,
records and reports learn of it from the object.
examples/new_sampler.py is one.

Noise comes from `noise_fn(step, purpose)`: the caller decides what
it depends on (`seeded_noise`: the key of each image), so a sample
does not depend on its batch or on devices.
"""

import math
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple, Protocol

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.grid import (
    BoundDenoiser,
    Samples,
    check_ends,
    fields,
    relay_sigmas,
    stopped_sigmas,
)
from relay_jax.diffusion.limits import check_tables
from relay_jax.diffusion.multistep import Multistep
from relay_jax.diffusion.process import EdmProcess, NoiseFn, Purpose


class Sampler(Protocol):
    """What a stage asks of its sampler; dataclass fields are its settings."""

    def levels(self) -> np.ndarray:
        """Noise levels of the steps, falling: float64 [steps + 1].

        The last one is 0, or the level where the sampler stops.
        """

    def call_sigmas(self) -> np.ndarray:
        """Sigma of each call of the denoiser: float64 [calls]; guidance may act in some alone."""

    def check(self, process: EdmProcess) -> None:
        """Raises ValueError for settings that do not work with this process."""

    def __call__(
        self,
        denoise: BoundDenoiser,
        start: jax.Array,
        process: EdmProcess,
        noise_fn: NoiseFn,
        return_states: bool = False,
    ) -> Samples:
        """From the state at `levels()[0]` [b, h, w, c] to images."""


CORRECTIONS = ("official", "second_order")


class Steps(NamedTuple):
    """What the loop needs of each step, [steps]; float64 on the host, cast to float32 once."""

    sigma: np.ndarray  # after churn
    sigma_next: np.ndarray
    ratio: np.ndarray  # sigma / sigma_next, 0 in a step to level 0, which has no correction
    gamma: np.ndarray
    churn_amount: np.ndarray
    noise_amount: np.ndarray
    blur_sigma: np.ndarray
    blur_sigma_next: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Heun:
    """Equations (1) to (3), compiled as one loop over the 2 N - 1 calls of the denoiser.

    num_steps, sigma_min, sigma_max, rho: the grid (`edm_sigmas`);
    handoff_sigma: only its levels below are used, infinite for a
    stage that starts from noise. fresh_noise: kappa, in [0, 1].
    s_churn, s_min, s_max, s_noise: EDM algorithm 2, for a stage that
    starts from noise. correction: "official", or "second_order" for
    equation (2'). stop_sigma: see `until`. Sigmas are in units of
    images in [-1, 1]. Source: docs/math.md section 6. Raises
    ValueError for values that are no sampler.
    """

    num_steps: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    handoff_sigma: float = math.inf
    fresh_noise: float = 0.0
    s_churn: float = 0.0
    s_min: float = 0.0
    s_max: float = math.inf
    s_noise: float = 1.0
    correction: str = "official"
    stop_sigma: float = 0.0

    def __post_init__(self) -> None:
        for name in ("s_churn", "s_noise"):
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must not be negative, not {getattr(self, name)}")
        if math.isnan(self.s_min) or math.isnan(self.s_max):
            raise ValueError("s_min and s_max must be sigmas, not nan")
        if not 0 <= self.fresh_noise <= 1:
            raise ValueError(f"fresh_noise must lie in [0, 1], not {self.fresh_noise}")
        if self.correction not in CORRECTIONS:
            raise ValueError(
                f"correction must be {' or '.join(CORRECTIONS)}, not {self.correction!r}"
            )
        self.levels()

    def levels(self) -> np.ndarray:
        """float64 [steps + 1] with the closing 0, or with stop_sigma in its place."""
        if self.stop_sigma:
            return stopped_sigmas(self.num_steps, self.stop_sigma, self.sigma_max, self.rho)
        return relay_sigmas(
            self.num_steps,
            self.sigma_min,
            self.sigma_max,
            self.rho,
            self.handoff_sigma,
        )

    def churn(self) -> np.ndarray:
        """The factor c of equation (3) for each step, float64 [steps]."""
        sigma = self.levels()[:-1]
        inside = (self.s_min <= sigma) & (sigma <= self.s_max)
        return np.where(inside, min(self.s_churn / self.num_steps, math.sqrt(2) - 1), 0.0)

    def call_sigmas(self) -> np.ndarray:
        """Each level after churn, and its correction: float64 [2 steps - 1], stopped [2 steps]."""
        sigmas = self.levels()
        return np.concatenate([sigmas[:-1] * (1 + self.churn()), sigmas[1:][sigmas[1:] > 0]])

    def until(self, sigma: float) -> "Heun":
        """The same steps down to the level sigma alone, where the state itself is the result."""
        return replace(self, stop_sigma=sigma)

    def check(self, process: EdmProcess) -> None:
        """Raises ValueError for a hand-off that the process has not, or churn after one."""
        check_ends(process, self.handoff_sigma, self.stop_sigma)
        if process.has_handoff and self.s_churn > 0:
            raise ValueError("a stage that continues images has no churn; use s_churn 0")
        check_tables(self.steps(process)._asdict())

    def steps(self, process: EdmProcess) -> Steps:
        """The tables behind equations (1) to (3)."""
        sigmas, churn, kappa = self.levels(), self.churn(), self.fresh_noise
        sigma, sigma_next = sigmas[:-1] * (1 + churn), sigmas[1:]
        return Steps(
            sigma=sigma,
            sigma_next=sigma_next,
            ratio=np.divide(sigma, sigma_next, out=np.zeros_like(sigma), where=sigma_next > 0),
            gamma=math.sqrt(1 - kappa**2) * sigma_next / sigma,
            churn_amount=self.s_noise * sigmas[:-1] * np.sqrt(churn * (2 + churn)),
            noise_amount=kappa * sigma_next,
            blur_sigma=process.blur_sigma_at(sigma),
            blur_sigma_next=process.blur_sigma_at(sigma_next),
        )

    def __call__(
        self,
        denoise: BoundDenoiser,
        start: jax.Array,
        process: EdmProcess,
        noise_fn: NoiseFn,
        return_states: bool = False,
    ) -> Samples:
        """From the state at `levels()[0]`, [b, h, w, c], to images.

        denoise: (x, scalar sigma) -> x0. Noise whose factor is zero
        in every step is never drawn. return_states: keep the state
        before every step, which takes its memory. Raises
        AssertionError (chex) for a start of another rank.
        """
        chex.assert_rank(start, 4, custom_message="start must be [b, h, w, c]")
        table = self.steps(process)
        churns, adds_noise = (
            bool(np.any(table.churn_amount)),
            bool(np.any(table.noise_amount)),
        )
        columns = Steps(*(jnp.asarray(column, jnp.float32) for column in table))

        # One turn is one call of the denoiser, not one step: the
        # network then stands once in the compiled program
        # instead of three times.
        def call(
            carry: tuple[jax.Array, ...], index: jax.Array
        ) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
            state, prediction, first = carry
            step, correcting = index // 2, index % 2 == 1
            at = Steps(*(column[step] for column in columns))
            x = state
            if churns:
                x = lax.cond(
                    correcting,
                    lambda: state,
                    lambda: state + at.churn_amount * noise_fn(step, Purpose.CHURN_GAUSS),
                )
            point = jnp.where(correcting, prediction, x)
            denoised = denoise(point, jnp.where(correcting, at.sigma_next, at.sigma))
            corrected = (first + x - at.ratio * (point - denoised)) / 2
            if self.correction == "second_order":
                corrected -= self._third_term(process, first, at)
            estimate = jnp.where(correcting, corrected, denoised)
            x_next = (
                at.gamma * (x - process.blur(estimate, at.blur_sigma))
                + process.blur(estimate, at.blur_sigma_next)
                + at.noise_amount * (fresh(step, correcting) if adds_noise else 0.0)
            )
            kept = (jnp.where(correcting, x_next, x), x_next, denoised)
            return kept, state if return_states else None

        # Both fields leave the branches: drawn in one loop with
        # their sum they take three times as long on a CPU.
        def fresh(step: jax.Array, correcting: jax.Array) -> jax.Array:
            draw = partial(fields, process, noise_fn, step)
            heun = partial(draw, Purpose.HEUN_GAUSS, Purpose.HEUN_BLOCK)
            euler = partial(draw, Purpose.EULER_GAUSS, Purpose.EULER_BLOCK)
            return process.noise(*lax.cond(correcting, heun, euler))

        x = start.astype(jnp.float32)
        calls = jnp.arange(len(self.call_sigmas()))
        (_, final, _), states = lax.scan(call, (x, x, x), calls)
        # Every second call is a correction, which starts from the
        # state of its step.
        return Samples(final, states[::2] if states is not None else None)

    def _third_term(self, process: EdmProcess, first: jax.Array, at: Steps) -> jax.Array:
        """What equation (2') takes away; zero without blur. first: D at the start of the step."""
        now = first - process.blur(first, at.blur_sigma)
        after = first - process.blur(first, at.blur_sigma_next)
        return (at.ratio * after - now) / 2


def seeded_noise(keys: jax.Array, shape: tuple[int, ...]) -> NoiseFn:
    """A noise_fn whose row i depends on keys[i] alone.

    keys: typed random keys [b]; shape: (h, w, c). Its fields are
    float32 [b, h, w, c].
    """
    chex.assert_rank(keys, 1, custom_message="keys must be typed random keys [b]")

    def noise_fn(step: jax.Array | int, purpose: Purpose) -> jax.Array:
        def one(key: jax.Array) -> jax.Array:
            key = jax.random.fold_in(jax.random.fold_in(key, int(purpose)), step)
            # In rows of 3 colours CPUs take twice as long.
            return jax.random.normal(key, (math.prod(shape),))

        return jax.vmap(one)(keys).reshape(-1, *shape)

    return noise_fn


# stages.STAGE.sample.kind -> class
SAMPLERS: dict[str, type] = {"heun": Heun, "multistep": Multistep}

"""The multistep sampler: one call of the denoiser per level (docs/math.md section 6).

Forward law x = B(sigma) x0 + sigma n, with b_k the factor of B for coefficient k of a patch. With
fresh noise at the rate eta the reverse process from sigma to sigma' is (n: the stage's unit noise)
(1)  x' = gamma x + sigma'^(1+eta) INT D d[ b(tau) tau^-(1+eta) ] + kappa sigma' n
     gamma = (sigma'/sigma)^(1+eta),   kappa^2 = 1 - (sigma'/sigma)^(2 eta)
Only D inside the integral is not known. A sampler puts a polynomial in w = -ln sigma in its place,
through the last calls of the denoiser. With D_i of level i, h = w_{i+1} - w_i, g = w_i - w_{i-1}:
(2)  D~ = D_i + h/(2 g) (D_i - D_{i-1}),         D~ = D_i in the first step
     x_{i+1} = gamma (x_i - B_i D~) + B_{i+1} D~ + kappa sigma_{i+1} n
(3)  exact weights: x_{i+1} = gamma x_i + sum_j C_j D_{i-j} + kappa sigma_{i+1} n,  by coefficient,
     C_j = b_{i+1} l_j(w_{i+1}) - gamma b_i l_j(w_i)
           - INT l_j'(w) b(e^-w) e^((1+eta)(w - w_{i+1})) dw
     with l_j the Lagrange polynomials of the nodes: (1) integrated by parts
(4)  corrector: predict by (3) from levels i and i - 1, call the denoiser there, and take the step
     again from x_i through levels i + 1, i, i - 1, with the same noise. Still one call per level.
(5)  exact_first_blur: the hand-off holds patch means E x0 and not B(sigma_0) x0. In the first step
     B_i is E: b_i = 1 for the mean of a patch and 0 else.
(6)  the rate of a share kappa per step:  eta = -ln(1 - kappa^2) / (2 ln(sigma/sigma'))

Source of (2): DPM-Solver++(2M), arXiv 2211.01095, which it is for
patches of one pixel; of the corrector: UniC, arXiv 2302.04867.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.grid import (
    BoundDenoiser,
    Samples,
    check_ends,
    edm_sigmas,
    fields,
    relay_sigmas,
    stopped_sigmas,
)
from relay_jax.diffusion.limits import check_tables
from relay_jax.diffusion.process import EdmProcess, NoiseFn, Purpose

PIECES, POINTS = 4, 24  # of Gauss-Legendre per step: exact to rounding


class Steps(NamedTuple):
    """What the loop needs of each step, [steps]; float64 on the host, cast to float32 once."""

    sigma: np.ndarray
    gamma: np.ndarray
    noise_amount: np.ndarray  # kappa sigma'
    extrapolation: np.ndarray  # h/(2 g) of equation (2)
    blur_sigma: np.ndarray
    blur_sigma_next: np.ndarray


class Weights(NamedTuple):
    """The factors C_j of equation (3): float64 [steps, nodes, p, p], newest node first.

    For the step that leaves a level, and for the step that led to it.
    """

    predictor: np.ndarray  # nodes i, i - 1
    corrector: np.ndarray  # nodes i, i - 1, i - 2


@dataclass(frozen=True, kw_only=True)
class Multistep:
    """Equations (1) to (5), compiled as one loop with N calls of the denoiser for N levels.

    num_steps, sigma_min, sigma_max, rho: the grid (grid.py).
    handoff_sigma: where a stage that continues images starts,
    infinite for one that starts from noise. direct: all num_steps
    levels lie between handoff_sigma, the first, and sigma_min;
    False: only the levels of sigma_max's grid below handoff_sigma,
    as Heun has them. fresh_noise_rate: eta, 0 for none. corrector:
    (4) in place of (2). exact_first_blur: (5). stop_sigma: see
    `until`. Sigmas are in units of images in [-1, 1]. Source:
    docs/math.md section 6. Raises ValueError for values that are no
    sampler.
    """

    num_steps: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    handoff_sigma: float = math.inf
    direct: bool = True
    fresh_noise_rate: float = 0.0
    corrector: bool = False
    exact_first_blur: bool = False
    stop_sigma: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.fresh_noise_rate < math.inf:
            raise ValueError(f"fresh_noise_rate must be 0 or positive, not {self.fresh_noise_rate}")
        self.levels()

    def levels(self) -> np.ndarray:
        """float64 [steps + 1] with the closing 0, or with stop_sigma in its place."""
        count, low, top, rho = (
            self.num_steps,
            self.sigma_min,
            self.sigma_max,
            self.rho,
        )
        if self.stop_sigma:
            return stopped_sigmas(count, self.stop_sigma, top, rho)
        if self.direct and self.handoff_sigma < math.inf:
            sigmas = edm_sigmas(count, low, self.handoff_sigma, rho)
            sigmas[0] = self.handoff_sigma  # of which powers and roots lose the last digit
            return sigmas
        return relay_sigmas(count, low, top, rho, self.handoff_sigma)

    def call_sigmas(self) -> np.ndarray:
        """Each level but the closing one: float64 [steps]."""
        return self.levels()[:-1]

    def until(self, sigma: float) -> "Multistep":
        """As many steps down to the level sigma alone, where the state itself is the result."""
        return replace(self, stop_sigma=sigma)

    def check(self, process: EdmProcess) -> None:
        """Raises ValueError for a hand-off that the process has not, or a blur without factors."""
        check_ends(process, self.handoff_sigma, self.stop_sigma)
        if self.exact_first_blur and not process.has_handoff:
            raise ValueError("exact_first_blur is for a stage that continues images; leave it out")
        if self.corrector and not process.has_factors:
            raise ValueError(
                f"the corrector needs the factors of the blur, and {type(process).__name__} has a "
                "blur of its own without them (attenuation); use corrector=False"
            )
        check_tables(self.steps(process)._asdict())

    def steps(self, process: EdmProcess) -> Steps:
        """The tables behind equations (1) and (2)."""
        sigma, after, eta = (
            self.levels()[:-1],
            self.levels()[1:],
            self.fresh_noise_rate,
        )
        ratio = after / sigma
        extrapolation = np.zeros_like(sigma)
        # Neither the first step, which has no call before it, nor
        # the one to level 0, which returns D as it is.
        inner = np.flatnonzero(after > 0)[1:]
        extrapolation[inner] = np.log(ratio[inner]) / (2 * np.log(ratio[inner - 1]))
        return Steps(
            sigma=sigma,
            gamma=ratio ** (1 + eta),
            noise_amount=after * np.sqrt(1 - ratio ** (2 * eta)),
            extrapolation=extrapolation,
            blur_sigma=process.blur_sigma_at(sigma),
            blur_sigma_next=process.blur_sigma_at(after),
        )

    def weights(self, process: EdmProcess) -> Weights:
        """The tables behind equations (3) to (5); nodes that a step has not weigh 0."""
        sigmas = self.levels()
        first = sigmas[0] if self.exact_first_blur else None
        predictor: list[np.ndarray] = []
        corrector: list[np.ndarray] = []
        for i in range(len(sigmas) - 1):
            for table, step, newest, count in (
                (predictor, i, i, 2),
                (corrector, i - 1, i, 3),
            ):
                nodes = sigmas[max(newest - count + 1, 0) : newest + 1][::-1]
                if step < 0 or sigmas[step + 1] == 0:
                    nodes = nodes[:0]  # no step leads to the start, and none predicts the end
                row = exact_weights(
                    process,
                    nodes,
                    sigmas[step],
                    sigmas[step + 1],
                    self.fresh_noise_rate,
                    first,
                )
                table.append(np.pad(row, [(0, count - len(row)), (0, 0), (0, 0)]))
        return Weights(np.stack(predictor), np.stack(corrector))

    def __call__(
        self,
        denoise: BoundDenoiser,
        start: jax.Array,
        process: EdmProcess,
        noise_fn: NoiseFn,
        return_states: bool = False,
    ) -> Samples:
        """From the state at `levels()[0]`, [b, h, w, c], to images.

        denoise: (x, scalar sigma) -> x0. Without fresh noise none is
        drawn. return_states: keep the points where the denoiser was
        called, which takes their memory.
        """
        chex.assert_rank(start, 4, custom_message="start must be [b, h, w, c]")
        table = self.steps(process)
        noisy = bool(np.any(table.noise_amount))
        columns = Steps(*(jnp.asarray(column, jnp.float32) for column in table))
        walk = _Corrected if self.corrector else _Extrapolated
        loop = walk(self, process, start.shape)

        # The network stands once in the compiled program, in a loop
        # over the levels.
        def call(carry: tuple, index: jax.Array) -> tuple[tuple, jax.Array | None]:
            point, _, memory = carry
            at = Steps(*(column[index] for column in columns))
            denoised = denoise(point, at.sigma).astype(jnp.float32)
            fresh: jax.Array | float = 0.0
            if noisy:
                white_fields = fields(
                    process,
                    noise_fn,
                    index,
                    Purpose.EULER_GAUSS,
                    Purpose.EULER_BLOCK,
                )
                fresh = at.noise_amount * process.noise(*white_fields)
            following, memory = loop.step(index, at, point, denoised, fresh, memory)
            return (following, denoised, memory), point if return_states else None

        x = start.astype(jnp.float32)
        carry = (x, jnp.zeros_like(x), loop.memory(x))
        (state, denoised, _), states = lax.scan(call, carry, jnp.arange(len(table.sigma)))
        return Samples(state if self.stop_sigma else denoised, states)


class _Extrapolated:
    """Equation (2). Memory: the denoised image of the level before."""

    def __init__(self, sampler: Multistep, process: EdmProcess, shape: Sequence[int]) -> None:
        self.exact_first_blur, self.process = sampler.exact_first_blur, process

    def memory(self, x: jax.Array) -> jax.Array:
        return jnp.zeros_like(x)

    def step(
        self,
        index: jax.Array,
        at: Steps,
        x: jax.Array,
        denoised: jax.Array,
        fresh: jax.Array | float,
        before: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        estimate = denoised + at.extrapolation * (denoised - before)
        following = self.process.blur(estimate, at.blur_sigma_next)
        x_next = at.gamma * (x - self._now(index, at, estimate)) + following + fresh
        return x_next, denoised

    def _now(self, index: jax.Array, at: Steps, estimate: jax.Array) -> jax.Array:
        """The blur of the level that the step leaves, equation (5)."""
        if not self.exact_first_blur:
            return self.process.blur(estimate, at.blur_sigma)
        return lax.cond(
            index == 0,
            lambda: self.process.mean_blur(estimate),
            lambda: self.process.blur(estimate, at.blur_sigma),
        )


class _Memory(NamedTuple):
    """What a correction goes back to, all but gamma as coefficients [b, h, w, c]."""

    base: jax.Array  # the state that the step left
    fresh: jax.Array | float  # its noise
    gamma: jax.Array
    past: tuple[jax.Array, jax.Array]  # denoised images of the two levels before


class _Corrected:
    """Equations (3) and (4), on coefficients: one transform of D and one back for each level."""

    def __init__(self, sampler: Multistep, process: EdmProcess, shape: Sequence[int]) -> None:
        self.process = process
        self.noisy = sampler.fresh_noise_rate > 0
        tables = sampler.weights(process)
        self.tables = Weights(*(jnp.asarray(table, jnp.float32) for table in tables))
        self.tiles = tuple(side // tables.predictor.shape[-1] for side in shape[1:3])

    def memory(self, x: jax.Array) -> _Memory:
        base, nothing = self.process.transform(x), jnp.zeros_like(x)
        fresh = nothing if self.noisy else 0.0
        # The first correction has weights 0 and gamma 1: it leaves
        # the start as it is.
        return _Memory(base, fresh, jnp.float32(1), (nothing, nothing))

    def step(
        self,
        index: jax.Array,
        at: Steps,
        point: jax.Array,
        denoised: jax.Array,
        fresh: jax.Array | float,
        memory: _Memory,
    ) -> tuple[jax.Array, _Memory]:
        values = (self.process.transform(denoised), *memory.past)
        change = self._sum(self.tables.corrector[index], values) + memory.fresh
        state = memory.gamma * memory.base + change
        if self.noisy:
            fresh = self.process.transform(jnp.asarray(fresh))
        predicted = at.gamma * state + self._sum(self.tables.predictor[index], values[:2]) + fresh
        following = _Memory(state, fresh, at.gamma, values[:2])
        return self.process.inverse(predicted), following

    def _sum(self, factors: jax.Array, values: Sequence[jax.Array]) -> jax.Array:
        """Sum over the nodes of factors [nodes, p, p] times coefficients."""
        whole = jnp.tile(factors, (1, *self.tiles))[..., None]
        return sum((f * u for f, u in zip(whole, values, strict=True)), start=jnp.float32(0))


def exact_weights(
    process: EdmProcess,
    nodes: Sequence[float] | np.ndarray,
    sigma: float,
    sigma_next: float,
    eta: float,
    mean_at: float | None = None,
) -> np.ndarray:
    """C_j of equation (3) for a step: float64 [nodes, p, p].

    nodes: sigmas of the calls of the denoiser, in any order.
    mean_at: the level whose state holds patch means alone, see (5).
    """
    p = process.attenuation(np.zeros(())).shape[-1]
    count = len(nodes)
    if not count:
        return np.zeros((0, p, p))
    # In t = (w - w_i) / h the step is the interval [0, 1], and the
    # polynomials are well conditioned whatever the levels are.
    h = math.log(sigma / sigma_next)
    places = np.log(sigma / np.asarray(nodes, np.float64)) / h
    coefficients = np.linalg.inv(np.vander(places, increasing=True))  # [power, node]
    after = process.attenuation(process.blur_sigma_at(np.asarray(sigma_next)))
    now = process.attenuation(process.blur_sigma_at(np.asarray(sigma)))
    if mean_at == sigma:
        now = np.zeros((p, p))
        now[0, 0] = 1
    powers = _integrals(process, sigma, h, 1 + eta, count - 1)
    slopes = coefficients[1:].T * np.arange(1, count)  # of l_j, by power of t
    ends = coefficients.sum(0)[:, None, None] * after
    starts = math.exp(-(1 + eta) * h) * coefficients[0][:, None, None] * now
    return ends - starts - np.tensordot(slopes, powers, 1)


def _integrals(process: EdmProcess, sigma: float, h: float, rate: float, count: int) -> np.ndarray:
    """INT t^q b(sigma e^(-h t)) e^(rate h (t - 1)) dt over [0, 1], q < count: [count, p, p]."""
    x, weight = np.polynomial.legendre.leggauss(POINTS)
    # Pieces, as the blur of a long step is far from a polynomial, and
    # not even smooth where it has a kink.
    kinks = [place for kink in process.blur_kinks if 0 < (place := math.log(sigma / kink) / h) < 1]
    edges = np.union1d(np.linspace(0, 1, PIECES + 1), kinks)
    length = np.diff(edges)[:, None]
    t = (edges[:-1, None] + length * (x + 1) / 2).ravel()
    weight = (length * weight / 2).ravel() * np.exp(rate * h * (t - 1))
    factors = process.attenuation(process.blur_sigma_at(sigma * np.exp(-h * t)))
    moments = t ** np.arange(count)[:, None] * weight
    return np.tensordot(moments, factors, 1)


def rate_of_share(share: float, sigma: float, sigma_next: float) -> float:
    """Equation (6): the fresh_noise_rate whose share of fresh noise in this step is `share`."""
    return -math.log1p(-(share**2)) / (2 * math.log(sigma / sigma_next))

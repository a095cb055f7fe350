"""A sampler of your own: the first-order (Euler) relative of the built-in Heun sampler.

In Python, for one stage of a trained relay:

    from examples.new_sampler import Euler
    relay = rx.load("runs/demo").replace("relay", sampler=Euler(num_steps=40, handoff_sigma=0.9))

From the command line, which asks the sampler's class for the keys of `sample` that it has:

    python -m relay_jax.main --workdir=runs/demo --mode=sample --seeds=0-63 \\
        --config.stages.base.sample.kind=examples.new_sampler:Euler --out=images/euler

From the state x at level sigma to the next level sigma', with D(x) the denoised image and B the
blur of the process at both levels:

(1)  x' = (sigma' / sigma) (x - B D(x)) + B' D(x)

Keep the noise, scaled down; put the denoised image under it again, blurred less. It adds no fresh
noise, so it is deterministic from its start. Without blur (1) is DDIM (arXiv 2010.02502) in EDM's
notation. N levels cost N calls of the denoiser, Heun's 2N - 1.
"""

import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.grid import BoundDenoiser, Samples, relay_sigmas
from relay_jax.diffusion.process import EdmProcess, NoiseFn


@dataclass(frozen=True, kw_only=True)
class Euler:
    """Equation (1) from level to level, for a stage that starts from noise or from images.

    num_steps, sigma_min, sigma_max, rho: the grid of EDM; handoff_sigma: only its levels below are
    used. The fields of the dataclass are keys of `sample` in a configuration.
    """

    num_steps: int
    sigma_min: float = 0.002
    sigma_max: float = 80.0
    rho: float = 7.0
    handoff_sigma: float = math.inf

    def levels(self) -> np.ndarray:
        """Noise levels of the steps, falling, with the closing 0: float64 [steps + 1]."""
        return relay_sigmas(
            self.num_steps, self.sigma_min, self.sigma_max, self.rho, self.handoff_sigma
        )

    def call_sigmas(self) -> np.ndarray:
        """Sigma of each call of the denoiser: float64 [steps]; plans and reports count them."""
        return self.levels()[:-1]

    def check(self, process: EdmProcess) -> None:
        """Raises ValueError for a hand-off that the process has not."""
        # Asked before anything is compiled, so that a mistake costs no time.
        if process.has_handoff:
            process.check_start(self.handoff_sigma)
        elif math.isfinite(self.handoff_sigma):
            raise ValueError("handoff_sigma is for a stage that continues images; leave it out")

    def __call__(
        self,
        denoise: BoundDenoiser,
        start: jax.Array,
        process: EdmProcess,
        noise_fn: NoiseFn,
        return_states: bool = False,
    ) -> Samples:
        """From the state at `levels()[0]`, [b, h, w, c], to images of the same shape.

        denoise: (x, scalar sigma) -> x0. noise_fn: not needed here; a sampler with fresh noise asks
        it for `process.noise(noise_fn(step, Purpose.EULER_GAUSS), ...)`.
        """
        # float64 on the host: float32 loses digits of the schedule near the hand-off.
        sigmas = self.levels()
        columns = (sigmas[:-1], sigmas[1:], *self._blurs(process, sigmas))
        table = jnp.asarray(np.stack(columns, axis=1), jnp.float32)

        # A scan, so that the network stands once in the compiled program whatever num_steps is.
        def step(x: jax.Array, row: jax.Array) -> tuple[jax.Array, jax.Array | None]:
            sigma, sigma_next, blur_sigma, blur_sigma_next = row
            denoised = denoise(x, sigma)
            noise = x - process.blur(denoised, blur_sigma)
            x_next = sigma_next / sigma * noise + process.blur(denoised, blur_sigma_next)
            return x_next, x if return_states else None

        final, states = lax.scan(step, start.astype(jnp.float32), table)
        return Samples(final, states)

    def _blurs(self, process: EdmProcess, sigmas: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Blur sigmas before and after each step; zeros for a process without blur."""
        blurs = process.blur_sigma_at(sigmas)
        return blurs[:-1], blurs[1:]

"""A relay on a line from the image to its up-sampled patch means (docs/math.md section 4).

Source: CogView3, arXiv 2403.05121, in which the line is one in time; here it is one in u, the
share of the training below a noise level. With E the mean of a patch, up(down(x0)) = E x0:
(1)  B x0 = (1 - tau) x0 + tau E x0
(2)  tau(sigma) = min(1, u(sigma) / u(sigma_full))
In the DCT of a patch (1) multiplies the mean by 1 and every other coefficient by 1 - tau. From
sigma_full on it is E: a hand-off there lacks nothing that the network was trained on.
"""

from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.diffusion.limits import check_finite, require
from relay_jax.diffusion.precondition import per_image
from relay_jax.diffusion.process import PatchProcess


@dataclass(frozen=True, kw_only=True)
class LinearRelay(PatchProcess):
    """Equations (1) and (2); all else, levels, noise and hand-offs, as in PatchProcess.

    sigma_full: where the line ends, at most the first level of
    sampling. `blur_sigma` is tau here. Raises ValueError for values
    that are no process.
    """

    blur_unit: ClassVar[str] = "of the line"

    sigma_full: float = 0.6

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, ("sigma_full",))
        require(self.sigma_full > 0, f"sigma_full must be positive, not {self.sigma_full}")

    def blur(self, x: jax.Array, blur_sigma: jax.Array) -> jax.Array:
        """Equation (1) of images [b, h, w, c]; blur_sigma: tau, scalar or [b]."""
        tau = per_image(blur_sigma, x)
        # Not x + tau (E x - x): at 0 and 1 the ends are exact.
        return (1 - tau) * x + tau * self.mean_blur(x)

    def attenuation(self, blur_sigma: np.ndarray) -> np.ndarray:
        rest = 1 - np.asarray(blur_sigma, np.float64)
        factors = np.repeat(rest[..., None], self.patch**2, axis=-1)
        factors[..., 0] = 1
        return factors.reshape(*rest.shape, self.patch, self.patch)

    @property
    def blur_kinks(self) -> tuple[float, ...]:
        return (self.sigma_full,)

    def blur_sigma(self, u: jax.Array) -> jax.Array:
        """Equation (2): tau, same shape and same array library as u."""
        xp = np if isinstance(u, np.ndarray | float) else jnp
        return xp.minimum(u / float(self.u_from_sigma(self.sigma_full)), 1.0)

    def check_start(self, sigma: float) -> None:
        """Raises ValueError below the end of the line, and above the levels of training."""
        super().check_start(sigma)
        require(
            sigma >= self.sigma_full,
            f"handoff_sigma {sigma} lies below sigma_full {self.sigma_full}, where the start would "
            "lack detail that training has there; raise it",
        )

    def check_training(self) -> None:
        super().check_training()
        require(
            self.sigma_floor < self.sigma_full <= self.sigma_full_blur,
            f"sigma_full {self.sigma_full} lies outside of the levels of training, "
            f"{self.sigma_floor} to {self.sigma_full_blur:.4g}",
        )

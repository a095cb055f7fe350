"""The super-resolution stage that a relay replaces: a baseline (docs/math.md section 4).

Source: cascaded diffusion, Ho et al. 2021, arXiv 2106.15282, in the terms of EDM. The stage starts
from pure noise, and its network is given the image of the stage before, up-sampled and with noise
of a level a that it is told (conditioning augmentation, in the variant that is not truncated):
(1)  c = up(down(x0)) + a g',   ln a ~ U(ln condition_sigma_min, ln condition_sigma_max)
(2)  noisy = x0 + sigma g       as in a first stage
(3)  D(noisy, sigma, c, a)
In sampling c = up(image of the stage before) + a g' with a = condition_sigma, which is chosen after
the training. The network has c beside the state as channels, and ln(a) / 4 beside ln(sigma) / 4.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import jax
import jax.numpy as jnp

from relay_jax.diffusion.blur import upsample
from relay_jax.diffusion.dct import check_patch
from relay_jax.diffusion.limits import check_finite, require
from relay_jax.diffusion.noise import NoiseFn, Purpose
from relay_jax.diffusion.precondition import Condition, per_image
from relay_jax.diffusion.process import EdmProcess
from relay_jax.resolution import Resolution, height_width


@dataclass(frozen=True, kw_only=True)
class Cascade(EdmProcess):
    """Equations (1) and (2).

    patch: pixels per side of one pixel of the stage before, at least
    1. condition_sigma_min, condition_sigma_max: of the noise on the
    condition in training; condition_sigma: the same in sampling,
    between them. In units of images in [-1, 1]. Others: EdmProcess.
    Raises ValueError for values that are no process.
    """

    starts_from_images: ClassVar[bool] = True
    has_condition: ClassVar[bool] = True

    patch: int = 4  # type: ignore[misc]
    condition_sigma: float = 0.1
    condition_sigma_min: float = 0.01
    condition_sigma_max: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("condition_sigma_min", "condition_sigma", "condition_sigma_max")
        check_finite(self, names)
        low, level, high = (getattr(self, name) for name in names)
        require(self.patch >= 1, f"patch must be at least 1, not {self.patch}")
        require(0 < low < high, f"need 0 < {names[0]} < {names[2]}, not {low} and {high}")
        require(low <= level <= high, f"condition_sigma {level} lies outside of {low} to {high}")

    @property
    def has_handoff(self) -> bool:
        """False: its first state is noise alone, whatever the stage before has made."""
        return False

    def condition(
        self, images: jax.Array, draw: jax.Array | None, gaussian: jax.Array | None
    ) -> Condition:
        """Equation (1) of sharp images [b, h, w, c]; draw: uniform [b]; gaussian: like images."""
        if draw is None or gaussian is None:
            raise ValueError("a cascade needs draws of the level and noise of its condition")
        low, high = math.log(self.condition_sigma_min), math.log(self.condition_sigma_max)
        sigma = jnp.exp(low + (high - low) * draw)
        return Condition(self.mean_blur(images) + per_image(sigma, images) * gaussian, sigma)

    def sampling_condition(self, noise_fn: NoiseFn, low_res: jax.Array | None) -> Condition:
        """c of images of the stage before, [b, h/p, w/p, c]. Raises ValueError without them."""
        if low_res is None:
            raise ValueError("a cascade continues the images of the stage before")
        image = upsample(low_res, self.patch)
        sigma = jnp.full(image.shape[:1], self.condition_sigma, jnp.float32)
        noise = noise_fn(0, Purpose.INITIAL_GAUSS)
        return Condition(image + self.condition_sigma * noise, sigma)

    def check_resolution(self, resolution: Resolution) -> None:
        check_patch(*height_width(resolution), self.patch)

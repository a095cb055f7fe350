"""The forward processes of a relay's stages (docs/math.md section 4).

First stage (EDM, arXiv 2206.00364, table 1):
(1)  ln sigma ~ N(P_mean, P_std^2)
(2)  noisy = x0 + sigma g
Relay stage (RDM, arXiv 2309.03350, section 3.2):
(3)  u ~ U(0, 1), clamped below at u_min = cdf_max Phi((ln sigma_floor - P_mean) / P_std)
(4)  sigma(u) = exp(P_mean + P_std Phi^-1(cdf_max u))
     u(sigma) = Phi((ln sigma - P_mean) / P_std) / cdf_max
(5)  s(u) = blur_sigma_max sin^2(pi u / 2)
(6)  noisy = B_s x0 + sigma (g + block_noise_scale block_noise(g'))
Both:
(7)  w(sigma) = (sigma^2 + sigma_data^2) / (sigma sigma_data)^2     at most weight_max

A process does what it is: loss, samplers and pictures ask it to blur,
to make noise and to say where sampling starts, and never which process
it is. A new one is one class with these methods, named in a
configuration by PROCESSES (processes.py) or `package.module:Class`
(examples/new_process.py). linear.py has another blur, cascade.py a
stage that is given images beside its state.

Losses draw sigma on the device (float32); samplers compute u(sigma)
on the host in float64.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtri as device_ndtri
from scipy.special import ndtr, ndtri

from relay_jax.diffusion.block_noise import block_noise_power, relay_noise
from relay_jax.diffusion.blur import MIN_SCALE, attenuation_table, blur, mean_blur, upsample
from relay_jax.diffusion.dct import check_patch, patch_dct, patch_idct
from relay_jax.diffusion.limits import check_finite, check_levels, require
from relay_jax.diffusion.noise import Level, NoiseFn, Purpose
from relay_jax.diffusion.precondition import Condition
from relay_jax.resolution import Resolution, height_width


def _kept_with(process: type, method: str, base: str) -> bool:
    """Whether `method` was written for this `base`: no derived class has a new `base` alone."""
    order = [[name in vars(c) for c in process.__mro__].index(True) for name in (method, base)]
    return order[0] <= order[1]


@dataclass(frozen=True, kw_only=True)
class EdmProcess:
    """First stage: gaussian noise alone. All sigmas in units of images in [-1, 1].

    P_mean, P_std: mean and standard deviation of ln sigma in
    training; sigma_data: standard deviation of the images;
    weight_max: the largest loss weight. Raises ValueError for values
    that are no process.
    """

    starts_from_images: ClassVar[bool] = False  # whether sampling continues a stage before
    patch: ClassVar[int] = 1  # pixels per side of one pixel of the stage before
    blur_unit: ClassVar[str] = "px"  # of blur_sigma
    has_condition: ClassVar[bool] = False  # whether the network is given images beside the state

    P_mean: float = -1.2
    P_std: float = 1.2
    sigma_data: float = 0.5
    weight_max: float = math.inf

    def __post_init__(self) -> None:
        check_finite(self, ("P_mean", "P_std", "sigma_data"))
        require(self.P_std > 0, f"P_std must be positive, not {self.P_std}")
        require(self.sigma_data > 0, f"sigma_data must be positive, not {self.sigma_data}")
        require(self.weight_max > 0, f"weight_max must be positive, not {self.weight_max}")

    @property
    def has_handoff(self) -> bool:
        """Whether the first state of sampling holds an image: a level of its own, handoff_sigma."""
        return self.starts_from_images

    # What the forward process does to images

    def blur(self, x: jax.Array, blur_sigma: jax.Array) -> jax.Array:
        """B_s x of images [b, h, w, c]; blur_sigma: scalar or [b]. Here x itself."""
        return x

    def mean_blur(self, x: jax.Array) -> jax.Array:
        """E x, the mean of every patch in all its pixels, [b, h, w, c]: what a hand-off knows."""
        return mean_blur(x, self.patch)

    # The blur by its factors: B_s x = inverse(attenuation(s) * transform(x))

    def attenuation(self, blur_sigma: np.ndarray) -> np.ndarray:
        """Factor of every coefficient of a patch: float64 [..., p, p] on the host, for [...]."""
        return np.ones((*np.shape(blur_sigma), 1, 1))

    def transform(self, x: jax.Array) -> jax.Array:
        """Pixels [b, h, w, c] to the coefficients that the factors belong to, of that shape."""
        return x

    def inverse(self, coefficients: jax.Array) -> jax.Array:
        """Coefficients of `transform` back to pixels, [b, h, w, c]."""
        return coefficients

    @property
    def blur_kinks(self) -> tuple[float, ...]:
        """Sigmas where `attenuation` has a kink; what integrates it goes piece by piece."""
        return ()

    @property
    def has_factors(self) -> bool:
        """Whether `attenuation` is that of `blur`: not where a class overrides `blur` alone."""
        return _kept_with(type(self), "attenuation", "blur")

    @property
    def has_block_noise(self) -> bool:
        """Whether `noise` wants a second field."""
        return False

    def noise(self, white: jax.Array, block: jax.Array | None = None) -> jax.Array:
        """Noise per unit of sigma from independent white unit fields [b, h, w, c]."""
        return white

    def noise_power(self, resolution: Resolution) -> np.ndarray:
        """Power of `noise` at each DCT coefficient of a whole image: float64 [h, w]."""
        return np.ones(height_width(resolution))

    # Levels that training draws

    def draw_level(self, key: jax.Array) -> jax.Array:
        """One raw draw behind a level, a float32 scalar. Here standard normal."""
        return jax.random.normal(key)

    def level(self, draw: jax.Array) -> Level:
        """Raw draws to levels, same shape. Equation (1)."""
        sigma = jnp.exp(self.P_mean + self.P_std * draw)
        return Level(sigma, jnp.zeros_like(sigma))

    def weight(self, sigma: jax.Array) -> jax.Array:
        """Loss weight, equation (7), of the shape of sigma."""
        weight = (jnp.square(sigma) + self.sigma_data**2) / jnp.square(sigma * self.sigma_data)
        return jnp.minimum(weight, self.weight_max)

    def draw_at(self, sigma: np.ndarray) -> np.ndarray:
        """The raw draw whose level has this sigma; float64 on the host, same shape."""
        return (np.log(sigma) - self.P_mean) / self.P_std

    def cdf(self, sigma: np.ndarray) -> np.ndarray:
        """Share of the draws whose sigma lies below; float64 on the host, same shape."""
        return ndtr((np.log(sigma) - self.P_mean) / self.P_std)

    def sigma_range(self, tail: float) -> tuple[float, float]:
        """Least and largest sigma of training, without a share `tail` at each open end."""
        reach = -self.P_std * float(ndtri(tail))
        return math.exp(self.P_mean - reach), math.exp(self.P_mean + reach)

    # Sampling

    def blur_sigma_at(self, sigma: np.ndarray) -> np.ndarray:
        """Blur sigma in pixels at noise levels, 0 at sigma 0; float64 on the host, same shape."""
        return np.zeros_like(np.asarray(sigma, np.float64))

    def initial_state(
        self, sigma: float, noise_fn: NoiseFn, low_res: jax.Array | None = None
    ) -> jax.Array:
        """Where sampling starts at level sigma: [b, h, w, c]. Here noise alone."""
        return sigma * noise_fn(0, Purpose.LATENTS)

    def initial_state_from_noise(
        self, sigma: float, noise_fn: NoiseFn, low_state: jax.Array
    ) -> jax.Array:
        """Where sampling starts from a state of the stage before at level sigma / patch."""
        raise ValueError("this process cannot start from a noisy state; use handoff 'image'")

    @property
    def continues_noise(self) -> bool:
        """Whether `initial_state_from_noise` gives the law of `initial_state`."""
        kept = partial(_kept_with, type(self), "initial_state_from_noise")
        return self.has_handoff and kept("initial_state") and kept("noise")

    def check_start(self, sigma: float) -> None:
        """Raises ValueError for a level at which sampling cannot start."""

    # What the network is given beside the state (cascade.py)

    def condition(
        self, images: jax.Array, draw: jax.Array | None, gaussian: jax.Array | None
    ) -> Condition | None:
        """In training, of sharp images [b, h, w, c]; draw: uniform [b]. Here nothing."""
        return None

    def sampling_condition(self, noise_fn: NoiseFn, low_res: jax.Array | None) -> Condition | None:
        """In sampling, of images of the stage before [b, h/p, w/p, c]. Here nothing."""
        return None

    # Checks that need more than the values

    def check_training(self) -> None:
        """Raises ValueError for values that only sampling may have, or whose loss is not finite."""
        # No draw of float32 lies further out.
        ends = self.P_mean - 6 * self.P_std, self.P_mean + 6 * self.P_std
        check_levels(ends, self.sigma_data, self.weight_max)

    def check_resolution(self, resolution: Resolution) -> None:
        """Raises ValueError for images of a size that does not fit."""


@dataclass(frozen=True, kw_only=True)
class PatchProcess(EdmProcess):
    """A stage that continues images: levels by u, white and block noise, hand-offs.

    A derived class adds its blur within patches and the schedule of
    it: `blur`, `attenuation`, `blur_sigma`. patch: pixels per side of
    one pixel of the stage before, at least 1. block_noise_scale: of
    block noise, per unit of white noise. cdf_max: may exceed 1 in
    sampling; training needs at most 1. sigma_floor: the least sigma
    of training, before cdf_max. Others: EdmProcess. Raises
    ValueError for values that are no process.
    """

    starts_from_images: ClassVar[bool] = True

    weight_max: float = 1e5
    patch: int = 4  # type: ignore[misc]
    block_noise_scale: float = 0.15
    cdf_max: float = 0.93
    sigma_floor: float = 0.0075

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, ("block_noise_scale", "cdf_max", "sigma_floor"))
        require(self.patch >= 1, f"patch must be at least 1, not {self.patch}")
        require(self.cdf_max > 0, f"cdf_max must be positive, not {self.cdf_max}")
        require(self.sigma_floor > 0, f"sigma_floor must be positive, not {self.sigma_floor}")
        scale = self.block_noise_scale
        require(scale >= 0, f"block_noise_scale must not be negative ({scale})")

    @property
    def has_block_noise(self) -> bool:
        return self.block_noise_scale != 0

    def noise(self, white: jax.Array, block: jax.Array | None = None) -> jax.Array:
        """White plus block noise, variance 1 + block_noise_scale^2 (block_noise.py)."""
        return relay_noise(white, block, self.patch, self.block_noise_scale)

    def transform(self, x: jax.Array) -> jax.Array:
        return x if self.patch == 1 else patch_dct(x, self.patch)

    def inverse(self, coefficients: jax.Array) -> jax.Array:
        return coefficients if self.patch == 1 else patch_idct(coefficients, self.patch)

    def noise_power(self, resolution: Resolution) -> np.ndarray:
        return 1 + self.block_noise_scale**2 * block_noise_power(resolution, self.patch)

    def draw_level(self, key: jax.Array) -> jax.Array:
        """Uniform in [0, 1); `level` clamps it."""
        return jax.random.uniform(key)

    def level(self, draw: jax.Array) -> Level:
        """Raw uniform draws to levels, equations (3) to (5), same shape."""
        u = self.clamp(draw)
        return Level(self.sigma_from_u(u), self.blur_sigma(u))

    def draw_at(self, sigma: np.ndarray) -> np.ndarray:
        return np.minimum(self.u_from_sigma(sigma), 1.0)

    def cdf(self, sigma: np.ndarray) -> np.ndarray:
        """As for EDM, over cdf_max. The clamped draws all count to the lowest level."""
        return super().cdf(sigma) / self.cdf_max

    def sigma_range(self, tail: float) -> tuple[float, float]:
        lowest = float(self.sigma_from_u(jnp.float32(self.u_min)))
        return lowest, min(self.sigma_full_blur, super().sigma_range(tail)[1])

    def blur_sigma_at(self, sigma: np.ndarray) -> np.ndarray:
        return self.blur_sigma(self.u_from_sigma(sigma))

    def initial_state(
        self, sigma: float, noise_fn: NoiseFn, low_res: jax.Array | None = None
    ) -> jax.Array:
        """The hand-off of an image (docs/math.md section 6): [b, h, w, c].

        low_res [b, h/p, w/p, c] is up-sampled, neither clipped nor
        quantised, and noise added. Raises ValueError without low_res.
        """
        require(low_res is not None, "a relay stage starts from the images of the stage before")
        start = upsample(low_res, self.patch)
        block = noise_fn(0, Purpose.INITIAL_BLOCK) if self.has_block_noise else None
        noise = self.noise(noise_fn(0, Purpose.INITIAL_GAUSS), block)
        return start + sigma * noise

    def initial_state_from_noise(
        self, sigma: float, noise_fn: NoiseFn, low_state: jax.Array
    ) -> jax.Array:
        """The hand-off of a noisy state (docs/math.md section 6), in law the same: [b, h, w, c].

        low_state [b, h/p, w/p, c], of level sigma / patch, brings the
        patch means of the white noise: only its rest is drawn.
        """
        white = noise_fn(0, Purpose.INITIAL_GAUSS)
        block = noise_fn(0, Purpose.INITIAL_BLOCK) if self.has_block_noise else None
        noise = self.noise(white, block) - self.mean_blur(white)
        return upsample(low_state, self.patch) + sigma * noise

    def check_start(self, sigma: float) -> None:
        """Raises ValueError where the blur of the schedule weakens again."""
        require(0 < sigma < math.inf, f"handoff_sigma must be positive and finite, not {sigma}")
        require(
            sigma <= self.sigma_full_blur,
            f"handoff_sigma {sigma} lies above {self.sigma_full_blur:.4g}, the sigma where the "
            f"blur of cdf_max {self.cdf_max} is complete; lower it",
        )

    def check_training(self) -> None:
        require(
            self.cdf_max <= 1,
            f"process.cdf_max must be at most 1, not {self.cdf_max}: only sampling may exceed it",
        )
        inside = 0 < float(np.float32(self.u_min)) < 1 and self.sigma_floor < self.sigma_full_blur
        require(inside, f"sigma_floor {self.sigma_floor} lies outside of the levels of training")
        # The largest uniform draw of float32 is 1 - 2^-24.
        shares = self.cdf_max * np.array([self.u_min, 1 - 2.0**-24])
        low, high = self.P_mean + self.P_std * ndtri(shares)
        check_levels((low, high), self.sigma_data, self.weight_max)

    def check_resolution(self, resolution: Resolution) -> None:
        check_patch(*height_width(resolution), self.patch)

    # The schedule by u

    @property
    def u_min(self) -> float:
        """Smallest u that training sees, equation (3)."""
        cdf = ndtr((math.log(self.sigma_floor) - self.P_mean) / self.P_std)
        return float(self.cdf_max * cdf)

    @property
    def sigma_full_blur(self) -> float:
        """The sigma at which u = 1 and the blur is complete; infinite where cdf_max >= 1."""
        with np.errstate(over="ignore"):
            return float(np.exp(self.P_mean + self.P_std * ndtri(min(self.cdf_max, 1.0))))

    def clamp(self, uniform: jax.Array) -> jax.Array:
        """Raw uniform draws to u, equation (3), same shape.

        The official code multiplies the floor by cdf_max here and again
        in sigma(u), so that the smallest sigma is 0.00712 rather than
        sigma_floor = 0.0075; the published weights saw that.
        """
        return jnp.maximum(uniform, self.u_min)

    def sigma_from_u(self, u: jax.Array) -> jax.Array:
        """Equation (4), left: noise level of the (clamped) u in (0, 1]. Needs cdf_max <= 1."""
        return jnp.exp(self.P_mean + self.P_std * device_ndtri(self.cdf_max * u))

    def u_from_sigma(self, sigma: np.ndarray | float) -> np.ndarray:
        """Equation (4), right, in float64 on the host; 0 at sigma 0. Not clamped at 1."""
        with np.errstate(divide="ignore"):
            log_sigma = np.log(np.asarray(sigma, np.float64))
        return ndtr((log_sigma - self.P_mean) / self.P_std) / self.cdf_max

    def blur_sigma(self, u: jax.Array) -> jax.Array:
        """What `blur` takes at u: same shape and same array library as u, 0 at 0."""
        raise NotImplementedError(f"{type(self).__name__} has no schedule of its blur")


@dataclass(frozen=True, kw_only=True)
class RelayProcess(PatchProcess):
    """Relay stage: the patch-wise DCT blur of RDM, equation (5).

    blur_sigma_max: in pixels of the stage's own images. min_scale:
    what the strongest blur leaves of a frequency. A cdf_max above 1
    (CelebA-HQ's sampling: 1.05) only slows the blur. Others:
    PatchProcess. Raises ValueError for values that are no process.
    """

    blur_sigma_max: float = 3.0
    min_scale: float = MIN_SCALE

    def __post_init__(self) -> None:
        super().__post_init__()
        check_finite(self, ("blur_sigma_max",))
        require(0 <= self.min_scale <= 1, f"min_scale must lie in [0, 1], not {self.min_scale}")
        largest = self.blur_sigma_max
        require(largest >= 0, f"blur_sigma_max must not be negative ({largest})")

    def blur(self, x: jax.Array, blur_sigma: jax.Array) -> jax.Array:
        """B_s x, the patch-wise DCT blur (blur.py). Raises ValueError for a broken patch."""
        return blur(x, blur_sigma, self.patch, self.min_scale)

    def attenuation(self, blur_sigma: np.ndarray) -> np.ndarray:
        return attenuation_table(blur_sigma, self.patch, self.min_scale)

    def blur_sigma(self, u: jax.Array) -> jax.Array:
        """Equation (5): blur sigma in pixels, same shape and same array library as u."""
        xp = np if isinstance(u, np.ndarray | float) else jnp
        return self.blur_sigma_max * xp.square(xp.sin(0.5 * np.pi * u))

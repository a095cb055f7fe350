"""Non-leaking augmentation: six random transforms of the training images, told to the network as nine labels.

The network is conditioned on the labels; sampling passes zeros, that is, asks for images that nothing was done to
(EDM, arXiv 2206.00364, appendix F.2; the resampling is that of StyleGAN2-ADA, arXiv 2006.06676, appendix B).

    1. x-flip, y-flip           of the exact pixels
    2. s = 2^(scale_std n)      isotropic scale                                      n standard normal
    3. theta = pi (2u - 1)      rotation, times rotate_frac_max                      u uniform in [0, 1)
    4. a = 2^(aniso_std n)      x times a, y divided by a, in a frame at angle phi = pi (2u - 1), or 0 half of the time
    5. t = translate_frac_std n two shifts in image widths, x then y
    6. a target position q (pixels, from the image centre; y points down) shows the source position
       R(theta - phi) diag(1/a, a) R(phi) (q - t w) / s,    R(alpha) = [[cos, -sin], [sin, cos]]

Labels, zero where inactive: x-flip, y-flip, n of 2, cos(theta) - 1, sin(theta), n cos(phi) and n sin(phi) of 4, n of 5.

Resampling: reflect padding, 2x up-sampling with the sym6 low-pass, bilinear reading, 2x down-sampling with the same
filter, whose even shifts are orthogonal: without a transform the two filters undo each other exactly.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

NUM_LABELS = 9

# Daubechies' least asymmetric wavelet with six vanishing moments ("sym6"), low-pass, scaled to sum 1. It is not quite
# symmetric: this is the order in which down-sampling meets the samples; up-sampling is its transpose.
SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
]) / np.sqrt(2)  # fmt: skip
REACH = len(SYM6) // 2 - 1  # down-sampled pixel i reads the fine samples 2i - REACH ... 2i + 1 + REACH


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often and how strongly to transform; the defaults are EDM's, 0.12 to 0.15 its usual probabilities.

    A transform is active for an image with probability `min(1, multiplier * probability)`, on its own; a flip that is
    active is then done or not with equal chances. Probability 0 changes nothing at all; any other leaves the x-flip
    always active, by its huge multiplier. Multiplier 0 switches a transform off.
    """

    probability: float
    xflip: float = 1e8
    yflip: float = 1.0
    scale: float = 1.0
    rotate_frac: float = 1.0
    aniso: float = 1.0
    translate_frac: float = 1.0
    scale_std: float = 0.2  # of log2 of the factor
    rotate_frac_max: float = 1.0  # 1: the full circle
    aniso_std: float = 0.2  # of log2 of the factor
    translate_frac_std: float = 0.125  # of the image width

    def __post_init__(self) -> None:
        if not 0 <= self.probability <= 1:
            raise ValueError(f"probability must be between 0 and 1, not {self.probability}")
        negative = [f.name for f in dataclasses.fields(self) if getattr(self, f.name) < 0]
        if negative:
            raise ValueError(f"{', '.join(negative)} must not be negative")

    @property
    def resamples(self) -> bool:
        """Whether any image can need more than a flip."""
        return self.probability * max(self.scale, self.rotate_frac, self.aniso, self.translate_frac) > 0


class Draws(NamedTuple):
    """The random numbers of a batch, float32 [b] unless noted. Gates and uniforms lie in [0, 1)."""

    xflip_choice: jax.Array  # int32, 0 or 1
    xflip_gate: jax.Array  # active where gate < multiplier * probability; so are the others
    yflip_choice: jax.Array  # int32, 0 or 1
    yflip_gate: jax.Array
    scale_normal: jax.Array
    scale_gate: jax.Array
    rotate_frac_uniform: jax.Array
    rotate_frac_gate: jax.Array
    aniso_normal: jax.Array
    aniso_angle_uniform: jax.Array
    aniso_gate: jax.Array
    aniso_rotate_gate: jax.Array  # rotated frame where below 0.5, whatever the probability
    translate_frac_normal: jax.Array  # [2, b], x then y
    translate_frac_gate: jax.Array


def draw(key: jax.Array, batch: int) -> Draws:
    """Draws for `batch` images; those of image i depend on the key and i alone."""

    def one(index: jax.Array) -> Draws:
        choices, normals, uniforms = jax.random.split(jax.random.fold_in(key, index), 3)
        xflip, yflip = jax.random.randint(choices, (2,), 0, 2, jnp.int32)
        scale, aniso, *translate = jax.random.normal(normals, (4,), jnp.float32)
        rotate, angle, frame, *gates = jax.random.uniform(uniforms, (9,), jnp.float32)
        return Draws(
            xflip, gates[0], yflip, gates[1], scale, gates[2], rotate, gates[3],
            aniso, angle, gates[4], frame, jnp.stack(translate), gates[5],
        )  # fmt: skip

    draws = jax.vmap(one)(jnp.arange(batch))
    return draws._replace(translate_frac_normal=draws.translate_frac_normal.T)


def apply_draws(images: jax.Array, draws: Draws, augmentation: Augmentation) -> tuple[jax.Array, jax.Array]:
    """Transforms each image by its own draws.

    Args:
      images: [b, h, w, c] with h == w, in [-1, 1]. The result may overshoot by some percent where it is resampled.
      draws: from `draw`.
      augmentation: static under `jit`.
    Returns:
      images [b, h, w, c] and labels [b, 9], float32. An image without an active geometric transform keeps its pixels
      to the bit (the official code sends it through both filters, which changes it by 1e-6).
    """
    if images.ndim != 4 or images.shape[1] != images.shape[2]:
        raise ValueError(f"augmentation takes square images [b, h, h, c], not {images.shape}")
    images = images.astype(jnp.float32)
    p = augmentation.probability

    xflip = draws.xflip_choice * (draws.xflip_gate < augmentation.xflip * p)
    yflip = draws.yflip_choice * (draws.yflip_gate < augmentation.yflip * p)
    images = jnp.where(xflip[:, None, None, None] == 1, images[:, :, ::-1], images)
    images = jnp.where(yflip[:, None, None, None] == 1, images[:, ::-1], images)

    # An inactive transform is one whose normal or angle is 0: then its labels are 0 and its map is the identity.
    scale_on = draws.scale_gate < augmentation.scale * p
    rotate_on = draws.rotate_frac_gate < augmentation.rotate_frac * p
    aniso_on = draws.aniso_gate < augmentation.aniso * p
    translate_on = draws.translate_frac_gate < augmentation.translate_frac * p
    scale = jnp.where(scale_on, draws.scale_normal, 0)
    theta = jnp.where(rotate_on, jnp.pi * (2 * draws.rotate_frac_uniform - 1) * augmentation.rotate_frac_max, 0)
    aniso = jnp.where(aniso_on, draws.aniso_normal, 0)
    phi = jnp.where(aniso_on & (draws.aniso_rotate_gate < 0.5), jnp.pi * (2 * draws.aniso_angle_uniform - 1), 0)
    translate = jnp.where(translate_on, draws.translate_frac_normal, 0)

    labels = [xflip, yflip, scale, jnp.cos(theta) - 1, jnp.sin(theta), aniso * jnp.cos(phi), aniso * jnp.sin(phi)]
    labels = jnp.stack([*labels, *translate], axis=1).astype(jnp.float32)
    if not augmentation.resamples:
        return images, labels

    shrink = jnp.exp2(-augmentation.scale_std * scale)
    squeeze = jnp.exp2(-augmentation.aniso_std * aniso)
    stretch = jnp.stack([shrink * squeeze, shrink / squeeze], axis=1)  # the diagonal of (6), divided by s
    linear = (_rotation(theta - phi)[..., None] * stretch[:, None, :, None] * _rotation(phi)[:, None]).sum(2)
    shift = augmentation.translate_frac_std * images.shape[2] * translate.T
    moved = (scale_on | rotate_on | aniso_on | translate_on)[:, None, None, None]
    return jnp.where(moved, jax.vmap(_resample)(images, linear, shift), images), labels


def augment(images: jax.Array, key: jax.Array, augmentation: Augmentation) -> tuple[jax.Array, jax.Array]:
    """Transforms images [b, h, h, c] at random; returns them with labels [b, 9]."""
    return apply_draws(images, draw(key, len(images)), augmentation)


def _rotation(angle: jax.Array) -> jax.Array:
    """[b] -> [b, 2, 2], acting on (x, y)."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, -sin], 1), jnp.stack([sin, cos], 1)], 1)


def _resample(image: jax.Array, linear: jax.Array, shift: jax.Array) -> jax.Array:
    """The image [w, w, c] whose position q shows the source position linear [2, 2] times (q - shift [2]).

    Cost: the padded and up-sampled image has (6w-4)^2 pixels, of which (2w+10)^2 positions are read. At 256 pixels
    and three channels that is 28 MB and 3 MB per image, and 4 GFLOP for the filters.
    """
    width = image.shape[0]
    up, down = _up_matrix(width), _down_matrix(width)
    fine = _filter(up, image)
    target = (np.arange(2 * width + 2 * REACH) - REACH + 1) / 2 - width / 2
    x, y = target[None, :] - shift[0], target[:, None] - shift[1]  # written out, as a matrix product may be rounded
    column, row = (2 * (m[0] * x + m[1] * y) + len(up) / 2 - 1 for m in linear)

    def read(channel: jax.Array) -> jax.Array:
        return jax.scipy.ndimage.map_coordinates(channel, [row, column], order=1, mode="constant", cval=0.0)

    return _filter(down, jax.vmap(read, in_axes=-1, out_axes=-1)(fine))


def _filter(matrix: np.ndarray, image: jax.Array) -> jax.Array:
    """Applies the matrix [n, w] to the rows and columns of an image [w, w, c] -> [n, n, c]."""
    precision = jax.lax.Precision.HIGHEST
    image = jnp.einsum("nw,hwc->hnc", matrix, image, precision=precision)
    return jnp.einsum("mh,hnc->mnc", matrix, image, precision=precision)


def _down_matrix(width: int) -> np.ndarray:
    """[w, 2w + 2 REACH]: filters and keeps every second sample. The first REACH samples lie left of the image."""
    matrix = np.zeros((width, 2 * width + 2 * REACH), np.float32)
    for i in range(width):
        matrix[i, 2 * i : 2 * i + len(SYM6)] = SYM6
    return matrix


def _up_matrix(width: int) -> np.ndarray:
    """[6w-4, w]: reflect padding by w - 1 on both sides, then up-sampling.

    The margin is the largest that reflection without repetition allows, so that one shape serves every draw. What is
    beyond it (reached by strong shrinking together with a shift) is zero.
    """
    padded = np.pad(np.eye(width), ((width - 1, width - 1), (0, 0)), mode="reflect")
    filters = 2 * _down_matrix(len(padded)).T[REACH:-REACH]
    return (filters @ padded).astype(np.float32)

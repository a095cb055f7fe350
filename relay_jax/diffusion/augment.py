"""Non-leaking augmentation: random transforms that the network is told of (docs/math.md section 7).

The network is conditioned on nine labels; sampling passes zeros, that
is, asks for images that nothing was done to. Sources: EDM, arXiv
2206.00364, appendix F.2; for the resampling StyleGAN2-ADA, arXiv
2006.06676, appendix B. With n standard normal and u uniform in [0, 1),
drawn anew for each:

(1)  x-flip, y-flip           of the exact pixels
(2)  s = 2^(scale_std n)      isotropic scale
(3)  theta = pi (2u - 1)      rotation, times rotate_frac_max; anticlockwise
(4)  a = 2^(aniso_std n)      x times a, y divided by a, in a frame at angle phi = pi (2u - 1),
                              or 0 half of the time
(5)  t = translate_frac_std n two shifts in image widths, x then y (down)
(6)  position q of the result, in pixels from the centre, shows position
         R(theta - phi) diag(1/a, a) R(phi) (q - t w) / s,    R(alpha) = [[cos, -sin], [sin, cos]]
     of the (flipped) image

Labels, zero where inactive: x-flip, y-flip, n of (2), cos(theta) - 1,
sin(theta), n cos(phi) and n sin(phi) of (4), n of (5).

Resampling: reflect padding, 2x up-sampling with the sym6 low-pass,
bilinear reading, 2x down-sampling with the same filter, whose even
shifts are orthogonal: without a transform the two filters undo each
other exactly.
"""

import dataclasses
from functools import partial
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np

NUM_LABELS = 9

# Daubechies' least asymmetric wavelet with six vanishing moments
# ("sym6"), low-pass, scaled to sum 1. Its centre of mass is close to
# tap 5, which is why a fine sample lies on each pixel. Up-sampling
# is the transpose of down-sampling.
SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633,
    0.4910559419267466, 0.787641141030194, 0.3379294217276218, -0.07263752278646252,
    -0.021060292512300564, 0.04472490177066578, 0.0017677118642428036, -0.007800708325034148,
]) / np.sqrt(2)  # fmt: skip
# Down-sampled pixel i reads the fine
# samples 2i - REACH ... 2i + 1 + REACH.
REACH = len(SYM6) // 2 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """How often and how strongly to transform; the defaults are EDM's.

    A transform is active for an image with probability `min(1, multiplier * probability)`, on its
    own; a flip that is active is then done or not with equal chances. EDM's usual probabilities are
    0.12 to 0.15; 0 changes nothing at all. Multiplier 0 switches a transform off.
    Raises ValueError for a probability outside [0, 1] or negative settings.
    """

    probability: float
    # So large that the x-flip is always active, whatever the
    # (positive) probability.
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
        return (
            self.probability * max(self.scale, self.rotate_frac, self.aniso, self.translate_frac)
            > 0
        )


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


def draw(key: jax.Array, batch: int, index: jax.Array | None = None) -> Draws:
    """Draws for `batch` images; those of image i depend on the key and its place alone.

    index: int [batch], the images' places in the whole batch, by
    default 0, 1, ...
    """
    if index is None:
        index = jnp.arange(batch)
    chex.assert_shape(index, (batch,), custom_message="index must be [batch]")
    chex.assert_type(index, int, custom_message="index must be of whole numbers")
    draws = jax.vmap(partial(_draw_one, key))(index)
    return draws._replace(translate_frac_normal=draws.translate_frac_normal.T)


def _draw_one(key: jax.Array, place: jax.Array) -> Draws:
    """The draws of the image at a place in the batch, scalars."""
    normals, uniforms = jax.random.split(jax.random.fold_in(key, place))
    normal = jax.random.normal(normals, (4,), jnp.float32)
    uniform = jax.random.uniform(uniforms, (11,), jnp.float32)
    choice = (uniform[:2] < 0.5).astype(jnp.int32)
    # The places are part of every run's numbers: never change one.
    return Draws(
        choice[0], uniform[2], choice[1], uniform[3], normal[0], uniform[4], uniform[5], uniform[6],
        normal[1], uniform[7], uniform[8], uniform[9], normal[2:], uniform[10],
    )  # fmt: skip


def apply_draws(
    images: jax.Array, draws: Draws, augmentation: Augmentation
) -> tuple[jax.Array, jax.Array]:
    """Transforms each image by its own draws, equations (1) to (6).

    images: [b, h, h, c] in [-1, 1]; the filters may overshoot this
    range a little, which is left so. draws: from `draw`.
    augmentation: static under `jit`.
    Returns images [b, h, h, c] and labels [b, 9], float32. Raises
    ValueError for images that are not square.
    """
    chex.assert_rank(images, 4, custom_message="images must be [b, h, h, c]")
    chex.assert_type(images, float, custom_message="images must be floating-point, in [-1, 1]")
    message = "draws must hold one number per image (translate_frac_normal: two)"
    for name, values in draws._asdict().items():
        shape = (2, len(images)) if name == "translate_frac_normal" else (len(images),)
        chex.assert_shape(values, shape, custom_message=message)
    if images.shape[1] != images.shape[2]:
        raise ValueError(f"augmentation takes square images [b, h, h, c], not {images.shape}")
    images = images.astype(jnp.float32)
    p = augmentation.probability

    xflip = draws.xflip_choice * (draws.xflip_gate < augmentation.xflip * p)
    yflip = draws.yflip_choice * (draws.yflip_gate < augmentation.yflip * p)
    images = jnp.where(xflip[:, None, None, None] == 1, images[:, :, ::-1], images)
    images = jnp.where(yflip[:, None, None, None] == 1, images[:, ::-1], images)

    # An inactive transform is one whose normal or angle is 0: then
    # its labels are 0 and its map is the identity.
    scale_on = draws.scale_gate < augmentation.scale * p
    rotate_on = draws.rotate_frac_gate < augmentation.rotate_frac * p
    aniso_on = draws.aniso_gate < augmentation.aniso * p
    translate_on = draws.translate_frac_gate < augmentation.translate_frac * p
    scale = jnp.where(scale_on, draws.scale_normal, 0)
    theta = jnp.where(
        rotate_on,
        jnp.pi * (2 * draws.rotate_frac_uniform - 1) * augmentation.rotate_frac_max,
        0,
    )
    aniso = jnp.where(aniso_on, draws.aniso_normal, 0)
    phi = jnp.where(
        aniso_on & (draws.aniso_rotate_gate < 0.5),
        jnp.pi * (2 * draws.aniso_angle_uniform - 1),
        0,
    )
    translate = jnp.where(translate_on, draws.translate_frac_normal, 0)

    labels = [
        xflip,
        yflip,
        scale,
        jnp.cos(theta) - 1,
        jnp.sin(theta),
        aniso * jnp.cos(phi),
        aniso * jnp.sin(phi),
    ]
    labels = jnp.stack([*labels, *translate], axis=1).astype(jnp.float32)
    if not augmentation.resamples:
        return images, labels

    shrink = jnp.exp2(-augmentation.scale_std * scale)
    squeeze = jnp.exp2(-augmentation.aniso_std * aniso)
    stretch = jnp.stack([shrink * squeeze, shrink / squeeze], axis=1)  # diag(1/a, a) / s
    linear = (
        _rotation(theta - phi)[..., None] * stretch[:, None, :, None] * _rotation(phi)[:, None]
    ).sum(2)
    shift = augmentation.translate_frac_std * images.shape[2] * translate.T
    # An image without an active transform keeps its pixels to the
    # bit; the official code sends it through both filters, which
    # changes it by 1e-6.
    moved = (scale_on | rotate_on | aniso_on | translate_on)[:, None, None, None]
    return jnp.where(moved, jax.vmap(_resample)(images, linear, shift), images), labels


def augment(
    images: jax.Array,
    key: jax.Array,
    augmentation: Augmentation,
    index: jax.Array | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Transforms images [b, h, h, c] at random, `apply_draws` of `draw`.

    index: int [b], the images' places in the whole batch, by default
    0, 1, ... Returns images [b, h, h, c] and labels [b, 9], float32.
    """
    return apply_draws(images, draw(key, len(images), index), augmentation)


def _rotation(angle: jax.Array) -> jax.Array:
    """[b] -> [b, 2, 2], acting on (x, y)."""
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([cos, -sin], 1), jnp.stack([sin, cos], 1)], 1)


def _resample(image: jax.Array, linear: jax.Array, shift: jax.Array) -> jax.Array:
    """The image [w, w, c] that shows at q what was at `linear [2, 2] (q - shift [2])`, see (6)."""
    # Cost per image: the padded and up-sampled image has
    # (6w-4)^2 pixels, of which (2w+10)^2 positions are read.
    # For 256 pixels and three channels that is 28 MB and 3
    # MB (33 MB of temporaries as compiled) and 5 GFLOP in
    # the filters; for 32 pixels 0.5 MB and 0.01 GFLOP.
    width = image.shape[0]
    fine = _filter(_up_matrix(width), image)

    # Fine sample 2k lies on pixel k, for
    # the image as for its padded version.
    q = (np.arange(-REACH, 2 * width + REACH, dtype=np.float32) - (width - 1)) / 2
    x, y = q[None, :] - shift[0], q[:, None] - shift[1]
    # Written out, as an accelerator may round a matrix product.
    column, row = (2 * (m[0] * x + m[1] * y) + (len(fine) / 2 - 1) for m in linear)
    read = partial(_read, row, column)
    return _filter(_down_matrix(width), jax.vmap(read, in_axes=-1, out_axes=-1)(fine))


def _read(row: jax.Array, column: jax.Array, channel: jax.Array) -> jax.Array:
    """Bilinear reading of one channel [h, w] at positions [n, m]; zero outside."""
    return jax.scipy.ndimage.map_coordinates(
        channel, [row, column], order=1, mode="constant", cval=0.0
    )


def _filter(matrix: np.ndarray, image: jax.Array) -> jax.Array:
    """Applies the matrix [n, w] to the rows and the columns of an image [w, w, c] -> [n, n, c]."""
    precision = jax.lax.Precision.HIGHEST
    image = jnp.einsum("nw,hwc->hnc", matrix, image, precision=precision)
    return jnp.einsum("mh,hnc->mnc", matrix, image, precision=precision)


def _down_matrix(width: int) -> np.ndarray:
    """[w, 2w + 2 REACH]: low-pass, then every second sample.

    The first REACH samples lie left of the image.
    """
    matrix = np.zeros((width, 2 * width + 2 * REACH), np.float32)
    for i in range(width):
        matrix[i, 2 * i : 2 * i + len(SYM6)] = SYM6
    return matrix


def _up_matrix(width: int) -> np.ndarray:
    """[6w-4, w]: reflect padding by w - 1, then a zero between samples and the low-pass."""
    # The margin is the widest that can be reflected, so that one
    # shape serves all draws. What lies beyond reads zero: to get
    # there, a draw must shrink and shift the image to less than
    # about a third.
    margin = (width - 1, width - 1)
    padded = np.pad(np.eye(width, dtype=np.float32), (margin, (0, 0)), mode="reflect")
    return 2 * _down_matrix(len(padded)).T[REACH:-REACH] @ padded

"""A forward process of your own: a relay stage with another blur.

The built-in blur convolves with a gaussian: it attenuates a frequency f by exp(-f^2 s^2 / 2). This
one convolves with a Cauchy kernel, which has a sharper peak and longer tails:

(1)  a[k, l](s) = (1 - m) exp(-(f_k + f_l) s) + m,      f_k = pi k / p,  m = min_scale
(2)  B_s X = m X + (1 - m) A X A^T,                     A = C^T diag(exp(-f s)) C

for each patch X of p x p pixels; C is the DCT matrix (docs/math.md section 1). In a configuration:

    config.stages.relay.process.kind = "examples.new_process:CauchyRelay"

or from the command line, for a new run,

    python -m relay_jax.main --config=demo --workdir=runs/cauchy \\
        --config.stages.relay.process.kind=examples.new_process:CauchyRelay

The training loss, the samplers and the pictures only ever ask a process to `blur`, so one method is
all that changes. Any blur will do that keeps three promises, which the tests check: s = 0 changes
nothing; s -> infinity leaves the means of the patches, where the hand-off starts; and it is linear
in the image.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from relay_jax.diffusion.dct import apply_per_patch, dct_matrix
from relay_jax.diffusion.process import RelayProcess


@dataclass(frozen=True, kw_only=True)
class CauchyRelay(RelayProcess):
    """A relay stage whose blur has a Cauchy kernel of half width s; all else as in RelayProcess.

    `blur_sigma_max` is then the largest half width, in pixels of the stage's own images.
    """

    def blur(self, x: jax.Array, blur_sigma: jax.Array) -> jax.Array:
        """Equation (2) of images [b, h, w, c]; blur_sigma: scalar or [b], in pixels of x."""
        matrix = cauchy_matrix(jnp.asarray(blur_sigma, jnp.float32), self.patch)
        return self.min_scale * x + (1 - self.min_scale) * apply_per_patch(x, matrix)


def cauchy_matrix(blur_sigma: jax.Array, patch: int) -> jax.Array:
    """The matrix A of equation (2). blur_sigma: [...] in pixels. Returns [..., p, p]."""
    c = dct_matrix(patch)
    # Tables on the host in float64, rounded once.
    frequency = jnp.asarray(np.pi * np.arange(patch) / patch, jnp.float32)
    outer = jnp.asarray((c[:, :, None] * c[:, None, :]).reshape(patch, -1), jnp.float32)
    decay = jnp.exp(-frequency * blur_sigma[..., None])
    # HIGHEST: accelerators would round the factors to bfloat16, and patch means would drift.
    product = jnp.matmul(decay, outer, precision=lax.Precision.HIGHEST)
    return product.reshape(*decay.shape, patch)

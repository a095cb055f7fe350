"""DINOv2's transformer, its positions and its weights, against a second implementation in numpy.

Compared once with Hugging Face's Dinov2Model at random weights; the positions with torch's
interpolate.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np
import pytest
from scipy.special import erf, softmax

from relay_jax.config import EvaluateSettings
from relay_jax.errors import UserError
from relay_jax.evaluation import dinov2, features
from relay_jax.evaluation.dinov2 import DINOV2, VIT_L14, Size, convert, resized_positions
from relay_jax.evaluation.features import FeatureExtractor, file_of, make_extractor
from relay_jax.evaluation.network import cubic_resize
from tests.conftest import mesh_of
from tests.official import torch_writer as tw

SMALL = Size(side=20, patch=4, grid=7, width=12, blocks=3, heads=3)


def random_state(size: Size) -> dict[str, np.ndarray]:
    """Random weights under the names and shapes of Meta's file."""
    d, rng = size.width, np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, d),
        "pos_embed": (1, size.grid**2 + 1, d),
        "mask_token": (1, d),
        "patch_embed.proj.weight": (d, 3, size.patch, size.patch),
        "patch_embed.proj.bias": (d,),
        "norm.weight": (d,),
        "norm.bias": (d,),
    }
    for number in range(size.blocks):
        linear = {"attn.qkv": (3 * d, d), "attn.proj": (d, d)}
        linear |= {"mlp.fc1": (4 * d, d), "mlp.fc2": (d, 4 * d)}
        for name, shape in linear.items():
            shapes[f"blocks.{number}.{name}.weight"] = shape
            shapes[f"blocks.{number}.{name}.bias"] = shape[:1]
        for name in ("norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"):
            shapes[f"blocks.{number}.{name}"] = (d,)
        for name in ("ls1.gamma", "ls2.gamma"):
            shapes[f"blocks.{number}.{name}"] = (d,)
    return {name: rng.normal(0, 0.4, shape).astype(np.float32) for name, shape in shapes.items()}


def reference(state: dict[str, np.ndarray], size: Size, image: np.ndarray) -> np.ndarray:
    """The class token [d] of an image [side, side, 3], patch by patch and head by head."""

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(x: np.ndarray, name: str) -> np.ndarray:
        x = x - x.mean(axis=-1, keepdims=True)
        x = x / np.sqrt((x * x).mean(axis=-1, keepdims=True) + 1e-6)
        return x * state[f"{name}.weight"] + state[f"{name}.bias"]

    state = {name: array.astype(np.float64) for name, array in state.items()}
    n, p, c = size.patches, size.patch, size.width // size.heads
    image = (image / 255 - np.array([0.485, 0.456, 0.406])) / np.array([0.229, 0.224, 0.225])
    tokens = [state["cls_token"][0, 0]]
    for i in range(n):
        for j in range(n):
            patch = image[i * p : (i + 1) * p, j * p : (j + 1) * p].transpose(2, 0, 1)
            product = (state["patch_embed.proj.weight"] * patch).sum(axis=(1, 2, 3))
            tokens.append(product + state["patch_embed.proj.bias"])
    positions = state["pos_embed"][0]
    x = np.stack(tokens)
    x += np.concatenate([positions[:1], resized_positions(positions[1:], size.grid, n)])
    for number in range(size.blocks):
        block = f"blocks.{number}"
        qkv = linear(norm(x, f"{block}.norm1"), f"{block}.attn.qkv")
        heads = []
        for head in range(size.heads):
            q, k, v = (qkv[:, part * size.width + head * c :][:, :c] for part in range(3))
            heads.append(softmax(q @ k.T / np.sqrt(c), axis=1) @ v)
        x = x + state[f"{block}.ls1.gamma"] * linear(np.hstack(heads), f"{block}.attn.proj")
        y = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        y = linear(y * (1 + erf(y / np.sqrt(2))) / 2, f"{block}.mlp.fc2")
        x = x + state[f"{block}.ls2.gamma"] * y
    return norm(x, "norm")[0]


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    return random_state(SMALL)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """The features by their name, with a network of SMALL."""
    network = replace(
        DINOV2,
        inputs=partial(dinov2.inputs, side=SMALL.side),
        apply=partial(dinov2.outputs, size=SMALL),
        read=partial(dinov2.read_weights, size=SMALL),
    )
    monkeypatch.setitem(features.FEATURES, DINOV2.name, partial(features._network, network))


def written(state: dict[str, np.ndarray], path: Path) -> Path:
    storages = tw.Storages(True, legacy=False)
    tensors = {name: storages.tensor(array) for name, array in state.items()}
    return tw.write_zip(path, tw.state_dict(tensors), storages)


def extractor(path: Path) -> FeatureExtractor:
    return make_extractor("dinov2-vitl14", weights=path, mesh=mesh_of(1), batch=2)


@pytest.mark.usefixtures("small")
def test_from_pixels_and_a_file_to_the_class_token(
    state: dict[str, np.ndarray], tmp_path: Path
) -> None:
    pixels = np.random.default_rng(1).integers(0, 256, (3, 11, 14, 3)).astype(np.uint8)
    made = extractor(written(state, tmp_path / "weights.pth"))
    outputs = made(pixels)["pool"]
    assert outputs.shape == (3, 12) and outputs.dtype == np.float32
    resized = np.asarray(cubic_resize(pixels, SMALL.side), np.float64)
    expected = np.stack([reference(state, SMALL, image) for image in resized])
    np.testing.assert_allclose(outputs, expected, rtol=0, atol=3e-5 * np.abs(expected).max())
    # Another image is another point, and the protocol is said with it.
    assert np.abs(expected[0] - expected[1]).max() > 100 * np.abs(outputs - expected).max()
    assert made.identity["name"] == "dinov2-vitl14" and len(str(made.identity["sha256"])) == 64


def test_positions_are_interpolated_as_torch_does_it() -> None:
    """interpolate(x, scale_factor=5.1 / 7, mode="bicubic") of torch 2.13, x = 37 i mod 11."""
    expected = [
        [1.6889389, 7.0423007, 2.2720816, 5.6519345, 4.8081705],
        [3.9091701, 7.903937, 4.1926916, 4.6978955, 6.0017627],
        [5.6730089, 1.3147756, 7.985709, 1.3790843, 8.0939045],
        [3.547073, 8.1769861, 4.6124941, 4.6438915, 3.9284433],
        [4.9283764, 2.3729413, 5.5732023, 4.8547384, 5.4598466],
    ]
    positions = (np.arange(49.0) * 37 % 11)[:, None]
    resized = resized_positions(positions, 7, 5)
    np.testing.assert_allclose(resized.reshape(5, 5), expected, atol=1e-6)
    np.testing.assert_array_equal(resized_positions(positions, 7, 7), positions)
    np.testing.assert_allclose(resized_positions(np.ones((49, 2)), 7, 3), np.ones((9, 2)))


def test_the_published_network_has_as_many_numbers() -> None:
    """304,368,640 trained parameters with the token of masks; 1,370 positions become 257."""
    network, image = dinov2.VisionTransformer(VIT_L14), np.zeros((1, 224, 224, 3), np.float32)
    shape = jax.eval_shape(network.init, jax.random.key(0), image)
    count = sum(leaf.size for leaf in jax.tree.leaves(shape))
    assert count == 304_368_640 - 1024 - (1370 - 257) * 1024


def test_other_weights_are_refused(state: dict[str, np.ndarray]) -> None:
    params = convert(state, SMALL)
    template = jax.eval_shape(
        dinov2.VisionTransformer(SMALL).init, jax.random.key(0), np.zeros((1, 20, 20, 3))
    )["params"]
    assert jax.tree.map(np.shape, params) == jax.tree.map(lambda leaf: leaf.shape, template)
    without = {name: a for name, a in state.items() if name != "blocks.2.ls1.gamma"}
    with pytest.raises(UserError, match=r"blocks\.2\.ls1\.gamma is missing"):
        convert(without, SMALL)
    with pytest.raises(UserError, match=r"register_tokens has no place"):
        convert(state | {"register_tokens": np.zeros((1, 4, 12))}, SMALL)
    with pytest.raises(UserError, match=r"\[1, 50, 12\], not \[1, 1370, 1024\]"):
        convert(state, VIT_L14)


def test_the_file_is_named_by_its_own_flag(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--dinov2=FILE"):
        make_extractor("dinov2-vitl14", weights=None, mesh=mesh_of(1))
    with pytest.raises(UserError, match=r"no such file.*--dinov2=FILE"):
        extractor(tmp_path / "nothing.pth")
    settings = EvaluateSettings(samples=4, inception="i.pth", dinov2="d.pth")
    assert file_of("dinov2-vitl14", settings) == Path("d.pth")
    assert file_of("inception", settings) == Path("i.pth")
    named = {"dinov2": tmp_path}
    assert file_of("dinov2-vitl14", settings, named.get) == tmp_path
    # A file that these features do not read is there to be refused.
    assert file_of("random-conv", settings) is not None
    assert file_of("random-conv", EvaluateSettings(samples=4)) is None

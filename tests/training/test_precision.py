"""bfloat16 activations against float32: loss and gradient of both stages, with labels, dropout
and attention."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from relay_jax.config import Stage, build
from relay_jax.models.unet import init_params
from relay_jax.training.step import make_loss_fn

LOSS_TOLERANCE, GRADIENT_TOLERANCE = (
    0.002,
    0.02,
)  # relative, of the gradient its norm; measured 0.0004 and 0.004


def loss_and_gradient(stage: Stage, dtype: str) -> tuple[float, np.ndarray]:
    """With parameters that are zero nowhere, or most of the gradient would be."""
    stage = replace(stage, network=stage.network.clone(dtype=jnp.dtype(dtype), dropout=0.1))
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: init_params(stage.network, jax.random.key(0)))
    params = jax.tree.map(
        lambda leaf: np.float32(
            rng.normal(size=leaf.shape) / np.sqrt(np.prod(leaf.shape[:-1]) or 1)
            if leaf.ndim > 1
            else 1 + 0.1 * rng.normal(size=leaf.shape)
        ),
        shapes,
    )
    side = stage.resolution
    batch = {
        "image": rng.integers(0, 256, (8, side, side, 3), np.uint8),
        "label": np.arange(8, dtype=np.int32),
    }
    value, gradient = jax.jit(jax.value_and_grad(make_loss_fn(stage)))(
        params, batch, jnp.arange(8), jax.random.key(1)
    )
    return float(value), np.concatenate([np.ravel(leaf) for leaf in jax.tree.leaves(gradient)])


@pytest.mark.parametrize("index", [0, 1], ids=["base", "relay"])
def test_bfloat16_agrees_with_float32_on_loss_and_gradient(config: ConfigDict, index: int) -> None:
    stage = build(config)[index]
    (value, gradient), (half_value, half_gradient) = (
        loss_and_gradient(stage, d) for d in ("float32", "bfloat16")
    )
    assert half_value == pytest.approx(value, rel=LOSS_TOLERANCE) and half_value != value
    assert np.linalg.norm(half_gradient - gradient) < GRADIENT_TOLERANCE * np.linalg.norm(gradient)

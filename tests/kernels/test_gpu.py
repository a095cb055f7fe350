"""The GPU's formulations: when they are chosen, and on a GPU that they compute the same."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.models import ops
from relay_jax.models.kernels import gpu, plain


@pytest.mark.parametrize(
    "dtype, width, fused", [("bfloat16", 64, True), ("float32", 64, False), ("bfloat16", 12, False)]
)
def test_fused_attention_is_for_16_bit_heads_on_a_gpu_alone(monkeypatch, dtype, width, fused):
    class Card:
        platform, compute_capability = "gpu", "9.0"

        class client:
            platform_version = "PJRT C API\ncuda 13000"

    qkv = jax.ShapeDtypeStruct((2, 16, 3 * 2 * width), jnp.dtype(dtype))
    assert not gpu.pays_fused(qkv, 2)  # the tests run on a CPU
    monkeypatch.setattr(jax, "devices", lambda: [Card])
    assert gpu.pays_fused(qkv, 2) == fused
    monkeypatch.setattr(Card, "compute_capability", "7.5")
    assert not gpu.pays_fused(qkv, 2)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs a GPU")
def test_attention_on_a_gpu_is_the_plain_one_but_for_rounding():
    qkv = jax.random.normal(jax.random.key(0), (2, 64, 3 * 128)).astype(jnp.bfloat16)
    expected = plain.attend(qkv.astype(jnp.float32), 2)
    out = jax.jit(ops.attend, static_argnums=1)(qkv, 2)
    np.testing.assert_allclose(out.astype(jnp.float32), expected, atol=0.03)

"""What TPUs compute differently: attention by head, against its definition in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from relay_jax.models.tpu import attend, attend_by_head

SHAPE = (2, 6, 3, 4)        # images, pixels, heads, channels per head


def softmax_attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    scores = np.einsum("bqnd,bknd->bnqk", q, k) / np.sqrt(q.shape[-1])
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bnqk,bknd->bqnd", weights / weights.sum(-1, keepdims=True), v)


def inputs(scale: float = 1.0) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [scale * rng.normal(size=SHAPE) for _ in range(3)]


@pytest.mark.parametrize("scale", [1.0, 30.0])      # scores of some hundreds would overflow an exponential alone
def test_attention_by_head_equals_its_definition(scale: float) -> None:
    q, k, v = inputs(scale)
    got = jax.jit(attend_by_head)(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)))
    np.testing.assert_allclose(got, softmax_attention(q, k, v), atol=2e-5 * scale)


def test_attention_by_head_has_the_gradient_of_the_plain_one() -> None:
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs()]
    cotangent = jnp.asarray(np.random.default_rng(1).normal(size=SHAPE), jnp.float32)
    got, want = (jax.jit(lambda *a, f=f: jax.vjp(f, *a)[1](cotangent))(*arrays)
                 for f in (attend_by_head, jax.nn.dot_product_attention))
    for one, other in zip(got, want, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_attention_by_head_rounds_bfloat16_no_more_than_the_plain_one() -> None:
    arrays = [jnp.asarray(x, jnp.bfloat16) for x in inputs()]
    want = softmax_attention(*(np.asarray(x, np.float64) for x in arrays))
    error, plain = (np.abs(np.asarray(jax.jit(f)(*arrays), np.float64) - want).max()
                    for f in (attend_by_head, jax.nn.dot_product_attention))
    assert error < 1.5 * plain and error < 0.02


def test_other_platforms_compile_the_plain_attention() -> None:
    arrays = [jnp.asarray(x, jnp.float32) for x in inputs()]
    np.testing.assert_array_equal(jax.jit(attend)(*arrays), jax.jit(jax.nn.dot_product_attention)(*arrays))
    shape = jax.ShapeDtypeStruct(SHAPE, jnp.float32)

    def loops(platform: str) -> bool:
        return "while" in jax.jit(attend).trace(shape, shape, shape).lower(lowering_platforms=(platform,)).as_text()

    assert loops("tpu") and not loops("cpu") and not loops("cuda")

"""Formulations of the U-Net's operations for NVIDIA GPUs (docs/lab/gpu.md has what each gains)."""

import jax
import jax.numpy as jnp

_MOST_WIDE = 128  # channels of a head that cuDNN takes, in steps of 8


def pays_fused(qkv: jax.Array, heads: int) -> bool:
    """Whether cuDNN's attention serves [b, n, 3c]: 16-bit numbers, on Ampere and later."""
    # Asked while a program is traced: where there is no cuDNN its
    # attention cannot even be traced.
    width = qkv.shape[-1] // 3 // heads
    if qkv.dtype not in (jnp.bfloat16, jnp.float16) or width % 8 or width > _MOST_WIDE:
        return False
    device = jax.devices()[0]
    if device.platform != "gpu" or "cuda" not in device.client.platform_version:
        return False
    return tuple(map(int, device.compute_capability.split("."))) >= (8, 0)


def fused_attend(qkv: jax.Array, heads: int) -> jax.Array:
    """plain.attend by cuDNN's flash attention: [b, n, 3c] -> [b, n, c].

    The scores never leave the chip, forwards or backwards
    (arXiv 2205.14135); softmax and sums are float32.
    """
    b, n, channels = qkv.shape
    q, k, v = jnp.moveaxis(qkv.reshape(b, n, 3, heads, -1), 2, 0)
    out = jax.nn.dot_product_attention(q, k, v, implementation="cudnn")
    return out.reshape(b, n, channels // 3)

"""Parts of the published networks on a GPU, one by one, in bfloat16: what each reaches alone.

    python -m benchmarks.gpu_parts

Ceilings first: a matrix product and a copy. Then 3 x 3 convolutions with both gradients,
attention as plain JAX and as the networks run it, normalisation with silu. What whole steps reach:
benchmarks/throughput.py.
"""

import json
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from benchmarks.programs import machine, markdown
from relay_jax.models import ops
from relay_jax.models.blocks import group_affine
from relay_jax.models.kernels import plain

CALLS, ROUNDS = 10, 3
# images, pixels per side, channels in and out: of the relay at 256 px and the base at 64 px
CONVOLUTIONS = (
    (16, 256, 256, 256),
    (16, 128, 256, 256),
    (16, 64, 512, 512),
    (16, 32, 512, 512),
    (16, 16, 1024, 1024),
    (64, 64, 192, 192),
    (64, 32, 384, 384),
    (64, 16, 576, 576),
    (64, 8, 768, 768),
)
ATTENTIONS = ((16, 32, 8), (16, 16, 16), (64, 32, 6), (64, 16, 9))  # images, pixels, heads of 64
NORMS = ((16, 256, 256), (64, 64, 192))  # images, pixels, channels


def seconds(function: Callable[..., Any], *inputs: jax.Array) -> float:
    """Of one call: the fastest of some rounds of calls that do not wait for each other."""
    compiled, best = jax.jit(function), float("inf")
    jax.block_until_ready(compiled(*inputs))
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for _ in range(CALLS):
            result = compiled(*inputs)
        jax.block_until_ready(result)
        best = min(best, (time.perf_counter() - start) / CALLS)
    return best


def normal(*shape: int) -> jax.Array:
    return jax.random.normal(jax.random.key(0), shape).astype(jnp.bfloat16)


def row(part: str, time: float, flops: float = 0.0, moved: float = 0.0) -> dict[str, Any]:
    """A row of the table. flops: done. moved: bytes read and written at least."""
    rate = f"{flops / time / 1e12:.0f}" if flops else ""
    width = f"{moved / time / 1e12:.2f}" if moved else ""
    found = {"part": part, "ms": f"{time * 1e3:.3f}", "TFLOP/s": rate, "TB/s": width}
    print(json.dumps(found), flush=True)
    return found


def with_gradient(function: Callable[..., jax.Array]) -> Callable[..., Any]:
    """(cotangent, *inputs) -> gradients, the forward pass included."""
    return lambda cotangent, *inputs: jax.vjp(function, *inputs)[1](cotangent)


def ceilings() -> list[dict[str, Any]]:
    a, b, x = normal(8192, 8192), normal(8192, 8192), normal(2**30)
    return [
        row("product, 8192 x 8192 x 8192", seconds(jnp.matmul, a, b), 2.0 * 8192**3),
        row("add one to 2 GiB", seconds(lambda x: x + 1, x), moved=2.0 * x.nbytes),
    ]


def convolutions() -> list[dict[str, Any]]:
    rows = []
    for b, side, c, features in CONVOLUTIONS:
        x, kernel = normal(b, side, side, c), normal(3, 3, c, features)
        cotangent = normal(b, side, side, features)
        flops = 2.0 * b * side**2 * 9 * c * features
        name = f"convolution, {b} x {side} px, {c} to {features}"
        rows.append(row(name, seconds(plain.conv, x, kernel), flops))
        time = seconds(plain.conv_gradients, x, kernel, cotangent)
        rows.append(row(f"{name}, gradients", time, 2 * flops))
    return rows


def attentions() -> list[dict[str, Any]]:
    rows = []
    for b, side, heads in ATTENTIONS:
        n, c = side**2, 64 * heads
        qkv, cotangent = normal(b, n, 3 * c), normal(b, n, c)
        flops = 4.0 * b * n * n * c
        for kind, function in (("plain", plain.attend), ("as used", ops.attend)):
            attend = partial(function, heads=heads)
            name = f"attention, {b} x {side} px, {heads} heads, {kind}"
            rows.append(row(name, seconds(attend, qkv), flops))
            time = seconds(with_gradient(attend), cotangent, qkv)
            rows.append(row(f"{name}, with gradient", time, 3.5 * flops))
    return rows


def norms() -> list[dict[str, Any]]:
    def normalised(x: jax.Array, gain: jax.Array, bias: jax.Array) -> jax.Array:
        multiplier, offset = group_affine(x, gain, bias, 32, 1e-5)
        return nn.silu((x.astype(jnp.float32) * multiplier + offset).astype(x.dtype))

    rows = []
    for b, side, c in NORMS:
        x, gain, bias = normal(b, side, side, c), jnp.ones(c), jnp.zeros(c)
        name = f"normalisation and silu, {b} x {side} px, {c}"
        # Read twice, for the statistics and for the result; written once.
        rows.append(row(name, seconds(normalised, x, gain, bias), moved=3.0 * x.nbytes))
    return rows


def main() -> None:
    rows = ceilings() + convolutions() + attentions() + norms()
    facts = ", ".join(f"{key} {value}" for key, value in machine().items())
    print(f"\n{facts}\n\n{markdown(rows)}")


if __name__ == "__main__":
    main()

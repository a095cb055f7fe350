"""What the TPU compiler estimates for one residual block, forward and backward.

    python -m benchmarks.tpu_blocks plain skip attention --topology=v5e:2x2
    python -m benchmarks.tpu_blocks plain --effort=-0.5

A TPU is not needed, libtpu is. A block compiles in half a minute where a training step takes six,
so changes of the network are tried here first. With less effort it compiles ten times faster; such
estimates can be compared with such alone.
Utilisation: FLOPs of the plain formulation over the estimated time and the published peak.
"""

import argparse
import os
import time
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp
from jax.sharding import SingleDeviceSharding

from relay_jax.models.blocks import UNetBlock
from relay_jax.planning.tpu_compile import Topology, estimated_cycles, require_libtpu
from relay_jax.runtime.flops import DEVICES, matmul_flops, si


@dataclass(frozen=True)
class Case:
    """A block as the published networks have it, and the images that one chip sees at once."""

    size: int
    channels: int
    images: int
    resample: str = ""
    heads: int = 0
    skip: int = 0  # channels that are concatenated before the block


CASES = {
    "plain": Case(64, 192, 8),
    "skip": Case(64, 192, 8, skip=192),
    "down": Case(64, 192, 8, resample="down"),
    "up": Case(32, 384, 8, resample="up"),
    "attention": Case(32, 384, 8, heads=6),
    "relay": Case(256, 256, 8),
    "relay-skip": Case(256, 256, 8, skip=256),
}


def lower_block(case: Case, device: jax.Device) -> tuple[jax.stages.Lowered, int]:
    """Output and gradients of a bfloat16 block with dropout, lowered for `device`; its FLOPs."""
    block = UNetBlock(case.channels, case.resample, case.heads, 0.1, jnp.dtype("bfloat16"))
    place = SingleDeviceSharding(device)

    def array(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=place)

    def forward(inputs: tuple[dict, jax.Array, jax.Array, jax.Array], key: jax.Array) -> jax.Array:
        params, x, skip, embedding = inputs
        x = jnp.concatenate([x, skip], axis=-1) if case.skip else x
        return block.apply(
            {"params": params}, x, embedding, True, rngs={"dropout": jax.random.wrap_key_data(key)}
        )

    def both(
        cotangent: jax.Array, key: jax.Array, inputs: tuple[dict, jax.Array, jax.Array, jax.Array]
    ) -> object:
        y, backward = jax.vjp(lambda values: forward(values, key), inputs)
        return y, backward(cotangent)

    pixels = (case.images, case.size, case.size)
    x, skip, embedding = (
        array(*pixels, case.channels),
        array(*pixels, case.skip),
        array(case.images, 768, dtype="float32"),
    )
    joined = array(*pixels, case.channels + case.skip)
    shapes = jax.eval_shape(lambda *a: block.init(jax.random.key(0), *a, False), joined, embedding)[
        "params"
    ]
    params = jax.tree.map(lambda leaf: array(*leaf.shape, dtype="float32"), shapes)
    key = array(2, dtype="uint32")
    inputs = params, x, skip, embedding
    y = jax.eval_shape(forward, inputs, key)
    arguments = array(*y.shape), key, inputs
    return jax.jit(both).lower(*arguments), matmul_flops(jax.make_jaxpr(both)(*arguments).jaxpr)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", choices=CASES)
    parser.add_argument("--topology", default="v5e:2x2", type=Topology)
    parser.add_argument(
        "--images", default=0, type=int, help="images at once, instead of each block's own"
    )
    parser.add_argument("--effort", default=0.0, type=float, help="the compiler's, -1 to 1")
    arguments = parser.parse_args()
    require_libtpu()
    os.environ.update(arguments.topology.environment)
    jax.config.update("jax_platforms", "cpu")
    device = arguments.topology.devices()[0]
    chip = next(d for d in DEVICES if d.name == arguments.topology.generation)
    print("block        images  Mcycles      ms  utilisation  accessed  temporaries  compiled in")
    for name in arguments.cases:
        begun, case = time.monotonic(), CASES[name]
        case = replace(case, images=arguments.images or case.images)
        lowered, flops = lower_block(case, device)
        compiled = lowered.compile(
            compiler_options={"exec_time_optimization_effort": arguments.effort}
        )
        cycles, _ = estimated_cycles(compiled.as_text(), 1)
        seconds = cycles / chip.clock
        print(
            f"{name:12}{case.images:7}{cycles / 1e6:9.3f}{seconds * 1e3:8.3f}"
            f"{flops / chip.peak / seconds:13.1%}"
            f"{si(compiled.cost_analysis()['bytes accessed']):>9}B"
            f"{si(compiled.memory_analysis().temp_size_in_bytes):>12}B"
            f"{time.monotonic() - begun:11.0f} s",
            flush=True,
        )


if __name__ == "__main__":
    main()

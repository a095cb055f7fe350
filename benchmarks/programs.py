"""The programs that are measured: training step, forward pass and sampler of a stage, compiled,
with their inputs."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relay_jax.config import Stage
from relay_jax.diffusion.process import RelayProcess
from relay_jax.models.unet import init_params
from relay_jax.runtime.devices import compiler_options
from relay_jax.runtime.flops import matmul_flops
from relay_jax.runtime.sharding import batch_sharding, replicated, state_shardings
from relay_jax.sampling.chain import sample_stage
from relay_jax.training.optimizer import optimizer_of
from relay_jax.training.state import make_init
from relay_jax.training.step import make_train_step


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program. run: does it once and waits. flops: multiply-adds times two of
    products and convolutions,
    all devices together. memory: bytes on one device of inputs, outputs and temporaries, as the
    compiler plans them."""

    run: Callable[[], Any]
    images: int
    flops: int
    trace_seconds: float
    compile_seconds: float
    memory: int


def compile_program(
    function: Callable,
    run: Callable[[Callable], Callable[[], Any]],
    images: int,
    *inputs: Any,
    **options: Any,
) -> Program:
    """Traces and compiles function(*inputs), timing both. run: compiled function -> Program.run."""
    start = time.perf_counter()
    traced = jax.jit(function, **options).trace(*inputs)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    plan = compiled.memory_analysis()
    memory = sum(
        getattr(plan, f"{kind}_size_in_bytes", 0) for kind in ("argument", "output", "temp")
    )
    memory -= getattr(plan, "alias_size_in_bytes", 0)
    return Program(
        run=run(compiled),
        images=images,
        flops=matmul_flops(traced.jaxpr.jaxpr),
        memory=memory,
        trace_seconds=middle - start,
        compile_seconds=end - middle,
    )


def with_settings(
    stage: Stage, batch: int, dtype: str = "", remat: bool | None = None, steps: int = 0
) -> Stage:
    """The stage with another batch (over all devices), precision, recomputation or number of
    sampling steps; '', None and 0 keep its own."""
    network = stage.network.clone(
        **{
            k: v
            for k, v in {"remat": remat, "dtype": dtype and jnp.dtype(dtype)}.items()
            if v not in (None, "")
        }
    )
    sampler = replace(stage.sampler, num_steps=steps) if steps else stage.sampler
    accumulate = stage.train.accumulate if batch % stage.train.accumulate == 0 else 1
    train = replace(stage.train, batch=batch, accumulate=accumulate)
    return replace(stage, network=network, train=train, sampler=sampler)


def random_batch(stage: Stage, batch: int) -> dict[str, np.ndarray]:
    """Images and labels of a training batch."""
    rng = np.random.default_rng(0)
    shape = (batch, stage.resolution, stage.resolution, stage.network.image_channels)
    return {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": np.arange(batch, dtype=np.int32) % max(stage.network.num_classes, 1),
    }


def random_params(stage: Stage, mesh: Mesh) -> dict:
    """Parameters without zeros, so that every layer counts in a comparison of outputs."""
    shapes = jax.eval_shape(lambda: init_params(stage.network, jax.random.key(0)))
    leaves, tree = jax.tree.flatten(shapes)
    rng = np.random.default_rng(1)
    filled = [
        (rng.normal(size=leaf.shape) * 0.5 / np.sqrt(max(np.prod(leaf.shape[:-1]), 4))).astype(
            np.float32
        )
        + (leaf.ndim == 1) * 0.1
        for leaf in leaves
    ]
    return jax.device_put(jax.tree.unflatten(tree, filled), replicated(mesh))


def train_program(stage: Stage, mesh: Mesh, params: dict | None = None) -> Program:
    """The training step as the loop compiles it, state donated; `params` replaces the random
    ones."""
    train = stage.train
    optimizer = optimizer_of(train)
    init, whole = make_init(stage.network, optimizer), replicated(mesh)
    key = jax.device_put(jax.random.key(0), whole)
    shardings = state_shardings(jax.eval_shape(init, key), mesh)
    state = jax.jit(init, out_shardings=shardings)(key)
    if params is not None:
        state = state._replace(
            params=jax.device_put(jax.tree.map(jnp.copy, params), shardings.params)
        )
    batch = jax.device_put(random_batch(stage, train.batch), batch_sharding(mesh))

    def run(step: Callable) -> Callable[[], Any]:
        def once() -> Any:
            nonlocal state
            state, metrics = step(state, batch, key)
            return jax.block_until_ready(metrics)

        return once

    return compile_program(
        make_train_step(stage, optimizer, mesh),
        run,
        train.batch,
        state,
        batch,
        key,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), whole),
        out_shardings=(shardings, whole),
        compiler_options=compiler_options(mesh),
    )


def trace_train(stage: Stage) -> jax.stages.Traced:
    """The training step, traced on shapes."""
    optimizer = optimizer_of(stage.train)
    state = jax.eval_shape(make_init(stage.network, optimizer), jax.random.key(0))
    return jax.jit(make_train_step(stage, optimizer)).trace(
        state, random_batch(stage, stage.train.batch), jax.random.key(0)
    )


def forward_inputs(stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x, c_noise and labels of a call of the network."""
    batch, classes = stage.train.batch, stage.network.num_classes
    rng = np.random.default_rng(2)
    x = rng.normal(
        size=(batch, stage.resolution, stage.resolution, stage.network.image_channels)
    ).astype(np.float32)
    labels = np.eye(classes, dtype=np.float32)[np.arange(batch) % classes] if classes else None
    return x, rng.normal(size=batch).astype(np.float32), labels


def forward_program(stage: Stage, mesh: Mesh, params: dict) -> Program:
    """One call of the network."""
    inputs = jax.device_put(forward_inputs(stage), batch_sharding(mesh))

    def run(compiled: Callable) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(compiled(params, *inputs))

    return compile_program(
        lambda p, *rest: stage.network.apply({"params": p}, *rest),
        run,
        stage.train.batch,
        params,
        *inputs,
        compiler_options=compiler_options(mesh),
    )


def sample_program(stage: Stage, mesh: Mesh, params: dict) -> Program:
    """The sampler of the stage alone, train.batch images at once; a relay stage starts from
    random low resolution."""
    batch = stage.train.batch
    seeds, classes = (
        np.arange(batch, dtype=np.uint32),
        np.arange(batch, dtype=np.int32) % max(stage.network.num_classes, 1),
    )
    inputs: list[np.ndarray] = [seeds, classes]
    if isinstance(stage.process, RelayProcess):
        side = stage.resolution // stage.process.patch
        shape = (batch, side, side, stage.network.image_channels)
        inputs.append(np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32))
    placed = jax.device_put(inputs, batch_sharding(mesh))

    def run(compiled: Callable) -> Callable[[], Any]:
        return lambda: jax.block_until_ready(compiled(params, *placed))

    return compile_program(
        lambda *rest: sample_stage(stage, *rest),
        run,
        batch,
        params,
        *placed,
        out_shardings=batch_sharding(mesh),
        compiler_options=compiler_options(mesh),
    )


def machine() -> dict[str, Any]:
    """What a measurement was made on."""
    device = jax.devices()[0]
    return {
        "device": device.device_kind,
        "platform": device.platform,
        "devices": jax.device_count(),
        "jax": jax.__version__,
    }


def markdown(rows: Sequence[dict[str, Any]]) -> str:
    """A table of rows with the same keys."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([str(row[key]) for key in head] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)

"""The programs that are measured: training step, forward pass and sampler of a stage, compiled.

Each is the program that the package itself runs, with the same shardings and compiler options.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relay_jax.planning.cost import abstract_key, abstract_state
from relay_jax.resolution import height_width
from relay_jax.runtime.devices import jit
from relay_jax.runtime.flops import matmul_flops
from relay_jax.runtime.sharding import batch_sharding, replicated, state_shardings
from relay_jax.sampling.chain import sample_stage
from relay_jax.stage import Stage
from relay_jax.training.state import TrainState, init_state
from relay_jax.training.step import jit_step, make_train_step


@dataclass(frozen=True, kw_only=True)
class Program:
    """A compiled program.

    run: does it once and waits. flops: multiply-adds times two of products and convolutions, all
    devices together. memory: bytes on one device of inputs, outputs and temporaries, as the
    compiler plans them.
    """

    run: Any
    images: int
    flops: int
    trace_seconds: float
    compile_seconds: float
    memory: int


def compile_program(function: Any, inputs: Sequence[Any], images: int) -> Program:
    """Traces and compiles a jitted function for these inputs, timing both.

    `run` calls it with them and waits.
    """
    start = time.perf_counter()
    traced = function.trace(*inputs)
    lowered = traced.lower()
    middle = time.perf_counter()
    compiled = lowered.compile()
    end = time.perf_counter()
    plan = compiled.memory_analysis()
    kinds = ("argument", "output", "temp")
    memory = sum(getattr(plan, f"{kind}_size_in_bytes", 0) for kind in kinds)
    # A donated input is counted with the output that takes its place.
    memory -= getattr(plan, "alias_size_in_bytes", 0)
    return Program(
        run=partial(call_and_wait, compiled, inputs),
        images=images,
        flops=matmul_flops(traced.jaxpr.jaxpr),
        memory=memory,
        trace_seconds=middle - start,
        compile_seconds=end - middle,
    )


def call_and_wait(compiled: Callable[..., Any], inputs: Sequence[Any]) -> Any:
    """The finished result of a compiled function."""
    return jax.block_until_ready(compiled(*inputs))


def with_settings(
    stage: Stage, batch: int, dtype: str = "", remat: bool | None = None, steps: int = 0
) -> Stage:
    """The stage with another batch (over all devices), precision, remat or number of steps.

    '', None and 0 keep its own.
    """
    changes: dict[str, Any] = {} if remat is None else {"remat": remat}
    if dtype:
        changes["dtype"] = jnp.dtype(dtype)
    network = stage.network.clone(**changes)
    sampler: Any = stage.sampler
    sampler = replace(sampler, num_steps=steps) if steps else sampler
    accumulate = stage.train.accumulate if batch % stage.train.accumulate == 0 else 1
    train = replace(stage.train, batch=batch, accumulate=accumulate)
    return replace(stage, network=network, train=train, sampler=sampler)


def random_batch(stage: Stage, batch: int) -> dict[str, np.ndarray]:
    """Images and labels of a training batch."""
    rng = np.random.default_rng(0)
    shape = (batch, *stage.image_shape)
    return {
        "image": rng.integers(0, 256, shape, np.uint8),
        "label": np.arange(batch, dtype=np.int32) % max(stage.network.num_classes, 1),
    }


def random_params(stage: Stage, mesh: Mesh) -> dict:
    """Parameters without zeros, so that every layer counts in a comparison of outputs."""
    leaves, tree = jax.tree.flatten(stage.shapes())
    rng = np.random.default_rng(1)
    filled = [
        (rng.normal(size=leaf.shape) * 0.5 / np.sqrt(max(np.prod(leaf.shape[:-1]), 4))).astype(
            np.float32
        )
        + (leaf.ndim == 1) * 0.1
        for leaf in leaves
    ]
    return jax.device_put(jax.tree.unflatten(tree, filled), replicated(mesh))


class TrainingStep:
    """A compiled training step; each call hands it the state that the one before has left."""

    def __init__(self, compiled: Callable[..., Any], state: TrainState, *rest: Any) -> None:
        self._compiled, self._state, self._rest = compiled, state, rest

    def __call__(self) -> Any:
        # The state is donated: the one before is gone when the call returns.
        self._state, metrics = self._compiled(self._state, *self._rest)
        return jax.block_until_ready(metrics)


def train_program(stage: Stage, mesh: Mesh) -> Program:
    """The training step as the loop compiles it, its state donated."""
    whole, shardings = replicated(mesh), state_shardings(abstract_state(stage), mesh)
    key = jax.device_put(jax.random.key(0), whole)
    state = jax.jit(partial(init_state, stage), out_shardings=shardings)(key)
    batch = jax.device_put(random_batch(stage, stage.train.batch), batch_sharding(mesh))
    function = jit_step(make_train_step(stage, mesh), mesh, shardings)
    program = compile_program(function, (state, batch, key), stage.train.batch)
    return replace(program, run=TrainingStep(program.run.args[0], state, batch, key))


def trace_train(stage: Stage) -> jax.stages.Traced:
    """The training step, traced on shapes."""
    batch = random_batch(stage, stage.train.batch)
    return jax.jit(make_train_step(stage)).trace(abstract_state(stage), batch, abstract_key())


def forward_inputs(stage: Stage) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """x, c_noise and labels of a call of the network."""
    batch, classes = stage.train.batch, stage.network.num_classes
    rng = np.random.default_rng(2)
    x = rng.normal(size=(batch, *stage.image_shape)).astype(np.float32)
    labels = np.eye(classes, dtype=np.float32)[np.arange(batch) % classes] if classes else None
    return x, rng.normal(size=batch).astype(np.float32), labels


def forward_program(stage: Stage, mesh: Mesh, params: dict) -> Program:
    """One call of the network."""
    inputs = jax.device_put(forward_inputs(stage), batch_sharding(mesh))
    function = jit(stage.network.apply, mesh)
    return compile_program(function, ({"params": params}, *inputs), stage.train.batch)


def sample_program(stage: Stage, mesh: Mesh, params: dict) -> Program:
    """The sampler of the stage alone, train.batch images at once.

    A stage that starts from images starts from random ones.
    """
    batch = stage.train.batch
    inputs: list[np.ndarray] = [
        np.arange(batch, dtype=np.uint32),
        np.arange(batch, dtype=np.int32) % max(stage.num_classes, 1),
    ]
    if stage.starts_from_images:
        low = height_width(stage.low_resolution)
        shape = (batch, *low, stage.network.image_channels)
        inputs.append(np.random.default_rng(3).uniform(-1, 1, shape).astype(np.float32))
    placed = jax.device_put(inputs, batch_sharding(mesh))
    function = jit(partial(sample_stage, stage), mesh, out_shardings=batch_sharding(mesh))
    return compile_program(function, (params, *placed), batch)


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

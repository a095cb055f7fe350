"""What the TPU compiler says of a training step, for a slice that is not there.

libtpu compiles for a described topology without any TPU. It wants its own environment before it
is loaded and holds a lock, so each stage is compiled in a process of its own (`python -m
relay_jax.planning.tpu_compile`), the stage on its stdin and the numbers on its stdout. What is
lowered is the step of the training loop on one host: same function,
same shardings, same donation, abstract arguments.
"""

import importlib.util
import json
import math
import os
import pickle
import re
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from jax.sharding import AxisType

from relay_jax.config import ConfigError, Stage
from relay_jax.runtime.flops import Device, si
from relay_jax.runtime.sharding import batch_sharding, replicated, state_shardings
from relay_jax.training.optimizer import optimizer_of
from relay_jax.training.state import TrainState, make_init
from relay_jax.training.step import make_train_step

PROGRESS_SECONDS = 30.0  # between lines while a compiler runs
NO_ESTIMATE = 2**62  # the compiler writes the largest integer where it does not know the cycles
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
# Generation -> name and units per chip in TPU_ACCELERATOR_TYPE (v4 and v5p count cores),
# dimensions of its torus.
_GENERATIONS = {
    "v4": ("v4", 2, 3),
    "v5e": ("v5litepod", 1, 2),
    "v5p": ("v5p", 2, 3),
    "v6e": ("v6e", 1, 2),
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice as the compiler names it, e.g. v5e:4x4 or v5p:2x2x4. Raises ConfigError for
    an unknown one."""

    name: str

    def __post_init__(self) -> None:
        generation, _, sides = self.name.partition(":")
        known = _GENERATIONS.get(generation)
        if known is None or not re.fullmatch("x".join([r"[1-9]\d*"] * known[2]), sides):
            raise ConfigError(
                f"unknown topology {self.name!r}; write it like v4:2x2x4, v5e:4x4, v5p:2x2x4 "
                "or v6e:4x4"
            )

    @property
    def generation(self) -> str:
        return self.name.split(":")[0]

    @property
    def chips(self) -> int:
        return math.prod(int(side) for side in self.name.split(":")[1].split("x"))

    @property
    def environment(self) -> dict[str, str]:
        """What libtpu must see before it is loaded: no look for a TPU, and the slice's name."""
        name, units, _ = _GENERATIONS[self.generation]
        return {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "JAX_PLATFORMS": "cpu",
            "TPU_ACCELERATOR_TYPE": f"{name}-{self.chips * units}",
        }

    def devices(self) -> list[Any]:
        """One described device per chip. Needs `environment`."""
        from jax.experimental import topologies  # only here is libtpu loaded

        options = (
            {"chip_config_name": "megacore"} if self.generation == "v4" else {}
        )  # as jax runs on a v4: both
        return list(
            topologies.get_topology_desc(topology_name=self.name, platform="tpu", **options).devices
        )  # cores


def require_libtpu() -> None:
    """Raises ConfigError, with the command that installs it, where the TPU compiler is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise ConfigError(
            f'--topology needs libtpu: pip install "jax[tpu]=={jax.__version__}" (works '
            "without a TPU)"
        )


def compile_stage(stage: Stage, topology: Topology, fsdp: int) -> dict[str, Any]:
    """Compiles the training step of one stage for a slice, in a process of its own. Minutes for
    a published stage.

    Returns the numbers of `analyse`; for a program that does not fit the chips, {"error": the
    compiler's line}.
    Raises ConfigError where libtpu is missing or knows no such slice.
    """
    require_libtpu()
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "relay_jax.planning.tpu_compile", topology.name, str(fsdp)]
    environment = {**os.environ, **topology.environment, "PYTHONPATH": path}
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=environment,
    ) as process:
        try:
            output, errors = _wait(
                process, pickle.dumps(stage), f"compiling stage {stage.name} for {topology.name}"
            )
        except BaseException:  # an interrupt must not leave the compiler behind
            process.kill()
            raise
    lines = output.decode(errors="replace").splitlines()
    if process.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    raise ConfigError(
        f"the TPU compiler failed for {topology.name} (status {process.returncode}): {last}"
    )


def _wait(process: subprocess.Popen, message: bytes, what: str) -> tuple[bytes, bytes]:
    """Output and errors of a process that is given a message, with a line of progress now and
    then."""
    begun = time.monotonic()
    unsent: bytes | None = message
    while True:
        try:
            return process.communicate(unsent, timeout=PROGRESS_SECONDS)
        except subprocess.TimeoutExpired:
            unsent = None  # taken by the first call, also where it has not been sent yet
            logging.info("%s: %.0f s so far", what, time.monotonic() - begun)


def lower_step(stage: Stage, devices: list[Any], fsdp: int) -> Any:
    """The loop's jitted training step over `devices`, lowered with abstract arguments; nothing
    is allocated."""
    mesh = jax.make_mesh(
        (len(devices) // fsdp, fsdp),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )
    optimizer, shapes = abstract_state(stage)
    shardings = state_shardings(shapes, mesh)
    step = jax.jit(
        make_train_step(stage, optimizer, mesh),
        donate_argnums=0,
        out_shardings=(shardings, replicated(mesh)),
        in_shardings=(shardings, batch_sharding(mesh), replicated(mesh)),
    )
    return step.lower(shapes, abstract_batch(stage, stage.train.batch), abstract_key())


def abstract_batch(stage: Stage, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of `images` images, as the loader gives it."""
    shape = (images, stage.resolution, stage.resolution, stage.network.image_channels)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }


def abstract_key() -> jax.ShapeDtypeStruct:
    """The shape of a random key."""
    return jax.eval_shape(lambda: jax.random.key(0))


@cache
def abstract_state(stage: Stage) -> tuple[Any, TrainState]:
    """The optimiser of a stage and the shapes of its whole training state."""
    optimizer = optimizer_of(stage.train)
    return optimizer, jax.eval_shape(make_init(stage.network, optimizer), abstract_key())


def analyse(compiled: Any, parts: int) -> dict[str, Any]:
    """The compiler's numbers for one chip and one step, whose gradient is accumulated in `parts`.

    hbm: bytes by kind (arguments: state and batch; temporaries: gradients and activations;
    outputs: those that reuse no argument; program) and their total. flops, bytes_accessed: as
    the compiler counts them: without products with padding, and a loop's body, which is one
    part, once. collectives: instructions by kind. cycles: its estimates of all fused
    operations, as often as they run; it gives none for collectives, so their time is not in it.
    without_estimate: other operations for which it gives none. effort:
    jax_exec_time_optimization_effort, 0 unless JAX_EXEC_TIME_OPTIMIZATION_EFFORT says
    otherwise; less compiles faster, to a slower program.
    """
    memory, cost, text = compiled.memory_analysis(), compiled.cost_analysis(), compiled.as_text()
    hbm = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    cycles, unknown = estimated_cycles(text, parts)
    found = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return {
        "hbm": {**hbm, "total": sum(hbm.values())},
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "collectives": dict(found),
        "parts": parts,
        "cycles": cycles,
        "without_estimate": unknown,
        "effort": jax.config.jax_exec_time_optimization_effort,
    }


def estimated_cycles(text: str, parts: int) -> tuple[int, int]:
    """Sum of a compiled program's `estimated_cycles`, and the number of operations for which it
    has none.

    What is in the body of a loop counts as often as the loop's condition says, `parts` times
    where it does not say.
    """
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        if line[:1] not in (
            "",
            " ",
            "}",
        ):  # a computation begins: "%name (..." or "ENTRY %name (..."
            lines = computations.setdefault(
                line.removeprefix("ENTRY ").split(" ")[0].lstrip("%"), []
            )
        lines.append(line)
    loops = {}  # body -> where its loop stands, and how often it runs
    for name, inside in computations.items():
        for condition, body in re.findall(
            r" while\(.* condition=%([\w.-]+), body=%([\w.-]+)", "\n".join(inside)
        ):
            limits = re.findall(
                r"= s32\S* constant\((\d+)\)", "\n".join(computations.get(condition, ()))
            )
            loops[body] = name, max(map(int, limits)) if limits else parts

    def times(name: str) -> int:
        around, count = loops.get(name, ("", 1))
        return count * times(around) if around else count

    total = unknown = 0
    for name, inside in computations.items():
        for cycles in map(int, re.findall(r'"estimated_cycles":"(\d+)"', "\n".join(inside))):
            total, unknown = (
                (total, unknown + 1)
                if cycles >= NO_ESTIMATE
                else (total + times(name) * cycles, unknown)
            )
    return total, unknown


def add_time(found: dict[str, Any], device: Device, chips: int) -> None:
    """Cycles over the clock, and what share of the peak the step's own FLOPs are then."""
    compiled = found["compiled"]
    if "error" not in compiled:
        seconds = compiled["cycles"] / device.clock
        compiled.update(
            step_seconds=seconds,
            images_per_second=found["batch"] / seconds,
            days=found["steps"] * seconds / 86400,
            fits=compiled["hbm"]["total"] <= device.memory,
            utilisation=found["train_flops"] * found["batch"] / chips / device.peak / seconds,
        )


def describe(compiled: dict[str, Any]) -> list[str]:
    """The numbers of `compile_stage` and `add_time` for people, a few lines."""
    effort = f" with effort {compiled['effort']:g}" if compiled.get("effort") else ""
    head = [
        "",
        f"  TPU compiler, {compiled['topology']}, after {compiled['compile_seconds']:,.0f} "
        f"s{effort}",
    ]
    if "error" in compiled:
        return [*head, f"    {compiled['error']}"]
    unknown = (
        f" and {compiled['without_estimate']} operations" if compiled["without_estimate"] else ""
    )
    kinds = ", ".join(
        f"{kind} {si(size)}B" for kind, size in compiled["hbm"].items() if kind != "total"
    )
    collectives = (
        ", ".join(f"{count} {kind}" for kind, count in compiled["collectives"].items())
        or "no collectives"
    )
    part = "a chip and step" if compiled["parts"] == 1 else f"1 of {compiled['parts']} parts"
    return [
        *head,
        f"    HBM per chip       {kinds}; in all {si(compiled['hbm']['total'])}B, "
        f"{'fits' if compiled['fits'] else 'does not fit'}",
        f"    {part:19}{si(compiled['flops'])}FLOP, {si(compiled['bytes_accessed'])}B "
        f"accessed, {collectives}",
        f"    estimate           {si(compiled['cycles'])}cycles, step "
        f"{compiled['step_seconds']:.3g} s without "
        f"collectives{unknown}, {compiled['images_per_second']:,.0f} images/s, "
        f"{compiled['days']:.3g} days, "
        f"utilisation {compiled['utilisation']:.1%}",
    ]


def main(argv: list[str]) -> None:
    """The process behind `compile_stage`: topology and fsdp as arguments, a pickled Stage from
    the parent on stdin."""
    stage, topology = pickle.load(sys.stdin.buffer), Topology(argv[0])
    try:
        devices, begun = topology.devices(), time.monotonic()
        result = analyse(lower_step(stage, devices, int(argv[1])).compile(), stage.train.accumulate)
    except jax.errors.JaxRuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        if not lines or "RESOURCE_EXHAUSTED" not in lines[0]:
            sys.exit(lines[0] if lines else "no message")
        result = {"error": lines[0]}
    print(
        json.dumps(
            {
                "topology": topology.name,
                **result,
                "compile_seconds": round(time.monotonic() - begun, 1),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])

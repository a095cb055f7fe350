"""What the TPU compiler says of a training step, for a slice that is not there.

libtpu compiles for a described topology without any TPU. It wants
its own environment before it is loaded and holds a lock, so each
stage is compiled in a process of its own (`python -m
relay_jax.planning.tpu_compile`), the stage on its stdin and the
numbers on its stdout. What is lowered is the step of the training
loop on one host: same function, same shardings, same donation,
abstract arguments.
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
from pathlib import Path
from typing import Any

import jax
from absl import logging

from relay_jax.errors import UserError
from relay_jax.planning.cost import abstract_batch, abstract_key, abstract_state
from relay_jax.runtime.flops import Device, si
from relay_jax.runtime.sharding import make_mesh, state_shardings
from relay_jax.stage import Stage
from relay_jax.training.step import jit_step, make_train_step

PROGRESS_SECONDS = 30.0  # between lines while a compiler runs
# The compiler writes the largest integer
# where it does not know the cycles.
NO_ESTIMATE = 2**62
COLLECTIVES = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
)
# Generation -> name and units per chip in TPU_ACCELERATOR_TYPE (v4
# and v5p count cores), dimensions of its torus.
_GENERATIONS = {
    "v4": ("v4", 2, 3),
    "v5e": ("v5litepod", 1, 2),
    "v5p": ("v5p", 2, 3),
    "v6e": ("v6e", 1, 2),
}


@dataclass(frozen=True)
class Topology:
    """A TPU slice as the compiler names it, e.g. v5e:4x4 or v5p:2x2x4.

    Raises UserError for an unknown one.
    """

    name: str

    def __post_init__(self) -> None:
        generation, _, sides = self.name.partition(":")
        _, _, dimensions = _GENERATIONS.get(generation, ("", 0, 0))
        if not dimensions or not re.fullmatch("x".join([r"[1-9]\d*"] * dimensions), sides):
            raise UserError(
                f"unknown topology {self.name!r}; write it like v4:2x2x4, v5e:4x4, v5p:2x2x4 "
                "or v6e:4x4"
            )

    @property
    def generation(self) -> str:
        """As runtime.flops names the chips."""
        return self.name.split(":")[0]

    @property
    def chips(self) -> int:
        """How many there are."""
        return math.prod(int(side) for side in self.name.split(":")[1].split("x"))

    @property
    def environment(self) -> dict[str, str]:
        """What libtpu must see before it is loaded: no look for a TPU, and the slice's name."""
        # Without the first two libtpu asks the cloud's metadata
        # server, and waits minutes for it.
        name, units, _ = _GENERATIONS[self.generation]
        return {
            "TPU_SKIP_MDS_QUERY": "1",
            "TPU_WORKER_HOSTNAMES": "localhost",
            "JAX_PLATFORMS": "cpu",
            "TPU_ACCELERATOR_TYPE": f"{name}-{self.chips * units}",
        }

    def devices(self) -> list[Any]:
        """One described device per chip. Needs `environment`."""
        # Imported late: this loads libtpu, which must see its
        # environment before.
        from jax.experimental import topologies

        # As jax runs on a v4: both cores of a chip are one device.
        options = {"chip_config_name": "megacore"} if self.generation == "v4" else {}
        slice_ = topologies.get_topology_desc(topology_name=self.name, platform="tpu", **options)
        return list(slice_.devices)


def require_libtpu() -> None:
    """Raises UserError, with the command that installs it, where the TPU compiler is missing."""
    if importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology needs libtpu: pip install "jax[tpu]=={jax.__version__}" (works '
            "without a TPU)"
        )


def compile_stage(stage: Stage, topology: Topology, fsdp: int) -> dict[str, Any]:
    """Compiles the training step of one stage for a slice; minutes for a published stage.

    Returns the numbers of `analyse`; for a program that does not fit
    the chips, {"error": the compiler's line}. Raises UserError where
    libtpu is missing or knows no such slice.
    """
    require_libtpu()
    # The package as this process has it, also from a checkout that
    # is not the working folder.
    root = str(Path(__file__).parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [
        sys.executable,
        "-m",
        "relay_jax.planning.tpu_compile",
        topology.name,
        str(fsdp),
    ]
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
                process,
                pickle.dumps(stage),
                f"compiling stage {stage.name} for {topology.name}",
            )
        except BaseException:  # an interrupt must not leave the compiler behind
            process.kill()
            raise
    lines = output.decode(errors="replace").splitlines()
    if process.returncode == 0 and lines:
        return json.loads(lines[-1])
    last = (errors.decode(errors="replace").strip().splitlines() or ["no message"])[-1]
    raise UserError(
        f"the TPU compiler failed for {topology.name} (status {process.returncode}): {last}"
    )


def _wait(process: subprocess.Popen, message: bytes, what: str) -> tuple[bytes, bytes]:
    """Output and errors of a process that gets a message, with a line of progress now and then."""
    start = time.monotonic()
    unsent: bytes | None = message
    while True:
        try:
            return process.communicate(unsent, timeout=PROGRESS_SECONDS)
        except subprocess.TimeoutExpired:
            unsent = None  # taken by the first call, also where it has not been sent yet
            logging.info("%s: %.0f s so far", what, time.monotonic() - start)


def lower_step(stage: Stage, devices: list[Any], fsdp: int) -> Any:
    """The loop's jitted training step over `devices`, lowered; nothing is allocated."""
    mesh = make_mesh(fsdp, devices)
    state = abstract_state(stage)
    shardings = state_shardings(state, mesh)
    step = jit_step(make_train_step(stage, mesh), mesh, shardings)
    return step.lower(state, abstract_batch(stage, stage.train.batch), abstract_key())


def analyse(compiled: Any, parts: int) -> dict[str, Any]:
    """The compiler's numbers for one chip and one step, whose gradient is summed over `parts`.

    hbm: bytes by kind (arguments: state and batch; temporaries:
    gradients and activations; outputs: those that reuse no argument;
    program) and their total. flops, bytes_accessed: as the compiler
    counts them: without products with padding, and a loop's body,
    which is one part, once. collectives: instructions by kind.
    cycles: its estimates of all fused operations, as often as they
    run; it gives none for collectives, so their time is not in it.
    without_estimate: other operations for which it gives none.
    effort: jax_exec_time_optimization_effort, 0 unless
    JAX_EXEC_TIME_OPTIMIZATION_EFFORT says otherwise; less compiles
    faster, to a slower program. JAX 0.11 no longer has it.
    """
    memory, cost, text = (
        compiled.memory_analysis(),
        compiled.cost_analysis(),
        compiled.as_text(),
    )
    hbm = {
        "arguments": memory.argument_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "outputs": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "program": memory.generated_code_size_in_bytes,
    }
    cycles, unknown = estimated_cycles(text, parts)
    # An asynchronous one is a pair of instructions, of which only
    # the start has the plain name.
    collectives = Counter(re.findall(rf" ({'|'.join(COLLECTIVES)})(?:-start)?\(", text))
    return {
        "hbm": {**hbm, "total": sum(hbm.values())},
        "flops": cost["flops"],
        "bytes_accessed": cost["bytes accessed"],
        "collectives": dict(collectives),
        "parts": parts,
        "cycles": cycles,
        "without_estimate": unknown,
        "effort": getattr(jax.config, "jax_exec_time_optimization_effort", 0.0),
    }


def estimated_cycles(text: str, parts: int) -> tuple[int, int]:
    """Sum of a compiled program's `estimated_cycles`, and for how many operations it has none.

    What is in the body of a loop counts as often as the loop's
    condition says, `parts` times where it does not say.
    """
    computations = _computations(text)
    # Body -> the computation in which its
    # loop stands, and how often it runs.
    loops: dict[str, tuple[str, int]] = {}
    for name, lines in computations.items():
        for condition, body in re.findall(
            r" while\(.* condition=%([\w.-]+), body=%([\w.-]+)", "\n".join(lines)
        ):
            compared = "\n".join(computations.get(condition, ()))
            limits = re.findall(r"= s32\S* constant\((\d+)\)", compared)
            loops[body] = name, max(map(int, limits)) if limits else parts
    total = unknown = 0
    for name, lines in computations.items():
        for cycles in map(int, re.findall(r'"estimated_cycles":"(\d+)"', "\n".join(lines))):
            if cycles >= NO_ESTIMATE:
                unknown += 1
            else:
                total += _times(name, loops) * cycles
    return total, unknown


def _computations(text: str) -> dict[str, list[str]]:
    """The lines of each computation of a compiled program, by its name."""
    computations: dict[str, list[str]] = {}
    lines: list[str] = []
    for line in text.splitlines():
        # A computation begins with "%name (..." or "ENTRY %name
        # (...", what is in it is indented.
        if line[:1] not in ("", " ", "}"):
            name = line.removeprefix("ENTRY ").split(" ")[0].lstrip("%")
            lines = computations.setdefault(name, [])
        lines.append(line)
    return computations


def _times(name: str, loops: dict[str, tuple[str, int]]) -> int:
    """How often a computation runs, with all the loops around it."""
    if name not in loops:
        return 1
    around, count = loops[name]
    return count * _times(around, loops)


def add_time(figures: dict[str, Any], device: Device, chips: int) -> None:
    """Cycles over the clock, and what share of the peak the step's own FLOPs are then.

    figures: of a stage in the report of a plan; its "compiled" gets
    the new ones.
    """
    compiled = figures["compiled"]
    if "error" not in compiled:
        seconds = compiled["cycles"] / device.clock
        compiled.update(
            step_seconds=seconds,
            images_per_second=figures["batch"] / seconds,
            days=figures["steps"] * seconds / 86400,
            fits=compiled["hbm"]["total"] <= device.memory,
            # Not the compiler's FLOPs, which
            # count the body of a loop once.
            utilisation=figures["train_flops"] * figures["batch"] / chips / device.peak / seconds,
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
    """The process behind `compile_stage`: topology and fsdp as arguments, the Stage on stdin."""
    # Pickled by the parent process, which is this program: nobody
    # else can write to this pipe.
    stage, topology = pickle.load(sys.stdin.buffer), Topology(argv[0])
    try:
        devices, start = topology.devices(), time.monotonic()
        result = analyse(
            lower_step(stage, devices, int(argv[1])).compile(),
            stage.train.accumulate,
        )
    except jax.errors.JaxRuntimeError as error:
        lines = [line for line in str(error).splitlines() if line.strip()]
        # A program that does not fit is an answer; all else is a
        # failure, told on stderr.
        if not lines or "RESOURCE_EXHAUSTED" not in lines[0]:
            sys.exit(lines[0] if lines else "no message")
        result = {"error": lines[0]}
    print(
        json.dumps(
            {
                "topology": topology.name,
                **result,
                "compile_seconds": round(time.monotonic() - start, 1),
            }
        )
    )


if __name__ == "__main__":
    main(sys.argv[1:])

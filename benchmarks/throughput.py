"""Training and sampling throughput of a configuration's stages on the machine it runs on.

    python -m benchmarks.throughput --config=configs/demo.py
    python -m benchmarks.throughput --config=configs/imagenet256.py --stage=relay --what=train
    --batch=8 --remat=on
    python -m benchmarks.throughput --config=configs/celebahq256.py --what=trace

Medians after a warm-up. FLOPs are counted from the traced program (products and convolutions,
relay_jax/runtime/flops.py), and utilisation is their rate over the vendor's published bfloat16
peak, where that is known. Memory is what the compiler plans for one device, and the allocator's
peak where the device tells. --what=trace compiles nothing: it times tracing and
lowering of the training step.
"""

import json
import time
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from benchmarks import settings
from benchmarks.programs import (
    Program,
    forward_program,
    machine,
    random_params,
    sample_program,
    trace_train,
    train_program,
)
from benchmarks.timing import in_turns
from relay_jax.runtime.flops import peak_flops, si
from relay_jax.runtime.sharding import make_mesh
from relay_jax.stage import Stage


def peak_memory() -> int | None:
    """Bytes that the first device has had in use at most, None where it does not tell."""
    return (jax.local_devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def row(stage: Stage, kind: str, program: Program, seconds: np.ndarray) -> dict[str, Any]:
    """A row of the table from the measured seconds per call."""
    middle = float(np.median(seconds))
    rate, peak, used = (
        program.flops / middle,
        peak_flops(jax.devices()[0].device_kind),
        peak_memory(),
    )
    return {
        "stage": stage.name,
        "what": kind,
        "batch": program.images,
        "dtype": str(np.dtype(stage.network.dtype)),
        "remat": stage.network.remat,
        "ms": f"{middle * 1e3:.4g}",
        "quartiles": "-".join(f"{q * 1e3:.4g}" for q in np.quantile(seconds, (0.25, 0.75))),
        "images/s": f"{program.images / middle:.4g}",
        "FLOP": si(program.flops),
        "TFLOP/s": f"{rate / 1e12:.3g}",
        "utilisation": f"{rate / (peak * jax.device_count()):.1%}" if peak else "peak unknown",
        "memory": f"{si(program.memory)}B",
        "peak in use": f"{si(used)}B" if used else "not told",
        "trace s": f"{program.trace_seconds:.2f}",
        "compile s": f"{program.compile_seconds:.2f}",
    }


def measure(stage: Stage, kinds: Sequence[str], rounds: int) -> list[dict[str, Any]]:
    """Rows for one stage, train.batch images at a time over all devices. The programs are made
    one after the other, so that the memory of one is free when the next is measured."""
    mesh, rows = make_mesh(), []
    for kind in kinds:
        if kind == "train":
            program = train_program(stage, mesh)
        else:
            program = {"forward": forward_program, "sample": sample_program}[kind](
                stage, mesh, random_params(stage, mesh)
            )
        seconds = in_turns({kind: program.run}, rounds, 1 if kind == "sample" else 3)[kind]
        rows.append(row(stage, kind, program, seconds))
        print(json.dumps(rows[-1]), flush=True)
        del program
    return rows


def trace(stage: Stage) -> dict[str, Any]:
    """Seconds to trace and lower the training step, on shapes alone."""
    start = time.perf_counter()
    traced = trace_train(stage)
    middle = time.perf_counter()
    text = traced.lower()
    end = time.perf_counter()
    return {
        "stage": stage.name,
        "batch": stage.train.batch,
        "trace s": f"{middle - start:.1f}",
        "lower s": f"{end - middle:.1f}",
        "lines of HLO": len(text.as_text().splitlines()),
    }


def main() -> None:
    stages, kinds, rows = (
        settings.stages(),
        settings.kinds(("forward", "train", "sample", "trace")),
        [],
    )
    if "trace" in kinds and len(kinds) > 1:
        settings.fail("--what=trace stands alone")
    for stage in stages:
        rows += [trace(stage)] if kinds == ["trace"] else measure(stage, kinds, settings.rounds())
    settings.finish(machine(), rows, settings.out())


if __name__ == "__main__":
    settings.run(main)

"""What a relay will cost, before it is launched: parameters, FLOPs, memory, days, seconds a sample.

    python -m relay_jax.main --config=configs/imagenet256.py --mode=plan --devices=256
    python -m relay_jax.main --config=configs/imagenet256.py --mode=plan --topology=v5e:16x16

Nothing is compiled or allocated without --topology; with it the TPU
compiler is asked as well (planning/tpu_compile.py).
planning/cost.py says what is counted. Times are FLOPs over the
vendors' bfloat16 peaks times a utilisation that is an assumption,
printed with the result.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging

from relay_jax.config import Settings
from relay_jax.errors import UserError
from relay_jax.models.network import parameter_count
from relay_jax.planning.cost import (
    abstract_state,
    forward_flops,
    memory,
    sampler_calls,
    sampling_cost,
    stage_flops,
    train_flops,
)
from relay_jax.planning.tpu_compile import (
    Topology,
    add_time,
    compile_stage,
    describe,
    require_libtpu,
)
from relay_jax.resolution import size_text
from relay_jax.runtime.files import write_json
from relay_jax.runtime.flops import DEVICES, Device, si
from relay_jax.stage import Stage, joined

SAMPLES = 50_000  # images that a score is computed from (docs/running.md)
# Share of the peak that a training or
# sampling step reaches: an assumption.
DEFAULT_UTILISATION = 0.4


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What a plan is asked for.

    devices: chips of the training, 0 for the most up to 64 that
    divide every batch. utilisation: assumed share of the peak.
    hardware: names from DEVICES, none for all. topology: a TPU
    slice such as v5e:4x4, whose chips are then the devices, and
    for which each stage is compiled. Raises UserError for
    values that cannot be.
    """

    devices: int = 0
    utilisation: float = DEFAULT_UTILISATION
    hardware: Sequence[str] = ()
    topology: str = ""

    def __post_init__(self) -> None:
        unknown = set(self.hardware) - {device.name for device in DEVICES}
        if unknown:
            names = ", ".join(device.name for device in DEVICES)
            raise UserError(f"unknown device {min(unknown)!r}; known are {names}")
        if not 0 < self.utilisation <= 1:
            raise UserError(f"utilisation must lie in (0, 1], not {self.utilisation}")
        if self.slice is not None and self.devices not in (0, self.slice.chips):
            raise UserError(
                f"{self.topology} has {self.slice.chips} chips, not {self.devices}; leave "
                "--devices out"
            )

    @property
    def slice(self) -> Topology | None:
        """The TPU slice, None without a topology."""
        return Topology(self.topology) if self.topology else None

    @property
    def chosen(self) -> list[Device]:
        """The devices that times are computed for."""
        names = self.hardware or ([self.slice.generation] if self.slice else [])
        return [device for device in DEVICES if not names or device.name in names]


def plan(
    settings: Settings,
    only: Stage | None,
    request: PlanSettings,
    workdir: Path | None = None,
    presets: Mapping[str, Sequence[Stage]] | None = None,
) -> dict[str, Any]:
    """--mode=plan: prints the table, writes WORKDIR/plan.json, returns the report of `estimate`.

    only: this stage alone. presets: all stages as each preset
    samples them (presets.by_preset), whose costs are listed. With a
    topology each stage gets "compiled", the numbers of
    `tpu_compile.analyse` with the time and utilisation that follow.
    Raises UserError, one line.
    """
    # Shapes need no accelerator, and
    # must not wait for one that is busy.
    jax.config.update("jax_platforms", "cpu")
    # One before a relay from noise stops
    # early, and makes fewer calls.
    stages = [s for s in joined(settings.stages) if only is None or s.name == only.name]
    tpu_slice = request.slice
    if tpu_slice is not None:
        # Before the estimate: tracing a
        # published relay takes a minute.
        require_libtpu()
    report = estimate(stages, settings.fsdp, request)
    if tpu_slice is not None:
        chip = next(device for device in DEVICES if device.name == tpu_slice.generation)
        for stage, figures in zip(stages, report["stages"], strict=True):
            logging.info(
                "compiling stage %s for %s; a published stage takes many minutes",
                stage.name,
                tpu_slice.name,
            )
            figures["compiled"] = compile_stage(stage, tpu_slice, settings.fsdp)
            add_time(figures, chip, tpu_slice.chips)
    forward = {figures["name"]: figures["forward_flops"] for figures in report["stages"]}
    report["presets"] = {
        name: sampling_cost([stage for stage in sampled if stage.name in forward], forward)
        for name, sampled in (presets or {}).items()
    }
    print(table(report), flush=True)
    if workdir is not None:
        write_json(workdir / "plan.json", report)
        logging.info("wrote %s", workdir / "plan.json")
    return report


def estimate(stages: Sequence[Stage], fsdp: int, request: PlanSettings) -> dict[str, Any]:
    """Everything but the TPU compiler's word, as plain numbers (bytes, FLOPs, seconds, days).

    Ready for JSON. Raises UserError for devices that cannot share
    the batch or the parameters.
    """
    devices = request.slice.chips if request.slice else request.devices
    if not devices:
        # As many as people have, and no fewer images on each than a
        # part of a batch has.
        batches = [stage.train.batch // stage.train.accumulate for stage in stages]
        devices = math.gcd(64, *batches)
    if devices < 1 or fsdp < 1 or devices % fsdp:
        raise UserError(f"mesh.fsdp {fsdp} does not divide {devices} devices")
    # Every device computes the same number of images of every part.
    for stage in stages:
        batch, parts = stage.train.batch, stage.train.accumulate
        if batch % (devices * parts):
            raise UserError(
                f"stage {stage.name}: train.batch {batch} is not divisible by {devices} "
                f"devices times train.accumulate {parts}"
            )
    figures = [_estimate_stage(stage, fsdp, devices, request) for stage in stages]
    return {
        "devices": devices,
        "fsdp": fsdp,
        "utilisation": request.utilisation,
        "stages": figures,
        "total": _total(figures, devices, request),
    }


def _total(stages: Sequence[dict[str, Any]], devices: int, request: PlanSettings) -> dict[str, Any]:
    """Of a whole relay: days of training its stages one after the other, and sampling."""
    flops = sum(stage["sampling"]["flops"] for stage in stages)
    # One device samples an image; all of
    # them together the 50,000 of a score.
    seconds = {d.name: flops / (d.peak * request.utilisation) for d in request.chosen}
    return {
        "days": {
            device.name: sum(stage["hardware"][device.name]["days"] for stage in stages)
            for device in request.chosen
        },
        "sampling": {
            "flops": flops,
            "evaluations": sum(stage["sampling"]["evaluations"] for stage in stages),
            "samples": SAMPLES,
            "samples_flops": flops * SAMPLES,
            "seconds": seconds,
            "samples_hours": {n: s * SAMPLES / devices / 3600 for n, s in seconds.items()},
        },
    }


def _estimate_stage(stage: Stage, fsdp: int, devices: int, request: PlanSettings) -> dict[str, Any]:
    train, forward, step = stage.train, forward_flops(stage), train_flops(stage)
    # Both, whatever the stage has: the table says what the other
    # choice would change.
    whole, lean = (memory(stage, devices, fsdp, remat) for remat in (False, True))
    (calls, evaluations), sampling = sampler_calls(stage), stage_flops(stage, forward)
    hardware = {}
    for device in request.chosen:
        rate = devices * device.peak * request.utilisation / step
        hardware[device.name] = {
            "fits": whole.total <= device.memory,
            "fits_with_remat": lean.total <= device.memory,
            "room": whole.room(device.memory),
            "room_with_remat": lean.room(device.memory),
            "images_per_second": rate,
            "step_seconds": train.batch / rate,
            "days": train.images / rate / 86400,
            "sampling_seconds": sampling / (device.peak * request.utilisation),
        }
    return {
        "name": stage.name,
        "resolution": stage.resolution,
        "remat": stage.network.remat,
        "dtype": jnp.dtype(stage.network.dtype).name,
        "batch": train.batch,
        "accumulate": train.accumulate,
        "parameters": parameter_count(abstract_state(stage).params),
        "images": train.images,
        "steps": train.steps,
        "forward_flops": forward,
        "train_flops": step,
        "memory": whole.report(),
        "memory_with_remat": lean.report(),
        "hardware": hardware,
        "sampling": {
            "calls": calls,
            "evaluations": evaluations,
            "flops": sampling,
        },
    }


def table(report: dict[str, Any]) -> str:
    """A report of `plan` for people; decimal prefixes. room: images per device that fit at once."""
    count, fsdp = report["devices"], report["fsdp"]
    lines = [
        f"{count} devices as data x fsdp = {count // fsdp} x {fsdp}; assumed utilisation "
        f"{report['utilisation']:.0%} of the vendors' bfloat16 peaks"
    ]
    for stage in report["stages"]:
        lines += ["", *_stage_lines(stage)]
        lines += describe(stage["compiled"]) if "compiled" in stage else []
    total, sampling = report["total"], report["total"]["sampling"]
    lines += [
        "",
        f"all stages: {sampling['evaluations']} evaluations and {si(sampling['flops'])}FLOP "
        f"per sample, {si(sampling['samples_flops'])}FLOP for {SAMPLES:,} samples",
    ]
    for name, days in total["days"].items():
        lines.append(
            f"  {name:6}{days:8.3g} days of training, {sampling['seconds'][name]:.3g} s per "
            f"sample on one device, {sampling['samples_hours'][name]:.3g} h for {SAMPLES:,} on "
            f"{count}"
        )
    presets = report.get("presets", {})
    if presets:
        lines += ["", "presets (--preset=NAME), per sample:"]
    for name, cost in presets.items():
        lines.append(
            f"  {name:10}{cost['calls']:5} denoiser calls {cost['evaluations']:5} evaluations "
            f"{si(cost['flops']):>9}FLOP"
        )
    return "\n".join(lines)


def _stage_lines(stage: dict[str, Any]) -> list[str]:
    """The part of a table about one stage."""
    need, lean, sampling = (
        stage["memory"],
        stage["memory_with_remat"],
        stage["sampling"],
    )
    names = ("parameters", "optimiser", "ema", "gradients", "copies", "activations")
    kinds = ", ".join(f"{name} {si(need[name])}B" for name in names)
    lines = [
        f"stage {stage['name']}: {size_text(stage['resolution'])} px, "
        f"{stage['parameters'] / 1e6:.2f}M parameters, {stage['dtype']}, "
        f"remat {'on' if stage['remat'] else 'off'}, "
        f"{stage['images']:,} images in {stage['steps']:,} steps of {stage['batch']:,}, "
        f"{need['images']} per device at once",
        f"  FLOP per image     forward {si(stage['forward_flops'])} "
        f"({stage['forward_flops'] / 2e9:,.1f} GMAC), training step {si(stage['train_flops'])}",
        f"  memory per device  {kinds}; in all {si(need['total'])}B",
        f"                     with remat: activations {si(lean['activations'])}B; in all "
        f"{si(lean['total'])}B",
        f"  sampling an image  {sampling['calls']} denoiser calls, {sampling['evaluations']} "
        f"evaluations of the network, {si(sampling['flops'])}FLOP",
        "",
        "  device   FLOP/s       HBM  fits  with remat  room (with remat)   images/s    step s"
        "      days  s/sample",
    ]
    # In the order of DEVICES, also for a report that was read back
    # from its file.
    for device in DEVICES:
        if row := stage["hardware"].get(device.name):
            fits, lean_fits = ("yes" if row[key] else "no" for key in ("fits", "fits_with_remat"))
            room = f"{row['room']:,} ({row['room_with_remat']:,})"
            lines.append(
                f"  {device.name:6}{si(device.peak):>9}{si(device.memory):>9}B{fits:>6}"
                f"{lean_fits:>12}{room:>19}{row['images_per_second']:11,.0f}"
                f"{row['step_seconds']:10.3g}{row['days']:10.3g}{row['sampling_seconds']:10.3g}"
            )
    return lines

"""What a relay will cost, before it is launched: parameters, FLOPs, memory, days, seconds per
sample.

    python -m relay_jax.main --config=configs/imagenet256.py --mode=plan --devices=256
    python -m relay_jax.main --config=configs/imagenet256.py --mode=plan --topology=v5e:16x16

Nothing is compiled or allocated without --topology; with it the TPU compiler is asked as well
(planning/tpu_compile.py). FLOPs       twice the multiply-adds of convolutions and matrix products, read from the traced program, for one image;
            a training step is the gradient of the loss, recomputation by remat included; Adam
            is left out (some 20 per parameter and step). XLA's own count of the same program is
            lower: it leaves out products with padding.
Memory      exact from shapes and the sharding rule, but for the activations: what the backward pass keeps, as jax
            differentiates the loss (a trace of shapes), before XLA fuses and recomputes; with
            remat, plus the
            insides of the largest block. An upper estimate. Weights that fsdp gathers while in
            use are left out.
Time        FLOPs over the vendors' bfloat16 peaks times a utilisation that is an assumption, printed with the result.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.extend import core
from jax.sharding import AbstractMesh

from relay_jax.config import ConfigError, Stage
from relay_jax.diffusion.sampler import EdmSampler
from relay_jax.models.unet import parameter_count
from relay_jax.planning.tpu_compile import (
    Topology,
    abstract_batch,
    abstract_key,
    abstract_state,
    add_time,
    compile_stage,
    describe,
    require_libtpu,
)
from relay_jax.runtime.flops import DEVICES, Device, matmul_flops, si
from relay_jax.runtime.logs import write_json
from relay_jax.runtime.sharding import state_shardings
from relay_jax.training.step import make_loss_fn, value_and_gradient

SAMPLES = 50_000  # images that a score is computed from (SPEC section 9)
DEFAULT_UTILISATION = (
    0.4  # share of the peak that a training or sampling step reaches: an assumption
)


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device by kind. With accumulation `images` are those of one part, and
    gradients are two sets: the part's and their sum."""

    parameters: int
    optimiser: int
    ema: int
    gradients: int
    copies: int  # weights in the precision of the activations
    per_image: int  # activations and batch, one image
    images: int  # at once

    @property
    def fixed(self) -> int:
        return self.parameters + self.optimiser + self.ema + self.gradients + self.copies

    @property
    def activations(self) -> int:
        return self.per_image * self.images

    @property
    def total(self) -> int:
        return self.fixed + self.activations

    def report(self) -> dict[str, int]:
        """Every kind and the totals, for JSON."""
        return {**asdict(self), "activations": self.activations, "total": self.total}

    def room(self, memory: float) -> int:
        """Images per device that fit into `memory` bytes."""
        return max(int((memory - self.fixed) // self.per_image), 0)


def forward_flops(stage: Stage) -> int:
    """Of one call of the network with one image."""
    network, shape = stage.network, jax.ShapeDtypeStruct
    params = abstract_state(stage)[1].params
    image = shape((1, network.resolution, network.resolution, network.image_channels), jnp.float32)
    labels = shape((1, network.num_classes), jnp.float32) if network.num_classes else None
    return matmul_flops(
        jax.make_jaxpr(lambda p, *inputs: network.apply({"params": p}, *inputs))(
            params, image, shape((1,), jnp.float32), labels
        ).jaxpr
    )


def train_flops(stage: Stage) -> int:
    """Of the loss and its gradient, for one image."""
    params = abstract_state(stage)[1].params
    return matmul_flops(
        jax.make_jaxpr(
            lambda p, batch, key: value_and_gradient(make_loss_fn(stage), p, batch, key, 1)
        )(params, abstract_batch(stage, 1), abstract_key()).jaxpr
    )


def sampler_calls(stage: Stage) -> tuple[int, int]:
    """Calls of the denoiser for one image (2N - 1 for N levels), and evaluations of the network
    behind them: two where guidance acts (SPEC sections 5.4 and 5.5)."""
    sigmas = stage.sampler.sigmas()
    churn = stage.sampler.churn() if isinstance(stage.sampler, EdmSampler) else 0.0
    seen = np.concatenate(
        [sigmas[:-1] * (1 + churn), sigmas[1:-1]]
    )  # each level, and its correction
    low, high = stage.guidance.interval
    guided = int(np.sum((low <= seen) & (seen <= high))) if stage.guidance.weight > 1 else 0
    return len(seen), len(seen) + guided


def activation_bytes(stage: Stage, remat: bool) -> tuple[int, int]:
    """Bytes that wait for the backward pass, of one image and of the weights' copies in another
    precision."""
    stage = replace(stage, network=stage.network.clone(remat=remat))
    network_loss, params, key = make_loss_fn(stage), abstract_state(stage)[1].params, abstract_key()
    sizes = {leaf.size for leaf in jax.tree.leaves(params)}
    images = next(
        b for b in (17, 19, 23, 29, 31) if all(size % b for size in sizes)
    )  # its multiples are activations
    batch = abstract_batch(stage, images)

    def loss_fn(params: dict, batch: dict, key: jax.Array) -> jax.Array:
        return network_loss(params, batch, jnp.arange(images), key)

    kept, copies = _kept(
        lambda p, b, k: jax.vjp(lambda q: loss_fn(q, b, k), p)[1], (params, batch, key), images
    )
    if remat:
        blocks = [
            equation.params["jaxpr"]
            for equation in jax.make_jaxpr(loss_fn)(params, batch, key).eqns
            if equation.primitive.name in ("remat2", "checkpoint")
        ]
        largest = max(
            blocks, key=lambda block: sum(v.aval.size for e in block.eqns for v in e.outvars)
        )
        function = core.jaxpr_as_fun(core.ClosedJaxpr(largest, ()))
        kept += _kept(
            lambda *a: jax.vjp(function, *a)[1], [v.aval for v in largest.invars], images
        )[0]
    return kept, copies


def _kept(residuals: Callable[..., Any], arguments: Sequence[Any], images: int) -> tuple[int, int]:
    """Bytes per image, and of casts of the weights, that a function of abstract arguments
    returns."""
    per_image = copies = 0
    for leaf in jax.tree.leaves(jax.eval_shape(residuals, *arguments)):
        if leaf.size % images == 0:
            per_image += leaf.size // images * leaf.dtype.itemsize
        elif (
            leaf.ndim and leaf.dtype != jnp.float32
        ):  # float32: the parameters; a number: which platform's branch
            copies += leaf.size * leaf.dtype.itemsize
    return per_image, copies


def memory(stage: Stage, devices: int, fsdp: int, remat: bool) -> Memory:
    """Of one of `devices`, on a mesh that splits the parameters over `fsdp` of them."""
    state = abstract_state(stage)[1]
    mesh = AbstractMesh((devices // fsdp, fsdp), ("data", "fsdp"))

    def shard(tree: Any) -> int:
        places = state_shardings(tree, mesh)
        return sum(
            math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
            for leaf, place in zip(jax.tree.leaves(tree), jax.tree.leaves(places), strict=True)
        )

    per_image, copies = activation_bytes(stage, remat)
    per_image += sum(leaf.size * leaf.dtype.itemsize for leaf in abstract_batch(stage, 1).values())
    return Memory(
        parameters=shard(state.params),
        optimiser=shard(state.opt_state),
        ema=shard(state.ema),
        gradients=shard(state.params) * min(stage.train.accumulate, 2),
        copies=copies,
        per_image=per_image,
        images=stage.train.batch // (devices * stage.train.accumulate),
    )


def estimate(
    stages: Sequence[Stage],
    *,
    fsdp: int = 1,
    devices: int = 0,
    utilisation: float = DEFAULT_UTILISATION,
    hardware: Sequence[str] = (),
) -> dict[str, Any]:
    """Everything but the TPU compiler's word, as plain numbers (bytes, FLOPs, seconds, days)
    ready for JSON.

    devices: chips of the training, 0 for the most up to 64 that divide every batch. hardware:
    names from DEVICES, none
    for all. Raises ConfigError for a number of devices or a name that cannot be.
    """
    devices = devices or math.gcd(
        64, *(stage.train.batch // stage.train.accumulate for stage in stages)
    )
    chosen = [device for device in DEVICES if not hardware or device.name in hardware]
    unknown = set(hardware) - {device.name for device in DEVICES}
    if unknown:
        raise ConfigError(
            f"unknown device {min(unknown)!r}; known are {', '.join(d.name for d in DEVICES)}"
        )
    if not 0 < utilisation <= 1:
        raise ConfigError(f"utilisation must lie in (0, 1], not {utilisation}")
    if devices < 1 or fsdp < 1 or devices % fsdp:
        raise ConfigError(f"mesh.fsdp {fsdp} does not divide {devices} devices")
    for stage in stages:
        batch, parts = stage.train.batch, stage.train.accumulate
        if batch % (devices * parts):
            raise ConfigError(
                f"stage {stage.name}: train.batch {batch} is not divisible by {devices} "
                "devices times "
                f"train.accumulate {parts}"
            )
    found = [_estimate_stage(stage, fsdp, devices, utilisation, chosen) for stage in stages]
    sampling = sum(stage["sampling"]["flops"] for stage in found)
    total = {
        "days": {d.name: sum(stage["hardware"][d.name]["days"] for stage in found) for d in chosen},
        "sampling": {
            "flops": sampling,
            "evaluations": sum(stage["sampling"]["evaluations"] for stage in found),
            "samples": SAMPLES,
            "samples_flops": sampling * SAMPLES,
            "seconds": {d.name: sampling / (d.peak * utilisation) for d in chosen},
            "samples_hours": {
                d.name: sampling * SAMPLES / (d.peak * utilisation * devices) / 3600 for d in chosen
            },
        },
    }
    return {
        "devices": devices,
        "fsdp": fsdp,
        "utilisation": utilisation,
        "stages": found,
        "total": total,
    }


def _estimate_stage(
    stage: Stage, fsdp: int, devices: int, utilisation: float, chosen: Sequence[Device]
) -> dict[str, Any]:
    train, forward, step = stage.train, forward_flops(stage), train_flops(stage)
    whole, lean = (memory(stage, devices, fsdp, remat) for remat in (False, True))
    calls, evaluations = sampler_calls(stage)
    hardware = {}
    for device in chosen:
        rate = devices * device.peak * utilisation / step
        hardware[device.name] = {
            "fits": whole.total <= device.memory,
            "fits_with_remat": lean.total <= device.memory,
            "room": whole.room(device.memory),
            "room_with_remat": lean.room(device.memory),
            "images_per_second": rate,
            "step_seconds": train.batch / rate,
            "days": train.images / rate / 86400,
            "sampling_seconds": evaluations * forward / (device.peak * utilisation),
        }
    return {
        "name": stage.name,
        "resolution": stage.resolution,
        "remat": stage.network.remat,
        "dtype": jnp.dtype(stage.network.dtype).name,
        "batch": train.batch,
        "accumulate": train.accumulate,
        "parameters": parameter_count(abstract_state(stage)[1].params),
        "images": train.images,
        "steps": train.steps,
        "forward_flops": forward,
        "train_flops": step,
        "memory": whole.report(),
        "memory_with_remat": lean.report(),
        "hardware": hardware,
        "sampling": {"calls": calls, "evaluations": evaluations, "flops": evaluations * forward},
    }


def plan(
    stages: Sequence[Stage],
    *,
    fsdp: int = 1,
    devices: int = 0,
    utilisation: float = DEFAULT_UTILISATION,
    hardware: Sequence[str] = (),
    topology: str = "",
    workdir: Path | None = None,
) -> dict[str, Any]:
    """--mode=plan: prints the table, writes WORKDIR/plan.json, returns the report of `estimate`.

    topology: a TPU slice such as v5e:4x4; its chips are the devices, and each stage gets
    "compiled", the numbers of `tpu_compile.analyse` with the time and utilisation that follow.
    Raises ConfigError, one line for the user.
    """
    jax.config.update(
        "jax_platforms", "cpu"
    )  # shapes need no accelerator, and must not wait for one
    slice_ = Topology(topology) if topology else None
    if slice_:
        if devices not in (0, slice_.chips):
            raise ConfigError(
                f"{topology} has {slice_.chips} chips, not {devices}; leave --devices out"
            )
        require_libtpu()
        devices, hardware = slice_.chips, hardware or (slice_.generation,)
    report = estimate(
        stages, fsdp=fsdp, devices=devices, utilisation=utilisation, hardware=hardware
    )
    for stage, found in zip(stages, report["stages"], strict=True):
        if slice_:
            logging.info(
                "compiling stage %s for %s; a published stage takes many minutes",
                stage.name,
                topology,
            )
            found["compiled"] = compile_stage(stage, slice_, fsdp)
            add_time(found, next(d for d in DEVICES if d.name == slice_.generation), slice_.chips)
    print(table(report), flush=True)
    if workdir is not None:
        write_json(workdir / "plan.json", report)
        logging.info("wrote %s", workdir / "plan.json")
    return report


def table(report: dict[str, Any]) -> str:
    """A report of `plan` for people; decimal prefixes. room: images per device that fit at once."""
    count, fsdp = report["devices"], report["fsdp"]
    lines = [
        f"{count} devices as data x fsdp = {count // fsdp} x {fsdp}; assumed utilisation "
        f"{report['utilisation']:.0%} of the vendors' bfloat16 peaks"
    ]
    for stage in report["stages"]:
        need, lean, sampling = stage["memory"], stage["memory_with_remat"], stage["sampling"]
        kinds = ", ".join(
            f"{kind} {si(need[kind])}B"
            for kind in ("parameters", "optimiser", "ema", "gradients", "copies", "activations")
        )
        lines += [
            "",
            f"stage {stage['name']}: {stage['resolution']} px, "
            f"{stage['parameters'] / 1e6:.2f}M parameters, "
            f"{stage['dtype']}, remat {'on' if stage['remat'] else 'off'}, {stage['images']:,} "
            "images in "
            f"{stage['steps']:,} steps of {stage['batch']:,}, {need['images']} per device at once",
            f"  FLOP per image     forward {si(stage['forward_flops'])} "
            f"({stage['forward_flops'] / 2e9:,.1f} GMAC), "
            f"training step {si(stage['train_flops'])}",
            f"  memory per device  {kinds}; in all {si(need['total'])}B",
            f"                     with remat: activations {si(lean['activations'])}B; in all "
            f"{si(lean['total'])}B",
            f"  sampling an image  {sampling['calls']} denoiser calls, "
            f"{sampling['evaluations']} evaluations of the "
            f"network, {si(sampling['flops'])}FLOP",
            "",
            "  device   FLOP/s       HBM  fits  with remat  room (with remat)   images/s    "
            "step s      days  s/sample",
        ]
        for device in DEVICES:
            if row := stage["hardware"].get(device.name):
                fits, lean_fits = (
                    "yes" if row[key] else "no" for key in ("fits", "fits_with_remat")
                )
                room = f"{row['room']:,} ({row['room_with_remat']:,})"
                lines.append(
                    f"  {device.name:6}{si(device.peak):>9}{si(device.memory):>9}B{fits:>6}{lean_fits:>12}{room:>19}"
                    f"{row['images_per_second']:11,.0f}{row['step_seconds']:10.3g}{row['days']:10.3g}"
                    f"{row['sampling_seconds']:10.3g}"
                )
        lines += describe(stage["compiled"]) if "compiled" in stage else []
    total, sampling = report["total"], report["total"]["sampling"]
    lines += [
        "",
        f"all stages: {sampling['evaluations']} evaluations and {si(sampling['flops'])}FLOP "
        "per sample, "
        f"{si(sampling['samples_flops'])}FLOP for {SAMPLES:,} samples",
    ]
    for name, days in total["days"].items():
        lines.append(
            f"  {name:6}{days:8.3g} days of training, {sampling['seconds'][name]:.3g} s per "
            "sample on one "
            f"device, {sampling['samples_hours'][name]:.3g} h for {SAMPLES:,} on {count}"
        )
    return "\n".join(lines)

"""Against PyTorch: forward pass, training step and sampling of a stage from the same weights,
in one run.

    python -m benchmarks.pytorch --config=configs/demo.py --stage=relay
    python -m benchmarks.pytorch --config=configs/imagenet256.py --stage=base --batch=16 --compile

Needs torch (pip install torch), which nothing else does. Outputs and gradients are compared
before anything is timed. On CPU both compute in float32; on a GPU in the stage's own dtype,
PyTorch by autocast. The baseline is the faster of
the layouts NCHW and NHWC, for each measurement.
"""

import json
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import torch
from absl import flags

from benchmarks import settings
from benchmarks.programs import (
    Program,
    forward_inputs,
    forward_program,
    machine,
    random_batch,
    random_params,
    sample_program,
    train_program,
)
from benchmarks.timing import in_turns, ratio
from benchmarks.torch_relay import TorchStage
from relay_jax.runtime.sharding import make_mesh
from relay_jax.stage import Stage

_COMPILE = flags.DEFINE_bool(
    "compile", False, "Let torch.compile compile the baseline's network.", **settings.HERE
)
TOLERANCE = 1e-4  # of outputs and gradients, in float32, relative to the largest


def channels_first(x: np.ndarray) -> torch.Tensor:
    return torch.tensor(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))


def differences(stage: Stage, params: dict) -> tuple[float, float]:
    """Largest difference between the two networks, in float32 on 2 images: of the outputs, and
    of the gradient of their mean square, over the largest value of the leaf."""
    net = stage.network.clone(dtype=jnp.float32, dropout=0.0)
    x, c_noise, labels = forward_inputs(stage)
    x, c_noise, labels = x[:2], c_noise[:2], None if labels is None else labels[:2]

    def loss(p: dict) -> tuple[jax.Array, jax.Array]:
        out = net.apply({"params": p}, x, c_noise, labels)
        return jnp.mean(jnp.square(out)), out

    with jax.default_matmul_precision("highest"):
        gradient, out = jax.jit(jax.grad(loss, has_aux=True))(params)
    twin = TorchStage(stage, jax.device_get(params), "cpu", half=False, channels_last=False)
    output = twin.model(
        channels_first(x), torch.tensor(c_noise), None if labels is None else torch.tensor(labels)
    )
    output.square().mean().backward()
    expected = twin.model.state_dict()
    twin.model.load_flax(jax.device_get(gradient))  # our gradient in their names and layouts
    gradients = {name: value.clone() for name, value in twin.model.state_dict().items()}
    apart = max(
        float((gradients[name] - p.grad).abs().max() / (p.grad.abs().max() + 1e-12))
        for name, p in twin.model.named_parameters()
        if p.grad is not None
    )
    assert set(expected) == set(gradients)
    scale = float(output.detach().abs().max())
    return float(
        np.abs(np.asarray(out) - output.detach().numpy().transpose(0, 2, 3, 1)).max()
    ) / scale, apart


def torch_functions(
    stage: Stage, params: dict, device: str, channels_last: bool, kinds: Sequence[str]
) -> dict[str, Callable[[], Any]]:
    """The baseline's functions; each waits for its result."""
    half = device == "cuda" and stage.network.dtype == jnp.bfloat16
    twin = TorchStage(stage, jax.device_get(params), device, half, channels_last)
    if _COMPILE.value:
        twin.call = torch.compile(twin.model)
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    inputs = forward_inputs(stage)
    x = channels_first(inputs[0]).to(device).contiguous(memory_format=twin.format)
    c_noise, labels = (None if a is None else torch.tensor(a).to(device) for a in inputs[1:])
    images = channels_first(random_batch(stage, stage.train.batch)["image"]).to(device)
    start = x if twin.relay is None else torch.rand_like(x) * 2 - 1

    @torch.inference_mode()
    def forward() -> None:
        twin.model.eval()
        with torch.autocast(device, torch.bfloat16, enabled=half):
            twin.call(x, c_noise, labels)
        wait()

    def train() -> None:
        twin.train_step(images, labels)
        wait()

    def sample() -> None:
        twin.sample(start, labels)
        wait()

    return {
        name: f
        for name, f in {"forward": forward, "train": train, "sample": sample}.items()
        if name in kinds
    }


def compare(stage: Stage, rounds: int, kinds: Sequence[str]) -> list[dict[str, Any]]:
    """Rows of the table for one stage, train.batch images at a time."""
    mesh, params = make_mesh(), random_params(stage, make_mesh())
    makers: dict[str, Callable[..., Program]] = {
        "forward": forward_program,
        "train": lambda s, m, p: train_program(s, m),
        "sample": sample_program,
    }
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    baselines = {
        name: torch_functions(stage, params, device, name == "NHWC", kinds)
        for name in ("NCHW", "NHWC")
    }
    rows = []
    for kind in kinds:
        program = makers[kind](stage, mesh, params)
        seconds = in_turns(
            {"ours": program.run, **{name: f[kind] for name, f in baselines.items()}},
            rounds,
            1 if kind == "sample" else 3,
        )
        layout = min(baselines, key=lambda name: np.median(seconds[name]))
        middle, low, high = ratio(seconds[layout], seconds["ours"])
        own_seconds, baseline_seconds = np.median(seconds["ours"]), np.median(seconds[layout])
        rows.append(
            {
                "stage": stage.name,
                "what": kind,
                "batch": stage.train.batch,
                "ours ms": f"{own_seconds * 1e3:.1f}",
                "PyTorch ms": f"{baseline_seconds * 1e3:.1f}",
                "layout": layout,
                "images/s": f"{program.images / own_seconds:.3g}",
                "TFLOP/s": f"{program.flops / own_seconds / 1e12:.3g}",
                "ratio": f"{middle:.2f}",
                "quartiles": f"{low:.2f}-{high:.2f}",
            }
        )
        print(json.dumps(rows[-1]), flush=True)
    return rows


def main() -> None:
    stages, kinds, rows = settings.stages(), settings.kinds(("forward", "train", "sample")), []
    if jax.default_backend() == "cpu":
        torch.set_num_threads(len(settings.cores()))
    for stage in stages:
        outputs, gradients = differences(stage, random_params(stage, make_mesh()))
        print(
            f"stage {stage.name}: outputs differ by {outputs:.1e}, gradients by "
            f"{gradients:.1e} of their largest"
        )
        if not max(outputs, gradients) < TOLERANCE:
            settings.fail(f"stage {stage.name}: the two networks are not the same")
        rows += compare(stage, settings.rounds(), kinds)
    facts = {**machine(), "torch": torch.__version__, "torch threads": torch.get_num_threads()}
    settings.finish(facts, rows, settings.out())


if __name__ == "__main__":
    settings.run(main)

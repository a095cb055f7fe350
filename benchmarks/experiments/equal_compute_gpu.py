"""Relay, cascade and a single stage on CIFAR-10 at the same training FLOPs, for one GPU: `:gpu`.

As equal_compute, with the larger networks of configs/cifar10.py:gpu in bfloat16, three seeds, and
about the FLOPs of its whole training. Not yet measured.
"""

from dataclasses import replace

from benchmarks.experiments.equal_compute import EXPERIMENT as ON_CPU

CONFIGS = {"single": "configs/cifar10.py:gpu-single"}

EXPERIMENT = replace(
    ON_CPU,
    name="equal_compute_gpu",
    config="configs/cifar10.py:gpu",
    flops=2e16,
    budgets=(0.1, 0.3, 1.0),
    seeds=(0, 1, 2),
    sweep=("fast", "safe", "draft", "official"),
    arms=tuple(replace(arm, config=CONFIGS.get(arm.name, "")) for arm in ON_CPU.arms),
)

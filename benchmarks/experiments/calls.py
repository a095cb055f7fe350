"""The presets on the CIFAR-10 relay: score against calls of the denoiser, draft to official."""

from benchmarks.experiment import Arm, Experiment
from benchmarks.experiments.equal_compute import EXPERIMENT as EQUAL_COMPUTE
from benchmarks.experiments.equal_compute import TWO_STAGES

EXPERIMENT = Experiment(
    name="calls",
    config="configs/cifar10.py",
    flops=EQUAL_COMPUTE.flops,
    samples=10_000,
    features="efficientnet-lite0",
    sweep=("official", "safe", "fast", "draft", "fast:relay.handoff=noise"),
    arms=(Arm("relay", shares=TWO_STAGES),),
)

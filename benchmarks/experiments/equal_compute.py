"""Relay, cascade and a single stage on CIFAR-10, class-conditional, at the same training FLOPs.

Does continuing the diffusion at 32 px from a generated 8 px image beat what it replaces: a
super-resolution stage that is conditioned on that image (Ho et al. 2021, arXiv 2106.15282), and
one EDM stage at 32 px? All three 32 px networks are the same but for the cascade's input.
"""

from benchmarks.experiment import Arm, Experiment

TWO_STAGES = {"base": 0.15, "relay": 0.85}
CASCADE = {
    "stages.relay.process.kind": "cascade",
    "stages.relay.sample.fresh_noise": 0.0,
    "stages.relay.sample.num_steps": 18,
}

EXPERIMENT = Experiment(
    name="equal_compute",
    config="configs/cifar10.py",
    flops=2.5e14,
    budgets=(0.25, 1.0),
    samples=10_000,
    features="efficientnet-lite0",
    sweep=("fast", "draft"),
    arms=(
        Arm("relay", shares=TWO_STAGES),
        Arm("cascade", shares=TWO_STAGES, overrides=CASCADE),
        Arm("single", config="configs/cifar10.py:single", shares={"base": 1.0}),
    ),
)

"""What each part of the relay contributes: CIFAR-10 at 4 -> 16 px with small networks.

Trained anew: the relay with other block noise or blur, both stages with dropped labels. Sampled
anew from the trained relay: fresh noise, hand-off level, where the hand-off comes from, the exact
first blur.
"""

from benchmarks.experiment import Arm, Experiment

SMALL = {
    "stages.base.resolution": 4,
    "stages.base.model.channels": 32,
    "stages.base.model.multipliers": (1, 1),
    "stages.base.model.attention": (4,),
    "stages.relay.resolution": 16,
    "stages.relay.model.channels": 32,
    "stages.relay.model.multipliers": (1, 1, 2),
    "stages.relay.model.attention": (8,),
}
SHARES = {"base": 0.2, "relay": 0.8}
PROCESS = "stages.relay.process"
SAMPLINGS = (
    "official",
    "official:relay.fresh_noise=0",
    "official:relay.handoff_sigma=0.5",
    "official:relay.handoff_sigma=1.4",
    "safe",
    "safe:relay.exact_first_blur=False",
    "safe:relay.handoff=noise",
)


def trained(name: str, sweep: tuple[str, ...] = ("official",), **overrides: object) -> Arm:
    """An arm that differs in training; overrides: keys of the relay's process."""
    changes = {f"{PROCESS}.{key}": value for key, value in overrides.items()}
    base = "relay" if name != "relay" else ""
    return Arm(name, shares=SHARES, sweep=sweep, overrides=changes, base=base)


EXPERIMENT = Experiment(
    name="ablations",
    config="configs/cifar10.py",
    overrides=SMALL,
    flops=1e13,
    seeds=(0, 1),
    samples=1_000,
    features="random-conv",
    sweep=SAMPLINGS,
    arms=(
        trained("relay", SAMPLINGS),
        trained("block noise 0", block_noise_scale=0.0),
        trained("block noise 0.4", block_noise_scale=0.4),
        trained("no blur", blur_sigma_max=1e-3),
        trained("linear blur", kind="relay_linear"),
        Arm(
            "dropped labels",
            shares=SHARES,
            sweep=("official", "official:relay.guidance=1.5:base.guidance=1.5"),
            overrides={f"stages.{s}.train.label_dropout": 0.1 for s in SHARES},
        ),
    ),
)

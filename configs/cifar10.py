"""CIFAR-10, 8 -> 32 px, class-conditional: a relay on real photographs.

Command:   python -m relay_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 \
               --config.dataset.path=data/cifar10-train-32x32.zip
Hardware:  one GPU, or overnight on a laptop; not yet measured.
Score:     not yet measured.
Baselines: with --config.stages.relay.process.kind=cascade the second stage is an ordinary
           super-resolution stage; configs/cifar10.py:single is one stage at 32 px, without a relay.
"""

from ml_collections import ConfigDict

from relay_jax.configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.dataset.update(
        source="zip",
        path="data/cifar10-train-32x32.zip",
        num_classes=10,
        hint="make it with EDM's dataset_tool.py, or name yours with --config.dataset.path",
    )

    base = default.edm_stage(8)
    base.model.update(channels=64, multipliers=(1, 2), blocks=2, attention=(8, 4))
    base.train.update(images=20_000_000, batch=512, learning_rate=5e-4, warmup_images=500_000)

    relay = default.relay_stage(32, patch=4)
    relay.model.update(channels=64, multipliers=(1, 2, 2), blocks=2, attention=(16, 8))
    relay.train.update(images=40_000_000, batch=512, learning_rate=5e-4, warmup_images=500_000)
    relay.sample.update(num_steps=80, rho=7.0)

    config.stages.base, config.stages.relay = base, relay
    config.checkpoint.every_images = 500_000
    config.log.grid_every_images = 500_000
    if variant == "single":
        single = default.edm_stage(32)
        single.model, single.train = relay.model, relay.train
        config.stages = ConfigDict(dict(base=single))
    return default.variant(config, variant, {"single": {}})

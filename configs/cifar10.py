"""CIFAR-10, 8 -> 32 px, class-conditional: a relay on real photographs.

Command:   python -m relay_jax.main --config=configs/cifar10.py --workdir=runs/cifar10 \
               --config.dataset.path=data/cifar10-train-32x32.zip
Hardware:  two CPU cores, half an hour: 1,000 images per second of the first stage and 166 of the
           relay on an idle machine, and compilation. :gpu, a whole training: not yet measured. Two
           and a half minutes of it on an H200 (2.6M and 1.4M images, beside other trainings) gave
           the weights of --weights=cifar10.
Score:     two cores: KID 0.041 with --preset=draft, 0.046 with fast, FD 43 and 46 (10,000 samples,
           features of EfficientNet-Lite0; real images 0 and 2.2): ships, horses and deer begin to
           be seen. --weights=cifar10: KID 0.015 with fast (512 samples). docs/experiments.md
Variants:  :gpu for one GPU, half an hour; :single and :gpu-single are one stage at 32 px, without
           a relay, and --config.stages.relay.process.kind=cascade an ordinary super-resolution
           stage (baselines, docs/running.md).
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
    # 0.5M and 1.0M parameters. Of batches of 32 a CPU trains more images per second than of 128,
    # and at 2e-3 the loss falls faster than at 1e-3 or 4e-3.
    base = default.edm_stage(8)
    base.model.update(
        channels=32, multipliers=(1, 1), blocks=2, attention=(8, 4), head_width=32, dropout=0.0
    )
    base.train.update(images=400_000, batch=32, learning_rate=2e-3, warmup_images=5_000)
    base.sample.update(num_steps=18)

    relay = default.relay_stage(32, patch=4)
    relay.model.update(
        channels=32, multipliers=(1, 1, 2), blocks=1, attention=(16, 8), head_width=32, dropout=0.0
    )
    relay.train.update(images=180_000, batch=32, learning_rate=2e-3, warmup_images=5_000)
    relay.sample.update(num_steps=80, rho=7.0)

    config.stages.base, config.stages.relay = base, relay
    config.checkpoint.every_images = 100_000
    config.log.grid_every_images = 200_000
    config.evaluate.update(samples=1_000, preset="fast", class_check=True)
    config.sample.batch = 32  # on a CPU four times as fast as 500
    # 2.0M and 4.0M parameters: 12 MB in bfloat16.
    larger = {"model.channels": 64, "model.dtype": "bfloat16", "train.batch": 256}
    larger |= {"train.learning_rate": 1e-3, "train.warmup_images": 50_000}
    gpu = {f"stages.{stage}.{key}": larger[key] for stage in ("base", "relay") for key in larger}
    gpu |= {
        "stages.base.train.images": 6_000_000,
        "stages.relay.train.images": 4_000_000,
        "dataset.workers": 8,
        "sample.batch": 500,
    }
    single = {f"stages.base.{key}": value for key, value in larger.items()}
    single |= {key: gpu[key] for key in ("dataset.workers", "sample.batch")}
    single["stages.base.train.images"] = gpu["stages.relay.train.images"]
    if variant in ("single", "gpu-single"):
        stage = default.edm_stage(32)
        stage.model, stage.train = relay.model, relay.train
        config.stages = ConfigDict(dict(base=stage))
    return default.variant(config, variant, {"gpu": gpu, "single": {}, "gpu-single": single})

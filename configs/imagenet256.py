"""RDM on ImageNet, 64 -> 256 px, class-conditional: the published settings.

Command:   python -m relay_jax.main --config=configs/imagenet256.py --workdir=runs/imagenet256
Hardware:  TPU v5e:16x16 with --config=configs/imagenet256.py:v5e, v5p:4x4x4 with :v5p (what
           fits is in docs/benchmarks.md), or several GPU nodes; not yet measured.
Score:     not yet measured. Published by the authors (their code, their evaluation): FID 1.87 with
           guidance 3.5, FID 5.27 without.
Departs from the official commands: label dropout 0.1 in the relay stage, without which guidance
has no unconditional branch, and horizontal flips only instead of augmentation
(docs/differences.md).
"""

from ml_collections import ConfigDict

from relay_jax.configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.dataset.update(
        source="folder",
        path="data/imagenet/train",
        num_classes=1000,
        # As ADM's loader, whose images the published statistics are of: it
        # reads no EXIF. Some images of the set lie on a side.
        exif=False,
        threads=16,
        workers=8,
        hint="download ILSVRC2012_img_train.tar from image-net.org and unpack it into one folder "
        "per class there, or use a prepared TFDS copy: --config.dataset.source=tfds "
        "--config.dataset.name=imagenet2012",
    )

    base = default.edm_stage(64)
    base.model.update(
        channels=192, multipliers=(1, 2, 3, 4), blocks=3, dropout=0.1, dtype="bfloat16"
    )
    base.train.update(
        images=2_500_000_000, batch=4096, ema_halflife_images=50e6
    )  # length: EDM table 7
    base.sample.update(num_steps=256, s_churn=40.0, s_min=0.05, s_max=50.0, s_noise=1.003)

    relay = default.relay_stage(256, patch=4)
    relay.model.update(
        channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, dropout=0.1, dtype="bfloat16"
    )
    relay.train.update(images=1_250_000_000, batch=4096, label_dropout=0.1)
    relay.process.update(cdf_max=0.93, blur_sigma_max=3.0)
    relay.sample.update(num_steps=200, rho=100.0, handoff_sigma=0.9, cdf_max=0.93, guidance=3.5)

    config.stages.base, config.stages.relay = base, relay
    return default.variant(config, variant, default.TPU_SLICES)

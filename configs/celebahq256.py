"""RDM on CelebA-HQ, 64 -> 256 px, unconditional: the published settings.

Command:   python -m relay_jax.main --config=configs/celebahq256.py --workdir=runs/celebahq256
Hardware:  TPU v5e:8x8 with --config=configs/celebahq256.py:v5e, v5p:2x2x4 with :v5p (what fits
           is in docs/benchmarks.md), or GPUs; not yet measured.
Score:     not yet measured. Published by the authors (their code, their evaluation): FID 3.15.
"""

from ml_collections import ConfigDict

from relay_jax.configs import default


def get_config(variant: str = "") -> ConfigDict:
    config = default.get_config()
    config.dataset.update(
        source="folder",
        path="data/celebahq256",
        threads=16,
        x_flip=False,  # flips are part of the augmentation
        hint="get the 30,000 CelebA-HQ images (github.com/tkarras/progressive_growing_of_gans) "
        "and put them there as image files of 256 pixels or more",
    )

    base = default.edm_stage(64)
    base.model.update(
        channels=192,
        multipliers=(1, 2, 3, 4),
        blocks=3,
        dropout=0.15,
        num_augment=9,
        dtype="bfloat16",
    )
    base.train.update(images=47_000_000, batch=1024, augment=0.2)
    base.sample.update(num_steps=120, fresh_noise=0.05)

    relay = default.relay_stage(256, patch=4)
    relay.model.update(
        channels=256,
        multipliers=(1, 1, 2, 2, 4, 4),
        blocks=2,
        dropout=0.2,
        num_augment=9,
        dtype="bfloat16",
    )
    relay.train.update(images=47_000_000, batch=1024, augment=0.2)
    relay.process.update(cdf_max=0.89, blur_sigma_max=2.0)
    relay.sample.update(num_steps=150, rho=7.0, handoff_sigma=0.95, cdf_max=1.05)

    config.stages.base, config.stages.relay = base, relay
    return default.variant(config, variant, default.TPU_SLICES)

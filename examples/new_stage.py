"""One more stage: a configuration of three, 8 -> 32 -> 64 pixels.

    python -m relay_jax.main --config=examples/new_stage.py --workdir=runs/three
    python -m relay_jax.main --config=examples/new_stage.py:smoke --workdir=runs/three-smoke

A stage is a name in `stages` and needs no code. Each one after the first continues the images of
the one before, enlarged by its `patch`; the order follows from the resolutions. The name is that of
its folder in the workdir, of --stage and of --weights.NAME.
"""

from ml_collections import ConfigDict

from relay_jax.configs import default, demo


def get_config(variant: str = "") -> ConfigDict:
    config = demo.get_config()
    fine = default.relay_stage(64, patch=2)
    # Later stages have less to invent: a shallow network and few levels are enough.
    fine.model.update(channels=32, multipliers=(1, 1, 2), blocks=1, attention=(), dropout=0.0)
    fine.train.update(images=12_000, batch=16, learning_rate=1e-3, warmup_images=1_000)
    # A blur of one pixel already hides what is smaller than a patch of 2 x 2.
    fine.process.blur_sigma_max = 1.5
    fine.sample.update(num_steps=20, rho=7.0, handoff_sigma=0.9)
    config.stages.fine = fine
    return default.variant(config, variant)

"""Every key of a configuration, once, with its unit and source.

The other files hold only what differs. A configuration is a whole relay: `stages` in order of
resolution, one that starts from noise first, then any number that continue images. Override keys
on the command line: --config.stages.relay.train.batch=32.
Sources: RDM arXiv 2309.03350, EDM arXiv 2206.00364, ADM arXiv 2105.05233.
"""

from ml_collections import ConfigDict, FieldReference

Size = int | tuple[int, int]


def model() -> ConfigDict:
    """The U-Net of one stage (ADM). Another kind has keys of its own beside dtype and remat."""
    return ConfigDict(
        dict(
            kind="unet",  # unet | package.module:Class (models/network.py)
            channels=192,  # base width
            multipliers=(1, 2, 3, 4),  # width of each level over channels, largest level first
            blocks=3,  # residual blocks per level
            attention=(32, 16, 8),  # levels with self-attention, pixels of the shorter side
            head_width=64,  # channels per attention head
            dropout=0.1,
            num_augment=0,  # size of the augmentation label vector: 9 with train.augment, else 0
            dtype="float32",  # activations: float32 or bfloat16; parameters are float32 always
            remat=False,  # recompute blocks in the backward pass: less memory, a third more work
        )
    )


def train() -> ConfigDict:
    """Optimisation of one stage. Progress is counted in images."""
    return ConfigDict(
        dict(
            images=200_000_000,  # length of the training
            batch=1024,  # images per step, over all devices
            accumulate=1,  # parts of a batch that are processed one after the other, to save memory
            learning_rate=1e-4,  # Adam
            warmup_images=10_000_000,  # linear warm-up; small data needs less
            adam_beta1=0.9,
            adam_beta2=0.999,
            adam_epsilon=1e-8,
            ema_halflife_images=500_000.0,
            ema_rampup=0.05,  # the half-life is at most this share of the images seen
            # Further averages beside that one, each another copy of the parameters: below 1 the
            # relative width of a power function, of which snapshots are kept and other widths made
            # afterwards (arXiv 2312.02696: 0.05, 0.10), else a half-life in images.
            ema=(),
            label_dropout=0.0,  # share of images trained without label; needed for guidance
            augment=0.0,  # probability of each augmentation (EDM appendix F.2)
            max_nonfinite=50,  # skipped steps in a row before the run is given up
            clip=0.0,  # longest gradient (norm over all parameters) before Adam; 0 = not clipped
        )
    )


def size(resolution: Size) -> FieldReference:
    """Pixels per side, or (height, width), on the command line --KEY="(64, 96)"."""
    return FieldReference(resolution, field_type=object)


def edm_stage(resolution: Size) -> ConfigDict:
    """A first stage."""
    return ConfigDict(
        dict(
            resolution=size(resolution),  # pixels per side, or (height, width)
            model=model(),
            process=dict(
                kind="edm",  # edm | package.module:Class (diffusion/process.py)
                P_mean=-1.2,  # of ln sigma in training
                P_std=1.2,
                sigma_data=0.5,  # standard deviation of images in [-1, 1]
            ),
            train=train(),
            sample=dict(
                kind="heun",  # heun | multistep | package.module:Class (diffusion/sampler.py)
                num_steps=18,  # levels of the grid
                sigma_min=0.002,
                sigma_max=80.0,
                rho=7.0,  # larger: more levels near sigma_min
                s_churn=0.0,  # EDM algorithm 2, so are the next three
                s_min=0.0,
                s_max=float("inf"),
                s_noise=1.0,
                fresh_noise=0.0,  # share of fresh noise per step (CelebA-HQ)
                correction="official",  # of heun; second_order: without its first-order term
                fresh_noise_rate=0.0,  # of multistep: eta, per factor e of sigma
                corrector=False,  # of multistep: correct each step by the next call
                guidance=1.0,  # classifier-free guidance weight, at most 1 = off
                guidance_interval=(0.0, float("inf")),  # sigmas where it acts
                # Autoguidance (arXiv 2406.02507), in place of the former: FOLDER or FOLDER@STEP of
                # other weights, or STAGE@STEP, an earlier checkpoint of its own; "" = off.
                guide="",
                guide_weight=2.0,  # 1 = off
                guide_interval=(0.0, float("inf")),
                guide_ema="",  # which average of its weights, as below
                ema="",  # average that is sampled: a width or half-life; "" = ema_halflife_images
            ),
        )
    )


def relay_stage(resolution: Size, patch: int = 4) -> ConfigDict:
    """A relay stage; its input is the result of the stage before, of resolution / patch.

    process.kind names another process over the same keys: each takes those that it has.
    """
    return ConfigDict(
        dict(
            resolution=size(resolution),
            model=model(),
            process=dict(
                # relay (DCT blur, RDM) | relay_linear (CogView3's blur) | cascade (no relay: the
                # super-resolution stage that it replaces) | package.module:Class
                # (diffusion/processes.py)
                kind="relay",
                P_mean=-1.2,
                P_std=1.2,
                sigma_data=0.5,
                patch=patch,  # side of the DCT patch = up-sampling factor
                block_noise_scale=0.15,  # weight of the block noise
                cdf_max=0.93,  # share of the noise CDF that the blur schedule spans
                blur_sigma_max=3.0,  # largest blur, pixels of this stage
                min_scale=0.001,  # floor of the attenuation
                sigma_floor=0.0075,  # training draws are clamped here
                sigma_full=0.6,  # of relay_linear: the blur is complete from here on; <= handoff
                # Of cascade: least and largest noise on the image that the network is given in
                # training (Ho et al. 2021, 2106.15282), drawn evenly in its logarithm.
                condition_sigma_min=0.01,
                condition_sigma_max=0.5,
            ),
            train=train(),
            sample=dict(
                kind="heun",
                num_steps=200,
                sigma_min=0.008,
                sigma_max=80.0,
                rho=100.0,
                handoff_sigma=0.9,  # of the grid, only levels below this are used
                cdf_max=0.93,  # as in process, but for sampling
                condition_sigma=0.1,  # of cascade: noise on the image that the network is given
                fresh_noise=0.2,  # share of fresh noise per step
                correction="official",
                fresh_noise_rate=0.0,
                corrector=False,
                direct=True,  # of multistep: num_steps levels from handoff_sigma to sigma_min
                exact_first_blur=False,  # of multistep: the hand-off holds patch means alone
                # image: continues finished images; noise: the state of a first stage that stops
                # at the level of the hand-off over the patch, in law the same.
                handoff="image",
                guidance=1.0,
                guidance_interval=(0.0, float("inf")),
                guide="",  # as above, so are the next four
                guide_weight=2.0,
                guide_interval=(0.0, float("inf")),
                guide_ema="",
                ema="",
            ),
        )
    )


def get_config() -> ConfigDict:
    """Everything that the stages share; the files beside this one add the stages."""
    return ConfigDict(
        dict(
            seed=0,  # of initialisation, data order and training noise
            debug=False,  # find the layer whose output is not finite; --debug
            stages=dict(),
            dataset=dict(
                # synthetic | folder | zip (EDM's format) | npz (ADM's) | tfds | packed
                # | package.module:Class (data/source.py)
                source="synthetic",
                path="",  # folder, zip, npz or packed (--mode=prepare)
                name="",  # of a TFDS data set; so are the next two
                split="train",
                data_dir="",
                num_classes=0,  # 0 = unconditional
                # By what a changed set is recognised: names and sizes of its files (listing), or
                # also their bytes (contents), which reads all of them at every start.
                identity="listing",
                size=50_000,  # images in the synthetic set
                x_flip=True,  # mirror images at random
                exif=True,  # turn photographs as the camera says; False: as stored (ADM)
                background=(255, 255, 255),  # RGB that transparent images are laid on
                threads=2,  # decoding threads per host
                workers=0,  # decoding processes per host, for when threads are not enough
                hint="",  # where to get the data: added to the message when it is missing
            ),
            mesh=dict(
                fsdp=1,  # devices that share one copy of the parameters; the rest is data parallel
            ),
            checkpoint=dict(
                every_images=5_000_000,
                keep=2,  # how many of the newest stay
                keep_every_images=0,  # the first one after each multiple stays for ever, 0 = none
                # Power-function averages of train.ema are kept for ever, at each multiple of this
                # and at the end.
                snapshot_every_images=5_000_000,
            ),
            log=dict(
                every_steps=50,  # progress line and scalars
                grid_every_images=5_000_000,  # sample grids during training, 0 = none
                grid_images=16,
                profile_first=0,  # step of a stage from which a profiler trace is taken, 0 = none
                # Its length; also of one asked for by `touch WORKDIR/STAGE/profile.request`.
                profile_steps=5,
            ),
            sample=dict(
                batch=64,  # images per sampler call, over all devices
                # Colours of the final images: none, or what the official scripts did before
                # scoring: imagenet | celebahq (docs/differences.md).
                pixel_edit="none",
            ),
            evaluate=dict(
                samples=64,  # images of a report: --mode=evaluate, and when all stages are trained
                class_check=False,  # score the samples with a classifier of real images
                # random-conv | efficientnet-lite0 | dinov2-vitl14 | inception |
                # package.module:function
                features="random-conv",
                inception="",  # file of the Inception weights, for features="inception"
                dinov2="",  # file of the DINOv2 weights, for features="dinov2-vitl14"
                reference_images=10_000,  # real images that samples are compared with, 0 = all
                every=0,  # images between small evaluations during training, 0 = none
                every_samples=1_000,  # samples of each of them
                # How a training samples: previews, small evaluations, the report at its end. A
                # preset (below), or "" for what `sample` of the stages says.
                preset="",
                # Pictures of the page at the end: animation, SNR, hand-off check, neighbours.
                pictures=True,
            ),
        )
    )


def _short(resolution: Size) -> int:
    return resolution if isinstance(resolution, int) else min(resolution)


def smoke(config: ConfigDict) -> ConfigDict:
    """Shrinks a configuration to a minute on a laptop: 8 px, synthetic data, tiny networks.

    Keeps what is particular to it: number of stages, processes, sampler kinds, labels, precision.
    """
    stages = [config.stages[name] for name in config.stages]
    # The shorter side of the first stage becomes 8, the longer one keeps to the aspect.
    factor = max(min(_short(stage.resolution) for stage in stages) // 8, 1)
    for stage in stages:
        stage.resolution = (
            stage.resolution // factor
            if isinstance(stage.resolution, int)
            else tuple(side // factor for side in stage.resolution)
        )
        # Another kind of network has a size of its own, which only its file knows to shrink.
        if stage.model.kind == "unet":
            model, levels = stage.model, len(stage.model.multipliers[:2])
            model.channels, model.head_width, model.blocks = 16, 16, 1
            model.multipliers = tuple(min(m, 2) for m in model.multipliers[:2])
            sizes = [_short(stage.resolution) >> level for level in range(levels)]
            model.attention = tuple(
                r // factor for r in model.attention if r // factor in sizes and r // factor <= 8
            )
        stage.train.update(
            images=256, batch=16, warmup_images=64, learning_rate=1e-3, ema_halflife_images=64.0
        )
        stage.sample.num_steps = 4 if stage.process.kind == "edm" else 8
    config.dataset.update(
        source="synthetic",
        path="",
        size=256,
        threads=1,
        workers=0,
        num_classes=8 if config.dataset.num_classes else 0,
    )
    config.checkpoint.update(every_images=128, snapshot_every_images=64)
    config.log.update(every_steps=4, grid_every_images=128, grid_images=4)
    config.sample.batch = 8
    config.evaluate.update(samples=16, every_samples=16, preset="")
    config.mesh.fsdp = 1
    return config


# What makes the two published networks fit the chips of a TPU slice: `:v5e` for 16 images of
# the batch per chip (256 chips for a batch of 4096, 64 for 1024), `:v5p` for 64. On fewer chips
# accumulate more, on more chips less: that keeps batch / (chips * accumulate), the images at
# once: at least 8, fewer are several times slower per image on TPU. docs/benchmarks.md has the
# memory that they take.
TPU_SLICES = {
    "v5e": {
        "mesh.fsdp": 8,
        "stages.base.train.accumulate": 2,
        "stages.relay.train.accumulate": 2,
        "stages.relay.model.remat": True,
    },
    "v5p": {"stages.relay.train.accumulate": 2, "stages.relay.model.remat": True},
}


def variant(config: ConfigDict, name: str, slices: dict[str, dict] | None = None) -> ConfigDict:
    """--config=configs/FILE.py:NAME: smoke, or one of `slices`, name -> settings by dotted key.

    Raises ValueError for an unknown name.
    """
    slices = slices or {}
    if name in slices:
        config.update_from_flattened_dict(slices[name])
    elif name not in ("", "smoke"):
        known = ", ".join(f":{known}" for known in ("smoke", *slices))
        raise ValueError(f"unknown variant {name!r} of the configuration; there is only {known}")
    return smoke(config) if name == "smoke" else config


# Sampling by one word (--preset=NAME): the keys of `sample` that differ from the configuration's
# own, for a stage that starts from noise (edm, a cascade too) and for one with a hand-off (relay).
# Guidance weights stay. One denoiser call per level: 40 + 25, 18 + 13 and 12 + 9 of them. Levels
# below 0.2 need no guidance (2404.07724), which only the shortest one makes use of: 4 of its 9
# calls are guided. Where the relay begins stays as configured, but in the shortest one: with so
# few levels a lower and shorter range is more exact (docs/math.md section 6).
_FEW = dict(kind="multistep", fresh_noise_rate=0.0, corrector=True)
_CONTINUES = dict(exact_first_blur=True, direct=True, rho=7.0)
PRESETS: dict[str, dict[str, dict]] = {
    "official": {},
    "safe": {
        "edm": _FEW | dict(num_steps=40),
        "relay": _FEW | _CONTINUES | dict(num_steps=25, sigma_min=0.008),
    },
    "fast": {
        "edm": _FEW | dict(num_steps=18),
        "relay": _FEW | _CONTINUES | dict(num_steps=13, sigma_min=0.008),
    },
    "draft": {
        "edm": _FEW | dict(num_steps=12),
        "relay": _FEW
        | _CONTINUES
        | dict(
            num_steps=9, sigma_min=0.02, handoff_sigma=0.6, guidance_interval=(0.2, float("inf"))
        ),
    },
}

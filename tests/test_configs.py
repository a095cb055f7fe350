"""Configurations: all build, the published ones hold the published values, impossible ones are
refused in one line."""

import importlib
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from relay_jax.config import build, load_config, parse_stage, settings_of
from relay_jax.configs import celebahq256, cifar10, default, demo, imagenet256
from relay_jax.data.source import open_source
from relay_jax.diffusion.process import EdmProcess, RelayProcess
from relay_jax.diffusion.sampler import Heun
from relay_jax.errors import UserError
from relay_jax.stage import Stage
from tests.overrides import overrides, try_override

FOLDER = Path(default.__file__).parent
NAMES = sorted(
    path.stem for path in FOLDER.glob("*.py") if path.stem not in ("__init__", "default")
)
IMAGENET, CELEBAHQ = build(imagenet256.get_config()), build(celebahq256.get_config())
BASES, RELAYS = (IMAGENET[0], CELEBAHQ[0]), (IMAGENET[1], CELEBAHQ[1])


def get_config(name: str, variant: str = "") -> ConfigDict:
    return importlib.import_module(f"relay_jax.configs.{name}").get_config(variant)


def changed(changes: dict[str, object]) -> ConfigDict:
    """The small demo with some keys set; 'new' keys are added."""
    config = demo.get_config("smoke")
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = config
        for parent in parents:
            node = node[parent]
        with node.ignore_type():
            node[key] = value
    return config


def three_stages() -> ConfigDict:
    """8 -> 16 -> 32 px, named and added in an order that says nothing."""
    config = demo.get_config("smoke")
    small, base = config.stages.relay, config.stages.base
    small.update(resolution=16)
    small.process.patch = 2
    large = small.copy_and_resolve_references()
    large.resolution = 32
    del config.stages.base, config.stages.relay
    config.stages.a_large, config.stages.z_base, config.stages.m_middle = large, base, small
    return config


# All configurations


def test_the_folder_holds_the_configurations_of_these_tests() -> None:
    assert NAMES == ["celebahq256", "cifar10", "demo", "imagenet256"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("variant", ["", "smoke"])
def test_every_configuration_builds(name: str, variant: str) -> None:
    stages = build(get_config(name, variant))
    assert [stage.name for stage in stages] == ["base", "relay"]
    assert [stage.index for stage in stages] == [0, 1]
    for before, stage in pairwise(stages):
        assert stage.resolution == before.resolution * stage.process.patch


@pytest.mark.parametrize("name", NAMES)
def test_the_smoke_variant_is_small_and_keeps_what_is_particular(name: str) -> None:
    full, small = build(get_config(name)), build(get_config(name, "smoke"))
    for large, tiny in zip(full, small, strict=True):
        assert tiny.resolution <= 64 and tiny.train.images <= 1000 and tiny.network.channels <= 32
        assert len(tiny.sampler.levels()) <= 9
        assert tiny.process == large.process and tiny.guidance == large.guidance
        assert (
            tiny.network.dtype == large.network.dtype
            and tiny.network.num_augment == large.network.num_augment
        )
        assert (tiny.network.num_classes > 0) == (large.network.num_classes > 0)
    assert get_config(name, "smoke").dataset.source == "synthetic"


@pytest.mark.parametrize("name", NAMES)
def test_every_key_is_one_of_the_default_configuration(name: str) -> None:
    def keys(node: ConfigDict) -> set[str]:
        return {
            f"{key}.{below}" if below else key
            for key, child in node.items()
            for below in (keys(child) if isinstance(child, ConfigDict) else {""})
        }

    config = get_config(name)
    shared = keys(default.get_config())
    for stage in config.stages.values():
        template = {"edm": default.edm_stage(8), "relay": default.relay_stage(8)}[
            stage.process.kind
        ]
        assert keys(stage) == keys(template)
    config.stages = {}
    assert keys(config) == shared


@pytest.mark.parametrize("name", NAMES)
def test_an_unknown_variant_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"unknown variant 'tiny'.*smoke"):
        get_config(name, "tiny")


@pytest.mark.parametrize("name", ["imagenet256", "celebahq256"])
@pytest.mark.parametrize("variant, per_chip, at_once", [("v5e", 16, (8, 8)), ("v5p", 64, (64, 32))])
def test_the_variants_for_tpu_slices_change_the_layout_alone(
    name: str, variant: str, per_chip: int, at_once: tuple[int, int]
) -> None:
    published, slice_ = get_config(name), get_config(name, variant)
    for stage, images in zip(slice_.stages.values(), at_once, strict=True):
        chips = stage.train.batch // per_chip
        assert (
            stage.train.batch == images * chips * stage.train.accumulate
            and chips % slice_.mesh.fsdp == 0
        )
    for config in (published, slice_):
        config.mesh.fsdp = 0
        for stage in config.stages.values():
            stage.model.remat, stage.train.accumulate = False, 0
    assert slice_.to_dict() == published.to_dict()


# Published values


@pytest.mark.parametrize(
    "read, imagenet, celebahq",
    [
        (lambda s: s.resolution, 64, 64),
        (lambda s: s.network.channels, 192, 192),
        (lambda s: s.network.multipliers, (1, 2, 3, 4), (1, 2, 3, 4)),
        (lambda s: s.network.blocks, 3, 3),
        (lambda s: s.network.attention, (32, 16, 8), (32, 16, 8)),
        (lambda s: s.network.head_width, 64, 64),
        (lambda s: s.network.dropout, 0.1, 0.15),
        (lambda s: s.network.num_classes, 1000, 0),
        (lambda s: s.network.num_augment, 0, 9),
        (lambda s: s.network.dtype, jnp.bfloat16, jnp.bfloat16),
        (lambda s: s.train.batch, 4096, 1024),
        (lambda s: s.train.ema_halflife_images, 50e6, 0.5e6),
        (lambda s: s.train.augment, 0, 0.2),
        (lambda s: s.train.label_dropout, 0, 0),
        (lambda s: s.sampler.num_steps, 256, 120),
        (lambda s: s.sampler.s_churn, 40, 0),
        (lambda s: s.sampler.fresh_noise, 0, 0.05),
        (lambda s: s.guidance.weight, 1, 1),
    ],
)
def test_first_stages_have_the_published_settings(
    read: Callable[[Stage], object], imagenet: object, celebahq: object
) -> None:
    assert (read(BASES[0]), read(BASES[1])) == (imagenet, celebahq)


@pytest.mark.parametrize(
    "read, imagenet, celebahq",
    [
        (lambda s: s.resolution, 256, 256),
        (lambda s: s.network.channels, 256, 256),
        (lambda s: s.network.multipliers, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4)),
        (lambda s: s.network.blocks, 2, 2),
        (lambda s: s.network.attention, (32, 16, 8), (32, 16, 8)),
        (lambda s: s.network.dropout, 0.1, 0.2),
        (lambda s: s.network.num_classes, 1000, 0),
        (lambda s: s.network.num_augment, 0, 9),
        (lambda s: s.process.patch, 4, 4),
        (lambda s: s.process.block_noise_scale, 0.15, 0.15),
        (lambda s: s.process.cdf_max, 0.93, 0.89),
        (lambda s: s.sample_process.cdf_max, 0.93, 1.05),
        (lambda s: s.process.blur_sigma_max, 3.0, 2.0),
        (lambda s: s.sample_process.blur_sigma_max, 3.0, 2.0),
        (lambda s: s.process.min_scale, 0.001, 0.001),
        (lambda s: s.process.sigma_floor, 0.0075, 0.0075),
        (lambda s: s.process.weight_max, 1e5, 1e5),
        (lambda s: s.train.batch, 4096, 1024),
        (lambda s: s.train.images, 1_250_000_000, 47_000_000),
        (lambda s: s.train.ema_halflife_images, 0.5e6, 0.5e6),
        (lambda s: s.train.augment, 0, 0.2),
        (lambda s: s.train.label_dropout, 0.1, 0),
        (lambda s: (s.sampler.num_steps, s.sampler.rho), (200, 100), (150, 7)),
        (lambda s: (s.sampler.sigma_min, s.sampler.sigma_max), (0.008, 80), (0.008, 80)),
        (lambda s: s.sampler.handoff_sigma, 0.9, 0.95),
        (lambda s: s.sampler.fresh_noise, 0.2, 0.2),
        (lambda s: len(s.sampler.levels()) - 1, 100, 54),
        (lambda s: round(s.sampler.levels()[0], 7), 0.8691227, 0.9219127),
        (lambda s: s.guidance.weight, 3.5, 1),
    ],
)
def test_relay_stages_have_the_published_settings(
    read: Callable[[Stage], object], imagenet: object, celebahq: object
) -> None:
    assert (read(RELAYS[0]), read(RELAYS[1])) == (imagenet, celebahq)


@pytest.mark.parametrize(
    "stage", BASES + RELAYS, ids=lambda stage: f"{stage.name} {stage.train.batch}"
)
def test_all_published_stages_share_the_noise_and_the_optimiser(stage: Stage) -> None:
    process, train = stage.process, stage.train
    assert (process.P_mean, process.P_std, process.sigma_data) == (-1.2, 1.2, 0.5)
    assert (train.learning_rate, train.warmup_images, train.ema_rampup) == (1e-4, 10_000_000, 0.05)
    assert (train.adam_beta1, train.adam_beta2, train.adam_epsilon) == (0.9, 0.999, 1e-8)


def test_the_churn_of_imagenet_is_the_published_one() -> None:
    sampler = BASES[0].sampler
    assert isinstance(sampler, Heun)
    assert (sampler.s_min, sampler.s_max, sampler.s_noise) == (0.05, 50, 1.003)
    assert (sampler.sigma_min, sampler.sigma_max, sampler.rho) == (0.002, 80, 7)
    assert set(sampler.churn()) == {0.0, 40 / 256}


# A relay in its own types


def test_stages_are_built_in_order_of_resolution_whatever_the_order_of_keys() -> None:
    stages = build(three_stages())
    assert [(s.name, s.resolution) for s in stages] == [
        ("z_base", 8),
        ("m_middle", 16),
        ("a_large", 32),
    ]
    assert [s.index for s in stages] == [0, 1, 2]
    assert [type(s.process) for s in stages] == [EdmProcess, RelayProcess, RelayProcess]
    assert [type(s.sampler) for s in stages] == [Heun] * 3
    assert [s.process.patch for s in stages[1:]] == [2, 2]


def test_a_relay_of_the_same_resolution_follows_its_first_stage() -> None:
    config = changed(
        {
            "stages.relay.resolution": 8,
            "stages.relay.process.patch": 1,
            "stages.relay.model.attention": (),
        }
    )
    assert [stage.name for stage in build(config)] == ["base", "relay"]


def test_sampling_may_change_cdf_max_and_nothing_else_of_the_process() -> None:
    stage = build(changed({"stages.relay.sample.cdf_max": 1.05}))[1]
    assert (stage.process.cdf_max, stage.sample_process.cdf_max) == (0.93, 1.05)
    np.testing.assert_allclose(
        stage.sample_process.u_from_sigma(0.5) * 1.05, stage.process.u_from_sigma(0.5) * 0.93
    )


def test_steps_round_up_to_whole_batches() -> None:
    assert [
        build(changed({"stages.base.train.images": n}))[0].train.steps for n in (1, 16, 17)
    ] == [1, 1, 2]


def test_a_stage_is_found_by_its_name() -> None:
    stages = build(three_stages())
    assert parse_stage(stages, "m_middle") is stages[1]
    assert parse_stage(stages, "") is None
    with pytest.raises(UserError, match=r"unknown stage 'relay'.* z_base, m_middle, a_large"):
        parse_stage(stages, "relay")


# Impossible combinations


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"stages": ConfigDict()}, "no stages"),
        # the chain of resolutions
        ({"stages.relay.process.patch": 3}, "relay: .*32.*3"),
        ({"stages.relay.process.patch": 2}, "relay: resolution 32 is not 2 .*8 of stage base"),
        (
            {"stages.relay.resolution": 64, "stages.relay.model.attention": ()},
            "resolution 64 is not 4 .*8 of stage base",
        ),
        (
            {"stages.base.resolution": 16, "stages.base.model.attention": ()},
            "resolution 32 is not 4 .*16 of stage base",
        ),
        ({"stages.relay.process.patch": 0}, "patch.* 0"),
        # kinds of processes
        (
            {"stages.relay.process": default.edm_stage(8).process},
            "stage relay: .*first stage.*'edm'.*'relay'",
        ),
        (
            {"stages.base.process": default.relay_stage(8).process},
            "stage base: .*first stage.*'edm'.*'relay'",
        ),
        ({"stages.base.process.kind": "ddpm"}, "process.kind must be 'edm' or 'relay' .*'ddpm'"),
        ({"stages.relay.process.blur": 1.0}, "stage relay: .*'blur'"),
        ({"stages.base.sample.steps": 1}, "stage base: .*'steps'"),
        ({"stages.base.train.epochs": 1}, "stage base: .*'epochs'"),
        # processes and samplers
        ({"stages.relay.process.cdf_max": 1.05}, "process.cdf_max must be at most 1, not 1.05"),
        ({"stages.base.process.P_std": 0.0}, "P_std must be positive"),
        ({"stages.relay.sample.handoff_sigma": 1.8}, "handoff_sigma 1.8 lies above 1.77"),
        (
            {"stages.relay.sample.cdf_max": 0.5, "stages.relay.sample.handoff_sigma": 0.5},
            "handoff_sigma 0.5 lies above 0.3012",
        ),
        ({"stages.relay.sample.handoff_sigma": 0.001}, "no step.*handoff_sigma 0.001"),
        ({"stages.relay.sample.fresh_noise": 1.5}, "fresh_noise must lie in .* not 1.5"),
        ({"stages.base.sample.num_steps": 0}, "num_steps must be at least 1, not 0"),
        ({"stages.base.sample.sigma_min": 100.0}, "sigma_min < sigma_max, not 100.0"),
        ({"stages.base.sample.fresh_noise": 1.5}, "fresh_noise must lie in .* not 1.5"),
        ({"stages.base.sample.handoff_sigma": 0.9}, "handoff_sigma is for a stage that continues"),
        ({"stages.relay.sample.s_churn": 1.0}, "continues images has no churn"),
        ({"stages.base.sample.kind": "euler"}, "sample.kind must be 'heun' or 'multistep' or pack"),
        ({"stages.base.model.kind": "no.such:Net"}, "model.kind='no.such:Net' cannot be imported"),
        ({"sample.batch": 0}, "sample.batch must be at least 1, not 0"),
        # labels
        (
            {"stages.relay.sample.guidance": 2.0},
            "sample.guidance above 1 needs .*train.label_dropout",
        ),
        (
            {
                "stages.relay.sample.guidance": 2.0,
                "stages.relay.train.label_dropout": 0.1,
                "dataset.num_classes": 0,
            },
            "sample.guidance 2.0 needs classes",
        ),
        ({"stages.base.train.augment": 0.2}, "train.augment needs model.num_augment=9, not 0"),
        (
            {"stages.base.train.augment": 1.2, "stages.base.model.num_augment": 9},
            "train.augment must lie in .* not 1.2",
        ),
        ({"stages.base.train.label_dropout": -0.1}, "train.label_dropout must lie in .* not -0.1"),
        # optimisation
        (
            {"stages.base.train.learning_rate": -1e-4},
            "train.learning_rate must be positive, not -0.0001",
        ),
        ({"stages.base.train.accumulate": 3}, "train.batch .* not divisible by train.accumulate 3"),
        ({"stages.base.train.batch": 0}, "train.batch must be positive, not 0"),
        ({"stages.base.train.images": 0}, "train.images must be positive, not 0"),
        ({"stages.base.train.ema_rampup": 2.0}, "train.ema_rampup must lie in .* not 2.0"),
        # networks
        ({"stages.base.model.attention": (2,)}, r"model.attention asks for level 2, .*\[8, 4\]"),
        (
            {"stages.base.model.head_width": 64},
            "model.attention at level 4 .*head_width 64 channels.* 32",
        ),
        (
            {"stages.base.model.channels": 36, "stages.base.model.multipliers": (1, 4)},
            "144 channels .*multiples of",
        ),
        ({"stages.base.model.channels": 15}, "model.channels must be even, not 15"),
        ({"stages.base.model.blocks": 0}, "model.blocks must be a positive whole number, not 0"),
        ({"stages.base.model.multipliers": ()}, "model.multipliers has 0"),
        (
            {"stages.base.model.multipliers": (1, 1, 1, 1, 1)},
            "resolution 8 cannot be halved 4 times",
        ),
        (
            {"stages.base.model.dtype": "float16"},
            "model.dtype must be float32 or bfloat16, not 'float16'",
        ),
        ({"stages.base.model.dropout": 1.0}, "model.dropout must lie in .* not 1.0"),
    ],
)
def test_what_cannot_work_is_refused_in_one_line_that_names_it(
    changes: dict[str, object], message: str
) -> None:
    with pytest.raises(UserError, match=message) as error:
        settings_of(changed(changes))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        # numbers that are none
        ({"stages.base.process.P_mean": float("nan")}, "process.P_mean must be a finite number"),
        ({"stages.relay.process.P_std": float("inf")}, "process.P_std must be a finite number"),
        ({"stages.base.process.sigma_data": 1e300}, "process.sigma_data must be a finite number"),
        ({"stages.base.process.sigma_data": 1e-30}, "whose loss is no finite number"),
        ({"stages.base.process.P_mean": 100.0}, "whose loss is no finite number"),
        ({"stages.relay.process.sigma_floor": 1e30}, "sigma_floor 1e\\+30 lies outside"),
        ({"stages.base.train.learning_rate": float("nan")}, "learning_rate must be a finite"),
        ({"stages.base.sample.guidance": float("nan")}, "sample.guidance must be a finite"),
        # grids
        ({"stages.base.sample.rho": float("inf")}, "sample.rho must be a finite number"),
        ({"stages.base.sample.sigma_max": float("inf")}, "sample.sigma_max must be a finite"),
        ({"stages.base.sample.rho": 1e-3}, "rho 0.001 .* gives no falling grid"),
        ({"stages.relay.sample.rho": 1e16}, "rho 1e\\+16 .* gives no falling grid"),
        ({"stages.base.sample.sigma_min": 1e-50}, "gives no falling grid"),
        ({"stages.base.sample.num_steps": 10**12}, "num_steps must be at most 100,000, not 1000"),
        (
            {"stages.base.sample.s_noise": 2.9e38, "stages.base.sample.s_churn": 4.0},
            "churn_amount of the sampler's steps is not finite",
        ),
        # networks that cannot be traced, or never end
        ({"stages.base.model.head_width": 3}, "head_width 3 makes 10 heads at level 4, .* 32"),
        ({"stages.base.model.multipliers": (1.5,)}, r"multipliers must be a whole number, not 1.5"),
        ({"stages.base.model.multipliers": (-1,)}, r"multipliers must be positive whole .*\(-1,\)"),
        ({"stages.base.model.channels": 10**12}, "needs at least .* GB .* this machine has"),
        ({"stages.base.model.channels": 10**30}, "model.channels must be at most 9007199254740992"),
        ({"stages.base.model.blocks": 1000}, "model.blocks must be at most 64, not 1000"),
        (
            {"stages.relay.resolution": 2**40, "stages.relay.model.attention": ()},
            "needs at least .* GB for its weights or one image",
        ),
        # types
        ({"stages.base.train.batch": 16.0}, "train.batch must be a whole number, not 16.0"),
        ({"stages.base.train.images": True}, "train.images must be a whole number, not True"),
        ({"stages.base.model.remat": "no"}, "model.remat must be True or False, not 'no'"),
        (
            {"stages.base.resolution": "8"},
            r"stages\.\*\.resolution must be a positive whole .* not '8'",
        ),
        ({"dataset.threads": 10**9}, "dataset.threads must be at most 1,024, not 1000000000"),
        ({"log.every_steps": None}, "log.every_steps must be a whole number, not None"),
        ({"sample.pixel_edit": 3}, "sample.pixel_edit must be a text, not 3"),
        ({"stages.base.train.images": 2**52, "stages.base.train.batch": 1}, "train.steps must be"),
    ],
)
def test_numbers_that_cannot_work_are_refused_before_anything_is_traced(
    changes: dict[str, object], message: str
) -> None:
    begun = time.process_time()
    with pytest.raises(UserError, match=message) as error:
        settings_of(changed(changes))
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    assert time.process_time() - begun < 1


def test_any_value_of_any_key_works_or_is_refused_in_a_line() -> None:
    wrong = [try_override(key, value) for key, value in overrides(400, seed=0)]
    assert [text for text in wrong if text] == []


def test_a_network_of_another_kind_is_traced_before_it_is_trained() -> None:
    config = changed({"stages.base.model.kind": "examples.new_network:Transformer"})
    for key in ("channels", "multipliers", "blocks", "attention", "head_width", "dropout"):
        del config.stages.base.model[key]
    with config.unlocked():
        config.stages.base.model.update(width=-2, depth=1, heads=1, patch=2)
    with pytest.raises(UserError, match=r"stage base: .*(-2|negative)") as error:
        build(config)
    assert "\n" not in str(error.value)


def test_a_missing_key_is_refused_by_name() -> None:
    config = demo.get_config("smoke")
    del config.stages.base.train.batch
    with pytest.raises(UserError, match=r"stage base: .*'batch'"):
        build(config)


def test_a_configuration_with_other_classes_than_its_data_is_refused() -> None:
    settings = settings_of(changed({"dataset.num_classes": 5}))
    with pytest.raises(
        UserError, match=r"has 8 classes.*dataset\.num_classes=5; set .*num_classes=8"
    ) as error:
        open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    assert "\n" not in str(error.value)


def test_a_configuration_is_loaded_by_name_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert load_config("demo") == load_config(str(FOLDER / "demo.py")) == demo.get_config()
    assert load_config("imagenet256:smoke") == imagenet256.get_config("smoke")
    with pytest.raises(UserError, match=r"no configuration file tiny; .*cifar10, demo, imagenet"):
        load_config("tiny")
    (tmp_path / "demo").mkdir()
    assert load_config("demo") == demo.get_config()
    (tmp_path / "mine.py").write_text("nonsense(")
    with pytest.raises(UserError, match=r"mine\.py: ") as error:
        load_config("mine.py")
    assert "\n" not in str(error.value)


def test_cifar10_is_class_conditional_and_eight_to_32_pixels() -> None:
    base, relay = build(cifar10.get_config())
    assert (
        base.resolution,
        relay.resolution,
        base.network.num_classes,
        relay.network.num_classes,
    ) == (8, 32, 10, 10)

"""The other processes from training to report: one chain that ends in a linear relay and a cascade,
and a single stage at full resolution."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import relay_jax as rx
from relay_jax.config import build
from relay_jax.configs import cifar10
from relay_jax.errors import UserError
from relay_jax.models.network import parameter_count
from relay_jax.plots.filmstrip import _frames
from relay_jax.plots.loss import loss_by_sigma
from relay_jax.sampling.chain import condition_of, sample_stage
from relay_jax.sampling.pixels import to_uint8
from relay_jax.training.layers import parts_table
from tests.conftest import command_line, mesh_of, run_main

# 3 -> 6 px along the line and 6 -> 12 px by a cascade: both in one chain, with guidance. Below 16
# px, where XLA exchanges gradients inside of conditions and eight devices on two cores may wait for
# each other for ever (models/kernels/cpu.py, _apart).
CHAIN = """
from copy import deepcopy
from tests.conftest import tiny_relay


def get_config():
    config = tiny_relay()
    line, last = config.stages.relay, deepcopy(config.stages.relay)
    line.process.kind = "relay_linear"
    line.process.sigma_full = 0.4
    line.sample.handoff = "noise"
    config.stages.base.resolution, line.resolution, last.resolution = 3, 6, 12
    last.process.kind = "cascade"
    last.train.update(label_dropout=0.2)
    last.sample.update(guidance=2.0, num_steps=5)
    config.stages.last = last
    config.evaluate.update(samples=8, class_check=False)
    return config
"""
SINGLE = """
from tests.conftest import tiny_relay


def get_config():
    config = tiny_relay()
    del config.stages["relay"]
    config.stages.base.resolution = 12
    config.stages.base.model.attention = ()
    config.evaluate.update(samples=8, class_check=False)
    return config
"""


def run(*arguments: str) -> None:
    with command_line(*arguments):
        run_main()


@pytest.fixture(scope="module")
def chain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of three stages; its last one was stopped once and continued."""
    top = tmp_path_factory.mktemp("chain")
    (top / "config.py").write_text(CHAIN)
    arguments = [f"--config={top / 'config.py'}", f"--workdir={top / 'run'}"]
    more = ["--config.stages.last.train.images=48", "--config.log.grid_every_images=48"]
    run(*arguments, "--stage=last", *more)
    run(*arguments)
    return top / "run"


def test_a_chain_of_a_line_and_a_cascade_trains_and_reports(chain: Path) -> None:
    report = json.loads((chain / "report.json").read_text())
    assert np.isfinite(report["scores"]["FD-random-conv"])
    for name in ("base", "relay", "last"):
        assert report["training"][name]["images"] == 96 and report["training"][name]["loss"] > 0
    assert list((chain / "last" / "grids").glob("*.png"))
    meta = rx.load(chain).notes["last"]["network"]
    assert meta["condition_channels"] == 3


def test_the_library_gives_the_bits_that_the_command_line_writes(
    chain: Path, tmp_path: Path
) -> None:
    run(f"--workdir={chain}", "--mode=sample", "--seeds=3-6", f"--out={tmp_path}", "--preset=draft")
    written = [np.asarray(Image.open(file)) for file in sorted(tmp_path.rglob("*.png"))]
    relay = rx.load(chain, preset="draft")
    # By what a stage does: the cascade starts from noise, as a first stage does.
    calls = {stage.name: len(stage.sampler.levels()) - 1 for stage in relay.stages}
    assert calls == {"base": 12, "relay": 9, "last": 12}
    images = relay.sample(range(3, 7))
    np.testing.assert_array_equal(to_uint8(images["last"]), np.stack(written))
    record = json.loads((tmp_path / "samples.json").read_text())["stages"]
    assert record["relay"]["process"]["kind"] == "relay_linear"
    assert record["last"]["process"]["kind"] == "cascade"
    assert record["last"]["process"]["condition_sigma"] == 0.1
    assert "blur_sigma_max" not in record["relay"]["process"]


def test_the_last_stage_continues_the_image_before_with_the_noise_that_sampling_sets(
    chain: Path,
) -> None:
    relay = rx.load(chain)
    stage, params = relay.stage("last"), relay.params["last"]
    seeds, classes = np.array([3, 4], np.uint32), np.array([3, 4], np.int32)
    images = relay.sample(seeds, classes)
    sample = jax.jit(lambda low: sample_stage(stage, params, seeds, classes, low).final)
    np.testing.assert_allclose(sample(images["relay"]), images["last"], atol=3e-5)
    assert np.abs(sample(-images["relay"]) - images["last"]).max() > 1e-3
    condition = condition_of(stage, seeds, images["relay"])
    denoise = relay.denoiser("last", classes, condition)
    assert denoise(condition.image, np.float32(0.5)).shape == (2, 12, 12, 3)
    louder = dataclasses.replace(stage.sample_process, condition_sigma=0.4)
    other = relay.replace("last", sample_process=louder).stage("last")
    noise = (condition.image - condition_of(other, seeds, images["relay"]).image) / (0.1 - 0.4)
    assert abs(float(noise.std()) - 1) < 0.1


def test_a_plan_counts_the_channels_of_the_condition(chain: Path) -> None:
    run(f"--workdir={chain}", "--mode=plan", "--devices=1", "--hardware=H100")
    plan = json.loads((chain / "plan.json").read_text())["stages"][-1]
    stage = rx.load(chain).stage("last")
    shapes = stage.shapes()
    kernels = jax.tree.leaves(shapes["enc_12x12_conv"])
    assert (3, 3, 6, 8) in [kernel.shape for kernel in kernels]
    assert plan["parameters"] == parameter_count(shapes)
    assert plan["sampling"]["calls"] == 9 and plan["sampling"]["evaluations"] == 18
    assert "map_condition" in parts_table(stage, shapes)


def test_pictures_of_a_cascade_and_those_that_it_has_not(chain: Path, tmp_path: Path) -> None:
    relay = rx.load(chain)
    stage, params = relay.stage("last"), relay.params["last"]
    low, pixels = np.zeros((1, 6, 6, 3), np.float32), np.zeros((4, 12, 12, 3), np.uint8)
    one = np.array([3], np.uint32), np.array([3], np.int32)
    frames = jax.jit(lambda low: _frames(stage, np.array([0, 4]), params, *one, low))
    states, denoised, final = frames(low)
    assert states.shape == denoised.shape == (2, 12, 12, 3)
    np.testing.assert_allclose(denoised[-1], final, atol=1e-5)
    real = pixels, np.zeros(4, np.int32)
    losses = loss_by_sigma(stage, params, mesh_of(8), real, images_seen=96, batch=8)
    assert np.isfinite(losses.losses).all() and losses.expected > 0
    run(f"--workdir={chain}", "--mode=plot", "--plot=snr", f"--out={tmp_path}")
    pairs = json.loads((tmp_path / "snr.json").read_text())["pairs"]
    assert [pair["stage"] for pair in pairs] == ["relay"]
    config = "--config=demo:smoke", "--config.stages.relay.process.kind=cascade"
    for name in ("handoff", "snr"):
        with pytest.raises(UserError, match=f"cannot plot {name}: .* a cascade starts from noise"):
            run(*config, "--mode=plot", f"--plot={name}", f"--out={tmp_path}")


def test_a_single_stage_at_full_resolution_is_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "config.py").write_text(SINGLE)
    workdir = tmp_path / "run"
    run(f"--config={tmp_path / 'config.py'}", f"--workdir={workdir}")
    report = json.loads((workdir / "report.json").read_text())
    assert np.isfinite(report["scores"]["FD-random-conv"])
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=0-1", f"--out={tmp_path / 'images'}")
    first = next((tmp_path / "images").rglob("*.png"))
    assert Image.open(first).size == (12, 12)
    (stage,) = build(cifar10.get_config("single"))
    relay = build(cifar10.get_config())[1]
    assert stage.network == relay.network and stage.train == relay.train
    assert stage.resolution == 32 and not stage.starts_from_images

"""The other processes from training to report: one chain that ends in a linear relay and a cascade,
and a single stage at full resolution."""

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
from relay_jax.sampling.chain import condition_of, sample_stage
from relay_jax.sampling.pixels import to_uint8
from relay_jax.training.layers import parts_table
from tests.conftest import command_line, run_main

# 8 -> 16 px along the line and 16 -> 32 px by a cascade: both in one chain, with guidance.
CHAIN = """
from copy import deepcopy
from tests.conftest import tiny_relay


def get_config():
    config = tiny_relay()
    line, last = config.stages.relay, deepcopy(config.stages.relay)
    line.process.kind = "relay_linear"
    line.process.sigma_full = 0.4
    line.sample.handoff = "noise"
    last.resolution, last.process.kind = 32, "cascade"
    last.train.update(label_dropout=0.2)
    last.sample.update(guidance=2.0, num_steps=5)
    config.stages.last = last
    config.log.grid_every_images = 96
    config.evaluate.update(samples=8)
    return config
"""
SINGLE = """
from tests.conftest import tiny_relay


def get_config():
    config = tiny_relay()
    del config.stages["relay"]
    config.stages.base.resolution = 16
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
    run(*arguments, "--stage=last", "--config.stages.last.train.images=48")
    run(*arguments)
    return top / "run"


def test_a_chain_of_a_line_and_a_cascade_trains_and_reports(chain: Path) -> None:
    report = json.loads((chain / "report.json").read_text())
    assert np.isfinite(report["scores"]["FD-random-conv"])
    for name in ("base", "relay", "last"):
        assert report["training"][name]["images"] == 96 and report["training"][name]["loss"] > 0
        assert list((chain / name / "grids").glob("*.png"))
    kinds = (
        {name: stage["process"]["kind"] for name, stage in report["stages"].items()}
        if ("stages" in report)
        else {}
    )
    assert not kinds or kinds == {"base": "edm", "relay": "relay_linear", "last": "cascade"}
    meta = rx.load(chain).notes["last"]["network"]
    assert meta["condition_channels"] == 3


def test_the_library_gives_the_bits_that_the_command_line_writes(
    chain: Path, tmp_path: Path
) -> None:
    run(f"--workdir={chain}", "--mode=sample", "--seeds=3-6", f"--out={tmp_path}", "--preset=fast")
    written = [np.asarray(Image.open(file)) for file in sorted(tmp_path.rglob("*.png"))]
    relay = rx.load(chain, preset="fast")
    # By what a stage does: the cascade starts from noise, as a first stage does.
    calls = {stage.name: len(stage.sampler.levels()) - 1 for stage in relay.stages}
    assert calls == {"base": 18, "relay": 13, "last": 18}
    images = relay.sample(range(3, 7))
    np.testing.assert_array_equal(to_uint8(images["last"]), np.stack(written))
    record = json.loads((tmp_path / "samples.json").read_text())["stages"]
    assert record["relay"]["process"]["kind"] == "relay_linear"
    assert record["last"]["process"]["kind"] == "cascade"
    assert record["last"]["process"]["condition_sigma"] == 0.1
    assert "blur_sigma_max" not in record["relay"]["process"]


def test_the_last_stage_continues_the_image_before_with_the_noise_that_sampling_sets(
    chain: Path, tmp_path: Path
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
    assert denoise(condition.image, np.float32(0.5)).shape == (2, 32, 32, 3)
    for level in (0.02, 0.4):
        out = tmp_path / str(level)
        flag = f"--config.stages.last.sample.condition_sigma={level}"
        run(f"--workdir={chain}", "--mode=sample", "--seeds=3", f"--out={out}", flag)
        assert json.loads((out / "samples.json").read_text())["stages"]["last"]["process"][
            "condition_sigma"
        ] == pytest.approx(level)
    files = [next((tmp_path / str(level)).rglob("*.png")) for level in (0.02, 0.4)]
    assert files[0].read_bytes() != files[1].read_bytes()


def test_a_plan_counts_the_channels_of_the_condition(chain: Path) -> None:
    run(f"--workdir={chain}", "--mode=plan", "--devices=1", "--hardware=H100")
    plan = {
        stage["name"]: stage for stage in json.loads((chain / "plan.json").read_text())["stages"]
    }
    stages = {stage.name: stage for stage in rx.load(chain).stages}
    shapes = stages["last"].shapes()
    kernel = shapes["enc_32x32_conv"]
    assert jax.tree.leaves(kernel)[-1].shape[2] == 6 or jax.tree.leaves(kernel)[0].shape[2] == 6
    assert plan["last"]["sampling"]["calls"] == 9 and plan["last"]["sampling"]["evaluations"] == 18
    assert "map_condition" in parts_table(stages["last"], shapes)


def test_pictures_of_a_cascade_and_those_that_it_has_not(chain: Path, tmp_path: Path) -> None:
    run(f"--workdir={chain}", "--mode=plot", f"--out={tmp_path}", "--seeds=0-3")
    names = {path.stem for path in tmp_path.glob("*.png")}
    # The picture of the hand-off is of the one stage that has one.
    assert {"loss", "filmstrip", "grid", "snr", "handoff_relay"} <= names
    assert "handoff_last" not in names
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
    assert np.isfinite(
        json.loads((workdir / "report.json").read_text())["scores"]["FD-random-conv"]
    )
    run(f"--workdir={workdir}", "--mode=sample", "--seeds=0-1", f"--out={tmp_path / 'images'}")
    first = next((tmp_path / "images").rglob("*.png"))
    assert Image.open(first).size == (16, 16)
    (stage,) = build(cifar10.get_config("single"))
    relay = build(cifar10.get_config())[1]
    assert stage.network == relay.network and stage.train == relay.train
    assert stage.resolution == 32 and not stage.starts_from_images

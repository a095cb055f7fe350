"""The training loop: resume, skip, fall back, give up."""

import json
import shutil
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax import config as config_module
from relay_jax.config import Stage
from relay_jax.data.source import Source, SyntheticShapes
from relay_jax.runtime.checkpoint import CheckpointError, Checkpoints
from relay_jax.runtime.logs import read_jsonl
from relay_jax.training import loop
from tests.conftest import mesh_of, tiny_relay

SETTINGS = dict(
    seed=0,
    x_flip=True,
    threads=1,
    workers=0,
    checkpoint_every_images=48,
    keep=2,
    keep_every_images=0,
    log_every_steps=1,
    grid_every_images=0,
    profile_first=0,
    profile_steps=2,
)


def stage_of(images: int, name: str = "relay", **train: object) -> Stage:
    config = tiny_relay()
    config.stages[name].train.images = images
    config.stages[name].train.update(train)
    return next(s for s in config_module.build(config) if s.name == name)


def train(
    folder: Path,
    stage: Stage,
    mesh: Mesh | None = None,
    source: Source | None = None,
    **settings: object,
) -> None:
    source = source or SyntheticShapes(stage.resolution, 64, 0)
    loop.train_stage(
        stage,
        source,
        mesh or mesh_of(1),
        folder,
        loop.LoopSettings(**{**SETTINGS, **settings}),
        lambda ema: np.zeros((4, 4, 3), np.uint8),
    )


def final_state(folder: Path) -> dict:
    """Everything in the newest checkpoint, as numpy."""
    with Checkpoints(folder / "checkpoints", read_only=True) as checkpoints:
        step = checkpoints.steps()[0]
        tree = checkpoints._manager.restore(step)
    return {
        "step": step,
        "ema": jax.tree.map(np.asarray, tree["ema"]),
        "train": jax.tree.map(np.asarray, tree["train"]),
    }


@pytest.fixture(scope="module")
def six_steps(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six uninterrupted steps of the relay stage; do not write into it."""
    folder = tmp_path_factory.mktemp("six")
    train(folder, stage_of(96))
    return folder


@pytest.mark.parametrize("name", ["relay"])
def test_three_and_three_steps_equal_six_bit_for_bit(
    tmp_path: Path, six_steps: Path, name: str
) -> None:
    train(tmp_path, stage_of(48))
    assert final_state(tmp_path)["step"] == 3
    train(tmp_path, stage_of(96))
    chex.assert_trees_all_equal(final_state(tmp_path), final_state(six_steps))
    curves = [
        [line["loss"] for line in read_jsonl(f / "metrics.jsonl")] for f in (tmp_path, six_steps)
    ]
    assert curves[0] == curves[1] and len(curves[0]) == 6


def test_the_number_of_devices_does_not_change_the_training(
    tmp_path: Path, six_steps: Path
) -> None:
    train(tmp_path, stage_of(96), mesh_of(8))
    ours, one = final_state(tmp_path), final_state(six_steps)
    chex.assert_trees_all_close(ours["ema"], one["ema"], atol=2e-5)


def test_a_finished_stage_is_left_alone(
    tmp_path: Path, six_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    monkeypatch.setattr(loop, "make_train_step", lambda *_: pytest.fail("trained again"))
    train(folder, stage_of(96))


def test_a_damaged_newest_checkpoint_costs_only_its_steps(tmp_path: Path, six_steps: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    (folder / "checkpoints" / "6" / "train" / "manifest.ocdbt").unlink()
    train(folder, stage_of(112))  # one step more than was done, so that the stage is not finished
    train(tmp_path / "straight", stage_of(112))
    chex.assert_trees_all_equal(final_state(folder), final_state(tmp_path / "straight"))
    images = [line["images"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert images == [16 * n for n in range(1, 8)], "the curve has gaps or repeats"


def test_a_finished_stage_with_a_damaged_last_checkpoint_is_finished_again(
    tmp_path: Path, six_steps: Path
) -> None:
    folder, stage = tmp_path / "copy", stage_of(96)
    shutil.copytree(six_steps, folder)
    assert loop.is_finished(stage, folder)
    (folder / "checkpoints" / "6" / "ema" / "manifest.ocdbt").unlink()
    assert not loop.is_finished(stage, folder)
    train(folder, stage)
    assert loop.is_finished(stage, folder)
    chex.assert_trees_all_equal(final_state(folder), final_state(six_steps))


def test_other_data_under_the_same_run_is_refused(tmp_path: Path, six_steps: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    with pytest.raises(CheckpointError, match="data set has changed"):
        train(folder, stage_of(128), source=SyntheticShapes(16, 63, 0))


def test_too_many_steps_that_are_not_finite_end_the_run(tmp_path: Path) -> None:
    with pytest.raises(loop.TrainingError, match="3 steps in a row"):
        train(tmp_path, stage_of(96, learning_rate=1e38, warmup_images=0, max_nonfinite=3))


def test_metrics_are_json_even_where_the_loss_is_not_finite(tmp_path: Path) -> None:
    with pytest.raises(loop.TrainingError):
        train(tmp_path, stage_of(96, learning_rate=1e38, warmup_images=0, max_nonfinite=3))
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_grids_and_checkpoints_appear_when_they_are_due(tmp_path: Path, config: ConfigDict) -> None:
    train(tmp_path, stage_of(96, "base"), grid_every_images=48)
    assert sorted(p.name for p in (tmp_path / "grids").iterdir()) == [
        "000000000048.png",
        "000000000096.png",
    ]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [6, 3]
    assert list(tmp_path.glob("events.out.tfevents.*"))

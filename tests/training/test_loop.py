"""The training loop: resume, skip, fall back, give up, stop, keep."""

import json
import shutil
from pathlib import Path
from unittest import mock

import chex
import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from benchmarks.loop import waiting_step
from relay_jax.config import Settings, build, network_from, settings_of
from relay_jax.data.source import Source
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import Stopped, UserError
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import Checkpoints, read_meta
from relay_jax.runtime.files import read_jsonl
from relay_jax.runtime.lease import Lease
from relay_jax.stage import Stage
from relay_jax.training import loop
from tests.conftest import mesh_of, tiny_relay


def stage_of(images: int, name: str = "relay", **train: object) -> Stage:
    config = tiny_relay()
    config.stages[name].train.images = images
    config.stages[name].train.update(train)
    return next(stage for stage in build(config) if stage.name == name)


def settings_with(**changes: object) -> Settings:
    """The settings of these tests; changes: keys of the configuration with "__" for the dot."""
    config = tiny_relay()
    config.log.update(every_steps=1)
    config.update_from_flattened_dict(
        {key.replace("__", "."): value for key, value in changes.items()}
    )
    return settings_of(config)


def train(
    folder: Path,
    stage: Stage,
    mesh: Mesh | None = None,
    source: Source | None = None,
    **changes: object,
) -> None:
    """Trains a stage with the settings of `settings_with`."""
    loop.train_stage(
        stage,
        source or SyntheticShapes(stage.resolution, 64, 0),
        mesh or mesh_of(1),
        folder,
        settings_with(**changes),
        loop.Observers(preview=lambda ema: np.zeros((4, 4, 3), np.uint8)),
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


def test_three_and_three_steps_equal_six_bit_for_bit(tmp_path: Path, six_steps: Path) -> None:
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
    eight, one = final_state(tmp_path), final_state(six_steps)
    chex.assert_trees_all_close(eight["ema"], one["ema"], atol=2e-5)


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
    # A changed byte of the optimiser's state, which sampling does not read.
    files = (folder / "checkpoints" / "6" / "train").rglob("d/*")
    path = max(files, key=lambda path: path.stat().st_size)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert not loop.is_finished(stage, folder)
    train(folder, stage)
    assert loop.is_finished(stage, folder)
    chex.assert_trees_all_equal(final_state(folder), final_state(six_steps))


def test_other_data_under_the_same_run_is_refused(tmp_path: Path, six_steps: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    with pytest.raises(UserError, match="data set has changed"):
        train(folder, stage_of(128), source=SyntheticShapes(16, 63, 0))


def test_too_many_steps_that_are_not_finite_end_the_run_and_its_metrics_are_json(
    tmp_path: Path,
) -> None:
    with pytest.raises(UserError, match="3 steps in a row"):
        train(tmp_path, stage_of(96, learning_rate=1e38, warmup_images=0, max_nonfinite=3))
    for text in (tmp_path / "metrics.jsonl").read_text().splitlines():
        json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_grids_and_checkpoints_appear_when_they_are_due(tmp_path: Path) -> None:
    train(tmp_path, stage_of(96, "base"), log__grid_every_images=48)
    assert sorted(p.name for p in (tmp_path / "grids").iterdir()) == [
        "000000000048.png",
        "000000000096.png",
    ]
    with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps() == [6, 3]
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_a_checkpoint_describes_its_network(six_steps: Path) -> None:
    assert network_from(read_meta(six_steps)["network"]) == stage_of(96).network


def test_a_checkpoint_of_an_earlier_version_without_a_network_continues(
    tmp_path: Path, six_steps: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    notes = folder / "checkpoints" / "6" / "meta" / "metadata"
    meta = json.loads(notes.read_text())
    del meta["network"]
    notes.write_text(json.dumps(meta))
    train(folder, stage_of(112))
    assert final_state(folder)["step"] == 7 and "network" in read_meta(folder)


def test_a_request_to_stop_saves_after_the_step_and_reports_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = iter([False, True])
    monkeypatch.setattr(distributed, "stop_requested", lambda: next(calls))
    with pytest.raises(Stopped, match="saved at 32 images"):
        train(tmp_path, stage_of(96, "base"), log__every_steps=5)
    assert final_state(tmp_path)["step"] == 2
    assert [line["images"] for line in read_jsonl(tmp_path / "metrics.jsonl")] == [32]


def test_a_checkpoint_stays_for_each_multiple_of_images(tmp_path: Path) -> None:
    changes = dict(
        checkpoint__every_images=64, checkpoint__keep=1, checkpoint__keep_every_images=40
    )
    with mock.patch.object(loop, "make_train_step", waiting_step(0.0, [])):
        train(tmp_path, stage_of(160, "base"), **changes)
    # 16 images per step: 40, 80, 120 and 160 images are reached in steps 3, 5, 8 and 10; 10 is
    # the newest as well
    assert sorted(int(path.name) for path in (tmp_path / "checkpoints").iterdir()) == [3, 5, 8, 10]


def lines_of(path: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "time"} for line in read_jsonl(path)]


@pytest.mark.parametrize("killed_at", [48, 96])
def test_what_was_lost_between_a_checkpoint_and_its_picture_is_made_at_the_next_start(
    tmp_path: Path, killed_at: int
) -> None:
    """Killed as soon as the checkpoint of so many images was complete."""

    def scores(ema: dict) -> dict[str, float]:
        return {"fid": round(float(jax.tree.leaves(ema)[0].sum()), 4)}

    def kill(*_: object) -> np.ndarray:
        raise KeyboardInterrupt

    def run(folder: Path, images: int, preview: object) -> None:
        loop.train_stage(
            stage_of(images, "base"),
            SyntheticShapes(8, 64, 0),
            mesh_of(1),
            folder,
            settings_with(log__grid_every_images=48, evaluate__every=48),
            loop.Observers(preview=preview, evaluation=scores),
        )

    def picture(ema: dict) -> np.ndarray:
        return np.full((4, 4, 3), abs(float(jax.tree.leaves(ema)[0].sum())) * 1e3 % 256, np.uint8)

    run(tmp_path / "straight", 96, picture)
    if killed_at == 96:
        run(tmp_path / "killed", 48, picture)
        (tmp_path / "killed" / "training.json").unlink()
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", 96, kill)
    with Checkpoints(tmp_path / "killed" / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.steps()[0] == killed_at // 16
    run(tmp_path / "killed", 96, picture)
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    names = ["000000000048.png", "000000000096.png"]
    for folder in (straight, killed):
        assert sorted(path.name for path in (folder / "grids").iterdir()) == names
        assert (folder / "training.json").is_file()
    for name in names:
        assert (straight / "grids" / name).read_bytes() == (killed / "grids" / name).read_bytes()
    curves = [[x for x in lines_of(f / "metrics.jsonl") if "fid" in x] for f in (straight, killed)]
    assert curves[0] == curves[1] and len(curves[0]) == 2


def test_a_stage_that_another_process_trains_is_refused_and_left_alone(
    tmp_path: Path, six_steps: Path
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    unfinished = folder / "checkpoints" / "7.orbax-checkpoint-tmp-1"
    unfinished.mkdir()
    with Lease(folder, "stage relay"), pytest.raises(UserError, match="another process trains"):
        train(folder, stage_of(112))
    assert unfinished.exists(), "the other's unfinished checkpoint was removed"
    train(folder, stage_of(96))  # a finished stage needs no owner


def test_a_training_that_was_taken_over_ends_before_it_writes(
    tmp_path: Path, six_steps: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)

    def begin(self: Lease) -> Lease:
        self._lost = "taken over"
        return self

    monkeypatch.setattr(Lease, "__enter__", begin)
    with pytest.raises(UserError, match="taken over"):
        train(folder, stage_of(112))
    assert final_state(folder)["step"] == 6


def test_damaged_logs_do_not_stop_a_training(tmp_path: Path, six_steps: Path) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(six_steps, folder)
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"\xff\x00\n")
    (folder / "starts.jsonl").unlink()
    (folder / "starts.jsonl").mkdir()
    train(folder, stage_of(112))
    images = [line["images"] for line in read_jsonl(folder / "metrics.jsonl")]
    assert images == [16 * n for n in range(1, 8)]
    kept = sorted(path.name for path in folder.glob("*.damaged-1"))
    assert kept == ["metrics.jsonl.damaged-1", "starts.jsonl.damaged-1"]

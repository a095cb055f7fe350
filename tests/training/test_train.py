"""--mode=train: refusals before the first step, and previews that are samples of a stage."""

from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from relay_jax.config import settings_of
from relay_jax.data.images import to_float
from relay_jax.data.loader import read
from relay_jax.data.source import draw
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import Stopped, UserError
from relay_jax.plots.grids import grid
from relay_jax.runtime import distributed
from relay_jax.sampling.chain import Chain
from relay_jax.stage import Stage
from relay_jax.training import train as training
from relay_jax.training.train import Preview, train, training_mesh
from tests.conftest import mesh_of


def test_a_batch_that_the_devices_do_not_divide_is_refused(config: ConfigDict) -> None:
    config.stages.relay.train.batch = 12
    with pytest.raises(UserError, match=r"stage relay: train\.batch 12 is not divisible by 8"):
        training_mesh(settings_of(config))


def test_features_that_are_not_there_are_refused_before_the_first_step(
    config: ConfigDict, tmp_path: Path
) -> None:
    settings = settings_of(config)
    settings = replace(settings, evaluate=replace(settings.evaluate, features="none such"))
    with pytest.raises(UserError, match="none such"):
        train(settings, None, SyntheticShapes(16, 64, 0), tmp_path, {})
    assert not list(tmp_path.iterdir())


def test_a_preview_shows_what_sampling_from_real_images_gives(config: ConfigDict) -> None:
    config.stages.relay.sample.num_steps = 4
    stage, source, mesh = settings_of(config).stages[1], SyntheticShapes(16, 64, 0), mesh_of(1)
    params = jax.jit(stage.init)(jax.random.key(0))
    preview = Preview(stage, source, mesh, 4)
    picture = preview(params)
    pixels, classes = read(source, draw(64, 64, 0)[:4], stage.low_resolution)
    low_res = to_float(pixels)
    images = Chain([stage.alone], {"relay": params}, mesh, 4).images(np.arange(4), classes, low_res)
    np.testing.assert_array_equal(picture, grid(images["relay"], 8))
    np.testing.assert_array_equal(preview(params), picture)


def test_sigterm_in_the_last_step_of_a_stage_is_not_forgotten(
    config: ConfigDict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stage is finished and saved, and the program stops before the next one."""
    trained: list[str] = []

    def finish(stage: Stage, *_: object) -> None:
        trained.append(stage.name)
        monkeypatch.setattr(distributed, "_stop_flag", True)

    monkeypatch.setattr(training, "train_stage", finish)
    with pytest.raises(Stopped, match="after stage base"):
        train(settings_of(config), None, SyntheticShapes(16, 64, 0), tmp_path, {})
    assert trained == ["base"]

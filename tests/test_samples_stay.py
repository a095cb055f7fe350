"""Samples for given weights, seeds and settings are those of the version before the rebuild.

tests/golden/samples.npz was recorded by the code of 54319e3: noise, classes and training draws to
the bit, images of both stages (churn, fresh noise, guidance with an interval, block noise).
tests/golden/workdir.tar.xz is a run that this code began: its first stage is finished, the relay is
half way, and out/ holds six images of the first.
"""

import json
import tarfile
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

import relay_jax as rx
from relay_jax.config import build
from relay_jax.configs import default
from relay_jax.data.loader import read
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.diffusion.loss import draw
from relay_jax.diffusion.process import Purpose
from relay_jax.diffusion.sampler import seeded_noise
from relay_jax.sampling.chain import Chain, initial_state
from relay_jax.sampling.seeds import classes_for
from relay_jax.stage import Stage
from tests.conftest import command_line, mesh_of, run_main

GOLDEN = Path(__file__).parent / "golden"
SEEDS = np.array([3, 1_000_003, 12, 4_294_967_295, 5])


def recorded_config() -> ConfigDict:
    config = default.get_config()
    config.dataset.update(source="synthetic", num_classes=8, size=64, threads=1)
    base, relay = default.edm_stage(8), default.relay_stage(16, patch=2)
    for stage in (base, relay):
        stage.model.update(
            channels=8,
            head_width=8,
            multipliers=(1, 1),
            blocks=1,
            attention=(stage.resolution // 2,),
            dropout=0.0,
        )
        stage.train.update(
            images=96,
            batch=16,
            warmup_images=64,
            learning_rate=1e-3,
            ema_halflife_images=64.0,
            label_dropout=0.1,
        )
    base.sample.update(
        num_steps=6, s_churn=4.0, s_min=0.05, s_max=50.0, s_noise=1.003, fresh_noise=0.05
    )
    relay.sample.update(
        num_steps=12,
        rho=7.0,
        handoff_sigma=0.9,
        cdf_max=0.95,
        guidance=2.0,
        guidance_interval=(0.05, 2.0),
    )
    config.stages.base, config.stages.relay = base, relay
    config.checkpoint.every_images = 48
    config.log.update(every_steps=2, grid_every_images=0)
    config.sample.batch = 4
    config.evaluate.samples = 8
    return config


def recorded_params(stage: Stage) -> dict:
    """The weights of the record: drawn by numpy in the order of their names."""
    shapes = stage.shapes()
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    rng = np.random.RandomState(stage.index)
    values = {
        name: (0.2 * rng.standard_normal(shape)).astype(np.float32)
        for name, shape in sorted((jax.tree_util.keystr(p), leaf.shape) for p, leaf in paths)
    }
    return jax.tree_util.tree_map_with_path(
        lambda path, _: values[jax.tree_util.keystr(path)], shapes
    )


@pytest.fixture(scope="module")
def record() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "samples.npz") as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def stages() -> list[Stage]:
    return build(recorded_config())


@pytest.fixture(scope="module")
def images(stages: list[Stage]) -> dict[str, np.ndarray]:
    chain = Chain(stages, {s.name: recorded_params(s) for s in stages}, mesh_of(1), 4)
    return chain.images(SEEDS, classes_for(SEEDS, 8, "mod"))


def assert_same_draws(values: np.ndarray, recorded: np.ndarray) -> None:
    """Of the same random bits: what turns them into normal numbers differs in the last places
    between compiler levels and CPUs, and by everything for other bits."""
    np.testing.assert_array_max_ulp(np.asarray(values), recorded, maxulp=8)


@pytest.mark.parametrize("purpose", list(Purpose)[:8], ids=lambda purpose: purpose.name)
def test_noise_has_the_recorded_bits(record: dict[str, np.ndarray], purpose: Purpose) -> None:
    keys = jax.vmap(
        lambda seed: jax.random.fold_in(jax.random.fold_in(jax.random.key(0), seed), 1)
    )(jnp.asarray(SEEDS, jnp.uint32))
    noise_fn = seeded_noise(keys, (4, 4, 3))
    fields = np.stack([noise_fn(step, purpose) for step in (0, 7)])
    assert_same_draws(fields, record[f"noise_{purpose.name.lower()}"])


@pytest.mark.parametrize("rule", ["mod", "balanced", "random", "3"])
def test_classes_are_the_recorded_ones(record: dict[str, np.ndarray], rule: str) -> None:
    seeds = np.concatenate([SEEDS, np.arange(40)])
    np.testing.assert_array_equal(classes_for(seeds, 8, rule), record[f"classes_{rule}"])


def test_training_draws_have_the_recorded_bits(
    record: dict[str, np.ndarray], stages: list[Stage]
) -> None:
    for stage in stages:
        shape = (3, stage.resolution, stage.resolution, 3)
        draws = draw(stage.process, jax.random.key(5), shape)
        assert_same_draws(draws.level, record[f"draws_{stage.name}_level"])
        assert_same_draws(draws.gaussian, record[f"draws_{stage.name}_gaussian"])
        if stage.process.has_block_noise:
            assert_same_draws(draws.block_gaussian, record["draws_relay_block"])


def test_images_of_both_stages_are_the_recorded_ones(
    record: dict[str, np.ndarray], images: dict[str, np.ndarray]
) -> None:
    for name in ("base", "relay"):
        np.testing.assert_allclose(images[name], record[f"images_{name}"], atol=1e-5)


def test_the_handoff_is_the_recorded_one(
    record: dict[str, np.ndarray], stages: list[Stage]
) -> None:
    start = initial_state(stages[1], SEEDS, record["images_base"])
    np.testing.assert_allclose(start, record["handoff"], atol=1e-6)


def test_the_training_loss_is_the_recorded_one(
    record: dict[str, np.ndarray], stages: list[Stage]
) -> None:
    source = SyntheticShapes(16, 64, 0)
    for stage in stages:
        pixels, labels = read(source, range(8), stage.resolution)
        losses = jax.jit(lambda p, x, y, key, stage=stage: stage.loss(p, x, y, key, train=True))(
            recorded_params(stage), pixels, labels, jax.random.key(9)
        )
        np.testing.assert_allclose(losses.mean(), record[f"loss_{stage.name}"], rtol=1e-5)


# A run of the version before


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("before")
    with tarfile.open(GOLDEN / "workdir.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "workdir"


def test_a_run_of_the_version_before_continues_to_the_same_weights(workdir: Path) -> None:
    with command_line(f"--workdir={workdir}", "--config.evaluate.pictures=False"):
        run_main()
    relay = rx.load(workdir)
    with np.load(GOLDEN / "workdir_final.npz") as final:
        for path, leaf in jax.tree_util.tree_leaves_with_path(relay.params["relay"]):
            expected = final["relay" + jax.tree_util.keystr(path)]
            np.testing.assert_allclose(leaf, expected, atol=2e-5, err_msg=str(path))


def test_samples_of_the_version_before_are_completed_in_their_folder(workdir: Path) -> None:
    out = workdir / "out"
    before = {path: path.read_bytes() for path in out.rglob("*.png")}
    missing = out / "000000" / "000003.png"
    pixels = np.asarray(Image.open(missing), int)
    missing.unlink()
    with command_line(
        f"--workdir={workdir}",
        "--mode=sample",
        "--stage=base",
        "--seeds=0-6",
        f"--out={out}",
    ):
        run_main()
    again = np.asarray(Image.open(missing), int)
    assert np.abs(again - pixels).max() <= 1
    assert json.loads((out / "samples.json").read_text())["seeds"] == "0-6"
    for path, content in before.items():
        assert path == missing or path.read_bytes() == content

"""--mode=plot as a user has it: which pictures are drawn, what is refused; the filmstrip is the
sampler's own."""

import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags
from ml_collections import ConfigDict
from PIL import Image

from relay_jax import main
from relay_jax.config import ConfigError, Stage, build
from relay_jax.models.unet import init_params
from relay_jax.plots.filmstrip import filmstrip, spread
from relay_jax.plots.plot import PLOTS, plain, plot
from relay_jax.runtime.checkpoint import Checkpoints
from relay_jax.runtime.logs import write_json
from relay_jax.sampling.chain import StageSampler, handoff_images
from tests.conftest import command_line, mesh_of, tiny_relay

ROOT = Path(__file__).parents[2]
DEMO = "--config=configs/demo.py:smoke"


def random_params(stage: Stage) -> dict:
    """Parameters that do something everywhere: no layer is left at zero."""
    rng = np.random.default_rng(stage.index)
    shapes = jax.eval_shape(partial(init_params, stage.network), jax.random.key(0))
    return jax.tree.map(lambda leaf: (0.1 * rng.normal(size=leaf.shape)).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def setting() -> ConfigDict:
    config = tiny_relay()
    config.stages.base.sample.s_churn = 2.0
    config.dataset.size = 24
    return config


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, setting: ConfigDict) -> Path:
    """Checkpoints and logs of two stages, as a training leaves them."""
    workdir = tmp_path_factory.mktemp("plots") / "run"
    for stage in build(setting):
        with Checkpoints(workdir / stage.name / "checkpoints") as checkpoints:
            checkpoints.save(
                6, random_params(stage), {"none": np.zeros(1)}, {"images": 96, "seconds": 1.0}
            )
        (workdir / stage.name / "metrics.jsonl").write_text(
            '{"images": 48, "loss": 1.5}\n{"images": 96, "loss": 0.5}\n'
        )
    return workdir


def folders(workdir: Path) -> dict[str, Path]:
    return {name: workdir / name for name in ("base", "relay")}


def drawn(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} if out.exists() else set()


def test_all_pictures_are_drawn_with_their_numbers(
    setting: ConfigDict, run_folder: Path, tmp_path: Path
) -> None:
    plot(
        setting,
        build(setting),
        folders(run_folder),
        [],
        seeds=[3, 4],
        class_rule="mod",
        images=12,
        out=tmp_path,
    )
    assert drawn(tmp_path) == {f"{name}.{kind}" for name in PLOTS for kind in ("png", "json")}
    for name in PLOTS:
        with Image.open(tmp_path / f"{name}.png") as image:
            assert min(image.size) > 70 and np.asarray(image).std() > 5
    numbers = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PLOTS}
    assert numbers["snr"]["images"] == 12 and len(numbers["snr"]["pairs"][0]["curves"]) == 4
    kinds = numbers["handoff"]["low_resolution_images"]
    assert list(kinds) == ["samples of stage base", "down-sampled real images"]
    at = [c["sigma"] for c in kinds["samples of stage base"]]
    assert min(at) < numbers["handoff"]["first_level"] < max(at)
    assert np.all(np.array([c["nats"] for c in kinds["samples of stage base"]]) > 0)
    assert [s["images_seen"] for s in numbers["loss"]["stages"]] == [96, 96]
    assert numbers["filmstrip"]["seeds"] == [3, 4]
    assert numbers["filmstrip"]["stages"][1]["denoised_rms_to_final"][-1] == pytest.approx(
        [0, 0], abs=1e-5
    )
    assert np.array(numbers["neighbours"]["distances"][0]["positions"]).shape == (2, 4)
    assert numbers["grid"] == {"seeds": [3, 4], "classes": [3, 4]}
    assert numbers["curves"]["relay"] == [{"images": 48, "loss": 1.5}, {"images": 96, "loss": 0.5}]


def test_without_a_run_the_pictures_of_the_data_are_drawn(
    setting: ConfigDict, tmp_path: Path
) -> None:
    plot(setting, build(setting), {}, [], seeds=[0], class_rule="mod", images=4, out=tmp_path)
    assert drawn(tmp_path) == {"snr.png", "snr.json", "handoff.png", "handoff.json"}
    assert list(json.loads((tmp_path / "handoff.json").read_text())["low_resolution_images"]) == [
        "down-sampled real images"
    ]


@pytest.mark.parametrize(
    "name, images, data, says",
    [
        ("sonnet", 0, True, "unknown plot 'sonnet'; there are snr, handoff"),
        ("loss", 0, True, "cannot draw loss: no checkpoint of stage base and relay"),
        ("filmstrip", 0, True, "--weights.base=DIR"),
        ("curves", 0, True, "cannot draw curves: no training has been logged"),
        ("snr", 1, True, "--plot_images"),
        ("snr", 0, False, "cannot draw snr: nowhere: no such folder"),
    ],
)
def test_what_cannot_be_drawn_is_one_line(
    setting: ConfigDict, tmp_path: Path, name: str, images: int, data: bool, says: str
) -> None:
    config = setting.copy_and_resolve_references()
    if not data:
        config.dataset.update(source="folder", path="nowhere")
    with pytest.raises(ConfigError, match=says) as caught:
        plot(
            config,
            build(config),
            {},
            [name],
            seeds=[0],
            class_rule="mod",
            images=images,
            out=tmp_path / "out",
        )
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command_line_draws_into_out_and_refuses_the_rest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    ask = [DEMO, "--mode=plot", "--plot=snr", "--plot_images=8"]
    with command_line(*ask, f"--out={tmp_path / 'a'}"):
        main.run(flags.FLAGS["config"].value, None)
    assert drawn(tmp_path / "a") == {"snr.png", "snr.json"}
    for arguments, workdir, says in (
        (ask, None, "--workdir=runs/NAME or --out=DIR"),
        ([*ask, "--stage=relay"], None, "leave --stage out"),
        (ask, tmp_path, "no run in"),
    ):
        with command_line(*arguments), pytest.raises(ConfigError, match=says):
            main.run(flags.FLAGS["config"].value, workdir)
    stages = build(tiny_relay())
    write_json(tmp_path / "run" / "config.json", json.loads(tiny_relay().to_json_best_effort()))
    with command_line(*ask), pytest.raises(ConfigError, match="belongs to another configuration"):
        main.run(flags.FLAGS["config"].value, tmp_path / "run")
    assert len(stages) == 2


def test_the_filmstrip_ends_in_the_samplers_images(setting: ConfigDict) -> None:
    stages = [(stage, random_params(stage)) for stage in build(setting)]
    seeds, classes = [5, 9], np.array([1, 6])
    base, relay = filmstrip(stages, seeds, classes, columns=3)
    low = StageSampler(stages[0][0], mesh_of(1), 2)(stages[0][1], seeds, classes)
    high = StageSampler(stages[1][0], mesh_of(1), 2)(stages[1][1], seeds, classes, low)
    np.testing.assert_allclose(base.final, low, atol=2e-5)
    np.testing.assert_allclose(relay.final, high, atol=2e-5)
    assert low.std() > 0.1 and np.abs(high[0] - high[1]).max() > 0.1
    # The first state is the start, and the last denoised image the sample: nothing follows it.
    np.testing.assert_allclose(
        relay.states[0], handoff_images(stages[1][0], np.array(seeds), base.final), atol=1e-5
    )
    np.testing.assert_allclose(relay.denoised[-1], relay.final, atol=1e-5)
    assert base.states[0].std() == pytest.approx(base.sigmas[0], rel=0.15)
    assert (
        base.steps.tolist() == [0, 2, 3]
        and base.total_steps == 4
        and relay.steps[-1] == relay.total_steps - 1
    )
    np.testing.assert_array_equal(relay.sigmas, stages[1][0].sampler.sigmas()[relay.steps])


def test_steps_are_spread_over_the_whole_sampling() -> None:
    assert [spread(*of).tolist() for of in ((18, 7), (2, 7), (1, 3))] == [
        [0, 3, 6, 8, 11, 14, 17],
        [0, 1],
        [0],
    ]
    with pytest.raises(ValueError, match="at least 2"):
        filmstrip([], [0], np.zeros(1, int), columns=1)


def test_numbers_for_json_are_short_and_plain() -> None:
    value = plain(
        {"a": np.float32(1 / 3), "b": [np.int64(3), jnp.inf], 4: np.array([[1.0, 2.5]]), "c": "x"}
    )
    assert value == {"a": 0.333333, "b": [3, None], "4": [[1.0, 2.5]], "c": "x"}
    assert json.loads(json.dumps(value)) == value

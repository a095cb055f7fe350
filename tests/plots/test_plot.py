"""--mode=plot as a user has it: which pictures are plotted, what is refused."""

import json
from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from relay_jax.config import build, settings_of
from relay_jax.errors import UserError
from relay_jax.plots.inputs import PlotSettings, plain
from relay_jax.plots.plot import PLOTS, plot
from relay_jax.runtime.checkpoint import Checkpoints
from relay_jax.runtime.files import write_json
from tests.conftest import command_line, run_main, tiny_relay
from tests.plots.test_filmstrip import random_params

DEMO = f"--config={Path(__file__).parents[2]}/configs/demo.py:smoke"


@pytest.fixture(scope="module")
def config_of_run() -> ConfigDict:
    config = tiny_relay()
    config.stages.base.sample.s_churn = 2.0
    config.dataset.size = 24
    return config


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory, config_of_run: ConfigDict) -> Path:
    """Checkpoints and logs of two stages, as a training leaves them."""
    workdir = tmp_path_factory.mktemp("plots") / "run"
    for stage in build(config_of_run):
        params, notes = random_params(stage), {"images": 96, "seconds": 1.0}
        with Checkpoints(workdir / stage.name / "checkpoints") as checkpoints:
            checkpoints.save(6, params, {"none": np.zeros(1)}, notes)
        (workdir / stage.name / "metrics.jsonl").write_text(
            '{"images": 48, "loss": 1.5}\n{"images": 96, "loss": 0.5}\n'
        )
    return workdir


def files_in(out: Path) -> set[str]:
    return {path.name for path in out.iterdir()} if out.exists() else set()


def test_all_pictures_are_plotted_with_their_numbers(
    config_of_run: ConfigDict, run_folder: Path, tmp_path: Path
) -> None:
    folders = {name: run_folder / name for name in ("base", "relay")}
    request = PlotSettings(seeds=[3, 4], images=12)
    plot(settings_of(config_of_run), folders, request, tmp_path)
    pictures = {name: f"{name}.{picture.ending}" for name, picture in PLOTS.items()}
    assert files_in(tmp_path) == {f"{name}.json" for name in PLOTS} | set(pictures.values())
    for name in pictures.values():
        with Image.open(tmp_path / name) as image:
            assert min(image.size) > 70 and np.asarray(image).std() > 5
    numbers = {name: json.loads((tmp_path / f"{name}.json").read_text()) for name in PLOTS}
    assert numbers["snr"]["images"] == 12 and len(numbers["snr"]["pairs"][0]["curves"]) == 4
    kinds = numbers["handoff"]["low_resolution_images"]
    assert list(kinds) == ["samples of stage base", "down-sampled real images"]
    levels = [c["sigma"] for c in kinds["samples of stage base"]]
    assert min(levels) < numbers["handoff"]["first_level"] < max(levels)
    assert np.all(np.array([c["nats"] for c in kinds["samples of stage base"]]) > 0)
    assert [s["images_seen"] for s in numbers["loss"]["stages"]] == [96, 96]
    assert numbers["filmstrip"]["seeds"] == [3, 4]
    last = numbers["filmstrip"]["stages"][1]["denoised_rms_to_final"][-1]
    assert last == pytest.approx([0, 0], abs=1e-5)
    assert np.array(numbers["neighbours"]["distances"][0]["positions"]).shape == (2, 4)
    assert numbers["grid"] == {"seeds": [3, 4], "classes": [3, 4]}
    assert numbers["curves"]["relay"] == [{"images": 48, "loss": 1.5}, {"images": 96, "loss": 0.5}]


def test_without_a_run_the_pictures_of_the_data_are_plotted(
    config_of_run: ConfigDict, tmp_path: Path
) -> None:
    plot(settings_of(config_of_run), {}, PlotSettings(seeds=[0], images=4), tmp_path)
    assert files_in(tmp_path) == {
        f"{name}.{kind}" for name in ("data", "snr", "handoff") for kind in ("png", "json")
    }
    numbers = json.loads((tmp_path / "handoff.json").read_text())
    assert list(numbers["low_resolution_images"]) == ["down-sampled real images"]


@pytest.mark.parametrize(
    "name, images, data, says",
    [
        ("sonnet", 0, True, "unknown plot 'sonnet'; there are data, snr, handoff"),
        ("loss", 0, True, "cannot plot loss: no checkpoint of stage base and relay"),
        ("filmstrip", 0, True, "--weights.base=DIR"),
        ("curves", 0, True, "cannot plot curves: no training has been logged"),
        ("snr", 1, True, "--plot_images"),
        ("snr", 0, False, "cannot plot snr: nowhere: no such folder"),
    ],
)
def test_what_cannot_be_plotted_is_one_line(
    config_of_run: ConfigDict, tmp_path: Path, name: str, images: int, data: bool, says: str
) -> None:
    config = config_of_run.copy_and_resolve_references()
    if not data:
        config.dataset.update(source="folder", path="nowhere")
    request = PlotSettings(names=[name], seeds=[0], images=images)
    with pytest.raises(UserError, match=says) as caught:
        plot(settings_of(config), {}, request, tmp_path / "out")
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_the_command_line_plots_into_out_and_refuses_another_run(tmp_path: Path) -> None:
    ask = [DEMO, "--mode=plot", "--plot=snr", "--plot_images=8"]
    with command_line(*ask, f"--out={tmp_path / 'a'}"):
        run_main()
    assert files_in(tmp_path / "a") == {"snr.png", "snr.json"}
    write_json(tmp_path / "run" / "config.json", json.loads(tiny_relay().to_json_best_effort()))
    for arguments, says in (
        ([], "--workdir=runs/NAME or --out=DIR"),
        ([f"--workdir={tmp_path}"], "no run in"),
        ([f"--workdir={tmp_path / 'run'}"], "belongs to another configuration"),
    ):
        with command_line(*ask, *arguments), pytest.raises(UserError, match=says):
            run_main()


def test_a_run_is_plotted_without_its_configuration(
    config_of_run: ConfigDict, run_folder: Path
) -> None:
    config = json.loads(config_of_run.to_json_best_effort())
    write_json(run_folder / "config.json", config)
    with command_line(f"--workdir={run_folder}", "--mode=plot", "--plot=curves"):
        run_main()
    assert files_in(run_folder / "plots") == {"curves.png", "curves.json"}


def test_numbers_for_json_are_short_and_plain() -> None:
    value = plain(
        {"a": np.float32(1 / 3), "b": [np.int64(3), np.inf], 4: np.array([[1.0, 2.5]]), "c": "x"}
    )
    assert value == {"a": 0.333333, "b": [3, None], "4": [[1.0, 2.5]], "c": "x"}
    assert json.loads(json.dumps(value)) == value

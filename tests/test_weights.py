"""From official files to images with the command line alone, without a run."""

from pathlib import Path

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image

from relay_jax import main
from relay_jax.config import build
from relay_jax.official import convert
from relay_jax.runtime.checkpoint import load_ema
from tests.conftest import command_line, mesh_of, tiny_relay
from tests.official.test_convert import write
from tests.sampling.test_chain import random_params


def official_relay() -> ConfigDict:
    """The tiny relay with the official networks' heads of 64 channels (so: without attention)."""
    config = tiny_relay()
    for stage in (config.stages.base, config.stages.relay):
        stage.model.head_width = 64
    return config


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both stages of the tiny relay as official files, converted."""
    folder = tmp_path_factory.mktemp("weights")
    (folder / "config.py").write_text(
        "from tests.test_weights import official_relay\n\n\ndef get_config(_=''):\n"
        "    return official_relay()\n"
    )
    for i, stage in enumerate(build(official_relay())):
        net = stage.network
        arguments = dict(
            img_resolution=net.resolution,
            img_channels=3,
            label_dim=net.num_classes,
            augment_dim=0,
            model_channels=net.channels,
            channel_mult=list(net.multipliers),
            num_blocks=net.blocks,
            attn_resolutions=[],
        )
        write(folder / f"{stage.name}.pt", convert.to_official(random_params(stage, i)), arguments)
        convert.main(
            [
                "convert",
                str(folder / f"{stage.name}.pt"),
                f"--out={folder / stage.name}",
                f"--config={folder / 'config.py'}",
                f"--stage={stage.name}",
            ]
        )
    return folder


def test_converted_stages_are_sampled_without_a_run(converted: Path, tmp_path: Path) -> None:
    weights = [f"--weights.base={converted / 'base'}", f"--weights.relay={converted / 'relay'}@0"]
    with command_line(
        f"--config={converted / 'config.py'}",
        "--mode=sample",
        *weights,
        "--seeds=7-9",
        f"--out={tmp_path}",
    ):
        main.main([])
    files = sorted(tmp_path.rglob("*.png"))
    assert [f.stem for f in files] == ["000007", "000008", "000009"]
    assert all(np.asarray(Image.open(f)).shape == (16, 16, 3) for f in files)


def test_a_training_starts_from_converted_weights(converted: Path, tmp_path: Path) -> None:
    with command_line(
        f"--config={converted / 'config.py'}",
        "--stage=relay",
        f"--weights.relay={converted / 'relay'}",
        f"--workdir={tmp_path / 'run'}",
        "--config.stages.relay.train.images=16",
    ):
        main.main([])
    stage = build(official_relay())[1]
    trained, _ = load_ema(tmp_path / "run" / "relay", stage.shapes(), mesh_of(1))
    converted_params, _ = load_ema(converted / "relay", stage.shapes(), mesh_of(1))
    np.testing.assert_array_equal(
        trained["out_conv"]["kernel"], converted_params["out_conv"]["kernel"]
    )  # first step: rate 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--mode=sample", "--weights.base={base}"], "--workdir"),
        (["--mode=sample", "--weights.middle={base}"], "unknown stage 'middle'"),
        (["--mode=sample", "--weights.base=nowhere"], "no checkpoints"),
        (["--mode=sample", "--weights.base=nowhere@3"], "no checkpoints"),
        (
            ["--mode=sample", "--weights.base={base}", "--weights.relay={relay}@7"],
            "no checkpoint of step 7; there are 0",
        ),
        (
            ["--mode=sample", "--weights.base={base}", "--weights.relay={base}@0"],
            "checkpoints/0 cannot be read",
        ),
        (
            ["--mode=sample", "--weights.base={relay}", "--weights.relay={relay}", "--seeds=0"],
            "cannot be read|can be read",
        ),
        (
            [
                "--mode=sample",
                "--weights.base={base}",
                "--weights.relay={relay}",
                "--config.sample.pixel_edit=sepia",
            ],
            "sepia",
        ),
    ],
)
def test_weights_that_do_not_fit_are_one_line(
    converted: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    says: str,
) -> None:
    filled = [a.format(base=converted / "base", relay=converted / "relay") for a in arguments]
    with (
        pytest.raises(SystemExit) as stopped,
        command_line(f"--config={converted / 'config.py'}", *filled, f"--out={tmp_path}"),
    ):
        main.main([])
    assert stopped.value.code == 2
    last = capsys.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error: ") and any(part in last for part in says.split("|"))
    assert not list(tmp_path.rglob("*.png"))

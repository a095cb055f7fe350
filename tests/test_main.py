"""The command line refuses bad input with one line and status 2, and leaves everything as it
was."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax import main
from relay_jax.errors import StorageError
from tests.conftest import command_line

ROOT = Path(__file__).parents[1]
DEMO = "--config=configs/demo.py:smoke"
IMAGENET = "--config=configs/imagenet256.py"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """Runs the command line in this process, which must end with status 2; returns its one line."""
    with pytest.raises(SystemExit) as stopped, command_line(*arguments):
        main.main([])
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([IMAGENET], "ILSVRC2012_img_train.tar"),
        (["--config=configs/celebahq256.py"], "CelebA-HQ"),
        (["--config=configs/cifar10.py", "--config.dataset.path=nowhere.zip"], "nowhere.zip"),
        ([DEMO, "--config.dataset.source=folder"], "needs a path"),
        ([DEMO, "--config.dataset.source=zip", "--config.dataset.path=README.md"], "README.md"),
        ([DEMO, "--config.dataset.source=tape"], "tape"),
        ([DEMO, "--config.dataset.num_classes=5"], "num_classes=8"),
        ([DEMO, "--config.stages.relay.process.patch=3"], "divisible"),
        ([DEMO, "--config.stages.relay.process.up_scale=4"], "up_scale"),
        ([DEMO, "--config.stages.relay.sample.truncation_sigma=1"], "truncation_sigma"),
        ([DEMO, "--config.stages.relay.sample.handoff_sigma=5.0"], "handoff_sigma 5.0"),
        ([DEMO, "--config.stages.base.train.batch=many"], "batch"),
        ([DEMO, "--config.mesh.fsdp=3"], "fsdp 3"),
        ([DEMO, "--config.stages.base.train.batch=12"], "not divisible by 8 devices"),
        ([DEMO, "--stage=middle"], "unknown stage 'middle'"),
        ([DEMO, "--mode=sample"], "no run in"),
        ([DEMO, "--mode=fly"], "mode"),
        ([DEMO, "--mode=sample", "--format=gif"], "png|npz|arrayrecord"),
        ([DEMO, "--mode=sample", "--out=gs://bucket/images"], "gcsfuse"),
        ([DEMO, "--weights.base=gs://bucket/base"], "--weights.base=gs://bucket/base"),
        ([DEMO, "--config.checkpoint.keep_every_images=-1"], "keep_every_images"),
        ([DEMO, "--config.log.profile_steps=0"], "profile_steps"),
        ([DEMO, "extra"], "unexpected argument 'extra'"),
        (["--config=configs/nothing.py"], "nothing.py"),
        (["--config=configs/demo.py:huge"], "huge"),
        ([], "--config=demo"),
        ([DEMO, "--nonsense"], "nonsense"),
    ],
)
def test_bad_input_is_one_line_and_status_two(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    arguments: list[str],
    says: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(ROOT)
    line = run(capsys, *arguments, f"--workdir={tmp_path / 'run'}")
    assert says in line
    assert not list(tmp_path.rglob("checkpoints"))


def test_a_workdir_is_required(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    assert "--workdir" in run(capsys, DEMO, "--workdir=")


def test_a_bucket_as_workdir_is_refused_and_makes_no_folder_of_that_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = ROOT / "configs" / "demo.py"
    monkeypatch.chdir(tmp_path)
    assert "--workdir=gs://bucket/run" in run(
        capsys, f"--config={config}:smoke", "--workdir=gs://bucket/run"
    )
    assert not list(tmp_path.iterdir())


def test_the_workdir_of_another_configuration_is_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    before = json.dumps({"seed": 1})
    (tmp_path / "config.json").write_text(before)
    assert "another configuration" in run(capsys, DEMO, f"--workdir={tmp_path}")
    assert (tmp_path / "config.json").read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_images_smaller_than_a_stage_are_refused(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import zipfile

    monkeypatch.chdir(ROOT)
    Image.fromarray(np.zeros((16, 16, 3), np.uint8)).save(tmp_path / "a.png")
    with zipfile.ZipFile(tmp_path / "data.zip", "w") as z:
        z.write(tmp_path / "a.png", "a.png")
    line = run(
        capsys,
        DEMO,
        "--config.dataset.source=zip",
        f"--config.dataset.path={tmp_path / 'data.zip'}",
        "--config.dataset.num_classes=0",
        f"--workdir={tmp_path / 'run'}",
    )
    assert "16 px" in line and "32" in line


def test_help_names_the_flags() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "relay_jax.main", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert "--mode" in done.stdout and "--low_res" in done.stdout


def test_a_full_disk_is_one_line_and_no_mistake_of_the_users(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*_: object) -> None:
        raise StorageError("checkpoints cannot be written in DIR: No space left on device")

    monkeypatch.setattr(main, "run", full)
    with (
        pytest.raises(SystemExit) as stopped,
        command_line(f"--config={ROOT / 'configs' / 'demo.py'}:smoke"),
    ):
        main.main([])
    assert stopped.value.code == 1  # launchers may start it again
    assert (
        capsys.readouterr().err
        == "error: checkpoints cannot be written in DIR: No space left on device\n"
    )

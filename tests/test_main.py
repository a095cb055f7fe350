"""The command line refuses bad input with one line and status 2, and leaves everything as it
was."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from absl import flags
from PIL import Image

from relay_jax import commandline, main
from relay_jax.errors import StorageError
from relay_jax.training import train
from tests.conftest import command_line, content, run_main

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


# Places


@pytest.mark.parametrize(
    "arguments",
    [
        ["--workdir={file}/run"],
        ["--workdir={loop}/run"],
        ["--mode=plan", "--workdir={file}"],
        ["--mode=plot", "--plot=snr", "--out={file}/plots"],
        ["--mode=prepare", "--out={file}/data"],
        ["--mode=evaluate", "--images={images}", "--out={file}"],
        ["--mode=sample", "--weights.base={images}", "--weights.relay={images}", "--out={file}"],
    ],
)
def test_a_place_that_cannot_be_written_is_refused_before_anything_is_computed(
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "images" / "checkpoints").mkdir(parents=True)
    before = content(tmp_path)
    names = {name: tmp_path / name for name in ("file", "loop", "images")}
    for verb in ("open_source", "evaluate_run", "generate", "plot", "plan"):
        monkeypatch.setattr(main, verb, lambda *_, **__: pytest.fail("began to work"))
    line = run(capsys, DEMO, *(text.format(**names) for text in arguments))
    assert "cannot be written" in line and len(line) < 400
    assert content(tmp_path) == before


@pytest.mark.parametrize("name", ["samples", "base", "base/checkpoints", "relay/grids"])
def test_a_file_in_the_place_of_a_folder_of_a_run_is_found_before_the_training(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(ROOT)
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    line = run(capsys, DEMO, f"--workdir={tmp_path}")
    assert name in line and "a file, not a folder" in line
    assert not (tmp_path / "config.json").exists()


def test_a_finished_run_that_may_only_be_read_is_finished(
    tiny_run: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """The medium is read-only; its data are gone, too."""
    before = content(tiny_run)
    monkeypatch.setattr(train, "is_writable", lambda _: False)
    monkeypatch.setattr(main, "is_writable", lambda _: False)
    monkeypatch.setattr(main, "open_source", lambda *_: pytest.fail("read the data"))
    printed: list[str] = []
    monkeypatch.setattr(train.logging, "info", lambda text, *v: printed.append(text % v))
    with command_line(f"--workdir={tiny_run}"):
        run_main()
    assert "all stages are finished" in printed[-1]
    assert content(tiny_run) == before


def test_an_argument_that_is_no_utf8_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    images = os.fsdecode(b"--images=caf\xe9")
    line = run(capsys, DEMO, "--mode=evaluate", images, "--out=x")
    assert "no UTF-8" in line and "caf" in line


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (OSError(28, "No space left on device", "/a/b"), 1),
        (PermissionError(13, "Permission denied", "/a/b"), 2),
        (UnicodeEncodeError("utf-8", "x\udce9", 1, 2, "surrogates not allowed"), 2),
        (OSError(5, "x" * 10_000), 1),
    ],
)
def test_whatever_the_system_refuses_is_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    status: int,
) -> None:
    def refuse(*_: object) -> None:
        raise error

    monkeypatch.setattr(main, "run", refuse)
    with pytest.raises(SystemExit) as stopped, command_line(DEMO):
        main.main([])
    message = capsys.readouterr().err
    assert stopped.value.code == status and message.count("\n") == 1 and len(message) < 400


def test_paths_of_a_configuration_begin_at_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    arguments = ["--config.dataset.path=~/data", "--mode=evaluate", "--reference=~/real"]
    monkeypatch.setattr(main, "is_writable", lambda _: True)
    with command_line(DEMO, *arguments, "--config.evaluate.inception=~/weights"):
        command = main.Command(commandline.CONFIG_FLAG.value)
        comparison = command.comparison(tmp_path)
    assert command.settings.dataset.keys["path"] == str(tmp_path / "data")
    assert comparison.reference == str(tmp_path / "real")
    assert comparison.weights == tmp_path / "weights"


def test_the_command_line_can_be_used_twice_in_one_kernel(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seen = []
    monkeypatch.setattr(main, "run", lambda config: seen.append(config.sample.batch))
    values = flags.FLAGS.flag_values_dict()
    try:
        for batch, mode in ((3, "plan"), (4, "train")):
            weights = ["--weights.base=x"] if mode == "train" else []
            arguments = [f"--config.sample.batch={batch}", f"--mode={mode}", *weights]
            monkeypatch.setattr(sys, "argv", ["main", "--config=demo:smoke", *arguments])
            with pytest.raises(SystemExit) as ended:
                main.console()
            assert not ended.value.code and main.value_of("mode") == mode
    finally:
        commandline.reset()
        for flag in flags.FLAGS.get_flags_for_module(commandline):
            flag.value, flag.present = values.get(flag.name), 0
    assert seen == [3, 4]

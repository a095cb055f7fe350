"""Flags belong to verbs, old names are refused with the new one, runs open themselves."""

import json
from pathlib import Path

import pytest
from absl import flags

from relay_jax import commandline
from relay_jax.configs import demo
from relay_jax.workdir import claim_workdir
from tests.conftest import command_line

DEMO = "--config=demo:smoke"


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The one line with which the command line ends, status 2."""
    with pytest.raises(SystemExit) as stopped, command_line(*arguments):
        pytest.fail("was taken")
    assert stopped.value.code == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and len(lines[0]) < 400, lines
    return lines[0]


@pytest.mark.parametrize("verb", commandline.VERBS)
def test_a_verb_takes_its_flags_and_refuses_all_others(
    capsys: pytest.CaptureFixture[str], verb: str
) -> None:
    samples = {"debug": "true", "format": "npz", "devices": "8", "utilisation": "0.5"}
    samples |= {"reference_images": "5", "plot_images": "9", "seeds": "0-3", "stage": "base"}
    samples["weights"] = "cifar10"  # what does not exist is refused before its verb is looked at
    for name, verbs in commandline.USED_BY.items():
        if name in ("config", "mode"):
            continue
        argument = f"--{name}={samples.get(name, 'x')}"
        if verb in verbs:
            with command_line(DEMO, f"--mode={verb}", argument):
                assert flags.FLAGS[name].present
        else:
            line = refusal(capsys, DEMO, f"--mode={verb}", argument)
            assert f"--{name} is not used by --mode={verb}" in line and verbs[0] in line


def test_weights_belong_to_four_verbs(capsys: pytest.CaptureFixture[str]) -> None:
    with command_line(DEMO, "--weights.base=x", "--mode=sample"):
        assert flags.FLAGS["weights.base"].value == "x"
    assert "--weights.base is not used" in refusal(
        capsys, DEMO, "--weights.base=x", "--mode=prepare"
    )


def test_samples_of_a_run_and_images_are_not_scored_at_once(
    capsys: pytest.CaptureFixture[str],
) -> None:
    line = refusal(capsys, DEMO, "--mode=evaluate", "--images=x", "--seeds=0-3")
    assert "--seeds is about samples of a run" in line


@pytest.mark.parametrize(
    ("old", "new"),
    [("sample.sde_scale=0.1", "sample.fresh_noise"), ("model.augment_labels=9", "num_augment")],
)
def test_old_keys_are_refused_with_their_new_name(
    capsys: pytest.CaptureFixture[str], old: str, new: str
) -> None:
    assert f"called {new}" in refusal(capsys, DEMO, f"--config.stages.base.{old}").replace(
        "model.", ""
    )


def test_a_run_is_opened_with_its_own_configuration_and_overrides(tmp_path: Path) -> None:
    config = demo.get_config("smoke")
    config.sample.batch = 5
    claim_workdir(json.loads(config.to_json_best_effort()), tmp_path, create=True)
    for arguments in ([f"--workdir={tmp_path}"], ["--workdir", str(tmp_path)]):
        with command_line(*arguments, "--mode=sample", "--config.stages.base.sample.num_steps=7"):
            opened = commandline.CONFIG_FLAG.value
            assert opened.sample.batch == 5 and opened.stages.base.sample.num_steps == 7


def test_without_a_run_a_configuration_must_be_named(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "--config=demo" in refusal(capsys)
    line = refusal(capsys, f"--workdir={tmp_path / 'none'}")
    assert "no run in" in line and "--config=demo" in line
    (tmp_path / "config.json").write_text("{")
    assert "is damaged" in refusal(capsys, f"--workdir={tmp_path}", "--mode=sample")


@pytest.mark.parametrize("key", ["nothing", "stages.base.nothing", "stages.base.model.head_wdth"])
def test_a_key_that_is_not_there_is_named_whole(
    capsys: pytest.CaptureFixture[str], key: str
) -> None:
    line = refusal(capsys, DEMO, f"--config.{key}=3")
    assert f"the configuration has no key {key}" in line
    assert ('Did you mean "head_width"' in line) == key.endswith("wdth")


def test_names_and_files_are_the_same_configuration(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = Path(demo.__file__)
    monkeypatch.chdir(tmp_path)
    configs = []
    for text in ("demo:smoke", f"{file}:smoke"):
        with command_line(f"--config={text}"):
            configs.append(commandline.CONFIG_FLAG.value.to_dict())
    assert configs[0] == configs[1] == demo.get_config("smoke").to_dict()


def test_home_is_expanded_and_buckets_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    with command_line(DEMO, "--workdir=~/runs/x"):
        assert commandline.path_of("workdir") == Path("/home/me/runs/x")
    with (
        command_line(DEMO, "--workdir=gs://bucket/run"),
        pytest.raises(ValueError, match="gcsfuse"),
    ):
        commandline.path_of("workdir")


def test_the_folder_of_a_run_is_a_configuration_for_another_one(tiny_run: Path) -> None:
    arguments = (f"--config={tiny_run}", "--workdir=elsewhere", "--config.seed=7")
    with command_line(*arguments):
        config = flags.FLAGS["config"].value
        assert config.seed == 7 and config.stages.relay.resolution == 16

"""Sampling by one word: what a preset changes, where it works, and that flag and library agree."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import relay_jax as rx
from relay_jax import commandline
from relay_jax.config import load_config, settings_of
from relay_jax.errors import UserError
from relay_jax.planning import plan as planner
from relay_jax.planning.cost import sampler_calls
from relay_jax.planning.plan import PlanSettings, plan
from relay_jax.presets import PRESETS, by_preset, settings_for, split_samplers, with_preset
from relay_jax.sampling.pixels import to_uint8
from relay_jax.workdir import open_config
from tests.conftest import command_line, run_main, tiny_relay

CONFIGS = ("imagenet256", "celebahq256", "demo", "cifar10")


@pytest.mark.parametrize("name", CONFIGS)
def test_every_preset_works_for_every_configuration(name: str) -> None:
    settings = settings_of(load_config(name))
    stages = by_preset(settings)
    assert list(stages) == list(PRESETS) == ["official", "safe", "fast", "draft"]
    assert stages["official"] == list(settings.stages)
    calls = {n: [sampler_calls(stage)[0] for stage in each] for n, each in stages.items()}
    assert calls["safe"] == [40, 25] and calls["fast"] == [18, 13] and calls["draft"] == [12, 9]
    for each in stages.values():
        for stage, configured in zip(each, settings.stages, strict=True):
            assert stage.guidance.weight == configured.guidance.weight
            assert (
                stage.process == configured.process
                and stage.sample_process == configured.sample_process
            )


def test_evaluations_of_the_published_relay_by_preset() -> None:
    stages = by_preset(settings_of(load_config("imagenet256")))
    evaluations = {n: sum(sampler_calls(stage)[1] for stage in e) for n, e in stages.items()}
    assert evaluations == {"official": 909, "safe": 90, "fast": 44, "draft": 25}


def test_a_run_of_before_there_were_presets_has_them(tmp_path: Path) -> None:
    plain = json.loads(tiny_relay().to_json_best_effort())
    del plain["evaluate"]["preset"]
    for stage in plain["stages"].values():
        stage["sample"] = {k: v for k, v in stage["sample"].items() if k not in ("kind", "handoff")}
    (tmp_path / "config.json").write_text(json.dumps(plain))
    settings = settings_of(open_config(tmp_path))
    fast = with_preset(settings, "fast").stages
    assert [len(stage.sampler.levels()) - 1 for stage in fast] == [18, 13]
    assert isinstance(fast[1].sampler, rx.Multistep) and fast[1].sampler.corrector
    assert with_preset(settings, "").stages == settings.stages


def test_a_key_of_the_command_line_is_stronger_than_the_preset() -> None:
    arguments = ["--config=demo", "--mode=plan", "--preset=fast"]
    with command_line(*arguments, "--config.stages.relay.sample.num_steps=7"):
        keep = commandline.overridden_keys()
        settings = settings_of(commandline.CONFIG_FLAG.value)
        stages = with_preset(settings, commandline.value_of("preset"), keep=keep).stages
    assert [len(stage.sampler.levels()) - 1 for stage in stages] == [18, 7]
    assert isinstance(stages[1].sampler, rx.Multistep)


def test_samplers_by_text() -> None:
    settings = settings_of(load_config("demo"))
    text = "fast:relay.handoff=noise:relay.guidance_interval=(0.2, inf):num_steps=5"
    assert split_samplers(f"official, {text}") == ["official", text]
    base, relay = settings_for(settings, text).stages
    assert relay.handoff == "noise" and relay.guidance.interval == (0.2, float("inf"))
    assert len(base.sampler.levels()) == len(relay.sampler.levels()) == 6
    heun = settings_for(settings, "heun:relay.fresh_noise=0").stages
    assert heun[1].sampler == settings.stages[1].sampler.__class__(
        **{**vars(settings.stages[1].sampler), "fresh_noise": 0}
    )
    for wrong, message in (
        ("slow", "neither a preset nor a sampler; there are official, safe, fast, draft, heun"),
        ("fast:num_steps", "'num_steps' is not KEY=VALUE"),
        ("fast:middle.rho=2", "unknown stage 'middle'; there are base, relay"),
        # A key that only the other sampler has would be ignored in silence.
        ("fast:relay.fresh_noise=0.2", "fresh_noise is no key of the sampler of stage relay"),
        ("fast:relay.num_steps=0", "num_steps must be at least 1"),
    ):
        with pytest.raises(UserError, match=message) as caught:
            settings_for(settings, wrong)
        assert f"sampler {wrong}: " in str(caught.value) and "\n" not in str(caught.value)


def test_an_unknown_preset_is_refused_everywhere(tiny_run: Path, tmp_path: Path) -> None:
    message = "unknown preset 'slow'; there are official, safe, fast, draft"
    with pytest.raises(UserError, match=message):
        rx.load(tiny_run, preset="slow")
    for mode in (["--mode=sample", "--preset=slow"], ["--config.evaluate.preset=slow"]):
        out = [] if len(mode) == 1 else [f"--out={tmp_path / 'out'}"]
        with command_line(f"--workdir={tiny_run}", *mode, *out), pytest.raises(UserError) as caught:
            run_main()
        assert str(caught.value) == message
    assert not (tmp_path / "out").exists()


def test_a_preset_gives_the_same_images_by_flag_and_in_the_library(
    tiny_run: Path, tmp_path: Path
) -> None:
    arguments = ["--mode=sample", "--seeds=3-5", f"--out={tmp_path}", "--preset=draft"]
    with command_line(f"--workdir={tiny_run}", *arguments):
        run_main()
    files = sorted(tmp_path.glob("*/*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    record = json.loads((tmp_path / "samples.json").read_text())
    assert record["stages"]["relay"]["sampler"]["kind"] == "multistep"
    loaded = rx.load(tiny_run, preset="draft")
    images = loaded.sample(seeds=[3, 4, 5])["relay"]
    np.testing.assert_array_equal(to_uint8(images), pixels)
    official = rx.load(tiny_run)
    assert official.with_preset("draft").stages == loaded.stages
    assert loaded.with_preset("official").stages == official.stages
    with pytest.raises(UserError, match="has no configuration"):
        rx.Relay(stages=official.stages, params=official.params).with_preset("fast")


def test_the_plan_lists_presets(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = settings_of(tiny_relay())
    report = plan(settings, None, PlanSettings(devices=1), tmp_path, by_preset(settings))
    assert report["presets"]["fast"]["calls"] == 31
    forward = [stage["forward_flops"] for stage in report["stages"]]
    flops = 18 * forward[0] + 13 * forward[1]
    assert report["presets"]["fast"]["flops"] == flops
    assert report["presets"]["official"]["flops"] == report["total"]["sampling"]["flops"]
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["fast", "31", "denoiser", "calls", "31", "evaluations"] in [line[:6] for line in lines]
    # Of a stage alone the presets are those of that stage.
    relay = {**report, "stages": report["stages"][1:]}
    monkeypatch.setattr(planner, "estimate", lambda *_: relay)
    one = plan(settings, settings.stages[1], PlanSettings(devices=1), None, by_preset(settings))
    assert one["presets"]["fast"] == {"calls": 13, "evaluations": 13, "flops": 13 * forward[1]}


def test_a_training_samples_as_evaluate_preset_says(tiny_run: Path, tmp_path: Path) -> None:
    run = shutil.copytree(tiny_run, tmp_path / "run")
    (run / "report.json").unlink()
    with command_line(f"--workdir={run}", "--config.evaluate.preset=draft"):
        run_main()
    report = json.loads((run / "report.json").read_text())
    stages = report["samples"]["sampling"]["stages"]
    assert [stages[name]["sampler"]["steps"] for name in ("base", "relay")] == [12, 9]
    # The run itself is sampled as configured.
    config = json.loads((run / "config.json").read_text())
    assert config["stages"]["base"]["sample"]["kind"] == "heun"

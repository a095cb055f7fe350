"""The plan of a relay: days and seconds by hand, the table, and what cannot be planned."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from relay_jax.config import build, settings_of
from relay_jax.errors import UserError
from relay_jax.planning import plan as planner
from relay_jax.planning.plan import PlanSettings, estimate, plan, table
from relay_jax.runtime.flops import DEVICES


def test_days_and_seconds_by_hand(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "train_flops", lambda _: 10**12)
    monkeypatch.setattr(planner, "forward_flops", lambda _: 10**11)
    stage = build(config)[0]
    stage = replace(stage, train=replace(stage.train, batch=64, images=788 * 86_400 * 2))
    report = estimate([stage], 1, PlanSettings(devices=8, utilisation=0.5))
    row = report["stages"][0]["hardware"]["v5e"]  # 8 x 197e12 x 0.5 = 788e12 FLOP/s
    assert row["images_per_second"] == pytest.approx(788) and row["days"] == pytest.approx(2)
    assert row["step_seconds"] == pytest.approx(64 / 788)
    evaluations = report["stages"][0]["sampling"]["evaluations"]
    assert row["sampling_seconds"] == pytest.approx(evaluations / 10 / 98.5)
    total = report["total"]
    assert total["days"]["v5e"] == pytest.approx(2) and set(total["days"]) == {
        device.name for device in DEVICES
    }
    assert total["sampling"]["samples_hours"]["v5e"] == pytest.approx(
        50_000 * evaluations / 10 / 98.5 / 8 / 3600
    )


def test_the_plan_is_printed_and_written(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    request = PlanSettings(devices=4, utilisation=0.3, hardware=["v5p", "H100"])
    report = plan(settings_of(config), None, request, tmp_path)
    assert json.loads((tmp_path / "plan.json").read_text()) == report
    text = capsys.readouterr().out
    assert text == table(report) + "\n" and max(map(len, text.splitlines())) < 200
    for word in (
        "4 devices as data x fsdp = 4 x 1",
        "utilisation 30%",
        "stage base: 8 px",
        "stage relay: 16 px",
        "activations",
        "denoiser calls",
        "50,000 samples",
        "v5p",
        "H100",
        "459 T",
        "80 GB",
        "yes",
    ):
        assert word in text, word
    assert "v5e" not in text and "compiler" not in text


def test_by_default_all_devices_are_those_that_divide_every_batch(config: ConfigDict) -> None:
    assert estimate(build(config)[:1], 1, PlanSettings(hardware=["v4"]))["devices"] == 16


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hardware=["B200"]), "unknown device 'B200'; known are v4, v5e, v5p, v6e, A100, H100"),
        (dict(utilisation=0.0), r"utilisation must lie in \(0, 1\], not 0.0"),
        (dict(utilisation=40.0), "utilisation must lie in"),
        (dict(devices=4, fsdp=3), "mesh.fsdp 3 does not divide 4 devices"),
        (dict(devices=32), "stage base: train.batch 16 is not divisible by 32 devices"),
        (dict(topology="v9:2x2"), "unknown topology 'v9:2x2'"),
        (dict(topology="v5e:4x4", devices=8), "v5e:4x4 has 16 chips, not 8"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(
    config: ConfigDict, settings: dict[str, Any], message: str
) -> None:
    config.mesh.fsdp = settings.pop("fsdp", 1)
    with pytest.raises(UserError, match=message) as caught:
        plan(settings_of(config), None, PlanSettings(**settings))
    assert "\n" not in str(caught.value)


def test_one_stage_is_planned_alone(config: ConfigDict, capsys: pytest.CaptureFixture[str]) -> None:
    settings = settings_of(config)
    report = plan(settings, settings.stages[1], PlanSettings(hardware=["v4"]))
    assert [stage["name"] for stage in report["stages"]] == ["relay"]
    assert "stage base" not in capsys.readouterr().out


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install jax[tpu])"
)
def test_the_tpu_compiler_takes_the_training_step(
    config: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = settings_of(config)
    report = plan(settings, settings.stages[0], PlanSettings(topology="v5e:2x2"))
    compiled = report["stages"][0]["compiled"]
    assert compiled["hbm"]["arguments"] > 0 and compiled["cycles"] > 0
    assert compiled["collectives"]["all-reduce"] > 0
    assert compiled["fits"] and 0 < compiled["utilisation"] < 1
    assert "TPU compiler, v5e:2x2" in capsys.readouterr().out

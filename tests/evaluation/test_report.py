"""The report: the same twice but for times, refused beside another one, readable."""

import json
from pathlib import Path
from typing import Any

import pytest

from relay_jax.config import build
from relay_jax.errors import UserError
from relay_jax.evaluation.report import (
    as_markdown,
    averaging,
    check_folder,
    make_report,
    notes_on_record,
    training_summary,
    versions,
    write_report,
)
from relay_jax.runtime.files import append_jsonl
from tests.conftest import tiny_relay

SETTINGS: dict[str, Any] = {
    "samples": {
        "kind": "drawn",
        "images": 4,
        "ema": {"base": {"halflife_images": 64.0}},
        "sampling": {
            "seeds": "0-3",
            "stages": {
                "base": {"resolution": 8, "guidance": {"weight": 1.0, "interval": [0.0, "inf"]}}
            },
        },
    },
    "reference": {"kind": "folder", "path": "a|b", "sha256": "12"},
    "features": {"name": "random-conv"},
    "metrics": {"neighbours": 3},
}


def report(**more: Any) -> dict[str, Any]:
    return make_report(
        {"FD-random-conv": 1.23456789}, ["A note."], {**SETTINGS, **more}, {"total": 1.26}
    )


def changed(section: str, key: str, value: object) -> dict[str, Any]:
    return {**SETTINGS, section: {**SETTINGS[section], key: value}}


def test_a_report_holds_scores_settings_and_machine(tmp_path: Path) -> None:
    write_report(tmp_path / "new", report())
    read = json.loads((tmp_path / "new" / "report.json").read_text())
    assert (
        read["scores"] == {"FD-random-conv": 1.23456789}
        and read["samples"]["sampling"]["seeds"] == "0-3"
    )
    assert read["device"]["devices"] > 0 and {"jax", "numpy", "python", "relay_jax"} <= set(
        read["versions"]
    )
    assert read["time"]["seconds"] == {"total": 1.3}
    assert set(read) == {"scores", "notes", *SETTINGS, "device", "versions", "time"}


def test_the_same_settings_may_be_reported_again(tmp_path: Path) -> None:
    check_folder(tmp_path, SETTINGS)
    write_report(tmp_path, report())
    check_folder(tmp_path, SETTINGS)
    check_folder(tmp_path, changed("reference", "path", "the same images elsewhere"))


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (changed("reference", "sha256", "13"), 'reference.sha256 is "12" there and "13" here'),
        (changed("samples", "images", 5), "samples.images is 4 there and 5 here"),
        (
            changed("samples", "sampling", None),
            "samples.sampling is null there and null here|samples.sampling.seeds",
        ),
        (changed("features", "version", 2), "features.version is null there and 2 here"),
    ],
)
def test_a_report_of_other_settings_is_not_overwritten(
    tmp_path: Path, settings: dict[str, Any], says: str
) -> None:
    write_report(tmp_path, report())
    before = (tmp_path / "report.json").read_bytes()
    with pytest.raises(UserError) as caught:
        check_folder(tmp_path, settings)
    assert any(
        part in str(caught.value) for part in says.split("|")
    ) and "use another --out" in str(caught.value)
    assert (tmp_path / "report.json").read_bytes() == before


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"scores": {}}'])
def test_a_file_that_is_no_report_is_not_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "report.json").write_text(text)
    with pytest.raises(UserError, match="no report of this program"):
        check_folder(tmp_path, SETTINGS)


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "file", SETTINGS)


def test_the_readable_report_has_stages_side_by_side() -> None:
    stages = {
        "base": {"resolution": 8, "guidance": {"weight": 1.0}},
        "relay": {"resolution": 32, "steps": 9},
    }
    text = as_markdown(
        report(
            samples={
                "images": 4,
                "sampling": {"seeds": "0-3", "stages": stages},
                "ema": {"base": {"rampup": 0.05}, "relay": {"rampup": 0.05}},
            }
        )
    )
    lines = text.splitlines()
    for line in (
        "| FD-random-conv | 1.2346 |",
        "- A note.",
        "|  | base | relay |",
        "| resolution | 8 | 32 |",
        "| guidance.weight | 1.0 |  |",
        "| steps |  | 9 |",
        "| ema.rampup | 0.05 | 0.05 |",
        "| sampling.seeds | 0-3 |",
        "| path | a\\|b |",
    ):
        assert line in lines, line
    assert text.count("resolution") == 1


def test_the_version_of_the_package_is_a_hash_of_its_source() -> None:
    assert (
        versions()["relay_jax"].startswith("source ")
        and len(versions()["relay_jax"]) == len("source ") + 16
    )


def test_a_record_that_does_not_fit_the_images_is_noted() -> None:
    assert "no samples.json" in notes_on_record(None, 4)[0]
    assert notes_on_record({"seeds": "0-3"}, 4) == []
    assert notes_on_record({"seeds": "0-999"}, 4) == [
        "samples.json speaks of 1,000 images, and there are 4."
    ]


def test_the_training_of_a_stage_in_a_few_numbers(tmp_path: Path) -> None:
    for images, loss in ((16, 0.9), (32, 0.5)):
        line = {"images": images, "loss": loss, "images_per_second": 8.0, "steps_skipped": 1}
        append_jsonl(tmp_path / "metrics.jsonl", line)
    stage = build(tiny_relay())[1]
    assert training_summary(stage, {"images": 32}, tmp_path) == {
        "resolution": 16,
        "images": 32,
        "loss": 0.5,
        "steps_skipped": 1,
        "images_per_second": 8.0,
    }
    assert averaging([stage])["relay"]["rampup"] == stage.train.ema_rampup

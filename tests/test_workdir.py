"""The workdir of a run: what ties it to its configuration, and how a run opens itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from ml_collections import ConfigDict

from relay_jax.config import build, settings_of
from relay_jax.configs import default, demo
from relay_jax.errors import UserError
from relay_jax.workdir import claim_workdir, open_config, parse_weights, read_config


def plain(config: ConfigDict | None = None) -> dict[str, Any]:
    return json.loads((config or demo.get_config()).to_json_best_effort())


def claimed(tmp_path: Path) -> tuple[Path, str]:
    workdir = tmp_path / "runs" / "demo"
    claim_workdir(plain(), workdir, create=True)
    return workdir, (workdir / "config.json").read_text()


def test_a_new_workdir_keeps_the_configuration_as_json(tmp_path: Path) -> None:
    workdir, text = claimed(tmp_path)
    assert [path.name for path in workdir.iterdir()] == ["config.json"]
    kept = json.loads(text)
    assert kept["stages"]["relay"]["process"]["patch"] == 4
    assert kept["stages"]["base"]["sample"]["s_max"] == math.inf


@pytest.mark.parametrize("create", [True, False])
def test_the_same_configuration_is_accepted_again(create: bool, tmp_path: Path) -> None:
    workdir, text = claimed(tmp_path)
    claim_workdir(plain(), workdir, create=create)
    assert (workdir / "config.json").read_text() == text


@pytest.mark.parametrize(
    "key, value",
    [
        ("log.every_steps", 7),
        ("checkpoint.keep", 9),
        ("sample.batch", 3),
        ("mesh.fsdp", 2),
        ("evaluate.samples", 8),
        ("dataset.path", "elsewhere"),
        ("dataset.workers", 3),
        ("stages.base.train.images", 50_000),
        ("stages.relay.sample.guidance", 1.0),
        ("stages.relay.sample.num_steps", 60),
        ("stages.base.model.remat", True),
    ],
)
def test_keys_that_make_no_other_relay_may_change(key: str, value: object, tmp_path: Path) -> None:
    workdir, _ = claimed(tmp_path)
    config = demo.get_config()
    config.update_from_flattened_dict({key: value})
    claim_workdir(plain(config), workdir, create=True)
    claim_workdir(plain(config), workdir, create=False)
    claim_workdir(plain(), workdir, create=True)


@pytest.mark.parametrize(
    "key, value",
    [
        ("seed", 1),
        ("dataset.size", 49_000),
        ("dataset.x_flip", False),
        ("dataset.num_classes", 0),
        ("stages.base.train.batch", 128),
        ("stages.base.model.channels", 64),
        ("stages.base.model.multipliers", (1, 2, 2)),
        ("stages.relay.process.blur_sigma_max", 2.0),
        ("stages.relay.train.learning_rate", 2e-3),
    ],
)
@pytest.mark.parametrize("create", [True, False])
def test_another_relay_is_refused_by_key_and_nothing_is_written(
    create: bool, key: str, value: object, tmp_path: Path
) -> None:
    workdir, text = claimed(tmp_path)
    config = demo.get_config()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(UserError, match=key.replace(".", r"\.")) as error:
        claim_workdir(plain(config), workdir, create=create)
    assert "\n" not in str(error.value)
    assert (workdir / "config.json").read_text() == text
    assert [path.name for path in workdir.iterdir()] == ["config.json"]


def test_another_stage_is_another_relay(tmp_path: Path) -> None:
    workdir, _ = claimed(tmp_path)
    config = demo.get_config()
    config.stages.top = default.relay_stage(128)
    with pytest.raises(UserError, match=r"stages\.top"):
        claim_workdir(plain(config), workdir, create=True)


def test_reading_needs_a_run_and_makes_no_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run in .*nothing.*train one first"):
        claim_workdir(plain(), tmp_path / "nothing", create=False)
    assert not (tmp_path / "nothing").exists()


def test_a_file_is_no_workdir(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError, match="is a file; name a folder"):
        claim_workdir(plain(), tmp_path / "file", create=True)
    assert (tmp_path / "file").read_text() == "mine"


def test_a_run_opens_itself(tmp_path: Path) -> None:
    workdir, _ = claimed(tmp_path)
    assert build(open_config(workdir)) == build(demo.get_config())
    assert dict(settings_of(open_config(workdir)).plain) == plain()


def test_a_run_of_the_version_before_has_the_names_of_this_one(tmp_path: Path) -> None:
    old = plain()
    for stage in old["stages"].values():
        del stage["model"]["kind"], stage["sample"]["kind"]
        stage["model"]["augment_labels"] = stage["model"].pop("num_augment")
    base = old["stages"]["base"]["sample"]
    base["sde_scale"] = base.pop("fresh_noise")
    del old["debug"]
    (tmp_path / "config.json").write_text(json.dumps(old))
    claim_workdir(plain(), tmp_path, create=True)
    (tmp_path / "config.json").write_text(json.dumps(old))
    assert build(open_config(tmp_path)) == build(demo.get_config())


@pytest.mark.parametrize("text", ["{", "[]", '{"stages": 3}', '{"stages": {"base": 3}}'])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=r"config\.json is damaged") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_are_named_by_folder_or_by_step(tmp_path: Path) -> None:
    (tmp_path / "base" / "checkpoints" / "12").mkdir(parents=True)
    stages, folder = build(demo.get_config()), tmp_path / "base"
    assert parse_weights(stages, {"base": str(folder), "relay": ""}) == {"base": folder}
    step = {"base": folder / "checkpoints" / "12"}
    assert parse_weights(stages, {"base": f"{folder}@12"}) == step
    for text, says in ((f"{folder}@7", "no checkpoint of step 7; there are 12"), ("x", "no check")):
        with pytest.raises(UserError, match=says):
            parse_weights(stages, {"base": text})
    with pytest.raises(UserError, match=r"unknown stage 'top'; .* base, relay"):
        parse_weights(stages, {"top": str(folder)})

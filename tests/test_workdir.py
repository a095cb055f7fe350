"""The workdir of a run: what ties it to its configuration, and how a run opens itself."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from absl import flags
from ml_collections import ConfigDict

from relay_jax import workdir
from relay_jax.config import build, settings_of
from relay_jax.configs import default, demo
from relay_jax.data.description import Description, describe
from relay_jax.data.identity import summary
from relay_jax.data.source import open_source
from relay_jax.errors import UserError
from relay_jax.workdir import (
    claim_dataset,
    claim_workdir,
    class_names,
    open_config,
    parse_weights,
    read_config,
    read_dataset,
)
from tests.conftest import command_line, run_main
from tests.data.pictures import colour, png


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


def test_what_has_not_changed_is_not_written_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A finished run may lie where nobody may write."""
    folder, _ = claimed(tmp_path)
    monkeypatch.setattr(workdir, "write_json", lambda *_: pytest.fail("was written"))
    claim_workdir(plain(), folder, create=True)


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


def test_a_run_from_before_pictures_were_turned_goes_on_with_either(tmp_path: Path) -> None:
    old = plain()
    del old["dataset"]["exif"], old["dataset"]["background"]
    turned = demo.get_config()
    turned.dataset.exif = False
    for config in (plain(), plain(turned)):
        (tmp_path / "config.json").write_text(json.dumps(old))
        assert open_config(tmp_path).dataset.exif is True
        claim_workdir(config, tmp_path, create=True)
    with pytest.raises(UserError, match=r"dataset\.exif is False there and True here"):
        claim_workdir(plain(), tmp_path, create=True)


DEEP = '{"a":' * 500 + "0" + "}" * 500
DAMAGED = ["{", "[]", '{"stages": 3}', '{"stages": {"base": 3}}', DEEP, "[" * 10**6, " " * 2**23]


@pytest.mark.parametrize("text", [*DAMAGED, "\udcff", None])
def test_a_damaged_configuration_is_one_line(tmp_path: Path, text: str | None) -> None:
    if text is None:
        (tmp_path / "config.json").mkdir()
    else:
        (tmp_path / "config.json").write_bytes(text.encode(errors="surrogateescape"))
    with pytest.raises(UserError, match=r"config\.json is damaged") as error:
        read_config(tmp_path)
    assert "\n" not in str(error.value)


def test_weights_are_named_by_folder_or_by_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "base" / "checkpoints" / "12").mkdir(parents=True)
    stages, folder = build(demo.get_config()), tmp_path / "base"
    monkeypatch.setenv("HOME", str(tmp_path))
    assert parse_weights(stages, {"base": "~/base"}) == {"base": folder}
    assert parse_weights(stages, {"base": str(folder), "relay": ""}) == {"base": folder}
    step = {"base": folder / "checkpoints" / "12"}
    assert parse_weights(stages, {"base": f"{folder}@12"}) == step
    for text, says in ((f"{folder}@7", "no checkpoint of step 7; there are 12"), ("x", "no check")):
        with pytest.raises(UserError, match=says):
            parse_weights(stages, {"base": text})
    with pytest.raises(UserError, match=r"unknown stage 'top'; .* base, relay"):
        parse_weights(stages, {"top": str(folder)})


# What a run was trained on


def described(size: int = 16, seed: int = 0) -> Description:
    keys = {"source": "synthetic", "size": size, "num_classes": 8, "hint": "", "path": ""}
    return describe(open_source(keys, [8], seed), keys, [8], seed)


def test_a_run_keeps_its_data_set_and_accepts_it_again(tmp_path: Path) -> None:
    claim_dataset(tmp_path, described())
    kept = read_dataset(tmp_path)
    assert kept is not None and kept == json.loads((tmp_path / "dataset.json").read_text())
    claim_dataset(tmp_path, described())
    assert read_dataset(tmp_path) == kept
    assert class_names(tmp_path, {})[0] == "stripes disc"


def test_other_data_are_refused_with_what_changed_and_the_old_ones_stay(tmp_path: Path) -> None:
    claim_dataset(tmp_path, described())
    before = (tmp_path / "dataset.json").read_bytes()
    for other, difference in (
        (described(size=24), "class 'stripes disc' has 3 images instead of 2"),
        (described(seed=1), "its images are others"),
    ):
        with pytest.raises(UserError, match=difference) as caught:
            claim_dataset(tmp_path, other)
        assert str(tmp_path) in str(caught.value) and len(str(caught.value)) < 400
    assert (tmp_path / "dataset.json").read_bytes() == before


def note(folder: Path, step: int, notes: dict) -> None:
    """A checkpoint, as far as its notes."""
    file = folder / "checkpoints" / str(step) / "meta" / "metadata"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps(notes))


def test_a_lost_file_does_not_let_other_data_in_for_another_stage(tmp_path: Path) -> None:
    note(tmp_path / "base", 6, {"dataset": summary(described().identity)})
    with pytest.raises(UserError, match=f"since {tmp_path}/base was begun: its images are others"):
        claim_dataset(tmp_path, described(seed=1))
    assert not (tmp_path / "dataset.json").exists()
    claim_dataset(tmp_path, described())


@pytest.mark.parametrize("damage", ["{", "[]", '{"identity": {"parts": 7}}', '{"identity": null}'])
def test_a_run_without_a_readable_data_set_gets_one(tmp_path: Path, damage: str) -> None:
    note(tmp_path / "base", 6, {"images": 96})  # of an earlier version
    (tmp_path / "dataset.json").write_text(damage)
    claim_dataset(tmp_path, described())
    assert read_dataset(tmp_path) is not None


def test_names_of_classes_come_from_the_weights_before_the_run(tmp_path: Path) -> None:
    claim_dataset(tmp_path, described())
    other = tmp_path / "elsewhere" / "base"
    note(other, 3, {"dataset": {"images": 2, "class_names": ["old"], "content": ""}})
    note(other, 12, {"dataset": {"images": 2, "class_names": ["cat", "dog"], "content": ""}})
    assert class_names(tmp_path, {"base": other}) == ["cat", "dog"]
    assert class_names(None, {"base": other / "checkpoints" / "3"}) == ["old"]
    assert class_names(None, {}) == [] and class_names(tmp_path / "absent", {}) == []


def test_training_on_renamed_classes_is_refused_before_anything_is_compiled(
    tmp_path: Path,
) -> None:
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        (tmp_path / "pets" / name / "0.png").write_bytes(png(colour(7, 16)))
    (tmp_path / "config.py").write_text(
        "from tests.conftest import tiny_relay\n\n\ndef get_config(_=''):\n"
        "    config = tiny_relay()\n"
        f"    config.dataset.update(source='folder', path='{tmp_path}/pets', num_classes=2)\n"
        "    return config\n"
    )
    with command_line(f"--config={tmp_path}/config.py", f"--workdir={tmp_path}/run"):
        settings = settings_of(flags.FLAGS["config"].value)
        source = open_source(settings.dataset.keys, settings.resolutions, 0)
        claim_dataset(
            tmp_path / "run", describe(source, settings.dataset.keys, settings.resolutions, 0)
        )
        (tmp_path / "pets" / "cat").rename(tmp_path / "pets" / "zebra")
        with pytest.raises(UserError, match="class 'cat' is called 'zebra' now"):
            run_main()
    assert not (tmp_path / "run" / "base" / "checkpoints").exists()

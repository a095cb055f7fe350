"""samples.json: what it says, what it compares, and hashes that know the weights and not where
they lie."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from relay_jax.config import build
from relay_jax.errors import UserError
from relay_jax.runtime.sharding import replicated, state_shardings
from relay_jax.sampling.record import (
    RECORD,
    check_folder,
    describe_sampling,
    first_difference,
    parameters_hash,
    read_record,
    write_record,
)
from tests.conftest import mesh_of, tiny_relay

PARAMS = {
    "a": {
        "kernel": np.arange(2**15, dtype=np.float32).reshape(2, -1),
        "bias": np.zeros(2, np.float32),
    },
    "b": np.ones((3, 2), np.float32),
}
NOTES = {"step": 7, "images": 112, "data": {}}


def record_of(
    config: ConfigDict | None = None,
    weights: bool = True,
    seeds: range = range(8),
    **changed: object,
) -> dict:
    stages = build(config or tiny_relay())
    known_weights = {s.name: (PARAMS, NOTES) for s in stages} if weights else {}
    rule = str(changed.pop("class_rule", "mod"))
    return describe_sampling(stages, known_weights, seeds, rule) | changed


# Hash


def test_the_hash_is_that_of_the_values_wherever_they_lie() -> None:
    expected = parameters_hash(PARAMS)
    assert len(expected) == 64
    mesh = jax.make_mesh((4, 2), ("data", "fsdp"), devices=mesh_of(8).devices.ravel())
    split = jax.device_put(PARAMS, state_shardings(PARAMS, mesh))
    assert not split["a"]["kernel"].is_fully_replicated
    assert (
        parameters_hash(split)
        == parameters_hash(jax.device_put(PARAMS, replicated(mesh)))
        == expected
    )
    assert (
        parameters_hash({"b": PARAMS["b"], "a": {k: PARAMS["a"][k][:] for k in ("bias", "kernel")}})
        == expected
    )
    assert parameters_hash({**PARAMS, "b": np.asfortranarray(PARAMS["b"])}) == expected


@pytest.mark.parametrize(
    "change",
    [
        {"b": np.ones((2, 3), np.float32)},
        {"b": np.ones((3, 2), np.float64)},
        {"b": jnp.ones((3, 2), jnp.bfloat16)},
        {"b": np.nextafter(PARAMS["b"], 2)},
        {"c": np.ones(1, np.float32)},
    ],
)
def test_another_value_shape_type_or_name_is_another_hash(change: dict) -> None:
    assert parameters_hash({**PARAMS, **change}) != parameters_hash(PARAMS)


def test_a_renamed_parameter_is_another_hash() -> None:
    assert parameters_hash({"a": PARAMS["a"], "c": PARAMS["b"]}) != parameters_hash(PARAMS)


# Record


def test_a_record_says_what_the_images_were_made_with() -> None:
    config = tiny_relay()
    config.stages.relay.train.label_dropout = 0.1
    config.stages.relay.sample.update(guidance=3.5, guidance_interval=(0.1, 0.8))
    config.stages.relay.model.dtype = "bfloat16"
    record = record_of(config, seeds=range(3, 70), class_rule="balanced", pixel_edit="imagenet")
    assert record == json.loads(json.dumps(record, allow_nan=False))
    assert (record["seeds"], record["class_rule"], record["pixel_edit"]) == (
        "3-69",
        "balanced",
        "imagenet",
    )
    base, relay = record["stages"]["base"], record["stages"]["relay"]
    assert (base["resolution"], base["dtype"], relay["resolution"], relay["dtype"]) == (
        8,
        "float32",
        16,
        "bfloat16",
    )
    assert (
        base["guidance"] == {"weight": 1.0, "interval": [0.0, "inf"]}
        and base["sampler"]["s_max"] == "inf"
    )
    assert relay["guidance"] == {"weight": 3.5, "interval": [0.1, 0.8]}
    assert (
        relay["sampler"]["handoff_sigma"] == 0.9
        and relay["sampler"]["steps"] < relay["sampler"]["num_steps"] == 8
    )
    assert relay["checkpoint"] == {"step": 7, "images": 112, "ema_sha256": parameters_hash(PARAMS)}
    assert record["noise"]["rule"] == 1


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("stages.base.sample.num_steps", 5),
        ("stages.base.sample.s_churn", 10.0),
        ("stages.relay.sample.handoff_sigma", 0.8),
        ("stages.relay.sample.cdf_max", 0.9),
        ("stages.relay.model.dtype", "bfloat16"),
        ("stages.relay.sample.guidance", 0.5),
        ("stages.base.model.channels", 16),
    ],
)
def test_every_setting_that_changes_an_image_makes_a_difference(path: str, value: object) -> None:
    config = tiny_relay()
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    node[key] = value
    key = {"guidance": "guidance.weight"}.get(key, key)
    difference = first_difference(record_of(), record_of(config))
    assert (
        difference is not None
        and difference.split(" is ")[0].endswith(key)
        and f"{json.dumps(value)} now" in difference
    )


def test_what_leaves_an_image_as_it_is_makes_none() -> None:
    config = tiny_relay()
    config.stages.relay.model.remat = True
    config.stages.base.train.learning_rate = 0.5
    config.sample.batch = 3
    assert first_difference(record_of(), record_of(config, seeds=range(100, 200))) is None


def test_other_weights_make_a_difference_and_longer_notes_none() -> None:
    stages = build(tiny_relay())
    before = record_of()
    same = describe_sampling(
        stages, {s.name: (PARAMS, {**NOTES, "step": 9}) for s in stages}, range(8), "mod"
    )
    other = describe_sampling(
        stages, {s.name: ({**PARAMS, "b": PARAMS["b"] * 2}, NOTES) for s in stages}, range(8), "mod"
    )
    assert first_difference(before, same) is None
    assert first_difference(before, other).startswith("stages.base.checkpoint.ema_sha256 is ")
    assert first_difference(before, record_of(weights=False), weights=False) is None
    assert first_difference(before, record_of(weights=False)).endswith("not there now")


# Folder


def test_a_record_collects_the_seeds_that_were_asked_for(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    write_record(folder, record_of(seeds=range(8)))
    written = (folder / RECORD).stat().st_mtime_ns
    write_record(folder, record_of(seeds=range(4)))
    assert (folder / RECORD).stat().st_mtime_ns == written, "nothing new"
    write_record(folder, record_of(seeds=range(12, 20)))
    assert read_record(folder) == {**record_of(), "seeds": "0-7,12-19"}


def test_a_folder_of_other_or_unknown_images_is_refused(tmp_path: Path) -> None:
    check_folder(tmp_path / "absent", record_of())
    check_folder(tmp_path, record_of())
    (tmp_path / "5.png").write_text("")
    with pytest.raises(UserError, match=r"no samples\.json"):
        check_folder(tmp_path, record_of())
    write_record(tmp_path, record_of())
    check_folder(tmp_path, record_of(seeds=range(90)))
    with pytest.raises(
        UserError, match=r'images: class_rule is "mod" in its samples\.json and "3" now'
    ) as error:
        check_folder(tmp_path, record_of(class_rule="3"))
    assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="is a file"):
        check_folder(tmp_path / "5.png", record_of())


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"seeds": 3}', '{"seeds": "x"}'])
def test_a_damaged_record_is_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / RECORD).write_text(text)
    with pytest.raises(UserError, match=r"samples\.json cannot be read") as error:
        check_folder(tmp_path, record_of())
    assert "\n" not in str(error.value)

"""What is asked for: class rules of stages that continue others, and what every batch starts
from."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import SampleSettings, settings_of
from relay_jax.data.source import draw
from relay_jax.errors import UserError
from relay_jax.sampling.folder import PngFolder
from relay_jax.sampling.pixels import to_uint8
from relay_jax.sampling.record import describe_sampling, write_record
from relay_jax.sampling.request import OWN, Request, parse_request
from tests.conftest import tiny_relay

SETTINGS = settings_of(tiny_relay())
STAGES = SETTINGS.stages
DATA = {"source": "synthetic", "size": 64, "resolution": 16, "seed": 0}


def ask(
    only: int | None = None,
    *,
    seeds: str = "0-3",
    rule: str = "",
    edit: str = "none",
    low_res: Path | None = None,
) -> Request:
    settings = replace(SETTINGS, sample=SampleSettings(batch=4, pixel_edit=edit))
    stage = None if only is None else STAGES[only]
    return parse_request(settings, stage, seeds=seeds, class_rule=rule, low_res=low_res)


def low_images(folder: Path, rule: str = "balanced", kind: str = "png") -> Path:
    """What sampling the first stage alone leaves."""
    write_record(
        folder, describe_sampling(STAGES[:1], {}, range(4), rule) | {"output": {"format": kind}}
    )
    for seed in range(4):
        PngFolder(folder).add(seed, np.full((8, 8, 3), 60 * seed, np.uint8), 0)
    return folder


def test_a_whole_relay_starts_from_classes_alone() -> None:
    request = ask(rule="balanced", edit="imagenet")
    assert (request.class_rule, request.pixel_edit, request.start, request.from_real_images) == (
        "balanced",
        "imagenet",
        {},
        False,
    )
    inputs = request.inputs(np.arange(8), None)
    assert sorted(inputs.classes.tolist()) == list(range(8)) and inputs.low_res is None
    assert ask().class_rule == "mod" and ask().inputs(np.array([9]), None).classes.tolist() == [1]


def test_only_final_images_are_edited() -> None:
    assert [ask(stage, edit="imagenet").pixel_edit for stage in (None, 0, 1)] == [
        "imagenet",
        "none",
        "imagenet",
    ]


def test_a_relay_alone_starts_from_real_images_and_their_classes() -> None:
    request = ask(1)
    source = request.open_source(SETTINGS)
    assert source is not None and ask().open_source(SETTINGS) is None
    assert (
        request.from_real_images
        and request.class_rule == OWN
        and request.record({})["low_res"]["data"] == DATA
    )
    seeds = np.array([3, 67, 5])  # 67 has the image of 3 again
    inputs, fixed = request.inputs(seeds, source), ask(1, rule="2").inputs(seeds, source)
    # Not the first images of the set, which may be sorted by class.
    order = draw(64, 64, 0)
    assert inputs.classes.tolist() == [
        source[order[i]][1] for i in (3, 3, 5)
    ] and fixed.classes.tolist() == [2, 2, 2]
    assert inputs.low_res is not None and inputs.low_res.shape == (3, 8, 8, 3)
    np.testing.assert_array_equal(inputs.low_res, fixed.low_res)
    np.testing.assert_array_equal(inputs.low_res[0], inputs.low_res[1])
    assert not np.array_equal(inputs.low_res[0], inputs.low_res[2])


def test_a_relay_alone_takes_images_written_before_with_their_classes(tmp_path: Path) -> None:
    request = ask(1, low_res=low_images(tmp_path))
    inputs = request.inputs(np.array([2, 0]), None)
    assert request.class_rule == "balanced" and not request.from_real_images
    np.testing.assert_array_equal(
        to_uint8(inputs.low_res), np.full((2, 8, 8, 3), [[[[120]]], [[[0]]]], np.uint8)
    )
    np.testing.assert_array_equal(
        inputs.classes, ask(rule="balanced").inputs(np.array([2, 0]), None).classes
    )
    before = request.record({})["low_res"]["made_by"]
    assert before["stages"]["base"]["sampler"]["num_steps"] == 4 and "seeds" not in before


def test_unknown_images_may_be_continued(tmp_path: Path) -> None:
    (tmp_path / "000000").mkdir()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "000000" / "000000.png")
    request = ask(1, seeds="0", low_res=tmp_path)
    assert request.class_rule == "mod" and request.start == {"made_by": "unknown"}


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"only": 0}, "starts from noise"),
        ({}, "starts from noise"),
        ({"only": 1, "rule": "3"}, "have the classes of rule 'balanced'"),
        ({"only": 1, "rule": "9"}, "0 to 7"),
    ],
)
def test_impossible_requests_are_one_line(tmp_path: Path, settings: dict, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        ask(low_res=low_images(tmp_path), **settings)
    assert "\n" not in str(error.value)


def test_images_of_other_formats_cannot_be_continued(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--format=png"):
        ask(1, low_res=low_images(tmp_path, kind="npz"))
    with pytest.raises(UserError, match="name a rule"):
        ask(1, low_res=low_images(tmp_path / "own", rule=OWN))

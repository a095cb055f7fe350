"""Pages: charts by their numbers, text of users escaped, damaged pictures left out, any kind of
run."""

import base64
import io
import json
import re
import shutil
import time
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import settings_of
from relay_jax.plots.animation import END_MS, HANDOFF_MS, film, frames
from relay_jax.plots.chart import Axis, Chart, Line, si_text
from relay_jax.plots.filmstrip import Frames
from relay_jax.plots.page import Figure, Page, Section, Table, embedded, render, write_page
from relay_jax.plots.run_page import run_page, write_run_page
from relay_jax.workdir import open_config
from tests.conftest import command_line, run_main

HOSTILE = "</title><script>alert('x')</script>\" onload=\"alert(1)"


def polylines(chart: Chart) -> list[np.ndarray]:
    root = ElementTree.fromstring(str(chart.svg()))
    return [
        np.array([tuple(map(float, pair.split(","))) for pair in line.attrib["points"].split()])
        for line in root.iter("polyline")
    ]


def test_equal_ratios_are_equal_lengths_on_logarithmic_axes() -> None:
    x = [1.0, 10.0, 100.0]
    chart = Chart(
        x_label="x", y_label="y", lines=[Line(name="a", x=x, y=[4.0, 2.0, 1.0])], log_x=True,
        log_y=True,
    )  # fmt: skip
    (points,) = polylines(chart)
    steps = np.diff(points, axis=0)
    np.testing.assert_allclose(steps[0], steps[1], atol=0.2)
    assert steps[0, 0] > 0 and steps[0, 1] > 0  # to the right; down is positive in SVG


def test_a_chart_leaves_out_what_has_no_place_and_shows_the_rest() -> None:
    line = Line(name="<b>", x=[0.0, 1.0, 2.0, 3.0], y=[1.0, float("nan"), -1.0, 2.0])
    chart = Chart(x_label="<x>", y_label="y", lines=[line], log_y=True)
    (points,) = polylines(chart)
    assert len(points) == 2 and "<x>" not in str(chart.svg())
    assert chart.legend == [("c0", "<b>")]
    assert not Chart(
        x_label="x", y_label="y", lines=[Line(name="", x=[1], y=[0])], log_y=True
    ).svg()
    # A million points are as many as there are pixels, of the same course.
    x = np.arange(1_000_000.0)
    (points,) = polylines(Chart(x_label="", y_label="", lines=[Line(name="", x=x, y=2 * x)]))
    assert len(points) <= 300
    slopes = np.diff(points[:, 1]) / np.diff(points[:, 0])
    np.testing.assert_allclose(slopes[1:-1], slopes[1], rtol=0.2)


@pytest.mark.parametrize("low, high", [(0.3, 1.1), (0, 60_000), (1e-5, 1e5), (5, 5), (-30, 10)])
@pytest.mark.parametrize("log", [False, True])
def test_axes_have_a_few_round_ticks(low: float, high: float, log: bool) -> None:
    if log and low <= 0:
        pytest.skip("no logarithm")
    axis = Axis.over([low, high], log, 0, 100)
    ticks = axis.ticks()
    assert 2 <= len(ticks) <= 12 and ticks == sorted(ticks)
    assert "e+" not in " ".join(map(si_text, ticks))
    assert all(-1e-9 <= axis.place(tick) <= 100 + 1e-9 for tick in ticks)


def test_what_users_name_is_text_and_nothing_else(tmp_path: Path) -> None:
    section = Section(
        title=HOSTILE,
        texts=[HOSTILE],
        points=[HOSTILE],
        commands=[(HOSTILE, HOSTILE)],
        tables=[Table(head=[HOSTILE], rows=[[HOSTILE]], caption=HOSTILE)],
        figures=[
            Figure(name=HOSTILE, caption=HOSTILE, chart=Chart(
                x_label=HOSTILE, y_label=HOSTILE, mark=(1.0, HOSTILE),
                lines=[Line(name=HOSTILE, x=[1, 2], y=[1, 2])])),
        ],
    )  # fmt: skip
    page = Page(
        title=HOSTILE, subtitle=HOSTILE, facts=[(HOSTILE, HOSTILE)], sections=[section],
        footer=HOSTILE,
    )  # fmt: skip
    text = render(page)
    assert "<script" not in text and 'onload="' not in text and text.count("&lt;script") > 15
    assert "default-src &#39;none&#39;" in text or "default-src 'none'" in text


def test_a_picture_is_in_the_page_bit_by_bit_and_a_damaged_one_is_not(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (40, 30, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    (tmp_path / "b.png").write_bytes(b"\x89PNG\r\n\x1a\nno")
    shown = embedded(tmp_path / "a.png")
    assert shown is not None and (shown["width"], shown["height"]) == (30, 40)
    content = base64.b64decode(shown["source"].partition(",")[2])
    np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), pixels)
    assert embedded(tmp_path / "b.png") is None and embedded(tmp_path / "none.png") is None
    figures = [Figure(name=name, picture=tmp_path / f"{name}.png") for name in ("a", "b")]
    write_page(Page(title="x", sections=[Section(figures=figures)]), tmp_path)
    text = (tmp_path / "report.html").read_text()
    assert text.count("<img") == 1 and not list(tmp_path.glob(".*"))


def strip_of(resolutions: tuple[int, ...]) -> list[Frames]:
    rng = np.random.default_rng(0)
    return [
        Frames(
            stage=f"s{n}",
            from_handoff=n > 0,
            steps=np.arange(3),
            total_steps=3,
            sigmas=np.array([5.0, 1.0, 0.1]),
            states=rng.normal(size=(3, 2, r, r, 3)).astype(np.float32),
            denoised=np.zeros((3, 2, r, r, 3), np.float32),
            final=np.ones((2, r, r, 3), np.float32),
            handed=np.ones((2, r, r, 3), np.float32),
        )
        for n, r in enumerate(resolutions)
    ]


def test_the_film_stands_still_at_every_hand_off() -> None:
    shown = list(frames(strip_of((8, 16, 32)), sigma_data=0.5))
    stills = [(f.stage, f.milliseconds) for f in shown if f.milliseconds >= HANDOFF_MS]
    # The finished small image, then the state that the next stage begins with; twice.
    assert stills == [(0, HANDOFF_MS), (1, HANDOFF_MS), (1, HANDOFF_MS), (2, HANDOFF_MS),
                      (2, END_MS)]  # fmt: skip
    positions = [f.position for f in shown]
    assert positions == sorted(positions) and positions[0] == 0 and positions[-1] == 1
    with Image.open(io.BytesIO(film(strip_of((8, 16)), 0.5))) as picture:
        assert picture.n_frames == 8 and picture.info["loop"] == 0
        picture.seek(7)
        colours = np.asarray(picture.convert("RGB"))
        assert (colours[60, 30] > 250).all()  # the finished image, white


def test_a_run_has_a_page_whatever_there_is_of_it(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run & <b>"
    shutil.copytree(tiny_run, run)
    stages = settings_of(open_config(run)).stages
    grids = {"samples": [0, 1, 2, 3, 4, 5, 6, 7, 1], "real": [0]}
    (run / "samples" / "grids.json").write_text(json.dumps(grids))
    text = render(run_page(stages, run))
    assert "Classes, row by row: stripes disc, " in text and "real images are of any" in text
    (run / "report.json").unlink()
    text = render(run_page(stages, run))
    assert "Still training: base has seen 96 of 96 images" in text
    assert "run &amp; &lt;b&gt;" in text and "Continue the training" in text
    for name in ("samples", "plots"):
        shutil.rmtree(run / name, ignore_errors=True)
    for stage in stages:
        (run / stage.name / "metrics.jsonl").write_text("nothing")
        (run / stage.name / "training.json").write_text("[")
    text = render(run_page(stages, run))
    assert "base has seen 0 of 96 images" in text and "<img" not in text


def test_a_training_ends_with_a_page_and_plots_add_to_it(tiny_run: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(tiny_run, run)
    before = (run / "report.html").read_text()
    scores = json.loads((run / "report.json").read_text())["scores"]
    assert all(name in before for name in scores if not name.endswith(("_real", "_upsampled")))
    assert "A column for each class: stripes disc, stripes square, " in before
    assert before.count("<img") == 3 and before.count("<svg") == 2  # two stages and real images
    with command_line(f"--workdir={run}", "--mode=plot", "--plot=snr,curves"):
        run_main()
    after = (run / "report.html").read_text()
    assert after.count("<svg") == 3 and after.count("<img") > 3
    begun = time.monotonic()
    write_run_page(settings_of(open_config(run)).stages, run)
    assert time.monotonic() - begun < 5 and len(after) < 3_000_000
    assert not re.search(r"(src|href)=\"(?!data:)", after) and "url(" not in after

"""The command line as a user has it: train the shrunk demo, be killed, continue, sample, sample
one stage."""

import io
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests import browser

ROOT = Path(__file__).parents[1]
DEMO = "configs/demo.py:smoke"


def command(workdir: Path, *arguments: str, config: str = "") -> list[str]:
    """config: none for a run, which opens itself."""
    named = [f"--config={config}"] if config else []
    return [sys.executable, "-m", "relay_jax.main", *named, f"--workdir={workdir}", *arguments]


def environment() -> dict[str, str]:
    return {name: value for name, value in os.environ.items() if name != "JAX_NUM_CPU_DEVICES"}


def run(workdir: Path, *arguments: str, config: str = "") -> str:
    """Runs to success; returns what was said."""
    done = subprocess.run(
        command(workdir, *arguments, config=config),
        cwd=ROOT,
        env=environment(),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of the shrunk demo, killed once on the way."""
    workdir = tmp_path_factory.mktemp("run") / "demo"
    process = subprocess.Popen(
        command(workdir, config=DEMO),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.time() + 600
    while not list(workdir.glob("base/checkpoints/8/_CHECKPOINT_METADATA")):
        assert process.poll() is None and time.time() < deadline, "no checkpoint appeared"
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    output = run(workdir, config=DEMO)
    assert "continues at 128 images" in output or "stage base is finished" in output, output
    assert output.splitlines()[-1].endswith(f"look at {workdir / 'report.html'}")
    assert "class that was asked for" in output and "--mode=sample --seeds=0-63 --class=" in output
    return workdir


def test_the_run_leaves_what_the_readme_promises(demo: Path) -> None:
    report = json.loads((demo / "report.json").read_text())
    shares = ["precision-random-conv", "recall-random-conv", "coverage-random-conv"]
    shares += ["class_accuracy", "class_accuracy_upsampled", "class_accuracy_real"]
    others = ["FD-random-conv", "MIND-random-conv", "KID-random-conv", "density-random-conv"]
    assert set(report["scores"]) == {*shares, *others}
    assert all(0 <= report["scores"][name] <= 1 for name in shares)
    assert report["scores"]["FD-random-conv"] > 0 and report["time"]["seconds"]["total"] > 0
    assert "| class_accuracy |" in (demo / "report.md").read_text()
    for name in ("base", "relay"):
        assert report["training"][name]["images"] == 256 and report["training"][name]["loss"] > 0
        assert report["time"]["images_per_second"][name] > 0
        lines = [
            json.loads(line) for line in (demo / name / "metrics.jsonl").read_text().splitlines()
        ]
        assert [line["images"] for line in lines] == [64, 128, 192, 256]
        assert list((demo / name / "grids").glob("*.png")) and list((demo / name).glob("events.*"))
    assert (
        json.loads((demo / "config.json").read_text())["stages"]["relay"]["process"]["patch"] == 4
    )
    for picture in ("samples/grid.png", "loss.png"):
        assert np.asarray(Image.open(demo / picture)).std() > 5


LEGIBLE = """
(() => {
  const small = [...document.querySelectorAll("p, li, td, th, figcaption, dd, dt, pre, footer")]
    .filter(e => e.checkVisibility() && parseFloat(getComputedStyle(e).fontSize) < 13);
  const axes = [...document.querySelectorAll("svg text")]
    .filter(e => e.checkVisibility() && e.getBoundingClientRect().height < 11);
  const wide = [...document.querySelectorAll("p, li, svg, pre, figure")]
    .filter(e => e.getBoundingClientRect().right > innerWidth + 1);
  return [small.length, axes.length, wide.length];
})()"""


def test_the_page_is_whole_and_legible_in_a_browser(demo: Path) -> None:
    page = demo / "report.html"
    assert page.stat().st_size < 3_000_000
    if browser.program() is None:
        pytest.skip("needs Chromium")
    with browser.opened() as tab:
        for width, dark in ((400, False), (1400, False), (400, True)):
            tab.open(page, width, dark)
            tab.value("document.querySelectorAll('details').forEach(each => each.open = true)")
            images = tab.value(
                "Promise.all([...document.images].map(async i => { await i.decode();"
                " return [i.complete, i.naturalWidth, i.getBoundingClientRect().width]; }))"
            )
            assert len(images) >= 6 and all(
                done and natural > 0 and shown > 100 for done, natural, shown in images
            )
            assert tab.value("document.documentElement.scrollWidth") == width
            assert tab.value(LEGIBLE) == [0, 0, 0]
            # In the dark the page is dark, with light letters.
            paper, ink = (
                sum(map(int, re.findall(r"\d+", tab.value(f"getComputedStyle(document.body).{x}"))))
                for x in ("backgroundColor", "color")
            )
            assert (paper < 150 < 500 < ink) if dark else (ink < 150 < 500 < paper)
            assert Image.open(io.BytesIO(tab.screenshot())).size[0] == width
        titles = tab.value("[...document.querySelectorAll('h2, summary')].map(e => e.innerText)")
        asked = [url for url in tab.requests if not url.startswith("data:")]
        assert asked == [page.as_uri()] * 3 and tab.complaints == []
    assert titles == [
        "Scores",
        "From noise to image",
        "Training",
        "Why it can go on at the hand-off",
        "Does it copy?",
        "Go on",
        "More pictures",
        "The whole protocol",
    ]


def test_a_finished_run_does_nothing_again(demo: Path) -> None:
    before = (demo / "report.json").stat().st_mtime_ns
    output = run(demo)
    assert "all stages are finished" in output
    assert output.splitlines()[-1].endswith(f"look at {demo / 'report.html'}")
    assert (demo / "report.json").stat().st_mtime_ns == before


def test_sampling_numbers_images_by_seed_and_keeps_existing_ones(
    demo: Path, tmp_path: Path
) -> None:
    run(demo, "--mode=sample", "--seeds=2-4,1001", f"--out={tmp_path}")
    files = sorted(p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*.png"))
    assert files == [
        "000000/000002.png",
        "000000/000003.png",
        "000000/000004.png",
        "001000/001001.png",
    ]
    assert Image.open(tmp_path / files[0]).size == (32, 32)
    pixels = {f: (tmp_path / f).read_bytes() for f in files}
    (tmp_path / files[1]).unlink()
    times = {f: (tmp_path / f).stat().st_mtime_ns for f in files if f != files[1]}
    run(demo, "--mode=sample", "--seeds=2-4,1001", f"--out={tmp_path}")
    assert {f: (tmp_path / f).stat().st_mtime_ns for f in times} == times, (
        "existing images were made again"
    )
    again = np.asarray(Image.open(tmp_path / files[1]), int)
    (tmp_path / "old.png").write_bytes(pixels[files[1]])
    assert np.abs(again - np.asarray(Image.open(tmp_path / "old.png"), int)).max() <= 1


def test_a_relay_stage_alone_continues_the_images_of_the_first(demo: Path, tmp_path: Path) -> None:
    low, high = tmp_path / "low", tmp_path / "high"
    run(demo, "--mode=sample", "--stage=base", "--seeds=0-3", f"--out={low}", "--class=2")
    assert Image.open(low / "000000/000000.png").size == (8, 8)
    run(
        demo,
        "--mode=sample",
        "--stage=relay",
        "--seeds=0-3",
        f"--out={high}",
        f"--low_res={low}",
        "--class=2",
    )
    assert Image.open(high / "000000/000003.png").size == (32, 32)
    bad = subprocess.run(
        command(
            demo,
            "--mode=sample",
            "--stage=relay",
            "--seeds=0-4",
            f"--out={high}",
            f"--low_res={low}",
        ),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert bad.returncode == 2 and "000004.png" in bad.stderr.splitlines()[-1]
    run(demo, "--mode=sample", "--stage=relay", "--seeds=0-1", f"--out={tmp_path / 'real'}")
    assert len(list((tmp_path / "real").rglob("*.png"))) == 2


@pytest.mark.parametrize(
    "arguments",
    [
        ["--class=8"],
        ["--class=-1"],
        ["--seeds=5-2"],
        ["--seeds=x"],
        ["--stage=base", "--low_res=somewhere"],
        ["--config.stages.relay.model.channels=32"],
    ],
)
def test_sampling_refuses_what_cannot_be_done(
    demo: Path, tmp_path: Path, arguments: list[str]
) -> None:
    done = subprocess.run(
        command(demo, "--mode=sample", f"--out={tmp_path}", *arguments),
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not list(tmp_path.iterdir())


def test_the_notebook_draws_what_the_command_line_draws(demo: Path, tmp_path: Path) -> None:
    """In processes of their own, as users have them: a device for each core in both."""
    run(demo, "--mode=sample", "--seeds=0-7", f"--out={tmp_path / 'images'}")
    code = (
        "import relay_jax as rx, numpy as np; from relay_jax.sampling.pixels import to_uint8;"
        f"images = rx.load({str(demo)!r}).sample(range(8))['relay'];"
        f"np.save({str(tmp_path / 'notebook.npy')!r}, to_uint8(images))"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment(), check=True)
    files = sorted((tmp_path / "images").rglob("*.png"))
    pixels = np.stack([np.asarray(Image.open(file)) for file in files])
    np.testing.assert_array_equal(np.load(tmp_path / "notebook.npy"), pixels)


@pytest.mark.parametrize("name", ["imagenet256", "celebahq256"])
def test_published_configurations_run_when_shrunk(tmp_path: Path, name: str) -> None:
    run(
        tmp_path / name,
        "--config.stages.base.train.images=32",
        "--config.stages.relay.train.images=32",
        "--config.log.grid_every_images=0",
        "--config.evaluate.pictures=False",
        config=f"configs/{name}.py:smoke",
    )
    assert Image.open(tmp_path / name / "samples" / "grid.png").size[0] > 100

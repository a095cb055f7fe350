"""--mode=evaluate through the command line: folders, files and samples drawn from a run, and
what is refused."""

import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax import main
from relay_jax.data.source import SyntheticShapes
from relay_jax.evaluation import evaluate as verb
from relay_jax.evaluation.features import make_extractor
from relay_jax.evaluation.metrics import feature_stats, fid, inception_score, precision_recall
from relay_jax.runtime.logs import read_jsonl
from tests.conftest import command_line, mesh_of
from tests.evaluation import fakes

ROOT = Path(__file__).parents[2]
CONFIG = "from tests.conftest import tiny_relay\n\n\ndef get_config():\n    return tiny_relay()\n"
NAMES = ["FD-random-conv", "precision-random-conv", "recall-random-conv"]


def shapes(count: int, side: int = 16, start: int = 0) -> np.ndarray:
    source = SyntheticShapes(side, start + count, 0)
    return np.stack([source[i][0] for i in range(start, start + count)])


def write(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "tiny.py"
    path.write_text(CONFIG)
    return path


@pytest.fixture(autouse=True)
def at_the_root(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.chdir(ROOT)
    yield


def run(config: Path, *arguments: str) -> None:
    with command_line(f"--config={config}", *arguments):
        main.main([])


def refused(capsys: pytest.CaptureFixture[str], config: Path, *arguments: str) -> str:
    """The one line with which the command line ends with status 2."""
    with pytest.raises(SystemExit) as stopped:
        run(config, "--mode=evaluate", *arguments)
    lines = capsys.readouterr().err.strip().splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and lines[0].startswith("error: "), lines
    return lines[0]


def report(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text())


@pytest.fixture(scope="module")
def workdir(config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with evaluations on the way; do not write into it."""
    folder = tmp_path_factory.mktemp("run") / "tiny"
    before = os.getcwd()
    os.chdir(ROOT)
    try:
        run(
            config,
            f"--workdir={folder}",
            "--config.evaluate.every=48",
            "--config.evaluate.every_samples=8",
            "--config.evaluate.class_check=False",
            "--config.evaluate.reference_images=40",
        )
    finally:
        os.chdir(before)
    return folder


def test_a_folder_against_a_folder_gives_the_scores_of_its_features(
    config: Path, tmp_path: Path
) -> None:
    real, samples = shapes(30), shapes(9, start=41)
    write(tmp_path / "real", real)
    run(
        config,
        "--mode=evaluate",
        f"--images={write(tmp_path / 'samples', samples)}",
        f"--reference={tmp_path / 'real'}",
        f"--out={tmp_path / 'out'}",
    )
    extract = make_extractor("random-conv", weights=None, mesh=mesh_of(1))
    a, b = extract(real)["pool"], extract(samples)["pool"]
    scores = report(tmp_path / "out")["scores"]
    assert list(scores) == NAMES
    np.testing.assert_allclose(scores["FD-random-conv"], fid(a, b), rtol=1e-4)
    assert [scores[name] for name in NAMES[1:]] == list(precision_recall(a, b))
    assert "| FD-random-conv |" in (tmp_path / "out" / "report.md").read_text()


def test_adms_files_give_the_scores_of_the_papers(
    config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, samples = shapes(9), shapes(12, start=20)
    statistics = {name: feature_stats(fakes.known(real)[name]) for name in ("pool", "spatial")}
    np.savez(
        tmp_path / "VIRTUAL.npz",
        arr_0=real,
        mu=statistics["pool"][0],
        sigma=statistics["pool"][1],
        mu_s=statistics["spatial"][0],
        sigma_s=statistics["spatial"][1],
    )
    np.savez(tmp_path / "samples.npz", samples)
    monkeypatch.setattr(verb, "make_extractor", lambda name, **_: fakes.extractor(name))
    run(
        config,
        "--mode=evaluate",
        f"--images={tmp_path / 'samples.npz'}",
        f"--reference={tmp_path / 'VIRTUAL.npz'}",
        "--features=inception",
        f"--out={tmp_path / 'out'}",
    )
    found, known = report(tmp_path / "out"), [fakes.known(images) for images in (real, samples)]
    assert list(found["scores"]) == ["FID", "sFID", "IS", "precision", "recall"]
    want = [
        *(fid(*(features[name] for features in known)) for name in ("pool", "spatial")),
        inception_score(known[1]["probabilities"]),
        *precision_recall(*(features["pool"] for features in known)),
    ]
    np.testing.assert_allclose(list(found["scores"].values()), want, rtol=1e-9)
    assert (
        found["reference"]["sha256"]
        == hashlib.sha256((tmp_path / "VIRTUAL.npz").read_bytes()).hexdigest()
    )
    assert any("no samples.json" in note for note in found["notes"])


def test_the_same_evaluation_twice_gives_the_same_report_but_for_times(
    config: Path, workdir: Path, tmp_path: Path
) -> None:
    drawn = [
        "--mode=evaluate",
        f"--workdir={workdir}",
        "--seeds=3-9",
        f"--cache={tmp_path / 'cache'}",
    ]
    run(config, *drawn, f"--out={tmp_path / 'a'}")
    first = report(tmp_path / "a")
    run(config, *drawn, f"--out={tmp_path / 'a'}")  # beside itself, with features from the cache
    again = report(tmp_path / "a")
    assert first.pop("time")["finished"] and again.pop("time")
    assert first == again
    sampling = first["samples"]["sampling"]
    assert (
        sampling["seeds"] == "3-9"
        and sampling["class_rule"] == "mod"
        and sampling["pixel_edit"] == "none"
    )
    for stage in ("base", "relay"):
        assert sampling["stages"][stage]["checkpoint"]["images"] == 96
        assert len(sampling["stages"][stage]["checkpoint"]["ema_sha256"]) == 64
        assert (
            sampling["stages"][stage]["guidance"]["weight"] == 1
            and first["samples"]["ema"][stage]["rampup"] == 0.05
        )
    assert first["reference"]["images"] == 64 and len(first["reference"]["sha256"]) == 64
    assert first["features"]["name"] == "random-conv"


def test_drawn_samples_score_as_the_images_that_sampling_writes(
    config: Path, workdir: Path, tmp_path: Path
) -> None:
    asked = [
        f"--workdir={workdir}",
        "--seeds=3-9",
        "--class=balanced",
        "--config.sample.pixel_edit=imagenet",
    ]
    run(config, "--mode=sample", *asked, f"--out={tmp_path / 'png'}")
    run(config, "--mode=sample", *asked, f"--out={tmp_path / 'npz'}", "--format=npz")
    found = []
    for name in ("drawn", "png", "npz"):
        images = [] if name == "drawn" else [f"--images={tmp_path / name}"]
        run(
            config,
            "--mode=evaluate",
            *asked,
            *images,
            f"--out={tmp_path / 'out' / name}",
            f"--cache={tmp_path / 'cache'}",
        )
        found.append(report(tmp_path / "out" / name))
    assert found[0]["scores"] == found[1]["scores"] == found[2]["scores"]
    next((tmp_path / "png").rglob("*.png")).unlink()
    run(
        config,
        "--mode=evaluate",
        *asked,
        f"--images={tmp_path / 'png'}",
        f"--out={tmp_path / 'out' / 'less'}",
    )
    assert (
        "samples.json speaks of 7 images, and there are 6."
        in report(tmp_path / "out" / "less")["notes"]
    )
    for one in found:
        assert one["samples"]["sampling"]["class_rule"] == "balanced"
        assert one["samples"]["sampling"]["stages"] == found[0]["samples"]["sampling"]["stages"]
    assert not (tmp_path / "out" / "drawn" / "samples").exists()


def test_a_stage_alone_is_evaluated_at_its_resolution(
    config: Path, workdir: Path, tmp_path: Path
) -> None:
    asked = [
        "--mode=evaluate",
        f"--workdir={workdir}",
        "--seeds=0-4",
        f"--cache={tmp_path / 'cache'}",
    ]
    for stage, rule, side in (("base", "mod", 8), ("relay", "own", 16)):
        run(
            config, *asked, f"--stage={stage}", f"--out={tmp_path / stage}", "--reference_images=20"
        )
        found = report(tmp_path / stage)
        assert (
            found["samples"]["resolution"] == side
            and found["samples"]["sampling"]["class_rule"] == rule
        )
        assert (
            list(found["samples"]["sampling"]["stages"]) == [stage]
            and found["reference"]["images"] == 20
        )
        assert (
            f"to {side} px" in found["reference"]["preparation"]
            and "of 64" in found["reference"]["choice"]
        )


def test_training_leaves_a_curve_of_scores_and_a_report(workdir: Path) -> None:
    for stage in ("base", "relay"):
        lines = [
            line
            for line in read_jsonl(workdir / stage / "metrics.jsonl")
            if "FD-random-conv" in line
        ]
        assert [line["images"] for line in lines] == [48, 96]
        assert all(
            line["FD-random-conv"] > 0 and 0 <= line["recall-random-conv"] <= 1 for line in lines
        )
    final = report(workdir)
    assert list(final["scores"]) == [*NAMES, *(f"{name}_real" for name in NAMES)]
    assert final["scores"]["FD-random-conv_real"] < final["scores"]["FD-random-conv"]
    assert final["reference"]["images"] == 40 and final["samples"]["images"] == 16
    assert final["training"]["relay"]["images"] == 96 and final["training"]["relay"]["loss"] > 0
    assert "| training.images | 96 | 96 |" in (workdir / "report.md").read_text().splitlines()


def test_the_report_of_training_is_what_evaluate_says_of_the_same_samples(
    config: Path, workdir: Path, tmp_path: Path
) -> None:
    run(
        config,
        "--mode=evaluate",
        f"--workdir={workdir}",
        "--seeds=0-15",
        "--reference_images=40",
        f"--out={tmp_path}",
    )
    ours, theirs = report(tmp_path), report(workdir)
    for name in NAMES:
        np.testing.assert_allclose(
            ours["scores"][name], theirs["scores"][name], rtol=2e-3
        )  # a pixel may round away
    for section in ("samples", "reference", "features", "metrics"):
        assert ours[section] == theirs[section]


def bad_folder(tmp_path: Path) -> str:
    images = write(tmp_path / "bad", shapes(4))
    Image.fromarray(shapes(1, side=8)[0]).save(images / "002.png")
    return str(images)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images={t}/nowhere"], "no such folder or npz"),
        (["--images={t}/empty"], "no images found"),
        (["--images={bad}"], "images of different sizes"),
        (["--images={few}"], "3 images as samples: 3 neighbours need at least 4"),
        (["--images={good}", "--reference={few}"], "3 images as reference"),
        (["--images={good}", "--features=clever"], "no features 'clever'"),
        (["--images={good}", "--features=inception"], "download"),
        (
            ["--images={good}", "--inception={t}/x.pth"],
            "weights of the Inception network are given",
        ),
        (["--images={good}", "--reference={t}/x.npz"], "wanted arr_0 (images) or mu and sigma"),
        (["--images={good}", "--reference={t}/other.npz"], "images of 8 px, the samples have 16"),
        (["--images={good}", "--reference=gs://bucket/x"], "--reference=gs://bucket/x"),
        (["--images={good}", "--reference_images=-1"], "--reference_images"),
        (
            ["--images={good}", "--features=tests.evaluation.test_evaluate:nothing"],
            "features that are not finite",
        ),
        (["--images={good}", "--out="], "--out=DIR"),
        ([], "--images=DIR, or the run with --workdir"),
        (["--workdir={t}/empty"], "no run in"),
    ],
)
def test_bad_input_is_one_line(
    capsys: pytest.CaptureFixture[str],
    config: Path,
    tmp_path: Path,
    arguments: list[str],
    says: str,
) -> None:
    (tmp_path / "empty").mkdir()
    np.savez(tmp_path / "x.npz", images=np.zeros(3))
    np.savez(tmp_path / "other.npz", arr_0=shapes(5, side=8))
    places = {
        "t": tmp_path,
        "bad": bad_folder(tmp_path),
        "good": write(tmp_path / "good", shapes(5)),
        "few": write(tmp_path / "few", shapes(3)),
    }
    told = [argument.format(**places) for argument in arguments]
    assert says in refused(capsys, config, f"--out={tmp_path / 'out'}", *told)
    assert not (tmp_path / "out" / "report.json").exists()


def nothing(images: np.ndarray) -> np.ndarray:
    """Features of a broken extractor."""
    return np.full((len(images), 3), np.nan)


def test_the_report_of_another_evaluation_is_not_overwritten(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    write(tmp_path / "a", shapes(5))
    write(tmp_path / "b", shapes(6))
    run(config, "--mode=evaluate", f"--images={tmp_path / 'a'}", f"--out={tmp_path / 'out'}")
    before = (tmp_path / "out" / "report.json").read_bytes()
    line = refused(capsys, config, f"--images={tmp_path / 'b'}", f"--out={tmp_path / 'out'}")
    assert "a report of other settings" in line and "another --out" in line
    assert (tmp_path / "out" / "report.json").read_bytes() == before


def test_unknown_features_are_refused_before_training(
    capsys: pytest.CaptureFixture[str], config: Path, tmp_path: Path
) -> None:
    with pytest.raises(SystemExit):
        run(config, f"--workdir={tmp_path / 'run'}", "--config.evaluate.features=clever")
    assert "no features 'clever'" in capsys.readouterr().err
    assert not list(tmp_path.rglob("checkpoints"))

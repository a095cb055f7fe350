"""One evaluation: of folders, files, samples of a run, a finished training and a stage in it."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from relay_jax.config import Settings, settings_of
from relay_jax.data.source import open_source
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import UserError
from relay_jax.evaluation import evaluate as module
from relay_jax.evaluation.evaluate import (
    Comparison,
    Generated,
    StageEvaluation,
    evaluate_run,
    generate_first,
    summarize,
)
from relay_jax.evaluation.features import make_extractor
from relay_jax.evaluation.images import Shown, choice
from relay_jax.evaluation.metrics import fid, inception_score
from relay_jax.evaluation.neighbours import precision_recall
from relay_jax.evaluation.sliced_distance import mind
from relay_jax.evaluation.statistics import feature_stats
from relay_jax.runtime.checkpoint import Checkpoints
from relay_jax.runtime.files import append_jsonl
from relay_jax.runtime.sharding import make_mesh
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.generate import generate
from relay_jax.sampling.request import Request, parse_request
from tests.conftest import mesh_of, tiny_relay
from tests.evaluation import fakes

SCORES = ["MIND", "KID", "precision", "recall", "density", "coverage"]
NAMES = [f"{name}-random-conv" for name in ("FD", *SCORES)]
RATIOS = ["FD-random-conv_ratio", "MIND-random-conv_ratio"]


def shapes(count: int, side: int = 16, start: int = 0) -> np.ndarray:
    source = SyntheticShapes(side, start + count, 0)
    return np.stack([source[i][0] for i in range(start, start + count)])


def write(folder: Path, images: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def settings() -> Settings:
    config = tiny_relay()
    config.evaluate.update(samples=16, every_samples=8, reference_images=40, class_check=False)
    return settings_of(config)


@pytest.fixture(scope="module")
def workdir(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a training leaves of its stages, with weights of no training; do not write into it."""
    folder = tmp_path_factory.mktemp("run")
    for stage in settings.stages:
        # The last layers begin with zeros, so that all fresh networks would give the same images.
        params = jax.tree.map(lambda leaf: leaf + 0.02, stage.init(jax.random.key(stage.index)))
        with Checkpoints(folder / stage.name / "checkpoints") as checkpoints:
            checkpoints.save(6, params, {"step": np.ones(1)}, {"images": 96, "seconds": 2.0})
        line = {"images": 96, "loss": 0.25, "images_per_second": 48.0, "steps_skipped": 0}
        append_jsonl(folder / stage.name / "metrics.jsonl", line)
    return folder


@pytest.fixture(scope="module")
def weights(settings: Settings, workdir: Path) -> dict[str, Path]:
    return {stage.name: workdir / stage.name for stage in settings.stages}


@pytest.fixture(scope="module")
def chain(settings: Settings, weights: dict[str, Path]) -> Chain:
    return Chain.load(settings.stages, weights, make_mesh(), settings.sample.batch)


def compared(cache: Path, **changes: Any) -> Comparison:
    keys: dict[str, Any] = {"reference": "dataset", "features": "random-conv", "weights": None}
    return Comparison(**keys | {"reference_images": 40, "cache": cache} | changes)


def report_in(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "report.json").read_text())


def requested(settings: Settings, seeds: str, stage: str = "", **more: Any) -> Request:
    only = next((s for s in settings.stages if s.name == stage), None)
    return parse_request(settings, only, seeds=seeds, **more)


def test_a_folder_against_a_folder_gives_the_scores_of_its_features(
    settings: Settings, tmp_path: Path
) -> None:
    real, samples = shapes(30), shapes(9, start=41)
    reference = write(tmp_path / "real", real)
    comparison = compared(tmp_path, reference=str(reference), reference_images=0)
    out = tmp_path / "out"
    evaluate_run(settings, write(tmp_path / "samples", samples), {}, comparison, out)
    extract = make_extractor("random-conv", weights=None, mesh=mesh_of(1))
    a, b = extract(real)["pool"], extract(samples)["pool"]
    scores = report_in(out)["scores"]
    assert list(scores) == NAMES
    np.testing.assert_allclose(scores["FD-random-conv"], fid(a, b), rtol=1e-4)
    assert [scores[name] for name in NAMES[3:5]] == list(precision_recall(a, b))
    assert "| FD-random-conv |" in (out / "report.md").read_text()
    # Of a part of the folder as the reference, others stand in the place of the samples.
    comparison = compared(tmp_path, reference=str(reference), reference_images=21)
    report = evaluate_run(settings, tmp_path / "samples", {}, comparison, tmp_path / "part")
    scores, rest = report["scores"], np.setdiff1d(np.arange(30), choice(30, 21))
    a, c = extract(real[choice(30, 21)])["pool"], extract(real[rest])["pool"]
    np.testing.assert_allclose(scores["FD-random-conv_real"], fid(a, c), rtol=1e-4)
    np.testing.assert_allclose(scores["MIND-random-conv_ratio"], mind(a, b) / mind(a, c), rtol=1e-4)
    line = next(x for x in (tmp_path / "part/report.md").read_text().splitlines() if "| FD" in x)
    assert line.split(" | ")[1:] == [
        f"{scores[f'FD-random-conv{end}']:.5g}{bar}"
        for end, bar in (("", ""), ("_real", ""), ("_ratio", " |"))
    ]


def test_adms_files_give_the_scores_of_the_papers(
    settings: Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, samples = shapes(9), shapes(12, start=20)
    pool, spatial = (feature_stats(fakes.known(real)[name]) for name in ("pool", "spatial"))
    statistics = dict(zip(("mu", "sigma", "mu_s", "sigma_s"), (*pool, *spatial), strict=True))
    np.savez(tmp_path / "VIRTUAL.npz", arr_0=real, **statistics)
    np.savez(tmp_path / "samples.npz", samples)
    monkeypatch.setattr(module, "make_extractor", lambda name, **_: fakes.extractor(name))
    report = evaluate_run(
        settings,
        tmp_path / "samples.npz",
        {},
        compared(tmp_path, reference=str(tmp_path / "VIRTUAL.npz"), features="inception"),
        tmp_path / "out",
    )
    known = [fakes.known(images) for images in (real, samples)]
    names = ["FID", "sFID", "IS", "precision", "recall"]
    assert set(report["scores"]) == {*names, *SCORES}
    expected = [
        *(fid(*(features[name] for features in known)) for name in ("pool", "spatial")),
        inception_score(known[1]["probabilities"]),
        *precision_recall(*(features["pool"] for features in known)),
    ]
    np.testing.assert_allclose([report["scores"][n] for n in names], expected, rtol=1e-9)
    sha256 = hashlib.sha256((tmp_path / "VIRTUAL.npz").read_bytes()).hexdigest()
    assert report["reference"]["sha256"] == sha256
    assert any("no samples.json" in note for note in report["notes"])


def test_samples_of_a_run_score_as_the_images_that_sampling_writes(
    settings: Settings, weights: dict[str, Path], tmp_path: Path
) -> None:
    settings = replace(settings, sample=replace(settings.sample, pixel_edit="imagenet"))
    request = requested(settings, "3-9", class_rule="balanced")
    comparison, out = compared(tmp_path / "cache"), tmp_path / "out"
    generate(settings, request, weights, tmp_path / "png", "png")
    report = evaluate_run(settings, request, weights, comparison, out)
    shown = Shown(4)
    images = evaluate_run(settings, tmp_path / "png", {}, comparison, tmp_path / "images", shown)
    # Some of the samples and of the reference, for the page: the first and the last among them.
    files = sorted((tmp_path / "png").rglob("*.png"))
    expected = [np.asarray(Image.open(files[n])) for n in (0, 2, 4, 6)]
    np.testing.assert_array_equal(shown.samples, expected)
    assert shown.reference is not None and shown.reference.shape == (4, 16, 16, 3)
    assert report["calls_per_image"].keys() == {"base", "relay"}
    assert images["scores"] == report["scores"]
    for part in (report, images):
        sampling = part["samples"]["sampling"]
        assert sampling["seeds"] == "3-9" and sampling["class_rule"] == "balanced"
        assert sampling["pixel_edit"] == "imagenet"
        assert sampling["stages"] == report["samples"]["sampling"]["stages"]
    checkpoint = report["samples"]["sampling"]["stages"]["relay"]["checkpoint"]
    assert checkpoint["images"] == 96 and len(checkpoint["ema_sha256"]) == 64
    assert report["samples"]["ema"]["base"]["rampup"] == 0.05
    assert report["reference"]["images"] == 40 and len(report["reference"]["sha256"]) == 64
    assert sorted(path.name for path in out.iterdir()) == ["report.json", "report.md"]
    # Once more beside itself, with features from the cache.
    again = evaluate_run(settings, request, weights, comparison, out)
    assert {**again, "time": None} == {**report, "time": None}
    next((tmp_path / "png").rglob("*.png")).unlink()
    less = evaluate_run(settings, tmp_path / "png", {}, comparison, tmp_path / "less")
    assert "samples.json speaks of 7 images, and there are 6." in less["notes"]


@pytest.mark.parametrize(("stage", "rule", "side"), [("base", "mod", 8), ("relay", "own", 16)])
def test_a_stage_alone_is_evaluated_at_its_resolution_as_while_it_is_trained(
    settings: Settings,
    weights: dict[str, Path],
    chain: Chain,
    tmp_path: Path,
    stage: str,
    rule: str,
    side: int,
) -> None:
    request = requested(settings, "0-7", stage)
    report = evaluate_run(settings, request, weights, compared(tmp_path), tmp_path / "out")
    samples, reference = report["samples"], report["reference"]
    assert samples["resolution"] == side and samples["sampling"]["class_rule"] == rule
    assert list(samples["sampling"]["stages"]) == [stage] and reference["images"] == 40
    assert f"to {side} px" in reference["preparation"] and "of 64" in reference["choice"]
    periodic = StageEvaluation(
        stage=request.stages[0],
        source=open_source(settings.dataset.keys, settings.resolutions, settings.seed),
        mesh=make_mesh(),
        extractor=make_extractor("random-conv", weights=None, mesh=make_mesh()),
        settings=settings,
        cache=tmp_path,
    )
    kept = sorted(tmp_path.glob("*.npz"))
    assert len(kept) == 2
    curve = {k: v for k, v in report["scores"].items() if not k.endswith("_real")}
    assert set(curve) == {*NAMES, *RATIOS} and periodic(chain.params[stage]) == curve
    assert sorted(tmp_path.glob("*.npz")) == kept, "the real images of both are the same"
    other = jax.tree.map(lambda leaf: 0 * leaf, chain.params[stage])
    assert periodic(other) != curve


@pytest.fixture(scope="module")
def generated(chain: Chain, settings: Settings) -> Generated:
    return generate_first(chain, settings.evaluate.samples)


def test_the_report_of_a_training_is_what_evaluate_says_of_the_same_samples(
    settings: Settings, chain: Chain, workdir: Path, generated: Generated, tmp_path: Path
) -> None:
    source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    extractor = make_extractor("random-conv", weights=None, mesh=make_mesh())
    for stage in settings.stages:
        (tmp_path / stage.name).mkdir()
        metrics = (workdir / stage.name / "metrics.jsonl").read_text()
        (tmp_path / stage.name / "metrics.jsonl").write_text(metrics)
    final = summarize(generated, chain, source, extractor, settings, tmp_path)
    assert report_in(tmp_path)["scores"] == final["scores"]
    assert list(final["scores"]) == [*NAMES, *RATIOS, *(f"{name}_real" for name in NAMES)]
    assert 0 < final["scores"]["FD-random-conv_real"] < final["scores"]["FD-random-conv"]
    assert final["reference"]["images"] == 40 and final["samples"]["images"] == 16
    assert final["training"]["relay"]["loss"] == 0.25
    assert final["time"]["images_per_second"]["relay"] == 48
    assert final["time"]["seconds"]["training base"] == 2
    assert "| training.images | 96 | 96 |" in (tmp_path / "report.md").read_text().splitlines()
    folders = {stage.name: workdir / stage.name for stage in settings.stages}
    request = requested(settings, "0-15")
    report = evaluate_run(settings, request, folders, compared(tmp_path / "cache"), tmp_path / "b")
    for name in final["scores"]:
        np.testing.assert_allclose(report["scores"][name], final["scores"][name], rtol=1e-6)
    for section in ("samples", "reference", "features", "metrics"):
        assert report[section] == final[section]


def test_a_training_set_that_is_too_small_has_a_report_without_scores(
    settings: Settings, chain: Chain, generated: Generated, tmp_path: Path
) -> None:
    extractor = make_extractor("random-conv", weights=None, mesh=make_mesh())
    final = summarize(generated, chain, SyntheticShapes(16, 3, 0), extractor, settings, tmp_path)
    assert final["scores"] == {} and "3 real images are too few" in final["notes"][0]


def nothing(images: np.ndarray) -> np.ndarray:
    """Features of a broken extractor."""
    return np.full((len(images), 3), np.nan)


@pytest.mark.parametrize(
    ("images", "changes", "says"),
    [
        ("nowhere", {}, "no such folder or npz"),
        ("few", {}, "3 images as samples: 3 neighbours need at least 4"),
        ("good", {"reference": "{t}/few"}, "3 images as reference"),
        ("good", {"reference": "{t}/other.npz"}, "images of 8 px, the samples have 16"),
        ("good", {"reference": "gs://bucket/x"}, "--reference=gs://bucket/x"),
        ("good", {"reference_images": -1}, "--reference_images"),
        ("good", {"features": "clever"}, "no features 'clever'"),
        ("good", {"features": "inception"}, "download"),
        ("good", {"weights": Path("x.pth")}, "features 'random-conv' do not read one"),
        ("good", {"features": f"{__name__}:nothing"}, "features that are not finite"),
    ],
)
def test_bad_input_is_one_line_and_leaves_no_report(
    settings: Settings, tmp_path: Path, images: str, changes: dict[str, Any], says: str
) -> None:
    np.savez(tmp_path / "other.npz", arr_0=shapes(5, side=8))
    write(tmp_path / "good", shapes(5))
    write(tmp_path / "few", shapes(3))
    if "reference" in changes:
        changes = {"reference": changes["reference"].format(t=tmp_path)}
    with pytest.raises(UserError) as caught:
        comparison = compared(tmp_path / "cache", **changes)
        evaluate_run(settings, tmp_path / images, {}, comparison, tmp_path / "out")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_the_report_of_another_evaluation_is_not_overwritten(
    settings: Settings, tmp_path: Path
) -> None:
    comparison, out = compared(tmp_path / "cache"), tmp_path / "out"
    evaluate_run(settings, write(tmp_path / "a", shapes(5)), {}, comparison, out)
    before = (out / "report.json").read_bytes()
    with pytest.raises(UserError, match=r"a report of other settings .*another --out"):
        evaluate_run(settings, write(tmp_path / "b", shapes(6)), {}, comparison, out)
    assert (out / "report.json").read_bytes() == before

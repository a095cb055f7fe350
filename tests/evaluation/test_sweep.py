"""A sweep end to end, and its errors and distances against what is known of them."""

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from relay_jax.config import Settings, settings_of
from relay_jax.errors import UserError
from relay_jax.evaluation.jackknife import jackknife, standard_error
from relay_jax.evaluation.statistics import FeatureSet
from relay_jax.evaluation.sweep_images import Contender, KeptImages
from relay_jax.evaluation.sweep_report import as_markdown
from relay_jax.presets import settings_for
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.request import parse_request
from tests.conftest import command_line, content, mesh_of, run_main, tiny_relay

QUICK = "multistep:base.num_steps=3:relay.num_steps=4:relay.exact_first_blur=True"
NOISY = "heun:base.num_steps=3:relay.num_steps=8"
COST = {"calls": 1, "evaluations": 1, "flops": 1}


@pytest.fixture(scope="module")
def settings() -> Settings:
    return settings_of(tiny_relay())


def contender(settings: Settings, text: str, seeds: str = "0-23") -> Contender:
    sampled = settings_for(settings, text)
    return Contender(name=text, request=parse_request(sampled, None, seeds=seeds), cost=COST)


def sweep_of(run: Path, out: Path, *more: str) -> dict:
    samplers = f"--sweep={QUICK},{NOISY},{QUICK}:relay.handoff=noise"
    arguments = [f"--workdir={run}", f"--out={out}", f"--cache={out}/cache", "--mode=sweep"]
    with command_line(*arguments, samplers, "--seeds=0-23", "--reference_images=32", *more):
        run_main()
    return json.loads((out / "sweep.json").read_text())


def test_a_sweep_scores_all_samplers_and_draws_none_of_them_twice(
    tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    report = sweep_of(tiny_run, tmp_path)
    quick, noisy, handed = report["rows"]
    assert [row["calls"] for row in report["rows"]][:1] == [7] and handed["calls"] == 7
    assert quick["evaluations"] == 7 and noisy["calls"] > 7
    assert quick["flops"] < noisy["flops"] and quick["seconds"] > 0
    for row in report["rows"]:
        assert row["scores"]["FD-random-conv"]["error"] > 0
        assert row["scores"]["precision-random-conv"]["value"] <= 1
    assert quick["difference"]["FD-random-conv"] == {"value": 0.0, "error": 0.0}
    # Fresh noise on the way, or another start: no distance.
    assert quick["distance"]["median"] == 0
    assert noisy["distance"] is None and handed["distance"] is None
    assert report["real"]["scores"]["FD-random-conv"]["value"] > 0
    text = (tmp_path / "sweep.md").read_text()
    assert f"| {QUICK} | 7 | 7 |" in text and "as many real images" in text
    real = report["real"]["scores"]["FD-random-conv"]
    ratio = quick["scores"]["FD-random-conv"]["value"] / real["value"]
    assert quick["ratio"]["FD-random-conv"] == ratio and f"({ratio:.3g} x)" in text
    assert set(quick["ratio"]) == {"FD-random-conv", "MIND-random-conv"} and real["error"] > 0
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    page = (tmp_path / "report.html").read_text()
    assert page.count("<img") == 4 and "as many real images" in page  # three samplers, the plot
    # One of them was lost, as if the sweep had been stopped before: the others are not run again.
    files = content(tmp_path)
    lost = KeptImages(contender(settings_of(tiny_relay()), NOISY), tmp_path)
    file = lost.folder / "000000-000023.npz"
    pixels = np.load(file)["arr_0"]
    file.unlink()
    names: list[str] = []
    block = KeptImages._generate_block
    monkeypatch.setattr(
        KeptImages,
        "_generate_block",
        lambda self, *a: (names.append(self.contender.name), block(self, *a)),
    )
    again = sweep_of(tiny_run, tmp_path)
    assert names == [NOISY]
    np.testing.assert_array_equal(np.load(file)["arr_0"], pixels)
    assert [row["scores"] for row in again["rows"]] == [row["scores"] for row in report["rows"]]
    for name in (n for n in files if n.endswith(".npz") and str(file.name) in n):
        if NOISY.split(":")[0] not in name:
            assert (tmp_path / name).read_bytes() == files[name]
    with pytest.raises(UserError, match="holds images of seeds 0-23, not of 0-24"):
        sweep_of(tiny_run, tmp_path, "--seeds=0-24")


def test_the_images_of_a_sweep_are_those_of_the_chain(settings: Settings, tmp_path: Path) -> None:
    one = contender(settings, QUICK, seeds="3-7,600")
    params = {s.name: s.init(jax.random.key(1)) for s in settings.stages}
    chain = Chain(one.request.stages, params, mesh_of(1), 8)
    kept = KeptImages(one, tmp_path)
    kept.generate(chain, None)
    images = chain.images([3, 4, 5, 6, 7, 600], np.array([3, 4, 5, 6, 7, 0]))["relay"]
    assert [file.name for file in sorted(kept.folder.glob("*.npz"))] == ["000003-000600.npz"]
    pixels, classes = kept.pixels()
    assert classes.tolist() == [3, 4, 5, 6, 7, 0]
    assert np.abs(pixels - np.clip(images * 127.5 + 128, 0, 255)).max() <= 1
    assert kept.spread() == pytest.approx(float(images.std()), rel=1e-3)
    # Another folder with images that are all farther by one hundredth.
    other = KeptImages(replace(one, name="other"), tmp_path)
    other.generate(chain, None)
    file = other.folder / "000003-000600.npz"
    arrays = dict(np.load(file))
    np.savez(file, **arrays | {"exact": arrays["exact"].astype(np.float64) + 0.01})
    np.testing.assert_allclose(kept.distances(other), np.full(6, 0.01), rtol=1e-6)


@pytest.mark.parametrize(
    ("text", "noise"),
    [("official", True), ("fast", False), ("heun:relay.fresh_noise=0", False),
     ("fast:relay.fresh_noise_rate=0.4", True), ("fast:relay.handoff=noise", False)],
)  # fmt: skip
def test_a_sampler_is_asked_whether_it_draws_noise(
    settings: Settings, text: str, noise: bool
) -> None:
    assert contender(settings, text).draws_noise == noise


def test_where_samplers_start_decides_whether_they_are_compared(settings: Settings) -> None:
    first = contender(settings, "fast").start
    assert contender(settings, "fast:num_steps=40:corrector=False").start == first
    for other in ("draft", "fast:relay.handoff=noise", "fast:base.sigma_max=70", "official"):
        assert contender(settings, other).start != first
    # Heun's grid begins at the hand-off where that is its highest level.
    text = "heun:relay.sigma_max=0.9:relay.handoff_sigma=0.90001:relay.fresh_noise=0"
    assert contender(settings, text).start != first
    assert contender(settings, text).start == contender(settings, "multistep").start


def mean_of(features: FeatureSet) -> Mapping[str, float]:
    return {"mean": float(features.statistics["pool"][0][0])}


def test_the_error_of_a_mean_is_that_of_the_textbook() -> None:
    rows = np.random.default_rng(1).normal(size=(4000, 2)).astype(np.float32)
    errors = []
    for part in np.split(rows, 20):
        whole = FeatureSet(count=200, rows=part)
        errors.append(standard_error(jackknife(whole, mean_of)["mean"]))
    # One over the root of n; ten groups alone know it to a quarter.
    assert np.sqrt(np.mean(np.square(errors))) == pytest.approx(1 / np.sqrt(200), rel=0.15)


def test_a_sweep_says_what_cannot_be(tiny_run: Path, tmp_path: Path) -> None:
    for more, message in (
        (["--sweep=fast,slow"], "sampler slow: 'slow' is neither a preset nor a sampler"),
        (["--sweep=fast,fast"], "each once"),
        (["--seeds=0-7"], "a sweep needs at least 20"),
        (["--sweep=fast:relay.churn=1"], "sampler fast:relay.churn=1"),
    ):
        with pytest.raises(UserError, match=message):
            sweep_of(tiny_run, tmp_path / "out", *more)
    assert not (tmp_path / "out").exists()


def test_a_table_without_distances_and_real_images() -> None:
    score = {"value": 0.5, "error": None}
    row = {"sampler": "a|b", **COST, "seconds": 0.25, "scores": {"FD-x": score}, "distance": None}
    rows = [row | {"sampler": "first"}, row | {"difference": {"FD-x": {"value": 1.0, "error": 2}}}]
    samples = {"baseline": "first", "images": 9, "resolution": 8, "seeds": "0-8"}
    about = {"rows": rows, "real": None, "samples": samples | {"class_rule": "mod"}, "notes": ["n"]}
    lines = as_markdown(about | {"features": {"name": "x"}}).splitlines()
    assert "| sampler | calls | evaluations | FLOP | s per image | FD-x |" in lines
    assert "| a/b | 1 | 1 | 1  | 0.25 | 0.5 |" in lines and "| a/b | +1 ± 2 |" in lines

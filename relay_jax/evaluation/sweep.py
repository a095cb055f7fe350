"""--mode=sweep: ways to sample one relay, scored on one set of seeds, with their costs.

    OUT/sweep.json, sweep.md    the table
    OUT/SAMPLER/                the images of each (sweep_images.py): a
                                finished sampler is not run again

Scores are those of --mode=evaluate, their errors those of jackknife.py.
"""

import time
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from absl import logging

from relay_jax.config import Settings
from relay_jax.data.decoding import Decoding
from relay_jax.data.images import to_float
from relay_jax.data.source import Source
from relay_jax.errors import UserError
from relay_jax.evaluation.classifier import about_classifier, class_accuracies
from relay_jax.evaluation.dataset import open_data_set
from relay_jax.evaluation.evaluate import Comparison
from relay_jax.evaluation.features import FeatureExtractor, make_extractor
from relay_jax.evaluation.images import open_images
from relay_jax.evaluation.jackknife import GROUPS, Groups, scores_without, standard_error
from relay_jax.evaluation.metrics import ratios
from relay_jax.evaluation.references import open_reference
from relay_jax.evaluation.report import make_report
from relay_jax.evaluation.scorer import Scorer, evaluate
from relay_jax.evaluation.statistics import FeatureSet
from relay_jax.evaluation.sweep_images import Contender, KeptImages
from relay_jax.evaluation.sweep_report import as_markdown
from relay_jax.runtime.distributed import agree, is_first
from relay_jax.runtime.files import write_json, write_text
from relay_jax.runtime.sharding import describe, make_mesh
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.seeds import seeds_text
from relay_jax.stage import Stage


def sweep(
    settings: Settings,
    contenders: Sequence[Contender],
    baseline: str,
    weights: Mapping[str, Path],
    comparison: Comparison,
    out: Path,
) -> dict[str, Any]:
    """Generates and scores the images of all contenders; writes and returns the report.

    baseline: the name of the contender that the others are compared
    with. weights: folders by stage name. All processes must call it.
    Raises UserError and DataError for what cannot be done, Stopped
    after SIGTERM; the same command continues.
    """
    begun, stages = time.monotonic(), contenders[0].request.stages
    kept = {c.name: KeptImages(c, out) for c in contenders}
    with agree():
        _check(contenders, kept, comparison)
        mesh = make_mesh(settings.fsdp)
        extractor = make_extractor(comparison.features, weights=comparison.weights, mesh=mesh)
        data = _DataSet(settings, weights)
        reference = open_reference(
            comparison.reference,
            stages[-1].resolution,
            data_set=data.described,
            threads=settings.dataset.threads,
            limit=comparison.reference_images,
            decoding=Decoding.from_config(settings.dataset.keys),
        )
        source = contenders[0].request.open_source(settings)
    scorer = Scorer(reference=reference, extractor=extractor, cache=comparison.cache)
    logging.info("%s; features %s", describe(mesh), extractor.name)
    first = loaded = Chain.load(stages, weights, mesh, settings.sample.batch)
    for number, contender in enumerate(contenders):
        logging.info("sampler %d of %d: %s", number + 1, len(contenders), contender.name)
        stages = contender.request.stages
        # Once for all samplers that only differ in what they do with
        # the same weights.
        if _weights_of(stages) != _weights_of(loaded.stages):
            loaded = Chain.load(stages, weights, mesh, settings.sample.batch)
        chain = Chain(stages, loaded.params, mesh, settings.sample.batch)
        # Again, with the hash of the weights: images of another
        # training must not be scored as those of this one.
        record = contender.request.record(loaded.weights)
        with agree():
            if is_first():
                kept[contender.name].claim(record, weights=True)
        kept[contender.name].generate(chain, source)
    table = _Table(settings, contenders, kept, kept[baseline])
    table.score(scorer)
    with agree():
        if settings.evaluate.class_check and stages[-1].num_classes:
            table.classify(data.source, extractor)
        about = {
            "samples": _about_samples(contenders[0], first, baseline),
            "samplers": {c.name: _samplers(c) for c in contenders},
            "reference": reference.identity,
            "features": extractor.identity,
        }
        # The scores stand in the rows; one
        # list of them would be nobody's.
        report = make_report({}, table.notes, about, {"total": time.monotonic() - begun})
        del report["scores"]
        report = {"rows": table.rows, "real": table.real, **report}
        if is_first():
            write_text(out / "sweep.md", as_markdown(report))
            write_json(out / "sweep.json", report)
    return report


class _DataSet:
    """The data set of a configuration, opened once it is needed."""

    def __init__(self, settings: Settings, weights: Mapping[str, Path]) -> None:
        self._settings, self._weights = settings, weights

    @cached_property
    def _opened(self) -> tuple[Source, dict[str, Any]]:
        return open_data_set(self._settings, self._weights)

    @property
    def source(self) -> Source:
        """Raises DataError."""
        return self._opened[0]

    def described(self) -> tuple[Source, dict[str, Any]]:
        """What open_reference asks for."""
        return self._opened


def _check(
    contenders: Sequence[Contender],
    kept: Mapping[str, KeptImages],
    comparison: Comparison,
) -> None:
    """Raises UserError for what can be refused before weights are loaded."""
    if comparison.reference_images < 0:
        raise UserError("--reference_images must not be negative")
    count = len(set(contenders[0].request.seeds))
    # Each of the groups leaves enough for the neighbours.
    if count < 2 * GROUPS:
        raise UserError(f"{count} images: a sweep needs at least {2 * GROUPS} (--seeds)")
    if len({c.folder for c in contenders}) < len(contenders):
        raise UserError("two samplers have one name as a folder; write one in another way")
    if is_first():
        for contender in contenders:
            kept[contender.name].claim(contender.request.record({}), weights=False)


def _weights_of(stages: Sequence[Stage]) -> list[Any]:
    """Which weights the stages are sampled with: averages and guides."""
    return [(s.name, s.ema, s.guide and (s.guide.weights, s.guide.ema)) for s in stages]


def _samplers(contender: Contender) -> dict[str, Any]:
    """The sampling settings of each stage, as samples.json has them."""
    stages = contender.request.record({})["stages"]
    parts = ("sampler", "guidance", "guide", "handoff", "ema")
    return {name: {k: s[k] for k in parts if k in s} for name, s in stages.items()}


def _about_samples(contender: Contender, chain: Chain, baseline: str) -> dict[str, Any]:
    record = contender.request.record(chain.weights)
    return {
        "seeds": seeds_text(contender.request.seeds),
        "images": len(set(contender.request.seeds)),
        "resolution": contender.request.stages[-1].resolution,
        "class_rule": contender.request.class_rule,
        "baseline": baseline,
        "batch": chain.batch,
        "weights": {name: stage["checkpoint"] for name, stage in record["stages"].items()},
    }


class _Table:
    """The rows of a sweep as they come. On process 0 alone with scores."""

    def __init__(
        self,
        settings: Settings,
        contenders: Sequence[Contender],
        kept: Mapping[str, KeptImages],
        baseline: KeptImages,
    ) -> None:
        self._settings, self._kept, self._baseline = settings, kept, baseline
        self.real: dict[str, Any] | None = None
        self.notes = [
            f"Errors are standard errors by a jackknife over the samples ({GROUPS} groups); "
            "of differences, pairwise on the same seeds. The reference counts as it is.",
            "Seconds per image: of full batches on this machine, without compilation.",
        ]
        self._features: dict[str, np.ndarray] = {}  # of the samples, [n, d] by sampler
        self.rows: list[dict[str, Any]] = []
        for contender in contenders:
            self.rows.append({"sampler": contender.name, **contender.cost, "scores": {}})

    def score(self, scorer: Scorer) -> None:
        """Scores, times and distances of all rows, and of real images in their place."""
        without = {}
        for row in self.rows:
            kept = self._kept[row["sampler"]]
            images = open_images(kept.folder, self._settings.dataset.threads)
            scores = evaluate(images, scorer, what=row["sampler"])
            assert scores.features is not None and scores.features.rows is not None
            self._features[row["sampler"]] = scores.features.rows
            with agree():
                groups = _without_groups(scores.features, scorer) if is_first() else {}
            without[row["sampler"]] = groups
            row["scores"] = _with_errors(scores.values, groups)
            if scores.values:
                logging.info("%s: %s", row["sampler"], scores)
            if is_first():
                row["seconds"] = kept.seconds_per_image
                row["distance"] = self._distance(kept)
        groups = without[self._baseline.contender.name]
        values = {row["sampler"]: row["scores"] for row in self.rows}
        base = values[self._baseline.contender.name]
        for row in self.rows:
            row["difference"] = {
                name: {
                    "value": score["value"] - base[name]["value"],
                    "error": standard_error(without[row["sampler"]][name] - groups[name])
                    if name in groups
                    else None,
                }
                for name, score in row["scores"].items()
            }
        self._score_real(scorer)

    def _score_real(self, scorer: Scorer) -> None:
        """As many real images, none of them in the reference, and ratios to their distances."""
        # What a perfect sampler would get: no Frechet distance of so
        # few images is near zero.
        count = len(set(self._baseline.contender.request.seeds))
        features = scorer.real(count)
        # Other processes than the first may have no features, and know no scores.
        with agree():
            if not is_first():
                return
            if features is None:
                self.notes.append("Too few real images are left beside the reference.")
                return
            real = scorer.real_scores(count)
            self.real = {"scores": _with_errors(real, _without_groups(features, scorer))}
            for row in self.rows:
                values = {name: score["value"] for name, score in row["scores"].items()}
                row["ratio"] = ratios(values, real, scorer.extractor.name)
            self.notes.append(
                "In brackets: a distance as a multiple of that of as many real images, 1 is ideal."
            )

    def _distance(self, kept: KeptImages) -> dict[str, float] | None:
        """To the baseline's images, in units of their standard deviation; None without meaning."""
        # Two samplers that draw noise, or start elsewhere, make
        # different images of a seed, however exact both are.
        both = kept.contender, self._baseline.contender
        if any(c.draws_noise for c in both) or both[0].start != both[1].start:
            return None
        distances = kept.distances(self._baseline) / self._baseline.spread()
        quantiles = np.quantile(distances, (0.5, 0.9))
        return {"median": float(quantiles[0]), "ninth_decile": float(quantiles[1])}

    def classify(self, source: Source, extractor: FeatureExtractor) -> None:
        """Class accuracies, with binomial errors."""
        images: dict[str, np.ndarray] = {}
        for row in self.rows:
            pixels, classes = self._kept[row["sampler"]].pixels()
            images[row["sampler"]] = to_float(pixels)
        resolution = self._baseline.contender.request.stages[-1].resolution
        values = class_accuracies(source, images, classes, resolution, extractor, self._features)
        base = _share(values[self._baseline.contender.name], len(classes))
        for row in self.rows:
            share = _share(values[row["sampler"]], len(classes))
            row["scores"]["class_accuracy"] = share
            # As if the seeds were others: an
            # upper limit for common ones.
            row["difference"]["class_accuracy"] = {
                "value": share["value"] - base["value"],
                "error": float(np.hypot(share["error"], base["error"])),
            }
        if self.real is not None:
            self.real["scores"]["class_accuracy"] = _share(values["_real"], len(classes))
        self.notes.append(
            f"{about_classifier(extractor)}; its errors are binomial, and those of differences as "
            "if the seeds were not the same."
        )


def _share(value: float, count: int) -> dict[str, float]:
    return {"value": value, "error": float(np.sqrt(value * (1 - value) / count))}


def _without_groups(features: FeatureSet, scorer: Scorer) -> Groups:
    """Scores against the reference without each of the groups; none where it is not known."""
    if scorer.features is None:
        return {}
    return scores_without(scorer.features, features, scorer.extractor.name)


def _with_errors(
    values: Mapping[str, float], without: Groups
) -> dict[str, dict[str, float | None]]:
    errors = {name: standard_error(each) for name, each in without.items()}
    return {name: {"value": value, "error": errors.get(name)} for name, value in values.items()}

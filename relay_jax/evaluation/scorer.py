"""One evaluation for all who ask for it: images against a reference, with as many real images in
their place.

Scorer      what is compared with, and how; features of real images, computed once
evaluate    images -> Scores
"""

import time
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ImageSet
from relay_jax.evaluation.metrics import notes, ratios, score
from relay_jax.evaluation.references import (
    Reference,
    held_out,
    held_out_features,
    reference_features,
)
from relay_jax.evaluation.report import notes_on_shape
from relay_jax.evaluation.statistics import FeatureSet, collect
from relay_jax.runtime.distributed import agree, is_first


@dataclass(frozen=True, kw_only=True)
class Scorer:
    """What samples are compared with, and how.

    cache: folder for the features of the reference. stop: answer
    SIGTERM while evaluating.
    """

    reference: Reference
    extractor: FeatureExtractor
    cache: Path
    stop: bool = True

    @cached_property
    def features(self) -> FeatureSet | None:
        """Of the reference, kept once they are known; other processes than the first may get None.

        All processes must ask for them together.
        """
        return reference_features(self.reference, self.extractor, cache=self.cache, stop=self.stop)

    def real(self, count: int) -> FeatureSet | None:
        """Features of so many real images, none of them in the reference.

        None where there are too few, and as `features`. All processes must ask together.
        """
        if count not in self._real:
            images = held_out(self.reference, count)
            self._real[count] = None
            if images is not None:
                self._real[count] = held_out_features(
                    images, self.extractor, cache=self.cache, stop=self.stop
                )
        return self._real[count]

    def real_scores(self, count: int) -> dict[str, float]:
        """What a perfect network would get: scores of `real`, none without them.

        On process 0 alone, and after `real`.
        """
        # A Frechet distance of so few images is far from zero.
        reference, real = self.features, self._real.get(count)
        if count not in self._real_scores and reference is not None and real is not None:
            self._real_scores[count] = score(reference, real, self.extractor.name)
        return self._real_scores.get(count, {})

    @cached_property
    def _real(self) -> dict[int, FeatureSet | None]:
        return {}

    @cached_property
    def _real_scores(self) -> dict[int, dict[str, float]]:
        return {}


@dataclass(frozen=True, kw_only=True)
class Scores:
    """An evaluation: scores by name, those of as many real images (none of them in the reference)
    and ratios to them (all on process 0 alone); notes, the seconds of its parts, and the features
    of the samples."""

    values: dict[str, float]
    real: dict[str, float] = field(default_factory=dict)
    ratios: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    features: FeatureSet | None = None

    @property
    def curve(self) -> dict[str, float]:
        """Scores and ratios, which change from one moment of a training to another."""
        return self.values | {f"{name}_ratio": value for name, value in self.ratios.items()}

    @property
    def all(self) -> dict[str, float]:
        """Scores, those of real images and ratios."""
        return self.curve | {f"{name}_real": value for name, value in self.real.items()}

    def __str__(self) -> str:
        return ", ".join(f"{name} {value:.5g}" for name, value in self.values.items())


def evaluate(samples: ImageSet, scorer: Scorer, *, what: str = "samples") -> Scores:
    """Scores of images against the reference. All processes must call it.

    what: names the images in progress and errors. Raises DataError
    for images that have no scores, Stopped after SIGTERM. Source:
    docs/math.md section 9.
    """
    extractor, clock = scorer.extractor, Clock()
    reference = scorer.features
    clock.lap("reference")
    # Every sample's row is kept: precision and recall take all samples,
    # of the reference a part.
    features = collect(
        samples,
        extractor,
        what=what,
        rows=len(samples),
        probabilities=True,
        stop=scorer.stop,
    )
    clock.lap("samples")
    scorer.real(len(samples))
    clock.lap("real images")
    values, real = dict[str, float](), dict[str, float]()
    # Process 0 alone has the reference; the
    # others wait, and learn of an error.
    with agree():
        if reference is not None and is_first():
            values = score(reference, features, extractor.name)
            real = scorer.real_scores(len(samples))
    clock.lap("scores")
    lines = notes(features, extractor.name) + notes_on_shape(samples.resolution, extractor)
    if real:
        lines.append(
            "Names with _real: as many real images, none of them in the reference, in the place of "
            "the samples; with _ratio: a distance as a multiple of theirs, 1 is ideal."
        )
    return Scores(
        values=values,
        real=real,
        ratios=ratios(values, real, extractor.name),
        notes=lines,
        seconds=clock.seconds,
        features=features,
    )


class Clock:
    """Seconds of the parts of a work."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._begun = self._last = time.monotonic()

    def lap(self, name: str) -> None:
        """Ends a part."""
        now = time.monotonic()
        self.seconds[name], self._last = now - self._last, now

    @property
    def total(self) -> float:
        return time.monotonic() - self._begun

"""Small evaluations of the stage that is being trained: a curve of scores beside the curve of
the loss.

Few samples against a part of the training set: the numbers rank the moments of one training and
are no published scores.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from absl import logging
from jax.sharding import Mesh

from relay_jax.config import Stage
from relay_jax.data.source import Source
from relay_jax.evaluation.drawn import DrawnSamples
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.references import of_source, reference_features
from relay_jax.evaluation.scores import NEIGHBOURS, score
from relay_jax.evaluation.statistics import FeatureSet, collect
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import is_writer
from relay_jax.runtime.sharding import place
from relay_jax.sampling.chain import StageSampler
from relay_jax.sampling.request import of_one_stage


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """samples: images drawn; reference_images: training images compared with; batch: samples
    drawn at a time; cache: folder for the features of the reference; description: what the
    configuration says of the data set."""

    samples: int
    reference_images: int
    batch: int
    threads: int
    cache: Path
    description: dict[str, Any]


def make_evaluation(
    stage: Stage,
    source: Source,
    mesh: Mesh,
    extractor: FeatureExtractor,
    settings: EvaluationSettings,
) -> Callable[[dict], dict[str, float]]:
    """Averaged parameters of one stage -> scores, on the process that writes. Seeds 0, 1, ...

    A relay starts from down-sampled real images. The features of the reference are computed
    when they are first needed,
    and kept.
    """
    sampler, known = StageSampler(stage, mesh, settings.batch), list[FeatureSet | None]()
    request = of_one_stage(stage, settings.samples)

    def evaluation(params: dict) -> dict[str, float]:
        start = time.monotonic()
        if len(source) <= NEIGHBOURS:
            return {}
        if not known:
            reference = of_source(
                source,
                settings.description,
                stage.resolution,
                threads=settings.threads,
                limit=settings.reference_images,
            )
            known.append(reference_features(reference, extractor, cache=settings.cache, stop=False))
        samples = DrawnSamples(
            request, [(sampler, place(params, mesh))], source if request.from_real_images else None
        )
        found = collect(
            samples,
            extractor,
            what=f"samples of stage {stage.name}",
            rows=len(samples),
            probabilities=True,
            stop=False,
        )  # SIGTERM is answered by the training, which saves
        real = known[0]
        scores = distributed.everywhere(
            lambda: score(real, found, extractor.name) if is_writer() and real is not None else {}
        )
        if is_writer():
            logging.info(
                "stage %s: %s (%d samples, %.1f s)",
                stage.name,
                ", ".join(f"{name} {value:.4g}" for name, value in scores.items()),
                len(samples),
                time.monotonic() - start,
            )
        return scores

    return evaluation

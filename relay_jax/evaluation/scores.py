"""The scores of a report from the features of two sets, under names that say what they are.

Inception features give FID, sFID, IS, precision and recall; those of any other extractor NAME
give FD-NAME, sFD-NAME, IS-NAME, precision-NAME and recall-NAME.
"""

import time

from absl import logging

from relay_jax.data.images import DataError
from relay_jax.evaluation.metrics import frechet_distance, inception_score, precision_recall
from relay_jax.evaluation.statistics import EVERY_SECONDS, FeatureSet
from relay_jax.runtime.logs import duration

NEIGHBOURS, SPLIT = 3, 5000
SETTINGS = {
    "neighbours": NEIGHBOURS,
    "inception_score_split": SPLIT,
    "covariance": "divided by n - 1, float64",
}


def score_names(features: str) -> dict[str, str]:
    """Names of the scores by what they are computed from."""
    if features == "inception":
        return {
            "pool": "FID",
            "spatial": "sFID",
            "probabilities": "IS",
            "precision": "precision",
            "recall": "recall",
        }
    return {
        "pool": f"FD-{features}",
        "spatial": f"sFD-{features}",
        "probabilities": f"IS-{features}",
        "precision": f"precision-{features}",
        "recall": f"recall-{features}",
    }


def score(reference: FeatureSet, samples: FeatureSet, features: str) -> dict[str, float]:
    """Every score that both sets have what it takes for. Raises DataError, for instance for too
    few images."""
    names, found = score_names(features), {}
    try:
        for output in ("pool", "spatial"):
            if output in reference.statistics and output in samples.statistics:
                dims = len(samples.statistics[output][0])
                if dims > 1000:  # half a minute
                    logging.info("%s: matrix roots of %d features", names[output], dims)
                found[names[output]] = frechet_distance(
                    *reference.statistics[output], *samples.statistics[output]
                )
        if samples.probabilities is not None:
            found[names["probabilities"]] = inception_score(samples.probabilities, SPLIT)
        if reference.rows is not None and samples.rows is not None:
            precision, recall = precision_recall(
                reference.rows, samples.rows, NEIGHBOURS, progress=_Lines()
            )
            found |= {names["precision"]: precision, names["recall"]: recall}
    except ValueError as error:
        raise DataError(f"{features} features of {samples.count} samples: {error}") from error
    return found


class _Lines:
    """A console line now and then, with the time left."""

    def __init__(self) -> None:
        self._begun = self._last = time.monotonic()

    def __call__(self, share: float) -> None:
        now = time.monotonic()
        if now - self._last > EVERY_SECONDS:
            self._last = now
            left = (now - self._begun) * (1 - share) / share
            logging.info("precision and recall: %.0f%%, %s left", 100 * share, duration(left))


def notes(reference: FeatureSet, samples: FeatureSet, features: str) -> list[str]:
    """What a reader of the scores has to know."""
    dims = len(samples.statistics["pool"][0])
    told = []
    if features != "inception":
        told.append(
            f"FD-{features} is not FID, and its precision and recall are not the published "
            "ones: compare them only "
            f"with those of {features} features of as many images of the same size."
        )
    if samples.count < 50_000:
        told.append(
            f"{samples.count:,} samples: a Frechet distance falls as the number of images "
            "grows; published ones are "
            "of 50,000 (ImageNet) or 30,000 (CelebA-HQ)."
        )
    if samples.count <= dims:
        told.append(
            f"Fewer samples than features ({samples.count} and {dims}): their covariance is "
            "singular."
        )
    return told

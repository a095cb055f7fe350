"""Scores in words: what each is, and what it says beside that of as many real images.

A score is named `NAME` or `NAME-FEATURES`; `NAME_real` is the same of
real images in the place of the samples, `NAME_upsampled` that of the
first stage's images, merely enlarged; `NAME_ratio` the score as a multiple of `NAME_real`.
"""

from collections.abc import Iterable, Mapping
from typing import NamedTuple

REAL, UPSAMPLED, RATIO = "_real", "_upsampled", "_ratio"

# By the name before the features: which way is better, and what is measured.
MEANINGS = {
    "FID": ("lower", "Frechet distance of Inception features from the reference"),
    "sFID": ("lower", "Frechet distance of spatial Inception features from the reference"),
    "FD": ("lower", "Frechet distance of {features} features from the reference; not FID"),
    "MIND": ("lower", "sliced Wasserstein distance from the reference"),
    "KID": ("lower", "kernel distance from the reference (0 for real images but for chance)"),
    "IS": ("higher", "inception score: objects are clear and of many kinds"),
    "precision": ("higher", "share of the samples that lie among real images (fidelity)"),
    "recall": ("higher", "share of the real images that lie among samples (diversity)"),
    "density": ("higher", "how densely real images lie around the samples, 1 for real ones "
                "(fidelity)"),
    "coverage": ("higher", "share of the real images with a sample nearby (diversity)"),
    "class_accuracy": ("higher", "share of the samples of which a classifier, trained on "
                       "real images, says the class that was asked for"),
}  # fmt: skip


class Score(NamedTuple):
    """One row for people; real and upsampled are '' where they were not measured."""

    name: str
    value: str
    real: str
    upsampled: str
    meaning: str


def rows(scores: Mapping[str, float]) -> list[Score]:
    """Every score once, with its counterparts beside it."""
    return [
        Score(
            name,
            number(name, value),
            _counterpart(scores, name, REAL),
            _counterpart(scores, name, UPSAMPLED),
            meaning(name),
        )
        for name, value in scores.items()
        if not name.endswith((REAL, UPSAMPLED))
    ]


def meaning(name: str) -> str:
    """What a score is, '' for one that this module does not know."""
    base, _, features = name.partition("-")
    if base not in MEANINGS:
        return ""
    if name.endswith(RATIO):
        return "as a multiple of that of as many real images; 1 is ideal"
    better, text = MEANINGS[base]
    of_features = f" in {features} features" if features and base != "FD" else ""
    return f"{text.format(features=features)}{of_features}; {better} is better"


def meanings(names: Iterable[str]) -> list[str]:
    """A line for each score that this module knows."""
    return [f"{name}: {text}." for name in names if (text := meaning(name))]


def sentences(scores: Mapping[str, float]) -> list[str]:
    """The three scores that matter, at most, each in a sentence with its real counterpart."""
    lines = []
    if "class_accuracy" in scores:
        line = (
            f"{_of(scores, 'class_accuracy')} of the samples show the class that was asked for, "
            "says a classifier"
        )
        others = []
        if f"class_accuracy{REAL}" in scores:
            others.append(f"{_counterpart(scores, 'class_accuracy', REAL)} of real images")
        if f"class_accuracy{UPSAMPLED}" in scores:
            value = _counterpart(scores, "class_accuracy", UPSAMPLED)
            others.append(f"{value} of the first stage's images, enlarged")
        lines.append(line + (f" ({', '.join(others)})." if others else "."))
    names = [name for name in scores if not name.endswith((REAL, UPSAMPLED))]
    distance = next((n for n in names if n.partition("-")[0] in ("FID", "FD")), None)
    if distance:
        line = f"{distance} is {_of(scores, distance)}"
        if distance + REAL in scores:
            line += f", and {_counterpart(scores, distance, REAL)} for as many real images"
        not_fid = "" if distance == "FID" else "; it is not FID"
        lines.append(f"{line}: lower is better{not_fid}.")
    pair = [next((n for n in names if n.partition("-")[0] == k), "") for k in
            ("precision", "recall")]  # fmt: skip
    if all(pair):
        line = (
            f"{_of(scores, pair[0])} of the samples lie among real images (precision), "
            f"{_of(scores, pair[1])} of the real images among samples (recall)"
        )
        if all(name + REAL in scores for name in pair):
            values = " and ".join(_counterpart(scores, name, REAL) for name in pair)
            line += f"; of as many real images {values}"
        lines.append(line + ".")
    return lines[:3]


def number(name: str, value: float) -> str:
    """Shares in per cent, others in three digits."""
    if name.startswith(("class_accuracy", "precision", "recall", "coverage")):
        # 99.9% is another message than 100%.
        return f"{100 * value:.1f}%" if value > 0.99 else f"{100 * value:.0f}%"
    return f"{value:.3g}"


def _of(scores: Mapping[str, float], name: str) -> str:
    return number(name, scores[name])


def _counterpart(scores: Mapping[str, float], name: str, suffix: str) -> str:
    return number(name, scores[name + suffix]) if name + suffix in scores else ""

"""sweep.md: the table of a sweep for people."""

from collections.abc import Mapping
from typing import Any

from relay_jax.resolution import size_text
from relay_jax.runtime.flops import si


def as_markdown(report: Mapping[str, Any]) -> str:
    """A line for each sampler: cost and scores; then the differences.

    report: sweep.json.
    """
    # Columns of the scores in the order of the first sampler that
    # has them; distances only where any sampler can have one.
    rows, samples = report["rows"], report["samples"]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    far = any(row.get("distance") for row in rows)
    head = ["sampler", "calls", "evaluations", "FLOP", "s per image", *names]
    lines = [_line([*head, "RMS distance"] if far else head)]
    lines.append(_line(["---"] * (len(head) + far)))
    for row in rows:
        cells = [row["sampler"], row["calls"], row["evaluations"], si(row["flops"])]
        cells += [
            f"{row['seconds']:.3g}",
            *(_score(row["scores"].get(name), row.get("ratio", {}).get(name)) for name in names),
        ]
        lines.append(_line([*cells, _distance(row["distance"])] if far else cells))
    if report["real"]:
        cells = ["as many real images", "", "", "", ""]
        cells += [_score(report["real"]["scores"].get(name)) for name in names]
        lines.append(_line([*cells, ""] if far else cells))
    # With the same seeds a difference
    # is more certain than either score.
    baseline = samples["baseline"]
    differences = [_line(["sampler", *names]), _line(["---"] * (len(names) + 1))]
    for row in rows:
        if row["sampler"] != baseline:
            cells = [_score(row["difference"].get(name), sign="+") for name in names]
            differences.append(_line([row["sampler"], *cells]))
    notes = list(report["notes"])
    if far:
        notes.append(
            f"RMS distance: of each image to that of {baseline} with the same seed, median over "
            "the images, in units of the standard deviation of those images. Empty where a "
            "sampler draws noise on its way or starts elsewhere."
        )
    return "\n".join(
        [
            "# Sweep of samplers",
            "",
            f"{samples['images']:,} images of {size_text(samples['resolution'])} px, seeds "
            f"{samples['seeds']}, class rule {samples['class_rule']}; features "
            f"{report['features']['name']}.",
            "",
            *lines,
            "",
            f"## Difference from {baseline}",
            "",
            *differences,
            "",
            *(f"- {note}" for note in notes),
            "",
        ]
    )


def _line(cells: list[Any]) -> str:
    # A bar would end a cell.
    return f"| {' | '.join(str(cell).replace('|', '/') for cell in cells)} |"


def _score(score: Mapping[str, Any] | None, ratio: float | None = None, sign: str = "") -> str:
    if score is None:
        return ""
    error = "" if score["error"] is None else f" ± {score['error']:.2g}"
    multiple = "" if ratio is None else f" ({ratio:.3g} x)"
    return f"{score['value']:{sign}.4g}{error}{multiple}"


def _distance(distance: Mapping[str, float] | None) -> str:
    return "" if distance is None else f"{distance['median']:.3g}"

"""What the rows of an experiment come to: means and their errors, a table, a figure.

A row is one arm, one training seed, one budget and one sampler (Trial.rows in experiment.py).
"""

from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.ticker import EngFormatter, LogLocator, NullLocator

from relay_jax.plots import style
from relay_jax.runtime.flops import si


def summary(rows: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each arm, budget and sampler: means over the training seeds, and their spread.

    error: the larger one of the standard deviation over seeds and the mean sampling error.
    """
    means = []
    for group in _over_seeds(rows).values():
        scores = {}
        for name in group[0]["scores"]:
            values = [row["scores"][name]["value"] for row in group if name in row["scores"]]
            errors = [row["scores"][name]["error"] or 0.0 for row in group if name in row["scores"]]
            spread = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
            error = max(spread, float(np.mean(errors)))
            scores[name] = {"value": float(np.mean(values)), "error": error}
        means.append({**group[0], "scores": scores, "seeds": len(group)})
    return means


def _over_seeds(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, float, str], list[Mapping[str, Any]]]:
    """Rows that differ in the training seed alone, by arm, budget and sampler."""
    groups: dict[tuple[str, float, str], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["budget"], row["sampler"]), []).append(row)
    return groups


def as_markdown(name: str, rows: Sequence[Mapping[str, Any]], features: str) -> str:
    """The tables after the experiment's description, with the features of the scores.

    rows: of single trainings.
    """
    lines = [about(name), "", f"Scores with features {features}.", ""]
    for text, cells in (
        ("", table(summary(rows))),
        (
            "Differences from the first arm with the same seed (each seed in brackets), where "
            "a sampler is compared with what stands before its first colon:",
            differences(rows),
        ),
    ):
        if not cells:
            continue
        head = [column.removesuffix(f"-{features}") for column in cells[0]]
        lines += [text, ""] if text else []
        lines += ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
        lines += ["| " + " | ".join(row) + " |" for row in cells[1:]] + [""]
    return "\n".join(lines)


def about(name: str) -> str:
    """What an experiment asks: the text of its module."""
    return (import_module(f"benchmarks.experiments.{name}").__doc__ or "").strip()


def table(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """Names of columns, then a line for each row of the summary, real images last."""
    names = score_names(rows)
    lines = [["arm", "seeds", "training FLOP", "sampler", "calls", "FLOP per image", *names]]
    for row in rows:
        cells = [row["arm"], row["seeds"], si(row["training_flops"]), row["sampler"], row["calls"]]
        cells += [si(row["flops"]), *(score(row["scores"].get(name)) for name in names)]
        lines.append(list(map(str, cells)))
    real = real_scores(rows)
    if real:
        cells = ["as many real images", *[""] * 5, *(score(real.get(name)) for name in names)]
        lines.append(cells)
    return lines


def differences(rows: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    """From the first arm, of the same training seed and budget and the plain way to sample (what
    stands before the first colon): names of columns, then means over the seeds, with each of them
    in brackets. rows: of single trainings. Empty where there is nothing to compare."""
    names = score_names(rows)
    groups, lines = _over_seeds(rows), []
    for (arm, budget, sampler), group in groups.items():
        plain = groups.get((rows[0]["arm"], budget, sampler.split(":")[0]), [])
        bases = {row["seed"]: row["scores"] for row in plain if plain is not group}
        pairs = [(row["scores"], bases[row["seed"]]) for row in group if row["seed"] in bases]
        cells = []
        for name in names:
            both = [(own[name], base[name]) for own, base in pairs if name in own and name in base]
            each = [own["value"] - base["value"] for own, base in both]
            listed = f" ({', '.join(f'{x:+.2g}' for x in each)})" if len(each) > 1 else ""
            cells.append(f"{np.mean(each):+.2g}{listed}" if each else "")
        if pairs:
            lines.append([arm, f"{budget:g}", sampler, *cells])
    return [["arm", "budget", "sampler", *names], *lines] if lines else []


def score_names(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for row in rows for name in row["scores"]))


def real_scores(rows: Sequence[Mapping[str, Any]]) -> Mapping[str, Any]:
    """Of as many real images in the place of the samples, {} where that was not scored."""
    return next((row["real"] for row in rows if row["real"]), {})


def findings(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """The first score of every arm, with the most compute and the first way to sample."""
    name = score_names(rows)[0]
    values: dict[str, str] = {}
    for row in rows:
        most = max(r["training_flops"] for r in rows if r["arm"] == row["arm"])
        if row["training_flops"] > 0.9 * most:
            values.setdefault(row["arm"], score(row["scores"].get(name)))
    real = score(real_scores(rows).get(name))
    listed = ", ".join(f"{arm} {value}" for arm, value in values.items())
    return [
        f"{name} with the most training: {listed}" + (f"; real images {real}." if real else ".")
    ]


def score(value: Mapping[str, Any] | None) -> str:
    if value is None:
        return ""
    error = f" ± {value['error']:.2g}" if value["error"] else ""
    return f"{value['value']:.4g}{error}"


def figure(rows: Sequence[Mapping[str, Any]], out: Path) -> None:
    """Every score against training FLOPs (first sampler), calls and FLOPs (last budget)."""
    names = score_names(rows)
    arms = list(dict.fromkeys(row["arm"] for row in rows))
    picture = style.make_figure(12, 3 * len(names))
    for number, name in enumerate(names):
        grid = [picture.add_subplot(len(names), 3, 3 * number + i) for i in (1, 2, 3)]
        for index, arm in enumerate(arms):
            own = [row for row in rows if row["arm"] == arm and name in row["scores"]]
            if not own:
                continue
            most = max(row["training_flops"] for row in own)
            first = [row for row in own if row["sampler"] == own[0]["sampler"]]
            last = [row for row in own if row["training_flops"] > 0.9 * most]
            columns = ("training_flops", first), ("calls", last), ("flops", last)
            for axes, (key, chosen) in zip(grid, columns, strict=True):
                ordered = sorted(chosen, key=lambda row: row[key])
                values = [row["scores"][name] for row in ordered]
                axes.errorbar(
                    [row[key] for row in ordered],
                    [value["value"] for value in values],
                    yerr=[value["error"] for value in values],
                    color=f"C{index}",
                    marker="o",
                    capsize=3,
                    label=arm,
                )
        labels = "training FLOP", "calls per image", "FLOP per image"
        for axes, label in zip(grid, labels, strict=True):
            axes.set(xscale="log", xlabel=label, title=name)
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
            axes.xaxis.set_major_formatter(EngFormatter(sep=" "))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.tick_params(axis="x", labelsize="x-small")
            axes.grid(alpha=0.3)
            real = real_scores(rows).get(name)
            if real:
                axes.axhline(real["value"], color="grey", ls=":", label="real images")
    picture.axes[0].legend(fontsize="small")
    style.save(picture, out)

"""The picture of a sweep: scores and distances against calls."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from relay_jax.plots import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH, HEIGHT = 5.5, 4.5  # of a panel, inches


def _kind(sampler: str) -> str:
    return sampler.partition(":")[0]


def _points(
    axes: "Axes",
    rows: Sequence[Mapping[str, Any]],
    values: Sequence[Any],
    colors: Mapping[str, str],
) -> None:
    """One point with its error for each sampler."""
    # One colour for what begins with the same word: fast and
    # variants of fast are to be seen as one group.
    for row, (value, error) in zip(rows, values, strict=True):
        color = colors[_kind(row["sampler"])]
        axes.errorbar(row["calls"], value, yerr=error, color=color, marker="o", capsize=3)
        # The number in the legend: whole names would cover the points.
        axes.annotate(
            row["number"],
            (row["calls"], value),
            (5, 4),
            textcoords="offset points",
            fontsize=9,
            color=color,
        )


def _calls_axis(axes: "Axes", rows: Sequence[Mapping[str, Any]]) -> None:
    calls = [row["calls"] for row in rows]
    low, high = min(calls) / 1.3, max(calls) * 1.3
    axes.set(xscale="log", xlabel="calls of the denoiser per image", xlim=(low, high))
    ticks = [digit * 10**power for power in range(5) for digit in (1, 2, 5)]
    style.plain_ticks(axes.xaxis, [tick for tick in ticks if low <= tick <= high])
    axes.grid(alpha=0.3)


def sweep_figure(report: Mapping[str, Any]) -> "Figure":
    """A panel for each score, and one for distances. report: sweep.json."""
    numbered = enumerate(report["rows"], start=1)
    rows = [{**row, "number": str(number)} for number, row in numbered]
    names = list(dict.fromkeys(name for row in rows for name in row["scores"]))
    kinds = dict.fromkeys(_kind(row["sampler"]) for row in rows)
    colors = {kind: f"C{number % 10}" for number, kind in enumerate(kinds)}
    # The baseline lies at distance 0,
    # which a logarithmic axis has not.
    far = [row for row in rows if row["distance"] and row["distance"]["median"] > 0]
    panels = len(names) + bool(far)
    columns = min(panels, 3)
    lines = -(-panels // columns)
    title = f"{report['samples']['images']:,} images of each sampler, the same seeds"
    figure = style.make_figure(WIDTH * columns, HEIGHT * lines, title)
    for number, name in enumerate(names):
        axes = figure.add_subplot(lines, columns, number + 1)
        scored = [row for row in rows if name in row["scores"]]
        scores = [row["scores"][name] for row in scored]
        _points(
            axes,
            scored,
            [(score["value"], score["error"]) for score in scores],
            colors,
        )
        real = ((report["real"] or {}).get("scores") or {}).get(name)
        if real:
            axes.axhline(real["value"], color="grey", lw=1, ls=":", label="real images")
            axes.legend(fontsize="small")
        axes.set(title=name, ylabel=name)
        _calls_axis(axes, rows)
    if far:
        axes = figure.add_subplot(lines, columns, panels)
        _points(axes, far, [(row["distance"]["median"], None) for row in far], colors)
        style.power_axis(axes)
        baseline = report["samples"]["baseline"]
        number = next(r["number"] for r in rows if r["sampler"] == baseline)
        axes.set(
            title=f"RMS distance from {number}",
            ylabel="over the standard deviation",
        )
        _calls_axis(axes, rows)
    _legend(figure, rows, colors)
    return figure


def _legend(figure: "Figure", rows: Sequence[Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    """The names behind the numbers, below the panels."""
    from matplotlib.lines import Line2D

    points = [
        Line2D([], [], color=colors[_kind(row["sampler"])], marker="o", ls="") for row in rows
    ]
    names = [f"{row['number']}: {row['sampler']}" for row in rows]
    figure.legend(points, names, loc="outside lower center", ncols=2, fontsize="small")


def plot_sweep(report: Mapping[str, Any], path: Path) -> None:
    """Plots a report of evaluation.sweep to a PNG. Raises StorageError."""
    style.save(sweep_figure(report), path)

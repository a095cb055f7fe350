"""The picture of a sweep: a panel for each score, and one for distances where there are any."""

from typing import Any

from relay_jax.plots.sweep import sweep_figure


def row(sampler: str, calls: int, distance: float | None, **scores: float) -> dict[str, Any]:
    far = None if distance is None else {"median": distance, "ninth_decile": 2 * distance}
    values = {name: {"value": value, "error": 0.1} for name, value in scores.items()}
    return {"sampler": sampler, "calls": calls, "scores": values, "distance": far}


def test_panels_and_points() -> None:
    rows = [row("exact", 200, 0.0, FD=1.0, recall=0.5), row("fast", 31, 0.02, FD=1.1, recall=0.4)]
    report = {"rows": rows, "real": {"scores": {"FD": {"value": 0.9, "error": None}}}}
    report |= {"samples": {"images": 64, "baseline": "exact"}}
    titles = [axes.get_title() for axes in sweep_figure(report).axes]
    assert titles == ["FD", "recall", "RMS distance from 1"]
    first, _, distances = sweep_figure(report).axes
    points = sorted(
        line.get_xydata()[0].tolist() for line in first.lines if len(line.get_xdata()) == 1
    )
    assert [31, 1.1] in points and [200, 1.0] in points
    # The baseline itself, at distance 0, has no place on a logarithmic axis.
    assert [text.get_text() for text in distances.texts] == ["2"]
    none = report | {"real": None, "rows": [row("a", 9, None, FD=1.0)]}
    assert len(sweep_figure(none).axes) == 1

"""Pages of reports that are no run's: of --mode=evaluate and --mode=sweep; and the parts that all
pages share."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from relay_jax.evaluation import report as reports
from relay_jax.evaluation import words
from relay_jax.evaluation.images import Shown
from relay_jax.evaluation.sweep_images import Contender, KeptImages, folder_name
from relay_jax.plots.finished import write_grid
from relay_jax.plots.page import Figure, Page, Section, Table, write_page
from relay_jax.runtime.files import read_json
from relay_jax.runtime.flops import si
from relay_jax.runtime.start import command_of

SAMPLES, REAL = "samples.png", "real.png"  # grids beside a report of --mode=evaluate
IMAGES = 32  # of each sampler


def score_section(report: Mapping[str, Any], title: str = "Scores") -> Section:
    """Sentences, and every score beside that of as many real images."""
    scores = report.get("scores") or {}
    rows = words.rows(scores)
    names = ["score", "samples", "as many real images", "first stage, enlarged"]
    columns = [[row[k] for row in rows] for k in range(4)]
    # Columns that no score has are left out.
    kept = [k for k in range(4) if k < 2 or any(columns[k])]
    table = Table(
        head=[*(names[k] for k in kept), "what it is"],
        rows=[[*(row[k] for k in kept), row.meaning] for row in rows],
    )
    count = report.get("samples", {}).get("images")
    resolution = report.get("samples", {}).get("resolution")
    about = [f"Of {count:,} samples of {resolution} px."] if count else []
    return Section(
        title=title, texts=about, points=words.sentences(scores), tables=[table] if rows else []
    )


def protocol(report: Mapping[str, Any]) -> Section:
    """All that the scores depend on, folded away."""
    tables = [
        Table(
            caption=section.title,
            head=section.head if any(section.head) else (),
            rows=[[reports.cell_text(cell) for cell in row] for row in section.rows],
        )
        for section in reports.protocol(report)
    ]
    return Section(
        title="The whole protocol", points=report.get("notes", []), tables=tables, folded=True
    )


def evaluation_page(folder: Path, shown: Shown) -> Path:
    """Writes FOLDER/report.html of the report of --mode=evaluate there; returns its path.

    shown: images, kept as samples.png and real.png. Raises
    StorageError.
    """
    for name, images in ((SAMPLES, shown.samples), (REAL, shown.reference)):
        if images is not None:
            write_grid(folder / name, images)
    report = read_json(folder / "report.json")
    reference = report["reference"]
    figures = [
        Figure(name="samples", picture=folder / SAMPLES, pixels=True),
        Figure(name="images of the reference", picture=folder / REAL, pixels=True),
    ]
    where = reference.get("source") or reference.get("path") or reference.get("kind")
    count = f" ({reference['images']:,} images)" if reference.get("images") else ""
    time = report["time"]
    page = Page(
        title=f"Evaluation: {folder.absolute().name}",
        subtitle=f"{report['samples']['images']:,} samples against {where}{count}, in "
        f"{report['features']['name']} features",
        facts=_costs(report),
        sections=[
            Section(figures=[f for f in figures if f.picture and f.picture.exists()], columns=2),
            score_section(report),
            _repeat(),
            protocol(report),
        ],
        footer=f"{folder.absolute()}, {time['finished']}",
    )
    return write_page(page, folder)


def _costs(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    calls = report.get("calls_per_image") or {}
    if not calls:
        return []
    text = " + ".join(str(count) for count in calls.values())
    each = report["time"]["seconds"]["samples"] / report["samples"]["images"]
    return [
        (text, "calls of the networks per image"),
        (f"{each:.2g} s", "per image, features and compilation included"),
    ]


def _repeat() -> Section:
    return Section(title="Repeat", commands=[("The command of this report:", command_of())])


def sweep_page(folder: Path, contenders: Sequence[Contender]) -> Path:
    """Writes FOLDER/report.html of the sweep there, and returns its path. Raises StorageError."""
    for contender in contenders:
        kept = KeptImages(contender, folder)
        write_grid(folder / f"{contender.folder}.png", kept.first(IMAGES))
    report = read_json(folder / "sweep.json")
    samples = report["samples"]
    figures = [
        Figure(
            name=row["sampler"],
            caption=f"{row['calls']} calls per image",
            picture=folder / f"{folder_name(row['sampler'])}.png",
            pixels=True,
        )
        for row in report["rows"]
    ]
    sections = [
        Section(
            texts=["The same seeds in each; a sampler of few calls should change them little."],
            figures=[f for f in figures if f.picture and f.picture.exists()],
            columns=2,
        ),
        Section(
            title="Scores",
            tables=[_sweep_table(report)],
            points=[*words.meanings(_score_names(report)), *report["notes"]],
        ),
        Section(
            title="Scores against calls",
            figures=[Figure(name="sweep", picture=folder / "sweep.png", width=1100)],
        ),
        _repeat(),
        protocol({k: v for k, v in report.items() if k not in ("rows", "real", "notes")}),
    ]
    page = Page(
        title=f"Sweep of samplers: {folder.absolute().name}",
        subtitle=f"{samples['images']:,} images of {samples['resolution']} px of each of "
        f"{len(report['rows'])} samplers, the same seeds ({samples['seeds']})",
        sections=sections,
        footer=f"{folder.absolute()}, {report['time']['finished']}",
    )
    return write_page(page, folder)


def _sweep_table(report: Mapping[str, Any]) -> Table:
    """A row for each sampler: costs, then scores with their errors."""
    rows, names = report["rows"], _score_names(report)
    cells: list[Sequence[str]] = [
        [
            row["sampler"],
            str(row["calls"]),
            si(row["flops"]),
            f"{row['seconds']:.3g}",
            *(_score(name, row["scores"].get(name)) for name in names),
        ]
        for row in rows
    ]
    real = (report["real"] or {}).get("scores", {})
    if real:
        scores = [_score(name, real.get(name)) for name in names]
        cells.append(["as many real images", "", "", "", *scores])
    return Table(head=["sampler", "calls", "FLOP", "s per image", *names], rows=cells)


def _score_names(report: Mapping[str, Any]) -> list[str]:
    return list(dict.fromkeys(name for row in report["rows"] for name in row["scores"]))


def _score(name: str, score: Mapping[str, Any] | None) -> str:
    if score is None:
        return ""
    error = "" if score["error"] is None else f" ± {score['error']:.2g}"
    return f"{score['value']:.4g}{error}"

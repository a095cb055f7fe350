"""The page of a run, WORKDIR/report.html, from the files that lie there: finished, or still
training.

    report.json, STAGE/metrics.jsonl, STAGE/training.json   numbers
    samples/stage-STAGE.png, samples/real.png               what was made
    STAGE/grids/                                            previews, of a run that is training
    plots/                                                  pictures of --mode=plot, with numbers

What is missing is left out, so that a page can be made at any time.
"""

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from relay_jax.plots.chart import Chart, Line
from relay_jax.plots.commands import commands
from relay_jax.plots.finished import COLUMNS, GRIDS
from relay_jax.plots.page import Figure, Page, Section, Table, write_page
from relay_jax.plots.report_page import protocol, score_section
from relay_jax.resolution import height_width, size_text
from relay_jax.runtime.files import read_json
from relay_jax.runtime.logs import duration, read_curve
from relay_jax.stage import Stage
from relay_jax.workdir import class_names

# Pictures that the page shows in full; others of --mode=plot are folded.
SHOWN = ("animation", "snr", "neighbours")
GAP_SECONDS = 600  # between lines of a curve; a longer one was a pause


def write_run_page(stages: Sequence[Stage], workdir: Path) -> Path:
    """Writes WORKDIR/report.html and returns its path. Raises StorageError."""
    return write_page(run_page(stages, workdir), workdir)


def run_page(stages: Sequence[Stage], workdir: Path) -> Page:
    """All that the files of a run say."""
    report = known(workdir / "report.json")
    names = class_names(workdir, {})
    sections = [
        _made(stages, workdir, report, names),
        *([score_section(report)] if report else []),
        _chain(stages, workdir),
        _training(stages, workdir),
        _handoff(stages, workdir),
        _neighbours(workdir),
        Section(
            title="Go on",
            texts=_not_made(stages, workdir) if report else [],
            commands=commands(workdir, names, bool(report)),
        ),
        _further(workdir),
        *([protocol(report)] if report else []),
    ]
    time = report.get("time", {}).get("finished", "") if report else ""
    return Page(
        title=f"Relay Diffusion: {workdir.absolute().name}",
        subtitle=_subtitle(stages, workdir, report),
        facts=_facts(stages, workdir, report),
        sections=[section for section in sections if _says_something(section)],
        footer=f"{workdir.absolute()}{', ' if time else ''}{time}",
    )


def known(path: Path) -> dict[str, Any]:
    """A JSON object of a file, {} where there is none that can be read."""
    try:
        value = read_json(path)
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def _says_something(section: Section) -> bool:
    figures = [f for f in section.figures if f.chart or (f.picture and f.picture.exists())]
    return bool(figures or section.tables or section.commands or section.points)


def _subtitle(stages: Sequence[Stage], workdir: Path, report: Mapping[str, Any]) -> str:
    first, *others = stages
    way = f"Stage {first.name} makes images of {size_text(first.resolution)} px from noise"
    for stage in others:
        what = "is given them, and makes images" if _is_given(stage) else "continues the diffusion"
        way += f"; stage {stage.name} {what} at {size_text(stage.resolution)} px"
    if report:
        return f"{way}. Training is finished."
    states = []
    for stage in stages:
        lines = read_curve(workdir / stage.name / "metrics.jsonl")
        images = lines[-1]["images"] if lines else 0
        total = stage.train.steps * stage.train.batch
        states.append(f"{stage.name} has seen {images:,} of {total:,} images")
    return f"{way}. Still training: {', '.join(states)}."


def _is_given(stage: Stage) -> bool:
    """Whether a stage is conditioned on the images before, and does not continue them."""
    return stage.process.has_condition


def _facts(
    stages: Sequence[Stage], workdir: Path, report: Mapping[str, Any]
) -> list[tuple[str, str]]:
    facts = [
        (" → ".join(f"{size_text(stage.resolution)}" for stage in stages) + " px", "resolutions")
    ]
    calls = report.get("calls_per_image") or {}
    if calls:
        text = " + ".join(str(count) for count in calls.values())
        facts.append((text, "calls of the networks per image"))
    rates = report.get("time", {}).get("images_per_second", {})
    if rates.get("sampling"):
        facts.append((f"{1 / rates['sampling']:.2g} s", "per image, compilation included"))
    seconds = report.get("time", {}).get("seconds", {})
    if seconds.get("total"):
        facts.append((duration(seconds["total"]), "training, sampling and scores"))
    device = report.get("device") or {}
    if device:
        facts.append((f"{device.get('devices')} x {device.get('kind')}", "devices"))
    return facts


def _made(
    stages: Sequence[Stage], workdir: Path, report: Mapping[str, Any], names: Sequence[str]
) -> Section:
    """Samples of every stage beside as many real images, or previews."""
    last = stages[-1]
    figures = []
    for stage in stages:
        grid = workdir / "samples" / f"stage-{stage.name}.png"
        if report and grid.exists():
            figures.append(
                Figure(
                    name=f"{stage.name}, {size_text(stage.resolution)} px",
                    picture=grid,
                    pixels=True,
                )
            )
            continue
        previews = sorted((workdir / stage.name / "grids").glob("*.png"))
        if previews:
            images = int(previews[-1].stem) if previews[-1].stem.isdecimal() else 0
            from_real = " from down-sampled real ones" if stage.starts_from_images else ""
            figures.append(
                Figure(
                    name=f"{stage.name}, {size_text(stage.resolution)} px",
                    caption=f"preview{from_real}, after {images:,} images",
                    picture=previews[-1],
                    pixels=True,
                )
            )
    real = workdir / "samples" / "real.png"
    figures.append(
        Figure(name=f"real images, {size_text(last.resolution)} px", picture=real, pixels=True)
    )
    return Section(
        texts=_classes(known(workdir / "samples" / GRIDS), names) if report else [],
        figures=figures,
        columns=min(len(figures), 3),
    )


def _classes(grids: Mapping[str, Any], names: Sequence[str]) -> list[str]:
    """Which classes the grids of samples and of real images show."""
    classes, real = _list(grids.get("samples")), _list(grids.get("real"))
    if not classes:
        return []
    called = [str(names[n]) if n < len(names) else str(n) for n in classes]
    what = "Classes, row by row"
    if all(classes[n] == classes[n % COLUMNS] for n in range(len(classes))):
        what, called = "A column for each class", called[:COLUMNS]
    others = "" if real == classes else " The real images are of any."
    return [f"{what}: {', '.join(called)}.{others}"]


def _chain(stages: Sequence[Stage], workdir: Path) -> Section:
    """The animation, and what it shows."""
    texts = [
        "Above, the noisy state that the sampler is at (scaled to the contrast of images); below, "
        "what the network makes of it, D(x, sigma)."
    ]
    # The film may be of another sampler than the configuration's.
    filmed = {
        part["stage"]: part["sigmas"][0]
        for part in _list(known(workdir / "plots" / "animation.json").get("stages"))
    }
    for before, stage in pairwise(stages):
        if not stage.starts_from_images:
            continue
        patch = height_width(stage.resolution)[0] // height_width(before.resolution)[0]
        sigma = filmed.get(stage.name) or float(stage.sampler.levels()[0])
        if _is_given(stage):
            texts.append(
                f"{stage.name} starts from pure noise again, sigma = {sigma:.3g}; its network is "
                f"given the {size_text(before.resolution)} px image beside the state."
            )
            continue
        handed = "image" if stage.handoff == "image" else "noisy state"
        texts.append(
            f"The hand-off: the {size_text(before.resolution)} px {handed}, every pixel repeated "
            f"{patch} x {patch}, is what the forward process of {stage.name} makes of an image of "
            f"{size_text(stage.resolution)} px when it has taken all detail out of each patch. So "
            f"{stage.name} starts there, with noise of sigma = {sigma:.3g}, and removes both "
            "together. It neither starts from pure noise nor is conditioned on the small image."
        )
    film = Figure(picture=workdir / "plots" / "animation.webp", name="", caption="")
    return Section(title="From noise to image", texts=texts, figures=[film])


def _training(stages: Sequence[Stage], workdir: Path) -> Section:
    """Losses against images and hours, and a row for each stage."""
    by_images, by_hours, rows = [], [], []
    for stage in stages:
        curve = read_curve(workdir / stage.name / "metrics.jsonl")
        lines = [line for line in curve if "loss" in line]
        losses = [line["loss"] for line in lines]
        by_images.append(Line(name=stage.name, x=[line["images"] for line in lines], y=losses))
        by_hours.append(Line(name=stage.name, x=list(_hours(lines)), y=losses))
        summary = known(workdir / stage.name / "training.json")
        if summary:
            rows.append(
                [
                    stage.name,
                    f"{summary.get('images', 0):,}",
                    duration(summary.get("seconds", 0.0)),
                    f"{summary.get('images_per_second', 0.0):.4g}",
                    f"{100 * summary.get('loader_share', 0.0):.1f}%",
                    f"{summary['loss']:.4g}" if summary.get("loss") else "not finite",
                ]
            )
    if not any(line.y for line in by_images):
        return Section()
    head = ["stage", "images", "time", "images per second", "loader's share", "loss"]
    small = max((max(line.x, default=0.0) for line in by_hours), default=0.0) < 0.5
    if small:
        by_hours = [Line(name=line.name, x=[60 * x for x in line.x], y=line.y) for line in by_hours]
    charts = [
        Chart(x_label="images seen", y_label="training loss", lines=by_images, log_y=True),
        Chart(
            x_label="minutes of training" if small else "hours of training",
            y_label="training loss",
            lines=by_hours,
            log_y=True,
        ),
    ]
    return Section(
        title="Training",
        texts=["The weighted denoising loss of each stage; those of two stages are not compared."],
        figures=[
            Figure(name="Loss", caption=f"against {c.x_label}", chart=c) for c in charts if c.svg()
        ],
        tables=[Table(head=head, rows=rows)] if rows else [],
        columns=2,
    )


def _hours(lines: Sequence[Mapping[str, Any]]) -> Iterator[float]:
    """Hours of training at each line, without the time between its starts."""
    total, before = 0.0, None
    for line in lines:
        rate = line.get("images_per_second") or 0.0
        images = line["images"] - (before["images"] if before else 0)
        by_rate = images / rate if rate else 0.0
        elapsed = line.get("time", 0.0) - before.get("time", 0.0) if before else by_rate
        # Previews and evaluations count; a pause does not.
        total += elapsed if 0 < elapsed < by_rate + GAP_SECONDS else by_rate
        before = line
        yield total / 3600


def _handoff(stages: Sequence[Stage], workdir: Path) -> Section:
    """Why there is block noise, and whether the relay starts from what it was trained on."""
    figures, texts = [], []
    for pair in _list(known(workdir / "plots" / "snr.json").get("pairs")):
        lines = [
            Line(
                name=curve["name"],
                x=curve["frequency"],
                y=curve["decibels"],
                dashed="white" in curve["name"] and number > 0,
            )
            for number, curve in enumerate(pair["curves"])
        ]
        chart = Chart(
            x_label="frequency, cycles per image width",
            y_label="signal-to-noise ratio, dB",
            lines=lines,
            log_x=True,
        )
        caption = f"in dB by frequency, where {pair['stage']} starts (sigma = {pair['sigma']:.3g})"
        figures.append(Figure(name="Signal-to-noise ratio", caption=caption, chart=chart))
        texts.append(
            "The same white noise leaves low frequencies of the larger image patch² times stronger "
            "than of the small one; block noise does not. So the relay can go on where the first "
            "stage stands."
        )
    for path in sorted((workdir / "plots").glob("handoff*.json")):
        check, text = _handoff_chart(known(path))
        if check:
            caption = "between the states that it starts from and those it was trained on, by sigma"
            figures.append(Figure(name="Hand-off check: nats", caption=caption, chart=check))
            texts.append(text)
    return Section(
        title="Why it can go on at the hand-off",
        texts=list(dict.fromkeys(texts)),
        figures=figures,
        columns=2,
    )


def _handoff_chart(numbers: Mapping[str, Any]) -> tuple[Chart | None, str]:
    kinds = numbers.get("low_resolution_images") or {}
    if not kinds:
        return None, ""
    lines = [
        Line(name=name, x=[c["sigma"] for c in rows], y=[c["nats"] for c in rows])
        for name, rows in kinds.items()
    ]
    name, rows = next(iter(kinds.items()))
    if len(kinds) > 1:
        chance = Line(
            name="two sets of real images",
            x=[c["sigma"] for c in rows],
            y=[c["floor"] for c in rows],
            dashed=True,
        )
        lines.append(chance)
    first = numbers["first_level"]
    at = min(rows, key=lambda c: abs(c["sigma"] - first))
    text = (
        f"The check: the spectra of the states that {numbers['stage']} starts from ({name}, "
        f"up-sampled, with noise) and of those that it was trained on differ by "
        f"{at['nats']:.2g} nats per image at the hand-off; two sets of real images of these sizes "
        f"differ by {at['floor']:.2g}."
    )
    chart = Chart(
        x_label="noise level sigma",
        y_label="discrepancy, nats per image",
        lines=lines,
        log_x=True,
        log_y=True,
        mark=(first, "hand-off"),
    )
    return chart, text


def _neighbours(workdir: Path) -> Section:
    numbers = known(workdir / "plots" / "neighbours.json")
    texts = [
        "Samples (left) and the nearest real images. A distance far below the one between real "
        "images would be a copy."
    ]
    for result in _list(numbers.get("distances")):
        nearest = sorted(row[0] for row in result["distances"])
        texts.append(
            f"By {result['name']}: the nearest real image is {nearest[len(nearest) // 2]:.3f} away "
            f"in the middle, {nearest[0]:.3f} at the least; a real image has its nearest other one "
            f"at {result['typical']:.3f}."
        )
    picture = Figure(name="Nearest real images", picture=workdir / "plots" / "neighbours.png",
                     width=1100)  # fmt: skip
    return Section(title="Does it copy?", texts=texts, figures=[picture])


def _list(value: object) -> list:
    return value if isinstance(value, list) else []


def _further(workdir: Path) -> Section:
    """Pictures of --mode=plot that are not shown above."""
    pictures = [
        path for path in sorted((workdir / "plots").glob("*.png"))
        if path.stem not in SHOWN
    ]  # fmt: skip
    figures = [Figure(name=path.stem, picture=path, width=1100) for path in pictures]
    return Section(title="More pictures", figures=figures, folded=True)


def _not_made(stages: Sequence[Stage], workdir: Path) -> list[str]:
    """What the page of a finished run would have, and has not."""
    names = ["animation", "neighbours"]
    # A cascade or a single stage continues nothing.
    if any(stage.process.has_handoff for stage in stages):
        names += ["snr", "handoff"]
    missing = [name for name in names if not list((workdir / "plots").glob(f"{name}*.json"))]
    if not missing:
        return []
    return [f"Pictures not made: {', '.join(missing)}; --mode=plot makes them, or says why not."]

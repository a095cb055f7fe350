"""The page of an experiment, OUT/report.html: what is compared, images, scores and curves."""

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.experiment_results import about, findings, score_names, table
from relay_jax.evaluation import words
from relay_jax.plots.page import Figure, Page, Section, Table, write_page
from relay_jax.runtime.flops import si
from relay_jax.runtime.start import command_of

if TYPE_CHECKING:
    from benchmarks.experiment import Experiment, Trial

Rows = Sequence[Mapping[str, Any]]


def write_experiment_page(
    experiment: "Experiment", trials: Sequence["Trial"], rows: Rows, out: Path
) -> Path:
    """Writes OUT/report.html and returns its path. Raises StorageError.

    rows: of the summary. The pictures lie in OUT already.
    """
    first, *others = (" ".join(part.split()) for part in about(experiment.name).split("\n\n"))
    # Of each arm the first training.
    arms = {trial.arm.name: trial for trial in reversed(trials)}
    shown = [trial for trial in trials if arms[trial.arm.name] is trial]
    sections = [
        Section(texts=others) if others else None,
        _samples(shown),
        _scores(rows, f"-{experiment.features}"),
        Section(
            title="Scores against compute",
            figures=[
                Figure(
                    name="Scores",
                    caption="Left against the FLOPs of the training, with the first way to "
                    "sample; then, with the whole training, against the calls of the networks per "
                    "image, and against their FLOPs.",
                    picture=out / f"{experiment.name}.png",
                    width=1000,
                )
            ],
        ),
        Section(title="What differs between the arms", tables=[_differences(shown)]),
        Section(title="Go on", commands=_commands()),
    ]
    page = Page(
        title=f"Experiment: {experiment.name.replace('_', ' ')}",
        subtitle=first,
        facts=[
            (f"{si(experiment.flops)}FLOP", "training of each arm"),
            (str(len(experiment.seeds)), "trainings of each arm"),
            (f"{experiment.samples:,}", "samples for each row of scores"),
            (experiment.features, "features of the scores"),
        ],
        sections=[section for section in sections if section],
        footer=str(out),
    )
    return write_page(page, out)


def _samples(trials: Sequence["Trial"]) -> Section:
    """A grid of each arm, of the same seeds."""
    figures = [
        Figure(name=trial.arm.name, caption=trial.samplers[0], picture=trial.grid, pixels=True)
        for trial in trials
        if trial.grid.exists()
    ]
    texts = ["The same seeds and classes of every arm, after its most training so far."]
    missing = [trial.arm.name for trial in trials if not trial.grid.exists()]
    if missing:
        texts.append(f"Not finished yet: {', '.join(missing)}.")
    return Section(title="Samples", texts=texts, figures=figures, columns=min(len(trials), 3))


def _scores(rows: Rows, features: str) -> Section:
    """features: the end of the names of scores, which is left out in the table."""
    head, *cells = table(rows)
    return Section(
        title="Scores",
        texts=findings(rows),
        tables=[Table(head=[name.removesuffix(features) for name in head], rows=cells)],
        points=[
            *words.meanings(score_names(rows)),
            "Errors (±): the larger one of the standard deviation over trainings and the mean "
            "sampling error.",
        ],
    )


def _differences(trials: Sequence["Trial"]) -> Table:
    rows = [
        (
            trial.arm.name,
            trial.config,
            ", ".join(f"{stage} {share:.0%}" for stage, share in trial.arm.shares.items()),
            ", ".join(f"{key}={value}" for key, value in trial.arm.overrides.items()) or "nothing",
        )
        for trial in trials
    ]
    return Table(head=["arm", "configuration", "training FLOPs", "changed in it"], rows=rows)


def _commands() -> list[tuple[str, str]]:
    """(what it does, command)."""
    whole = shlex.join(word for word in shlex.split(command_of()) if word != "--collect")
    return [
        ("Continue after any stop; what is finished is not done again:", whole),
        ("Table, curves and this page alone, of what is there:", f"{whole} --collect"),
    ]

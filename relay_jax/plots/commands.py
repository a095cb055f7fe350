"""What can be done next with a run: commands for its page, and for the end of its training."""

import shlex
from collections.abc import Sequence
from pathlib import Path

MAIN = "python -m relay_jax.main"


def next_commands(workdir: Path, names: Sequence[str]) -> list[tuple[str, str]]:
    """(what it does, command) of what people do with a finished run, the first ones first."""
    place = shlex.quote(str(workdir))
    run = f"{MAIN} --workdir={place}"
    label = f" --class={shlex.quote(str(names[0]))}" if names else ""
    return [
        (
            f"Sample one class, {names[0]}:" if names else "Sample:",
            f"{run} --mode=sample --seeds=0-63{label} --out=images",
        ),
        (
            "Train the same relay on your own images, a folder of them:",
            f"{MAIN} --config={place} --workdir=runs/mine --config.dataset.source=folder "
            "--config.dataset.path=DIR --config.dataset.num_classes=0",
        ),
        ("Add all pictures to the page:", f"{run} --mode=plot"),
        ("Score more samples:", f"{run} --mode=evaluate --seeds=0-1023 --out=reports/more"),
        ("Compare samplers:", f"{run} --mode=sweep --sweep=official,safe,fast,draft"),
        ("Repeat the run from the beginning:", f"{MAIN} --config={place} --workdir=runs/again"),
    ]


def commands(workdir: Path, names: Sequence[str], finished: bool) -> list[tuple[str, str]]:
    """(what it does, command) for the page."""
    if finished:
        return next_commands(workdir, names)
    run = f"{MAIN} --workdir={shlex.quote(str(workdir))}"
    return [
        ("Continue the training, wherever it was stopped:", run),
        ("See the pictures that the run allows so far:", f"{run} --mode=plot"),
    ]

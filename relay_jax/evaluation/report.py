"""report.json and report.md: scores beside everything that they depend on.

A report has `scores` and `notes`; its settings `samples`,
`reference`, `features` and `metrics`; and `device`, `versions` and
`time`. The same settings on the same machine give the same files but
for `time`. A folder holds the report of one set of settings: another
one is refused there before anything is computed.
"""

import hashlib
import json
import platform
import time
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

import jax

import relay_jax
from relay_jax.errors import UserError, one_line
from relay_jax.evaluation.features import FeatureExtractor
from relay_jax.evaluation.images import ImageSet
from relay_jax.evaluation.metrics import SETTINGS as METRIC_SETTINGS
from relay_jax.evaluation.references import Reference
from relay_jax.models.averages import is_width
from relay_jax.resolution import Resolution, size_text
from relay_jax.runtime.files import read_json, write_json, write_text
from relay_jax.runtime.logs import curve_summary, read_curve
from relay_jax.sampling.seeds import parse_seeds
from relay_jax.stage import Stage, joined
from relay_jax.workdir import flat

SETTINGS = ("samples", "reference", "features", "metrics")
# Not compared: the same images elsewhere are the same images.
_PLACES = ("path", "data_dir")


def evaluation_settings(
    samples: ImageSet,
    reference: Reference,
    extractor: FeatureExtractor,
    record: Mapping[str, Any] | None,
    ema: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """All that scores depend on, by the names of SETTINGS.

    record: how the samples were made, as in samples.json, None if
    that is not known. ema: how their weights were averaged
    (`averaging`), None for images of a folder.
    """
    return {
        "samples": {
            **samples.identity,
            "resolution": samples.resolution,
            "sampling": record,
            "ema": ema,
        },
        "reference": reference.identity,
        "features": extractor.identity,
        "metrics": METRIC_SETTINGS,
    }


def make_report(
    scores: Mapping[str, float],
    notes: list[str],
    settings: Mapping[str, Any],
    seconds: Mapping[str, float],
    **more: Any,
) -> dict[str, Any]:
    """The report as plain values.

    settings: by the names of SETTINGS; seconds: of the parts of the
    work; more: further sections, after the settings.
    """
    now = time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
    return {
        "scores": dict(scores),
        "notes": list(notes),
        **settings,
        **more,
        "device": {
            "kind": jax.devices()[0].device_kind,
            "devices": jax.device_count(),
            "processes": jax.process_count(),
        },
        "versions": versions(),
        "time": {
            "finished": now,
            "seconds": {name: round(value, 1) for name, value in seconds.items()},
        },
    }


def averaging(stages: Sequence[Stage]) -> dict[str, dict[str, float]]:
    """How the weights that are sampled were averaged (EMA), by stage, as the configuration says."""
    return {stage.name: _averaging(stage) for stage in stages}


def _averaging(stage: Stage) -> dict[str, float]:
    if stage.ema and is_width(float(stage.ema)):
        return {"width": float(stage.ema)}
    halflife = float(stage.ema) if stage.ema else stage.train.ema_halflife_images
    return {"halflife_images": halflife, "rampup": stage.train.ema_rampup}


def calls_per_image(stages: Sequence[Stage]) -> dict[str, int]:
    """Calls of each stage's denoiser for an image; guidance counts them twice where it acts."""
    return {stage.name: len(stage.sampler.call_sigmas()) for stage in joined(stages)}


def notes_on_record(record: Mapping[str, Any] | None, images: int) -> list[str]:
    """Notes for a reader who would trust samples.json too much."""
    if record is None:
        return ["How the samples were made is not known: there is no samples.json beside them."]
    # The record may name seeds whose images are still missing, or
    # were removed.
    seeds = len(parse_seeds(record["seeds"]))
    if seeds == images:
        return []
    return [f"samples.json speaks of {seeds:,} images, and there are {images:,}."]


def notes_on_shape(resolution: Resolution, extractor: FeatureExtractor) -> list[str]:
    """What a report says of images whose features are those of stretched ones."""
    if isinstance(resolution, int) or not extractor.side:
        return []
    return [
        f"{extractor.name} needs squares: images of {size_text(resolution)} px were stretched to "
        f"{extractor.side} x {extractor.side}, so its scores compare with others of this shape "
        "alone."
    ]


def training_summary(stage: Stage, meta: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """Length, loss and rate of a stage's training. meta: the notes of its checkpoint."""
    curve = curve_summary(read_curve(folder / "metrics.jsonl"))
    return {
        "resolution": stage.resolution,
        "images": meta["images"],
        "loss": curve["loss"],
        "steps_skipped": curve["steps_skipped"],
        "images_per_second": curve["images_per_second"],
    }


@cache
def versions() -> dict[str, str]:
    """Of Python, the libraries that compute, and this package: a hash of its source files."""
    # Not the package's version number: between two releases the
    # numbers may change.
    folder, sha = Path(relay_jax.__file__).parent, hashlib.sha256()
    for file in sorted(folder.rglob("*.py")):
        sha.update(str(file.relative_to(folder)).encode() + b"\n" + file.read_bytes())
    libraries = {name: version(name) for name in ("jax", "flax", "numpy", "scipy", "pillow")}
    return {
        "relay_jax": f"source {sha.hexdigest()[:16]}",
        "python": platform.python_version(),
        **libraries,
    }


def check_folder(folder: Path, settings: Mapping[str, Any]) -> None:
    """Raises UserError if the folder holds a report of other settings, naming the first of them."""
    path = folder / "report.json"
    if folder.exists() and not folder.is_dir():
        raise UserError(f"--out {folder} is a file; name a folder")
    if not path.exists():
        return
    try:
        report = read_json(path)
        old = flat({name: report[name] for name in SETTINGS}, _PLACES)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(
            f"{path} is no report of this program ({one_line(error)}); use another --out"
        ) from error
    # Through JSON, as the old ones have
    # come: tuples are lists there.
    new = flat(json.loads(json.dumps({name: settings[name] for name in SETTINGS})), _PLACES)
    for key in sorted(old.keys() | new.keys()):
        if old.get(key) != new.get(key):
            raise UserError(
                f"{path} is a report of other settings ({key} is {_short(old.get(key))} there and "
                f"{_short(new.get(key))} here); use another --out, or remove it"
            )


def write_report(folder: Path, report: Mapping[str, Any]) -> None:
    """Writes report.json and report.md. Raises StorageError."""
    # The JSON last: a training that finds
    # it takes the whole report as written.
    write_text(folder / "report.md", as_markdown(report))
    write_json(folder / "report.json", dict(report))


class Section(NamedTuple):
    """A table of a report. head: [""] * 2 for names and values."""

    title: str
    head: list[str]
    rows: list[list[Any]]


def protocol(report: Mapping[str, Any]) -> list[Section]:
    """Everything that the scores depend on: the stages side by side, then section by section."""
    sections = {name: value for name, value in report.items() if name not in ("scores", "notes")}
    # A copy, as JSON has it: parts of it
    # move to the table of the stages.
    rest = json.loads(json.dumps(sections))
    sampling = rest["samples"].get("sampling") or {}
    columns = sampling.pop("stages", {})
    for what, of_stages in (
        ("ema", rest["samples"].pop("ema", None)),
        ("training", rest.pop("training", None)),
        ("calls_per_image", rest.pop("calls_per_image", None)),
    ):
        for stage, values in (of_stages or {}).items():
            columns.setdefault(stage, {})[what] = values
    tables = []
    if columns:
        by_stage = {stage: flat(values) for stage, values in columns.items()}
        keys = list(dict.fromkeys(key for values in by_stage.values() for key in values))
        groups = list(dict.fromkeys(key.split(".")[0] for key in keys))
        # Keys of one group stay together, also where one stage alone
        # has some of them.
        keys.sort(key=lambda key: groups.index(key.split(".")[0]))
        rows = [[key, *(values.get(key, "") for values in by_stage.values())] for key in keys]
        tables.append(Section("Stages", ["", *by_stage], rows))
    for section, values in rest.items():
        rows = [list(pair) for pair in flat(values).items()]
        tables.append(Section(section.capitalize(), ["", ""], rows))
    return tables


def as_markdown(report: Mapping[str, Any]) -> str:
    """The report for people: scores, notes, the stages side by side, a table for each section."""
    lines = [
        "# Evaluation",
        "",
        *_scores(report["scores"]),
        "",
    ]
    lines += [f"- {note}" for note in report["notes"]]
    for title, head, rows in protocol(report):
        lines += ["", f"## {title}", "", *_table(head, rows)]
    return "\n".join(lines) + "\n"


def _scores(scores: Mapping[str, float]) -> list[str]:
    """A line for each score: of the samples, of real images in their place, and the ratio."""
    beside = {"_real": "real images", "_ratio": "ratio"}
    columns = [end for end in beside if any(f"{name}{end}" in scores for name in scores)]
    ends = [f"{name}{end}" for name in scores for end in columns]
    rows = [
        [name, *(_number(scores[n]) if n in scores else "" for n in (name, *more))]
        for name in scores
        if name not in ends
        for more in [[f"{name}{end}" for end in columns]]
    ]
    return _table(["score", "samples" if columns else "", *(beside[c] for c in columns)], rows)


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    return [f"| {' | '.join(map(_cell, row))} |" for row in [head, ["---"] * len(head), *rows]]


def _number(value: float) -> str:
    return f"{value:.5g}"


def cell_text(value: Any) -> str:
    """A value of a table as text: lists with commas."""
    return ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _cell(value: Any) -> str:
    return cell_text(value).replace("|", "\\|").replace("\n", " ")


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."

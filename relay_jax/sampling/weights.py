"""The weights that a stage is sampled with: which average of them, and those of its guide.

STAGE/checkpoints/STEP/ema, ema_NAME    averages that the training keeps (train.ema)
STAGE/averages/WIDTH                    one made afterwards (training/snapshots.py)
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from jax.sharding import Mesh

from relay_jax.config import network_from
from relay_jax.errors import UserError
from relay_jax.models.averages import DEFAULT, item_of
from relay_jax.models.network import Network
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import checkpoints_of, load_ema, read_meta
from relay_jax.stage import Guided, Stage
from relay_jax.workdir import read_config, weights_folder

# Of a process, what may differ between a stage and its guide: which
# levels were trained most.
_TRAINING_ONLY = ("P_mean", "P_std", "weight_max", "sigma_floor")


def load_weights(stage: Stage, folder: Path, mesh: Mesh) -> tuple[dict | Guided, dict]:
    """What `stage.denoiser` takes, on the devices, and the notes of the checkpoint.

    folder: of the stage or of one of its checkpoints, as in
    `load_ema`. With a guide its parameters are there, too, and its
    notes under "guide". All processes must call it. Raises UserError
    for what is missing, unreadable, or of another network.
    """
    if stage.guide is None:
        return _load_average(stage, folder, mesh, stage.ema)
    # Before the weights of the stage, which may take minutes.
    place = guide_folder(stage, folder)
    params, notes = _load_average(stage, folder, mesh, stage.ema)
    network = stage.guide_network or stage.network
    guide = replace(stage, network=network, guide=None, guide_network=None)
    guide_params, guide_notes = _load_average(guide, place, mesh, stage.guide.ema)
    return Guided(params, guide_params), notes | {"guide": guide_notes}


def _load_average(stage: Stage, folder: Path, mesh: Mesh, name: str) -> tuple[dict, dict]:
    """One average of a stage's weights, by its name. Raises UserError."""
    shapes = stage.shapes()
    if not name:
        return load_ema(folder, shapes, mesh)
    place, step = checkpoints_of(folder)
    made, item = place.parent / "averages" / name, item_of(name)
    # One process looks: others may see a
    # shared folder a moment later.
    stored, made_steps, newest = distributed.of_first(
        (
            any(place.glob(f"*/{item}")),
            _steps(made),
            max(_steps(place.parent / "snapshots"), default=0),
        )
    )
    if stored:
        return load_ema(folder, shapes, mesh, item)
    command = f"--mode=average --ema={name} --stage={stage.name}"
    if step is not None and step in made_steps:
        return load_ema(made / "checkpoints" / str(step), shapes, mesh)
    if step is None and made_steps:
        # An average of half a training must not
        # be taken for one of all of it.
        if max(made_steps) < newest:
            raise UserError(
                f"stage {stage.name}: its average {name} is of step {max(made_steps)}, and there "
                f"are snapshots up to {newest}; make it again ({command}), or name "
                f"{place.parent}@{max(made_steps)}"
            )
        return load_ema(made, shapes, mesh)
    raise UserError(
        f"stage {stage.name}: no average {name} in {folder}; there are "
        f"{', '.join(averages_in(place))}"
        + (f"; from its snapshots {command} makes others" if newest else "")
    )


def _steps(folder: Path) -> list[int]:
    """Steps with a complete checkpoint, rising."""
    checkpoints = folder / "checkpoints"
    return sorted(int(path.name) for path in checkpoints.glob("*") if path.name.isdecimal())


def averages_in(place: Path) -> list[str]:
    """The names of the averages beside the checkpoints in `place`: kept ones and those made."""
    kept = {path.name.removeprefix(f"{DEFAULT}_") for path in place.glob(f"*/{DEFAULT}_*")}
    made = {path.name for path in place.parent.glob("averages/*")}
    return [DEFAULT, *sorted(kept | made)]


# Guides


def with_guides(stages: Sequence[Stage], folders: Mapping[str, Path]) -> list[Stage]:
    """The stages with the networks of their guides, as the checkpoints of these describe them.

    folders: of the stages, by name; those without one have no
    checkpoints yet. All processes must call it. Raises UserError for
    a guide that is not there, or is none for its stage.
    """
    return [
        replace(stage, guide_network=_guide_network(stage, folders.get(stage.name)))
        if stage.guide is not None
        else stage
        for stage in stages
    ]


def with_networks_of(stages: Sequence[Stage], others: Sequence[Stage]) -> list[Stage]:
    """The stages with the guides' networks that `others` know already, by stage name."""
    known = {stage.name: stage.guide_network for stage in others}
    return [
        replace(stage, guide_network=known.get(stage.name)) if stage.guide else stage
        for stage in stages
    ]


def _own_step(stage: Stage) -> str | None:
    """The step of a guide that is a checkpoint of the stage itself, '' for the newest."""
    assert stage.guide is not None
    name, at, step = stage.guide.weights.rpartition("@")
    if stage.guide.weights == stage.name:
        return ""
    return step if at and name == stage.name else None


def guide_folder(stage: Stage, folder: Path | None) -> Path:
    """Where the weights of a stage's guide are. folder: of the stage. Raises UserError."""
    assert stage.guide is not None
    key, step = f"stage {stage.name}: sample.guide", _own_step(stage)
    if step is None:
        return weights_folder(key, stage.guide.weights)
    if not step and stage.guide.ema == stage.ema:
        raise UserError(
            f"{key}={stage.guide.weights} is what it would guide; name an earlier checkpoint, "
            f"{stage.name}@STEP, or another average by sample.guide_ema"
        )
    if folder is None:
        raise UserError(f"{key}={stage.guide.weights}: name the run, --workdir=runs/NAME")
    if not step:
        return folder
    return weights_folder(key, f"{checkpoints_of(folder)[0].parent}@{step}")


def _guide_network(stage: Stage, folder: Path | None) -> Network:
    assert stage.guide is not None
    if _own_step(stage) is not None:
        return stage.network
    place = guide_folder(stage, folder)
    described = read_meta(place).get("network")
    if not described:
        return stage.network
    # In the precision in which the stage is sampled.
    network = network_from(described).clone(dtype=stage.network.dtype, remat=False)
    for field in ("resolution", "image_channels", "num_classes"):
        theirs, ours = getattr(network, field), getattr(stage.network, field)
        if theirs != ours:
            raise UserError(
                f"stage {stage.name}: sample.guide {place} has {field} {theirs}, and the stage "
                f"{ours}; a guide does the same with other weights"
            )
    _check_process(stage, place)
    return network


def _check_process(stage: Stage, place: Path) -> None:
    """Raises UserError for a guide of another process, where its run says which it has."""
    of_stage = checkpoints_of(place)[0].parent
    config = read_config(of_stage.parent) or {}
    theirs = config.get("stages", {}).get(of_stage.name, {}).get("process", {})
    for key in theirs.keys() - {"kind", *_TRAINING_ONLY}:
        ours = getattr(stage.process, key, theirs[key])
        if ours != theirs[key]:
            raise UserError(
                f"stage {stage.name}: sample.guide {place} was trained with process.{key} "
                f"{theirs[key]}, and the stage has {ours}; a guide must denoise the same states"
            )

"""Sampling by one word, and other ways to sample one configuration.

    with_preset(settings, "fast")
    settings_for(settings, "fast:relay.num_steps=9")        one of --sweep
    settings_for(settings, "heun:num_steps=80:relay.fresh_noise=0")

A preset (PRESETS in configs/default.py) is a few keys of the
`sample` sections: it works on any configuration, also on that of a
run which was begun before there were presets. The stages are built
from the changed sections anew, so that every check of a
configuration holds here, too.
"""

import ast
import contextlib
import copy
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from relay_jax.config import Settings, rebuild
from relay_jax.configs.default import PRESETS
from relay_jax.diffusion.sampler import SAMPLERS
from relay_jax.errors import UserError
from relay_jax.stage import Stage, joined


def _summary(name: str) -> str:
    steps = [str(keys["num_steps"]) for keys in PRESETS[name].values()]
    return f"{name} ({' + '.join(steps) or 'the configured samplers'})"


# For --help: the calls of the denoiser, first stage + relay.
PRESET_HELP = ", ".join(map(_summary, PRESETS))

Changes = Mapping[str, Mapping[str, Any]]  # keys of `sample` by stage name


def check_preset(name: str) -> None:
    """Raises UserError for a name that is no preset."""
    if name not in PRESETS:
        raise UserError(f"unknown preset {name!r}; there are {', '.join(PRESETS)}")


def changed(settings: Settings, changes: Changes) -> Settings:
    """The same relay with other keys in its `sample` sections.

    Raises UserError for keys that a sampler
    has not, or values that cannot be.
    """
    if not any(changes.values()):
        return settings
    plain = copy.deepcopy(dict(settings.plain))
    for name, keys in changes.items():
        if name not in plain["stages"]:
            raise UserError(f"unknown stage {name!r}; there are {', '.join(plain['stages'])}")
        plain["stages"][name]["sample"].update(keys)
    return replace(settings, stages=rebuild(plain), plain=plain)


def with_preset(settings: Settings, name: str, keep: Container[str] = ()) -> Settings:
    """The same relay, sampled as a preset says; '' changes nothing.

    keep: dotted keys, `stages.relay.sample.num_steps`, which stay as
    they are although the preset names them. Raises UserError for an
    unknown name, and where the relay cannot be sampled so.
    """
    if not name:
        return settings
    check_preset(name)
    changes = {}
    for stage in settings.stages:
        # By what the stage does and not by the name of its process:
        # a process of the user's own is sampled alike.
        keys = PRESETS[name].get("relay" if stage.process.has_handoff else "edm", {})
        changes[stage.name] = {
            key: value
            for key, value in keys.items()
            if f"stages.{stage.name}.sample.{key}" not in keep
        }
    return changed(settings, changes)


def with_ema(settings: Settings, text: str | float, keep: Container[str] = ()) -> Settings:
    """The same relay, sampled with one average of the weights of all stages; '' changes nothing.

    text: a relative width, a half-life or 'ema', as people write it
    (models/averages.py); keep: as in `with_preset`. Raises UserError
    for what names none.
    """
    names = [stage.name for stage in settings.stages]
    chosen = [name for name in names if f"stages.{name}.sample.ema" not in keep]
    return changed(settings, {name: {"ema": text} for name in chosen} if text != "" else {})


def by_preset(settings: Settings) -> dict[str, Sequence[Stage]]:
    """The stages as each preset samples them in a chain.

    Without presets that this relay cannot have.
    """
    stages: dict[str, Sequence[Stage]] = {}
    for name in PRESETS:
        with contextlib.suppress(UserError):
            stages[name] = joined(with_preset(settings, name).stages)
    return stages


def settings_for(settings: Settings, text: str) -> Settings:
    """The relay as one sampler of --sweep samples it.

    text: the name of a preset or of a sampler, then any number of
    `:KEY=VALUE` for all stages or `:STAGE.KEY=VALUE` for one. A
    preset begins with its own keys, a sampler with those of the
    configuration. Raises UserError, naming the text.
    """
    head, *assignments = text.split(":")
    try:
        if head in PRESETS:
            settings = with_preset(settings, head)
        elif head in SAMPLERS:
            kinds = {stage.name: {"kind": head} for stage in settings.stages}
            settings = changed(settings, kinds)
        else:
            names = ", ".join([*PRESETS, *SAMPLERS])
            raise UserError(f"{head!r} is neither a preset nor a sampler; there are {names}")
        changes: dict[str, dict[str, Any]] = {stage.name: {} for stage in settings.stages}
        for assignment in assignments:
            match = re.fullmatch(r"(?:(\w+)\.)?(\w+)=(.+)", assignment)
            if match is None:
                raise UserError(f"{assignment!r} is not KEY=VALUE or STAGE.KEY=VALUE")
            stage, key, value = match.groups()
            if stage and stage not in changes:
                raise UserError(f"unknown stage {stage!r}; there are {', '.join(changes)}")
            # Later ones win, so that one stage can differ from all.
            for name in [stage] if stage else list(changes):
                changes[name][key] = _value(value)
        settings = changed(settings, changes)
        for sampled in settings.stages:
            _check_keys(sampled, changes[sampled.name])
        return settings
    except UserError as error:
        raise UserError(f"sampler {text}: {error}") from error


def _check_keys(stage: Stage, keys: Container[str]) -> None:
    """Raises UserError for a key that only another kind of sampler has."""
    # A section may keep keys of the kind that it had before; one
    # that is named here must have an effect.
    others = {field.name for kind in SAMPLERS.values() for field in fields(kind)}
    foreign = others - {field.name for field in fields(stage.sampler)}  # type: ignore[arg-type]
    for key in sorted(foreign):
        if key in keys:
            raise UserError(f"{key} is no key of the sampler of stage {stage.name}")


def _value(text: str) -> Any:
    """A number, tuple or truth value as Python writes it, or inf; else the text."""
    try:
        return ast.literal_eval(re.sub(r"\binf\b", "1e999", text))
    except (ValueError, SyntaxError):
        return text


def split_samplers(text: str) -> list[str]:
    """The samplers of --sweep: separated by commas, but not by those within brackets.

    Raises UserError for none, or one that stands twice.
    """
    names = [name.strip() for name in re.split(r",(?![^(]*\))", text) if name.strip()]
    if not names or len(set(names)) != len(names):
        raise UserError(f"--sweep={text}: name samplers, each once, such as official,fast")
    return names

"""Values of a configuration against the fields of the dataclass that they are for.

A configuration file is Python: any value can stand anywhere, and a
whole number of 10^12 or a text in place of a number would be noticed
only by what it breaks. Each class checks what its values mean; here
is what all of them have in common.
"""

import contextlib
import importlib
import math
import os
import types
import typing
from collections.abc import Mapping
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

from relay_jax.errors import UserError, one_line
from relay_jax.models.network import Network

MAX_WHOLE = 2**53  # beyond it whole numbers and float64 differ
# Floats that may be infinite, for "no limit".
UNBOUNDED = frozenset(
    ("s_max", "handoff_sigma", "weight_max", "guidance_interval", "guide_interval")
)


def check_values(section: str, chosen: type, values: Mapping[str, Any]) -> None:
    """Raises ValueError for the first value that is not of the type of its field.

    section: such as "train", for the message. chosen: a dataclass;
    fields of other types than numbers, texts, switches and tuples of
    numbers are not looked at, and neither are unknown keys.
    """
    types_by_name = {field.name: field.type for field in fields(chosen)}
    for name, value in values.items():
        if name in types_by_name:
            check_value(f"{section}.{name}", types_by_name[name], value)


def at_least(section: str, settings: object, **limits: int) -> None:
    """Raises ValueError for a field below its limit."""
    for name, least in limits.items():
        value = getattr(settings, name)
        if value < least:
            raise ValueError(f"{section}.{name} must be at least {least}, not {value}")


def at_most(section: str, settings: object, **limits: int) -> None:
    """Raises ValueError for a field above its limit."""
    for name, most in limits.items():
        value = getattr(settings, name)
        if value > most:
            raise ValueError(f"{section}.{name} must be at most {most:,}, not {value}")


def made(chosen: type, section: str, values: Mapping[str, Any]) -> Any:
    """A dataclass of a section of the configuration, after its types are checked."""
    check_values(section, chosen, values)
    return chosen(**values)


def check_value(key: str, kind: Any, value: Any) -> None:
    """Raises ValueError if a value is not of a type: bool, int, float, str or tuple of them."""
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin is tuple:
        if not isinstance(value, tuple | list):
            raise ValueError(f"{key} must be a tuple like (1, 2), not {_short(value)}")
        if len(value) > 64:
            raise ValueError(f"{key} has {len(value):,} numbers; 64 are the most")
        for item in value:
            check_value(key, arguments[0], item)
    elif origin in (types.UnionType, typing.Union):
        if value is not None or type(None) not in arguments:
            check_value(key, next(a for a in arguments if a is not type(None)), value)
    elif kind is bool and not isinstance(value, bool):
        raise ValueError(f"{key} must be True or False, not {_short(value)}")
    elif kind is int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise ValueError(f"{key} must be a whole number, not {_short(value)}")
        if abs(value) > MAX_WHOLE:
            raise ValueError(f"{key} must be at most {MAX_WHOLE}, not {_short(value)}")
    elif kind is float:
        _check_float(key, value)
    elif kind is str and not isinstance(value, str):
        raise ValueError(f"{key} must be a text, not {_short(value)}")


def _check_float(key: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{key} must be a number, not {_short(value)}")
    if key.rpartition(".")[2] in UNBOUNDED and value == math.inf:
        return
    # Images and levels are float32 on
    # the devices, which ends at 3.4e38.
    if not -3e38 < value < 3e38:
        raise ValueError(f"{key} must be a finite number, not {_short(value)}")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def check_size(network: Network) -> None:
    """Raises ValueError for a network of which this machine cannot hold a single copy.

    By the network's own estimate, where it has one
    (`least_numbers`): before it is traced, which may take longer
    than anybody waits.
    """
    estimate = getattr(network, "least_numbers", None)
    memory = memory_of_machine()
    if estimate is not None and 4 * estimate() > memory:
        raise ValueError(
            f"the network needs at least {4 * estimate() / 1e9:.4g} GB for its weights or one "
            f"image, and this machine has {memory / 1e9:.4g} GB; lower model.channels, "
            "model.multipliers, model.blocks or resolution"
        )


@cache
def memory_of_machine() -> int:
    """Bytes that this process may use: of the machine, or of its container."""
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            # "max" where there is no limit,
            # or a number beyond all machines.
            memory = min(memory, int(Path("/sys/fs/cgroup", name).read_text()))
    return memory


def keys_of(chosen: type, kinds: Mapping[str, Any], keys: Mapping[str, Any]) -> dict[str, Any]:
    """The keys of a section for the class of its `kind`, without those of other known kinds."""
    # So that a kind can be named on the command line over a section
    # that was written for another one. Keys that no kind knows stay,
    # and are refused by the class; so are those of a class derived from
    # the chosen one, such as `patch` in a stage of kind edm.
    others = [other for other in kinds.values() if not issubclass(other, chosen)]
    foreign = {field.name for other in others for field in fields(other)}
    foreign -= {field.name for field in fields(chosen)}
    return {key: value for key, value in keys.items() if key not in foreign}


def named_class(classes: Mapping[str, type], name: str, key: str) -> Any:
    """The class of a short name, or of `package.module:Class`, for parts that live elsewhere.

    Raises UserError that says what is known,
    or why the module cannot be imported.
    """
    check_value(key, str, name)
    if name in classes:
        return classes[name]
    module_name, colon, class_name = name.partition(":")
    if not colon:
        names = " or ".join(repr(short) for short in classes)
        raise UserError(f"{key} must be {names} or package.module:Class, not {name[:99]!r}")
    try:
        return getattr(importlib.import_module(module_name), class_name)
    except Exception as error:  # the module is the user's: it may fail in any way
        raise UserError(f"{key}={name!r} cannot be imported ({one_line(error)})") from error

"""Overrides of a configuration with values that nobody should use: for the tests and for
benchmarks/endurance.py.

    from tests.overrides import try_override, overrides
    print([bad for path, value in overrides(1000, seed=0) if (bad := try_override(path, value))])
"""

import functools
import random
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
from ml_collections import ConfigDict

from relay_jax.config import Settings, settings_of
from relay_jax.configs import demo
from relay_jax.errors import UserError
from relay_jax.models.network import Network, shapes_of

MOST_SECONDS, MOST_CHARACTERS = 1.0, 400
WHOLE = [0, -1, 1, 2, 3, 5, 7, 33, 1000, 10**6, 10**9, 10**12, 2**31, 2**63, 10**30, -(10**12)]
NUMBERS = [0.0, -1.0, 1e-320, 1e-30, 1e-7, 0.3, 1.0, 1.5, 3.0, 1e7, 1e20, 1e38, 1e300]
NUMBERS += [float("inf"), -float("inf"), float("nan")]
OTHERS: list[Any] = [None, True, False, "", "x", "nan", "x:y", "os:path", "é\n", 300 * "x", b"x"]
OTHERS += [(), (1,), (1.5,), (-1,), (0,), (1, 2), (1, 10**9), ("a",), (None,), [3], {}, {"a": 1}]
OTHERS += [tuple(range(100)), (float("nan"), 1.0), (1.0, float("inf")), 1 + 2j]
HOSTILE = [*WHOLE, *NUMBERS, *OTHERS]


def keys_of(config: ConfigDict, above: str = "") -> list[str]:
    """Every key, 'stages.base.train.batch', with those that hold others."""
    keys = []
    for name, value in config.items():
        keys.append(above + name)
        if isinstance(value, ConfigDict):
            keys += keys_of(value, f"{above}{name}.")
    return keys


def overrides(count: int, seed: int) -> Iterator[tuple[str, Any]]:
    """Keys with hostile values: every key alike often, and no pair twice before all have come."""
    rng = random.Random(seed)
    keys = keys_of(demo.get_config("smoke"))
    orders = {key: rng.sample(HOSTILE, len(HOSTILE)) for key in keys}
    rng.shuffle(keys)
    for number in range(count):
        key = keys[number % len(keys)]
        yield key, orders[key][number // len(keys) % len(HOSTILE)]


def overridden(path: str, value: Any) -> ConfigDict:
    """The small demo with one other value."""
    config = demo.get_config("smoke")
    *parents, key = path.split(".")
    node = config
    for parent in parents:
        node = node[parent]
    with node.ignore_type():
        node[key] = value
    return config


def try_override(path: str, value: Any) -> str:
    """What is wrong with how a value is answered, '' if it is refused in a line, or works."""
    what = f"{path}={value!r:.60}"
    config = overridden(path, value)
    # Of this process alone: other tests may run beside it.
    begun, settings, wrong = time.process_time(), None, ""
    try:
        settings = settings_of(config)
    except UserError as error:
        text = str(error)
        wrong = "" if "\n" not in text and len(text) < MOST_CHARACTERS else f"{what}: says {text}"
    except Exception as error:
        return f"{what}: {type(error).__name__}: {error}"
    seconds = time.process_time() - begun
    if settings is not None:
        wrong = _wrong_with(settings, what)
    return wrong or (f"{what}: takes {seconds:.1f} s" if seconds > MOST_SECONDS else "")


@functools.cache
def _shapes(network: Network) -> Any:
    return shapes_of(network)


def _wrong_with(settings: Settings, what: str) -> str:
    """Grids that are not finite or do not fall, and networks that cannot be traced."""
    for stage in settings.stages:
        levels = stage.sampler.levels()
        if not (np.isfinite(levels).all() and np.all(np.diff(levels.astype(np.float32)) < 0)):
            return f"{what}: accepted with the levels {levels}"
        if not np.isfinite(stage.sample_process.blur_sigma_at(levels)).all():
            return f"{what}: accepted with a blur that is not finite"
    if ".model." in what or ".resolution" in what or "num_classes" in what:
        begun = time.perf_counter()
        try:
            for stage in settings.stages:
                _shapes(stage.network)
        except Exception as error:
            return f"{what}: accepted, but cannot be traced: {error}"
        if time.perf_counter() - begun > 60:
            return f"{what}: accepted, but its trace takes more than a minute"
    return ""

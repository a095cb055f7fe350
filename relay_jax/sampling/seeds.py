"""Lists of seeds as text, and which class the image of a seed has.

Seeds read '0-63' or '1,5,10-12'. The class is a function of the seed
and a rule alone:

mod         seed mod classes, as in the official samplers
balanced    every `classes` consecutive seeds (from a multiple of `classes` on) hold each class
            once, in an order of their own
random      uniform; equal seeds have equal classes
N           class N for all

The shuffling and the draw come from a hash of the seed in whole numbers
(splitmix64; Steele et al. 2014), so they are the same on every machine
and with every version of numpy.
"""

from collections.abc import Iterable

import numpy as np

from relay_jax.config import MAX_SEED
from relay_jax.errors import UserError

MAX_IMAGES = 10_000_000
CLASS_RULES = ("mod", "balanced", "random")
_BLOCKS_AT_ONCE = 2**22  # hashes in memory


def parse_seeds(text: str) -> list[int]:
    """'0-63' or '1,5,10-12' as a list without repeats.

    Raises UserError for anything else, and beyond MAX_IMAGES.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"--seeds={text}: {part.strip()!r} is neither a number nor a range like 0-63"
            )
        low, high = int(first), int(last or first)
        if high < low or high > MAX_SEED:
            raise UserError(
                f"--seeds={text}: the range {part.strip()!r} is empty or goes beyond {MAX_SEED}"
            )
        if high - low >= MAX_IMAGES:
            raise UserError(f"--seeds={text}: more than {MAX_IMAGES:,} images at once")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def runs_of(seeds: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive seeds as (first, last), rising, whatever their order and repeats."""
    rising = np.unique(np.fromiter(seeds, np.int64))
    if not len(rising):
        return []
    ends = np.flatnonzero(np.diff(rising) != 1)
    firsts, lasts = (
        rising[np.append(0, ends + 1)],
        rising[np.append(ends, len(rising) - 1)],
    )
    return [(int(first), int(last)) for first, last in zip(firsts, lasts, strict=True)]


def seeds_text(seeds: Iterable[int]) -> str:
    """The shortest text that `parse_seeds` reads as these seeds, in rising order; '' for none."""
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in runs_of(seeds)
    )


def parse_class_rule(text: str, num_classes: int) -> str:
    """The rule as it is written down, a number without leading zeros.

    num_classes: 0 for an unconditional network, which takes 'mod'
    alone. Raises UserError for an unknown rule or class.
    """
    if text == "mod":
        return text
    if not num_classes:
        raise UserError(f"--class={text}: the network is unconditional; leave --class out")
    if text in CLASS_RULES:
        return text
    if not text.isdecimal():
        raise UserError(
            f"--class={text}: neither {', '.join(CLASS_RULES)} nor a class (0 to {num_classes - 1})"
        )
    if int(text) >= num_classes:
        raise UserError(f"unknown class {text}; there are 0 to {num_classes - 1}")
    return str(int(text))


def classes_for(seeds: np.ndarray | list[int], num_classes: int, rule: str) -> np.ndarray:
    """int32 [n], the class of each seed; zeros for an unconditional network (num_classes 0).

    rule: what `parse_class_rule` has returned. Raises ValueError for
    another.
    """
    wide = np.asarray(seeds, np.uint64)
    if not num_classes:
        return np.zeros(len(wide), np.int32)
    if rule == "mod":
        return (wide % np.uint64(num_classes)).astype(np.int32)
    if rule == "random":
        high = _hash(wide) >> np.uint64(32)
        return (high * np.uint64(num_classes) >> np.uint64(32)).astype(np.int32)
    if rule == "balanced":
        return _balanced(wide, num_classes)
    if not rule.isdecimal() or int(rule) >= num_classes:
        raise ValueError(f"unknown class rule {rule!r} for {num_classes} classes")
    return np.full(len(wide), int(rule), np.int32)


def _balanced(seeds: np.ndarray, num_classes: int) -> np.ndarray:
    blocks, places = np.divmod(seeds, np.uint64(num_classes))
    unique, which = np.unique(blocks, return_inverse=True)
    classes = np.empty(len(seeds), np.int32)
    offsets = np.arange(num_classes, dtype=np.uint64)
    # In parts, because the hashes of a million blocks of a thousand
    # classes fill the memory.
    step = max(_BLOCKS_AT_ONCE // num_classes, 1)
    for start in range(0, len(unique), step):
        members = unique[start : start + step, None] * np.uint64(num_classes) + offsets
        # Hashed twice: the order must not be the one of 'random'.
        orders = np.argsort(_hash(_hash(members)), axis=1, kind="stable")
        inside = (which >= start) & (which < start + step)
        classes[inside] = orders[which[inside] - start, places[inside].astype(np.int64)]
    return classes


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64 of uint64, element by element; sums and products wrap."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)

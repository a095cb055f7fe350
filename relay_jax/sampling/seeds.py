"""Lists of seeds as text, and which class the image of a seed has.

Seeds read '0-63' or '1,5,10-12'. The class is a function of the seed
and a rule alone:

mod         seed mod classes, as in the official samplers
balanced    every `classes` consecutive seeds (from a multiple of `classes` on) hold each class
            once, in an order of their own
random      uniform; equal seeds have equal classes
N           class N for all
NAME        the class of that name for all, such as cat; name:NAME where a name looks like a number
            or a rule

The shuffling and the draw come from a hash of the seed in whole
numbers (splitmix64; Steele et al. 2014), so they are the same on
every machine and with every version of numpy.
"""

import difflib
from collections.abc import Iterable, Sequence

import numpy as np
from absl import logging

from relay_jax.config import MAX_SEED
from relay_jax.errors import UserError

MAX_IMAGES = 10_000_000
MAX_RANGES = 1_000_000  # in one text, which costs seconds
CLASS_RULES = ("mod", "balanced", "random")
_BLOCKS_AT_ONCE = 2**22  # hashes in memory


def parse_seeds(text: str) -> list[int]:
    """'0-63' or '1,5,10-12' as a list without repeats.

    Raises UserError for anything else, and beyond MAX_IMAGES or
    MAX_RANGES.
    """
    seeds: list[int] = []
    what = f"--seeds={text if len(text) <= 60 else text[:57] + '...'}"
    if text.count(",") >= MAX_RANGES:
        raise UserError(f"{what}: more than {MAX_RANGES:,} numbers and ranges at once")
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise UserError(
                f"{what}: {part.strip()[:40]!r} is neither a number nor a range like 0-63"
            )
        # Compared as texts first: Python refuses numbers of
        # thousands of digits in its own words.
        first, last = (
            first.lstrip("0") or "0",
            last.lstrip("0") or ("0" if dash else ""),
        )
        longest = max(len(first), len(last))
        low, high = (int(first), int(last or first)) if longest <= 10 else (0, MAX_SEED + 1)
        if high < low or high > MAX_SEED:
            raise UserError(
                f"{what}: the range {part.strip()[:40]!r} is empty or goes beyond {MAX_SEED}"
            )
        # All ranges together, repeats as well: each is written out.
        if len(seeds) + high - low >= MAX_IMAGES:
            raise UserError(f"{what}: more than {MAX_IMAGES:,} images at once")
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


def parse_class_rule(text: str, num_classes: int, names: Sequence[str] = ()) -> str:
    """The rule as it is written down; a class by its number, without leading zeros.

    num_classes: 0 for an unconditional network, which takes 'mod'
    alone. names: of the classes, where they are known. Raises
    UserError for an unknown rule or class.
    """
    if text == "mod":
        return text
    if not num_classes:
        raise UserError(f"--class={text}: the network is unconditional; leave --class out")
    if text in CLASS_RULES:
        return text
    if not (text.isascii() and text.isdecimal()):
        return _by_name(text, num_classes, names)
    # Compared as texts first: a number
    # of ten thousand digits is none.
    if len(text.lstrip("0")) > 9 or int(text) >= num_classes:
        raise UserError(f"unknown class {text[:20]}; there are 0 to {num_classes - 1}")
    # Folders 1 to 102 have the numbers 0 to 101: whoever writes 3
    # may mean either.
    if text in names and names.index(text) != int(text):
        logging.warning(
            "--class=%s is class number %s, which is called %r; for the class that is called "
            "%s write --class=name:%s",
            text,
            int(text),
            names[int(text)] if int(text) < len(names) else "",
            text,
            text,
        )
    return str(int(text))


def _by_name(text: str, num_classes: int, names: Sequence[str]) -> str:
    """The number of the class of a name. Raises UserError that names similar ones."""
    name = text.removeprefix("name:")
    matches = [number for number, other in enumerate(names) if other == name]
    # As it is written, or else whatever
    # its capitals, if that is one class.
    matches = matches or [n for n, other in enumerate(names) if other.lower() == name.lower()]
    if len(matches) == 1 and matches[0] < num_classes:
        return str(matches[0])
    number = f"a number from 0 to {num_classes - 1}"
    if not names:
        raise UserError(
            f"--class={text[:60]}: neither {', '.join(CLASS_RULES)} nor {number}; the names of the "
            "classes are not kept with these weights"
        )
    similar = difflib.get_close_matches(name, names, 3, 0.4) or list(names[:3])
    listed = ", ".join(other[:40] for other in similar)
    raise UserError(
        f"--class={text[:60]}: neither {', '.join(CLASS_RULES)} nor {number} nor the name of a "
        f"class, such as {listed}"
    )


def classes_for(seeds: np.ndarray | list[int], num_classes: int, rule: str) -> np.ndarray:
    """int32 [n], the class of each seed; zeros for an unconditional network (num_classes 0).

    rule: what `parse_class_rule` has
    returned. Raises ValueError for another.
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

"""Lists of seeds as text: '0-63' or '1,5,10-12'."""

from collections.abc import Iterable

import numpy as np

from relay_jax.config import MAX_SEED, ConfigError

MAX_IMAGES = 10_000_000


def parse_seeds(text: str) -> list[int]:
    """'0-63' or '1,5,10-12' as a list without repeats. Raises ConfigError for anything else,
    and beyond MAX_IMAGES."""
    seeds: list[int] = []
    for part in text.split(","):
        first, dash, last = part.strip().partition("-")
        if not first.isdecimal() or (dash and not last.isdecimal()):
            raise ConfigError(
                f"--seeds={text}: {part.strip()!r} is neither a number nor a range like 0-63"
            )
        low, high = int(first), int(last or first)
        if high < low or high > MAX_SEED:
            raise ConfigError(
                f"--seeds={text}: the range {part.strip()!r} is empty or goes beyond {MAX_SEED}"
            )
        if high - low >= MAX_IMAGES:
            raise ConfigError(f"--seeds={text}: more than {MAX_IMAGES:,} images at once")
        seeds.extend(range(low, high + 1))
    return list(dict.fromkeys(seeds))


def runs_of(seeds: Iterable[int]) -> list[tuple[int, int]]:
    """Consecutive seeds as (first, last), rising, whatever their order and repeats."""
    sorted_ = np.unique(np.fromiter(seeds, np.int64))
    ends = np.flatnonzero(np.diff(sorted_) != 1)
    if not len(sorted_):
        return []
    firsts, lasts = sorted_[np.append(0, ends + 1)], sorted_[np.append(ends, len(sorted_) - 1)]
    return [(int(first), int(last)) for first, last in zip(firsts, lasts, strict=True)]


def seeds_text(seeds: Iterable[int]) -> str:
    """The shortest text that `parse_seeds` reads as these seeds, in rising order; '' for none."""
    return ",".join(
        str(first) if first == last else f"{first}-{last}" for first, last in runs_of(seeds)
    )

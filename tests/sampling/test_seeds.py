"""Lists of seeds: read, and written in the shortest way."""

import numpy as np
import pytest

from relay_jax.config import ConfigError
from relay_jax.sampling.seeds import parse_seeds, runs_of, seeds_text


@pytest.mark.parametrize(
    "text, seeds",
    [
        ("0-3", [0, 1, 2, 3]),
        ("7", [7]),
        ("5-5", [5]),
        ("1,5,10-12", [1, 5, 10, 11, 12]),
        (" 4 , 2 ", [4, 2]),
        ("3,1-3,3", [3, 1, 2]),
        ("007", [7]),
        ("4294967294-4294967295", [2**32 - 2, 2**32 - 1]),
    ],
)
def test_seed_lists_are_read_in_order_without_repeats(text: str, seeds: list[int]) -> None:
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text, part",
    [
        ("", "''"),
        ("a", "'a'"),
        ("1,,2", "''"),
        ("1-", "'1-'"),
        ("-3", "'-3'"),
        ("1-2-3", "'1-2-3'"),
        ("1.5", "'1.5'"),
        ("0-x", "'0-x'"),
        ("0..3", "'0..3'"),
        ("5-2", "'5-2'"),
        ("4294967296", "'4294967296'"),
        ("0-3,4294967290-4294967296", "'4294967290-4294967296'"),
    ],
)
def test_bad_seed_lists_are_refused_with_one_line_that_names_the_part(text: str, part: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_seeds(text)
    message = str(error.value)
    assert f"--seeds={text}" in message and part in message and "\n" not in message


@pytest.mark.parametrize(
    "seeds, text", [([], ""), ([7], "7"), ([2, 0, 1, 2], "0-2"), ([5, 9, 8, 1], "1,5,8-9")]
)
def test_the_shortest_text_of_some_seeds(seeds: list[int], text: str) -> None:
    assert seeds_text(seeds) == text


def test_text_and_seeds_are_each_others_inverse() -> None:
    seeds = np.unique(np.random.default_rng(0).integers(0, 200, 90)).tolist()
    assert parse_seeds(seeds_text(seeds)) == seeds
    assert [
        seed for first, last in runs_of(reversed(seeds)) for seed in range(first, last + 1)
    ] == seeds
    assert all(
        after[0] > before[1] + 1
        for before, after in zip(runs_of(seeds), runs_of(seeds)[1:], strict=False)
    )

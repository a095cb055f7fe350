"""Lists of seeds as text, and the class of a seed: rules and numbers that must never change."""

import time

import numpy as np
import pytest

from relay_jax.config import MAX_SEED
from relay_jax.errors import UserError
from relay_jax.sampling.seeds import (
    CLASS_RULES,
    classes_for,
    parse_class_rule,
    parse_seeds,
    runs_of,
    seeds_text,
)


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
    with pytest.raises(UserError) as error:
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


# Classes

SEEDS = np.random.default_rng(0).integers(0, MAX_SEED, 300, endpoint=True)


@pytest.mark.parametrize("rule", [*CLASS_RULES, "3"])
def test_a_class_depends_on_its_seed_alone(rule: str) -> None:
    together = classes_for(SEEDS, 10, rule)
    assert together.dtype == np.int32 and together.min() >= 0 and together.max() < 10
    np.testing.assert_array_equal(
        np.concatenate([classes_for([seed], 10, rule) for seed in SEEDS]), together
    )
    np.testing.assert_array_equal(classes_for(SEEDS[::-1], 10, rule), together[::-1])


def test_mod_and_fixed() -> None:
    assert classes_for([0, 7, 8, 10_003], 8, "mod").tolist() == [0, 7, 0, 3]
    assert classes_for([0, 7, MAX_SEED], 8, "5").tolist() == [5, 5, 5]


@pytest.mark.parametrize("classes", [1, 2, 7, 1000])
def test_balanced_blocks_hold_each_class_once_in_orders_of_their_own(classes: int) -> None:
    blocks = classes_for(np.arange(20 * classes), classes, "balanced").reshape(20, classes)
    np.testing.assert_array_equal(np.sort(blocks, axis=1), np.tile(np.arange(classes), (20, 1)))
    if classes > 2:
        assert len({tuple(block) for block in blocks}) > 15
    if (
        classes == 1000
    ):  # no place has a class of its own: the mean over 20 blocks is near the middle
        assert abs(np.corrcoef(blocks.mean(axis=0), np.arange(classes))[0, 1]) < 0.15


def test_random_classes_are_uniform_and_not_those_of_the_neighbour() -> None:
    classes = classes_for(np.arange(80_000), 8, "random")
    counts = np.bincount(classes, minlength=8)
    assert (
        np.sum((counts - 10_000.0) ** 2 / 10_000) < 24
    )  # chi squared, 7 degrees: one in a thousand
    pairs = np.bincount(classes[:-1] * 8 + classes[1:], minlength=64)
    assert np.sum((pairs - 1250.0) ** 2 / 1250) < 104  # 63 degrees


def test_finished_samples_keep_their_classes() -> None:
    """Numbers of the first release: changing them would put other images beside finished ones."""
    assert classes_for(np.arange(20), 8, "balanced").tolist() == [
        1,
        2,
        4,
        0,
        6,
        7,
        3,
        5,
        2,
        0,
        7,
        5,
        3,
        1,
        6,
        4,
        3,
        0,
        6,
        7,
    ]
    assert classes_for(np.arange(20), 8, "random").tolist() == [
        7,
        4,
        4,
        0,
        3,
        3,
        5,
        3,
        4,
        5,
        0,
        2,
        4,
        6,
        3,
        4,
        2,
        4,
        0,
        5,
    ]


def test_an_unconditional_network_has_no_classes() -> None:
    assert classes_for([3, 4], 0, "mod").tolist() == [0, 0]
    assert parse_class_rule("mod", 0) == "mod"
    for text in ("balanced", "random", "0"):
        with pytest.raises(UserError, match="unconditional"):
            parse_class_rule(text, 0)


@pytest.mark.parametrize(
    "text, says",
    [
        ("8", "0 to 7"),
        ("-1", "neither"),
        ("cat", "neither"),
        ("1.5", "neither"),
        ("", "neither"),
        ("MOD", "neither"),
    ],
)
def test_unknown_rules_are_one_line(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says) as error:
        parse_class_rule(text, 8)
    assert "\n" not in str(error.value)


def test_known_rules_are_written_in_one_way() -> None:
    assert [parse_class_rule(text, 8) for text in (*CLASS_RULES, "007")] == [*CLASS_RULES, "7"]
    with pytest.raises(ValueError, match="unknown class rule"):
        classes_for([1], 8, "8")


NAMES = ("cat", "Dog", "10", "2", "mod", "catfish")


@pytest.mark.parametrize(
    "text, rule",
    [
        ("cat", "0"),
        ("dog", "1"),  # whatever its capitals
        ("name:cat", "0"),
        ("2", "2"),  # a number is a number
        ("name:2", "3"),
        ("mod", "mod"),  # and a rule a rule
        ("name:mod", "4"),
    ],
)
def test_a_class_may_be_called_by_its_name(text: str, rule: str) -> None:
    assert parse_class_rule(text, 6, NAMES) == rule


@pytest.mark.parametrize(
    "text, says",
    [
        ("catfsh", "nor the name of a class, such as catfish, cat"),
        ("name:7", "nor the name of a class, such as cat, Dog, 10"),
        ("9" * 9999, "unknown class 99999999999999999999; there are 0 to 5"),
        ("\u0663", "neither"),  # decimal to Python, no number to us
    ],
)
def test_an_unknown_name_is_one_line_with_similar_ones(text: str, says: str) -> None:
    with pytest.raises(UserError) as error:
        parse_class_rule(text, 6, NAMES)
    assert says in str(error.value) and len(str(error.value)) < 400


def test_without_names_a_name_says_that_they_are_not_known() -> None:
    with pytest.raises(UserError, match="the names of the classes are not kept"):
        parse_class_rule("cat", 6)


def test_many_ranges_and_long_numbers_are_refused_at_once() -> None:
    """A damaged samples.json must not take minutes, and no line without end."""
    ranges = [",".join(["0-9999999"] * 1000), "2," * 5_000_000 + "2"]
    for text in (*ranges, "9" * 10_000, "0-" + "9" * 10_000):
        begun = time.monotonic()
        with pytest.raises(UserError) as error:
            parse_seeds(text)
        assert len(str(error.value)) < 300 and time.monotonic() - begun < 10
    assert parse_seeds("0" * 5000 + "7") == [7]

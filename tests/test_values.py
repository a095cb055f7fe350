"""Values of a configuration are of the types of their fields, and of a size that a machine has."""

import math
from dataclasses import dataclass
from typing import Any

import pytest

from relay_jax.models.unet import UNet
from relay_jax.values import check_size, check_value, check_values, memory_of_machine


@dataclass(frozen=True)
class Fields:
    whole: int
    number: float
    text: str
    switch: bool
    several: tuple[int, ...]
    s_max: float
    maybe: int | None
    other: dict


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("whole", 2**53),
        ("number", 3),
        ("number", -1e30),
        ("text", ""),
        ("switch", False),
        ("several", ()),
        ("several", [1, 2]),
        ("s_max", math.inf),
        ("maybe", None),
        ("maybe", 3),
        ("other", 3),  # not looked at
        ("unknown", math.nan),  # refused by the class itself
    ],
)
def test_values_of_the_right_type_are_let_through(name: str, value: Any) -> None:
    check_values("section", Fields, {name: value})


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("whole", 1.0, "section.whole must be a whole number, not 1.0"),
        ("whole", True, "a whole number, not True"),
        ("whole", "1", "a whole number, not '1'"),
        ("whole", None, "a whole number, not None"),
        ("whole", 10**30, "at most 9007199254740992, not 1000"),
        ("number", math.nan, "section.number must be a finite number, not nan"),
        ("number", math.inf, "a finite number, not inf"),
        ("number", 10**400, "a finite number, not 1000"),
        ("number", False, "must be a number, not False"),
        ("s_max", -math.inf, "a finite number, not -inf"),
        ("s_max", math.nan, "a finite number, not nan"),
        ("text", b"x", "must be a text, not b'x'"),
        ("switch", 1, "must be True or False, not 1"),
        ("several", 3, "must be a tuple like (1, 2), not 3"),
        ("several", (1, 2.5), "section.several must be a whole number, not 2.5"),
        ("several", tuple(range(10**5)), "has 100,000 numbers; 64 are the most"),
        ("maybe", "x", "a whole number, not 'x'"),
    ],
)
def test_others_are_refused_in_one_short_line(name: str, value: Any, says: str) -> None:
    with pytest.raises(ValueError) as error:
        check_values("section", Fields, {name: value})
    assert says in str(error.value) and len(str(error.value)) < 200


def test_a_number_alone_has_its_key_in_the_message() -> None:
    with pytest.raises(ValueError, match="seed must be a whole number, not 'x'"):
        check_value("seed", int, "x")


def test_a_network_beyond_the_machine_is_refused_before_it_is_traced() -> None:
    small = UNet(resolution=8, channels=8, multipliers=(1, 2), blocks=1, head_width=8)
    check_size(small)
    with pytest.raises(ValueError, match=r"needs at least .* GB for its weights .* this machine"):
        check_size(small.clone(channels=10**9))
    assert 10**8 < memory_of_machine() < 10**15

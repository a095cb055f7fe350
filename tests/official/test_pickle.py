"""The interpreter of pickles: plain data as Python writes them, and no name that is not listed."""

import pickle
from typing import Any

import pytest

from relay_jax.errors import UserError
from relay_jax.official.pickle import Machine, Name, Record, show

PLAIN = {
    "numbers": [0, 255, 65_536, -1, 1 << 200, 0.1, True, None],
    "texts": ("", "\u00e4", "x" * 300),
    "nested": {"a": {"b": [[], {}, ()]}},
}


def run(data: bytes, **names: Name) -> Any:
    return Machine(memoryview(data), {f"module.{key}": name for key, name in names.items()}).run()


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_plain_data_are_what_python_has_pickled(protocol: int) -> None:
    assert run(pickle.dumps(PLAIN, protocol)) == PLAIN


def test_a_name_on_the_list_does_what_the_list_says_and_no_other_is_known() -> None:
    call = b"\x80\x02cmodule\nf\nK\x05\x85R."  # f(5)
    assert run(call, f=Name("f", lambda _, args: args[0] + 1)) == 6
    with pytest.raises(UserError, match="which is not on the list of allowed"):
        run(call)
    with pytest.raises(UserError, match="not a function on the list"):
        run(call, f=Name("f", is_class=True))


def test_objects_of_listed_classes_are_records_of_their_state() -> None:
    data = b"\x80\x02cmodule\nC\n)\x81}X\x01\x00\x00\x00aK\x01sb."
    record = run(data, C=Name("package.C", is_class=True))
    assert isinstance(record, Record) and (record.class_name, record.state) == ("C", {"a": 1})


@pytest.mark.parametrize("end", range(0, 40, 3))
def test_a_pickle_that_ends_early_is_refused(end: int) -> None:
    with pytest.raises(UserError, match="truncated or damaged"):
        run(pickle.dumps(PLAIN, 2)[:end])


def test_whatever_a_file_says_is_shown_as_one_short_line() -> None:
    for value in ("a\nb\x1b[2J", "x" * 1000, 1 << 1000, (1, 2), object(), {"a": 1}):
        text = show(value)
        assert len(text) <= 80 and text.isprintable(), text

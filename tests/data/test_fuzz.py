"""Hostile files: every reader gives data, or one line that refuses them, at a bounded cost."""

from pathlib import Path

import pytest

from benchmarks.mutants import READERS, fuzz

CASES = 200


@pytest.mark.filterwarnings("ignore")  # of Pillow and zipfile, about what is wrong
@pytest.mark.parametrize("reader", READERS)
def test_every_reader_refuses_what_it_cannot_read_in_one_line(tmp_path: Path, reader: str) -> None:
    outcome = fuzz(reader, tmp_path, range(CASES))
    assert not outcome.faults
    # Neither all harmless nor all hopeless: they would try nothing.
    assert outcome.cases == CASES and min(outcome.read, outcome.refused) > CASES // 20
    assert outcome.slowest < 10 and outcome.grown < 1

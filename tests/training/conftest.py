"""The stage that most tests of the training use, and what is printed."""

import pytest
from absl import logging

from relay_jax.stage import Stage
from tests.training.test_loop import stage_of


@pytest.fixture(scope="module")
def base() -> Stage:
    return stage_of(96, "base")


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What is printed."""
    printed: list[str] = []

    def info(text: object, *values: object) -> None:
        if isinstance(text, str):  # Orbax logs dictionaries
            printed.append(text % values if values else text)

    monkeypatch.setattr(logging, "info", info)
    return printed

"""Every test of the pictures draws the same noise, whichever ran before it."""

import numpy as np
import pytest

from tests.plots import images


@pytest.fixture(autouse=True)
def same_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "RNG", np.random.default_rng(0))

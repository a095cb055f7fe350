"""The benchmark of decoders times those that are installed, and finds out whose pixels agree."""

import pytest

from benchmarks.input import jpegs, measure_decoders


def test_every_installed_decoder_is_timed_and_pillow_agrees_with_itself(
    capsys: pytest.CaptureFixture[str],
) -> None:
    data = jpegs("", count=2)
    assert all(100_000 < len(item) < 250_000 and item[:2] == b"\xff\xd8" for item in data)
    measure_decoders(data, rounds=1)
    rows = {
        line.split(" | ")[0]: line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("| ")
    }
    assert rows["| Pillow, cropped as it is (the loader)"].endswith("| 0 |")
    assert rows["| Pillow, by way of an array"].endswith("| 0 |")
    assert not rows["| Pillow, reduced by the DCT (draft)"].endswith("| 0 |")

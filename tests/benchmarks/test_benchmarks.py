"""The benchmarks on the smallest relay: that they measure what they say, and what they refuse."""

import itertools
import json
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from ml_collections import ConfigDict

from benchmarks import compare, samplers, throughput, timing
from benchmarks.programs import Program, markdown, trace_train, with_settings
from benchmarks.timing import in_turns, ratio
from relay_jax.config import build
from relay_jax.errors import UserError
from relay_jax.planning.cost import train_flops
from relay_jax.relay import load
from relay_jax.runtime.flops import matmul_flops
from relay_jax.stage import Stage


def relay(config: ConfigDict) -> Stage:
    config.stages.relay.sample.num_steps = 4
    return with_settings(build(config)[1], batch=8)


def test_turns_alternate_in_both_orders_and_leave_the_first_call_of_each_out() -> None:
    calls: list[str] = []
    seconds = in_turns(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=2, calls=2
    )
    assert "".join(calls) == "ab" + "aaabbb" + "bbbaaa"
    assert {name: times.shape for name, times in seconds.items()} == {"a": (2,), "b": (2,)}


def test_a_round_takes_the_fastest_of_its_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = itertools.chain.from_iterable(
        (10 * n, 10 * n + length) for n, length in enumerate((3, 2, 5, 4))
    )
    monkeypatch.setattr(timing, "time", SimpleNamespace(perf_counter=partial(next, ticks)))
    assert in_turns({"a": lambda: None}, rounds=2, calls=2)["a"].tolist() == [2, 4]


def test_a_ratio_is_taken_pair_by_pair() -> None:
    drifting = np.array([1.0, 2.0, 4.0])
    assert ratio(3 * drifting, drifting) == (3, 3, 3)


def test_throughput_measures_training_and_sampling(config: ConfigDict) -> None:
    stage = relay(config)
    rows = throughput.measure(stage, ("train", "sample"), rounds=1)
    assert [(row["stage"], row["what"], row["batch"]) for row in rows] == [
        ("relay", "train", 8),
        ("relay", "sample", 8),
    ]
    for row in rows:
        assert float(row["images/s"]) == pytest.approx(8 / (float(row["ms"]) / 1e3), rel=0.01)
        assert row["utilisation"] == "peak unknown" and float(row["compile s"]) > 0
    assert len(markdown(rows).splitlines()) == 4


def test_the_flops_are_those_of_the_plan_and_the_utilisation_follows(
    config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = relay(config)
    flops = train_flops(with_settings(stage, 1)) * 8
    program = Program(
        run=lambda: None, images=8, flops=flops, trace_seconds=0, compile_seconds=0, memory=1
    )
    monkeypatch.setattr(throughput, "peak_flops", lambda kind: flops / jax.device_count())
    assert throughput.row(stage, "train", program, np.array([2.0]))["utilisation"] == "50.0%"
    assert matmul_flops(trace_train(stage).jaxpr.jaxpr) == pytest.approx(flops, rel=0.01)


def test_two_settings_are_compared_per_image(config: ConfigDict) -> None:
    a, b = (
        with_settings(build(compare.changed(config, "relay", text))[1], 8)
        for text in ("", "model.remat=True")
    )
    assert (a.network.remat, b.network.remat) == (False, True)
    (row,) = compare.compare(a, b, ["forward"], rounds=2)
    assert float(row["a / b"]) > 0 and row["stage"] == "relay"


def test_samplers_of_a_run_are_timed_in_turns(tiny_run: Path) -> None:
    first, second = samplers.rows(load(tiny_run), ["official", "heun:num_steps=2"], 8, 1)
    assert first["sampler"] == "official" and first["faster than the first"] == "1.00"
    # Three calls of the first stage, and one level of the relay below its hand-off.
    assert second["calls"] == 4 < first["calls"] and float(second["images/s"]) > 0


@pytest.mark.parametrize(
    "text", ["model.nothing=1", "nothing.remat=True", "model.remat.x=1", "model.channels=wide"]
)
def test_settings_that_are_not_there_or_of_another_type_are_refused(
    config: ConfigDict, text: str
) -> None:
    with pytest.raises(UserError, match=text.split("=")[0]):
        compare.changed(config, "relay", text)


def test_the_networks_of_the_baseline_are_the_same_function(config: ConfigDict) -> None:
    pytest.importorskip("torch")
    from benchmarks.programs import random_params
    from benchmarks.pytorch import differences
    from relay_jax.runtime.sharding import make_mesh

    config.stages.relay.model.update(multipliers=(1, 2), attention=(8,))
    stage = relay(config)
    assert max(differences(stage, random_params(stage, make_mesh()))) < 1e-4


def test_results_are_written_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from benchmarks import settings

    settings.finish({"device": "cpu"}, [{"stage": "base", "ms": "1"}], tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text()) == {
        "device": "cpu",
        "rows": [{"stage": "base", "ms": "1"}],
    }
    assert "| base | 1 |" in capsys.readouterr().out

"""What the TPU compiler's output means, and how it is asked."""

import importlib.util
import pickle
import re
import subprocess
import sys

import jax
import pytest
from ml_collections import ConfigDict

from relay_jax.config import build
from relay_jax.errors import UserError
from relay_jax.planning import tpu_compile
from relay_jax.planning.cost import memory
from relay_jax.planning.tpu_compile import (
    Topology,
    add_time,
    analyse,
    compile_stage,
    describe,
    lower_step,
    require_libtpu,
)
from relay_jax.runtime.flops import DEVICES


def test_a_stage_goes_through_a_pickle(config: ConfigDict) -> None:
    for stage in build(config):
        assert pickle.loads(pickle.dumps(stage)) == stage


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_compiled_step_takes_the_arguments_that_the_plan_counts(
    config: ConfigDict, fsdp: int
) -> None:
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    config.stages.base.model.channels = 32  # large enough that something is split
    stage = build(config)[0]
    figures = analyse(lower_step(stage, jax.devices()[:4], fsdp).compile(), 1)
    need = memory(stage, 4, fsdp, remat=False)
    state, batch, counters_and_key = (
        need.parameters + need.optimiser + need.ema,
        4 * (8 * 8 * 3 + 4),
        3 * 4 + 8,
    )
    assert figures["hbm"]["arguments"] == state + batch + counters_and_key
    assert figures["hbm"]["total"] == sum(
        size for kind, size in figures["hbm"].items() if kind != "total"
    )
    assert figures["collectives"]["all-reduce"] > 0 and (
        figures["collectives"].get("all-gather", 0) > 0
    ) == (fsdp > 1)


def test_the_compilers_cycles_become_a_step_and_a_utilisation() -> None:
    device = next(d for d in DEVICES if d.name == "v5e")
    hbm = {
        "arguments": 10**9,
        "temporaries": 2 * 10**9,
        "outputs": 0,
        "program": 0,
        "total": 3 * 10**9,
    }
    compiled = {
        "topology": "v5e:2x2",
        "compile_seconds": 9.0,
        "hbm": hbm,
        "flops": 1e12,
        "bytes_accessed": 1e9,
        "collectives": {"all-reduce": 2},
        "cycles": 3 * 10**8,
        "without_estimate": 0,
        "parts": 1,
    }
    figures = {"batch": 64, "steps": 86_400, "train_flops": 197e10, "compiled": compiled}
    add_time(figures, device, chips=4)
    assert (compiled["step_seconds"], compiled["days"], compiled["fits"]) == (0.2, 0.2, True)
    assert compiled["utilisation"] == pytest.approx(64 * 197e10 / 4 / 0.2 / 197e12)
    text = "\n".join(describe(compiled))
    assert (
        "in all 3 GB, fits" in text
        and "2 all-reduce" in text
        and "step 0.2 s" in text
        and "320 images/s" in text
    )
    assert "does not fit: why" in "\n".join(describe({**compiled, "error": "does not fit: why"}))


def test_cycles_in_loops_count_as_often_as_the_loops_run_and_unknown_ones_apart() -> None:
    def computation(head: str, *lines: str) -> str:
        return "\n".join(
            [f"{head} (p: f32[2]) -> f32[2] {{", *(f"  {line}" for line in lines), "}", "", ""]
        )

    def fusion(cycles: int) -> str:
        return f'%f.1 = f32[2]{{0}} fusion(%a), backend_config={{"estimated_cycles":"{cycles}"}}'

    def loop(number: int) -> str:
        names = f"condition=%c.{number}, body=%body.{number}"
        return f"%while.{number} = (f32[2]) while(%t), {names}, metadata={{}}"

    text = "".join(
        [
            computation("%body.1", fusion(100), loop(2)),
            computation("%body.2", fusion(1000)),
            computation("%c.1", "%n = s32[]{:T(128)} parameter(0)"),  # says not how often
            computation("%c.2", "%constant.1 = s32[]{:T(128)} constant(6)"),
            computation("%other.1", fusion(10)),
            computation("ENTRY %main", fusion(1), fusion(2**63 - 1), loop(1)),
        ]
    )
    assert tpu_compile.estimated_cycles(text, 1) == (111 + 6000, 1)
    assert tpu_compile.estimated_cycles(text, 4) == (411 + 24_000, 1)


def test_a_long_compilation_says_that_it_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    messages: list[str] = []
    monkeypatch.setattr(tpu_compile, "PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr(
        tpu_compile.logging, "info", lambda line, *values: messages.append(line % values)
    )
    code = (
        "import sys, time; text = sys.stdin.read(); time.sleep(0.5); print(text); "
        "print('oh', file=sys.stderr)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert tpu_compile._wait(process, b"stage", "compiling") == (b"stage\n", b"oh\n")
    assert messages and all(re.fullmatch(r"compiling: \d+ s so far", line) for line in messages)


@pytest.mark.parametrize(
    "name, chips, accelerator",
    [
        ("v5e:4x4", 16, "v5litepod-16"),
        ("v6e:2x2", 4, "v6e-4"),
        ("v5p:2x2x4", 16, "v5p-32"),
        ("v4:2x2x1", 4, "v4-8"),
    ],
)
def test_topologies_are_named_as_the_cloud_does(name: str, chips: int, accelerator: str) -> None:
    topology = Topology(name)
    assert topology.chips == chips and topology.environment["TPU_ACCELERATOR_TYPE"] == accelerator
    assert topology.generation in {device.name for device in DEVICES if device.clock}


@pytest.mark.parametrize(
    "name", ["v5e", "v5e:", "v5e:4", "v5e:2x2x2", "v5p:2x2", "v5e:0x4", "v5e:4x4 ", "A100:2x2"]
)
def test_other_topologies_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="unknown topology"):
        Topology(name)


def test_without_libtpu_the_message_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    command = rf'needs libtpu: pip install "jax\[tpu\]=={jax.__version__}"'
    with pytest.raises(UserError, match=command):
        require_libtpu()


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install jax[tpu])"
)
def test_a_slice_that_the_compiler_does_not_know_is_refused(config: ConfigDict) -> None:
    with pytest.raises(UserError, match="the TPU compiler failed for v5e:3x3"):
        compile_stage(build(config)[0], Topology("v5e:3x3"), 1)

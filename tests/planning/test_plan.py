"""Cost before launch: counted FLOPs, memory by hand, sampler calls, times, what the TPU
compiler's output means."""

import importlib.util
import json
import math
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from configs import celebahq256, demo, imagenet256
from relay_jax.config import ConfigError, Guidance, Stage, build
from relay_jax.models.unet import parameter_count
from relay_jax.planning import plan as planner
from relay_jax.planning import tpu_compile
from relay_jax.planning.plan import (
    Memory,
    activation_bytes,
    estimate,
    forward_flops,
    memory,
    plan,
    sampler_calls,
    table,
    train_flops,
)
from relay_jax.planning.tpu_compile import (
    Topology,
    abstract_state,
    add_time,
    analyse,
    describe,
    lower_step,
)
from relay_jax.runtime.flops import DEVICES, matmul_flops, si
from relay_jax.training.state import TrainState

BASE, RELAY = build(imagenet256.get_config())
float32 = jnp.float32


def shapes(**leaves: tuple[int, ...]) -> dict[str, jax.ShapeDtypeStruct]:
    return {name: jax.ShapeDtypeStruct(shape, float32) for name, shape in leaves.items()}


def flops_of(function: object, *arguments: tuple[int, ...]) -> int:
    return matmul_flops(
        jax.make_jaxpr(function)(
            *(jax.ShapeDtypeStruct(shape, float32) for shape in arguments)
        ).jaxpr
    )


# FLOPs


@pytest.mark.parametrize(
    "stage, parameters, gmac",
    [(BASE, 295_899_267, 109.7), (RELAY, 553_831_171, 1119.4)],
    ids=["base", "relay"],
)
def test_the_published_networks_cost_what_spec_says(
    stage: Stage, parameters: int, gmac: float
) -> None:
    assert parameter_count(abstract_state(stage)[1].params) == parameters
    forward = forward_flops(stage)
    assert forward / 2e9 == pytest.approx(gmac, rel=0.001)
    assert train_flops(stage) == pytest.approx(3 * forward, rel=0.001)


def test_xla_counts_the_same_program_but_for_padding() -> None:
    params = abstract_state(BASE)[1].params
    inputs = [jax.ShapeDtypeStruct(shape, float32) for shape in ((1, 64, 64, 3), (1,), (1, 1000))]
    lowered = jax.jit(lambda p, *inputs: BASE.network.apply({"params": p}, *inputs)).lower(
        params, *inputs
    )
    assert 0.95 < lowered.cost_analysis()["flops"] / forward_flops(BASE) < 1


def conv(x: jax.Array, kernel: jax.Array) -> jax.Array:
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def test_products_are_counted_by_hand() -> None:
    assert flops_of(lambda a, b: a @ b, (3, 5), (5, 7)) == 2 * 3 * 5 * 7
    assert (
        flops_of(lambda a, b: jnp.einsum("bij,bjk->bik", a, b), (2, 3, 5), (2, 5, 7))
        == 2 * 2 * 3 * 5 * 7
    )
    assert flops_of(conv, (2, 8, 8, 3), (3, 3, 3, 5)) == 2 * 2 * 64 * 9 * 3 * 5
    assert flops_of(lambda a: jnp.sin(a) + a, (3, 5)) == 0


def test_a_gradient_costs_two_more_products_and_remat_a_third() -> None:
    def loss(x: jax.Array, kernel: jax.Array) -> jax.Array:
        return jnp.sum(jnp.square(conv(jnp.square(conv(x, kernel)), kernel)))

    once, inputs = 2 * 64 * 9 * 4 * 4, ((1, 8, 8, 4), (3, 3, 4, 4))
    assert flops_of(jax.grad(loss, (0, 1)), *inputs) == 2 * 3 * once
    assert flops_of(jax.grad(jax.checkpoint(loss), (0, 1)), *inputs) == 2 * 4 * once


def test_loops_count_their_length_and_branches_the_dearest() -> None:
    assert (
        flops_of(lambda a: jax.lax.scan(lambda c, _: (c @ a, None), a, length=6)[0], (4, 4))
        == 6 * 2 * 64
    )
    assert (
        flops_of(lambda a: jax.lax.cond(a[0, 0] > 0, lambda: a @ a @ a, lambda: a), (4, 4))
        == 2 * 2 * 64
    )
    assert flops_of(jax.jit(lambda a: a @ a), (4, 4)) == 2 * 64


# Sampling


@pytest.mark.parametrize(
    "file, calls",
    [(imagenet256, [(511, 511), (199, 398)]), (celebahq256, [(239, 239), (107, 107)])],
    ids=["imagenet", "celebahq"],
)
def test_the_published_samplers_make_the_published_calls(
    file: ModuleType, calls: list[tuple[int, int]]
) -> None:
    assert [sampler_calls(stage) for stage in build(file.get_config())] == calls


def test_guidance_in_an_interval_doubles_the_calls_inside_it() -> None:
    sigmas = RELAY.sampler.sigmas()  # 100 levels and the closing 0
    inside = replace(
        RELAY, guidance=Guidance(weight=2.0, interval=(float(sigmas[3]), float(sigmas[1])))
    )
    assert sampler_calls(inside) == (
        199,
        199 + 3 + 3,
    )  # levels 1 to 3, as levels and as corrections
    assert sampler_calls(
        replace(RELAY, guidance=Guidance(weight=1.0, interval=(0.0, math.inf)))
    ) == (199, 199)


# Memory


@pytest.fixture
def by_hand(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """A stage whose state is one kernel of 36,864 numbers and a bias of 64, and whose
    activations are round."""
    params = shapes(kernel=(3, 3, 64, 64), bias=(64,))
    zero = jax.ShapeDtypeStruct((), jnp.int32)
    state = TrainState(
        step=zero,
        params=params,
        ema=params,
        opt_state=jax.eval_shape(optax.adam(1e-3).init, params),
        nonfinite_row=zero,
        nonfinite_total=zero,
    )
    monkeypatch.setattr(planner, "abstract_state", lambda _: (None, state))
    monkeypatch.setattr(
        planner, "activation_bytes", lambda _, remat: (100 if remat else 1000, 0 if remat else 500)
    )
    stage, *_ = build(demo.get_config("smoke"))
    return replace(stage, resolution=2, train=replace(stage.train, batch=32))


@pytest.mark.parametrize("fsdp, kernel", [(1, 36_864), (4, 9_216)])
def test_memory_is_what_one_computes_by_hand(by_hand: Stage, fsdp: int, kernel: int) -> None:
    got = memory(by_hand, devices=8, fsdp=fsdp, remat=False)
    tree = 4 * (kernel + 64)  # the bias is too small to be split
    counters = 2 * 4  # of Adam and of its schedule
    assert got.parameters == got.ema == got.gradients == tree
    assert 2 * tree <= got.optimiser <= 2 * tree + counters
    assert (got.images, got.per_image, got.copies) == (4, 1000 + 2 * 2 * 3 + 4, 500)
    assert got.activations == 4 * 1016
    assert got.total == got.fixed + got.activations == 3 * tree + got.optimiser + 500 + 4 * 1016


def test_accumulation_splits_the_images_and_doubles_the_gradients(by_hand: Stage) -> None:
    whole = memory(by_hand, 2, 1, remat=True)
    parts = memory(replace(by_hand, train=replace(by_hand.train, accumulate=4)), 2, 1, remat=True)
    assert (whole.images, parts.images) == (16, 4) and parts.gradients == 2 * whole.gradients


def test_room_is_the_number_of_images_beside_the_state() -> None:
    need = Memory(
        parameters=100, optimiser=200, ema=100, gradients=100, copies=50, per_image=30, images=4
    )
    assert (need.fixed, need.total) == (550, 670)
    assert [need.room(size) for size in (0, 550, 579, 580, 670, 699)] == [0, 0, 0, 1, 4, 4]


def test_remat_keeps_less_and_the_estimate_grows_with_the_image(config: ConfigDict) -> None:
    base, relay = build(config)
    for stage in (base, relay):
        kept, copies = activation_bytes(stage, remat=False)
        lean, lean_copies = activation_bytes(stage, remat=True)
        assert (
            0 < lean < kept and copies == lean_copies == 0
        )  # float32: the weights are used as they are
    assert activation_bytes(relay, False)[0] > 2 * activation_bytes(base, False)[0]
    half = replace(base, network=base.network.clone(dtype=jnp.dtype("bfloat16")))
    weights = parameter_count(abstract_state(base)[1].params)
    assert 0 < activation_bytes(half, False)[1] <= 2 * weights


@pytest.mark.parametrize("fsdp", [1, 4])
def test_a_compiled_step_takes_the_arguments_that_the_plan_counts(
    config: ConfigDict, fsdp: int
) -> None:
    if jax.device_count() < 4:
        pytest.skip("needs four devices")
    config.stages.base.model.channels = 32  # large enough that something is split
    stage = build(config)[0]
    found = analyse(lower_step(stage, jax.devices()[:4], fsdp).compile(), 1)
    need = memory(stage, 4, fsdp, remat=False)
    state, batch, counters_and_key = (
        need.parameters + need.optimiser + need.ema,
        4 * (8 * 8 * 3 + 4),
        3 * 4 + 8,
    )
    assert found["hbm"]["arguments"] == state + batch + counters_and_key
    assert found["hbm"]["total"] == sum(
        size for kind, size in found["hbm"].items() if kind != "total"
    )
    assert found["collectives"]["all-reduce"] > 0 and (
        found["collectives"].get("all-gather", 0) > 0
    ) == (fsdp > 1)


# Time


def test_days_and_seconds_by_hand(config: ConfigDict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(planner, "train_flops", lambda _: 10**12)
    monkeypatch.setattr(planner, "forward_flops", lambda _: 10**11)
    stage = build(config)[0]
    stage = replace(stage, train=replace(stage.train, batch=64, images=788 * 86_400 * 2))
    report = estimate([stage], devices=8, utilisation=0.5)
    row = report["stages"][0]["hardware"]["v5e"]  # 8 x 197e12 x 0.5 = 788e12 FLOP/s
    assert row["images_per_second"] == pytest.approx(788) and row["days"] == pytest.approx(2)
    assert row["step_seconds"] == pytest.approx(64 / 788)
    evaluations = report["stages"][0]["sampling"]["evaluations"]
    assert row["sampling_seconds"] == pytest.approx(evaluations / 10 / 98.5)
    total = report["total"]
    assert total["days"]["v5e"] == pytest.approx(2) and set(total["days"]) == {
        device.name for device in DEVICES
    }
    assert total["sampling"]["samples_hours"]["v5e"] == pytest.approx(
        50_000 * evaluations / 10 / 98.5 / 8 / 3600
    )


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
    found = {"batch": 64, "steps": 86_400, "train_flops": 197e10, "compiled": compiled}
    add_time(found, device, chips=4)
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
        return f"%while.{number} = (f32[2]) while(%t), condition=%c.{number}, body=%body.{number}, metadata={{}}"

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
    said: list[str] = []
    monkeypatch.setattr(tpu_compile, "PROGRESS_SECONDS", 0.1)
    monkeypatch.setattr(
        tpu_compile.logging, "info", lambda line, *values: said.append(line % values)
    )
    code = "import sys, time; text = sys.stdin.read(); time.sleep(0.5); print(text); print('oh', file=sys.stderr)"
    with subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as process:
        assert tpu_compile._wait(process, b"stage", "compiling") == (b"stage\n", b"oh\n")
    assert said and all(re.fullmatch(r"compiling: \d+ s so far", line) for line in said)


# Report and command


def test_the_plan_is_printed_and_written(
    config: ConfigDict, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    report = plan(
        build(config), devices=4, utilisation=0.3, hardware=["v5p", "H100"], workdir=tmp_path
    )
    assert json.loads((tmp_path / "plan.json").read_text()) == report
    text = capsys.readouterr().out
    assert text == table(report) + "\n" and max(map(len, text.splitlines())) < 200
    for word in (
        "4 devices as data x fsdp = 4 x 1",
        "utilisation 30%",
        "stage base: 8 px",
        "stage relay: 16 px",
        "activations",
        "denoiser calls",
        "50,000 samples",
        "v5p",
        "H100",
        "459 T",
        "80 GB",
        "yes",
    ):
        assert word in text, word
    assert "v5e" not in text and "compiler" not in text


def test_by_default_all_devices_are_those_that_divide_every_batch(config: ConfigDict) -> None:
    assert estimate(build(config)[:1], hardware=["v4"])["devices"] == 16


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(hardware=["B200"]), "unknown device 'B200'; known are v4, v5e, v5p, v6e, A100, H100"),
        (dict(utilisation=0.0), r"utilisation must lie in \(0, 1\], not 0.0"),
        (dict(utilisation=40.0), "utilisation must lie in"),
        (dict(devices=4, fsdp=3), "mesh.fsdp 3 does not divide 4 devices"),
        (dict(devices=32), "stage base: train.batch 16 is not divisible by 32 devices"),
        (dict(topology="v9:2x2"), "unknown topology 'v9:2x2'"),
        (dict(topology="v5e:4x4", devices=8), "v5e:4x4 has 16 chips, not 8"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_in_one_line(
    config: ConfigDict, settings: dict, message: str
) -> None:
    with pytest.raises(ConfigError, match=message) as caught:
        plan(build(config), **settings)
    assert "\n" not in str(caught.value)


def test_numbers_are_written_with_a_prefix() -> None:
    assert [si(x) for x in (0, 12, 999, 219.3e9, 1.003e15)] == [
        "0 ",
        "12 ",
        "999 ",
        "219.3 G",
        "1.003 P",
    ]


# The TPU compiler


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
    with pytest.raises(ConfigError, match="unknown topology"):
        Topology(name)


def test_without_libtpu_the_message_says_how_to_get_it(
    config: ConfigDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with pytest.raises(
        ConfigError, match=rf'needs libtpu: pip install "jax\[tpu\]=={jax.__version__}"'
    ):
        plan(build(config), topology="v5e:2x2")


@pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None, reason="needs libtpu (pip install jax[tpu])"
)
def test_the_tpu_compiler_takes_the_training_step(
    config: ConfigDict, capsys: pytest.CaptureFixture[str]
) -> None:
    found = plan(build(config)[:1], topology="v5e:2x2")["stages"][0]["compiled"]
    assert (
        found["hbm"]["arguments"] > 0
        and found["cycles"] > 0
        and found["collectives"]["all-reduce"] > 0
    )
    assert found["fits"] and 0 < found["utilisation"] < 1
    assert "TPU compiler, v5e:2x2" in capsys.readouterr().out
    with pytest.raises(ConfigError, match="the TPU compiler failed for v5e:3x3"):
        tpu_compile.compile_stage(build(config)[0], Topology("v5e:3x3"), 1)

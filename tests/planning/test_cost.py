"""What a stage costs: counted FLOPs, calls of the sampler, memory by hand."""

import math
from dataclasses import replace
from types import ModuleType

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import pytest
from ml_collections import ConfigDict

from relay_jax.config import build
from relay_jax.configs import celebahq256, demo, imagenet256
from relay_jax.diffusion.guidance import Guidance
from relay_jax.models.network import parameter_count
from relay_jax.planning import cost
from relay_jax.planning.cost import (
    Memory,
    abstract_state,
    activation_bytes,
    forward_flops,
    memory,
    sampler_calls,
    train_flops,
)
from relay_jax.runtime.flops import matmul_flops, si
from relay_jax.stage import Stage
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
def test_the_published_networks_cost_the_papers_say(
    stage: Stage, parameters: int, gmac: float
) -> None:
    assert parameter_count(abstract_state(stage).params) == parameters
    forward = forward_flops(stage)
    assert forward / 2e9 == pytest.approx(gmac, rel=0.001)
    assert train_flops(stage) == pytest.approx(3 * forward, rel=0.001)


def test_xla_counts_the_same_program_but_for_padding() -> None:
    params = abstract_state(BASE).params
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


def test_numbers_are_written_with_a_prefix() -> None:
    numbers = {0: "0 ", 12: "12 ", 999: "999 ", 219.3e9: "219.3 G", 1.003e15: "1.003 P"}
    assert {value: si(value) for value in numbers} == numbers


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
    sigmas = RELAY.sampler.levels()  # 100 levels and the closing 0
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
    monkeypatch.setattr(cost, "abstract_state", lambda _: state)
    monkeypatch.setattr(
        cost, "activation_bytes", lambda _, remat: (100 if remat else 1000, 0 if remat else 500)
    )
    stage, *_ = build(demo.get_config("smoke"))
    network = stage.network.clone(resolution=2)
    return replace(stage, network=network, train=replace(stage.train, batch=32))


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
    weights = parameter_count(abstract_state(base).params)
    assert 0 < activation_bytes(half, False)[1] <= 2 * weights


class Pointwise(nn.Module):
    """The least network: one dense layer on every pixel, which recomputes nothing."""

    resolution: int = 8
    image_channels: int = 3
    num_classes: int = 0
    num_augment: int = 0
    dtype: jnp.dtype = jnp.float32
    remat: bool = False

    def check(self) -> None:
        """Has no fields that could be wrong."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        hidden = nn.silu(nn.Dense(16, name="wide")(x) + c_noise[:, None, None, None])
        return nn.Dense(3, name="narrow")(hidden)


def test_any_network_has_costs(config: ConfigDict) -> None:
    stage = replace(build(config)[0], network=Pointwise())
    once = 2 * 8 * 8 * 3 * 16
    assert forward_flops(stage) == 2 * once
    # The gradient by the weights for both layers, by the input for the second alone.
    assert train_flops(stage) == 5 * once
    kept, lean = (memory(stage, 1, 1, remat) for remat in (False, True))
    assert kept.parameters == 4 * (3 * 16 + 16 + 16 * 3 + 3)
    assert kept == lean and kept.per_image > 8 * 8 * 16 * 4

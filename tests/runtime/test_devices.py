"""Devices and memory of CPU programs, each case in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from relay_jax.models.ops import conv
from relay_jax.runtime.devices import compiler_options, jit
from relay_jax.runtime.sharding import make_mesh

DEVICES = """
import sys
import jax
from relay_jax.runtime.devices import setup, training_devices
setup(int(sys.argv[1]), int(sys.argv[2]))
print(len(jax.devices()), len(training_devices()))
"""
PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from relay_jax.runtime.devices import setup
if sys.argv[1] == "reuse":
    setup()
run = jax.jit(lambda x: jnp.mean((x @ x.T) @ x))        # a temporary of 100 MB
x = jnp.ones((5_000, 16))
def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sorted(faults_of_a_call() for _ in range(15))[5])     # the first ones find the memory
"""


def numbers(program: str, *arguments: object, **variables: str) -> list[int]:
    """What a program prints, in an environment that says nothing else about devices."""
    environment = {
        name: value
        for name, value in os.environ.items()
        if name not in ("JAX_NUM_CPU_DEVICES", "XLA_FLAGS")
    }
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=True,
        env=environment | {"PYTHONPATH": str(Path(__file__).parents[2])} | variables,
    )
    return [int(word) for word in done.stdout.split()]


def test_sampling_has_a_device_on_each_core_and_training_one() -> None:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    assert numbers(DEVICES, 1000, 1) == [cores, 1]


@pytest.mark.parametrize(("most", "bytes_on_each"), [(1, 1), (1000, 2**60)])
def test_there_are_no_more_devices_than_images_or_than_memory_holds_weights(
    most: int, bytes_on_each: int
) -> None:
    assert numbers(DEVICES, most, bytes_on_each) == [1, 1]


@pytest.mark.parametrize(
    "variables",
    [{"JAX_NUM_CPU_DEVICES": "3"}, {"XLA_FLAGS": "--xla_force_host_platform_device_count=3"}],
)
def test_a_number_of_devices_that_the_user_has_chosen_stays(variables: dict[str, str]) -> None:
    assert numbers(DEVICES, 1000, 1, **variables) == [3, 3]


def test_the_convolutions_of_a_device_alone_are_not_those_of_ynnpack_but_its_products_are() -> None:
    mesh = make_mesh(devices=jax.devices()[:1])
    program = jit(lambda x, kernel: conv(x, kernel) @ kernel[0, 0], mesh)
    text = program.lower(jnp.ones((4, 16, 16, 32)), jnp.ones((3, 3, 32, 32))).compile().as_text()
    assert "convolution(" in text.split("ENTRY")[1] and "ynn_fusion" in text
    assert not compiler_options(make_mesh(devices=jax.devices()[:2]))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc's malloc")
def test_later_calls_of_a_program_take_no_new_pages() -> None:
    one_device = {"JAX_NUM_CPU_DEVICES": "1"}
    assert (
        numbers(PROGRAM, "reuse", **one_device)[0]
        < 1_000
        < 10_000
        < numbers(PROGRAM, "plain", **one_device)[0]
    )

"""Memory of CPU programs stays with the process: page faults per call, counted in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = """
import resource, sys
import jax, jax.numpy as jnp
from relay_jax.host_memory import reuse_on_cpu
if sys.argv[1] == "reuse":
    reuse_on_cpu()
run = jax.jit(lambda x: jnp.mean((x @ x.T) @ x))        # a temporary of 100 MB
x = jnp.ones((5_000, 16))
def faults_of_a_call():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run(x).block_until_ready()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(sorted(faults_of_a_call() for _ in range(15))[5])     # the first ones find the memory
"""


def faults(how: str) -> int:
    environment = os.environ | {"JAX_NUM_CPU_DEVICES": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", PROGRAM, how], env=environment, capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="speaks to glibc's malloc")
def test_later_calls_of_a_program_take_no_new_pages() -> None:
    assert faults("reuse") < 1_000 < 10_000 < faults("plain")

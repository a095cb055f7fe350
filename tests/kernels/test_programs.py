"""The compiled programs of the sampling chain: what is in them."""

import re

import jax
import numpy as np

from relay_jax.config import build
from relay_jax.sampling.chain import sample_stage
from tests.conftest import tiny_relay
from tests.sampling.test_chain import chain_of, random_params


def test_a_sampler_never_goes_back_to_the_host() -> None:
    chain = chain_of()
    chain.compile()
    for program in chain._programs.values():
        text = program.as_text()  # type: ignore[attr-defined]
        assert "while" in text
        assert not re.search(r"infeed|outfeed|callback|\bsend\b|\brecv\b", text)


def test_guidance_runs_both_branches_in_one_batch() -> None:
    config = tiny_relay()
    config.stages.relay.train.label_dropout = 0.1
    config.stages.relay.sample.guidance = 3.0
    relay = build(config)[1]
    params = random_params(relay)
    inputs = (
        np.arange(4, dtype=np.uint32),
        np.zeros(4, np.int32),
        np.zeros((4, 8, 8, 3), np.float32),
    )
    program = jax.make_jaxpr(lambda *x: sample_stage(relay, params, *x).final)(*inputs)
    convolutions = re.findall(r"f32\[(\d+),16,16,\d+\] = conv_general_dilated", str(program))
    assert convolutions and set(convolutions) == {"8"}

"""Samples on their way through all stages: the noisy states of chosen steps, and what the
network makes of each.

The states are the sampler's own (Samples.states), so the last frame is the sample itself. Each
is shown beside D(x, sigma),
one more call of the guided network. Where the first stage adds churn, its sampler asks the
network a little above sigma, at the state with the churn's noise; the frame shows the state before.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.config import Stage
from relay_jax.sampling.chain import run_stage, stage_denoiser


@dataclass(frozen=True, kw_only=True)
class Frames:
    """One stage of a filmstrip. steps: [k] rising; sigmas: [k]; states, denoised: float32 [k,
    n, h, w, c], before each of these steps; final: [n, h, w, c]."""

    stage: str
    steps: np.ndarray
    total_steps: int
    sigmas: np.ndarray
    states: np.ndarray
    denoised: np.ndarray
    final: np.ndarray


def spread(total: int, count: int) -> np.ndarray:
    """At most `count` steps of 0 ... total - 1, evenly spread, the first and the last among
    them."""
    return np.unique(np.round(np.linspace(0, total - 1, min(count, total))).astype(int))


def filmstrip(
    stages: Sequence[tuple[Stage, dict]], seeds: Sequence[int], classes: np.ndarray, columns: int
) -> list[Frames]:
    """All stages, each with its parameters, for seeds [n] and classes [n]; at most `columns`
    steps of each stage.

    One seed at a time: memory holds all states of one image. Raises ValueError for fewer than
    two columns.
    """
    if columns < 2:
        raise ValueError(f"a filmstrip needs at least 2 steps of each stage, not {columns}")
    found: list[Frames] = []
    low_res: np.ndarray | None = None
    for stage, params in stages:
        sigmas = stage.sampler.sigmas()[:-1]
        steps = spread(len(sigmas), columns)

        def one(
            params: dict,
            seed: jax.Array,
            class_: jax.Array,
            low: jax.Array | None,
            stage: Stage = stage,
            steps: np.ndarray = steps,
            sigmas: np.ndarray = sigmas,
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            samples = run_stage(stage, params, seed, class_, low, return_states=True)
            assert samples.states is not None
            states, denoise = samples.states[steps], stage_denoiser(stage, params, class_)
            chosen = states, jnp.asarray(sigmas[steps], jnp.float32)
            return (
                states[:, 0],
                jax.lax.map(lambda at: denoise(*at), chosen)[:, 0],
                samples.final[0],
            )

        run, frames = jax.jit(one), []
        for n, seed in enumerate(seeds):
            low = None if low_res is None else low_res[n : n + 1]
            frames.append(
                jax.device_get(
                    run(params, np.array([seed], np.uint32), np.array([classes[n]], np.int32), low)
                )
            )
        states, denoised, finals = zip(*frames, strict=True)
        low_res = np.stack(finals)
        found.append(
            Frames(
                stage=stage.name,
                steps=steps,
                total_steps=len(sigmas),
                sigmas=sigmas[steps],
                states=np.stack(states, axis=1),
                denoised=np.stack(denoised, axis=1),
                final=low_res,
            )
        )
    return found

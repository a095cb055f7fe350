"""The chain of stages: seeds and classes in, images of every stage out.

Image i depends on its seed (and class) alone: every draw comes from the key
fold_in(fold_in(key(0), seed), stage). Stages hand over float images, neither clipped nor
quantised in between (SPEC section 5.2).
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relay_jax.config import Stage
from relay_jax.diffusion.guidance import classifier_free
from relay_jax.diffusion.precondition import precondition
from relay_jax.diffusion.process import RelayProcess
from relay_jax.diffusion.sampler import (
    EdmSampler,
    NoiseFn,
    RelaySampler,
    Samples,
    handoff,
    sample_edm,
    sample_relay,
    seeded_noise,
)
from relay_jax.models.unet import init_params
from relay_jax.runtime.devices import compiler_options
from relay_jax.runtime.sharding import batch_sharding, from_all, state_shardings, to_host


def _noise(stage: Stage, seeds: jax.Array) -> NoiseFn:
    """The noise of a stage for seeds [b] uint32."""
    base = jax.random.key(0)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(base, seed), stage.index))(
        seeds
    )
    return seeded_noise(keys, (stage.resolution, stage.resolution, stage.network.image_channels))


def stage_denoiser(
    stage: Stage, params: dict, classes: jax.Array
) -> Callable[[jax.Array, jax.Array], jax.Array]:
    """(x [b, h, w, c], scalar sigma) -> denoised images, guided as the stage is sampled.
    classes: int32 [b]."""
    denoise = precondition(
        lambda *inputs: stage.network.apply({"params": params}, *inputs), stage.process.sigma_data
    )
    labels = (
        jax.nn.one_hot(classes, stage.network.num_classes) if stage.network.num_classes else None
    )
    return classifier_free(denoise, labels, stage.guidance.weight, stage.guidance.interval)


def run_stage(
    stage: Stage,
    params: dict,
    seeds: jax.Array,
    classes: jax.Array,
    low_res: jax.Array | None = None,
    return_states: bool = False,
) -> Samples:
    """`sample_stage`, and on request the states of all steps, which take their memory."""
    guided, noise_fn = stage_denoiser(stage, params, classes), _noise(stage, seeds)
    if isinstance(stage.sampler, EdmSampler):
        return sample_edm(guided, noise_fn(0, "latents"), noise_fn, stage.sampler, return_states)
    assert low_res is not None and isinstance(stage.sample_process, RelayProcess)
    return sample_relay(
        guided, low_res, noise_fn, stage.sample_process, stage.sampler, return_states
    )


def sample_stage(
    stage: Stage,
    params: dict,
    seeds: jax.Array,
    classes: jax.Array,
    low_res: jax.Array | None = None,
) -> jax.Array:
    """One stage as a pure function.

    seeds: uint32 [b]; classes: int32 [b], ignored by an unconditional network; low_res: images
    of the stage before, [b, h/p, w/p, c], for relay stages. Returns images [b, h, w, c], about
    [-1, 1], not clipped.
    """
    return run_stage(stage, params, seeds, classes, low_res).final


def handoff_images(stage: Stage, seeds: np.ndarray, low_res: np.ndarray) -> np.ndarray:
    """The state from which `sample_stage` starts for the same seeds and low_res, float32 [b, h,
    w, c]."""
    assert isinstance(stage.sampler, RelaySampler) and isinstance(
        stage.sample_process, RelayProcess
    )
    noise_fn = _noise(stage, jnp.asarray(seeds, jnp.uint32))
    return np.asarray(handoff(jnp.asarray(low_res), noise_fn, stage.sample_process, stage.sampler))


class StageSampler:
    """`sample_stage`, compiled once for batches of one size, over all devices of a mesh."""

    def __init__(self, stage: Stage, mesh: Mesh, batch: int) -> None:
        """batch: images per call of the compiled program; rounded up to a multiple of the
        devices."""
        self.stage, self.mesh = stage, mesh
        self.batch = -(-batch // mesh.size) * mesh.size
        self._run: Callable[..., jax.Array] = jax.jit(
            lambda *inputs: sample_stage(stage, *inputs),
            out_shardings=batch_sharding(mesh),
            compiler_options=compiler_options(mesh),
        )

    def compile(self) -> None:
        """Compiles now, so that several stages can do it at once, for parameters as
        checkpoint.load_ema places them."""
        if isinstance(self._run, jax.stages.Compiled):
            return
        net, rows = self.stage.network, batch_sharding(self.mesh)
        shapes = jax.eval_shape(partial(init_params, net), jax.random.key(0))
        params = jax.tree.map(
            lambda leaf, s: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=s),
            shapes,
            state_shardings(shapes, self.mesh),
        )
        inputs = [
            jax.ShapeDtypeStruct((self.batch,), dtype, sharding=rows)
            for dtype in (np.uint32, np.int32)
        ]
        if isinstance(self.stage.process, RelayProcess):
            side = self.stage.resolution // self.stage.process.patch
            inputs.append(
                jax.ShapeDtypeStruct(
                    (self.batch, side, side, net.image_channels), np.float32, sharding=rows
                )
            )
        self._run = self._run.lower(params, *inputs).compile()  # type: ignore[attr-defined]

    def start(
        self, params: dict, seeds: jax.Array, classes: jax.Array, low_res: jax.Array | None = None
    ) -> jax.Array:
        """One batch that is on the devices already, as by sharding.from_all; the result stays
        there, and may not be finished yet. float32 [batch, h, w, c]."""
        given = [low_res] if isinstance(self.stage.process, RelayProcess) else []
        return self._run(params, seeds, classes, *given)

    def __call__(
        self,
        params: dict,
        seeds: Sequence[int] | np.ndarray,
        classes: np.ndarray,
        low_res: np.ndarray | None = None,
    ) -> np.ndarray:
        """Any number of seeds, the same on all processes; the last batch is filled up.

        Returns float32 [n, h, w, c], whole on every process.
        """
        inputs = {"seeds": np.asarray(seeds, np.uint32), "classes": np.asarray(classes, np.int32)}
        if low_res is not None:
            inputs["low_res"] = np.asarray(low_res, np.float32)
        parts = []
        for start in range(0, len(inputs["seeds"]), self.batch):
            part = {k: v[start : start + self.batch] for k, v in inputs.items()}
            count = len(part["seeds"])
            full = {k: np.resize(v, (self.batch, *v.shape[1:])) for k, v in part.items()}
            parts.append(to_host(self.start(params, **from_all(full, self.mesh)))[:count])
        return np.concatenate(parts)


def generate(
    samplers: Sequence[tuple[StageSampler, dict]],
    seeds: Sequence[int] | np.ndarray,
    classes: np.ndarray,
    low_res: np.ndarray | None = None,
) -> dict[str, np.ndarray]:
    """Runs consecutive stages, each a sampler and its parameters. low_res: what the first of
    them starts from, if it is a relay stage. Returns the float32 images [n, h, w, c] of every
    stage by its name."""
    images: dict[str, np.ndarray] = {}
    for sampler, params in samplers:
        low_res = sampler(params, seeds, classes, low_res)
        images[sampler.stage.name] = low_res
    return images

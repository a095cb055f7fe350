"""The one chain of stages: seeds and classes in, images of every stage out.

Files, the notebook, evaluation and previews sample through `Chain`,
so that they get the same bits. Image i depends on its seed (and
class) alone: every draw comes from the key
fold_in(fold_in(key(0), seed), stage index), with purpose and step
folded in by `seeded_noise`. Stages hand over float images, neither clipped nor quantised in
between (docs/math.md section 6). A relay with handoff "noise" takes
the state of the stage before, which stops early; the picture of that
stage is what its network makes of the state.

The image of a seed is computed in row `seed mod batch` of its batch,
whatever other seeds are asked for. Rows do not see each other, so on
the same devices with the same batch size an image has the same bits
in a run that was interrupted, extended, or asked for it alone.
"""

import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relay_jax.diffusion.precondition import Condition
from relay_jax.diffusion.process import NoiseFn
from relay_jax.diffusion.sampler import Samples, seeded_noise
from relay_jax.errors import UserError
from relay_jax.resolution import height_width
from relay_jax.runtime import distributed
from relay_jax.runtime.compiling import compiling
from relay_jax.runtime.devices import jit
from relay_jax.runtime.sharding import (
    batch_sharding,
    from_all,
    replicated,
    state_shardings,
    to_host,
)
from relay_jax.sampling.memory import check_program, surely_fits
from relay_jax.sampling.pixels import to_uint8_on_device
from relay_jax.sampling.weights import load_weights, with_guides
from relay_jax.stage import Guided, Stage, joined

RUN_AHEAD = 1  # batches queued on the devices beyond the one that is waited for


class Inputs(NamedTuple):
    """What a batch starts from besides its seeds.

    classes: int32 [n]; low_res: float32 [n, h, w, c] or None.
    """

    classes: np.ndarray
    low_res: np.ndarray | None


class Pixels(NamedTuple):
    """Finished images, the same on every process.

    seeds: int64 [n]; classes: int32 [n]; pixels: uint8 [n, h, w, c].
    """

    seeds: np.ndarray
    classes: np.ndarray
    pixels: np.ndarray


def stage_noise(stage: Stage, seeds: jax.Array) -> NoiseFn:
    """The noise of a stage for seeds uint32 [b]."""
    base = jax.random.key(0)
    keys = jax.vmap(lambda seed: jax.random.fold_in(jax.random.fold_in(base, seed), stage.index))(
        seeds
    )
    return seeded_noise(keys, stage.image_shape)


def initial_state(stage: Stage, seeds: jax.Array, low_res: jax.Array | None = None) -> jax.Array:
    """The state from which a stage is sampled, float32 [b, h, w, c].

    seeds: uint32 [b]; low_res: [b, h/p, w/p, c] for a stage that
    starts from images: these, or with handoff "noise" the state of
    the stage before at the level where it stops. Source: docs/math.md
    section 6. Raises ValueError without low_res where it is needed,
    AssertionError (chex) for other shapes.
    """
    seeds = jnp.asarray(seeds, jnp.uint32)
    chex.assert_rank(seeds, 1, custom_message="seeds must be [b]")
    noise_fn = stage_noise(stage, seeds)
    process, sigma = stage.sample_process, float(stage.sampler.levels()[0])
    before = None if low_res is None else jnp.asarray(low_res)
    if before is not None and stage.starts_from_images:
        low = height_width(stage.low_resolution)
        shape = (len(seeds), *low, stage.network.image_channels)
        message = f"low_res must be {list(shape)}"
        chex.assert_shape(before, shape, custom_message=message)
    if stage.handoff == "noise" and before is not None:
        return process.initial_state_from_noise(sigma, noise_fn, before)
    return process.initial_state(sigma, noise_fn, before)


def condition_of(
    stage: Stage, seeds: jax.Array, low_res: jax.Array | None = None
) -> Condition | None:
    """What the network of a stage is given beside the state, None for most; as `initial_state`."""
    before = None if low_res is None else jnp.asarray(low_res)
    noise_fn = stage_noise(stage, jnp.asarray(seeds, jnp.uint32))
    return stage.sample_process.sampling_condition(noise_fn, before)


def sample_stage(
    stage: Stage,
    params: dict | Guided,
    seeds: jax.Array,
    classes: jax.Array | None = None,
    low_res: jax.Array | None = None,
    return_states: bool = False,
) -> Samples:
    """One stage as a pure function, to be jitted by the caller.

    seeds: uint32 [b]; classes: int32 [b], ignored by an
    unconditional network; low_res: images (or the state) of the
    stage before, [b, h/p, w/p, c], for a stage that starts from
    images. Returns images [b, h, w, c], about [-1, 1], not clipped,
    the state of a stage that stops early, and on request the states
    of all steps. Source: docs/math.md section 6. Raises as
    `initial_state`.
    """
    if classes is not None:
        classes = jnp.asarray(classes)
        message = "classes must be [b], one for each seed"
        chex.assert_shape(classes, np.shape(seeds), custom_message=message)
    start = initial_state(stage, seeds, low_res)
    return stage.sampler(
        stage.denoiser(params, classes, condition_of(stage, seeds, low_res)),
        start,
        stage.sample_process,
        stage_noise(stage, seeds),
        return_states,
    )


def arrange(seeds: Iterable[int], batch: int) -> list[np.ndarray]:
    """The seeds in as few batches as hold each in row `seed mod batch`, about in rising order.

    Consecutive seeds fill their batches wherever they begin. Returns
    int64 arrays.
    """
    rising = np.unique(np.fromiter(seeds, np.int64))
    by_row = np.argsort(rising % batch, kind="stable")
    rows = (rising % batch)[by_row]
    turn = np.empty(len(rising), np.int64)  # how many seeds of the same row come before
    turn[by_row] = np.arange(len(rising)) - np.searchsorted(rows, rows)
    by_turn = np.argsort(turn, kind="stable")
    if not len(rising):
        return []
    return np.split(rising[by_turn], np.cumsum(np.bincount(turn))[:-1])


class Chain:
    """Consecutive stages with their parameters, compiled once for batches of one size.

    stages: the whole relay, or a part of it whose first stage may
    continue given images; as `stages` they are joined (stage.py),
    so that one before a relay from noise stops early. params:
    averaged parameters by stage name, on the mesh. batch: images
    per call of the compiled programs, over all devices; rounded up
    to a multiple of them.
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        params: Mapping[str, dict | Guided],
        mesh: Mesh,
        batch: int,
    ) -> None:
        self.stages, self.mesh = joined(stages), mesh
        self.batch = -(-batch // mesh.size) * mesh.size
        self.params = dict(params)
        self.notes: dict[str, dict] = {}  # of the checkpoints that the parameters come from
        rows = batch_sharding(mesh)
        self._programs: dict[str, Callable[..., jax.Array]] = {
            stage.name: jit(_final_of(stage), mesh, out_shardings=rows) for stage in self.stages
        }
        # Of the stages that hand over a
        # state: what it shows, for pictures.
        self._denoised: dict[str, Callable[..., jax.Array]] = {
            before.name: jit(_denoised_of(before), mesh, out_shardings=rows)
            for before, stage in itertools.pairwise(self.stages)
            if stage.handoff == "noise"
        }
        self._finish = jax.jit(_pixels_and_finite, out_shardings=replicated(mesh))

    @classmethod
    def load(
        cls,
        stages: Sequence[Stage],
        folders: Mapping[str, Path],
        mesh: Mesh,
        batch: int,
    ) -> "Chain":
        """With the averaged parameters of checkpoints. folders: by stage name, see `load_weights`.

        Raises UserError for a stage without a checkpoint that can be
        read and fits, and for a batch that does not fit into memory.
        """
        stages = with_guides(stages, folders)
        weights = {s.name: load_weights(s, folders[s.name], mesh) for s in stages}
        chain = cls(
            stages,
            {name: params for name, (params, _) in weights.items()},
            mesh,
            batch,
        )
        chain.notes = {name: notes for name, (_, notes) in weights.items()}
        chain.check_memory()
        return chain

    @property
    def weights(self) -> dict[str, tuple[dict | Guided, dict]]:
        """Parameters and notes of their checkpoint by stage name, for records."""
        return {name: (params, self.notes.get(name, {})) for name, params in self.params.items()}

    def with_params(self, params: Mapping[str, dict | Guided]) -> "Chain":
        """The same compiled programs with other parameters."""
        other = object.__new__(Chain)
        other.__dict__.update(self.__dict__)
        other.params, other.notes = dict(params), {}
        return other

    def check_memory(self) -> None:
        """Raises UserError if a batch does not fit into memory; parameters are not needed."""
        for stage in self.stages:
            if surely_fits(stage, self.batch, self.mesh):
                continue
            if not isinstance(self._programs[stage.name], jax.stages.Compiled):
                self._programs[stage.name] = self._compiled(stage)
            check_program(self._programs[stage.name], stage, self.batch, self.mesh)

    def compile(self) -> None:
        """Compiles every stage now; at once, where a process need not mind the order of others."""
        waiting = [
            s for s in self.stages if not isinstance(self._programs[s.name], jax.stages.Compiled)
        ]
        if not waiting:
            return
        threads = 1 if distributed.joined() else len(waiting)
        names = " and ".join(f"{s.name}, {s.resolution} px" for s in waiting)
        what = f"the sampler of {names}, batch {self.batch}"
        with compiling(what), ThreadPoolExecutor(threads) as pool:
            for stage, program in zip(waiting, pool.map(self._compiled, waiting), strict=True):
                self._programs[stage.name] = program

    def _compiled(self, stage: Stage) -> Any:
        rows, shapes = batch_sharding(self.mesh), stage.sampled_shapes()
        params = jax.tree.map(
            lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
            shapes,
            state_shardings(shapes, self.mesh),
        )
        inputs = [
            jax.ShapeDtypeStruct((self.batch,), dtype, sharding=rows)
            for dtype in (np.uint32, np.int32)
        ]
        if stage.starts_from_images:
            low = height_width(stage.low_resolution)
            shape = (self.batch, *low, stage.network.image_channels)
            inputs.append(jax.ShapeDtypeStruct(shape, np.float32, sharding=rows))
        program: Any = self._programs[stage.name]
        return program.lower(params, *inputs).compile()

    def _start(
        self, seeds: np.ndarray, inputs: Inputs, pictures: bool = False
    ) -> dict[str, jax.Array]:
        """One batch through all stages; its images stay on the devices, and may not be finished.

        Each of the seeds stands in its row; empty rows repeat the
        first image. pictures: denoise a state that is handed over,
        for one more call of its network.
        """
        source = np.zeros(self.batch, int)
        source[seeds % self.batch] = np.arange(len(seeds))
        values = {
            "seeds": seeds.astype(np.uint32),
            "classes": inputs.classes.astype(np.int32),
        }
        if inputs.low_res is not None:
            values["low_res"] = inputs.low_res.astype(np.float32)
        arrays = from_all({key: value[source] for key, value in values.items()}, self.mesh)
        images, previous = {}, arrays.get("low_res")
        for stage in self.stages:
            more = [previous] if stage.starts_from_images else []
            program, params = self._programs[stage.name], self.params[stage.name]
            previous = program(params, arrays["seeds"], arrays["classes"], *more)
            images[stage.name] = previous
            if pictures and stage.name in self._denoised:
                denoise = self._denoised[stage.name]
                images[stage.name] = denoise(params, previous, arrays["classes"])
        return images

    def images(
        self,
        seeds: Sequence[int] | np.ndarray,
        classes: np.ndarray,
        low_res: np.ndarray | None = None,
        pictures: bool = True,
    ) -> dict[str, np.ndarray]:
        """Float images of every stage by its name, float32 [n, h, w, c], whole on every process.

        seeds: [n], any number, the same on all processes, repeats
        allowed; classes: int [n]; low_res: [n, h/p, w/p, c], what
        the first stage starts from, if it continues images. A
        stage that hands over a state has no finished image: what
        its network makes of the state, or the state itself
        without `pictures`.
        """
        seeds = np.asarray(seeds, np.int64)
        results: dict[str, np.ndarray] = {}
        for part in _turns(seeds, self.batch):
            inputs = Inputs(
                np.asarray(classes)[part],
                None if low_res is None else low_res[part],
            )
            for name, batch in self._start(seeds[part], inputs, pictures).items():
                rows = to_host(batch)[seeds[part] % self.batch]
                whole = results.setdefault(
                    name, np.empty((len(seeds), *rows.shape[1:]), rows.dtype)
                )
                whole[part] = rows
        return results

    def stream(
        self, seeds: Iterable[int], inputs: Callable[[np.ndarray], Inputs]
    ) -> Iterator[Pixels]:
        """Images of the last stage as bytes, batch after batch.

        The next one is computed while one is fetched; only the bytes
        leave the devices. inputs: called for the seeds of each
        batch, while the devices are at the one before. Raises
        UserError for images that are not finite numbers.
        """
        waiting: deque[tuple[np.ndarray, np.ndarray, tuple[jax.Array, jax.Array]]] = deque()
        for batch in arrange(seeds, self.batch):
            start = inputs(batch)
            result = self._finish(self._start(batch, start)[self.stages[-1].name])
            for array in result:
                array.copy_to_host_async()
            waiting.append((batch, start.classes, result))
            if len(waiting) > RUN_AHEAD:
                yield self._fetch(*waiting.popleft())
        while waiting:
            yield self._fetch(*waiting.popleft())

    def _fetch(
        self,
        seeds: np.ndarray,
        classes: np.ndarray,
        result: tuple[jax.Array, jax.Array],
    ) -> Pixels:
        pixels, finite = (
            np.asarray(array.addressable_data(0))[seeds % self.batch] for array in result
        )
        if not finite.all():
            raise UserError(
                f"the image of seed {seeds[~finite][0]} is not finite: the weights are damaged, "
                "or need model.dtype=float32"
            )
        return Pixels(seeds, classes, pixels)


def _turns(seeds: np.ndarray, batch: int) -> Iterator[np.ndarray]:
    """Places of seeds, in as few turns as hold each in row `seed mod batch`."""
    waiting = np.arange(len(seeds))
    while len(waiting):
        rows = seeds[waiting] % batch
        _, first = np.unique(rows, return_index=True)
        yield waiting[np.sort(first)]
        waiting = np.delete(waiting, first)


def _final_of(stage: Stage) -> Callable[..., jax.Array]:
    return lambda params, seeds, classes, low_res=None: (
        sample_stage(stage, params, seeds, classes, low_res).final
    )


def _denoised_of(stage: Stage) -> Callable[..., jax.Array]:
    sigma = np.float32(stage.sampler.levels()[-1])
    return lambda params, state, classes: stage.denoiser(params, classes)(state, jnp.asarray(sigma))


def _pixels_and_finite(images: jax.Array) -> tuple[jax.Array, jax.Array]:
    return to_uint8_on_device(images), jnp.isfinite(images).all((1, 2, 3))

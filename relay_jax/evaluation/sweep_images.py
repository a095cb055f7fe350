"""The samplers of a sweep: their images, and how far these are apart.

    OUT/SAMPLER/samples.json          what they were made with
    OUT/SAMPLER/000000-000511.npz     arr_0, arr_1 (ADM's: pixels, classes),
                                      exact (before 8 bits), seconds

The root mean square distance of an image to that of another
sampler says how far both are from one solution. It has a
meaning where neither draws noise after the start, and both
start from the same state.
"""

import re
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.data.images import to_float
from relay_jax.data.source import Source
from relay_jax.diffusion.process import Purpose
from relay_jax.errors import Stopped, UserError
from relay_jax.runtime import distributed
from relay_jax.runtime.distributed import agree, is_first
from relay_jax.runtime.files import replacing
from relay_jax.runtime.logs import Progress
from relay_jax.sampling.chain import Chain, arrange
from relay_jax.sampling.pixels import edit_pixels, to_uint8
from relay_jax.sampling.record import check_folder, read_record, write_record
from relay_jax.sampling.request import Request
from relay_jax.stage import Stage, joined

BLOCK = 512  # images to a file, and what a stopped sweep may lose
# Images are kept in 16-bit floats as well, as long as they take no
# more than this; 8 bits alone move a distance by 0.003.
EXACT_BYTES = 2**31


def folder_name(sampler: str) -> str:
    """What a sampler was asked for by, as the name of a folder."""
    return re.sub(r"[^\w.=+-]+", "-", sampler).strip("-")


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One sampler of a sweep.

    name: as it was asked for; request: its images, whose stages it
    samples; cost: of an image: calls, evaluations, flops.
    """

    name: str
    request: Request
    cost: Mapping[str, int]

    @property
    def folder(self) -> str:
        """Its name as that of a folder."""
        return folder_name(self.name)

    @property
    def blocks(self) -> list[np.ndarray]:
        """The seeds of its files, rising: int64 arrays."""
        seeds = np.unique(np.asarray(self.request.seeds, np.int64))
        return np.split(seeds, range(BLOCK, len(seeds), BLOCK))

    @property
    def draws_noise(self) -> bool:
        """Whether a stage draws noise after its start."""
        return any(_draws_noise(stage) for stage in joined(self.request.stages))

    @property
    def start(self) -> list[Any]:
        """From where each stage starts, and which solution belongs to it."""
        return [_start(stage) for stage in joined(self.request.stages)]


def _start(stage: Stage) -> tuple[Any, ...]:
    ends = (f"{stage.sampler.levels()[i]:.6g}" for i in (0, -1))
    # A first step that takes the hand-off for what it is adds
    # detail, which stays however many steps follow.
    blur = getattr(stage.sampler, "exact_first_blur", False)
    return asdict(stage.sample_process), stage.handoff, blur, *ends


class _NoiseProbe:
    """A noise_fn that draws nothing, and records what it was called for."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.purposes: set[Purpose] = set()
        self.shape = shape

    def __call__(self, step: jax.Array | int, purpose: Purpose) -> jax.Array:
        self.purposes.add(purpose)
        return jnp.zeros(self.shape)


def _draws_noise(stage: Stage) -> bool:
    # By tracing the sampler and not by its settings: noise that a
    # sampler never adds is never drawn, and a sampler of the user's
    # own is asked alike.
    noise = _NoiseProbe((1, *stage.image_shape))
    state = jax.ShapeDtypeStruct(noise.shape, jnp.float32)
    jax.eval_shape(partial(_walk, stage, noise), state)
    return bool(noise.purposes)


def _walk(stage: Stage, noise: _NoiseProbe, state: jax.Array) -> jax.Array:
    return stage.sampler(_same, state, stage.sample_process, noise).final


def _same(x: jax.Array, sigma: jax.Array) -> jax.Array:
    return x


class KeptImages:
    """The images of a contender in its folder below `out`, generated once."""

    def __init__(self, contender: Contender, out: Path) -> None:
        self.contender, self.folder = contender, out / contender.folder
        self._files = [
            self.folder / f"{block[0]:06d}-{block[-1]:06d}.npz" for block in contender.blocks
        ]

    def claim(self, record: Mapping[str, Any], weights: bool) -> None:
        """Raises UserError for a folder of other settings, weights or seeds.

        weights: False for a record made before the weights are
        loaded; else the record is written.
        """
        before = read_record(self.folder)
        check_folder(self.folder, record, weights)
        # Scores are of all images of the folder.
        if before is not None and before["seeds"] != record["seeds"]:
            raise UserError(
                f"{self.folder} holds images of seeds {before['seeds']}, not of "
                f"{record['seeds']}; name another --out"
            )
        if weights:
            write_record(self.folder, record)

    def generate(self, chain: Chain, source: Source | None) -> None:
        """Generates what is missing. All processes must call it.

        chain: of the contender's stages; source: as Request.inputs.
        Raises UserError for images that are not finite,
        StorageError, and Stopped after SIGTERM.
        """
        # Process 0 writes, and decides what is missing: others may
        # see a shared folder a moment later.
        finished = distributed.of_first([file.exists() for file in self._files])
        blocks = self.contender.blocks
        total = sum(map(len, blocks))
        done = sum(len(b) for b, exists in zip(blocks, finished, strict=True) if exists)
        if all(finished):
            return
        chain.compile()
        progress = Progress(self.contender.name, total, done, steady=True)
        for file, block, exists in zip(self._files, blocks, finished, strict=True):
            if exists:
                continue
            self._generate_block(file, block, chain, source)
            done += len(block)
            progress.update(done)
            if distributed.stop_requested() and done < total:
                raise Stopped(
                    f"stopped by SIGTERM; {self.contender.name}: {done} of {total} images"
                )

    def _generate_block(
        self, file: Path, seeds: np.ndarray, chain: Chain, source: Source | None
    ) -> None:
        request, name = self.contender.request, chain.stages[-1].name
        inputs = request.inputs(seeds, source)
        begun = time.monotonic()
        # Without what a picture of the first stage would cost.
        images = chain.images(seeds, inputs.classes, inputs.low_res, pictures=False)[name]
        seconds = time.monotonic() - begun
        with agree():
            if not np.isfinite(images).all():
                raise UserError(f"{self.contender.name}: images that are not finite")
            if not is_first():
                return
            arrays = {
                "arr_0": edit_pixels(to_uint8(images), request.pixel_edit),
                "arr_1": inputs.classes.astype(np.int64),
                # Rows of a batch that is not
                # full are computed as well.
                "seconds": np.array([seconds, len(arrange(seeds, chain.batch)) * chain.batch]),
            }
            if images[0].size * 2 * sum(map(len, self.contender.blocks)) <= EXACT_BYTES:
                arrays["exact"] = images.astype(np.float16)
            with replacing(file) as temporary, temporary.open("wb") as stream:
                np.savez(stream, **arrays)  # type: ignore[arg-type]

    @property
    def seconds_per_image(self) -> float:
        """As measured when they were generated: of a full batch, without compilation."""
        seconds, rows = np.sum([self._read(file, "seconds") for file in self._files], axis=0)
        return float(seconds / rows)

    def pixels(self) -> tuple[np.ndarray, np.ndarray]:
        """uint8 [n, h, w, 3] and classes int [n], in the order of the seeds."""
        both = [[self._read(file, key) for file in self._files] for key in ("arr_0", "arr_1")]
        return np.concatenate(both[0]), np.concatenate(both[1])

    def first(self, count: int) -> np.ndarray:
        """The images of the first seeds, uint8 [n, h, w, 3], n <= count."""
        return self._read(self._files[0], "arr_0")[:count]

    def spread(self) -> float:
        """Standard deviation of all pixels of all images, in [-1, 1]."""
        sums = [(x.sum(), (x**2).sum(), x.size) for x in map(self._floats, self._files)]
        first, second, count = np.sum(sums, axis=0)
        return float(np.sqrt(second / count - (first / count) ** 2))

    def distances(self, other: "KeptImages") -> np.ndarray:
        """Root mean square difference of each image to the other's: [n]."""
        parts = []
        for file, other_file in zip(self._files, other._files, strict=True):
            difference = self._floats(file) - self._floats(other_file)
            parts.append(np.sqrt(np.mean(difference**2, axis=(1, 2, 3))))
        return np.concatenate(parts)

    def _floats(self, file: Path) -> np.ndarray:
        with np.load(file) as archive:
            exact = "exact" in archive.files
            images = archive["exact"] if exact else to_float(archive["arr_0"])
            return images.astype(np.float64)

    def _read(self, file: Path, key: str) -> np.ndarray:
        with np.load(file) as archive:
            return archive[key]

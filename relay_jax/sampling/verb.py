"""--mode=sample: numbered images from a trained relay, or from one of its stages."""

import time
from pathlib import Path

import jax
import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax import distributed
from relay_jax.checkpoint import load_ema
from relay_jax.config import ConfigError, Stage, open_source
from relay_jax.data.loader import read
from relay_jax.data.sources import Source
from relay_jax.diffusion.schedule import RelayProcess
from relay_jax.logs import Progress
from relay_jax.sampling.pipeline import StageSampler, generate
from relay_jax.sampling.pixels import PIXEL_EDITS
from relay_jax.sampling.writer import missing, parse_seeds, read_images, write_images
from relay_jax.sharding import describe, make_mesh


def sample(config: ConfigDict, stages: list[Stage], only: Stage | None, weights: dict[str, Path], *, seeds: str, out: Path,
           class_: int | None, low_res: Path | None) -> None:
    """Writes one PNG for each seed to `out`; those that exist are not made again. Each process writes a share of them.

    weights: the folder of each stage, with its checkpoints.
    only: a stage alone. The first stage writes low-resolution images; a relay stage reads them from `low_res`, or
    starts from down-sampled real images (image number seed mod size, of its own class).
    class_: one class for all, default seed mod classes. Raises ConfigError for what cannot be done.
    """
    chosen = [only] if only else stages
    num_classes = stages[-1].network.num_classes
    relay_alone = isinstance(chosen[0].process, RelayProcess)
    low_resolution = stages[chosen[0].index - 1].resolution if relay_alone else 0

    def check() -> list[int]:
        wanted = parse_seeds(seeds)
        if class_ is not None and not 0 <= class_ < num_classes:
            allowed = f"0 to {num_classes - 1}" if num_classes else "none: the network is unconditional"
            raise ConfigError(f"unknown class {class_}; there are {allowed}")
        if config.sample.pixel_edit not in PIXEL_EDITS:
            raise ConfigError(f"sample.pixel_edit must be one of {', '.join(PIXEL_EDITS)}, not {config.sample.pixel_edit!r}")
        if low_res is not None and not relay_alone:
            raise ConfigError("--low_res is for --stage of a relay; the first stage starts from noise")
        return wanted

    wanted = distributed.everywhere(check)
    absent = set(missing(out, wanted))
    left = distributed.array_of_first(np.asarray([seed in absent for seed in wanted]))
    seeds_left = [seed for seed, keep in zip(wanted, left, strict=True) if keep]
    logging.info("%d images wanted, %d there already in %s; pixel_edit %s", len(wanted), len(wanted) - len(seeds_left),
                 out, config.sample.pixel_edit)
    if not seeds_left:
        return

    def open_inputs() -> tuple[Source | None, Mesh]:
        source = open_source(config, stages) if relay_alone and low_res is None else None
        if low_res is not None:
            read_images(low_res, seeds_left, low_resolution)        # all of them, before anything is compiled
        try:
            return source, make_mesh(config.mesh.fsdp)
        except ValueError as error:
            raise ConfigError(str(error)) from error

    source, mesh = distributed.everywhere(open_inputs)
    logging.info("%s", describe(mesh))
    share = slice(jax.process_index(), None, jax.process_count())       # of the images of a batch, to encode and write
    samplers = [(StageSampler(s, mesh, config.sample.batch), load_ema(weights[s.name], s.network, mesh)[0]) for s in chosen]
    progress = Progress("sample", len(wanted), len(wanted) - len(seeds_left))
    last = time.monotonic()
    for start in range(0, len(seeds_left), config.sample.batch):
        part = seeds_left[start:start + config.sample.batch]
        classes = np.full(len(part), class_) if class_ is not None else np.asarray(part) % max(num_classes, 1)
        given = None
        if low_res is not None:
            given = read_images(low_res, part, low_resolution)
        elif source is not None:
            pixels, labels = read(source, [seed % len(source) for seed in part], low_resolution)
            given, classes = pixels.astype(np.float32) / 127.5 - 1, classes if class_ is not None else labels
        images = generate(samplers, part, classes, given)[chosen[-1].name]
        write_images(out, part[share], images[share],
                     config.sample.pixel_edit if chosen[-1] is stages[-1] else "none")
        done = len(wanted) - len(seeds_left) + start + len(part)
        if start == 0 or time.monotonic() - last > 5 or done == len(wanted):
            progress.line(done)
            last = time.monotonic()
        if distributed.stop_requested() and done < len(wanted):
            raise distributed.Stopped(f"stopped by SIGTERM; {done} of {len(wanted)} images are in {out}")
    distributed.barrier("all images are written")

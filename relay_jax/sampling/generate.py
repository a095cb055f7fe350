"""--mode=sample: numbered images from a trained relay, or from one of its stages."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from absl import logging
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax.config import Stage, describe_source, open_source
from relay_jax.data.source import Source
from relay_jax.runtime import distributed
from relay_jax.runtime.checkpoint import load_ema
from relay_jax.runtime.logs import Progress, is_writer
from relay_jax.runtime.sharding import describe, make_mesh
from relay_jax.sampling.chain import StageSampler
from relay_jax.sampling.folder import Background, ImageFolder, PngFolder, read_images
from relay_jax.sampling.pixels import edit_pixels
from relay_jax.sampling.record import check_folder, read_record, write_record
from relay_jax.sampling.request import Request, parse_request
from relay_jax.sampling.seeds import parse_seeds
from relay_jax.sampling.shards import ShardFolder, merge_npz, write_manifest
from relay_jax.sampling.stream import Bytes, arrange, compile_all, stream

LINE_SECONDS = 5.0


def sample(
    config: ConfigDict,
    stages: list[Stage],
    only: Stage | None,
    weights: dict[str, Path],
    *,
    seeds: str,
    out: Path,
    class_rule: str,
    low_res: Path | None,
    image_format: str,
) -> None:
    """Writes the image of each seed to `out`; those that exist are not made again. Each process
    writes a share.

    weights: the folder of each stage, with its checkpoints.
    only: a stage alone. The first stage writes low-resolution images; a relay stage reads them
    from `low_res`, or starts from down-sampled real images (image number seed mod size, of its
    own class).
    class_rule: see classes.py, or '' (`parse_request`). image_format: one of writer.FORMATS.
    Raises ConfigError for what cannot be done, and for a folder that holds images of other
    settings.
    """

    def check() -> tuple[Request, dict]:
        request = parse_request(
            stages,
            only,
            seeds=seeds,
            class_rule=class_rule,
            pixel_edit=config.sample.pixel_edit,
            low_res=low_res,
            data=describe_source(config, stages),
        )
        record = request.record({}) | output
        if is_writer():
            check_folder(out, record, weights=False)
        return request, record

    output = {"output": {"format": image_format}}
    request, record = distributed.everywhere(check)
    resolution = request.stages[-1].resolution
    folder: ImageFolder = (
        PngFolder(out)
        if image_format == "png"
        else ShardFolder(out, image_format, resolution, request.num_classes)
    )
    there = folder.finished(request.seeds)
    left = distributed.array_of_first(np.asarray([seed not in there for seed in request.seeds]))
    missing = [seed for seed, keep in zip(request.seeds, left, strict=True) if keep]
    logging.info(
        "%d images wanted, %d there already in %s; class rule %s, pixel_edit %s",
        len(request.seeds),
        len(request.seeds) - len(missing),
        out,
        request.class_rule,
        request.pixel_edit,
    )

    def open_inputs() -> tuple[Source | None, Mesh]:
        source = open_source(config, stages) if request.from_real_images else None
        if request.low_res is not None:
            for start in range(0, len(missing), 1000):  # all of them, before anything is compiled
                read_images(request.low_res, missing[start : start + 1000], request.low_resolution)
        return source, make_mesh(config.mesh.fsdp)

    source, mesh = distributed.everywhere(open_inputs)
    loaded = {
        stage.name: load_ema(weights[stage.name], stage.network, mesh) for stage in request.stages
    }
    record = request.record(loaded) | output

    def claim() -> None:
        if is_writer():
            check_folder(out, record)
            write_record(out, record)

    distributed.everywhere(claim)
    if missing:
        logging.info("%s", describe(mesh))
        samplers = [
            (StageSampler(s, mesh, config.sample.batch), loaded[s.name][0]) for s in request.stages
        ]
        compile_all([sampler for sampler, _ in samplers])
        folder.plan(missing)
        batches = stream(
            samplers,
            arrange(missing, samplers[0][0].batch),
            lambda part: request.inputs(part, source),
        )
        with Background() as background:
            _write(batches, folder, background, request, len(missing))
    distributed.barrier("all images are written")
    distributed.everywhere(
        lambda: _finish(folder, record) if isinstance(folder, ShardFolder) and is_writer() else None
    )


def _write(
    batches: Iterator[Bytes],
    folder: ImageFolder,
    background: Background,
    request: Request,
    missing: int,
) -> None:
    """Hands every image to the folder, and says how far it is. Raises Stopped after SIGTERM."""
    total = len(request.seeds)
    done, progress, last = (
        total - missing,
        Progress("sample", total, total - missing, steady=True),
        -math.inf,
    )

    def add(seed: int, pixels: np.ndarray, label: int) -> None:
        folder.add(seed, edit_pixels(pixels[None], request.pixel_edit)[0], label)

    for batch in batches:
        for seed, pixels, label in zip(
            batch.seeds.tolist(), batch.pixels, batch.classes.tolist(), strict=True
        ):
            if folder.owns(seed):
                background.submit(add, seed, pixels, label)
        done += len(batch.seeds)
        if time.monotonic() - last > LINE_SECONDS or done == total:
            progress.line(done)
            last = time.monotonic()
        if distributed.stop_requested() and done < total:
            background.wait()
            folder.flush()
            raise distributed.Stopped(f"stopped by SIGTERM; {done} of {total} images are finished")


def _finish(folder: ShardFolder, record: dict) -> None:
    """What makes one set of the files: one npz, or the description of a data set."""
    everything = read_record(folder.out) or record
    if folder.kind == "npz":
        merged = merge_npz(folder, parse_seeds(everything["seeds"]))
        logging.info(
            "%s",
            f"all images are in {merged}"
            if merged
            else f"{folder.out}: not all of seeds {everything['seeds']} are there yet, so "
            "there is no single npz",
        )
    else:
        write_manifest(folder, {"source": "samples", **everything})
        logging.info(
            "the images are a data set: --config.dataset.source=packed --config.dataset.path=%s",
            folder.out,
        )

"""--mode=sample: numbered images from a trained relay, or from one of its stages."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
from absl import logging

from relay_jax.config import Settings
from relay_jax.errors import Stopped
from relay_jax.runtime import distributed
from relay_jax.runtime.logs import Progress
from relay_jax.runtime.sharding import describe, make_mesh
from relay_jax.sampling.chain import Chain, Pixels
from relay_jax.sampling.folder import (
    Background,
    ImageFolder,
    PngFolder,
    read_images,
)
from relay_jax.sampling.pixels import edit_pixels
from relay_jax.sampling.record import check_folder, read_record, write_record
from relay_jax.sampling.request import Request
from relay_jax.sampling.seeds import parse_seeds
from relay_jax.sampling.shards import ShardFolder, merge_npz, write_manifest

MISSING, KEPT, DONE = range(3)  # what is there of an image
IMAGES_AT_ONCE = 1000  # low-resolution images that are tried before the work begins


def generate(
    settings: Settings,
    request: Request,
    weights: Mapping[str, Path],
    out: Path,
    image_format: str = "png",
) -> None:
    """Writes the image of each seed to `out`; those that exist are not made again.

    Each process writes a share. weights: the folder of each stage,
    with its checkpoints. image_format: one of folder.FORMATS.
    Raises UserError for what cannot be done, and for a folder that
    holds images of other settings; StorageError where an image
    cannot be written.
    """
    output = {"output": {"format": image_format}}
    # Before anything is loaded: a folder
    # of other images is refused at once.
    with distributed.agree():
        if distributed.is_first():
            check_folder(out, request.record({}) | output, weights=False)
    folder = _open_folder(request, out, image_format)
    # Process 0 decides what is missing: others may see a
    # shared folder a moment later, and reading what is
    # there once is enough.
    states = np.full(len(request.seeds), MISSING)
    with distributed.agree():
        if distributed.is_first():
            finished, kept = (
                folder.finished(request.seeds),
                folder.kept(request.seeds),
            )
            states = np.asarray(
                [DONE if s in finished else KEPT if s in kept else MISSING for s in request.seeds]
            )
    states = distributed.array_of_first(states)
    missing, kept_seeds = (
        [seed for seed, state in zip(request.seeds, states, strict=True) if state == which]
        for which in (MISSING, KEPT)
    )
    logging.info(
        "%d images wanted, %d there already in %s; class rule %s, pixel_edit %s",
        len(request.seeds),
        len(request.seeds) - len(missing),
        out,
        request.class_rule,
        request.pixel_edit,
    )
    with distributed.agree():
        source = request.open_source(settings)
        if request.low_res is not None:
            _try_images(request, missing)
        mesh = make_mesh(settings.fsdp)
    chain = Chain.load(request.stages, weights, mesh, settings.sample.batch)
    record = request.record(chain.weights) | output
    with distributed.agree():
        if distributed.is_first():
            check_folder(out, record)
            write_record(out, record)
    with distributed.agree():
        folder.plan(missing, kept_seeds)
    if missing:
        logging.info("%s", describe(mesh))
        chain.compile()
        batches = chain.stream(missing, lambda seeds: request.inputs(seeds, source))
        with Background() as background:
            _write(batches, folder, background, request, len(missing))
    distributed.barrier("all images are written")
    with distributed.agree():
        if distributed.is_first():
            folder.tidy()
            # Once more: a command that ran beside this one may have
            # written its own seeds over these.
            write_record(out, record)
            if isinstance(folder, ShardFolder):
                _finish(folder, record)


def _open_folder(request: Request, out: Path, image_format: str) -> ImageFolder:
    resolution = request.stages[-1].resolution
    if image_format == "png":
        return PngFolder(out, resolution)
    return ShardFolder(out, image_format, resolution, request.num_classes)


def _try_images(request: Request, seeds: list[int]) -> None:
    """Reads all images that a relay stage starts from, before anything is compiled."""
    assert request.low_res is not None
    for start in range(0, len(seeds), IMAGES_AT_ONCE):
        part = seeds[start : start + IMAGES_AT_ONCE]
        read_images(request.low_res, part, request.low_resolution)


def _write(
    batches: Iterator[Pixels],
    folder: ImageFolder,
    background: Background,
    request: Request,
    missing: int,
) -> None:
    """Hands every image to the folder, with progress. Raises Stopped after SIGTERM."""
    total = len(request.seeds)
    done = total - missing
    progress = Progress("sample", total, done, steady=True)
    for batch in batches:
        rows = zip(batch.seeds.tolist(), batch.pixels, batch.classes.tolist(), strict=True)
        for seed, pixels, label in rows:
            if folder.owns(seed):
                background.submit(_add, folder, request.pixel_edit, seed, pixels, label)
        done += len(batch.seeds)
        progress.update(done)
        if distributed.stop_requested() and done < total:
            background.wait()
            folder.flush()
            raise Stopped(f"stopped by SIGTERM; {done} of {total} images are finished")


def _add(folder: ImageFolder, pixel_edit: str, seed: int, pixels: np.ndarray, label: int) -> None:
    folder.add(seed, edit_pixels(pixels[None], pixel_edit)[0], label)


def _finish(folder: ShardFolder, record: dict) -> None:
    """What makes one set of the files: one npz, or the description of a data set."""
    whole = read_record(folder.out) or record
    if folder.kind == "npz":
        merged = merge_npz(folder, parse_seeds(whole["seeds"]))
        if merged:
            logging.info("all images are in %s", merged)
        else:
            logging.info(
                "%s: not all of seeds %s are there yet, so there is no single npz",
                folder.out,
                whole["seeds"],
            )
    else:
        write_manifest(folder, {"source": "samples", **whole})
        logging.info(
            "the images are a data set: --config.dataset.source=packed --config.dataset.path=%s",
            folder.out,
        )

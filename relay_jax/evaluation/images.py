"""Sets of 8-bit images to score, read in order: of files, in memory, or generated as they are read.

A set is read in shares, one for each host, that make the whole of
it. A share comes in parts, as many on every host (some may be short
or empty), so that hosts can agree on something between parts; each
part says which images it holds.
"""

import math
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from absl import logging

from relay_jax.data.decoding import AS_SHOWN, Decoding, is_image
from relay_jax.data.description import show_files
from relay_jax.data.files import refusing, several
from relay_jax.data.folder import ImageFolder, list_images
from relay_jax.data.images import EncodedImages, center_crop_resize
from relay_jax.data.npz import NpzImages
from relay_jax.data.packed import MANIFEST, PackedDataset, is_packed, read_manifest
from relay_jax.data.source import Source
from relay_jax.data.zip import EdmZip
from relay_jax.errors import DataError
from relay_jax.resolution import Resolution, as_resolution, height_width, pixels_text
from relay_jax.runtime.distributed import is_first
from relay_jax.sampling.chain import Chain
from relay_jax.sampling.pixels import edit_pixels
from relay_jax.sampling.request import Request

AHEAD = 2  # parts decoded beyond the one in use


Part = tuple[np.ndarray, np.ndarray]  # positions int [n] in the set, pixels uint8 [n, h, w, 3]


class ImageSet(Protocol):
    """Images of one size, `resolution`.

    identity: what a report says of the set: kind, number of images
    and a hash at least.
    """

    resolution: Resolution
    identity: dict[str, Any]

    def __len__(self) -> int: ...

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """This host's images in parts of `batch` or fewer. Raises DataError."""
        ...


def choice(total: int, limit: int) -> np.ndarray:
    """Positions of at most `limit` of `total` images, rising, int [n]; always the same ones."""
    # Not the first ones: folders and data sets are often in the
    # order of their classes.
    if total <= limit:
        return np.arange(total)
    return np.sort(np.random.default_rng(0).choice(total, limit, replace=False))


def parts_of(count: int, host: int, hosts: int, batch: int) -> list[np.ndarray]:
    """Positions of the parts of a share: of the images host, host + hosts, ..."""
    positions = np.arange(host, count, hosts)
    # The number of parts is that of the host with most images, so
    # that none waits for another.
    parts = math.ceil(math.ceil(count / hosts) / batch)
    return [positions[number * batch : (number + 1) * batch] for number in range(parts)]


def _stack(images: Sequence[np.ndarray], resolution: Resolution) -> np.ndarray:
    empty = np.empty((0, *height_width(resolution), 3), np.uint8)
    return np.stack(images) if len(images) else empty


class SourceImages:
    """Images of a source, decoded in threads ahead of their use.

    exact: every image must be of `resolution` already;
    else they are cropped and resized as in training. limit: use so many
    of them at most (`choice`), 0 = all.
    """

    def __init__(
        self,
        source: Source,
        resolution: Resolution,
        identity: dict[str, Any],
        *,
        exact: bool,
        threads: int,
        limit: int = 0,
    ) -> None:
        self._source, self.resolution = source.at(resolution), resolution
        self._exact, self._threads, self._about = exact, max(threads, 1), identity
        rule = {}
        if limit and limit < len(source):
            rule = {"choice": f"of {len(source)}, drawn once by numpy's default_rng(0)"}
        self._choose(choice(len(source), limit or len(source)), rule)

    def _choose(self, positions: np.ndarray, rule: dict[str, str]) -> None:
        self._positions = positions
        self.identity = {**self._about, "images": len(positions), **rule}

    def held_out(self, count: int) -> "SourceImages | None":
        """So many images of the source that are not of this set, always the same; None if it has
        fewer."""
        rest = np.setdiff1d(np.arange(len(self._source)), self._positions)
        if len(rest) < count:
            return None
        others = copy(self)
        rule = f"of the {len(rest)} beside {len(self)}, drawn once by numpy's default_rng(0)"
        others._choose(rest[choice(len(rest), count)], {"choice": rule})
        return others

    def __len__(self) -> int:
        return len(self._positions)

    def _image(self, position: int) -> np.ndarray:
        if not self._exact:
            return center_crop_resize(self._source.picture(position)[0], self.resolution)
        # Images that are scored are taken as they are: a resize here
        # would be scored as well.
        image, _ = self._source[position]
        height, width = height_width(self.resolution)
        if image.shape != (height, width, 3):
            raise DataError(
                f"images of different sizes: {self._source.where(position)} has "
                f"{image.shape[1]} x {image.shape[0]} pixels, the first one {width} x {height}; "
                "all must be alike"
            )
        return image

    def show(self, what: str) -> None:
        """Logs which files are used, and which are not. Raises DataError."""
        # A data set is described where it is opened.
        if not is_first() or "path" not in self.identity or self.identity["kind"] == "dataset":
            return
        where = f"{self.identity['kind']} {self.identity['path'][-160:]}"
        if isinstance(self._source, EncodedImages):
            show_files(what, self._source, where, self.resolution, self._exact)
        else:
            size = pixels_text(self._source.resolution or self.resolution)
            logging.info("%s: %s: %s images of %s", what, where, f"{len(self._source):,}", size)

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """As ImageSet says."""
        parts = parts_of(len(self), host, hosts, batch)
        pool = ThreadPoolExecutor(self._threads, "decode")
        waiting: deque[list[Future[np.ndarray]]] = deque()
        try:
            for number in range(len(parts)):
                # Decoding goes on while the devices compute features
                # of the part before.
                while len(waiting) <= AHEAD and number + len(waiting) < len(parts):
                    positions = self._positions[parts[number + len(waiting)]].tolist()
                    waiting.append([pool.submit(self._image, position) for position in positions])
                images = [future.result() for future in waiting.popleft()]
                yield parts[number], _stack(images, self.resolution)
        finally:
            pool.shutdown(cancel_futures=True)


class ArrayImages:
    """Images that are in memory, uint8 [n, h, w, 3], the same on all processes."""

    def __init__(self, pixels: np.ndarray, identity: dict[str, Any]) -> None:
        self._pixels, self.resolution = pixels, as_resolution(pixels.shape[1:3])
        self.identity = {**identity, "images": len(pixels)}

    def __len__(self) -> int:
        return len(self._pixels)

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """As ImageSet says."""
        for part in parts_of(len(self), host, hosts, batch):
            yield part, self._pixels[part]


class GeneratedImages:
    """The samples of a request in the order of their seeds; generated as they are read.

    chain: of the request's stages. source: real images, if the
    request starts from them. They are the images that
    --mode=sample writes.
    """

    def __init__(self, request: Request, chain: Chain, source: Source | None) -> None:
        self._request, self._chain, self._source = request, chain, source
        self._seeds = np.unique(np.asarray(request.seeds, np.int64))
        self.resolution = chain.stages[-1].resolution
        # "drawn" is what earlier reports say; another word would
        # make them reports of other images.
        self.identity: dict[str, Any] = {
            "kind": "drawn",
            "images": len(self._seeds),
        }

    def __len__(self) -> int:
        return len(self._seeds)

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """As ImageSet says, but in parts of the chain's batch."""
        inputs = partial(self._request.inputs, source=self._source)
        # All processes generate each part together, whatever share
        # of its images they keep.
        for result in self._chain.stream(self._seeds.tolist(), inputs):
            positions, rows = (
                np.searchsorted(self._seeds, result.seeds),
                slice(host, None, hosts),
            )
            yield (
                positions[rows],
                edit_pixels(result.pixels[rows], self._request.pixel_edit),
            )


def npz_source(path: Path) -> NpzImages:
    """An npz or a folder of them, compared with its checksums. Raises DataError."""
    # Single images are read from the middle of a file, past
    # its checksum: scores of damaged images would look like
    # those of bad ones.
    source = NpzImages(path)
    source.verify()
    return source


def open_images(path: Path, threads: int, decoding: Decoding = AS_SHOWN) -> SourceImages:
    """The images to score at `path`: a folder of image files, of npz shards or of ArrayRecord
    files, one npz, or a zip of image files.

    All must have one size; a folder's order is that of its names.
    decoding: of image files, as in training. Raises DataError.
    """
    kind = kind_of(path)
    source: Source
    if kind == "npz":
        source = npz_source(path)
    elif kind == "arrayrecord":
        largest = max(read_manifest(path)["resolutions"], key=height_width, default=0)
        source = PackedDataset(path, largest)
    else:
        source = EdmZip(path) if kind == "zip" else ImageFolder(path)
        source.decoding = decoding
    resolution = as_resolution(source[0][0].shape[:2])
    identity = {"kind": kind, "path": str(path), "sha256": source.fingerprint()}
    return SourceImages(source, resolution, identity, exact=True, threads=threads)


def kind_of(path: Path) -> str:
    """Which images are at `path`: npz, zip, arrayrecord or folder.

    Raises DataError if there are none, or several kinds of them.
    """
    if path.is_file():
        if is_image(path.name):
            raise DataError(f"{path}: is one image; name the folder that the images are in")
        return "zip" if path.suffix.lower() == ".zip" else "npz"
    if not path.is_dir():
        raise DataError(f"{path}: no such folder or npz file of images")
    with refusing(f"{path}: cannot be listed"):
        pictures = list_images(str(path)).paths()
        npz = sorted(file.name for file in path.glob("*.npz"))
    packed = (path / MANIFEST).exists() and is_packed(path)
    kinds = {
        "npz": npz,
        "arrayrecord": [MANIFEST] if packed else [],
        "folder": pictures,
    }
    present = {kind: names for kind, names in kinds.items() if names}
    # To score one kind and be silent
    # of the others would be to guess.
    if len(present) > 1:
        parts = [f"{len(n):,} {_NAMES[kind]} ({several(n, 2)})" for kind, n in present.items()]
        raise DataError(
            f"{path}: holds {' and '.join(parts)}; name the one that is meant, or move the "
            "others to another folder"
        )
    return next(iter(present), "folder")


_NAMES = {
    "npz": "npz",
    "arrayrecord": "set of ArrayRecord files",
    "folder": "image files",
}


class Shown:
    """Keeps some of the images that are scored, for pictures of them.

    samples: uint8 [n, r, r, 3] of the watched set, in its order, as
    far as they have been read; reference: likewise, None without any.
    """

    def __init__(self, count: int = 32) -> None:
        self.count = count
        self.reference: np.ndarray | None = None
        self._kept: dict[int, np.ndarray] = {}

    @property
    def samples(self) -> np.ndarray | None:
        """None before any has been read."""
        kept = [self._kept[position] for position in sorted(self._kept)]
        return np.stack(kept) if kept else None

    def watch(self, images: ImageSet) -> ImageSet:
        """The same set; what is read of it is looked at."""
        positions = np.linspace(0, len(images) - 1, min(self.count, len(images)))
        return _Watched(images, set(positions.astype(int).tolist()), self._kept)

    def some_of(self, images: ImageSet) -> np.ndarray | None:
        """`count` images of a set of files, spread over it. Raises DataError."""
        # Not every n-th one: classes may take turns.
        total = len(images)
        positions = choice(total, self.count).tolist()
        # Of so many hosts each has one image.
        parts = [next(iter(images.share(position, total, 1)))[1] for position in positions]
        return np.concatenate(parts) if parts else None


class _Watched:
    """An ImageSet whose images at some positions are kept as they are read."""

    def __init__(self, images: ImageSet, wanted: set[int], kept: dict[int, np.ndarray]) -> None:
        self._images, self._wanted, self._kept = images, wanted, kept
        self.resolution, self.identity = images.resolution, images.identity

    def __len__(self) -> int:
        return len(self._images)

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """As of the set."""
        for positions, pixels in self._images.share(host, hosts, batch):
            for position, image in zip(positions.tolist(), pixels, strict=True):
                if position in self._wanted:
                    self._kept[position] = image
            yield positions, pixels

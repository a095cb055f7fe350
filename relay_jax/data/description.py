"""A data set described back to the user, before anyone trains for a day on wrong labels.

    describe -> Description -> a few lines at every start, and WORKDIR/dataset.json

Sizes are read from the headers of the files, of a bounded number of
them: ImageNet's million would take minutes. Nothing is decoded for a
set whose images all have one size.
"""

import contextlib
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from absl import logging

from relay_jax.data.decoding import WHITE, Decoding, Header, read_header
from relay_jax.data.diagnosis import folders_without_images, likely_cause, shortened
from relay_jax.data.identity import Identity, class_names, identify
from relay_jax.data.images import EncodedImages
from relay_jax.data.source import Source, describe_source, draw
from relay_jax.errors import DataError
from relay_jax.resolution import Resolution, height_width, pixels_text, smaller
from relay_jax.runtime.counting import counted

VERSION = 1
HEADERS, MEMBERS = (
    2000,
    256,
)  # files, and members of a zip or records, whose header is read
HEAD = 1 << 18  # bytes of a file that are read for it first
DECODED = 64  # images that are decoded for it, of a source without files
THREADS = 16
FIRST, LAST = 6, 3  # classes that are named


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Of the images whose headers were read.

    read: how many; smallest, largest: [width, height] by the shorter
    side; smaller: how many of them have fewer pixels along a side
    than the largest stage; alpha, turned: with transparency, and lying on
    a side as they are stored.
    """

    read: int
    smallest: list[int]
    largest: list[int]
    smaller: int = 0
    alpha: int = 0
    turned: int = 0


@dataclass(frozen=True, kw_only=True)
class Description:
    """What a data set is, for people (`lines`) and for dataset.json (`plain`).

    source: as `describe_source`. unused: files that are no images
    for this program, by ending. done: what happens to every image.
    doubts: what looks wrong, to be warned of.
    """

    source: dict[str, Any]
    identity: Identity
    unused: dict[str, int]
    sizes: Sizes
    done: list[str]
    doubts: list[str] = field(default_factory=list)

    @property
    def class_names(self) -> list[str]:
        """Empty without labels."""
        return [part["name"] for part in self.identity["parts"] if part["name"]]

    def plain(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "version": VERSION,
            "source": self.source,
            "images": self.identity["images"],
            "unused": self.unused,
            "sizes": vars(self.sizes),
            "done": self.done,
            "doubts": self.doubts,
            "identity": self.identity,
        }

    def lines(self) -> list[str]:
        """The block that every start shows."""
        images, names = self.identity["images"], self.class_names
        where = " ".join(value for value in self.source.values() if value and type(value) is str)
        # One long value must not push the rest out of sight.
        where = where if len(where) <= 160 else f"{where[:60]} ... {where[-90:]}"
        kinds = f"{len(names):,} class{'es' * (len(names) != 1)}" if names else "no classes"
        rows = [f"{where}: {images:,} images, {kinds}"]
        if names:
            rows.append(f"classes: {self._classes()}")
        rows.append(f"sizes: {_span(self.sizes, images)}")
        if self.unused:
            rows.append(f"not used: {unused_files(self.unused)}")
        return [*rows, f"done to them: {', '.join(self.done)}"]

    def show(self) -> "Description":
        """Logs the block, and what looks wrong as warnings."""
        logging.info("the data: %s", "\n    ".join(self.lines()))
        for doubt in self.doubts:
            logging.warning("the data: %s", doubt)
        return self

    def _classes(self) -> str:
        parts = self.identity["parts"]
        rows = [
            " ".join([str(number), *_unless(part["name"], str(number))])
            + _in_brackets(part.get("images"))
            for number, part in enumerate(parts)
        ]
        if len(rows) > FIRST + LAST + 1:
            rows = [
                *rows[:FIRST],
                f"... {len(rows) - FIRST - LAST} more ...",
                *rows[-LAST:],
            ]
        # A thousand numbers say less than their range.
        counts = [part["images"] for part in parts if "images" in part]
        uneven = bool(counts) and max(counts) > 2 * min(counts)
        span = f"; {min(counts):,} to {max(counts):,} images each" if uneven else ""
        return ", ".join(rows).replace("..., ", "... ").replace(", ...", " ...") + span


def show_files(
    what: str, source: EncodedImages, where: str, resolution: Resolution, exact: bool
) -> None:
    """Logs what a folder or zip holds that is scored, or that is compared with.

    exact: its images are taken as they are, not cropped and resized
    to `resolution`. Raises DataError for an image that cannot be read.
    """
    sizes, _ = _measure(source, resolution, 0)
    parts = [f"{len(source):,} images, {_span(sizes, len(source))}"]
    if source.unused:
        parts.append(f"not used: {unused_files(source.unused)}")
    parts += _shown(sizes, source.decoding.background)
    if not exact:
        parts.append(f"centre crop, resized to {pixels_text(resolution)}")
    logging.info("%s: %s: %s", what, where, "; ".join(parts))
    if sizes.smaller:
        logging.warning("%s: %s", what, _enlarged(sizes, source, pixels_text(resolution)))


def describe(
    source: Source,
    dataset: Mapping[str, Any],
    resolutions: Sequence[Resolution],
    seed: int,
) -> Description:
    """Describes an open data set. Raises DataError where all images are too small, or unreadable.

    dataset: config.dataset; resolutions: of
    all stages; seed: of the configuration.
    """
    largest = max(resolutions, key=height_width)
    known_by = dataset.get("identity", "listing")
    if known_by not in ("listing", "contents"):
        raise DataError(f"dataset.identity must be listing or contents, not {known_by!r:.60}")
    # A stage larger than every image would learn what the enlarging
    # filter does; a few small ones among many are common, and do
    # less harm than a training that does not begin.
    sizes, all_smaller = _measure(source, largest, seed)
    if all_smaller:
        raise DataError(
            f"{dataset.get('path') or dataset['source']} has images of at most "
            f"{' x '.join(map(str, sizes.largest))} px, the largest stage needs "
            f"{pixels_text(largest)}; use larger images or a smaller stage"
        )
    return Description(
        source=describe_source(dataset, largest, seed),
        identity=identify(source, contents=known_by == "contents"),
        unused=dict(source.unused),
        sizes=sizes,
        done=_done(source, dataset, resolutions, sizes),
        doubts=_doubts(source, dataset, largest, sizes),
    )


def _measure(source: Source, largest: Resolution, seed: int) -> tuple[Sizes, bool]:
    """Sizes of the images, and whether all of them are smaller than the largest stage."""
    # One size for all, and nothing about
    # the files that could be said.
    if source.resolution is not None and not isinstance(source, EncodedImages):
        size = list(height_width(source.resolution)[::-1])
        all_smaller = smaller(source.resolution, largest)
        return Sizes(read=len(source), smallest=size, largest=size), all_smaller
    # A member of a zip is read whole
    # to see its header, a file is not.
    most = DECODED
    if isinstance(source, EncodedImages):
        most = HEADERS if os.path.isfile(source.where(0)) else MEMBERS
    positions = draw(len(source), most, seed).tolist()
    with ThreadPoolExecutor(THREADS) as pool:
        read = pool.map(partial(_header, source), positions)
        headers = list(counted(read, "measuring the images", len(positions), "images"))
    order = sorted(headers, key=_size_order)
    short = sum(smaller((header.height, header.width), largest) for header in headers)
    sizes = Sizes(
        read=len(headers),
        smallest=[order[0].width, order[0].height],
        largest=[order[-1].width, order[-1].height],
        smaller=short,
        alpha=sum(header.alpha for header in headers),
        turned=sum(header.turned for header in headers),
    )
    return sizes, short == len(headers)


def _size_order(header: Header) -> tuple[int, int]:
    # The shorter side is the one that the crop keeps.
    return min(header.width, header.height), max(header.width, header.height)


def _header(source: Source, position: int) -> Header:
    """Raises DataError for an image that cannot be read."""
    if not isinstance(source, EncodedImages):
        height, width, _ = np.asarray(source.picture(position)[0]).shape
        return Header(width, height, "RGB", alpha=False, turned=False)
    where = source.where(position)
    # Photographs have megabytes, their headers nearly always the
    # first kilobytes; for the others the whole file is read.
    if os.path.isfile(where):
        with contextlib.suppress(OSError, DataError), open(where, "rb") as file:
            return read_header(file.read(HEAD), where, source.decoding)
    return source.header(position)


def _done(
    source: Source,
    dataset: Mapping[str, Any],
    resolutions: Sequence[Resolution],
    sizes: Sizes,
) -> list[str]:
    """What happens to an image between its file and the network, in order."""
    rising = sorted(set(resolutions), key=height_width)
    stages = pixels_text(*rising)
    if source.prepared:
        done = [f"read as prepared, at {stages}"]
    elif rising == [source.resolution]:
        done = [f"as they are, {stages}"]
    else:
        done = [f"centre crop, resized to {stages}"]
    done = _shown(sizes, Decoding.from_config(dataset).background) + done
    if dataset.get("x_flip"):
        done.append("half of them mirrored while training")
    if class_names(source) and not dataset.get("num_classes"):
        done.append("their classes not used (dataset.num_classes=0)")
    return done


def _shown(sizes: Sizes, background: tuple[int, int, int]) -> list[str]:
    """What decoding does to some of the images."""
    done = []
    if sizes.alpha:
        name = {WHITE: "white", (0, 0, 0): "black"}.get(background, f"RGB {background}")
        done.append(f"laid on {name} where transparent{_of(sizes.alpha, sizes.read)}")
    if sizes.turned:
        done.append(f"turned as their EXIF says{_of(sizes.turned, sizes.read)}")
    return done


def _span(sizes: Sizes, images: int) -> str:
    small, large = (" x ".join(map(str, size)) for size in (sizes.smallest, sizes.largest))
    text = f"{small} px" if small == large else f"{small} to {large} px"
    if sizes.read < images:
        text += f" (of {sizes.read:,} images, drawn at random by the seed)"
    return text


def _enlarged(sizes: Sizes, source: Source, what: str) -> str:
    which = "" if sizes.read == len(source) else " that were looked at"
    return (
        f"{sizes.smaller:,} of {sizes.read:,} images{which} are smaller than {what} and are "
        "enlarged"
    )


def _doubts(
    source: Source, dataset: Mapping[str, Any], largest: Resolution, sizes: Sizes
) -> list[str]:
    doubts = []
    if sizes.smaller:
        doubts.append(_enlarged(sizes, source, f"the {pixels_text(largest)} of the largest stage"))
    # Also where the number agrees with the configuration, which
    # somebody may have set to what an error message named.
    empty = folders_without_images(source)
    if empty:
        doubts.append(
            f"no images that can be used are in {shortened(empty)}: no class, and no number"
        )
    elif dataset.get("num_classes") and (cause := likely_cause(source)):
        doubts.append(f"are the classes right? {cause}")
    # A list of labels may leave numbers out: a network has them, and
    # samples of them show nothing.
    absent = [n for n, count in enumerate(source.class_counts() or ()) if not count]
    if absent and dataset.get("num_classes"):
        names = class_names(source)
        doubts.append(f"no image has the class {shortened([names[n] for n in absent])}")
    return doubts


def unused_files(unused: Mapping[str, int]) -> str:
    """'8 .tif, 3 .gif', the most frequent first."""
    rows = sorted(unused.items(), key=lambda item: (-item[1], item[0]))
    listed = [f"{count:,} {ending or 'without an ending'}" for ending, count in rows[:6]]
    rest = sum(count for _, count in rows[6:])
    return ", ".join(listed) + (f", {rest:,} others" if rest else "")


def _unless(name: str, number: str) -> list[str]:
    """The name of a class, but not if it says no more than its number."""
    return [] if name == number else [shortened([name])]


def _in_brackets(count: int | None) -> str:
    return "" if count is None else f" ({count:,})"


def _of(count: int, read: int) -> str:
    return f" ({count:,} of {read:,})"

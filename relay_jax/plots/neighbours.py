"""The picture `neighbours`: the nearest real images of samples, to see whether a network copies
what it was trained on.

(1)  d(a, b) = sqrt(mean over the entries of (a - b)^2)
of pixels in [-1, 1], reduced to at most 32 x 32 by box averages, or of features, each divided
by its standard deviation over the real images. Where training mirrors images, a mirrored real
image counts as well (pixels only).
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

import numpy as np

from relay_jax.data.images import to_float
from relay_jax.data.loader import read
from relay_jax.data.source import Source
from relay_jax.plots import style
from relay_jax.plots.inputs import Inputs, Picture
from relay_jax.resolution import as_resolution
from relay_jax.runtime.logs import Progress
from relay_jax.sampling.pixels import to_uint8

if TYPE_CHECKING:
    from matplotlib.figure import Figure

SIDE = 32
BLOCK = 1024  # real images compared at a time
TYPICAL_IMAGES = 64  # real images whose nearest other one is searched for, as a scale
SEEDS, SEARCHED, COUNT = (
    8,
    10_000,
    4,
)  # samples, real images by default, neighbours of each

Features = Callable[[np.ndarray], np.ndarray]  # uint8 [n, h, w, 3] -> float [n, d]


@dataclass(frozen=True, kw_only=True)
class Neighbours:
    """By one distance.

    positions: int [m, k], in the source, nearest first; distances:
    [m, k]; typical: the median distance of a real image to the
    nearest other one.
    """

    name: str
    positions: np.ndarray
    distances: np.ndarray
    typical: float


def reduce(pixels: np.ndarray, side: int) -> np.ndarray:
    """Box average of [n, h, w, c] to the largest size of at most `side` that divides h, and w.
    Same type, rounded."""
    n, height, width, c = pixels.shape
    down, across = (
        next(f for f in range(-(-size // side), size + 1) if size % f == 0)
        for size in (height, width)
    )
    parts = pixels.reshape(n, height // down, down, width // across, across, c)
    means = parts.mean(axis=(2, 4), dtype=np.float32)
    if pixels.dtype == np.uint8:
        means = np.round(means)
    return means.astype(pixels.dtype)


def _blocks(
    references: Sequence[np.ndarray],
) -> Iterator[tuple[int, list[np.ndarray]]]:
    """(first index, each of the alternatives as float64 [BLOCK, d])."""
    for start in range(0, len(references[0]), BLOCK):
        parts = [reference[start : start + BLOCK] for reference in references]
        yield (
            start,
            [part.reshape(len(part), -1).astype(np.float64) for part in parts],
        )


def _squares(rows: np.ndarray) -> np.ndarray:
    """Sum of the squares of each row, without an array of them all."""
    return np.einsum("ij,ij->i", rows, rows)


def nearest(
    queries: np.ndarray, references: Sequence[np.ndarray], count: int
) -> tuple[np.ndarray, np.ndarray]:
    """Indices int [m, count] and distances [m, count] by equation (1), nearest first.

    queries: [m, ...]; references: alternatives of the same n things,
    each [n, ...], of which the nearer one counts; n >= count.
    """
    a = queries.reshape(len(queries), -1).astype(np.float64)
    best, index = np.zeros((len(a), 0)), np.zeros((len(a), 0), int)
    # Block by block, with only the best kept: all distances at once
    # would need the differences of every pair in memory.
    for start, parts in _blocks(references):
        squared = np.minimum.reduce(
            [_squares(a)[:, None] + _squares(b) - 2 * (a @ b.T) for b in parts]
        )
        here = np.broadcast_to(np.arange(start, start + squared.shape[1]), squared.shape)
        best, index = np.hstack([best, squared]), np.hstack([index, here])
        order = np.argsort(best, axis=1, kind="stable")[:, :count]
        best, index = (
            np.take_along_axis(best, order, 1),
            np.take_along_axis(index, order, 1),
        )
    # The squares of equal images may come out a little below zero.
    return index, np.sqrt(np.maximum(best, 0) / a.shape[1])


def _compare(
    name: str,
    samples: np.ndarray,
    real: Sequence[np.ndarray],
    positions: Sequence[int],
    count: int,
) -> Neighbours:
    index, distances = nearest(samples, real, count)
    probes = np.linspace(0, len(positions) - 1, min(TYPICAL_IMAGES, len(positions))).astype(int)
    # The nearest of a real image is the image itself, so the second
    # one is meant.
    _, among = nearest(real[0][probes], real, min(2, len(positions)))
    return Neighbours(
        name=name,
        positions=np.asarray(positions)[index],
        distances=distances,
        typical=float(np.median(among[:, -1])),
    )


def neighbours(
    samples: np.ndarray,
    source: Source,
    positions: Sequence[int],
    count: int,
    *,
    mirrored: bool,
    features: dict[str, Features],
    each: Callable[[int], None],
) -> list[Neighbours]:
    """By pixels, and by every kind of features. samples: uint8 [m, h, w, 3]; positions: [n],
    where to look, n >= count.

    each: called with the number of images
    read, now and then. Raises DataError.
    """
    resolution = as_resolution(samples.shape[1:3])
    small: list[np.ndarray] = []
    computed: dict[str, list[np.ndarray]] = {name: [] for name in features}
    # Only what is compared is kept: 10,000
    # images of 256 x 256 would take 2 GB.
    for start in range(0, len(positions), BLOCK // 4):
        pixels, _ = read(source, positions[start : start + BLOCK // 4], resolution)
        small.append(reduce(pixels, SIDE))
        for name, compute in features.items():
            computed[name].append(compute(pixels))
        each(start + len(pixels))

    low = to_float(np.concatenate(small))
    real = [low, low[:, :, ::-1]] if mirrored else [low]
    queries = to_float(reduce(samples, SIDE))
    results = [_compare("pixels", queries, real, positions, count)]
    for name, parts in computed.items():
        values = np.concatenate(parts)
        scale = np.maximum(values.std(axis=0), 1e-12)
        queries = features[name](samples) / scale
        results.append(_compare(name, queries, [values / scale], positions, count))
    return results


def neighbours_figure(
    results: Sequence[Neighbours],
    samples: np.ndarray,
    real: Sequence[np.ndarray],
    rows: Sequence[str],
    title: str,
) -> "Figure":
    """A row per sample: the sample, then its nearest real images by each distance.

    real: [m, k, h, w, 3] for each of the results; rows: what each
    sample is called.
    """
    counts = [result.positions.shape[1] for result in results]
    columns = 1 + sum(counts)
    height = 1.5 * style.aspect(samples[0])
    figure = style.make_figure(1.25 * columns + 0.8, height * len(samples) + 1.2, title)
    widths = [
        1.0,
        *(width for count in counts for width in (style.GAP, *[1.0] * count)),
    ]
    grid = figure.add_gridspec(
        len(samples), len(widths), wspace=0.05, hspace=0.05, width_ratios=widths
    )
    for n, sample in enumerate(samples):
        axes = figure.add_subplot(grid[n, 0])
        style.show(axes, sample)
        axes.set_ylabel(rows[n], fontsize="small")
        if n == 0:
            axes.set_title("sample", fontsize="small", loc="left")
        column = 1
        for result, images in zip(results, real, strict=True):
            for k in range(images.shape[1]):
                axes = figure.add_subplot(grid[n, column + 1 + k])
                style.show(axes, images[n, k])
                axes.set_xlabel(f"{result.distances[n, k]:.3f}", fontsize="small", labelpad=2)
                # Without the distance among real images nobody can
                # say whether one is small.
                if n == k == 0:
                    axes.set_title(
                        f"nearest real images by {result.name}\n(between real images: "
                        f"{result.typical:.3f})",
                        fontsize="small",
                        loc="left",
                    )
            column += 1 + images.shape[1]
    return figure


def plot_neighbours(inputs: Inputs) -> None:
    """neighbours.png and neighbours.json, of a few samples of the last stage."""
    seeds = inputs.seeds(SEEDS)
    last = inputs.stages[-1].name
    samples = to_uint8(inputs.samples(seeds, inputs.classes(seeds))[last])
    positions = inputs.positions(SEARCHED)
    extract = inputs.random_conv()
    results = neighbours(
        samples,
        inputs.source,
        positions,
        min(COUNT, len(positions)),
        mirrored=inputs.settings.dataset.x_flip,
        each=Progress("neighbours", len(positions)).update,
        features={"random-conv features": lambda pixels: extract(pixels)["pool"]},
    )
    resolution = as_resolution(samples.shape[1:3])
    # The pixels were not kept while searching; the few that are
    # shown are read again.
    real = []
    for result in results:
        images, _ = read(inputs.source, result.positions.reshape(-1).tolist(), resolution)
        real.append(images.reshape(*result.positions.shape, *images.shape[1:]))
    title = f"Samples and their nearest of {len(positions):,} real images"
    figure = neighbours_figure(results, samples, real, [f"seed {seed}" for seed in seeds], title)
    style.save(figure, inputs.out / "neighbours.png")
    numbers = {
        "seeds": seeds,
        "searched": len(positions),
        "distances": [asdict(result) for result in results],
    }
    inputs.write("neighbours", inputs.describe() | numbers)


PICTURE = Picture(plot_neighbours, ("real images", "all checkpoints"))

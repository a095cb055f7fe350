"""The metrics at the size of the published protocol, and what an image costs beside its decoding.

    python -m benchmarks.evaluation metrics
    python -m benchmarks.evaluation folder --side=256

The first takes 50,000 samples and 10,000 reference images of 2,048 features, the second random-conv
features of PNG files.
Times are of the processor (all threads); wall times of another moment on a shared machine differ.
"""

import argparse
import resource
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from absl import logging
from PIL import Image

from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.evaluation.features import make_extractor
from relay_jax.evaluation.images import open_images
from relay_jax.evaluation.kernel_distance import kernel_distance
from relay_jax.evaluation.metrics import score
from relay_jax.evaluation.neighbours import neighbour_shares
from relay_jax.evaluation.sliced_distance import sliced_distance
from relay_jax.evaluation.statistics import FeatureSet, collect, feature_stats
from relay_jax.runtime.sharding import make_mesh


def timed(name: str, action: Callable[[], object]) -> None:
    """Does it and prints what it took."""
    wall, used = time.monotonic(), time.process_time()
    action()
    print(
        f"{name:28} {time.process_time() - used:8.1f} s of the processor, "
        f"{time.monotonic() - wall:8.1f} s by the clock",
        flush=True,
    )


def metrics(samples: int, reference: int, dims: int) -> None:
    """Every metric on random features, as many as Inception's: halves of normal distributions."""
    logging.set_verbosity(logging.INFO)
    rng = np.random.default_rng(0)

    def features(count: int, shift: float) -> np.ndarray:
        spread = np.linspace(0.1, 1, dims, dtype=np.float32)
        return np.abs(
            rng.standard_normal((count, dims), dtype=np.float32) * spread + np.float32(shift)
        )

    sample_features, reference_features = features(samples, 0.0), features(reference, 0.02)
    statistics: dict[str, tuple[np.ndarray, np.ndarray]] = {}
    timed(
        "mean and covariance",
        lambda: statistics.update(
            a=feature_stats(sample_features), b=feature_stats(reference_features)
        ),
    )
    timed(
        "Frechet distance",
        lambda: score(
            FeatureSet(count=reference, statistics={"pool": statistics["b"]}),
            FeatureSet(count=samples, statistics={"pool": statistics["a"]}),
            "inception",
        ),
    )
    guesses = rng.dirichlet(np.full(1008, 0.05), samples).astype(np.float32)
    timed(
        "inception score",
        lambda: score(
            FeatureSet(count=0), FeatureSet(count=samples, probabilities=guesses), "inception"
        ),
    )
    sets = (
        FeatureSet(count=reference, rows=reference_features),
        FeatureSet(count=samples, rows=sample_features),
    )
    timed("MIND", lambda: sliced_distance(*sets))
    timed("KID", lambda: kernel_distance(*sets))
    timed("precision ... coverage", lambda: neighbour_shares(*sets))
    print(
        f"peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB, of "
        "which the features are "
        f"{(sample_features.nbytes + reference_features.nbytes) / 2**30:.2f}"
    )


def folder(side: int, count: int) -> None:
    """Milliseconds of the processor per image, the least of three rounds."""
    source, rng = SyntheticShapes(side, 64, 0), np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as name:
        for number in range(count):
            noisy = source[number % 64][0] + rng.integers(-8, 8, (side, side, 3))
            Image.fromarray(np.clip(noisy, 0, 255).astype(np.uint8)).save(
                Path(name, f"{number:06d}.png")
            )
        images = open_images(Path(name), threads=2)
        extractor = make_extractor("random-conv", weights=None, mesh=make_mesh())
        pixels = np.concatenate([part for _, part in images.share(0, 1, 256)])
        actions: dict[str, Callable[[], object]] = {
            "Pillow alone": lambda: [
                np.asarray(Image.open(file).convert("RGB")) for file in sorted(Path(name).iterdir())
            ],
            "decoding in two threads": lambda: list(images.share(0, 1, 256)),
            "features alone": lambda: extractor(pixels),
            "the evaluation": lambda: collect(images, extractor, what="samples", rows=count),
        }
        best = dict.fromkeys(actions, np.inf)
        for action in actions.values():
            action()
        for _ in range(3):
            for what, action in actions.items():
                used = time.process_time()
                action()
                best[what] = min(best[what], time.process_time() - used)
    for what, seconds in best.items():
        print(f"{side} px, {what:24} {1e3 * seconds / count:7.3f} ms per image")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=("metrics", "folder"))
    parser.add_argument("--samples", type=int, default=50_000)
    parser.add_argument("--reference", type=int, default=10_000)
    parser.add_argument("--dims", type=int, default=2048)
    parser.add_argument("--side", type=int, default=256)
    parser.add_argument("--count", type=int, default=1000)
    args = parser.parse_args()
    if args.what == "metrics":
        metrics(args.samples, args.reference, args.dims)
    else:
        folder(args.side, args.count)


if __name__ == "__main__":
    main()

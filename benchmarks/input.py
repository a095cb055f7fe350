"""The input pipeline per core: JPEG decoders, the loader, the start on a million images.

    python -m benchmarks.input decoders --images=DIR
    python -m benchmarks.input loader --images=DIR
    python -m benchmarks.input index --files=1000000 --folder=DIR

The first two read the JPEGs of a folder, or without one made ones of 500 x 375 pixels; the third
makes DIR/images, and removes it afterwards. Decoders that are not installed are left out (pip
install simplejpeg imagecodecs opencv-python-headless pyvips-binary pyvips).
Times are of the processor, medians over rounds in which all take turns.
"""

import argparse
import ctypes
import io
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
from absl import flags
from PIL import Image

from relay_jax.data.folder import ImageFolder
from relay_jax.data.images import center_crop_resize, decode_picture
from relay_jax.data.loader import Loader, Stream
from relay_jax.data.packed import PackedDataset
from relay_jax.data.prepare import prepare
from relay_jax.data.source import Source

RESOLUTIONS = (64, 256)
SETTLING_SECONDS = 3  # a folder that has just changed is not indexed
Decoder = Callable[[bytes], np.ndarray | Image.Image]  # a JPEG -> RGB, whole


def made_jpeg(seed: int, width: int = 500, height: int = 375) -> bytes:
    """Noise with the spectrum of photographs (amplitude 1/f), about 150 kB, much like
    ImageNet's files."""
    rng = np.random.default_rng(seed)
    fy, fx = np.fft.fftfreq(height)[:, None], np.fft.fftfreq(width)[None]
    waves = np.fft.fft2(rng.standard_normal((3, height, width))) / np.maximum(
        np.hypot(fx, fy), 1 / width
    )
    grey, *tints = np.fft.ifft2(waves).real
    colours = np.stack([grey, grey + 0.3 * tints[0], grey + 0.3 * tints[1]], axis=-1)
    pixels = np.clip(128 + 50 * colours / colours.std(), 0, 255).astype(np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "jpeg", quality=95)
    return file.getvalue()


def jpegs(folder: str, count: int = 64) -> list[bytes]:
    """RGB JPEGs of a folder, those as large as ImageNet's usual ones if there are any; without
    a folder, made ones."""
    if not folder:
        return [made_jpeg(seed) for seed in range(count)]
    files = []
    for file in sorted(Path(folder).rglob("*")):
        if file.suffix.lower() in (".jpg", ".jpeg"):
            with Image.open(file) as image:
                if image.mode == "RGB":
                    files.append((max(image.size) == 500, file))
    usual = [file for is_usual, file in files if is_usual] or [file for _, file in files]
    if not usual:
        sys.exit(f"error: no RGB JPEGs in {folder}")
    return [file.read_bytes() for file in usual[:count]]


def decoders() -> dict[str, Decoder]:
    """Those installed here, asked for the pixels of libjpeg-turbo's exact settings, which are
    Pillow's."""
    by_name: dict[str, Decoder] = {
        "Pillow, cropped as it is (the loader)": lambda data: decode_picture(data, "")
    }
    by_name["Pillow, by way of an array"] = lambda data: np.asarray(decode_picture(data, ""))
    with suppress(ImportError):
        import simplejpeg

        by_name["simplejpeg"] = lambda data: simplejpeg.decode_jpeg(
            data, fastdct=False, fastupsample=False
        )
        by_name["simplejpeg, fast DCT and upsampling"] = lambda data: simplejpeg.decode_jpeg(
            data, fastdct=True, fastupsample=True
        )
    with suppress(ImportError):
        import imagecodecs

        by_name["imagecodecs"] = lambda data: imagecodecs.jpeg8_decode(data, outcolorspace="RGB")
    with suppress(ImportError):
        import cv2

        cv2.setNumThreads(1)
        how = cv2.IMREAD_COLOR_RGB | cv2.IMREAD_IGNORE_ORIENTATION
        by_name["opencv-python-headless"] = lambda data: cv2.imdecode(
            np.frombuffer(data, np.uint8), how
        )
    with suppress(ImportError, OSError):
        import pyvips

        pyvips.cache_set_max(0)
        by_name["pyvips"] = lambda data: pyvips.Image.new_from_buffer(
            data, "", access="sequential"
        ).numpy()
    with suppress(ImportError, RuntimeError):  # needs a library that its wheel does not bring
        import turbojpeg

        turbo = turbojpeg.TurboJPEG()
        by_name["PyTurboJPEG"] = lambda data: turbo.decode(data, pixel_format=turbojpeg.TJPF_RGB)
    return by_name


def cropped(decode: Decoder, resolution: int, data: bytes) -> np.ndarray:
    return center_crop_resize(decode(data), resolution)


def drafted(resolution: int, data: bytes) -> np.ndarray:
    """Decoded at the least of 1/2, 1/4, 1/8 of the size that is still large enough: other
    pixels than ADM's."""
    with Image.open(io.BytesIO(data)) as image:
        image.draft("RGB", (resolution, resolution))
        image.load()
        return center_crop_resize(image, resolution)


def keep_memory() -> None:
    """glibc hands freed memory back and takes it again, or not, by chance of what came before:
    up to 25% either way."""
    with suppress(AttributeError, OSError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 25)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 28)  # M_TRIM_THRESHOLD


def cpu_in_turns(
    functions: Mapping[str, Callable[[bytes], object]], data: Sequence[bytes], rounds: int
) -> dict[str, float]:
    """Processor milliseconds per image, the median over rounds."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            function(data[0])
            begin = time.process_time()
            for item in data:
                function(item)
            seconds[name].append(time.process_time() - begin)
    return {name: float(np.median(times)) / len(data) * 1e3 for name, times in seconds.items()}


def measure_decoders(data: Sequence[bytes], rounds: int) -> None:
    """Prints a table. Equal pixels are found out, not assumed."""
    keep_memory()
    by_name = decoders()
    exact = [np.asarray(decode_picture(item, "")) for item in data]
    apart = {
        name: max(
            int(np.abs(np.asarray(decode(item)).astype(int) - pixels).max())
            for item, pixels in zip(data, exact, strict=True)
        )
        for name, decode in by_name.items()
    }
    times = {0: cpu_in_turns(by_name, data, rounds)}
    for resolution in RESOLUTIONS:
        whole: dict[str, Callable[[bytes], np.ndarray]] = {
            name: partial(cropped, decode, resolution) for name, decode in by_name.items()
        }
        whole["Pillow, reduced by the DCT (draft)"] = partial(drafted, resolution)
        times[resolution] = cpu_in_turns(whole, data, rounds)
    apart["Pillow, reduced by the DCT (draft)"] = max(
        int(np.abs(drafted(64, item).astype(int) - center_crop_resize(pixels, 64)).max())
        for item, pixels in zip(data, exact, strict=True)
    )
    best = {r: min(ms for name, ms in times[r].items() if not apart[name]) for r in RESOLUTIONS}
    sizes = np.mean([pixels.shape[0] * pixels.shape[1] for pixels in exact])
    kilobytes, both = np.mean([len(item) for item in data]) / 1e3, ", ".join(map(str, RESOLUTIONS))
    print(f"{len(data)} JPEGs of {sizes / 1e3:.0f} kpixel and {kilobytes:.0f} kB on average\n")
    print(
        "| decoder | ms, decode alone | "
        + " | ".join(f"ms, with the crop at {r}" for r in RESOLUTIONS)
        + f" | images/s and core, {both} | rate over the fastest exact one's | largest pixel "
        "difference |"
    )
    print("|---" * (5 + len(RESOLUTIONS)) + "|")
    for name in times[RESOLUTIONS[0]]:
        row = [times[r][name] for r in RESOLUTIONS]
        alone = f"{times[0][name]:.2f}" if name in times[0] else "-"
        print(
            f"| {name} | {alone} | "
            + " | ".join(f"{ms:.2f}" for ms in row)
            + " | "
            + ", ".join(f"{1e3 / ms:.0f}" for ms in row)
            + " | "
            + ", ".join(f"{best[r] / times[r][name]:.2f}" for r in RESOLUTIONS)
            + f" | {apart[name]} |"
        )


def loader_rates(
    source: Source, resolution: int, threads: int, workers: int, batches: int
) -> tuple[float, float]:
    """Images per second of the clock, and per second of the processor (nan with workers, whose
    time is not ours)."""
    with Loader(
        source,
        Stream(resolution=resolution, batch_size=32, seed=0, x_flip=True),
        threads=threads,
        workers=workers,
    ) as loader:
        for _ in range(
            2 * max(threads, 1) * max(workers, 1)
        ):  # what was prefetched before the clock started
            next(loader)
        wall, cpu = time.perf_counter(), time.process_time()
        for _ in range(batches):
            next(loader)
        wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
    return 32 * batches / wall, float("nan") if workers else 32 * batches / cpu


def measure_loader(data: Sequence[bytes], rounds: int) -> None:
    """Prints a table for the files themselves and for the packed set made of them."""
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain's worker processes want it
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "files").mkdir()
        for n, item in enumerate(data):
            first = Path(folder) / "files" / f"{n:03d}-000.jpg"
            first.write_bytes(item)
            for copy in range(
                1, 1024 // len(data)
            ):  # Grain's shuffle is slow on sets of a few images
                os.link(first, first.with_name(f"{n:03d}-{copy:03d}.jpg"))
        files = ImageFolder(Path(folder) / "files")
        prepare(files, RESOLUTIONS, Path(folder) / "packed", description={})
        settings = [
            (source, r, threads, workers)
            for source in ("files", "packed")
            for r in RESOLUTIONS
            for threads, workers in ((0, 0), (1, 0), (2, 0), (1, 2))
        ]
        rates: dict[tuple, list[tuple[float, float]]] = {setting: [] for setting in settings}
        for _ in range(rounds):
            for source, r, threads, workers in settings:
                opened: Source = (
                    files if source == "files" else PackedDataset(Path(folder) / "packed", r)
                )
                rates[source, r, threads, workers].append(
                    loader_rates(
                        opened, r, threads, workers, batches=8 if source == "files" else 40
                    )
                )
    print(
        f"{os.cpu_count()} cores\n\n| source | px | threads | workers | images/s | images per "
        "processor second |"
    )
    print("|---" * 6 + "|")
    for (source, r, threads, workers), pairs in rates.items():
        wall, cpu = np.median(np.array(pairs), axis=0)
        print(
            f"| {source} | {r} | {threads} | {workers} | {wall:.0f} | "
            f"{'-' if workers else f'{cpu:.0f}'} |"
        )


START = """
import resource, sys, time
begin = time.perf_counter()
from relay_jax.data.loader import Loader, Stream
from relay_jax.data.folder import ImageFolder
imported = time.perf_counter()
source = ImageFolder(sys.argv[1])
opened = time.perf_counter()
with Loader(source, Stream(resolution=32, batch_size=32, seed=0, x_flip=True)) as loader:
    next(loader)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
print(f"{len(source):,} images in {source.num_classes:,} classes: opened in "
      f"{opened - imported:.2f} s, first batch {time.perf_counter() - opened:.2f} s later; "
      f"{peak:.0f} MB")
"""


def measure_index(folder: Path, files: int) -> None:
    """Starts on `files` images in sub-folders of 1000 (links to one small JPEG each), first and
    again."""
    images = folder / "images"
    if images.exists():
        sys.exit(f"error: {images} exists; name another --folder")
    image = made_jpeg(0, 40, 40)
    environment = os.environ | {"XDG_CACHE_HOME": str(folder / "cache"), "JAX_PLATFORMS": "cpu"}
    try:
        for first in range(0, files, 1000):
            of_class = images / f"n{first // 1000:08d}"
            of_class.mkdir(parents=True)
            (of_class / "00000.JPEG").write_bytes(image)
            for n in range(1, min(1000, files - first)):
                os.link(of_class / "00000.JPEG", of_class / f"{n:05d}.JPEG")
        time.sleep(SETTLING_SECONDS)
        dropped = drop_caches()
        for what in (
            "first start",
            "second start",
            "third start, disk cache dropped" if dropped else "third start",
        ):
            if what.startswith("third"):
                drop_caches()
            output = subprocess.run(
                [sys.executable, "-c", START, str(images)],
                env=environment,
                check=True,
                text=True,
                capture_output=True,
            ).stdout.strip()
            print(
                f"{what}{', disk cache dropped' if dropped and what == 'first start' else ''}: "
                f"{output}",
                flush=True,
            )
    finally:
        shutil.rmtree(images, ignore_errors=True)
        shutil.rmtree(folder / "cache", ignore_errors=True)


def drop_caches() -> bool:
    """Makes the kernel forget what it knows of the disk, where this process may (root on Linux)."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("what", choices=["decoders", "loader", "index"])
    parser.add_argument("--images", default="", help="folder of JPEGs; without it, made ones")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "relay-index")
    arguments = parser.parse_args()
    if arguments.what == "decoders":
        measure_decoders(jpegs(arguments.images), arguments.rounds)
    elif arguments.what == "loader":
        measure_loader(jpegs(arguments.images), min(arguments.rounds, 3))
    else:
        measure_index(arguments.folder, arguments.files)


if __name__ == "__main__":
    main()

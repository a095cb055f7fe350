"""Sets of images: every image once whatever the hosts and parts, hashes, and what is refused."""

import json
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.config import build
from relay_jax.data.decoding import Decoding
from relay_jax.data.images import center_crop_resize
from relay_jax.data.synthetic import SyntheticShapes
from relay_jax.errors import DataError
from relay_jax.evaluation.images import (
    ArrayImages,
    GeneratedImages,
    ImageSet,
    SourceImages,
    choice,
    open_images,
)
from relay_jax.evaluation.references import open_reference
from relay_jax.sampling.chain import Chain, Inputs, Pixels
from relay_jax.sampling.request import Request
from relay_jax.sampling.shards import ShardFolder, write_manifest
from relay_jax.stage import Stage
from tests.conftest import error_of, tiny_relay


def pixels(count: int, side: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, side, side, 3), dtype=np.uint8)


def write_folder(folder: Path, images: np.ndarray) -> Path:
    for number, image in enumerate(images):
        path = folder / f"{number // 4:06d}" / f"{number:06d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def write_shards(folder: Path, images: np.ndarray) -> Path:
    """As --mode=sample leaves them, with the sum of all beside the shards."""
    for first, last in ((7, 9), (999_998, 999_999), (1_000_000, 1_000_001)):
        np.savez(folder / f"{first:06d}-{last:06d}.npz", images[: last - first + 1])
        images = images[last - first + 1 :]
    np.savez(folder / "samples_7x4x4x3.npz", pixels(7, seed=9))
    return folder


def write_npz(folder: Path, images: np.ndarray) -> Path:
    np.savez_compressed(folder / "x.npz", arr_0=images, arr_1=np.arange(len(images)))
    return folder / "x.npz"


def everything(images: ImageSet, hosts: int, batch: int) -> np.ndarray:
    """What all hosts read, put together by the positions; every image must come once, in as
    many parts on each host."""
    shares = [list(images.share(host, hosts, batch)) for host in range(hosts)]
    assert len({len(share) for share in shares}) == 1
    assert all(
        len(part) == len(positions) <= batch for share in shares for positions, part in share
    )
    positions = np.concatenate([positions for share in shares for positions, _ in share])
    assert sorted(positions) == list(range(len(images)))
    return np.concatenate([part for share in shares for _, part in share])[np.argsort(positions)]


@pytest.mark.parametrize(("hosts", "batch"), [(1, 3), (2, 2), (3, 64), (9, 1)])
@pytest.mark.parametrize("kind", ["folder", "npz", "shards", "memory", "source"])
def test_every_image_comes_once_whatever_hosts_and_parts(
    tmp_path: Path, kind: str, hosts: int, batch: int
) -> None:
    want = pixels(7)
    images: ImageSet
    if kind == "memory":
        images = ArrayImages(want, {})
    elif kind == "source":
        source = SyntheticShapes(16, 7, 0)
        images = SourceImages(source, 4, {}, exact=False, threads=2)
        want = np.stack([center_crop_resize(source[i][0], 4) for i in range(7)])
    else:
        images = open_images(
            {"folder": write_folder, "npz": write_npz, "shards": write_shards}[kind](
                tmp_path, want
            ),
            2,
        )
    assert images.identity["images"] == len(images) == 7 and images.resolution == 4
    np.testing.assert_array_equal(everything(images, hosts, batch), want)


@pytest.mark.parametrize("kind", ["npz", "arrayrecord"])
def test_the_formats_of_sampling_are_read(tmp_path: Path, kind: str) -> None:
    want, folder = pixels(5), ShardFolder(tmp_path, kind, 4, 3)
    folder.plan(range(5))
    for seed, image in enumerate(want):
        folder.add(seed, image, 1)
    if kind == "arrayrecord":
        write_manifest(folder, {})
    np.testing.assert_array_equal(everything(open_images(tmp_path, 1), 1, 64), want)


def test_a_choice_is_always_the_same_and_not_the_beginning(tmp_path: Path) -> None:
    assert choice(5, 9).tolist() == choice(5, 5).tolist() == [0, 1, 2, 3, 4]
    positions = choice(1000, 10).tolist()
    assert positions == choice(1000, 10).tolist() == sorted(set(positions))
    assert len(positions) == 10 and max(positions) > 500
    source = SyntheticShapes(4, 30, 0)
    images = SourceImages(source, 4, {}, exact=True, threads=1, limit=6)
    np.testing.assert_array_equal(
        everything(images, 2, 2), np.stack([source[i][0] for i in choice(30, 6)])
    )
    assert "of 30" in images.identity["choice"] and images.identity["images"] == 6


class Reversed(Chain):
    """In the place of a chain: the images of seeds show their number, in batches from the end."""

    def __init__(self, stages: Sequence[Stage]) -> None:
        self.stages = list(stages)

    def stream(
        self, seeds: Iterable[int], inputs: Callable[[np.ndarray], Inputs]
    ) -> Iterator[Pixels]:
        for batch in np.array_split(np.asarray(list(seeds), np.int64)[::-1], 3):
            pixels = np.broadcast_to(batch[:, None, None, None], (len(batch), 8, 8, 3))
            yield Pixels(batch, inputs(batch).classes, pixels.astype(np.uint8))


@pytest.mark.parametrize("hosts", [1, 3])
def test_generated_images_come_once_in_the_order_of_their_seeds(hosts: int) -> None:
    stage = build(tiny_relay())[0]
    request = Request(stages=[stage], seeds=[9, 3, 4, 7, 5, 3])
    images = GeneratedImages(request, Reversed([stage]), None)
    assert len(images) == images.identity["images"] == 5 and images.resolution == 8
    assert everything(images, hosts, 64)[:, 0, 0, 0].tolist() == [3, 4, 5, 7, 9]


def test_real_images_beside_the_reference_are_others() -> None:
    source = SyntheticShapes(4, 30, 0)
    rest = sorted(set(range(30)) - set(choice(30, 20).tolist()))
    reference = SourceImages(source, 4, {"kind": "x"}, exact=True, threads=2, limit=20)
    others = reference.held_out(6)
    assert others is not None and others.identity != reference.identity
    assert others.identity["images"] == 6 and len(reference) == 20
    real = np.stack([source[i][0] for i in rest])
    np.testing.assert_array_equal(everything(others, 1, 4), real[choice(10, 6)])
    assert reference.held_out(11) is None
    assert SourceImages(source, 4, {}, exact=True, threads=2).held_out(1) is None


def test_a_hash_changes_with_the_images_alone(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "a", pixels(5))
    first = open_images(folder, 1).identity["sha256"]
    (folder / "notes.txt").write_text("no image")
    assert open_images(folder, 1).identity["sha256"] == first
    Image.fromarray(pixels(1, seed=3)[0]).save(folder / "000000" / "000001.png")
    assert open_images(folder, 1).identity["sha256"] != first
    a, b = write_npz(tmp_path, pixels(3)), tmp_path / "b.npz"
    b.write_bytes(a.read_bytes())
    assert open_images(a, 1).identity["sha256"] == open_images(b, 1).identity["sha256"]


def save(**arrays: np.ndarray) -> Callable[[Path], Path]:
    def action(folder: Path) -> Path:
        np.savez(folder / "x.npz", **arrays)
        return folder / "x.npz"

    return action


def odd_one(folder: Path) -> Path:
    Image.fromarray(pixels(1, side=6)[0]).save(
        write_folder(folder, pixels(4)) / "000000" / "000002.png"
    )
    return folder


def oblong(folder: Path) -> Path:
    Image.fromarray(np.zeros((4, 6, 3), np.uint8)).save(folder / "0.png")
    return folder


def damaged_npz(folder: Path) -> Path:
    file = write_npz(folder, pixels(4000))  # beyond what is read with the header
    with zipfile.ZipFile(file) as archive:
        start = archive.getinfo("arr_0.npy").header_offset
    data = bytearray(file.read_bytes())
    data[start + 150_000 : start + 150_020] = bytes(20)
    file.write_bytes(data)
    return file


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda folder: folder, "no images found"),
        (lambda folder: folder / "nowhere", "no such folder or npz"),
        (lambda folder: oblong(folder) / "0.png", "is one image; name the folder"),
        (odd_one, "000002.png has 6 x 6 pixels, the first one 4 x 4"),
        (save(images=pixels(2)), "arr_0 is missing, it holds images"),
        (save(arr_0=np.zeros((2, 4, 4, 3))), "must be uint8"),
        (save(arr_0=np.zeros((2, 4, 5, 2), np.uint8)), "must be images [n, h, w, 3]"),
        (save(arr_0=np.zeros((0, 4, 4, 3), np.uint8)), "holds no images"),
        (damaged_npz, "damaged"),
        (
            lambda folder: (folder / "x.npz").write_text("?") and folder / "x.npz",
            "not a readable npz",
        ),
    ],
)
def test_bad_images_are_one_line(tmp_path: Path, make: Callable[[Path], Path], says: str) -> None:
    path = make(tmp_path)
    message = error_of(lambda: everything(open_images(path, 2), 1, 3))
    assert says in message


def test_images_need_not_be_squares(tmp_path: Path) -> None:
    images = open_images(oblong(tmp_path), 2)
    assert images.resolution == (4, 6)
    assert everything(images, 1, 3).shape == (1, 4, 6, 3)


@pytest.mark.parametrize("kind", ["npz", "arrayrecord"])
def test_two_kinds_of_images_in_one_folder_are_asked_for(tmp_path: Path, kind: str) -> None:
    """To score one of them would be a guess, whichever was made later."""
    write_folder(tmp_path, pixels(5))
    if kind == "npz":
        np.savez(tmp_path / "old_run.npz", pixels(3))
    else:
        (tmp_path / "dataset.json").write_text('{"shards": {}}')
    message = error_of(lambda: open_images(tmp_path, 1))
    assert "5 image files (000000/000000.png, " in message and "name the one that is" in message
    assert ("1 npz (old_run.npz)" if kind == "npz" else "1 set of ArrayRecord files") in message
    with pytest.raises(DataError, match="name the one that is meant"):
        open_reference(str(tmp_path), 4, data_set=lambda: (None, {}), threads=1)  # type: ignore


def test_parts_beside_their_sum_are_asked_for(tmp_path: Path) -> None:
    for part in range(2):
        np.savez(tmp_path / f"part_{part}.npz", pixels(4, seed=part))
    assert len(open_images(tmp_path, 1)) == 8
    np.savez(tmp_path / "samples_8x4x4x3.npz", pixels(8))
    assert "samples_8x4x4x3.npz beside parts such as part_0.npz" in error_of(
        lambda: open_images(tmp_path, 1)
    )


def test_edms_data_set_is_scored_as_folder_and_as_zip(tmp_path: Path) -> None:
    want = pixels(6)
    folder = write_folder(tmp_path / "set", want)
    names = sorted(str(file.relative_to(folder)) for file in folder.rglob("*.png"))
    (folder / "dataset.json").write_text(json.dumps({"labels": [[name, 0] for name in names]}))
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for name in ("dataset.json", *names):
            archive.write(folder / name, name)
    for path in (folder, tmp_path / "set.zip"):
        np.testing.assert_array_equal(everything(open_images(path, 1), 1, 64), want)


def test_what_is_scored_and_what_it_is_compared_with_is_described(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO", logger="absl")  # wherever other tests have left it
    folder = write_folder(tmp_path / "set", pixels(5))
    Image.new("RGBA", (4, 4)).save(folder / "000000" / "clear.png")
    (folder / "photo.heic").write_bytes(b"")
    open_images(folder, 1).show("samples")
    line = f"samples: folder {folder}: 6 images, 4 x 4 px; not used: 1 .heic; laid on white"
    assert line in caplog.text and "resized" not in caplog.text
    reference = open_reference(str(folder), 8, data_set=lambda: (None, {}), threads=1)  # type: ignore
    assert isinstance(reference.images, SourceImages)
    reference.images.show("reference")
    assert "centre crop, resized to 8 px" in caplog.text
    assert "reference: 6 of 6 images are smaller than 8 px and are enlarged" in caplog.text
    open_images(write_npz(tmp_path, pixels(3)), 1).show("samples")
    assert "x.npz: 3 images of 4 px" in caplog.text


def test_pictures_that_are_scored_lie_on_the_configured_background(tmp_path: Path) -> None:
    Image.new("RGBA", (4, 4)).save(tmp_path / "clear.png")
    for colour in ((255, 255, 255), (0, 10, 20)):
        images = open_images(tmp_path, 1, Decoding(background=colour))
        assert (everything(images, 1, 1) == colour).all()


def test_shards_of_different_sizes_are_refused(tmp_path: Path) -> None:
    np.savez(tmp_path / "000000-000001.npz", pixels(2))
    np.savez(tmp_path / "000002-000003.npz", pixels(2, side=6))
    assert "images of different sizes" in error_of(lambda: open_images(tmp_path, 1))

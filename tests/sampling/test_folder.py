"""Numbered images: paths, what is finished, reading back; the threads that write."""

import io
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from relay_jax.errors import UserError
from relay_jax.sampling import folder as writer
from relay_jax.sampling.folder import (
    Background,
    PngFolder,
    holds_images,
    image_path,
    png_damage,
    read_images,
)
from relay_jax.sampling.pixels import to_uint8


def images(count: int, side: int = 6) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (count, side, side, 3)).astype(np.float32)


def write(folder: Path, seeds: list[int], x: np.ndarray) -> None:
    for seed, pixels in zip(seeds, to_uint8(x), strict=True):
        PngFolder(folder).add(seed, pixels, 0)


# Files


@pytest.mark.parametrize(
    "seed, name",
    [
        (12, "000000/000012.png"),
        (999, "000000/000999.png"),
        (1000, "001000/001000.png"),
        (59_999, "059000/059999.png"),
        (1_234_567, "1234000/1234567.png"),
    ],
)
def test_images_lie_in_folders_of_a_thousand_seeds(seed: int, name: str) -> None:
    assert image_path(Path("out"), seed) == Path("out") / name


def test_finished_is_what_has_its_name_and_nothing_else_is_left(tmp_path: Path) -> None:
    seeds = [2, 0, 1000, 12]
    assert PngFolder(tmp_path / "new").finished(seeds) == set() and not (tmp_path / "new").exists()
    write(tmp_path, [0, 1000], images(2))
    (tmp_path / "000000" / ".000002.png.tmp").write_bytes(b"half a file")
    assert PngFolder(tmp_path).finished(seeds) == {0, 1000}
    write(tmp_path, [2, 12], images(2))
    assert PngFolder(tmp_path).finished([*seeds, 3]) == set(seeds)
    files = sorted(
        path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*") if path.is_file()
    )
    assert files == [
        "000000/000000.png",
        "000000/000002.png",
        "000000/000012.png",
        "001000/001000.png",
    ]


def test_a_file_is_the_lossless_image_of_its_seed(tmp_path: Path) -> None:
    x = images(3)
    write(tmp_path, [5, 3, 4], x)
    for seed, image in zip([5, 3, 4], x, strict=True):
        with Image.open(image_path(tmp_path, seed)) as file:
            assert file.format == "PNG" and file.mode == "RGB"
            np.testing.assert_array_equal(np.asarray(file), to_uint8(image))


@pytest.mark.parametrize("kind", ["bit", "cut", "longer", "other size", "no png"])
def test_damaged_images_are_not_finished_and_are_removed(tmp_path: Path, kind: str) -> None:
    write(tmp_path, [0, 1, 2], images(3))
    path = image_path(tmp_path, 1)
    content = path.read_bytes()
    flipped = bytearray(content)
    flipped[len(content) // 2] ^= 1
    if kind == "other size":
        PngFolder(tmp_path).add(1, to_uint8(images(1, side=5))[0], 0)
    else:
        path.write_bytes(
            {
                "bit": bytes(flipped),
                "cut": content[:-7],
                "longer": content + b"x",
                "no png": b"",
            }[kind]
        )
    assert PngFolder(tmp_path, 6).finished([0, 1, 2]) == {0, 2} and not path.exists()
    assert PngFolder(tmp_path, 6).finished([0, 2]) == {0, 2}


def test_every_flipped_bit_of_a_png_is_seen() -> None:
    file = io.BytesIO()
    Image.fromarray(to_uint8(images(1))[0]).save(file, format="png")
    content = file.getvalue()
    assert png_damage(content, 6) == ""
    for bit in range(8 * len(content)):
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        assert png_damage(bytes(flipped), 6), f"bit {bit}"
    assert all(png_damage(content[:length], 6) for length in range(len(content)))


def test_leftovers_go_once_nobody_writes_to_them(tmp_path: Path) -> None:
    write(tmp_path, [0], images(1))
    old, new = tmp_path / "000000" / ".000007.png.tmp", tmp_path / ".samples.json.tmp"
    for path in (old, new):
        path.write_bytes(b"half a file")
    os.utime(old, (0, 0))
    PngFolder(tmp_path).tidy()
    assert not old.exists() and new.exists() and image_path(tmp_path, 0).exists()


def test_processes_share_the_seeds(monkeypatch: pytest.MonkeyPatch) -> None:
    owners = []
    monkeypatch.setattr(writer.jax, "process_count", lambda: 3)
    for index in range(3):
        monkeypatch.setattr(writer.jax, "process_index", lambda index=index: index)
        owners.append([seed for seed in range(10) if PngFolder(Path()).owns(seed)])
    assert (
        sorted(seed for share in owners for seed in share) == list(range(10))
        and min(map(len, owners)) == 3
    )


def test_what_cannot_be_written_is_one_line_that_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "000000").write_text("in the way")
    with pytest.raises(
        UserError, match=r"000000/000001\.png cannot be written .*another place"
    ) as error:
        PngFolder(tmp_path).add(1, to_uint8(images(1))[0], 0)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "name", ["000000/000012.png", "5.png", "000000-000999.npz", "64/000000-000009.array_record"]
)
def test_a_folder_with_images_is_known_by_their_names(tmp_path: Path, name: str) -> None:
    (tmp_path / "000000").mkdir()
    (tmp_path / "notes.txt").write_text("")
    (tmp_path / "000000" / ".000012.png.tmp").write_text("")
    assert not holds_images(tmp_path) and not holds_images(tmp_path / "absent")
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("")
    assert holds_images(tmp_path)


# Threads


def test_a_bounded_number_of_calls_waits_and_all_are_done_in_the_end() -> None:
    begin, lock, running, most, done = threading.Event(), threading.Lock(), set(), [], []

    def call(number: int) -> None:
        begin.wait(10)
        with lock:
            running.add(number)
            most.append(len(running))
        time.sleep(0.002)
        with lock:
            running.remove(number)
            done.append(number)

    with Background(threads=3, waiting=5) as background:
        for number in range(5):
            background.submit(call, number)
        assert not done, "waited although there is room"
        threading.Timer(0.1, begin.set).start()
        background.submit(call, 5)
        assert begin.is_set(), "took more than it may"
        background.wait()
        assert sorted(done) == list(range(6))
        background.submit(call, 6)
    assert sorted(done) == list(range(7)) and 1 < max(most) <= 3


def test_an_error_of_a_thread_reaches_the_caller() -> None:
    def fail() -> None:
        raise UserError("the disk is full")

    with pytest.raises(UserError, match="disk"), Background(threads=1) as background:
        background.submit(fail)
        time.sleep(0.1)
        background.submit(print)
        pytest.fail("went on")
    with pytest.raises(UserError, match="disk"), Background(threads=1) as background:
        background.submit(fail)
    with pytest.raises(UserError, match="disk"), Background(threads=1) as background:
        background.submit(fail)
        background.wait()
    with (
        pytest.raises(KeyError),
        Background(threads=1) as background,
    ):  # the first error is the one that is told
        background.submit(fail)
        raise KeyError


# Reading back


def test_reading_back_is_exact_to_half_a_level_and_in_the_order_asked_for(tmp_path: Path) -> None:
    x = images(3)
    write(tmp_path, [0, 1, 2], x)
    got = read_images(tmp_path, [2, 0, 1], 6)
    assert got.dtype == np.float32
    assert np.abs(got - x[[2, 0, 1]]).max() <= 0.5 / 127.5 + 1e-6
    np.testing.assert_array_equal(to_uint8(got), to_uint8(x[[2, 0, 1]]))


def test_grey_images_are_read_as_three_equal_channels(tmp_path: Path) -> None:
    path = image_path(tmp_path, 0)
    path.parent.mkdir()
    Image.fromarray(np.full((6, 6), 51, np.uint8)).save(path)
    np.testing.assert_allclose(
        read_images(tmp_path, [0], 6), np.full((1, 6, 6, 3), -0.6), atol=1e-6
    )


def test_unusable_images_are_refused_with_one_line_that_names_the_file(tmp_path: Path) -> None:
    write(tmp_path, [0, 1], images(2))
    image_path(tmp_path, 1).write_bytes(image_path(tmp_path, 1).read_bytes()[:60])
    image_path(tmp_path, 2).write_text("no image")
    for seed, resolution, reason in (
        (0, 8, "6 x 6 pixels.*8 x 8"),
        (1, 6, "cannot decode"),
        (2, 6, "cannot decode"),
        (3, 6, "missing"),
    ):
        with pytest.raises(UserError, match=reason) as error:
            read_images(tmp_path, [seed], resolution)
        assert str(image_path(tmp_path, seed)) in str(error.value) and "\n" not in str(error.value)

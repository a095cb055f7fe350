"""Files of many images: whole or absent, named for their seeds, and joined to one npz without
holding it."""

import tracemalloc
import zipfile
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest

from relay_jax.data.packed import PackedDataset, read_manifest
from relay_jax.errors import StorageError
from relay_jax.runtime import files
from relay_jax.sampling import shards
from relay_jax.sampling.folder import holds_images
from relay_jax.sampling.shards import ShardFolder, merge_npz, write_manifest
from tests.conftest import content
from tests.damage import damages

SIDE = 6


@pytest.fixture(autouse=True)
def small_files(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "shard_size", lambda _: 10)


def image(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def folder_of(out: Path, kind: str = "npz", classes: int = 5, side: int = SIDE) -> ShardFolder:
    return ShardFolder(out, kind, side, classes)


def fill(out: Path, seeds: Iterable[int], kind: str = "npz", classes: int = 5) -> ShardFolder:
    """As --mode=sample does, in an order of no meaning."""
    folder = folder_of(out, kind, classes)
    finished, kept = folder.finished(seeds), folder.kept(seeds)
    missing = [seed for seed in seeds if seed not in finished | kept]
    folder.plan(missing, kept)
    for seed in np.random.default_rng(0).permutation(missing).tolist():
        assert folder.owns(seed)
        folder.add(seed, image(seed), seed % max(classes, 1))
    return folder


def names(out: Path) -> list[str]:
    return sorted(path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file())


def test_files_hold_the_consecutive_seeds_of_their_names(tmp_path: Path) -> None:
    folder = fill(tmp_path, [*range(8, 23), 1005])
    assert names(tmp_path) == [
        "000008-000009.npz",
        "000010-000019.npz",
        "000020-000022.npz",
        "001005-001005.npz",
    ]
    with np.load(tmp_path / "000010-000019.npz") as file:
        assert (
            sorted(file) == ["arr_0", "arr_1"]
            and file["arr_0"].dtype == np.uint8
            and file["arr_1"].dtype == np.int64
        )
        np.testing.assert_array_equal(
            file["arr_0"], np.stack([image(seed) for seed in range(10, 20)])
        )
        assert file["arr_1"].tolist() == [0, 1, 2, 3, 4] * 2
    assert folder.finished(range(5, 30)) == set(range(8, 23))


def test_images_without_classes_are_alone_in_their_file(tmp_path: Path) -> None:
    fill(tmp_path, range(10), classes=0)
    with np.load(tmp_path / "000000-000009.npz") as file:
        assert list(file) == ["arr_0"]


@pytest.mark.parametrize("kind", ["npz", "arrayrecord"])
def test_a_file_appears_with_its_last_image(tmp_path: Path, kind: str) -> None:
    folder = folder_of(tmp_path, kind)
    folder.plan(range(10))
    for seed in range(9):
        folder.add(seed, image(seed), 0)
    assert names(tmp_path) == [] and folder.finished(range(10)) == set()
    folder.add(9, image(9), 0)
    assert len(names(tmp_path)) == 1 and folder.finished(range(10)) == set(range(10))


@pytest.mark.parametrize("kind", ["npz", "arrayrecord"])
def test_an_interrupted_run_ends_with_the_files_of_an_uninterrupted_one(
    tmp_path: Path, kind: str
) -> None:
    straight, halted = tmp_path / "straight", tmp_path / "halted"
    fill(straight, range(3, 20), kind)
    for seeds in ((3, 4, 5, 8, 12), (6, 13, 11)):  # twice, each time in the middle of both files
        folder = folder_of(halted, kind)
        kept = folder.kept(range(3, 20))
        folder.plan([seed for seed in range(3, 20) if seed not in kept], kept)
        for seed in seeds:
            folder.add(seed, image(seed), seed % 5)
        folder.flush()
        assert folder.finished(range(20)) == set() and not holds_images(halted)
    assert folder.kept(range(3, 20)) == {3, 4, 5, 6, 8, 11, 12, 13}
    (folder._files / "..000003-000004.part.tmp").write_bytes(b"of a flush that was killed")
    fill(halted, range(3, 20), kind)
    assert content(halted) == content(straight)


def test_kept_images_alone_make_their_file(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.plan(range(10))
    for seed in range(4):
        folder.add(seed, image(seed), 0)
    folder.flush()
    fill(tmp_path, range(4))
    assert names(tmp_path) == ["000000-000003.npz"]


def test_a_damaged_part_is_left_out(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.plan(range(10))
    for seed in range(4):
        folder.add(seed, image(seed), seed % 5)
    folder.flush()
    (part,) = tmp_path.iterdir()
    part.write_bytes(part.read_bytes()[:-30])
    assert folder.kept(range(10)) == set() and not part.exists()


@pytest.mark.parametrize("kind", ["npz", "arrayrecord", "arrayrecord with dataset.json"])
def test_damage_to_a_finished_file_is_seen_or_changes_nothing(tmp_path: Path, kind: str) -> None:
    format_, _, described = kind.partition(" ")
    folder = fill(tmp_path, range(10), format_)
    if described:
        write_manifest(folder, {})
    path = folder.path((0, 9))
    whole, expected = path.read_bytes(), folder._read((0, 9))
    seen = 0
    for _, changed in damages(path, 40, seed=0):
        if folder_of(tmp_path, format_).finished(range(10)):
            for seed, (pixels, label) in folder._read((0, 9)).items():
                np.testing.assert_array_equal(pixels, expected[seed][0])
                assert label == expected[seed][1]
        else:
            seen += 1
            assert not path.exists() and changed != whole
    assert seen > 5  # most of a small ArrayRecord file is padding


def test_damaged_files_are_made_again_with_what_was_made_of_them(tmp_path: Path) -> None:
    folder = fill(tmp_path, range(20))
    merged = merge_npz(folder, range(20))
    before = content(tmp_path)
    for path in (folder.path((10, 19)), merged):
        damaged = bytearray(path.read_bytes())
        damaged[300] ^= 4
        path.write_bytes(damaged)
    merge_npz(fill(tmp_path, range(20)), range(20))
    assert content(tmp_path) == before


@pytest.mark.parametrize("kind", ["npz", "arrayrecord"])
def test_samplers_with_overlapping_seeds_leave_every_seed_once(tmp_path: Path, kind: str) -> None:
    folders = [folder_of(tmp_path, kind) for _ in range(3)]
    requests = (range(0, 8), range(5, 25), range(20, 25))
    for folder, seeds in zip(folders, requests, strict=True):
        folder.plan(seeds)  # before any of them has finished a file
    for folder, seeds in zip(folders, requests, strict=True):
        for seed in seeds:
            folder.add(seed, image(seed), seed % 5)
    for folder in folders:
        folder.tidy()
    assert folder.shards() == [(0, 7), (8, 9), (10, 19), (20, 24)]
    if kind == "npz":
        with np.load(merge_npz(folder, range(25))) as merged:
            for seed in range(25):
                np.testing.assert_array_equal(merged["arr_0"][seed], image(seed))
        return
    write_manifest(folder, {})
    packed = PackedDataset(tmp_path, SIDE)
    packed.verify()
    assert len(packed) == 25 == read_manifest(tmp_path)["images"]
    for seed in range(25):
        np.testing.assert_array_equal(packed[seed][0], image(seed))


@pytest.mark.parametrize("text", ["", "{", "[]", '{"shards": {"6": [1]}}', "\udcff"])
def test_a_damaged_description_is_made_again(tmp_path: Path, text: str) -> None:
    folder = fill(tmp_path, range(10), "arrayrecord")
    before = write_manifest(folder, {}).read_bytes()
    (tmp_path / "dataset.json").write_bytes(text.encode(errors="surrogateescape"))
    assert write_manifest(fill(tmp_path, range(10), "arrayrecord"), {}).read_bytes() == before


def test_half_a_file_is_not_taken_for_a_finished_one(tmp_path: Path) -> None:
    folder = fill(tmp_path, range(20))
    whole = (tmp_path / "000010-000019.npz").read_bytes()
    (tmp_path / "000010-000019.npz").write_bytes(whole[:900])  # a copy that was cut short
    (tmp_path / "000020-000029.tmp").write_bytes(whole)  # a run that was killed
    (tmp_path / "samples_20x6x6x3.npz").write_bytes(b"")
    assert folder.finished(range(30)) == set(range(10))
    fill(tmp_path, range(20))
    assert (tmp_path / "000010-000019.npz").read_bytes() == whole


def test_processes_take_turns_with_files(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    owned = []
    monkeypatch.setattr(shards.jax, "process_count", lambda: 2)
    for index in range(2):
        monkeypatch.setattr(shards.jax, "process_index", lambda index=index: index)
        folder = folder_of(tmp_path)
        folder.plan(range(5, 42))
        owned.append({seed for seed in range(5, 42) if folder.owns(seed)})
    assert owned == [
        {*range(5, 10), *range(20, 30), *range(40, 42)},
        {*range(10, 20), *range(30, 40)},
    ]


# One npz


def test_all_files_become_one_npz_in_the_order_of_their_seeds(tmp_path: Path) -> None:
    seeds = [*range(8, 23), 1005]
    folder = fill(tmp_path, seeds)
    path = merge_npz(folder, seeds)
    assert path == tmp_path / "samples_16x6x6x3.npz"
    with np.load(path) as merged:
        np.testing.assert_array_equal(merged["arr_0"], np.stack([image(seed) for seed in seeds]))
        assert merged["arr_1"].tolist() == [seed % 5 for seed in seeds]
    before = path.stat().st_mtime_ns
    assert merge_npz(folder, seeds) == path and path.stat().st_mtime_ns == before
    assert merge_npz(folder, [*seeds, 9999]) is None
    with np.load(merge_npz(folder, range(9, 21))) as part:
        np.testing.assert_array_equal(
            part["arr_0"], np.stack([image(seed) for seed in range(9, 21)])
        )
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]


def test_it_is_what_numpy_itself_would_have_written(tmp_path: Path) -> None:
    folder = fill(tmp_path, range(25))
    np.savez(
        tmp_path / "numpy.npz", np.stack([image(seed) for seed in range(25)]), np.arange(25) % 5
    )
    with (
        zipfile.ZipFile(merge_npz(folder, range(25))) as merged,
        zipfile.ZipFile(tmp_path / "numpy.npz") as expected,
    ):
        assert merged.namelist() == expected.namelist()
        assert all(merged.read(name) == expected.read(name) for name in expected.namelist())
        assert {info.compress_type for info in merged.infolist()} == {zipfile.ZIP_STORED}


def test_joining_holds_the_images_of_one_file_at_a_time(tmp_path: Path) -> None:
    side, folder = 64, folder_of(tmp_path, side=64)
    folder.plan(range(200))
    for seed in range(200):
        folder.add(seed, image(0, side), 0)
    tracemalloc.start()
    merge_npz(folder, range(200))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 5 * 10 * side**2 * 3 < 200 * side**2 * 3 / 3


def test_a_full_disk_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(files.os, "fsync", full)
    with pytest.raises(
        StorageError, match=r"000009\.npz cannot be written \(No space left on device\)"
    ):
        fill(tmp_path, range(10))
    assert names(tmp_path) == []


# A data set


def test_arrayrecord_files_are_a_packed_data_set(tmp_path: Path) -> None:
    folder = fill(tmp_path, [*range(8, 23), 1005], "arrayrecord")
    write_manifest(folder, {"source": "samples"})
    packed = PackedDataset(tmp_path, SIDE)
    packed.verify()
    seeds = [*range(8, 23), 1005]
    assert len(packed) == 16 and packed.num_classes == 5
    for position, seed in enumerate(seeds):
        pixels, label = packed[position]
        np.testing.assert_array_equal(pixels, image(seed))
        assert label == seed % 5
    with pytest.raises(IndexError):
        packed[16]


def test_the_data_set_grows_with_the_files_and_reads_only_new_ones_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_manifest(fill(tmp_path, range(10), "arrayrecord"), {})
    hashed: list[str] = []
    real = shards.file_sha256
    monkeypatch.setattr(shards, "file_sha256", lambda path: hashed.append(path.name) or real(path))
    write_manifest(fill(tmp_path, range(25), "arrayrecord"), {})
    # The first one is compared with what was written down, and the
    # others are new.
    assert hashed == [f"{name}.array_record" for name in ("000000-000009", "000010-000019")] + [
        "000020-000024.array_record"
    ]
    assert read_manifest(tmp_path)["images"] == 25
    PackedDataset(tmp_path, SIDE).verify()

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
from relay_jax.sampling.shards import ShardFolder, merge_npz, write_manifest

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
    left = [seed for seed in seeds if seed not in folder.finished(seeds)]
    folder.plan(left)
    for seed in np.random.default_rng(0).permutation(left).tolist():
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


def test_flushing_keeps_the_images_of_unfinished_files(tmp_path: Path) -> None:
    folder = folder_of(tmp_path)
    folder.plan(range(20))
    for seed in (0, 1, 2, 5, 12):
        folder.add(seed, image(seed), 0)
    folder.flush()
    assert names(tmp_path) == ["000000-000002.npz", "000005-000005.npz", "000012-000012.npz"]
    fill(tmp_path, range(20))
    assert folder.finished(range(20)) == set(range(20)) and len(names(tmp_path)) == 7
    with np.load(merge_npz(folder, range(20))) as merged:
        np.testing.assert_array_equal(
            merged["arr_0"], np.stack([image(seed) for seed in range(20)])
        )


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
        zipfile.ZipFile(merge_npz(folder, range(25))) as ours,
        zipfile.ZipFile(tmp_path / "numpy.npz") as theirs,
    ):
        assert ours.namelist() == theirs.namelist()
        assert all(ours.read(name) == theirs.read(name) for name in theirs.namelist())
        assert {info.compress_type for info in ours.infolist()} == {zipfile.ZIP_STORED}


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
    assert hashed == ["000010-000019.array_record", "000020-000024.array_record"]
    assert read_manifest(tmp_path)["images"] == 25
    PackedDataset(tmp_path, SIDE).verify()

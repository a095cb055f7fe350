"""Files of torch.save: tensors are views of the file, and what is none of them is told by kind."""

from pathlib import Path

import numpy as np
import pytest

from relay_jax.errors import UserError
from relay_jax.official.torch_files import Storage, Tensor, load
from tests.official import torch_writer as tw


def test_an_object_of_tensors_is_read_from_both_formats(tmp_path: Path) -> None:
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    zipped, plain = tw.Storages(True), tw.Storages(False)
    tw.write_zip(tmp_path / "f.pt", {"w": zipped.tensor(values), "n": 5}, zipped)
    tw.write_pickle(tmp_path / "f.pkl", {"w": plain.tensor(values), "n": 5})
    for path in (tmp_path / "f.pt", tmp_path / "f.pkl"):
        top, _ = load(path)
        array = top["w"].array()
        np.testing.assert_array_equal(array, values)
        assert top["n"] == 5 and not array.flags.writeable and not array.flags.owndata


@pytest.mark.parametrize(
    ("dtype", "data", "value"),
    [
        ("<f2", np.float16(1.5).tobytes(), 1.5),
        ("<f8", np.float64(0.1).tobytes(), np.float32(0.1)),
        ("bf16", b"\xc0\x3f", 1.5),
    ],
)
def test_other_precisions_become_float32(dtype: str, data: bytes, value: float) -> None:
    tensor = Tensor(Storage("0", dtype, 1, memoryview(data)), 0, (1,), (1,))
    assert tensor.array().dtype == np.float32 and tensor.array()[0] == value


def test_integers_and_damaged_storages_are_refused() -> None:
    for dtype, crc, says in (("<i4", None, "not floating point"), ("<f4", 1, "checksum")):
        storage = Storage("0", dtype, 1, memoryview(b"\0" * 4), crc)
        with pytest.raises(UserError, match=says):
            Tensor(storage, 0, (1,), (1,)).array()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"\x89PNG\r\n", "it is a PNG image"),
        (b"<!DOCTYPE html>", "it is a web page"),
        (b"version https://git-lfs.github.com/spec/v1", "it is a Git LFS pointer"),
        (b'\x40\0\0\0\0\0\0\0{"a"', "it is a safetensors file"),
        (b"hello", "neither a zip of torch.save nor a pickle"),
        (b"", "it is empty"),
    ],
)
def test_other_files_are_named_by_their_kind(tmp_path: Path, content: bytes, says: str) -> None:
    (tmp_path / "f").write_bytes(content)
    with pytest.raises(UserError, match=says):
        load(tmp_path / "f")

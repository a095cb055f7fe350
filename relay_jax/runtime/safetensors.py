"""Arrays by name in one file, in the safetensors format.

The format is the length (8 bytes, little endian) and the text of a
JSON header, then the raw data: too little to depend on its library
for. Source: github.com/huggingface/safetensors, section Format.
"""

import json
import math
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from relay_jax.runtime.counting import counting
from relay_jax.runtime.files import parse_json, replacing

DTYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def write_safetensors(
    path: Path, arrays: Mapping[str, np.ndarray], metadata: Mapping[str, str]
) -> None:
    """float32 and bfloat16 arrays of any shapes, whole or not at all; equal input, equal bytes.

    metadata: texts by name. Raises StorageError.
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name in sorted(arrays):
        start, end = end, end + arrays[name].nbytes
        header[name] = {
            "dtype": _NAMES[arrays[name].dtype],
            "shape": list(arrays[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":")).encode()
    # Readers map the data into memory
    # and want it aligned to 8 bytes.
    text += b" " * (-len(text) % 8)
    with (
        replacing(path) as temporary,
        temporary.open("wb") as file,
        counting(f"writing {path.name}", end / 1e6, "MB") as add,
    ):
        file.write(struct.pack("<Q", len(text)) + text)
        for name in sorted(arrays):
            file.write(np.asarray(arrays[name]).tobytes())
            add(arrays[name].nbytes / 1e6)


def read_safetensors(path: Path) -> tuple[dict[str, np.ndarray], dict[str, str]]:
    """The arrays, read-only views of the file's bytes, and the metadata.

    Raises OSError; ValueError for what is no such file, is cut off,
    or has arrays of other dtypes.
    """
    content = path.read_bytes()
    length = struct.unpack_from("<Q", content)[0] if len(content) >= 8 else len(content)
    if length > len(content) - 8:
        raise ValueError("it is no safetensors file, or is cut off")
    header = parse_json(content[8 : 8 + length].decode())
    if not isinstance(header, dict):
        raise ValueError("its header is no JSON object")
    metadata = header.pop("__metadata__", {})
    data, end, arrays = memoryview(content)[8 + length :], 0, {}
    try:
        # The data of all arrays lie one after the other, without gaps.
        for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
            dtype, shape = DTYPES[entry["dtype"]], [int(size) for size in entry["shape"]]
            start, end = end, end + math.prod(shape) * dtype.itemsize
            if entry["data_offsets"] != [start, end] or min(shape, default=1) < 0:
                raise ValueError(f"the place of {name} in it is wrong")
            if end > len(data):
                raise ValueError("it is cut off")
            arrays[name] = np.frombuffer(data[start:end], dtype).reshape(shape)
    except (KeyError, TypeError) as error:
        raise ValueError(f"its header is damaged, or has another dtype ({error})") from error
    if end != len(data) or not isinstance(metadata, dict):
        raise ValueError("it has data without a name, or its header is damaged")
    return arrays, {str(key): str(value) for key, value in metadata.items()}

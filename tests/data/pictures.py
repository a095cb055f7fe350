"""Small images and the files that hold them, for the tests of sources."""

import io
import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from relay_jax.data.source import Source

SHARED = Path(__file__).parents[2].parent / "shared" / "data"


def colour(level: int, size: int = 8) -> np.ndarray:
    return np.full((size, size, 3), level, np.uint8)


def png(image: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "png")
    return buffer.getvalue()


def write_zip(path: Path, images: dict[str, bytes], index: object = None) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in images.items():
            archive.writestr(name, data)
        if index is not None:
            archive.writestr("dataset.json", index if isinstance(index, str) else json.dumps(index))
    return path


def read_all(source: Source) -> list[tuple[int, int]]:
    return [(int(source[i][0][0, 0, 0]), source[i][1]) for i in range(len(source))]


def dataset_keys(source: str, **keys: object) -> dict[str, Any]:
    """config.dataset, as far as sources read it."""
    empty = {"path": "", "name": "", "split": "train", "data_dir": "", "num_classes": 0, "size": 10}
    return {"source": source, "hint": "", **empty, **keys}

"""A source of images of your own: NumPy arrays, `images.npy` and perhaps `labels.npy` in a folder.

    np.save("data/mine/images.npy", images)  # uint8 [n, h, w, 3]
    np.save("data/mine/labels.npy", labels)  # int [n] from 0; leave it out without classes

From the command line:

    python -m relay_jax.main --config=demo --workdir=runs/mine \\
        --config.dataset.source=examples.new_source:NpyImages \\
        --config.dataset.path=data/mine --config.dataset.num_classes=10

In Python: relay_jax.data.source.open_source(dict(source="examples.new_source:NpyImages", ...)), or
NpyImages("data/mine") itself. Cropping, resizing, mirroring, batches and the order of the images
are not a source's business: it has a length and gives image and label at a position.
"""

from pathlib import Path
from typing import Any

import numpy as np

from relay_jax.data.source import ImageSource
from relay_jax.errors import DataError, one_line
from relay_jax.resolution import as_resolution
from relay_jax.runtime.files import file_sha256


class NpyImages(ImageSource):
    """Images of a folder with images.npy, all of one size.

    Its parameters are the keys of config.dataset that `config_keys` lists: `path` unless a class
    says otherwise. Raises DataError for files that are missing, damaged or of another kind.
    """

    def __init__(self, path: str) -> None:
        self.folder = Path(path)
        images = self._array("images.npy")
        if images.ndim != 4 or images.shape[3] != 3 or images.dtype != np.uint8:
            raise DataError(
                f"{path}: images.npy must be uint8 [n, h, w, 3], not {images.dtype} "
                f"{list(images.shape)}"
            )
        self.count = len(images)
        # Where all images are as large, too small a set is refused before the training begins.
        self.resolution = as_resolution(images.shape[1:3])
        self.labels = np.zeros(self.count, np.int64)
        if (self.folder / "labels.npy").exists():
            self.labels = np.array(self._array("labels.npy"))
            if self.labels.shape != (self.count,) or self.labels.dtype.kind not in "iu":
                raise DataError(f"{path}: labels.npy must be {self.count} whole numbers")
            self.num_classes = int(self.labels.max()) + 1
            self.class_names = tuple(str(label) for label in range(self.num_classes))

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        """Image uint8 [h, w, 3] and its label, 0 without labels. Raises DataError."""
        if not 0 <= position < self.count:
            raise IndexError(f"position {position} is outside 0..{self.count - 1}")
        # Mapped anew for each image: an open map would travel whole to worker processes.
        return np.array(self._array("images.npy")[position]), int(self.labels[position])

    def fingerprint(self) -> str:
        """SHA-256 of the images' file, by which features of references are kept and found."""
        return file_sha256(self.folder / "images.npy")

    def _array(self, name: str) -> np.ndarray[Any, Any]:
        """An array of the folder without reading its values. Raises DataError."""
        try:
            return np.load(self.folder / name, mmap_mode="r")
        except (OSError, ValueError) as error:
            # UserErrors become one line and status 2; anything else would be a traceback.
            raise DataError(f"{self.folder / name}: cannot be read ({one_line(error)})") from error

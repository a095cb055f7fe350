"""The nearest real images, against all distances and planted copies."""

import numpy as np
import pytest

from relay_jax.data.images import ImageSource
from relay_jax.plots import neighbours as neighbours_module
from relay_jax.plots.neighbours import nearest, neighbours, reduce
from tests.plots.images import RNG, box, white


def test_the_nearest_are_those_of_all_distances(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(neighbours_module, "BLOCK", 7)
    a, b, c = white(5, 3, 2), white(40, 3, 2), white(40, 3, 2)
    index, distance = nearest(a, [b, c], 4)
    every = np.minimum(*(np.sqrt(np.square(a[:, None] - x).mean((2, 3))) for x in (b, c)))
    np.testing.assert_array_equal(index, np.argsort(every, axis=1)[:, :4])
    np.testing.assert_allclose(distance, np.sort(every, axis=1)[:, :4], rtol=1e-5)


class Pictures(ImageSource):
    """Eleven random images as a data set."""

    pixels = RNG.integers(0, 256, (11, 64, 64, 3), np.uint8)

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, position: int) -> tuple[np.ndarray, int]:
        return self.pixels[position], 0

    def fingerprint(self) -> str:
        return "pictures"


def test_copies_are_nearest_and_mirrored_ones_only_where_training_mirrors() -> None:
    source = Pictures()
    progress: list[int] = []
    samples = np.stack([source.pixels[7], source.pixels[2][:, ::-1]])
    for mirrored in (False, True):
        pixels, means = neighbours(
            samples,
            source,
            [9, 7, 2, 4, 0],
            2,
            mirrored=mirrored,
            each=progress.append,
            features={"means": lambda x: x.mean((1, 2))},
        )
        assert pixels.positions[0, 0] == 7
        assert pixels.distances[0, 0] < 1e-4 < 0.05 < pixels.distances[0, 1]
        assert (pixels.positions[1, 0] == 2 and pixels.distances[1, 0] < 1e-4) == mirrored
        assert means.positions[:, 0].tolist() == [7, 2] and means.distances[:, 0].max() < 1e-4
        assert 0.05 < pixels.typical < 1 and set(pixels.positions.ravel()) <= {9, 7, 2, 4, 0}
    assert progress == [5, 5]


@pytest.mark.parametrize("resolution, size", [(8, 8), (64, 32), (96, 32), (256, 32), (100, 25)])
def test_reduction_is_a_box_average(resolution: int, size: int) -> None:
    x = white(2, resolution, resolution, 3)
    np.testing.assert_allclose(reduce(x, 32), box(x, resolution // size), atol=1e-5)

"""Samples of trained stages as a set of images: drawn as they are read, written nowhere."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from relay_jax.data.source import Source
from relay_jax.evaluation.images import Part
from relay_jax.sampling.chain import StageSampler
from relay_jax.sampling.pixels import edit_pixels
from relay_jax.sampling.request import Request
from relay_jax.sampling.stream import arrange, stream


class DrawnSamples:
    """An ImageSet of the samples of a request, in the order of their seeds.

    samplers: its stages with their parameters, all of one batch size. source: real images, if
    it starts from them. They are drawn as --mode=sample draws them, and are the same images.
    """

    def __init__(
        self, request: Request, samplers: Sequence[tuple[StageSampler, dict]], source: Source | None
    ) -> None:
        self._request, self._samplers, self._source = request, samplers, source
        self._seeds = np.unique(np.asarray(request.seeds, np.int64))
        self.resolution = request.stages[-1].resolution
        self.identity: dict[str, Any] = {"kind": "drawn", "images": len(self._seeds)}

    def __len__(self) -> int:
        return len(self._seeds)

    def share(self, host: int, hosts: int, batch: int) -> Iterator[Part]:
        """As ImageSet says, but in parts of the samplers' batch: all processes draw each of
        them together."""
        batches = arrange(self._seeds.tolist(), self._samplers[0][0].batch)
        for drawn in stream(
            self._samplers, batches, lambda seeds: self._request.inputs(seeds, self._source)
        ):
            positions, own = np.searchsorted(self._seeds, drawn.seeds), slice(host, None, hosts)
            yield positions[own], edit_pixels(drawn.pixels[own], self._request.pixel_edit)

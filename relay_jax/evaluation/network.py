"""What a trained network of features is, and how its published weights are read.

Nothing in a file is executed: `official.torch_files` reads it.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.errors import UserError, one_line
from relay_jax.official.torch_files import Tensor, load
from relay_jax.runtime.files import file_sha256


@dataclass(frozen=True, kw_only=True)
class FeatureNetwork:
    """A network whose activations are features of images.

    name: as in --features; network, resize: what a report says of it; outputs: names of the arrays
    that `apply` gives; inputs: uint8 [b, h, w, 3] of any size -> the input of `apply`; apply:
    parameters and inputs -> float32 [b, d] by name; read: a file, None if none is named ->
    parameters and the sha256 of the file, or UserError; option: the flag, and the key of
    `evaluate`, that names the file; "" if the network finds it.
    """

    name: str
    network: str
    resize: str
    outputs: tuple[str, ...]
    inputs: Callable[[jax.Array], jax.Array]
    apply: Callable[[dict, jax.Array], dict[str, jax.Array]]
    read: Callable[[Path | None], tuple[dict, str]]
    option: str = ""


def cubic_resize(pixels: jax.Array, side: int) -> jax.Array:
    """uint8 [b, h, w, c] -> float32 [b, side, side, c] in [0, 255].

    Keys' cubic kernel with a = -1/2, widened where it shrinks (antialiasing): Pillow's BICUBIC and
    torch's "bicubic" with antialias=True, but for Pillow's rounding to integers.
    """
    shape = (len(pixels), side, side, pixels.shape[-1])
    x = jax.image.resize(pixels.astype(jnp.float32), shape, "cubic", antialias=True)
    # The kernel overshoots at edges, where no image is.
    return jnp.clip(x, 0, 255)


class State:
    """Arrays of a state dict, each taken once: what remains belongs to another network.

    network: whose weights they should be, for errors.
    """

    def __init__(self, arrays: Mapping[str, np.ndarray], network: str) -> None:
        # The counters of batch normalisation are no weights.
        self._arrays = {
            name: array
            for name, array in arrays.items()
            if not name.endswith("num_batches_tracked")
        }
        self._network = network

    def take(self, name: str, *shape: int) -> np.ndarray:
        """An array, in float64. Raises UserError if it is missing or has another shape."""
        if name not in self._arrays:
            raise UserError(f"{name} is missing: these are not the weights of {self._network}")
        array = self._arrays.pop(name)
        if array.shape != shape:
            raise UserError(
                f"{name} has shape {list(array.shape)}, not {list(shape)}: these are not the "
                f"weights of {self._network}"
            )
        return np.asarray(array, np.float64)

    def skip(self, *names: str) -> None:
        """Arrays that the features do not need."""
        for name in names:
            self._arrays.pop(name, None)

    def batch_norm(self, name: str, width: int, epsilon: float) -> tuple[np.ndarray, np.ndarray]:
        """Gain and offset [width], float64, of batch normalisation with its fixed statistics."""
        gain, offset, mean, var = (
            self.take(f"{name}.{part}", width)
            for part in ("weight", "bias", "running_mean", "running_var")
        )
        gain = gain / np.sqrt(var + epsilon)
        return gain, offset - mean * gain

    def finish(self) -> None:
        """Raises UserError if anything remains."""
        if self._arrays:
            raise UserError(
                f"{min(self._arrays)} has no place in this network: these are not the weights of "
                f"{self._network}"
            )


def read_state(
    path: Path, where: str, sha256: str | None = None
) -> tuple[dict[str, np.ndarray], str]:
    """The arrays of a state dict in a file of torch.save, and the sha256 of the file.

    where: what to do if it is the wrong file; sha256: that of the right one. Raises UserError.
    """
    if not path.is_file():
        raise UserError(f"{path}: there is no such file; {where}")
    # The hash first: a file that is not the published one is not even parsed.
    try:
        found = file_sha256(path)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({one_line(error)})") from error
    if sha256 is not None and found != sha256:
        raise UserError(
            f"{path} is not the published file (its sha256 begins with {found[:8]}); {where}"
        )
    try:
        state, _ = load(path)
    except UserError as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(state, dict):
        raise UserError(f"{path} holds no state dict; {where}")
    arrays = {
        name: value.array()
        for name, value in state.items()
        if isinstance(name, str)
        and isinstance(value, Tensor)
        and not name.endswith("num_batches_tracked")
    }
    return arrays, found

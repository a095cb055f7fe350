"""What a network is to the rest of the program, and the networks that a configuration can name.

A network is a flax module whose dataclass fields are its
description: they go into checkpoints, samples.json and the
comparison of configurations. `Network` lists all that is asked of
it; a new one is one file with these attributes
(examples/new_network.py is a small transformer), named by NETWORKS
or by `package.module:Class` as `model.kind`.
"""

import dataclasses
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.models.unet import UNet
from relay_jax.resolution import Resolution, height_width


class Network(Protocol):
    """The raw network F(x, c_noise, class_labels, augment_labels) of docs/math.md section 5.

    resolution: of its images; image_channels: 3. num_classes,
    num_augment: sizes of the label vectors, 0 = none. dtype:
    precision of activations; parameters are float32. remat: whether
    to recompute activations in the backward pass.

    Optional: `travels_in_dtype(leaf) -> bool`, the parameters that
    the network uses in `dtype` alone and that may therefore be cast
    before devices exchange them; by default none.
    `condition_channels`: of images that the network is given beside x
    by the keyword `condition`, with the c_noise of their own noise:
    ([b, h, w, condition_channels], [b]). A cascade needs it.
    """

    resolution: Resolution
    image_channels: int
    num_classes: int
    num_augment: int
    dtype: Any
    remat: bool

    def __call__(
        self,
        x: jax.Array,
        c_noise: jax.Array,
        class_labels: jax.Array | None = None,
        augment_labels: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """x: [b, h, w, image_channels]; c_noise: [b]; labels [b, n] or None (zeros).

        Returns the shape of x, float32. train: random layers act,
        with the rng "dropout".
        """
        ...

    def check(self) -> None:
        """Raises ValueError for fields that make no network, naming the key to change."""

    # From flax.linen.Module
    def init(self, rngs: Any, *args: Any, **kwargs: Any) -> Any: ...
    def apply(self, variables: Any, *args: Any, **kwargs: Any) -> Any: ...
    def clone(self, **updates: Any) -> Any: ...


# stages.STAGE.model.kind -> class
NETWORKS: dict[str, type] = {"unet": UNet}


def describe(network: Network) -> dict[str, Any]:
    """Every field of a network as plain values, with its class as `kind`."""
    kind = next(
        (name for name, network_class in NETWORKS.items() if type(network) is network_class), None
    )
    description: dict[str, Any] = {
        "kind": kind or f"{type(network).__module__}:{type(network).__name__}"
    }
    for field in dataclasses.fields(network):  # type: ignore[arg-type]
        if field.name not in ("parent", "name"):
            value = getattr(network, field.name)
            description[field.name] = np.dtype(value).name if field.name == "dtype" else value
    return description


def image_shape(network: Network) -> tuple[int, int, int]:
    """(height, width, channels) of its images."""
    return (*height_width(network.resolution), network.image_channels)


def init_params(network: Network, key: jax.Array) -> dict:
    """Fresh parameters, a nested dictionary of float32 arrays."""
    image = jnp.zeros((1, *image_shape(network)))
    return network.init(key, image, jnp.zeros((1,)), **blank_condition(network, image))["params"]


def blank_condition(network: Network, image: Any) -> dict[str, Any]:
    """The keyword of a condition of zeros for images of a shape; {} for a network without one."""
    channels = getattr(network, "condition_channels", 0)
    if not channels:
        return {}
    return {"condition": (jnp.zeros((*image.shape[:3], channels)), jnp.zeros(image.shape[:1]))}


def shapes_of(network: Network) -> Any:
    """The shapes of the parameters of a network; nothing is computed."""
    return jax.eval_shape(lambda: init_params(network, jax.random.key(0)))


def parameter_count(params: object) -> int:
    """Number of parameters in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))


def in_travel_dtype(network: Network, params: Any) -> Any:
    """Parameters cast to the precision in which the network uses them, where it says so."""
    travels = getattr(network, "travels_in_dtype", lambda leaf: False)
    return jax.tree.map(lambda leaf: leaf.astype(network.dtype) if travels(leaf) else leaf, params)

"""Relay Diffusion (RDM, arXiv 2309.03350) in JAX and Flax.

    import relay_jax as rx

    relay = rx.load("runs/demo")
    images = relay.sample(seeds=range(16), classes=3)

The public names below are imported when they are first used: `import
relay_jax` alone loads none of JAX, so that a command line can speak,
and fail, at once.
"""

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.2.0"

_HOMES = {
    "relay_jax.relay": ("Relay", "build", "load", "loss", "sample"),
    "relay_jax.stage": ("Stage", "TrainSettings"),
    "relay_jax.diffusion.guidance": ("Guidance", "Guide"),
    "relay_jax.diffusion.process": ("EdmProcess", "RelayProcess"),
    "relay_jax.diffusion.processes": ("PROCESSES", "Cascade", "LinearRelay"),
    "relay_jax.diffusion.sampler": ("SAMPLERS", "Heun"),
    "relay_jax.diffusion.multistep": ("Multistep",),
    "relay_jax.models.network": ("NETWORKS", "Network", "UNet"),
    "relay_jax.data.source": ("SOURCES", "Source"),
    "relay_jax.errors": ("DataError", "StorageError", "UserError"),
}
_HOME = {name: module for module, names in _HOMES.items() for name in names}

__all__ = [
    "NETWORKS",
    "PROCESSES",
    "SAMPLERS",
    "SOURCES",
    "Cascade",
    "DataError",
    "EdmProcess",
    "Guidance",
    "Guide",
    "Heun",
    "LinearRelay",
    "Multistep",
    "Network",
    "Relay",
    "RelayProcess",
    "Source",
    "Stage",
    "StorageError",
    "TrainSettings",
    "UNet",
    "UserError",
    "build",
    "load",
    "loss",
    "sample",
]

if TYPE_CHECKING:
    from relay_jax.data.source import SOURCES, Source
    from relay_jax.diffusion.guidance import Guidance, Guide
    from relay_jax.diffusion.multistep import Multistep
    from relay_jax.diffusion.process import EdmProcess, RelayProcess
    from relay_jax.diffusion.processes import PROCESSES, Cascade, LinearRelay
    from relay_jax.diffusion.sampler import SAMPLERS, Heun
    from relay_jax.errors import DataError, StorageError, UserError
    from relay_jax.models.network import NETWORKS, Network, UNet
    from relay_jax.relay import Relay, build, load, loss, sample
    from relay_jax.stage import Stage, TrainSettings


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'relay_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])

"""The data set of a configuration as a reference: what --reference=dataset and training compare
with."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from relay_jax.config import Settings
from relay_jax.data.description import describe
from relay_jax.data.source import Source, describe_source, open_source
from relay_jax.evaluation.references import Reference, of_source
from relay_jax.resolution import Resolution
from relay_jax.runtime.distributed import is_first
from relay_jax.workdir import warn_of_changes


def open_data_set(settings: Settings, weights: Mapping[str, Path]) -> tuple[Source, dict[str, Any]]:
    """The data set of a configuration, described to the user, and what that says of it.

    weights: folders of what is scored,
    by stage name. Raises DataError.
    """
    source = open_source(settings.dataset.keys, settings.resolutions, settings.seed)
    if is_first():
        keys, resolutions = settings.dataset.keys, settings.resolutions
        identity = describe(source, keys, resolutions, settings.seed).show().identity
        # Allowed, since a held-out part is a good reference; but
        # whoever has other data by mistake must see it.
        for name, folder in weights.items():
            warn_of_changes(folder, identity, f"the reference is not what {name} was trained on")
    return source, _about(settings)


def training_set(source: Source, resolution: Resolution, settings: Settings) -> Reference:
    """The set that is trained on, as the reference of its own samples.

    resolution: of the samples.
    """
    return of_source(
        source,
        _about(settings),
        resolution,
        threads=settings.dataset.threads,
        limit=settings.evaluate.reference_images,
    )


def _about(settings: Settings) -> dict[str, Any]:
    return describe_source(settings.dataset.keys, settings.resolutions[-1], settings.seed)

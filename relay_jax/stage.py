"""One stage of a relay: a network with its forward process, and what can be done with it.

All methods that take parameters are pure functions of arrays, to be
jitted by the caller: the train step, the sampling chain, the
pictures and a notebook use the same ones.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np

from relay_jax.data.images import to_float
from relay_jax.diffusion.augment import Augmentation, augment
from relay_jax.diffusion.guidance import (
    Guidance,
    Guide,
    Guided,
    autoguided,
    classifier_free,
    drop_labels,
    own,
)
from relay_jax.diffusion.loss import loss
from relay_jax.diffusion.precondition import Condition, Denoiser, precondition, with_condition
from relay_jax.diffusion.process import EdmProcess
from relay_jax.diffusion.processes import PROCESSES
from relay_jax.diffusion.sampler import SAMPLERS, Sampler
from relay_jax.errors import UserError
from relay_jax.models.averages import check_averages
from relay_jax.models.network import Network, describe, image_shape, init_params, shapes_of
from relay_jax.resolution import Resolution, reduced

HANDOFFS = ("image", "noise")


@dataclass(frozen=True, kw_only=True)
class TrainSettings:
    """Optimisation of a stage; lengths in images (configs/default.py says what each is).

    Raises ValueError for values that cannot be, naming the key.
    """

    images: int
    batch: int
    accumulate: int = 1
    learning_rate: float = 1e-4
    warmup_images: int = 0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    adam_epsilon: float = 1e-8
    ema_halflife_images: float = 500_000.0
    ema_rampup: float = 0.05
    ema: tuple[float, ...] = ()
    label_dropout: float = 0.0
    augment: float = 0.0
    max_nonfinite: int = 50
    clip: float = 0.0

    def __post_init__(self) -> None:
        limits: dict[str, tuple[Callable[[float], bool], str]] = {
            "images batch accumulate learning_rate adam_epsilon max_nonfinite": (
                lambda value: 0 < value < math.inf,
                "must be positive",
            ),
            "warmup_images ema_halflife_images clip": (
                lambda value: 0 <= value < math.inf,
                "must not be negative",
            ),
            "label_dropout augment ema_rampup": (
                lambda value: 0 <= value <= 1,
                "must lie in [0, 1]",
            ),
            "adam_beta1 adam_beta2": (
                lambda value: 0 <= value < 1,
                "must lie in [0, 1)",
            ),
        }
        for names, (holds, rule) in limits.items():
            for name in names.split():
                if not holds(getattr(self, name)):
                    raise ValueError(f"train.{name} {rule}, not {getattr(self, name)}")
        # Steps are counted in int32 on the devices.
        for name, value, most in (
            ("batch", self.batch, 2**22),
            ("steps", self.steps, 2**31 - 1),
        ):
            if value > most:
                raise ValueError(f"train.{name} must be at most {most:,}, not {value}")
        check_averages(self.ema)
        if self.batch % self.accumulate:
            raise ValueError(
                f"train.batch {self.batch} is not divisible by train.accumulate {self.accumulate}"
            )

    @property
    def steps(self) -> int:
        """Steps of the whole training; the last one may go beyond `images`."""
        return math.ceil(self.images / self.batch)


@dataclass(frozen=True, kw_only=True)
class Stage:
    """A network and its process. `sample_process` is `process` as sampling uses it (cdf_max).

    name: its key in config.stages. index: place in the relay; the
    noise of every seed depends on it. sampler and guidance: how it
    is sampled; train: how it is trained. handoff: what it continues,
    the finished "image" of the stage before, or its state at a level
    where it stops, "noise" (docs/math.md section 6). ema: the average
    of its weights that is sampled, by name (models/averages.py).
    guide: other weights that guide it; guide_network: theirs, None
    before it is known (sampling/weights.py).
    """

    name: str
    index: int
    network: Network
    process: EdmProcess
    sample_process: EdmProcess
    sampler: Sampler
    guidance: Guidance
    train: TrainSettings
    handoff: str = "image"
    ema: str = ""
    guide: Guide | None = None
    guide_network: Network | None = None

    @property
    def resolution(self) -> Resolution:
        """Of its images."""
        return self.network.resolution

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(height, width, channels) of its images."""
        return image_shape(self.network)

    @property
    def num_classes(self) -> int:
        """0 for an unconditional network."""
        return self.network.num_classes

    @property
    def starts_from_images(self) -> bool:
        """Whether sampling continues images of a stage before, and does not start from noise."""
        return self.process.starts_from_images

    @property
    def low_resolution(self) -> Resolution:
        """Of the images that it continues, 0 for a first stage."""
        return reduced(self.resolution, self.process.patch) if self.starts_from_images else 0

    @property
    def alone(self) -> "Stage":
        """The stage by itself, which continues images, also where a relay hands it a state."""
        return replace(self, handoff="image")

    def check(self) -> None:
        """Raises ValueError for parts that do not fit together, naming the key to change."""
        self.network.check()
        self.process.check_training()
        self.process.check_resolution(self.resolution)
        self._check_condition()
        self.sampler.check(self.sample_process)
        self._check_handoff()
        weight = self.guidance.weight
        if self.guide is not None and weight > 1:
            raise ValueError(
                f"sample.guide and sample.guidance {weight} at once; use one of them: guide '' or "
                "guidance 1 is off"
            )
        if weight > 1 and not self.num_classes:
            raise ValueError(f"sample.guidance {weight} needs classes (dataset.num_classes); use 1")
        if weight > 1 and not self.train.label_dropout:
            raise ValueError(
                "sample.guidance above 1 needs a network trained with train.label_dropout above 0 "
                "(0.1 is usual)"
            )

    def _check_condition(self) -> None:
        channels = getattr(self.network, "condition_channels", 0)
        kind = kind_of(self.process, PROCESSES)
        if channels and not self.process.has_condition:
            raise ValueError(
                f"model.condition_channels {channels} is for a process with a condition, and "
                f"{kind} has none; leave it out"
            )
        if channels != self.network.image_channels and self.process.has_condition:
            raise ValueError(
                f"process.kind {kind} gives its network an image beside the state, which needs "
                f"condition_channels {self.network.image_channels}, and its network, "
                f"{type(self.network).__name__}, has {channels}; use model.kind 'unet'"
            )

    def _check_handoff(self) -> None:
        if self.handoff not in HANDOFFS:
            names = " or ".join(map(repr, HANDOFFS))
            raise ValueError(f"sample.handoff must be {names}, not {self.handoff!r}")
        if self.handoff == "image":
            return
        if not self.starts_from_images:
            raise ValueError("sample.handoff 'noise' is for a relay stage; leave it out")
        if not self.sample_process.continues_noise:
            raise ValueError(
                f"{kind_of(self.process, PROCESSES)} says how to start from images, not from a "
                "noisy state; use sample.handoff 'image'"
            )

    def init(self, key: jax.Array) -> dict:
        """Fresh parameters, a nested dictionary of float32 arrays."""
        return init_params(self.network, key)

    def shapes(self) -> Any:
        """The shapes of the parameters; nothing is computed."""
        return shapes_of(self.network)

    def sampled_shapes(self) -> Any:
        """The shapes of the parameters that `denoiser` takes; nothing is computed."""
        if self.guide is None:
            return self.shapes()
        return Guided(self.shapes(), shapes_of(self.guide_network or self.network))

    def preconditioned(self, params: dict | Guided) -> Denoiser:
        """(x [b, h, w, c], sigma scalar or [b], class_labels, augment_labels) -> x0, not guided.

        And `condition`, by name, where the process has one.
        """
        return self._denoiser_of(self.network, own(params))

    def _denoiser_of(self, network: Network, params: dict) -> Denoiser:
        def apply(*inputs: Any, **given: Any) -> jax.Array:
            return network.apply({"params": params}, *inputs, **given)

        return precondition(apply, self.process.sigma_data)

    def one_hot(self, classes: jax.Array | None) -> jax.Array | None:
        """Classes int [b] as the network's labels [b, num_classes]; None if it has none."""
        if classes is None or not self.num_classes:
            return None
        return jax.nn.one_hot(classes, self.num_classes)

    def denoiser(
        self,
        params: dict | Guided,
        classes: jax.Array | None = None,
        condition: Condition | None = None,
    ) -> Denoiser:
        """(x [b, h, w, c], scalar sigma) -> denoised images, guided as the stage is sampled.

        params: `Guided` for a stage with a guide. classes: int [b];
        None or an unconditional network: no labels. condition: of b
        images, where the process has one
        (sampling.chain.condition_of). Source: docs/math.md section 5.
        Raises ValueError for guidance above 1 without classes, and for
        a guide without its parameters.
        """
        denoise = with_condition(self.preconditioned(params), condition)
        labels = self.one_hot(classes)
        if self.guide is None:
            return classifier_free(denoise, labels, self.guidance)
        if not isinstance(params, Guided):
            raise ValueError(f"stage {self.name} has a guide, whose parameters are missing")
        worse = self._denoiser_of(self.guide_network or self.network, params.guide)
        return autoguided(denoise, with_condition(worse, condition), labels, self.guide)

    def loss(
        self,
        params: dict | Guided,
        images: jax.Array,
        labels: jax.Array | None,
        key: jax.Array,
        index: jax.Array | None = None,
        train: bool = False,
    ) -> jax.Array:
        """Training loss of each image, float32 [b] (docs/math.md section 5).

        images: sharp, [b, h, w, c], uint8 or floats in [-1, 1];
        labels: int [b] or None. index: int [b], places of the images
        in the whole batch, by default 0, 1, ...: noise, augmentation
        and dropped labels of an image depend on the key and its
        place alone. train: with augmentation, label dropout and
        dropout, as in training. AssertionError (chex): another shape.
        """
        message = f"images must be [b, {', '.join(map(str, self.image_shape))}]"
        chex.assert_shape(images, (None, *self.image_shape), custom_message=message)
        images = to_float(images) if images.dtype == jnp.uint8 else images.astype(jnp.float32)
        index = jnp.arange(images.shape[0]) if index is None else index
        loss_key, dropout_key, label_key, augment_key = jax.random.split(key, 4)
        augment_labels = None
        if train and self.train.augment > 0:
            settings = Augmentation(probability=self.train.augment)
            images, augment_labels = augment(images, augment_key, settings, index)
        class_labels = self.one_hot(labels)
        if class_labels is not None and train and self.train.label_dropout > 0:
            class_labels = drop_labels(class_labels, self.train.label_dropout, label_key, index)
        # Dropout masks belong to the part of a batch that is
        # computed at once, by its first place.
        rngs = {"dropout": jax.random.fold_in(dropout_key, index[0])} if train else {}

        params = own(params)

        def apply(
            x: jax.Array, c_noise: jax.Array, *_: jax.Array | None, **given: Any
        ) -> jax.Array:
            return self.network.apply(
                {"params": params},
                x,
                c_noise,
                class_labels,
                augment_labels,
                train,
                rngs=rngs,
                **given,
            )

        denoise = precondition(apply, self.process.sigma_data)
        return loss(self.process, denoise, images, loss_key, index)

    def describe(self) -> dict[str, Any]:
        """All that the stage does to its input, but for its weights, as plain values."""
        chosen: dict[str, Any] = {"handoff": self.handoff} if self.starts_from_images else {}
        chosen |= {"ema": self.ema} if self.ema else {}
        chosen |= {"guide": asdict(self.guide)} if self.guide is not None else {}
        return chosen | {
            "resolution": self.resolution,
            "index": self.index,
            "dtype": np.dtype(self.network.dtype).name,
            "network": describe(self.network),
            "process": {
                "kind": kind_of(self.process, PROCESSES),
                **asdict(self.sample_process),
            },
            "sampler": {
                "kind": kind_of(self.sampler, SAMPLERS),
                **asdict(self.sampler),  # type: ignore[call-overload]
                "steps": len(self.sampler.levels()) - 1,
            },
            "guidance": asdict(self.guidance),
        }


def joined(stages: Sequence[Stage]) -> list[Stage]:
    """The stages as a chain samples them.

    One before a relay from noise stops at the level that the relay's
    first one has there, sigma / patch. Raises UserError, one line,
    for a stage that cannot hand over a state, and for a relay from
    noise without the stage before.
    """
    if stages and stages[0].handoff == "noise":
        raise UserError(
            f"stage {stages[0].name}: with sample.handoff 'noise' it continues a state of the "
            "stage before and not images: sample the whole relay, or use sample.handoff 'image'"
        )
    following = [*stages[1:], None]
    return [_until(stage, after) for stage, after in zip(stages, following, strict=True)]


def _until(stage: Stage, after: Stage | None) -> Stage:
    """The stage, stopped where `after` continues its state. Raises UserError."""
    if after is None or after.handoff == "image":
        return stage
    begin = f"stage {after.name}: sample.handoff 'noise' "
    # The noise of a relay is white and block noise: its means over
    # patches are not those that the next stage's noise has.
    if stage.starts_from_images:
        raise UserError(
            f"{begin}continues a stage that starts from noise, and {stage.name} is a relay itself; "
            "use 'image'"
        )
    until = getattr(stage.sampler, "until", None)
    if until is None:
        kind = kind_of(stage.sampler, SAMPLERS)
        raise UserError(
            f"{begin}needs a stage before that can stop early, and the sampler {kind} of stage "
            f"{stage.name} cannot; use 'image', or kind 'heun' or 'multistep' there"
        )
    try:
        return replace(stage, sampler=until(handed_sigma(after)))
    except ValueError as error:
        raise UserError(f"{begin}stops stage {stage.name}: {error}") from error


def handed_sigma(stage: Stage) -> float:
    """The level of the state that a relay from noise continues: its first level over the patch."""
    return float(stage.sampler.levels()[0]) / stage.process.patch


def kind_of(part: object, classes: Mapping[str, type]) -> str:
    """The name of a part's class in a configuration: a short one, or package.module:Class."""
    # By the class itself: a part derived from a known one must not
    # be taken for it in a record.
    short = [name for name, candidate in classes.items() if type(part) is candidate]
    return short[0] if short else f"{type(part).__module__}:{type(part).__name__}"

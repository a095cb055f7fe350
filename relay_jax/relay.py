"""A relay as an object: open a run or converted weights, sample, denoise, and measure losses.

    relay = load("runs/demo")
    images = relay.sample(seeds=range(16), classes=3)
    quick = relay.with_preset("fast").sample(seeds=range(16))
    fewer = relay.replace("relay", sampler=Heun(num_steps=20, handoff_sigma=0.9)).sample(range(16))

A thin facade over Stage and the sampling chain, through which the
command line samples as well: equal seeds, weights and settings give
equal images. One process; several devices are used if there are.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict

from relay_jax.config import Settings, configurations, load_config, parse_stage, settings_of
from relay_jax.diffusion.precondition import Condition, Denoiser
from relay_jax.errors import UserError
from relay_jax.models.network import describe, parameter_count
from relay_jax.presets import changed, check_preset, with_ema, with_preset
from relay_jax.runtime import devices
from relay_jax.runtime.checkpoint import read_meta
from relay_jax.runtime.sharding import make_mesh, place
from relay_jax.sampling.chain import Chain, sample_stage
from relay_jax.sampling.record import plain
from relay_jax.sampling.seeds import classes_for, parse_class_rule
from relay_jax.sampling.weights import with_networks_of
from relay_jax.stage import Guided, Stage, joined, own
from relay_jax.weights import unpack
from relay_jax.workdir import (
    CONFIG,
    claim_workdir,
    class_names,
    open_config,
    parse_weights,
    read_config,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Relay:
    """Stages with their averaged weights.

    stages: low resolution first; params: by stage name, `Guided` for
    a stage with a guide; notes: what the checkpoints say of
    themselves; batch: images per call of the
    compiled programs; class_names: of the data set, where it is
    known; settings: of its configuration, where it has one.
    """

    stages: Sequence[Stage]
    params: Mapping[str, dict | Guided]
    notes: Mapping[str, dict] = dataclasses.field(default_factory=dict)
    batch: int = 64
    class_names: Sequence[str] = ()
    settings: Settings | None = None

    @cached_property
    def chain(self) -> Chain:
        """The compiled stages; what the command line uses, too."""
        return Chain(self.stages, self.params, self._mesh, self.batch)

    @cached_property
    def _mesh(self) -> Mesh:
        return make_mesh()

    def stage(self, name: str) -> Stage:
        """A stage by name. Raises UserError that lists them."""
        stage = parse_stage(self.stages, name)
        if stage is None:
            raise UserError(f"name a stage: {', '.join(s.name for s in self.stages)}")
        return stage

    def sample(
        self,
        seeds: Sequence[int] | np.ndarray,
        classes: int | str | Sequence[int | str] | np.ndarray | None = None,
    ) -> dict[str, np.ndarray]:
        """Images of every stage by its name, float32 [n, h, w, 3], about [-1, 1], not clipped.

        seeds: [n], 0 to 2^32 - 1; image i depends on seed i and its
        class alone. classes: one for all, by number or name, one for
        each seed [n], a rule (sampling/seeds.py: mod, balanced,
        random), or None for mod, as on the command line.

        A stage before a relay with handoff "noise" has no finished
        image: what its network makes of the state that it hands
        over. Raises UserError for classes or seeds that cannot be.
        Source: docs/math.md section 6.
        """
        numbers = np.asarray(list(seeds), np.int64)
        if len(numbers) and not (numbers.min() >= 0 and numbers.max() < 2**32):
            raise UserError("seeds must lie in 0 to 2^32 - 1")
        return self.chain.images(numbers, self._classes(numbers, classes))

    def _classes(self, seeds: np.ndarray, classes: Any) -> np.ndarray:
        num_classes = self.stages[-1].num_classes
        if classes is None or isinstance(classes, str | int | np.integer):
            rule = self._class_rule("mod" if classes is None else str(classes))
            return classes_for(seeds, num_classes, rule)
        # Names and numbers may stand side by side.
        numbers = [int(self._class_rule(c)) if isinstance(c, str) else c for c in classes]
        values = np.asarray(numbers, np.int32)
        if values.shape != seeds.shape:
            raise UserError(f"{len(seeds)} seeds need as many classes, not {list(values.shape)}")
        if len(values) and not (values.min() >= 0 and values.max() < max(num_classes, 1)):
            raise UserError(f"classes must lie in 0 to {num_classes - 1}")
        return values

    def _class_rule(self, text: str) -> str:
        return parse_class_rule(text, self.stages[-1].num_classes, self.class_names)

    def denoiser(
        self,
        stage: str,
        classes: jax.Array | Sequence[int] | None = None,
        condition: Condition | None = None,
    ) -> Denoiser:
        """(x [b, h, w, 3], scalar sigma) -> denoised images x0, guided as the stage is sampled.

        stage: its name; classes: int [b], or None for no labels;
        condition: of a stage that has one, such as a cascade's.
        Jittable. Source: docs/math.md section 5. Raises UserError
        for an unknown stage.
        """
        labels = None if classes is None else jnp.asarray(classes, jnp.int32)
        return self.stage(stage).denoiser(self.params[stage], labels, condition)

    def loss(
        self,
        stage: str,
        images: jax.Array,
        labels: jax.Array | None,
        key: jax.Array,
    ) -> jax.Array:
        """Training loss of each image without augmentation and dropout, float32 [b].

        stage: its name; images: [b, h, w, 3], uint8 or floats in
        [-1, 1], at the resolution of the stage; labels: int [b] or
        None; key: of the levels and the noise. Source: docs/math.md
        section 5. Raises UserError for an unknown stage.
        """
        chosen = self.stage(stage)
        return loss(chosen, own(self.params[stage]), jnp.asarray(images), labels, key)

    def replace(self, stage: str, **changes: Any) -> "Relay":
        """The same relay with other parts of one stage, such as sampler=, guidance=, handoff=.

        Raises UserError for an unknown stage or parts that do not
        work together, TypeError for a field that a stage has not.
        """
        old = self.stage(stage)
        new = dataclasses.replace(old, **changes)
        _check_weights(old, new)
        try:
            new.check()
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"stage {stage}: {error}") from error
        stages = [new if s is old else s for s in self.stages]
        joined(stages)  # raises for a hand-off that cannot be
        return dataclasses.replace(self, stages=stages)

    def with_preset(self, name: str) -> "Relay":
        """The same weights, sampled as a preset says, as by --preset: official, safe, fast, draft.

        What `replace` has changed is as in the configuration again.
        Raises UserError for an unknown name, and for a relay without
        a configuration.
        """
        if self.settings is None:
            raise UserError("this relay has no configuration; use replace(stage, sampler=...)")
        names = [stage.name for stage in self.stages]
        stages = [s for s in with_preset(self.settings, name).stages if s.name in names]
        return dataclasses.replace(self, stages=with_networks_of(stages, self.stages))


def load(
    run: str | Path | Mapping[str, str | Path],
    config: str | ConfigDict | None = None,
    preset: str = "",
    ema: str | float = "",
    sampling: Mapping[str, Mapping[str, Any]] | None = None,
) -> Relay:
    """Opens a training run, weights of the package ("cifar10"), or converted weights.

    run: the workdir of a run; a name of the package or a file of
    relay_jax/weights; a folder of converted stages, a
    sub-folder for each; or their folders by stage name, {"base":
    ..., "relay": ...}, FOLDER@STEP for one checkpoint. config: name,
    file or ConfigDict. A run has its own and needs none. Checkpoints
    alone say what their network is, but not its process and sampler:
    without `config` it is the one configuration of the package that
    has these networks. preset: how it is sampled, as --preset; ''
    for the configuration's own samplers. ema: which average of the
    weights, as --ema: a width or half-life. sampling: keys of the
    stages' `sample` that differ from the configuration, such as
    {"relay": {"guide": "relay@12000", "guide_weight": 2.0}}.

    Raises UserError for what is not there, does not fit, or is not
    one configuration's.
    """
    # Before the weights are read, which may take minutes.
    if preset:
        check_preset(preset)
    relay = _open(run, config, lambda settings: with_ema(changed(settings, sampling or {}), ema))
    return relay.with_preset(preset) if preset else relay


def _open(
    run: str | Path | Mapping[str, str | Path],
    config: str | ConfigDict | None,
    adapt: Callable[[Settings], Settings],
) -> Relay:
    """adapt: changes how the relay of a configuration is sampled."""
    if isinstance(run, Mapping):
        texts = {name: str(Path(folder).expanduser()) for name, folder in run.items()}
    else:
        run = unpack.run_of(run)
        if read_config(run) is not None:
            return _load_run(run, config, adapt)
        texts = {f.parent.name: str(f.parent) for f in sorted(run.glob("*/checkpoints"))}
        if not texts:
            raise UserError(
                f"{run} is neither a run (no {CONFIG}) nor a folder of stages; the package has "
                f"the weights {', '.join(unpack.names())}"
            )
    if config is None:
        config = _configuration_of({name: Path(text) for name, text in texts.items()})
    settings = adapt(settings_of(config_of(config)))
    return _load(settings, parse_weights(settings.stages, texts))


def _load_run(
    workdir: Path, config: str | ConfigDict | None, adapt: Callable[[Settings], Settings]
) -> Relay:
    if config is None:
        settings = settings_of(open_config(workdir))
    else:
        settings = settings_of(config_of(config))
        claim_workdir(settings.plain, workdir, create=False)
    folders = {stage.name: workdir / stage.name for stage in settings.stages}
    return _load(adapt(settings), folders, class_names(workdir, {}))


def _load(settings: Settings, folders: Mapping[str, Path], names: Sequence[str] = ()) -> Relay:
    set_up_devices(settings)
    stages = [stage for stage in settings.stages if stage.name in folders]
    for stage in stages:
        described = read_meta(folders[stage.name]).get("network")
        difference = described and _difference(described, stage)
        if difference:
            raise UserError(f"{folders[stage.name]} is of another network: {difference}")
    chain = Chain.load(stages, folders, make_mesh(settings.fsdp), settings.sample.batch)
    return Relay(
        stages=with_networks_of(stages, chain.stages),
        params=chain.params,
        notes=chain.notes,
        batch=settings.sample.batch,
        class_names=names or class_names(None, folders),
        settings=settings,
    )


def _check_weights(old: Stage, new: Stage) -> None:
    """Raises UserError for a change that needs weights which have not been loaded."""
    guides = [s.guide and (s.guide.weights, s.guide.ema) for s in (old, new)]
    other = "ema" if old.ema != new.ema else "guide" if guides[1] not in (None, guides[0]) else ""
    if other:
        raise UserError(
            f"stage {new.name}: weights of another {other} are not loaded; open them by "
            f"load(..., sampling={{{new.name!r}: {{{other!r}: ...}}}})"
        )


def _difference(described: Mapping[str, Any], stage: Stage) -> str:
    """The first field in which a checkpoint's network differs from that of a stage, '' if none."""
    fields = json.loads(json.dumps(plain(describe(stage.network))))
    for name, value in fields.items():
        # Precision, dropout and recomputation may be chosen anew for
        # the same weights.
        if name in ("dtype", "dropout", "remat") or name not in described:
            continue
        if described[name] != value:
            return f"{name} is {described[name]} there and {value} in stage {stage.name}"
    return ""


def _configuration_of(folders: Mapping[str, Path]) -> ConfigDict:
    """The one configuration of the package whose stages have the networks of these checkpoints."""
    networks = {name: read_meta(folder).get("network") for name, folder in folders.items()}
    fitting = []
    for file in configurations():
        config = load_config(str(file))
        stages = {stage.name: stage for stage in settings_of(config).stages}
        if networks.keys() <= stages.keys() and all(
            described and not _difference(described, stages[name])
            for name, described in networks.items()
        ):
            fitting.append((file.stem, config))
    if len(fitting) != 1:
        names = ", ".join(name for name, _ in fitting) or "no configuration of the package"
        raise UserError(
            f"these weights fit {names}; name one, such as load(..., config='imagenet256')"
        )
    return fitting[0][1]


def set_up_devices(settings: Settings) -> None:
    """One CPU device for each core, if the weights fit as often; before the first use of a device.

    The command line and `load` do the same, so that their programs
    and their bits are the same. In a process that has used JAX
    before, its devices stay as they are.
    """
    if settings.fsdp > 1:
        devices.setup()
        return
    shapes = [stage.shapes() for stage in settings.stages]
    devices.setup(settings.sample.batch, 4 * parameter_count(shapes))


def config_of(config: str | ConfigDict) -> ConfigDict:
    """A ConfigDict as it is; the configuration of a name or file otherwise. Raises UserError."""
    return load_config(config) if isinstance(config, str) else config


def build(config: str | ConfigDict, seed: int = 0) -> Relay:
    """A relay with fresh parameters, to look at, count or train.

    config: name ("demo", "imagenet256:smoke"), file or ConfigDict.
    seed: of the parameters. Raises UserError for a configuration
    that cannot work.
    """
    settings = settings_of(config_of(config))
    set_up_devices(settings)
    mesh = make_mesh()
    # One program a stage: operation by operation takes a minute.
    params = {
        stage.name: place(
            jax.jit(stage.init)(jax.random.fold_in(jax.random.key(seed), stage.index)),
            mesh,
        )
        for stage in settings.stages
    }
    return Relay(
        stages=settings.stages,
        params=params,
        batch=settings.sample.batch,
        settings=settings,
    )


def sample(
    stage: Stage,
    params: dict | Guided,
    seeds: jax.Array,
    classes: jax.Array | None = None,
    low_res: jax.Array | None = None,
) -> jax.Array:
    """Images of one stage as a pure function, to be jitted: float32 [b, h, w, c], not clipped.

    seeds: uint32 [b]; classes: int [b] or None; low_res:
    [b, h/p, w/p, c], for a stage that starts from images.
    Source: docs/math.md section 6. Raises ValueError without low_res
    where it is needed, AssertionError (chex) for other shapes,
    UserError for a stage with handoff "noise", which continues no
    image.
    """
    joined([stage])
    return sample_stage(stage, params, jnp.asarray(seeds, jnp.uint32), classes, low_res).final


def loss(
    stage: Stage,
    params: dict,
    images: jax.Array,
    labels: jax.Array | None,
    key: jax.Array,
) -> jax.Array:
    """Training loss of each image of one stage as a pure function: float32 [b].

    images: [b, h, w, c], uint8 or floats in [-1, 1]; labels: int [b]
    or None; key: of the levels and the noise. No augmentation, no
    dropout. Source: docs/math.md section 5. Raises AssertionError
    (chex) for images of another shape than the network's.
    """
    return stage.loss(params, images, None if labels is None else jnp.asarray(labels), key)

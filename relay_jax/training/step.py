"""One training step as a pure function (docs/math.md section 8).

    batch -> loss of each image (Stage.loss) -> mean -> gradient -> (clip) -> Adam -> average

A loss or gradient that is not finite leaves parameters, optimiser
and average as they were; the step is counted. So a training outlives
a rare overflow of bfloat16, and ends only after many in a row
(train.max_nonfinite), which the loop decides.
"""

from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, use_abstract_mesh

from relay_jax.models.averages import is_width, name_of, power_share
from relay_jax.models.network import in_travel_dtype
from relay_jax.runtime.devices import jit
from relay_jax.runtime.sharding import batch_sharding, gathered, replicated
from relay_jax.stage import Stage, TrainSettings
from relay_jax.training.state import TrainState, make_optimizer

Batch = dict[str, jax.Array]  # image: uint8 [b, h, w, c]; label: int32 [b]
Metrics = dict[str, jax.Array]
LossFn = Callable[[dict, Batch, jax.Array, jax.Array], jax.Array]


def batch_loss(
    stage: Stage,
    params: dict,
    batch: Batch,
    index: jax.Array,
    key: jax.Array,
    mesh: Mesh | None = None,
) -> jax.Array:
    """Mean training loss of some images of a batch, a float32 scalar (docs/math.md section 5).

    index: int [b], their places in the whole batch. mesh: where the
    parameters may be split.
    """
    if mesh is not None and mesh.shape["fsdp"] > 1:
        # Cast before they are gathered: bfloat16 halves what the
        # devices exchange.
        params = gathered(in_travel_dtype(stage.network, params), mesh)
    return jnp.mean(stage.loss(params, batch["image"], batch["label"], key, index, train=True))


def value_and_gradient(
    loss_fn: LossFn, params: dict, batch: Batch, key: jax.Array, parts: int
) -> tuple[jax.Array, dict]:
    """Mean loss of a batch and its gradient, computed in `parts` equal parts, one after the other.

    loss_fn: (params, batch, index, key) -> scalar. Returns a float32
    scalar and a tree like params.
    """
    count = batch["label"].shape[0]
    index = jnp.arange(count)
    value_and_grad = jax.value_and_grad(loss_fn)
    if parts == 1:
        return value_and_grad(params, batch, index, key)

    # Part j takes images j, j + parts, ...: so each device
    # contributes to every part, and no image moves between devices.
    def split(x: jax.Array) -> jax.Array:
        return jnp.moveaxis(x.reshape(count // parts, parts, *x.shape[1:]), 1, 0)

    def add(
        total: tuple[jax.Array, dict], part: tuple[Batch, jax.Array]
    ) -> tuple[tuple[jax.Array, dict], None]:
        return jax.tree.map(jnp.add, total, value_and_grad(params, *part, key)), None

    zero = (jnp.zeros(()), jax.tree.map(jnp.zeros_like, params))
    # A loop of the program, not of Python: the memory of one part
    # serves all of them.
    total, _ = jax.lax.scan(add, zero, (jax.tree.map(split, batch), split(index)))
    return jax.tree.map(lambda x: x / parts, total)


def ema_decay(
    images_seen: jax.Array, batch: int, halflife_images: float, rampup: float
) -> jax.Array:
    """The weight of the old average: 0.5^(batch / halflife) (EDM appendix F.2, official training).

    halflife = min(halflife_images, rampup * images_seen), in images;
    rampup 0 switches the ramp off. images_seen: images before this
    step, any shape; returns the same shape.
    """
    # The ramp lets an early average forget the random weights: at
    # the first step it is 0, a copy.
    halflife = jnp.asarray(halflife_images)
    if rampup > 0:
        halflife = jnp.minimum(halflife_images, rampup * images_seen)
    return 0.5 ** (batch / jnp.maximum(halflife, 1e-8))


def update_ema(ema: dict, params: dict, decay: jax.Array) -> dict:
    """decay * ema + (1 - decay) * params, leaf by leaf."""
    return jax.tree.map(lambda e, p: decay * e + (1 - decay) * p, ema, params)


def update_averages(
    averages: dict[str, dict], params: dict, train: TrainSettings, step: jax.Array, moved: jax.Array
) -> dict[str, dict]:
    """The averages of train.ema after a step, by name.

    params: those after it; step: its number, from 1; moved: whether
    they are new, or those of a step that was skipped.
    """
    updated = {}
    for value in train.ema:
        old = averages[name_of(value)]
        if is_width(value):
            # Also in a step that was skipped: that the profile is a
            # power of the step is what other widths are made from.
            share = power_share(step, value)
            new = jax.tree.map(lambda e, p, a=share: e + a * (p - e), old, params)
        else:
            images_seen = (step - 1).astype(jnp.float32) * train.batch
            decay = ema_decay(images_seen, train.batch, value, train.ema_rampup)
            new = update_ema(old, params, jnp.where(moved, decay, 1.0))
        updated[name_of(value)] = new
    return updated


def clip_gradient(gradient: dict, norm: jax.Array, longest: float) -> dict:
    """The gradient, shortened to the norm `longest` where it is longer (Pascanu et al. 2013).

    norm: [] of the gradient, over all of its leaves together.
    """
    # As a factor of at most 1, so that a gradient within the limit
    # keeps its bits.
    scale = jnp.minimum(1.0, longest / norm)
    return jax.tree.map(lambda leaf: leaf * scale, gradient)


def train_step(
    stage: Stage, mesh: Mesh | None, state: TrainState, batch: Batch, key: jax.Array
) -> tuple[TrainState, Metrics]:
    """(state, batch, key of the run) -> (state, metrics), for one step; see `make_train_step`."""
    settings, optimizer = stage.train, make_optimizer(stage.train)
    # The step's own key, so that a run that continues draws what an
    # uninterrupted one would have.
    step_key = jax.random.fold_in(key, state.step)
    loss_fn = partial(batch_loss, stage, mesh=mesh)
    # The operations of the network see over how many devices a batch is split.
    with nullcontext() if mesh is None else use_abstract_mesh(mesh.abstract_mesh):
        value, gradient = value_and_gradient(
            loss_fn, state.params, batch, step_key, settings.accumulate
        )
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(norm) & jnp.isfinite(value)
    # Off by default: Adam's step does not grow with its gradient, and
    # one that is not finite is skipped.
    if settings.clip:
        gradient = clip_gradient(gradient, norm, settings.clip)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    images_seen = state.step.astype(jnp.float32) * settings.batch
    decay = ema_decay(
        images_seen,
        settings.batch,
        settings.ema_halflife_images,
        settings.ema_rampup,
    )
    # The average takes the parameters after the update, as in the
    # official training.
    ema = update_ema(state.ema, params, decay)

    new = TrainState(
        step=state.step + 1,
        params=params,
        ema=ema,
        opt_state=opt_state,
        nonfinite_row=jnp.zeros_like(state.nonfinite_row),
        nonfinite_total=state.nonfinite_total,
    )
    skipped = state._replace(
        step=state.step + 1,
        nonfinite_row=state.nonfinite_row + 1,
        nonfinite_total=state.nonfinite_total + 1,
        averages={},
    )
    # Chosen element by element on the device: a branch on the host
    # would wait for every step.
    averages, state = state.averages, jax.tree.map(partial(jnp.where, finite), new, skipped)
    averages = update_averages(averages, state.params, settings, state.step, finite)
    state = state._replace(averages=averages)
    metrics = {"loss": value, "gradient_norm": norm, "finite": finite.astype(jnp.float32)}
    if settings.clip:
        metrics["clipped"] = (norm > settings.clip).astype(jnp.float32)
    return state, metrics


def make_train_step(
    stage: Stage, mesh: Mesh | None = None
) -> Callable[[TrainState, Batch, jax.Array], tuple[TrainState, Metrics]]:
    """(state, batch, key) -> (state, metrics), to be jitted with the state donated.

    mesh: where the step runs, if it splits the state. key: of the
    run, the same for every step. metrics: loss, gradient_norm
    (before it is clipped), finite (1 or 0), and with train.clip
    clipped (1 or 0), each a float32 scalar.
    """
    return partial(train_step, stage, mesh)


def jit_step(function: Callable[..., Any], mesh: Mesh, shardings: TrainState) -> Any:
    """A training step as the loop runs it: its state is donated, and returned where it lay.

    function: by `make_train_step`; shardings: of the state. Plans
    and benchmarks compile the same program by the same call.
    """
    whole = replicated(mesh)
    return jit(
        function,
        mesh,
        donate_argnums=0,
        in_shardings=(shardings, batch_sharding(mesh), whole),
        out_shardings=(shardings, whole),
    )

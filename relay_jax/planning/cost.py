"""What a stage costs, from its traced programs: FLOPs, memory of a device, sampling.

FLOPs       twice the multiply-adds of convolutions and matrix products, read from the traced
            program, for one image; a training step is the gradient of the loss, recomputation by
            remat included; Adam is left out (some 20 per parameter and step). XLA's own count of
            the same program is lower: it leaves out products with padding.
Memory      exact from shapes and the sharding rule, but for the activations: what the backward pass
            keeps, as jax differentiates the loss (a trace of shapes), before XLA fuses and
            recomputes; with remat, plus the insides of the largest block. An upper estimate.
            Weights that fsdp gathers while in use are left out.
Sampling    calls of the denoiser, as the sampler makes them, and evaluations of the network behind
            them, as guidance asks for them.

Nothing is compiled or allocated: all arrays are abstract.
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend import core
from jax.sharding import AbstractMesh

from relay_jax.models.network import blank_condition
from relay_jax.runtime.flops import matmul_flops
from relay_jax.runtime.sharding import state_shardings
from relay_jax.stage import Stage
from relay_jax.training.state import TrainState, init_state
from relay_jax.training.step import batch_loss, value_and_gradient

# The programs' inputs, without any values


def abstract_batch(stage: Stage, images: int) -> dict[str, jax.ShapeDtypeStruct]:
    """The shapes of a batch of `images` images, as the loader gives it."""
    shape = (images, *stage.image_shape)
    return {
        "image": jax.ShapeDtypeStruct(shape, jnp.uint8),
        "label": jax.ShapeDtypeStruct((images,), jnp.int32),
    }


def abstract_key() -> jax.ShapeDtypeStruct:
    """The shape of a random key."""
    return jax.eval_shape(partial(jax.random.key, 0))


# A published network takes seconds to trace, and every figure of a
# plan needs its shapes.
@cache
def abstract_state(stage: Stage) -> TrainState:
    """The shapes of a stage's whole training state."""
    return jax.eval_shape(partial(init_state, stage), abstract_key())


# FLOPs


@cache
def forward_flops(stage: Stage) -> int:
    """FLOPs of one call of the network with one image."""
    network, shape = stage.network, jax.ShapeDtypeStruct
    image = shape((1, *stage.image_shape), jnp.float32)
    labels = shape((1, network.num_classes), jnp.float32) if network.num_classes else None
    variables = {"params": abstract_state(stage).params}
    inputs = (variables, image, shape((1,), jnp.float32), labels)
    apply = partial(network.apply, **blank_condition(network, image))
    return matmul_flops(jax.make_jaxpr(apply)(*inputs).jaxpr)


@cache
def train_flops(stage: Stage) -> int:
    """FLOPs of the training loss and its gradient, for one image."""
    gradient = partial(value_and_gradient, partial(batch_loss, stage), parts=1)
    inputs = abstract_state(stage).params, abstract_batch(stage, 1), abstract_key()
    return matmul_flops(jax.make_jaxpr(gradient)(*inputs).jaxpr)


# Sampling


def sampler_calls(stage: Stage) -> tuple[int, int]:
    """Of one image: calls of the denoiser, and evaluations of the network behind them.

    They differ where guidance acts: it evaluates the network twice,
    or that of the guide as well.
    """
    sigmas = stage.sampler.call_sigmas()
    return len(sigmas), stage.guidance.evaluations(sigmas) + _guide_evaluations(stage)


def _guide_evaluations(stage: Stage) -> int:
    return stage.guide.evaluations(stage.sampler.call_sigmas()) if stage.guide else 0


def stage_flops(stage: Stage, forward: int) -> int:
    """FLOPs of sampling one image through a stage. forward: its `forward_flops`."""
    of_guide = _guide_evaluations(stage)
    network, worse = stage.guide_network, forward
    if of_guide and network not in (None, stage.network):
        worse = forward_flops(replace(stage, network=network, guide=None, guide_network=None))
    return (sampler_calls(stage)[1] - of_guide) * forward + of_guide * worse


def sampling_cost(stages: Sequence[Stage], forward: Mapping[str, int]) -> dict[str, int]:
    """Of one image through all stages: calls, evaluations, flops.

    forward: `forward_flops` by stage name.
    """
    both = [sampler_calls(stage) for stage in stages]
    return {
        "calls": sum(calls for calls, _ in both),
        "evaluations": sum(evaluations for _, evaluations in both),
        "flops": sum(stage_flops(stage, forward[stage.name]) for stage in stages),
    }


# Memory


@dataclass(frozen=True, kw_only=True)
class Memory:
    """Bytes on one device by kind.

    With accumulation `images` are those of one part, and gradients
    are two sets: the part's and their sum. copies: weights in the
    precision of the activations. per_image: activations and batch,
    of one image. images: at once.
    """

    parameters: int
    optimiser: int
    ema: int
    gradients: int
    copies: int
    per_image: int
    images: int

    @property
    def fixed(self) -> int:
        """What does not depend on the number of images."""
        return self.parameters + self.optimiser + self.ema + self.gradients + self.copies

    @property
    def activations(self) -> int:
        """Of all images at once."""
        return self.per_image * self.images

    @property
    def total(self) -> int:
        """All kinds together."""
        return self.fixed + self.activations

    def report(self) -> dict[str, int]:
        """Every kind and the totals, for JSON."""
        return {
            **asdict(self),
            "activations": self.activations,
            "total": self.total,
        }

    def room(self, memory: float) -> int:
        """Images per device that fit into `memory` bytes."""
        return max(int((memory - self.fixed) // self.per_image), 0)


def memory(stage: Stage, devices: int, fsdp: int, remat: bool) -> Memory:
    """Of one of `devices`, on a mesh that splits the parameters over `fsdp` of them."""
    state = abstract_state(stage)
    mesh = AbstractMesh((devices // fsdp, fsdp), ("data", "fsdp"))
    per_image, copies = activation_bytes(stage, remat)
    per_image += sum(leaf.size * leaf.dtype.itemsize for leaf in abstract_batch(stage, 1).values())
    parameters = _shard_bytes(state.params, mesh)
    return Memory(
        parameters=parameters,
        optimiser=_shard_bytes(state.opt_state, mesh),
        ema=_shard_bytes((state.ema, state.averages), mesh),
        gradients=parameters * min(stage.train.accumulate, 2),
        copies=copies,
        per_image=per_image,
        images=stage.train.batch // (devices * stage.train.accumulate),
    )


def _shard_bytes(tree: Any, mesh: AbstractMesh) -> int:
    """Bytes of a tree on one device of a mesh, by the rule of runtime.sharding."""
    places = jax.tree.leaves(state_shardings(tree, mesh))
    return sum(
        math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf, place in zip(jax.tree.leaves(tree), places, strict=True)
    )


def activation_bytes(stage: Stage, remat: bool) -> tuple[int, int]:
    """Bytes that wait for the backward pass: of one image, and of the weights' copies.

    The copies are of weights in another precision. remat: instead of
    the network's own.
    """
    stage = replace(stage, network=stage.network.clone(remat=remat))
    params, key = abstract_state(stage).params, abstract_key()
    # A number of images that no weight is a multiple of: what is one
    # of it is an activation.
    sizes = {leaf.size for leaf in jax.tree.leaves(params)}
    images = next(n for n in itertools.count(17, 2) if all(size % n for size in sizes))
    loss = partial(_loss_of_all, stage)
    inputs = params, abstract_batch(stage, images), key
    kept, copies = _kept(partial(_residuals, loss), inputs, images)
    blocks = [
        equation.params["jaxpr"]
        for equation in jax.make_jaxpr(loss)(*inputs).eqns
        if remat and equation.primitive.name in ("remat2", "checkpoint")
    ]
    # The backward pass fills one recomputed block at a
    # time. A network that recomputes nothing, whatever its
    # remat says, has none.
    if blocks:
        largest = max(blocks, key=_values_within)
        function = core.jaxpr_as_fun(core.ClosedJaxpr(largest, ()))
        kept += _kept(
            partial(_residuals_of_all, function),
            [v.aval for v in largest.invars],
            images,
        )[0]
    return kept, copies


def _loss_of_all(stage: Stage, params: dict, batch: dict, key: jax.Array) -> jax.Array:
    """The training loss of a whole batch."""
    return batch_loss(stage, params, batch, jnp.arange(batch["label"].shape[0]), key)


def _residuals(function: Callable[..., Any], first: Any, *others: Any) -> Any:
    """What the derivative of a function by its first argument keeps, a tree of arrays."""
    return jax.vjp(lambda value: function(value, *others), first)[1]


def _residuals_of_all(function: Callable[..., Any], *arguments: Any) -> Any:
    """As `_residuals`, for the derivative by all arguments."""
    return jax.vjp(function, *arguments)[1]


def _values_within(block: core.Jaxpr) -> int:
    """Numbers that a program computes on its way."""
    return sum(v.aval.size for equation in block.eqns for v in equation.outvars)


def _kept(residuals: Callable[..., Any], arguments: Sequence[Any], images: int) -> tuple[int, int]:
    """Bytes that a function of abstract arguments returns: per image, and of casts of weights."""
    per_image = copies = 0
    for leaf in jax.tree.leaves(jax.eval_shape(residuals, *arguments)):
        if leaf.size % images == 0:
            per_image += leaf.size // images * leaf.dtype.itemsize
        # float32 is a parameter itself, and a scalar says which
        # platform's branch was taken.
        elif leaf.ndim and leaf.dtype != jnp.float32:
            copies += leaf.size * leaf.dtype.itemsize
    return per_image, copies

"""A look into the network that is trained: a table of its parts, and the layer that is not finite.

Both watch the calls of flax modules from outside, so they work for
any network and cost a training nothing: the compiled step knows
nothing of them.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from relay_jax.errors import UserError
from relay_jax.models.network import blank_condition, parameter_count
from relay_jax.runtime.distributed import is_first
from relay_jax.runtime.files import replacing
from relay_jax.runtime.sharding import replicated, to_host
from relay_jax.stage import Stage
from relay_jax.training.step import Batch, batch_loss

Row = tuple[str, str, str, str]  # part, kind, parameters, output


@contextmanager
def watched(see: Callable[[nn.Module, Any], None]) -> Iterator[None]:
    """Within it `see` is called with each module and its output, inner modules first."""
    with nn.intercept_methods(partial(_call_and_see, see)):
        yield


def _call_and_see(
    see: Callable[[nn.Module, Any], None],
    call: Callable[..., Any],
    inputs: tuple[Any, ...],
    options: dict[str, Any],
    context: Any,
) -> Any:
    output = call(*inputs, **options)
    # Modules have other methods too, of which some return nothing.
    if context.method_name == "__call__":
        see(context.module, output)
    return output


def plain(stage: Stage) -> Stage:
    """The stage without rematerialisation, whose inner programs hide the layers from outside."""
    return replace(stage, network=stage.network.clone(remat=False))


def parts_table(stage: Stage, shapes: Any) -> str:
    """The parts of a stage's network with their parameters and output shapes, as lines of text.

    shapes: of the parameters (Stage.shapes). Nothing is computed.
    """
    network = plain(stage).network
    batch = stage.train.batch
    image = jax.ShapeDtypeStruct((batch, *stage.image_shape), jnp.float32)
    outputs: dict[str, tuple[str, str]] = {}
    with watched(partial(_note_part, outputs)):
        level = jax.ShapeDtypeStruct((batch,), jnp.float32)
        jax.eval_shape(
            lambda params, x, c_noise: network.apply(
                {"params": params}, x, c_noise, **blank_condition(network, x)
            ),
            shapes,
            image,
            level,
        )
    rows: list[Row] = [("part", "kind", "parameters", "output")]
    # In the order of the calls, which is how the network
    # reads. Parameters that no called part holds belong to
    # the network itself.
    rows += [
        (name, kind, f"{parameter_count(shapes.get(name, {})):,}", output)
        for name, (kind, output) in outputs.items()
    ]
    rest = parameter_count([leaf for name, leaf in shapes.items() if name not in outputs])
    if rest:
        rows.append(("(itself)", type(network).__name__, f"{rest:,}", ""))
    rows.append(("all", type(network).__name__, f"{parameter_count(shapes):,}", ""))
    return "\n".join(_aligned(rows))


def _note_part(outputs: dict[str, tuple[str, str]], module: nn.Module, output: Any) -> None:
    if len(module.path) != 1 or module.path[0] in outputs:
        return
    arrays = [f"{leaf.dtype} {list(leaf.shape)}" for leaf in jax.tree.leaves(output)]
    outputs[module.path[0]] = type(module).__name__, ", ".join(arrays)


def _aligned(rows: list[Row]) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        f"  {part:{widths[0]}}  {kind:{widths[1]}}  {count:>{widths[2]}}  {output}".rstrip()
        for part, kind, count, output in rows
    ]


def not_finite(
    stage: Stage,
    params: dict,
    batch: Batch,
    step: int,
    key: jax.Array,
    folder: Path,
    mesh: Mesh,
) -> UserError:
    """What to raise after a step whose loss or gradient was not finite.

    It names the layer, and the batch is kept in folder/debug.
    params: those that the step began with, which it has left as they
    were; key: of the run. All processes must call it.
    """
    # The key that the step has folded
    # from the number of steps before it.
    step_key = jax.random.fold_in(key, step - 1)
    place = first_not_finite(stage, params, batch, step_key, mesh)
    path = folder / "debug" / f"batch_{step}.npz"
    arrays = {name: to_host(value) for name, value in batch.items()}
    if is_first():
        arrays |= {
            "step": np.asarray(step),
            "key": np.asarray(jax.random.key_data(key)),
        }
        with replacing(path) as temporary, temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
    return UserError(
        f"stage {stage.name}: step {step} is not finite, first in {place}; its batch is in {path}",
        agreed=True,
    )


def first_not_finite(stage: Stage, params: dict, batch: Batch, key: jax.Array, mesh: Mesh) -> str:
    """The first layer whose output is not finite, or whose parameters have such a gradient.

    key: of the step. Words for a message: "the output of
    enc_8x8_block0/conv0", "the gradient of ...", or "the loss" where
    all layers are finite.
    """
    # Part by part as in the step: a batch that needs accumulation
    # does not fit at once.
    for part in range(stage.train.accumulate):
        names: list[str] = []
        look = jax.jit(
            partial(_finite_parts, plain(stage), names, part),
            out_shardings=replicated(mesh),
        )
        outputs, gradient = jax.device_get(look(params, batch, key))
        for name, finite in zip(names, outputs, strict=True):
            if not finite:
                return f"the output of {name}"
        bad = {path for path, finite in _leaves(gradient) if not finite}
        # The backward pass comes from the end: the last of these
        # layers is where it began.
        for name in reversed(names):
            for path in sorted(bad):
                if path.rpartition("/")[0] == name:
                    return f"the gradient of {path}"
        if bad:
            return f"the gradient of {min(bad)}"
    return "the loss"


def _leaves(tree: Any) -> list[tuple[str, Any]]:
    paths = jax.tree_util.tree_leaves_with_path(tree)
    return [("/".join(str(entry.key) for entry in path), leaf) for path, leaf in paths]


def _finite_parts(
    stage: Stage,
    names: list[str],
    part: int,
    params: dict,
    batch: Batch,
    key: jax.Array,
) -> tuple[list[jax.Array], dict]:
    """Whether each output and each gradient is finite, for one part of a batch.

    names: filled with those of the
    outputs while the program is traced.
    """
    # The same images at the same places as in `value_and_gradient`:
    # the same noise and masks.
    parts = stage.train.accumulate
    index = jnp.arange(part, batch["label"].shape[0], parts)
    images = jax.tree.map(lambda x: x[part::parts], batch)
    (_, flags), gradient = jax.value_and_grad(
        partial(_loss_and_flags, stage, names, images, index, key), has_aux=True
    )(params)
    return flags, jax.tree.map(_is_finite, gradient)


def _loss_and_flags(
    stage: Stage,
    names: list[str],
    images: Batch,
    index: jax.Array,
    key: jax.Array,
    params: dict,
) -> tuple[jax.Array, list[jax.Array]]:
    flags: list[jax.Array] = []
    with watched(partial(_note_finite, names, flags)):
        value = batch_loss(stage, params, images, index, key)
    return value, flags


def _note_finite(names: list[str], flags: list[jax.Array], module: nn.Module, output: Any) -> None:
    arrays = [x for x in jax.tree.leaves(output) if jnp.issubdtype(x.dtype, jnp.floating)]
    names.append("/".join(module.path) or "the network")
    flags.append(jnp.all(jnp.stack([_is_finite(x) for x in arrays])) if arrays else jnp.array(True))


def _is_finite(x: jax.Array) -> jax.Array:
    return jnp.isfinite(x).all()

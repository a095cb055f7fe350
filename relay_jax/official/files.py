"""Official checkpoint files: read without running anything that is in them.

Both official formats are pickles of whole module objects which carry
the SOURCE TEXT of their classes, and an ordinary load executes it.
Here only numbers leave the file: pickle.py interprets,
torch_files.py knows the formats, and this module finds the networks
in the result.
"""

import math
import mmap
import struct
import zipfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from relay_jax.errors import UserError
from relay_jax.official.pickle import Record, show
from relay_jax.official.torch_files import Tensor, is_count, load
from relay_jax.runtime.counting import counting

MAX_PARTS = 100_000  # tensors and modules of a network
MAX_DEPTH = 32  # modules within modules
MAX_NAME = 256  # characters


@dataclass(frozen=True, kw_only=True)
class Network:
    """A pickled network.

    params: parameters and buffers by official name, float32 in
    official layouts, read-only. class_name: as which it was pickled.
    arguments: of its constructor, those that are numbers, texts, or
    lists and dicts of them.
    """

    class_name: str
    params: dict[str, np.ndarray]
    arguments: dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OfficialFile:
    """What is used of an official file.

    Networks, and Adam moments by parameter name, are None if
    the file has none or they were not asked for. mapping:
    the file in memory.
    """

    mapping: mmap.mmap
    ema: Network | None = None
    net: Network | None = None
    images_seen: int | None = None
    exp_avg: dict[str, np.ndarray] | None = None
    exp_avg_sq: dict[str, np.ndarray] | None = None

    def release(self) -> None:
        """Gives the memory of what has been read so far back to the system.

        Whoever needs it again reads it again.
        """
        # Pages of a mapped file count as memory of the process: a
        # conversion would hold file and result at once.
        if hasattr(mmap, "MADV_DONTNEED"):
            self.mapping.madvise(mmap.MADV_DONTNEED)


def _members(record: object, where: str) -> tuple[dict, dict, dict, set]:
    """Of a module: parameters, buffers, children, and the names of buffers outside its state dict.

    Raises UserError for anything else, named by `where`.
    """
    state = record.state if isinstance(record, Record) else None
    if not isinstance(state, dict):
        raise UserError(f"{show(where)} is not a module")
    parameters, buffers, children = (state.get(k) for k in ("_parameters", "_buffers", "_modules"))
    hidden = state.get("_non_persistent_buffers_set") or []
    for group in (parameters, buffers, children):
        if not isinstance(group, dict) or not all(
            isinstance(k, str) and len(k) <= MAX_NAME for k in group
        ):
            raise UserError(f"{show(where)} has no parameters, buffers or children")
    if not isinstance(hidden, list) or len(hidden) > MAX_NAME:
        raise UserError(f"{show(where)} is not a module")
    names = {name for name in hidden if isinstance(name, str)}
    return parameters, buffers, children, names  # type: ignore[return-value]


def _tensors(module: object) -> Iterator[tuple[str, Tensor, bool]]:
    """(name, tensor, is it a parameter) of a module, those of its children last, as torch does."""
    # Torch's order matters: its optimizers number the parameters. An
    # explicit stack, because a hostile file may nest modules deeper
    # than Python recurses.
    parts, stack = 0, [("", module, 0)]
    while stack:
        prefix, node, depth = stack.pop()
        parameters, buffers, children, hidden = _members(node, prefix or "the network")
        parts += 1 + len(parameters) + len(buffers) + len(children)
        if parts > MAX_PARTS or depth > MAX_DEPTH:
            raise UserError("its network has far more parts than any official one")
        for group in (parameters, buffers):
            for name, tensor in group.items():
                if tensor is None or (group is buffers and name in hidden):
                    continue
                if not isinstance(tensor, Tensor):
                    raise UserError(f"{show(prefix + name)} is not a tensor")
                yield prefix + name, tensor, group is parameters
        stack.extend(
            (f"{prefix}{name}.", child, depth + 1)
            for name, child in reversed(children.items())
            if child is not None
        )


def _plain(value: object, depth: int = 0) -> Any:
    """Numbers, texts, lists and dicts as they are; None for anything else, or too deep or long."""
    # What is left may be printed, compared and written as JSON
    # without a further look.
    if isinstance(value, (bool, int, float, type(None))) or (
        isinstance(value, str) and len(value) <= MAX_NAME
    ):
        return value
    if isinstance(value, (list, tuple)) and depth < 3 and len(value) <= 64:
        return [_plain(v, depth + 1) for v in value]
    if isinstance(value, dict) and depth < 3 and len(value) <= 64:
        return {str(k)[:MAX_NAME]: _plain(v, depth + 1) for k, v in value.items()}
    return None


def _network(module: Any, what: str, size: int) -> Network:
    """size: bytes of the file, which half precision at most doubles."""
    params: dict[str, np.ndarray] = {}
    elements = 0
    # A network pickled without its preconditioning lacks the first
    # part of the usual names.
    prefix = "model." if module.class_name == "DhariwalUNet" else ""
    with counting(f"reading {what}", unit="MB") as add:
        for name, tensor, _ in _tensors(module):
            name = prefix + name
            elements += math.prod(tensor.size)
            # Tensors may share one storage: a small file could claim any
            # number of large ones.
            if name in params or 2 * elements > size:
                raise UserError(f"parameter {show(name)} of {what} occurs twice, or its data does")
            params[name] = tensor.array()
            add(params[name].nbytes / 1e6)
    arguments = _plain(module.state.get("_init_kwargs"))
    if module.state.get("_init_args") or not isinstance(arguments, dict) or not params:
        raise UserError(f"{what} has no parameters, or no constructor arguments with names")
    return Network(class_name=module.class_name, params=params, arguments=arguments)


def _moments(state: object, module: object, size: int) -> dict[str, dict[str, np.ndarray]]:
    """Adam's exp_avg and exp_avg_sq by parameter name, from the number of each parameter."""
    parameters = [(name, tensor) for name, tensor, is_parameter in _tensors(module) if is_parameter]
    if 2 * sum(math.prod(tensor.size) for _, tensor in parameters) > size:
        raise UserError("the data of its parameters is not all there")
    match state:
        case {
            "state": dict(entries),
            "param_groups": [{"params": list(order)}],
        } if len(order) == len(parameters):
            moments: dict[str, dict[str, np.ndarray]] = {
                "exp_avg": {},
                "exp_avg_sq": {},
            }
            for index, (name, parameter) in zip(order, parameters, strict=True):
                entry = entries.get(index) if type(index) is int else None
                for key, values in moments.items():
                    tensor = entry.get(key) if isinstance(entry, dict) else None
                    if not isinstance(tensor, Tensor) or tensor.size != parameter.size:
                        raise UserError(
                            f"its optimizer has no {key} of {show(name)}, or of another shape"
                        )
                    values[name] = tensor.array()
            return moments
    raise UserError("its optimizer state is not that of Adam over the parameters of net")


def _images_seen(step: object) -> int | None:
    if step is not None and not is_count(step):
        raise UserError(f"its step is {show(step)}, not a number of images")
    return step  # type: ignore[return-value]


def read_official(
    path: Path | str,
    networks: Sequence[str] = ("ema", "net"),
    optimizer: bool = False,
) -> OfficialFile:
    """Reads an official `.pt` or `.pkl` file, or one of EDM's releases.

    networks: which to read of "ema" and "net"; optimizer: read the
    Adam moments too. The arrays are read-only views of the mapped
    file wherever it holds float32, so the file must not change while
    they are in use.
    Raises UserError, one line that names the file.
    """
    path = Path(path)
    try:
        top, mapping = load(path)
        if not isinstance(top, dict) or not isinstance(top.get("ema"), Record):
            raise UserError("it has no network under 'ema'")
        size = path.stat().st_size
        parts: dict[str, Any] = {
            name: _network(top[name], name, size)
            for name in ("ema", "net")
            if name in networks and top.get(name) is not None
        }
        if optimizer and top.get("optimizer_state") is not None:
            parts |= _moments(top["optimizer_state"], top.get("net"), size)
        return OfficialFile(mapping=mapping, images_seen=_images_seen(top.get("step")), **parts)
    except UserError as error:
        raise UserError(f"{path.name} is not a usable official checkpoint: {error}") from None
    except OSError as error:
        raise UserError(f"{path.name} cannot be read: {error.strerror or error}") from error
    # What a damaged file makes zipfile, struct and numpy raise,
    # found by damaging files at random.
    except (
        zipfile.BadZipFile,
        NotImplementedError,
        struct.error,
        ValueError,
        TypeError,
        LookupError,
        OverflowError,
        EOFError,
        MemoryError,
    ) as error:
        raise UserError(f"{path.name} is truncated or damaged ({type(error).__name__})") from error

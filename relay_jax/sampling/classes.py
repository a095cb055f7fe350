"""Which class the image of a seed has: a function of the seed and the rule alone.

mod         seed mod classes, as in the official samplers
balanced    every `classes` consecutive seeds (from a multiple of `classes` on) hold each class once, in an order of
            their own
random      uniform; equal seeds have equal classes
N           class N for all

The shuffling and the draw come from a hash of the seed in whole numbers (splitmix64; Steele et
al. 2014), so they are
the same on every machine and with every version of numpy.
"""

import numpy as np

from relay_jax.config import ConfigError

CLASS_RULES = ("mod", "balanced", "random")
_BLOCKS_AT_ONCE = 2**22  # hashes in memory


def parse_class_rule(text: str, num_classes: int) -> str:
    """The rule as it is written down. num_classes: 0 for an unconditional network, which takes
    'mod' alone.

    Raises ConfigError for an unknown rule or class.
    """
    if text == "mod":
        return text
    if not num_classes:
        raise ConfigError(f"--class={text}: the network is unconditional; leave --class out")
    if text in CLASS_RULES:
        return text
    if not text.isdecimal():
        raise ConfigError(
            f"--class={text}: neither {', '.join(CLASS_RULES)} nor a class (0 to {num_classes - 1})"
        )
    if int(text) >= num_classes:
        raise ConfigError(f"unknown class {text}; there are 0 to {num_classes - 1}")
    return str(int(text))


def classes_for(seeds: np.ndarray | list[int], num_classes: int, rule: str) -> np.ndarray:
    """int32 [n], the class of each seed; zeros for an unconditional network (num_classes 0).

    rule: what `parse_class_rule` has returned. Raises ValueError for another.
    """
    wide = np.asarray(seeds, np.uint64)
    if not num_classes:
        return np.zeros(len(wide), np.int32)
    if rule == "mod":
        return (wide % np.uint64(num_classes)).astype(np.int32)
    if rule == "random":
        high = _hash(wide) >> np.uint64(32)
        return (high * np.uint64(num_classes) >> np.uint64(32)).astype(np.int32)
    if rule == "balanced":
        return _balanced(wide, num_classes)
    if not rule.isdecimal() or int(rule) >= num_classes:
        raise ValueError(f"unknown class rule {rule!r} for {num_classes} classes")
    return np.full(len(wide), int(rule), np.int32)


def _balanced(seeds: np.ndarray, num_classes: int) -> np.ndarray:
    blocks, places = np.divmod(seeds, np.uint64(num_classes))
    wanted, which = np.unique(blocks, return_inverse=True)
    classes = np.empty(len(seeds), np.int32)
    step = max(_BLOCKS_AT_ONCE // num_classes, 1)
    for start in range(0, len(wanted), step):
        members = wanted[start : start + step, None] * np.uint64(num_classes) + np.arange(
            num_classes, dtype=np.uint64
        )
        orders = np.argsort(
            _hash(_hash(members)), axis=1, kind="stable"
        )  # twice: not the order of 'random'
        here = (which >= start) & (which < start + step)
        classes[here] = orders[which[here] - start, places[here].astype(np.int64)]
    return classes


def _hash(x: np.ndarray) -> np.ndarray:
    """splitmix64 of uint64, element by element; sums and products wrap."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)

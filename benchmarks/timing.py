"""Wall times of functions that do the same work, taken in turns: what else the machine does
meets all of them alike."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def in_turns(
    functions: Mapping[str, Callable[[], object]], rounds: int, calls: int = 3
) -> dict[str, np.ndarray]:
    """Seconds per call, [rounds] for each function. A function returns when its work is done.

    A round runs every function for `calls` timed calls, after one that is not: the threads of
    another library may still spin when a turn begins. The time of a round is the fastest of its
    calls; odd rounds go in reverse order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    for index in range(rounds):
        order = list(functions)[:: -1 if index % 2 else 1]
        for name in order:
            functions[name]()
            best = np.inf
            for _ in range(calls):
                start = time.perf_counter()
                functions[name]()
                best = min(best, time.perf_counter() - start)
            seconds[name].append(best)
    return {name: np.array(times) for name, times in seconds.items()}


def ratio(slow: np.ndarray, fast: np.ndarray) -> tuple[float, float, float]:
    """How many times faster the second is, pair by pair: median and quartiles of slow / fast.
    Both [rounds]."""
    low, middle, high = np.quantile(slow / fast, (0.25, 0.5, 0.75))
    return float(middle), float(low), float(high)

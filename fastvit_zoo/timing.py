"""Latency as a ratio: functions timed in turns, so that other work on the machine slows all of them."""

from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any

import numpy as np
import torch


def turns(functions: Sequence[Callable[[], Any]], rounds: int) -> np.ndarray:
    """Milliseconds (rounds, functions), after a turn that is not counted.

    On a CPU the time that the process computed, on a GPU the time until it is done.
    """
    times = np.zeros((rounds + 1, len(functions)))
    clock = perf_counter if torch.cuda.is_available() else process_time
    for turn in times:
        for i, function in enumerate(functions):
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            turn[i] = 1000 * (clock() - start)
    return times[1:]


def milliseconds(functions: Sequence[Callable[[], Any]], rounds: int = 5) -> list[float]:
    """The median time of each function over the turns."""
    return np.median(turns(functions, rounds), 0).tolist()


def ratios(functions: Sequence[Callable[[], Any]], rounds: int = 5) -> list[float]:
    """The median over the turns of the time of each function, relative to that of the first in the same turn."""
    times = turns(functions, rounds)
    return np.median(times / times[:, :1], 0).tolist()

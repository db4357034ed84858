"""Latency as a ratio: functions timed in turns, so that other work on the machine slows all of them."""

from collections.abc import Callable, Sequence
from time import perf_counter, process_time
from typing import Any

import torch


def milliseconds(functions: Sequence[Callable[[], Any]], rounds: int = 5) -> list[float]:
    """The shortest time of each function over `rounds` turns, after one that is not counted.

    On a CPU the time that the process computed, on a GPU the time until it is done.
    """
    best = [float("inf")] * len(functions)
    clock = perf_counter if torch.cuda.is_available() else process_time
    for turn in range(rounds + 1):
        for i, function in enumerate(functions):
            start = clock()
            function()
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            if turn:
                best[i] = min(best[i], 1000 * (clock() - start))
    return best

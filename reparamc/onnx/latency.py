"""Is the result faster? Original and result in ONNX Runtime, with all of its own optimizations, in turns."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import comb
from time import perf_counter

import numpy as np
from onnx import ModelProto

from reparamc.equivalence.trials import GUESSES
from reparamc.errors import InputError
from reparamc.onnx.session import first_working_inputs, session
from reparamc.report.data import Latency

WARM_UP = 5
"""Turns that are not counted: the runtime allocates, caches fill, the clock of the processor rises."""
FEWEST, MOST = 21, 201
"""Bounds of the turns that are counted."""
BUDGET = 5.0
"""Seconds that the counted turns should take."""
CONFIDENCE = 0.95
EXTENTS = (224, *GUESSES)
"""Sizes tried for the unknown axes of an input: an ordinary image first, and not the smallest that runs."""


def compare_latency(original: ModelProto, result: ModelProto) -> Latency:
    """Run both models in turns, on the same random input, and compare them turn by turn.

    Raises:
        InputError: ONNX Runtime cannot run the original on random inputs.
    """
    with (
        session(original, "the model", optimize=True, narrowed=False) as run_original,
        session(result, "the rewritten model", optimize=True, narrowed=False) as run_result,
    ):
        try:
            inputs, _ = first_working_inputs(original, run_original, 0, EXTENTS)
        except InputError as error:
            why = str(error).removesuffix("; try --verify region")
            raise InputError(f"{why}; it cannot be timed, so leave out --only-if-faster") from error
        return compare_runs(partial(run_original, inputs), partial(run_result, inputs))


def compare_runs(
    original: Callable[[], object], result: Callable[[], object], clock: Callable[[], float] = perf_counter
) -> Latency:
    """Time two functions in turns; ``clock`` returns seconds.

    What else the machine does meets both runs of a turn, so each turn gives one ratio, and their median is
    judged. Who goes first alternates.
    """
    warm = [_turn(original, result, clock) for _ in range(WARM_UP)]
    turns = int(np.clip(BUDGET / max(sum(warm[-1]), 1e-9), FEWEST, MOST))
    times = []
    for turn in range(turns):
        if turn % 2:
            times.append(_turn(result, original, clock)[::-1])
        else:
            times.append(_turn(original, result, clock))
    before, after = np.array(times).T
    ratios = np.sort(after / np.maximum(before, 1e-12))
    below = _rank(turns)
    return Latency(
        original=float(np.median(before)),
        result=float(np.median(after)),
        ratio=float(np.median(ratios)),
        low=float(ratios[below]),
        high=float(ratios[turns - 1 - below]),
        turns=turns,
    )


def _turn(first: Callable[[], object], second: Callable[[], object], clock: Callable[[], float]) -> tuple[float, float]:
    start = clock()
    first()
    between = clock()
    second()
    return between - start, clock() - between


def _rank(n: int) -> int:
    """How many of ``n`` sorted samples lie outside of each end of the interval for their median.

    The true median lies below the sample of rank k (from 0) with the probability that at most k of n fair
    coins show heads. Nothing else is assumed of the distribution.
    """
    k, tail = 0, 1 / 2**n
    while (tail := tail + comb(n, k + 1) / 2**n) <= (1 - CONFIDENCE) / 2:
        k += 1
    return k

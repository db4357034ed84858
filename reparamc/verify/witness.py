"""One tensor that two models compute by different functions: does that show on real values, and in the outputs?

The window of the tensor runs alone on both sides, from the values that the original has at its operands. Then the rest
of the original runs from its own value plus the difference, which is made so large that no rounding hides it: if
the outputs follow, the two models are different functions, however small the difference itself is in them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import ModelProto

from reparamc.equivalence.difference import difference, noise_of
from reparamc.equivalence.end_to_end import Region, by_channel
from reparamc.onnx.regions_alone import cut_at, run_alone
from reparamc.onnx.session import epsilon, session

SHARE = 0.05
"""The difference is made this part of the tensor's largest value."""

FOLLOWS = 64
"""An output follows where it moves by so many times what rounding does to it."""


@dataclass(frozen=True)
class Witness:
    """What running a window alone shows.

    Attributes:
        error: how far its tensor is off, relative to the largest value of a channel.
        shows: whether that is more than rounding explains.
        reaches: whether an output depends on it.
    """

    error: float
    shows: bool
    reaches: bool


def witness(original: ModelProto, fused: ModelProto, where: str, inputs: Mapping[str, np.ndarray]) -> Witness | None:
    """The tensor ``where``, which both models compute, on ``inputs`` of both; None if ONNX Runtime cannot tell."""
    operands = operands_of(original, fused)(where)
    regions = [*(Region(o, (), o, "", "") for o in operands), Region(where, tuple(operands), where, "", "")]
    seen = run_alone(original, fused, regions, inputs)
    if seen is None or where not in seen.actual:
        return None
    expected, actual = seen.expected[where], seen.actual[where]
    noises = [noise[where] for noise in seen.noises]
    judge = partial(by_channel, expected, actual, noises, epsilon(expected, inputs))
    axes = {min(1, expected.ndim - 1), expected.ndim - 1} if expected.ndim else {None}
    gap, error, allowed = max((judge(axis) for axis in axes), key=lambda found: found[1] / max(found[2], 1e-300))
    if not 0 < gap < np.inf:
        return Witness(error, gap > 0, gap > 0)
    off = actual.astype(np.float64) - expected
    times = max(1.0, SHARE * float(np.abs(expected).max()) / float(np.abs(off).max()))
    cut, names = cut_at(original, {where: expected})
    with session(cut, "the model, cut at one tensor") as run:
        moved = run({**inputs, where: np.asarray(expected + times * off, expected.dtype)})
    for name in (o.name for o in original.graph.output):
        noise = max(noise_of(seen.expected[name], [n[name] for n in seen.noises]), epsilon(seen.expected[name], inputs))
        if name != where and difference(seen.expected[name], moved[names.get(name, name)]).max_rel > FOLLOWS * noise:
            return Witness(error, error > allowed, True)
    return Witness(error, error > allowed, any(o.name == where for o in original.graph.output))


def operands_of(original: ModelProto, fused: ModelProto) -> Callable[[str], list[str]]:
    """From a tensor to those, constants left out, that both models have and from which ``fused`` computes it."""
    known: set[str] = set()
    given = {v.name for v in original.graph.input} - {t.name for t in original.graph.initializer}
    for node in original.graph.node:
        if not (given | known).isdisjoint(node.input):
            known.update(node.output)
    producers = {name: node for node in fused.graph.node for name in node.output}

    def operands(where: str) -> list[str]:
        found: dict[str, None] = {}
        stack, seen = [where], {where}
        while stack:
            for name in producers[stack.pop()].input:
                if name in producers and name not in seen:
                    seen.add(name)
                    if name in known:
                        found[name] = None
                    else:
                        stack.append(name)
        return list(found)

    return operands

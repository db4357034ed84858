"""Activations that are the identity on everything that they are given, and the intervals that show it.

An activation is the identity on an interval: ReLU where its operand is not negative, Clip between its bounds. Hosts say
the interval of each operator without a reading; what has a reading is followed here. A NaN counts as inside: all of
these activations keep it. Nothing is computed, so no rounding can leave an interval, but for the upper end of a sum.
Only floating numbers are followed through arithmetic: an integer that overflows changes its sign.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import inf

import numpy as np

from reparamc.algebra.expr import (
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Resize,
    Scale,
    Select,
    Source,
    Sum,
    walk,
)
from reparamc.compiler.graph import ALL, Bounded, Graph, Interval, Splice
from reparamc.compiler.plan import Plan
from reparamc.compiler.readings import Reading, Value

POSITIVE: Interval = (0.0, inf)
"""Not negative."""


def clip(x: Value, low: float, high: float) -> Bounded | None:
    """The operator that moves what is outside of an interval to its ends."""
    return Bounded((x,), (low, high), (low, high)) if low <= high else None


POSITIVE_BY_NAME = frozenset({"abs", "exp", "hardsigmoid", "sigmoid", "softmax", "softplus"})
KEPT_BY_NAME = frozenset({"celu", "elu", "leakyrelu", "prelu"})


def bounded_by_name(name: str, x: Value) -> Bounded | None:
    """An activation of ``x`` whose attributes do not matter here, by its name; case and underscores do not count."""
    name = name.lower().replace("_", "")
    if name in ("relu", "relu6"):
        return clip(x, 0.0, 6.0 if name == "relu6" else inf)
    if name in POSITIVE_BY_NAME:
        return Bounded((x,), POSITIVE)
    return Bounded((x,), keeps=POSITIVE) if name in KEPT_BY_NAME else None


def remove_redundant(graph: Graph, name: str, verify: bool) -> Plan | None:
    """A plan in which users of such activations read their operands; None where there are none."""
    found: dict[Value, Interval] = {}
    splices: dict[Value, Splice] = {}
    for value in graph.values():
        reading = graph.read(value)
        bounded = None if isinstance(reading, Reading) else graph.bounded(value)
        known = reading if isinstance(reading, Reading) else bounded
        operands = [] if known is None else [*known.operands]
        given = {x: found[x] for x in operands if x in found and not graph.is_written(x, but=value)}
        if isinstance(reading, Reading):
            interval = _of_reading(reading, given)
            found[value] = interval if interval == ALL or graph.dtype([value]) is not None else ALL
        elif bounded is not None:
            found[value] = _interval(bounded, [given.get(x, ALL) for x in operands])
            if _is_identity(bounded, given):
                x = splices[operands[0]].operands[0] if operands[0] in splices else operands[0]
                if not graph.is_written(value) and graph.obstacle(value, [value], [x], []) is None:
                    splices[value] = _taking(graph, value, x, name)
    return Plan(graph, splices=[*splices.values()]) if splices else None


def _taking(graph: Graph, value: Value, x: Value, name: str) -> Splice:
    """``x`` in the place of ``value``."""
    same, dtype = Source(x), graph.dtype([value]) or np.dtype(np.float32)  # nothing is stored
    count = Counter({name: 1})
    return Splice(value, (value,), same, {same: x}, dtype, count, (), "an activation of x, where it is x", "x", 0.0)


def _is_identity(bounded: Bounded, found: Mapping[Value, Interval]) -> bool:
    if bounded.keeps is None:
        return False
    (low, high), (least, most) = bounded.keeps, found.get(bounded.operands[0], ALL)
    return low <= least and most <= high


def _interval(bounded: Bounded, given: Sequence[Interval]) -> Interval:
    if bounded.chooses:
        return _hull(given)
    if bounded.signed:
        return _sign(given)
    if bounded.keeps is not None and bounded.keeps[0] <= given[0][0] and given[0][1] <= bounded.keeps[1]:
        return given[0]
    return bounded.gives


def _of_reading(reading: Reading, found: Mapping[Value, Interval]) -> Interval:
    done: dict[Expr, Interval] = {}
    if reading.leaves and isinstance(reading.template, Conv | Scale | BatchNorm):  # as most are
        return ALL
    for e in walk(reading.template):
        parts = [done[x] for x in e.children]
        match e:
            case Source():
                done[e] = found.get(e.key, ALL)
            case Layout(op=Resize(mode="cubic" | "other")):
                done[e] = ALL
            case Sum() | Layout(op=Mean() | Resize()):
                done[e] = _sign(parts)
            case Concat() | Select() | Layout():
                done[e] = _hull(parts)
            case Conv() if not reading.leaves and e.is_weightless:
                done[e] = _sign(parts)
            case _:
                done[e] = ALL
    return done[reading.template]


def _hull(parts: Sequence[Interval]) -> Interval:
    return min(low for low, _ in parts), max(high for _, high in parts)


def _sign(parts: Sequence[Interval]) -> Interval:
    """Of sums, averages and products: rounding may leave the upper end, but never zero."""
    return POSITIVE if all(low >= 0 for low, _ in parts) else ALL

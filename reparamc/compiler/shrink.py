"""Lossless shrink: operators on fewer channels, without those that `liveness` finds known or unused.

It is carried out before all other passes: what these read is the graph that is left.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, cast

import ml_dtypes
import numpy as np

from reparamc.algebra.channels import Index, narrowed
from reparamc.algebra.expr import (
    ONE,
    BatchNorm,
    Conv,
    Expr,
    Layout,
    Reshape,
    Scale,
    Select,
    Source,
    arrays,
    rebuild,
    release,
    walk,
)
from reparamc.algebra.recorded import tape
from reparamc.algebra.records import replace
from reparamc.algebra.shape import Dim
from reparamc.algebra.text import show
from reparamc.compiler.consider import rounding_obstacle
from reparamc.compiler.graph import Graph, Splice
from reparamc.compiler.liveness import Channels, Liveness
from reparamc.compiler.plan import Plan
from reparamc.compiler.readings import Reading, Value

TRACE = 2.0**-100
"""What is added to a bias and is smaller, and no normal number of its dtype, is zero: some runtimes take it so."""

MOST_TRIES = 8
"""How often channels are looked for again, without those that could not leave."""


def shrink(graph: Graph, name: str, verify: bool) -> Plan | None:
    """The operators without channels that are known or unused; None where there are none of these, or may be none."""
    if tape() is not None:
        return None  # parameters may get other values
    stuck = set[Value]()
    for _ in range(MOST_TRIES):
        live = Liveness(graph, stuck)
        if live.needed.all():
            return None
        found = _Shrinking(graph, live, name, verify).splices()
        if not isinstance(found, _Stuck):
            return Plan(graph, splices=found) if found else None
        stuck.update(found)
    return None


class _Stuck(frozenset[Value]):
    """Values whose channels have to stay, because an operator cannot be made without them."""


class _Shrinking:
    def __init__(self, graph: Graph, live: Liveness, name: str, verify: bool) -> None:
        self.graph, self.live, self.name, self.verify = graph, live, name, verify
        self.narrow = {v for v in graph.values() if v in live.found and self._loses(v)}
        self.units = _units(graph, self.narrow)

    def _loses(self, value: Value) -> bool:
        return len(self.live.kept(value)) < self.live.found[value].width

    def splices(self) -> list[Splice] | _Stuck:
        """What takes the place of each operator that has fewer channels to read or to make."""
        found: list[Splice] = []
        for value, expr in self.live.exprs.items():
            touched = {value, *(e.key for e in walk(expr) if isinstance(e, Source))} & self.narrow
            if touched and any(_is_counted(e) for e in walk(expr)):
                splice = self._splice(value, expr)
                if splice is None:
                    return _Stuck(touched)
                found.append(splice)
            release(expr)
        return found

    def _splice(self, value: Value, expr: Expr) -> Splice | None:
        done: dict[Expr, Expr] = {}
        graph = self.graph
        dtype = graph.dtype([value])
        if dtype is None:
            return None
        least = min(float(cast(Any, ml_dtypes).finfo(dtype).smallest_normal), TRACE)
        for e in walk(expr):
            done[e] = self._narrow_source(e) if isinstance(e, Source) else self._narrowed(e, value, expr, done, least)
        new = done[expr]
        sources = {done[e]: e.key for e in walk(expr) if isinstance(e, Source)}
        made = [e for e in walk(new) if e not in sources]
        if graph.obstacle(value, [value], [*sources.values()], made) is not None:
            return None
        if any(rounding_obstacle(a, dtype) for e in made for a in arrays(e)):
            return None
        error = None
        if self.verify:
            from reparamc.algebra.equal import REGION_TOLERANCE

            error = self._error(value, expr, new, done)
            if error is not None and not error <= REGION_TOLERANCE:
                return None
        reading = graph.read(value)
        parameters = reading.parameters if isinstance(reading, Reading) else ()
        gone = self.live.found[value].width - len(self.live.kept(value))
        unit = self.units[next(v for v in (value, *sources.values()) if v in self.narrow)]
        return Splice(
            value, (value,), new, sources, dtype, Counter({self.name: gone}), parameters, show(expr), show(new), error,
            shared=unit, narrows=tuple(v for v in self.narrow if self.units[v] == unit),
        )  # fmt: skip

    def _key(self, e: Expr, value: Value, root: Expr) -> Value | Expr:
        return e.key if isinstance(e, Source) else value if e is root else e

    def _narrow_source(self, e: Source) -> Source:
        width, shape = len(self.live.kept(e.key)), e.shape
        if shape is not None and e.axis is not None:
            at = len(shape) + e.axis
            shape = (*shape[:at], Dim(width), *shape[at + 1 :])
        return replace(e, channels=width, shape=shape)

    def _narrowed(self, e: Expr, value: Value, root: Expr, done: Mapping[Expr, Expr], least: float) -> Expr:
        keys = [self._key(x, value, root) for x in e.children]
        read, known = [self.live.kept(k) for k in keys], [self.live.found[k].known for k in keys]
        merged = [(a.of, a.factor) for k in keys for a in [self.live.found[k].merged]]
        out = self.live.kept(self._key(e, value, root))
        return narrowed(e, [done[x] for x in e.children], out, read, known, merged, least)

    def _error(self, value: Value, expr: Expr, new: Expr, done: Mapping[Expr, Expr]) -> float | None:
        """How far ``new`` is from what ``expr`` makes of operands whose known channels are put back."""
        from reparamc.algebra.equal import compare_expressions

        whole: dict[Expr, Expr] = {}
        for e in walk(expr):
            if isinstance(e, Source):
                whole[e] = _put_back(done[e], self.live.kept(e.key), self.live.found[e.key])
            else:
                whole[e] = rebuild(e, [whole[x] for x in e.children])
        out, axis = self.live.kept(value), self.live.found[value].axis
        before = Select(whole[expr], tuple(out.tolist()), self.live.found[value].width, axis)
        try:  # beside what is much smaller than any parameter, and much larger than a trace
            return compare_expressions(Scale(before, ONE, np.array(TRACE)), Scale(new, ONE, np.array(TRACE)))
        except ValueError:
            return None


def _put_back(x: Expr, kept: Index, channels: Channels) -> Expr:
    """``x``, which has the channels ``kept``, with all; those that are neither known nor multiples are zero."""
    spatial, known, merged = -1 - channels.axis, channels.known, channels.merged
    weight = np.zeros((len(known), len(kept), *[1] * spatial))
    at = np.full(len(known), -1)
    at[kept] = np.arange(len(kept))
    rows = np.flatnonzero((at[merged.of] >= 0) & np.isnan(known))
    weight[rows, at[merged.of[rows]]] = np.reshape(merged.factor[rows], (-1, *[1] * spatial))
    weight[kept] = 0
    weight[kept, np.arange(len(kept))] = 1
    bias = np.where(np.isnan(known), 0.0, known)
    bias[kept] = 0
    ones, zeros = (1,) * spatial, (0,) * spatial
    return Conv(x, weight, bias, ones, ones, zeros, zeros)


def _is_counted(e: Expr) -> bool:
    """Whether an operator says how many channels it has."""
    match e:
        case Conv() | BatchNorm() | Select():
            return True
        case Scale():
            return bool(e.scale.ndim or e.shift.ndim)
        case Layout():
            return isinstance(e.op, Reshape)
        case _:
            return False


def _units(graph: Graph, narrow: set[Value]) -> dict[Value, Value]:
    """For each narrowed value the first of those that have to be narrowed together with it."""
    unit = {v: v for v in narrow}

    def first(v: Value) -> Value:
        while unit[v] != v:
            unit[v] = v = unit[unit[v]]
        return v

    for value in graph.values():
        alike = [first(v) for v in (value, *graph.reads(value)) if v in narrow]
        for other in alike:
            unit[first(other)] = first(alike[0])
    return {v: first(v) for v in narrow}

"""What becomes of each region of a host graph.

A region (see `lift`) is lifted into an expression, simplified, priced and checked. Values that several regions
share must disappear from all of them if they scale; if they move, they may stay in all of them over one
and the same operand, in which case they are computed once. Or else they are made an operand of all, and
regions are found again.

A value that is read several times by one region ends a region of its own at first. Then the two are
joined and considered as one, the outer first: where its branches merge, the value is read once, and
the sequence becomes one operator, rounded once. They stay joined if that is cheaper.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, replace
from math import isclose

import ml_dtypes
import numpy as np

from reparamc.algebra.arrays import Parameter, values
from reparamc.algebra.cost import cost
from reparamc.algebra.equal import REGION_TOLERANCE
from reparamc.algebra.expr import (
    Array,
    Conv,
    Expr,
    Layout,
    Source,
    Sum,
    arrays,
    flatten,
    rebuild,
    release,
    replaced,
    walk,
)
from reparamc.algebra.infer import misfit
from reparamc.algebra.provenance import names_through
from reparamc.algebra.rewrite import Declined, Pass, Refusal, Step, simplify
from reparamc.algebra.text import show
from reparamc.compiler.graph import Graph, Splice, not_native
from reparamc.compiler.readings import Reading, Value, values_in
from reparamc.compiler.reference import Host
from reparamc.compiler.regions import LIFT, find_regions, lifted, linear_readers
from reparamc.compiler.smallest import REASON, refuses_more
from reparamc.report.data import FailedRegion


@dataclass(frozen=True)
class Decision:
    """What becomes of one region: its final form, the splice that makes it so, what was declined, what went wrong.

    ``apart`` are members without which the rest may be rewritten: they take maps that a convolution refuses.
    """

    expr: Expr
    splice: Splice | None
    refusals: Sequence[Refusal]
    members: tuple[Value, ...]
    failed: bool = False
    apart: frozenset[Value] = frozenset()


def decide(
    graph: Graph,
    readings: dict[Value, Reading],
    passes: Sequence[Pass],
    host: Host | None,
    progress: Callable[[int, int], None],
) -> dict[Value, Decision]:
    """What becomes of every region. Without ``host`` nothing is checked; otherwise it holds what failed.

    Shared members that some region still reads, or that several repeat over different operands, are operands in
    a second try.
    """
    results: dict[tuple[Value, tuple[Value, ...]], Decision] = {}
    stuck, ends = set[Value](), set[Value]()
    while True:
        regions = find_regions(graph, readings, stuck, ends)
        for done, (root, members) in enumerate(regions.items()):
            if (root, members) not in results:
                results[root, members] = _consider(graph, (members,), readings, passes, host)
                progress(done + 1, len(regions))
        times = Counter(v for members in regions.values() for v in members)
        shared = {v for v, n in times.items() if n > 1}
        origin = {_moved(readings[v].template): v for v in shared if not readings[v].scales}
        known: dict[tuple[Hashable, Hashable], object] = {}
        reads, copies, repeats = set[Value](), dict[Value, set[Hashable]](), Counter[Value]()
        for root, members in regions.items():
            splice = results[root, members].splice
            if splice is None:
                reads.update(members)
            elif not shared.isdisjoint(members):
                for e, key in _keys(splice, known).items():
                    if e in splice.native:
                        reads.add(splice.native[e])
                    elif (v := origin.get(_moved(e))) is not None:
                        copies.setdefault(v, set()).add(key)
                        repeats[v] += 1
        still = {v for v in shared if v in reads or len(copies.get(v, ())) > 1}
        still |= {v for v in shared - still if repeats[v] < times[v] and _is_pooling(readings[v])}
        alone = {v for root, members in regions.items() for v in results[root, members].apart}
        if not still and not alone:
            decisions = {root: results[root, members] for root, members in regions.items()}
            return _copied_once(_joined(graph, readings, decisions, passes, host), shared)
        stuck |= still
        ends |= alone


def _is_pooling(reading: Reading) -> bool:
    """Whether it computes: such an operator is shared if it stays in all regions, and not composed with each reader."""
    return isinstance(reading.template, Conv)


def _moved(e: Expr) -> Hashable:
    """What tells one operator that moves its operand from all others: rewrites keep its op, or its kernel."""
    match e:
        case Layout():
            return id(e.op)
        case Conv() if e.is_weightless:
            return id(e.weight)
        case _:
            return None


def _keys(splice: Splice, known: dict[tuple[Hashable, Hashable], object]) -> dict[Expr, Hashable]:
    """What the nodes of a replacement compute: equal for copies of one operator over one value, in any region.

    ``known`` holds the keys of copies met before, by operator and key of the operand.
    """
    keys: dict[Expr, Hashable] = {}
    for e in walk(splice.expr, stop=splice.native.__contains__):
        if e in splice.native:
            keys[e] = splice.native[e]
        elif e is not splice.expr and isinstance(e, Layout | Conv) and (moved := _moved(e)) is not None:
            keys[e] = known.setdefault((moved, keys[e.x]), object())
        else:
            keys[e] = e
    return keys


def _copied_once(decisions: dict[Value, Decision], shared: Container[Value]) -> dict[Value, Decision]:
    """``decisions``, with one node for equal copies of shared members, so that a host graph computes it once."""
    first: dict[Hashable, Expr] = {}
    known: dict[tuple[Hashable, Hashable], object] = {}
    for root, decision in decisions.items():
        splice = decision.splice
        if splice is None or not any(v in shared for v in decision.members):
            continue
        native, done = dict(splice.native), dict[Expr, Expr]()
        for e, key in _keys(splice, known).items():
            one = e if e in splice.native else rebuild(e, [done[c] for c in e.children])
            done[e] = one if key is e else first.setdefault(key, one)
            if e in splice.native:
                native[done[e]] = splice.native[e]
        splice = replace(splice, expr=done[splice.expr], native=native)
        decisions[root] = replace(decision, expr=splice.expr, splice=splice)
    return decisions


MOST_JOINED = 16
"""Regions that are considered as one: work stays in proportion to the graph."""


def _joined(
    graph: Graph,
    readings: dict[Value, Reading],
    decisions: dict[Value, Decision],
    passes: Sequence[Pass],
    host: Host | None,
) -> dict[Value, Decision]:
    """``decisions``, with regions joined where one alone reads the result of another, several times, if that pays."""
    home: dict[Value, set[Value]] = {}  # the roots of the regions that a value is a member of
    for root, decision in decisions.items():
        for value in decision.members:
            home.setdefault(value, set()).add(root)
    parts: dict[Value, tuple[tuple[Value, ...], ...]] = {}
    for root in list(decisions):
        readers = linear_readers(graph, readings, root)
        roots = {outer for reader in readers for outer in home.get(reader, (None,))}
        outer = roots.pop() if len(roots) == 1 and len(readers) > 1 else None
        if outer is None or any(home[v] != {root} for v in decisions[root].members):
            continue
        first, second = decisions[root], decisions[outer]
        chain = (*parts.get(outer, (second.members,)), *parts.get(root, (first.members,)))
        if len(chain) > MOST_JOINED:
            continue
        whole = _consider(graph, chain, readings, passes, host)
        if whole.splice is not None and cost(whole.expr) < cost(_composed(root, first.expr, second.expr)):
            del decisions[root]
            decisions[outer], parts[outer] = whole, chain
            home.update((v, {outer}) for v in first.members)
    return decisions


def _composed(root: Value, inner: Expr, outer: Expr) -> Expr:
    """``outer`` with ``inner`` for its operand ``root``, to be priced over the maps that ``inner`` leaves."""
    for e in [e for e in walk(outer) if isinstance(e, Source) and e.key == root]:
        outer = replaced((outer,), e, inner)[outer]
    return outer


def _consider(
    graph: Graph,
    parts: Sequence[tuple[Value, ...]],
    readings: dict[Value, Reading],
    passes: Sequence[Pass],
    host: Host | None,
) -> Decision:
    """What becomes of a region: ``parts`` are its members, and those of the regions joined to it."""
    found = _simplified(graph, parts, readings, passes)
    decision = _decided(graph, found, _in_order(parts, readings), readings, host)
    release(found.before)
    return decision


def _decided(
    graph: Graph, found: _Simplified, members: tuple[Value, ...], readings: dict[Value, Reading], host: Host | None
) -> Decision:
    before, after, steps, refusals = found.before, found.after, found.steps, found.refusals
    if not steps or isclose(cost(after), cost(before), rel_tol=1e-12):
        return Decision(before, None, refusals, members)  # nothing to do, or another way to say the same
    native = {e: v for v, e in found.exprs.items() if v != members[-1]}
    native.update((found.exprs[v], v) for v in found.exprs if v not in members)  # not what passes them on
    splice: Splice | Declined | FailedRegion = Declined("the rewritten form would cost more than it saves")
    if cost(after) < cost(before) or not _is_finite(before):
        counts = Counter(step.name for step in steps)
        splice = checked(graph, members, readings, before, after, native, counts, host)
    if isinstance(splice, Splice):
        return Decision(after, replace(splice, origins=_origins(found)), refusals, members)
    reason = splice.reason if isinstance(splice, Declined) else f"it failed its check: {splice.reason}"
    refusals = [*refusals, Refusal(steps[-1].name, before, reason)]
    apart = frozenset[Value]()
    if isinstance(splice, Declined) and splice.reason == REASON:
        apart = frozenset(v for v in members[:-1] if isinstance(e := found.exprs[v], Conv) and e.is_weightless)
    return Decision(before, None, refusals, members, isinstance(splice, FailedRegion), apart)


@dataclass(frozen=True)
class _Simplified:
    """A region as it is and in its final form, what its values compute, and what was done and declined."""

    before: Expr
    after: Expr
    exprs: dict[Value, Expr]
    steps: Sequence[Step]
    refusals: Sequence[Refusal]


def _simplified(
    graph: Graph, parts: Sequence[tuple[Value, ...]], readings: dict[Value, Reading], passes: Sequence[Pass]
) -> _Simplified:
    """Lift and simplify each part while the result of the next one still is an operand."""
    exprs: dict[Value, Expr] = {}
    before = after = Sum(())
    steps: list[Step] = []
    refusals: Sequence[Refusal] = ()
    for part in parts:
        joint = exprs.pop(part[-1], None)
        lifted(graph, part, readings, exprs)
        inner = flatten(exprs[part[-1]])
        if joint is None:
            before = after = inner
        else:
            moved = replaced((before, after, *exprs.values()), joint, inner)
            before, after = flatten(moved[before]), flatten(moved[after])
            exprs = {v: moved[e] for v, e in exprs.items()}
        if reason := misfit(after):
            return _Simplified(before, before, exprs, (), [Refusal(LIFT, before, reason)])
        with np.errstate(all="ignore"):  # whatever is not finite is refused by the check
            outcome = simplify(after, passes)
        after, refusals = outcome.expr, outcome.refusals
        steps += outcome.steps
    return _Simplified(before, after, exprs, steps, refusals)


def _origins(found: _Simplified) -> dict[int, frozenset[str]]:
    """Which parameters each array of the final form is made from, by its id."""
    before = (a for e in walk(found.before) for a in arrays(e))
    named = {id(a): frozenset(a.names if isinstance(a, Parameter) else ()) for a in before}
    names = names_through(named, found.steps)
    return {id(a): names[id(a)] for e in walk(found.after) for a in arrays(e) if id(a) in names}


def _in_order(parts: Sequence[tuple[Value, ...]], readings: dict[Value, Reading]) -> tuple[Value, ...]:
    """The members of all ``parts``, in execution order."""
    if len(parts) == 1:
        return parts[0]
    place = {value: n for n, value in enumerate(readings)}
    return tuple(sorted({v for part in parts for v in part}, key=place.__getitem__))


def checked(
    graph: Graph,
    members: tuple[Value, ...],
    readings: dict[Value, Reading],
    before: Expr,
    after: Expr,
    native: dict[Expr, Value],
    counts: Counter[str],
    host: Host | None,
) -> Splice | Declined | FailedRegion:
    """``after`` in the place of ``members``, whose expression is ``before``, if that can be done and is right.

    Args:
        members: in execution order; the last one is what is computed.
        native: what existing values compute.
        counts: applications of each pass.
        host: what the host's operators said; None where nothing is to be checked.
    """
    root = members[-1]
    sources = list(dict.fromkeys(values_in(v for m in members for v in readings[m].operands if v not in members)))
    refuse = _obstacle(graph, root, members, sources, before, after, native)
    error = None
    if refuse is None and host is not None:
        try:
            error = host.compare(before, after)
        except ValueError as unsampled:
            refuse = f"it cannot be verified: {unsampled}"
    if refuse is not None:
        return Declined(refuse)
    if host is not None:
        by_host = host.error(members, before) if error is not None and error <= REGION_TOLERANCE else None
        for check, found in (("rewrite", error), ("reading", by_host)):
            if found is not None and not found <= REGION_TOLERANCE:
                return host.fail(root, check, found, tuple(counts), show(before), show(after))
    dtype = graph.dtype(members)
    assert dtype is not None
    parameters = tuple(dict.fromkeys(p for v in members for p in readings[v].parameters))
    text = show(before), show(after)
    return Splice(root, members, after, native, dtype, counts, parameters, *text, error, original=before)


def _obstacle(
    graph: Graph,
    root: Value,
    members: Sequence[Value],
    sources: Sequence[Value],
    before: Expr,
    after: Expr,
    native: dict[Expr, Value],
) -> str | None:
    if not _is_finite(before):
        return "a parameter is NaN or infinite"
    dtype = graph.dtype(members)
    if dtype is None:
        return "its values have different dtypes, or an unknown one"
    made = list(not_native(after, native))
    for e in made:
        if isinstance(e, Conv) and not e.is_weightless and e.skips_border:
            return "the rewritten form would have to leave out values at the border"
        for a in arrays(e):
            if (reason := rounding_obstacle(a, dtype)) is not None:
                return reason
    if refuses_more(before, after, made, graph.pools_clamp):
        return REASON
    return graph.obstacle(root, members, sources, made)


def _is_finite(e: Expr) -> bool:
    held = (values(a) for part in walk(e) for a in arrays(part))
    with np.errstate(all="ignore"):  # a sum is finite only if all its terms are
        return all(np.isfinite(a.sum()) or np.isfinite(a).all() for a in held)


def rounding_obstacle(array: Array, dtype: np.dtype) -> str | None:
    """Why ``array`` (float64) must not be stored as ``dtype``; None when it may.

    A value beyond the largest number of the type would become infinite; a row whose every value is
    below the smallest normal number would lose its digits. A vector counts as one row.
    """
    info, array = ml_dtypes.finfo(dtype), values(array)
    by_row = array.reshape(array.shape[0] if array.ndim > 1 else 1, -1)
    rows = np.maximum(by_row.max(axis=1, initial=0.0), -by_row.min(axis=1, initial=0.0))
    if not np.isfinite(rows).all():
        return "a folded parameter is NaN or infinite (a variance of zero without epsilon, or a negative one)"
    if rows.max(initial=0.0) > float(info.max):
        return f"a folded parameter exceeds the range of {dtype}"
    if np.any((rows > 0) & (rows < float(info.smallest_normal))):
        return f"a folded parameter falls below the range of {dtype}"
    return None

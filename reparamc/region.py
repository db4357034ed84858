"""Lift, decide, splice: from a host graph to expressions and back.

A **region** is a maximal tree of linear operators: every member but the root has exactly one reader,
and that is a member too. So all members can die when the root is replaced, and no rewrite can make
work double by absorbing a value that is needed elsewhere as well.

There is one exception. What scales or moves each channel by itself (a BatchNorm in front of q, k and
v), behind something non-linear, is a member of every region that reads it, if all its readers are
linear; it must then disappear from all of them, or else it is made an operand of all of them. Finding
regions is one sweep from the outputs to the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import isclose
from typing import Protocol, TypeAlias

import ml_dtypes
import numpy as np

from reparamc.cost import cost, moving
from reparamc.errors import VerificationError
from reparamc.evaluate import evaluate
from reparamc.expr import (
    Array,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Reshape,
    Select,
    Source,
    Sum,
    arrays,
    flatten,
    walk,
)
from reparamc.probe import find_kernel
from reparamc.rewrite import Declined, Pass, Refusal, simplify
from reparamc.shape import axis_through_reshape
from reparamc.text import show
from reparamc.verify import REGION_TOLERANCE, compare_expressions

Value: TypeAlias = Hashable


@dataclass(frozen=True)
class Reading:
    """One linear operator of the host graph.

    Attributes:
        operands: the values it reads, parameters left out.
        build: its expression over the expressions of its operands; loads the parameters.
        parameters: names of the parameters it holds.
        frame: the frame of its result, where it is known.
        commutes: it scales or moves each channel by itself, so that readers may each take it in.
        scales: it scales, so that a linear operator in front of it would rather take it in.
    """

    operands: tuple[Value, ...]
    build: Callable[[Sequence[Expr]], Expr]
    parameters: tuple[str, ...] = ()
    frame: int | None = None
    commutes: bool = field(default=False, kw_only=True)
    scales: bool = field(default=False, kw_only=True)


class Graph(Protocol):
    """What reparamc needs of a host graph; values are whatever handles the adapter likes."""

    def values(self) -> Sequence[Value]:
        """The results of all operators, in execution order."""
        ...

    def read(self, value: Value) -> Reading | Declined | None:
        """The operator behind ``value`` as a linear one; Declined with the reason when it nearly is."""
        ...

    def readers(self, value: Value) -> Sequence[Value | None]:
        """The values computed from ``value``; None for a reader that is no value (a graph output)."""
        ...

    def source(self, value: Value) -> Source:
        """``value`` as an operand, with what is known of its channels, frame and shape."""
        ...

    def name(self, value: Value) -> str:
        """What the user calls ``value``."""
        ...

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        """The floating dtype that all of ``members`` share; None when it is unknown or they differ."""
        ...

    def obstacle(self, root: Value, members: Sequence[Value], sources: Sequence[Value]) -> str | None:
        """Why new operators just before ``root`` could not stand for ``members``; None when they can."""
        ...

    def is_written(self, value: Value) -> bool:
        """Whether something writes into the memory of ``value`` after it has been computed."""
        ...

    def moves(self, value: Value) -> tuple[Value, ...] | None:
        """What an operator reads that is linear by its kind but has no reading; None for all others."""
        ...

    def reach(self, value: Value) -> int:
        """The largest extent, position or distance that an operator without a reading names."""
        ...

    def run(self, value: Value, operands: Mapping[Value, Array]) -> Array:
        """``value`` by the host's own operator, in float64, from what it reads. May raise anything."""
        ...

    def splice(self, splice: Splice) -> None:
        """Compute ``splice.expr`` in place of ``splice.root`` and drop what nothing reads any more."""
        ...


@dataclass(frozen=True)
class Splice:
    """One replacement: ``root`` shall be computed by ``expr``.

    Attributes:
        members: the operators of the region, in execution order.
        native: expressions that existing values already compute; never to be rebuilt.
        dtype: what new parameters are rounded to.
        counts: applications of each pass.
        error: largest difference between region and replacement in float64, relative (None: unchecked).
    """

    root: Value
    members: tuple[Value, ...]
    expr: Expr
    native: dict[Expr, Value]
    dtype: np.dtype
    counts: Counter[str]
    parameters: tuple[str, ...]
    before: str
    after: str
    error: float | None


@dataclass(frozen=True)
class Kept:
    """A linear structure that stays, and why."""

    where: str
    name: str
    reason: str


@dataclass
class Plan:
    """What shall be done to a graph; nothing has been changed yet."""

    splices: list[Splice] = field(default_factory=list)
    kept: list[Kept] = field(default_factory=list)


def make_plan(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Plan:
    """Lift every region of ``graph``, simplify it, and decide which results pay.

    Raises:
        VerificationError: a replacement differs from its region in float64; names the region.
    """
    plan = Plan()
    readings: dict[Value, Reading] = {}
    for value in graph.values():
        reading = graph.read(value)
        if isinstance(reading, Reading):
            readings[value] = reading
        elif isinstance(reading, Declined):
            plan.kept.append(Kept(graph.name(value), "lift", reading.reason))
    results = _decide(graph, readings, passes, verify, progress)
    if any(p.name == UNLISTED for p in passes):
        for splice in _unlisted(graph, readings, results):
            results = {root: r for root, r in results.items() if root not in splice.members}
            results[splice.root] = Decision(splice.expr, splice, [], splice.members)
    order = {value: place for place, value in enumerate(graph.values())}
    if any(p.name == DUPLICATES for p in passes):
        results.update(_duplicates(graph, dict(sorted(results.items(), key=lambda item: order[item[0]]))))
    for root, result in sorted(results.items(), key=lambda item: order[item[0]]):
        if result.splice is not None:
            plan.splices.append(result.splice)
        plan.kept.extend(Kept(graph.name(root), r.name, r.reason) for r in result.refusals)
        if not result.refusals and (reason := _why_left(graph, root, result.expr, readings)):
            plan.kept.append(Kept(graph.name(root), LEFT, reason))
    return plan


LEFT = "region"
"""Stands for the name of a pass where a region ends for a reason that no pass gives."""


def _why_left(graph: Graph, root: Value, expr: Expr, readings: Container[Value]) -> str | None:
    """Why the linear operators of a region in its final form stay; None for one convolution between non-linear ones."""
    readers = graph.readers(root)
    if len(readers) > 1 and any(r in readings for r in readers):
        other = next((r for r in readers[1:] if r != readers[0]), readers[0])
        return f"second consumer at {'the output of the model' if other is None else graph.name(other)}"
    kinds = [e for e in walk(expr) if not isinstance(e, Source | Layout | Select | Concat)]
    if kinds and not any(isinstance(e, Conv) for e in kinds):
        return "no convolution or linear layer stands beside it"
    return "its parts start from different values, or act on different axes" if len(kinds) > 1 else None


@dataclass(frozen=True)
class Decision:
    """What becomes of one region: its final form, the splice that makes it so, and what was declined."""

    expr: Expr
    splice: Splice | None
    refusals: Sequence[Refusal]
    members: tuple[Value, ...]


def _decide(
    graph: Graph,
    readings: dict[Value, Reading],
    passes: Sequence[Pass],
    verify: bool,
    progress: Callable[[int, int], None],
) -> dict[Value, Decision]:
    """What becomes of every region.

    Shared members that some region still reads, or that several repeat, are operands in a second try.
    """
    results: dict[tuple[Value, tuple[Value, ...]], Decision] = {}
    stuck: set[Value] = set()
    while True:
        regions = find_regions(graph, readings, stuck)
        for done, (root, members) in enumerate(regions.items()):
            if (root, members) not in results:
                results[root, members] = _consider(graph, root, members, readings, passes, verify)
                progress(done + 1, len(regions))
        times = Counter(v for members in regions.values() for v in members)
        reads, repeats = set[Value](), Counter[Value]()
        for root, members in regions.items():
            splice = results[root, members].splice
            if splice is None:
                reads.update(members)
                continue
            new = list(walk(splice.expr, stop=splice.native.__contains__))
            reads.update(splice.native[e] for e in new if e in splice.native)
            repeats.update(e.token for e in new if isinstance(e, Layout | Conv) and e not in splice.native)
        still = {v for v, n in times.items() if n > 1 and (v in reads or repeats[v] > 1)}
        if not still:
            return {root: results[root, members] for root, members in regions.items()}
        stuck |= still


MOST_SHARED = 8
"""Regions that one value may be a member of."""


def find_regions(
    graph: Graph, readings: dict[Value, Reading], apart: Container[Value] = ()
) -> dict[Value, tuple[Value, ...]]:
    """The members of each region by its root, both in execution order; values in ``apart`` are shared by none."""
    folds_down: dict[Value, bool] = {}  # behind a linear operator that nothing else reads: it goes there
    for value, reading in readings.items():
        x = reading.operands[0]
        only = x in readings and len(graph.readers(x)) == 1
        folds_down[value] = only and (not readings[x].commutes or folds_down[x])
    roots_of: dict[Value, tuple[Value, ...]] = {}
    members: dict[Value, list[Value]] = {}
    for value in reversed(list(readings)):
        readers = graph.readers(value)
        known = all(reader is not None and reader in roots_of for reader in readers)
        roots = tuple(dict.fromkeys(root for reader in readers for root in roots_of.get(reader, ())))
        alone = len(readers) == 1 and len(roots) == 1
        free = readings[value].commutes and value not in apart and not (readings[value].scales and folds_down[value])
        shared = free and 0 < len(roots) <= MOST_SHARED
        roots_of[value] = roots = roots if known and (alone or shared) else (value,)
        for root in roots:
            members.setdefault(root, []).append(value)
    return {root: tuple(reversed(members[root])) for root in readings if root in members}


def _consider(
    graph: Graph,
    root: Value,
    members: tuple[Value, ...],
    readings: dict[Value, Reading],
    passes: Sequence[Pass],
    verify: bool,
) -> Decision:
    exprs = _lifted(graph, members, readings)
    inside = set(members)
    sources = [v for v in exprs if v not in inside]
    before = flatten(exprs[root])
    with np.errstate(all="ignore"):  # whatever is not finite is refused below
        outcome = simplify(before, passes)
    if not outcome.steps:
        return Decision(before, None, outcome.refusals, members)
    after = outcome.expr
    if isclose(cost(after), cost(before), rel_tol=1e-12):
        return Decision(before, None, outcome.refusals, members)  # another way to say the same
    native = {e: v for v, e in exprs.items() if v != root}
    native.update((exprs[v], v) for v in sources)  # not what passes them on
    refuse = _obstacle(graph, root, members, sources, before, after, native)
    error = None
    if refuse is None and verify:
        try:
            error = compare_expressions(before, after)
        except ValueError as unsampled:
            refuse = f"it cannot be verified: {unsampled}"
    if refuse is not None:
        return Decision(before, None, [*outcome.refusals, Refusal(outcome.steps[-1].name, before, refuse)], members)
    if error is not None and not error <= REGION_TOLERANCE:
        steps = ", ".join(dict.fromkeys(s.name for s in outcome.steps))
        raise VerificationError(
            f"region {graph.name(root)!r}: the rewritten form differs from the original by {error:.2g} (relative, in "
            f"float64) after {steps}; nothing was changed. Leave the pass out (--skip) and report this as a bug",
            where=graph.name(root),
        )
    dtype = graph.dtype(members)
    assert dtype is not None
    counts = Counter(step.name for step in outcome.steps)
    parameters = tuple(dict.fromkeys(p for v in members for p in readings[v].parameters))
    splice = Splice(root, members, after, native, dtype, counts, parameters, show(before), show(after), error)
    return Decision(after, splice, outcome.refusals, members)


DUPLICATES = "duplicate-removal"


def _duplicates(graph: Graph, decisions: dict[Value, Decision]) -> Iterator[tuple[Value, Decision]]:
    """Regions that compute what an earlier one computes from the same values: they take its result."""
    alike: dict[str, list[Value]] = {}
    for root, decision in decisions.items():
        nodes = list(walk(decision.expr))
        values = [root, *(e.key for e in nodes if isinstance(e, Source))]
        if any(isinstance(e, Conv) for e in nodes) and not any(graph.is_written(v) for v in values):
            alike.setdefault(show(decision.expr), []).append(root)
    for roots in alike.values():
        firsts: list[Value] = []
        for root in roots:
            old = decisions[root]
            first = next((f for f in firsts if _equal(decisions[f].expr, old.expr)), None)
            dtype = None if first is None else graph.dtype([root, first])
            if dtype is None:
                firsts.append(root)
                continue
            same = Source(first)
            text, count = show(old.expr), Counter({DUPLICATES: 1})
            splice = Splice(root, old.members, same, {same: first}, dtype, count, (), text, show(same), 0.0)
            yield root, Decision(same, splice, [], old.members)


def _equal(a: Expr, b: Expr) -> bool:
    """Whether two expressions of one text hold the same numbers, over the same values."""
    for x, y in zip(walk(a), walk(b), strict=True):
        for name, mine in vars(x).items():
            other = getattr(y, name)
            if name in ("x", "terms", "token"):
                continue
            if not (np.array_equal(mine, other) if isinstance(mine, np.ndarray) else mine == other):
                return False
    return True


UNLISTED = "impulse-response"


def _unlisted(graph: Graph, readings: dict[Value, Reading], decisions: dict[Value, Decision]) -> Iterator[Splice]:
    """Trees of linear operators on one operand that the rules left in pieces, as the one kernel that they are."""
    wide: dict[Value, Reading] = {}
    for value in graph.values():
        operands = readings[value].operands if value in readings else graph.moves(value)
        if operands is not None:
            wide[value] = readings.get(value, Reading(operands, lambda _: Sum(())))
    for members in find_regions(graph, wide, apart=wide).values():
        for tree in _trees_on_one_operand(members, wide):
            left = [decisions[v] for v in tree if v in decisions]
            unread = [v for v in tree if v not in readings]
            if (unread and len(tree) > 1) or any(r.at_border for d in left for r in d.refusals):
                splice = _as_kernel(graph, tree, wide, readings, left, len(unread))
                if splice is not None:
                    yield splice


def _trees_on_one_operand(members: Sequence[Value], readings: dict[Value, Reading]) -> Iterator[tuple[Value, ...]]:
    """The largest trees inside a region that read one value only; members in execution order, the root last."""
    inside = set(members)
    operand: dict[Value, Value | None] = {}  # None: several
    parent: dict[Value, Value] = {}
    for value in members:
        read = {operand[v] if v in inside else v for v in readings[value].operands}
        operand[value] = read.pop() if len(read) == 1 else None
        parent.update((v, value) for v in readings[value].operands if v in inside)
    for root in members:
        above = parent.get(root)
        if operand[root] is not None and (above is None or operand[above] is None):
            found, stack = {root}, [root]
            while stack:
                inner = [v for v in readings[stack.pop()].operands if v in inside and v not in found]
                found.update(inner)
                stack += inner
            yield tuple(v for v in members if v in found)


def _as_kernel(
    graph: Graph,
    tree: tuple[Value, ...],
    wide: dict[Value, Reading],
    readings: dict[Value, Reading],
    left: Sequence[Decision],
    unread: int,
) -> Splice | None:
    root, (operand,) = tree[-1], {v for t in tree for v in wide[t].operands} - set(tree)
    source, dtype = graph.source(operand), graph.dtype([*tree, operand])
    if dtype is None or source.shape is None or len(source.shape) < 3 or (channels := source.shape[1].known) is None:
        return None
    extents = [d.known for d in source.shape[2:]]
    before = sum(cost(d.expr) for d in left) + unread * moving(channels)
    if unread:
        batch, reach = source.shape[0].known, _reach(graph, tree, wide, readings)
        function = _function(graph, tree, operand, wide, readings)
        found = find_kernel(function, source, batch, channels, extents, reach, dtype)
    else:
        whole = _lifted(graph, tree, readings)[root]
        if sum(not isinstance(e, Source) for e in walk(whole)) < 2 or any(isinstance(e, Layout) for e in walk(whole)):
            return None
        (source,) = (e for e in walk(whole) if isinstance(e, Source))
        function = lambda x: evaluate(whole, {source: x})[0]  # noqa: E731
        reach = _reach(graph, tree, wide, readings)
        found = find_kernel(function, source, 1, channels, [None] * len(extents), reach, dtype)
    if isinstance(found, Declined):
        return None
    conv, error = found
    if not cost(conv) < before or conv.skips_border or any(rounding_obstacle(a, dtype) for a in arrays(conv)):
        return None
    if graph.is_written(root) or graph.obstacle(root, tree, [operand]) is not None:
        return None
    parameters = tuple(dict.fromkeys(p for v in tree if v in readings for p in readings[v].parameters))
    text = "\n".join(graph.name(v) for v in tree)
    native = {conv.x: operand}
    return Splice(root, tree, conv, native, dtype, Counter({UNLISTED: 1}), parameters, text, show(conv), error)


def _function(
    graph: Graph, tree: Sequence[Value], operand: Value, wide: dict[Value, Reading], readings: Container[Value]
) -> Callable[[Array], Array]:
    """A tree as a function of its operand: what has a reading by `evaluate`, the rest by the host's operators."""
    sources = {v: graph.source(v) for value in tree for v in wide[value].operands}
    exprs = {v: wide[v].build([sources[o] for o in wide[v].operands]) for v in tree if v in readings}

    def run(x: Array) -> Array:
        values = {operand: x}
        for value in tree:
            operands = {v: values[v] for v in wide[value].operands}
            if value in exprs:
                values[value], _ = evaluate(exprs[value], {sources[v]: y for v, y in operands.items()})
            else:
                values[value] = graph.run(value, operands)
        return values[tree[-1]]

    return run


def _reach(graph: Graph, tree: Sequence[Value], wide: dict[Value, Reading], readings: Container[Value]) -> int:
    """A bound for how far the operators of a tree reach together, and for the positions that they name."""
    found: dict[Value, tuple[int, int]] = {}  # reach and stride, both in positions of the operand of the tree
    for value in tree:
        below = [found.get(v, (0, 1)) for v in wide[value].operands]
        reach, stride = max(r for r, _ in below), max(s for _, s in below)
        if value not in readings:
            found[value] = reach + stride * graph.reach(value), stride
            continue
        own, step = 0, 1
        for e in walk(wide[value].build([Source(v) for v in wide[value].operands])):
            if isinstance(e, Conv):
                own += max((abs(n) for ends in (e.offset, e.reach) for n in ends), default=0)
                step *= max(e.stride, default=1)
        found[value] = reach + stride * own, stride * step
    return found[tree[-1]][0]


def _lifted(graph: Graph, members: Sequence[Value], readings: dict[Value, Reading]) -> dict[Value, Expr]:
    """The expressions of ``members``, and of their operands as sources."""
    exprs: dict[Value, Expr] = {}
    for value in members:
        for operand in readings[value].operands:
            if operand not in exprs:
                exprs[operand] = graph.source(operand)
        exprs[value] = readings[value].build([exprs[v] for v in readings[value].operands])
    return exprs


def _obstacle(
    graph: Graph,
    root: Value,
    members: Sequence[Value],
    sources: Sequence[Value],
    before: Expr,
    after: Expr,
    native: dict[Expr, Value],
) -> str | None:
    if not all(np.isfinite(a).all() for e in walk(before) for a in arrays(e)):
        return "a parameter is NaN or infinite"
    if not cost(after) < cost(before):
        return "the rewritten form would cost more than it saves"
    dtype = graph.dtype(members)
    if dtype is None:
        return "its values have different dtypes, or an unknown one"
    for e in walk(after, stop=native.__contains__):
        if e not in native and isinstance(e, Conv) and e.token is None and e.skips_border:
            return "the rewritten form would have to leave out values at the border"
        if e not in native and any(reason := [r for a in arrays(e) if (r := rounding_obstacle(a, dtype))]):
            return reason[0]
    return graph.obstacle(root, members, sources)


def rounding_obstacle(array: Array, dtype: np.dtype) -> str | None:
    """Why ``array`` (float64) must not be stored as ``dtype``; None when it may.

    A value beyond the largest number of the type would become infinite; a row whose every value is
    below the smallest normal number would lose its digits. A vector counts as one row.
    """
    info = ml_dtypes.finfo(dtype)
    if not np.isfinite(array).all():
        return "a folded parameter is NaN or infinite (a variance of zero without epsilon, or a negative one)"
    if np.abs(array).max(initial=0.0) > float(info.max):
        return f"a folded parameter exceeds the range of {dtype}"
    rows = np.abs(array).reshape(array.shape[0] if array.ndim > 1 else 1, -1).max(axis=1, initial=0.0)
    if np.any((rows > 0) & (rows < float(info.smallest_normal))):
        return f"a folded parameter falls below the range of {dtype}"
    return None


def layout_reading(
    x: Value, op: Permute | Reshape | Mean, frame: int | None, token: Value
) -> Reading | Declined | None:
    """The reading of a layout operator over ``x``, when its channel axis is known (from the frame) and stays whole.

    ``token`` is what `Layout` keeps for the host graph.
    """
    match op:
        case Permute():
            rank = rank_out = len(op.axes)
        case Reshape():
            rank, rank_out = len(op.before), len(op.after)
        case Mean():
            rank, rank_out = op.rank, op.rank - (0 if op.keep else len(op.axes))
    if frame is None or frame >= rank:
        return None
    axis = rank - 1 - frame
    match op:
        case Permute():
            at = op.axes.index(axis)
        case Reshape():
            at = axis_through_reshape(op.before, op.after, axis)
        case Mean():
            at = None if axis in op.axes else axis - (0 if op.keep else sum(a < axis for a in op.axes))
    if at is None:
        return Declined(
            "it averages over the channels" if isinstance(op, Mean) else "it splits or merges the channel axis"
        )
    moved = rank_out - 1 - at
    return Reading((x,), lambda operands: Layout(operands[0], op, frame, moved, token), (), moved, commutes=True)


def new_nodes(splice: Splice) -> Iterator[Expr]:
    """The nodes of the replacement that have to be emitted, operands first."""
    return (e for e in walk(splice.expr, stop=splice.native.__contains__) if e not in splice.native)

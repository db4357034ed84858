"""Lift, decide, splice: from a host graph to expressions and back.

A **region** is a maximal tree of linear operators: every member but the root has exactly one reader,
and that is a member too. So all members can die when the root is replaced, and no rewrite can make
work double by absorbing a value that is needed elsewhere as well.

There is one exception. What scales or moves each channel by itself (a BatchNorm in front of q, k and v) is
a member of every region that reads it, if all its readers are linear; it must then disappear from all of
them, or else it is made an operand of all of them. Finding regions is one sweep from the outputs to the inputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import ml_dtypes
import numpy as np

from reparamc.cost import cost
from reparamc.errors import VerificationError
from reparamc.expr import Array, Expr, Layout, Permute, Reshape, Source, arrays, flatten, walk
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
    """

    operands: tuple[Value, ...]
    build: Callable[[Sequence[Expr]], Expr]
    parameters: tuple[str, ...] = ()
    frame: int | None = None
    commutes: bool = False


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
    for root, result in results.items():
        if isinstance(result, Splice):
            plan.splices.append(result)
        else:
            plan.kept.extend(Kept(graph.name(root), r.name, r.reason) for r in result)
    return plan


def _decide(
    graph: Graph,
    readings: dict[Value, Reading],
    passes: Sequence[Pass],
    verify: bool,
    progress: Callable[[int, int], None],
) -> dict[Value, Splice | list[Refusal]]:
    """What becomes of every region. Shared members that some region cannot get rid of are operands in a second try."""
    results: dict[tuple[Value, tuple[Value, ...]], Splice | list[Refusal]] = {}
    stuck: set[Value] = set()
    while True:
        regions = find_regions(graph, readings, stuck)
        for done, (root, members) in enumerate(regions.items()):
            if (root, members) not in results:
                results[root, members] = _consider(graph, root, members, readings, passes, verify)
                progress(done + 1, len(regions))
        times = Counter(v for members in regions.values() for v in members)
        still = {
            value
            for root, members in regions.items()
            for value in members
            if times[value] > 1 and not _is_rid_of(value, results[root, members])
        }
        if not still:
            return {root: results[root, members] for root, members in regions.items()}
        stuck |= still


def _is_rid_of(value: Value, result: Splice | list[Refusal]) -> bool:
    if not isinstance(result, Splice):
        return False
    return all(result.native.get(e) != value for e in walk(result.expr, stop=result.native.__contains__))


MOST_SHARED = 8
"""Regions that one value may be a member of."""


def find_regions(
    graph: Graph, readings: dict[Value, Reading], apart: Container[Value] = ()
) -> dict[Value, tuple[Value, ...]]:
    """The members of each region by its root, both in execution order; values in ``apart`` are shared by none."""
    roots_of: dict[Value, tuple[Value, ...]] = {}
    members: dict[Value, list[Value]] = {}
    for value in reversed(list(readings)):
        readers = graph.readers(value)
        known = all(reader is not None and reader in roots_of for reader in readers)
        roots = tuple(dict.fromkeys(root for reader in readers for root in roots_of.get(reader, ())))
        alone = len(readers) == 1 and len(roots) == 1
        shared = readings[value].commutes and value not in apart and 0 < len(roots) <= MOST_SHARED
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
) -> Splice | list[Refusal]:
    exprs: dict[Value, Expr] = {}
    sources: dict[Value, Source] = {}

    def operand(value: Value) -> Expr:
        if value in exprs:
            return exprs[value]
        return sources.setdefault(value, graph.source(value))

    for value in members:
        exprs[value] = readings[value].build([operand(v) for v in readings[value].operands])
    before = flatten(exprs[root])
    with np.errstate(all="ignore"):  # whatever is not finite is refused below
        outcome = simplify(before, passes)
    if not outcome.steps:
        return list(outcome.refusals)
    after = outcome.expr
    native = {e: v for v, e in exprs.items() if v != root}
    native.update({s: v for v, s in sources.items()})
    refuse = _obstacle(graph, root, members, list(sources), before, after, native)
    error = None
    if refuse is None and verify:
        try:
            error = compare_expressions(before, after)
        except ValueError as unsampled:
            refuse = f"it cannot be verified: {unsampled}"
    if refuse is not None:
        return [*outcome.refusals, Refusal(outcome.steps[-1].name, before, refuse)]
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
    return Splice(root, members, after, native, dtype, counts, parameters, show(before), show(after), error)


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


def layout_reading(x: Value, op: Permute | Reshape, frame: int | None, token: Value) -> Reading | Declined | None:
    """The reading of a layout operator over ``x``, when its channel axis is known (from the frame) and stays whole.

    ``token`` is what `Layout` keeps for the host graph.
    """
    rank, rank_out = (len(op.axes),) * 2 if isinstance(op, Permute) else (len(op.before), len(op.after))
    if frame is None or frame >= rank:
        return None
    axis = rank - 1 - frame
    at = op.axes.index(axis) if isinstance(op, Permute) else axis_through_reshape(op.before, op.after, axis)
    if at is None:
        return Declined("it splits or merges the channel axis")
    moved = rank_out - 1 - at
    return Reading((x,), lambda operands: Layout(operands[0], op, frame, moved, token), (), moved, commutes=True)


def new_nodes(splice: Splice) -> Iterator[Expr]:
    """The nodes of the replacement that have to be emitted, operands first."""
    return (e for e in walk(splice.expr, stop=splice.native.__contains__) if e not in splice.native)

"""The plan for a whole graph: lift every region, simplify it, decide, and say why the rest stays."""

from __future__ import annotations

from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field

from reparamc.duplicates import DUPLICATES, find_duplicates
from reparamc.expr import Concat, Conv, Expr, Layout, Select, Source, walk
from reparamc.graph import Graph, Reading, Splice, Value
from reparamc.region import Decision, decide
from reparamc.rewrite import Declined, Pass
from reparamc.unlisted import UNLISTED, find_kernels


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
    results = decide(graph, readings, passes, verify, progress)
    if any(p.name == UNLISTED for p in passes):
        for splice in find_kernels(graph, readings, results):
            results = {root: r for root, r in results.items() if root not in splice.members}
            results[splice.root] = Decision(splice.expr, splice, [], splice.members)
    order = {value: place for place, value in enumerate(graph.values())}
    if any(p.name == DUPLICATES for p in passes):
        results.update(find_duplicates(graph, dict(sorted(results.items(), key=lambda item: order[item[0]]))))
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

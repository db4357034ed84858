"""The plan for a whole graph: lift every region, simplify it, decide, and say why the rest stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Sequence
from dataclasses import dataclass, field, replace

from reparamc.algebra.arrays import is_all
from reparamc.algebra.cost import is_multiplied, is_shifted
from reparamc.algebra.equal import REGION_TOLERANCE
from reparamc.algebra.expr import Concat, Conv, Expr, Layout, Scale, Select, Source, is_negation, walk
from reparamc.algebra.rewrite import Declined, Pass
from reparamc.compiler.decide import Decision, decide
from reparamc.compiler.duplicates import DUPLICATES, find_duplicates
from reparamc.compiler.graph import Fold, Graph, Splice
from reparamc.compiler.impulse import IMPULSE, find_kernels
from reparamc.compiler.readings import Reading, Value
from reparamc.compiler.reference import Host
from reparamc.compiler.regions import LIFT, lifted
from reparamc.compiler.split_scales import PIECES, fold_pieces
from reparamc.report.data import FailedRegion, HostCheck, Refusal


@dataclass
class Plan:
    """What is to be done to a graph; nothing has been changed yet."""

    graph: Graph
    folds: list[Fold] = field(default_factory=list)
    splices: list[Splice] = field(default_factory=list)
    kept: list[Refusal] = field(default_factory=list)
    failed: list[FailedRegion] = field(default_factory=list)
    host: HostCheck | None = None


def make_plan(
    graph: Graph,
    passes: Sequence[Pass],
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Plan:
    """Lift every region of ``graph``, simplify it, and decide which results pay.

    A region whose replacement fails its check stays, and is among those that `Plan.failed` names.
    """
    plan = Plan(graph)
    if any(p.name == "constant-folding" for p in passes):
        graph, folds = graph.folded()
        plan = Plan(graph, [replace(f, counts=Counter({"constant-folding": 1})) for f in folds])
    readings: dict[Value, Reading] = {}
    for value in graph.values():
        reading = graph.read(value)
        if isinstance(reading, Reading):
            readings[value] = reading
        elif isinstance(reading, Declined):
            plan.kept.append(Refusal(graph.name(value), LIFT, reading.reason))
    host = Host(graph, readings) if verify else None
    results = decide(graph, readings, passes, host, progress)
    failed = {root: r for root, r in results.items() if r.failed}
    results = {root: r for root, r in results.items() if not r.failed}
    if any(p.name == IMPULSE for p in passes):
        wrong = {v for r in failed.values() for v in r.members}
        for splice in find_kernels(graph, readings, results):
            if wrong.isdisjoint(splice.members) and _are_read_right(host, splice, splice.members, readings):
                results = {root: r for root, r in results.items() if root not in splice.members}
                results[splice.root] = Decision(splice.expr, splice, [], splice.members)
    if any(p.name == PIECES for p in passes):
        results = fold_pieces(graph, readings, results, passes, host)
    order = {value: place for place, value in enumerate(graph.values())}
    if any(p.name == DUPLICATES for p in passes):
        for root, found in find_duplicates(graph, dict(sorted(results.items(), key=lambda item: order[item[0]]))):
            assert found.splice is not None
            first = next(iter(found.splice.native.values()))
            both = (*results[first].members, *found.members)
            if _are_read_right(host, found.splice, both, readings):
                results[root] = found
    results.update(failed)
    if host is not None:
        plan.failed, plan.host = list(host.failures.values()), HostCheck(len(host.errors), host.unable)
    for root, result in sorted(results.items(), key=lambda item: order[item[0]]):
        if result.splice is not None:
            plan.splices.append(result.splice)
        plan.kept.extend(Refusal(graph.name(root), r.name, r.reason) for r in result.refusals)
        if not result.refusals and (reason := _why_left(graph, root, result.expr, readings)):
            plan.kept.append(Refusal(graph.name(root), LEFT, reason))
    return plan


def _are_read_right(
    host: Host | None, splice: Splice, members: Sequence[Value], readings: dict[Value, Reading]
) -> bool:
    """Whether the host agrees with the reading of each of ``members``; a splice on a wrong one has failed."""
    if host is None:
        return True
    graph = host.graph
    errors = [host.error([v], lifted(graph, [v], readings, {})[v]) for v in members if v in readings]
    wrong = [e for e in errors if e is not None and not e <= REGION_TOLERANCE]
    if wrong:
        host.fail(splice.root, "reading", wrong[0], tuple(splice.counts), splice.before, splice.after)
    return not wrong


LEFT = "region"
"""Stands for the name of a pass where a region ends for a reason that no pass gives."""


def _why_left(graph: Graph, root: Value, expr: Expr, readings: Container[Value]) -> str | None:
    """Why the linear operators of a region in its final form stay; None for one convolution between non-linear ones."""
    readers = graph.readers(root)
    if len(readers) > 1 and any(r in readings for r in readers):
        nonlinear = [r for r in readers if r not in readings]  # these are in the way of the linear ones
        other = (nonlinear or [r for r in readers[1:] if r != readers[0]] or readers)[0]
        return f"second consumer at {'the output of the model' if other is None else graph.name(other)}"
    kinds = [e for e in walk(expr) if not isinstance(e, Source | Layout | Select | Concat) and not _is_bias(e)]
    if len(kinds) > 1 and any(isinstance(e, Conv) and is_all(e.weight, 0) for e in kinds):
        return "its weights are all zero, and the extents of its constant result follow those of its operand"
    if kinds and not any(isinstance(e, Conv) for e in kinds):
        return "no convolution or linear layer stands beside it"
    return "its parts start from different values, or act on different axes" if len(kinds) > 1 else None


def _is_bias(e: Expr) -> bool:
    """Whether ``e`` adds the bias of a linear layer, which ONNX writes as a product and a sum."""
    return isinstance(e, Scale) and not (is_multiplied(e) or is_shifted(e) or is_negation(e))

"""The plan for a whole graph: the passes one after the other, and why the rest stays."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Hashable, Sequence
from dataclasses import dataclass, field

from reparamc.algebra.arrays import as_stored, is_all
from reparamc.algebra.cost import LATENCY, Objective, is_multiplied, is_shifted
from reparamc.algebra.expr import Concat, Conv, Expr, Layout, Scale, Select, Source, is_negation, walk
from reparamc.algebra.records import entity, lazy, replace
from reparamc.algebra.rewrite import Declined, Pass
from reparamc.compiler.consider import Decision, Setting
from reparamc.compiler.decide import decide
from reparamc.compiler.graph import Fold, Graph, Splice
from reparamc.compiler.readings import Reading, Value, is_norm
from reparamc.compiler.regions import LIFT, lifted
from reparamc.compiler.storage import STORED_TWICE, unpaid
from reparamc.report.data import FailedRegion, HostCheck, Refusal


@dataclass
class Plan:
    """What is to be done to a graph; nothing has been changed yet."""

    graph: Graph
    folds: list[Fold] = field(default_factory=list[Fold])
    splices: list[Splice] = field(default_factory=list[Splice])
    kept: list[Refusal] = field(default_factory=list[Refusal])
    failed: list[FailedRegion] = field(default_factory=list[FailedRegion])
    host: HostCheck | None = None


@entity
class FirstPass(Pass):
    """A pass that comes before all others, with a plan of its own.

    Attributes:
        first: the plan for a graph, or None where nothing is to be done; given the name of the pass, and whether
            replacements are verified.
    """

    first: Callable[[Graph, str, bool], Plan | None] = field(kw_only=True)


@entity
class GraphPass(Pass):
    """A pass that is not a matter of one expression: ``run`` changes a `Compilation`, given the name of the pass."""

    run: Callable[[Compilation, str], None] = field(kw_only=True)


@entity
class FoldingPass(Pass):
    """The pass that has operators over constants computed once, before anything is read; see `folded`."""


class Compilation:
    """A graph on its way through the passes; a `GraphPass` changes it.

    The first that asks for `decisions` has the operators read and the rules applied.
    """

    def __init__(
        self,
        graph: Graph,
        passes: Sequence[Pass],
        objective: Objective,
        *,
        verify: bool,
        progress: Callable[[int, int], None],
        told: dict[Hashable, float],
        described: bool,
    ) -> None:
        self.graph, self.passes = graph, passes
        self.objective = replace(objective, stores_ones=graph.stores_ones)
        self.kept: list[Refusal] = []
        self.failed: dict[Value, Decision] = {}
        self._verify, self._progress, self._told, self._described = verify, progress, told, described

    @lazy
    def setting(self) -> Setting:
        """The graph with the readings of its operators."""
        readings: dict[Value, Reading] = {}
        for value in self.graph.values():
            reading = self.graph.read(value)
            if isinstance(reading, Reading):
                readings[value] = reading
            elif isinstance(reading, Declined):
                self.kept.append(Refusal(self.graph.name(value), LIFT, reading.reason))
        reference = None
        if self._verify:
            from reparamc.compiler.reference import Reference

            reference = Reference(self.graph, readings, self._told)
        return Setting(self.graph, readings, self.passes, self.objective, reference, self._described)

    @lazy
    def decisions(self) -> dict[Value, Decision]:
        """What becomes of each region by its root, but for those in `failed`, whose replacement is wrong."""
        found = decide(self.setting, self._progress)
        self.failed = {root: d for root, d in found.items() if d.failed}
        return {root: d for root, d in found.items() if not d.failed}

    @lazy
    def _places(self) -> dict[Value, int]:
        return {value: place for place, value in enumerate(self.graph.values())}

    def place(self, value: Value) -> int:
        """Where ``value`` is in the order of execution."""
        return self._places[value]

    def is_read_right(self, splice: Splice, members: Sequence[Value]) -> bool:
        """Whether the framework agrees with the reading of each of ``members``; a splice on a wrong one has failed."""
        reference, readings = self.setting.reference, self.setting.readings
        if reference is None:
            return True
        errors = [reference.is_wrong([v], lifted(self.graph, [v], readings, {})[v]) for v in members if v in readings]
        if wrong := [e for e in errors if e is not None]:
            reference.fail(splice.root, "reading", wrong[0], tuple(splice.counts), splice.before, splice.after)
        return not wrong

    def plan(self, folds: Sequence[Fold] = ()) -> Plan:
        """What is to be done, ``folds`` among it, and why the rest stays."""
        decisions = {**self.decisions, **self.failed}
        plan = Plan(self.graph, [*folds], kept=[*self.kept])
        if (reference := self.setting.reference) is not None:
            plan.failed = list(reference.failures.values())
            plan.host = HostCheck(len(reference.errors), reference.unable)
        stored = unpaid(self.setting, [d.splice for d in decisions.values() if d.splice is not None])
        for root in sorted(decisions, key=self.place):
            decision = decisions[root]
            if decision.splice is not None and decision.splice.unit in stored:
                kept = Refusal(self.graph.name(root), [*decision.splice.counts][-1], STORED_TWICE)
                plan.kept.append(kept)
                continue
            if decision.splice is not None:
                plan.splices.append(decision.splice)
            plan.kept.extend(Refusal(self.graph.name(root), r.by, r.reason) for r in decision.refusals)
            reason = _why_left(self.graph, root, decision.expr, self.setting.readings, self.objective)
            if not decision.refusals and reason is not None:
                plan.kept.append(Refusal(self.graph.name(root), LEFT, reason))
        return plan


def make_plan(
    graph: Graph,
    passes: Sequence[Pass],
    objective: Objective = LATENCY,
    folds: Sequence[Fold] = (),
    *,
    verify: bool = True,
    progress: Callable[[int, int], None] = lambda done, of: None,
    told: dict[Hashable, float] | None = None,
    described: bool = True,
) -> Plan:
    """What ``passes`` make of ``graph``, in which ``folds`` are made; for ``told`` see `Reference`, for ``described``
    `Options`.

    A region whose replacement fails its check stays, and is among those that `Plan.failed` names.
    """
    compilation = Compilation(
        graph, passes, objective, verify=verify, progress=progress, told={} if told is None else told,
        described=described,
    )  # fmt: skip
    for p in passes:
        if isinstance(p, GraphPass):
            p.run(compilation, p.name)
    return compilation.plan(folds)


SMALL = 1024
"""Numbers that a constant may take more room by, where room is not what counts."""


def folded(graph: Graph, passes: Sequence[Pass], objective: Objective) -> tuple[Graph, list[Fold]]:
    """What ``graph`` becomes where operators over constants are computed once, if that is among ``passes``."""
    name = next((p.name for p in passes if isinstance(p, FoldingPass)), None)
    if name is None:
        return graph, []
    graph, folds = graph.folded(0 if objective.stores else SMALL)
    return graph, [replace(f, counts=Counter({name: 1})) for f in folds]


LEFT = "region"
"""Takes the place of the name of a pass in a refusal: a region ends for a reason that no pass gives."""


def _why_left(graph: Graph, root: Value, expr: Expr, readings: Container[Value], objective: Objective) -> str | None:
    """Why the linear operators of a region in its final form stay; None for one convolution between non-linear ones."""
    kinds = [e for e in walk(expr) if not isinstance(e, Source | Layout | Select | Concat) and not _stays(e)]
    users = graph.users(root)
    if not kinds and is_norm(expr):
        return _why_norm_stays(graph, users, readings) if objective.stores and users else None
    if len(users) > 1 and any(r in readings for r in users):
        nonlinear = [r for r in users if r not in readings]  # these are in the way of the linear ones
        other = (nonlinear or [r for r in users[1:] if r != users[0]] or users)[0]
        return f"second consumer at {'the output of the model' if other is None else graph.name(other)}"
    if len(kinds) > 1 and any(isinstance(e, Conv) and is_all(as_stored(e.weight), 0) for e in kinds):
        return "its weights are all zero, and the sizes of its constant result follow those of its operand"
    if kinds and not any(isinstance(e, Conv) for e in kinds):
        return "there is no convolution or linear layer beside it"
    return "its parts start from different values, or act on different axes" if len(kinds) > 1 else None


def _why_norm_stays(graph: Graph, users: Sequence[Value | None], readings: Container[Value]) -> str:
    """Why the gain and bias of a normalization, where parameters count, are in no reader."""
    other = next((u for u in users if u not in readings), users[0])
    if other in readings:
        return "not all that reads it can take in its gain and bias, or there would be more to store"
    where = "the output of the model" if other is None else graph.name(other)
    return f"its gain and bias stay: {where} reads it, and is not linear"


def _stays(e: Expr) -> bool:
    """Whether ``e`` is part of another operator: a normalization, or a linear layer that ONNX writes as two."""
    return is_norm(e) or (isinstance(e, Scale) and not (is_multiplied(e) or is_shifted(e) or is_negation(e)))

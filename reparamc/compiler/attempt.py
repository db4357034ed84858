"""A plan carried out, with units of it left out: edits of one `unit` are all made, or none."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TYPE_CHECKING, Generic

import numpy as np

from reparamc.algebra.evaluate import absolute, evaluate
from reparamc.algebra.expr import Array, Expr, Source, release, walk
from reparamc.algebra.infer import channel_axes
from reparamc.compiler.graph import Edit, Graph, Splice
from reparamc.compiler.host import Host, ResultT
from reparamc.compiler.plan import Plan
from reparamc.compiler.readings import Value
from reparamc.report.data import Refusal, Rewrite

if TYPE_CHECKING:  # without verification these are not needed
    from reparamc.equivalence.difference import Outputs
    from reparamc.equivalence.end_to_end import Region


class Attempt(Generic[ResultT]):
    """A plan carried out, but for some units.

    Args:
        again: whether it may be carried out again. If not, the arrays of each splice are forgotten with it, so that
            memory does not hold all of them beside what is made of them; what can be told of a splice stays.

    Attributes:
        without: the units that are left out.
        result: the outcome.
        tensors: what is new in it, of each of ``splices``, and which parameters it is made from.
        errors: the largest error of each splice on samples; None where it was not sampled.
        sampled: the splices that were sampled because they are not proven.
    """

    def __init__(self, host: Host[ResultT], plan: Plan, *, again: bool = True) -> None:
        self.host, self.plan = host, plan
        self.sampled: set[Splice] = set()
        self.without: frozenset[str] = frozenset()
        given = self.edits
        if not again:
            plan.splices[:] = [s.without_arrays() for s in plan.splices]
        self.errors = {s: s.error for s in plan.splices}
        self._carry_out(given)

    def _carry_out(self, edits: list[Edit]) -> None:
        self.result = self._made(edits)
        self.tensors = [dict(s.tensors) for s in self.splices]

    def unit(self, edit: Edit) -> str:
        return self.host.tensor(edit.unit)

    @property
    def edits(self) -> list[Edit]:
        """What is carried out."""
        return self._edits(self.without)

    @property
    def splices(self) -> list[Splice]:
        return [edit for edit in self.edits if isinstance(edit, Splice)]

    def _edits(self, without: Collection[str]) -> list[Edit]:
        return [e for e in (*self.plan.splices, *self.plan.folds) if self.unit(e) not in without]

    def made(self, without: Collection[str]) -> ResultT:
        """The result without some units; a copy of the model where nothing is left to do."""
        return self._made(self._edits(without))

    def _made(self, edits: list[Edit]) -> ResultT:
        """What comes of ``edits``, which are given away one by one."""
        graph = self.plan.graph if edits else self.host.graph
        edits.reverse()
        return self.host.carry_out(graph, (edits.pop() for _ in range(len(edits))))

    def leave_out(self, units: Collection[str]) -> None:
        """Make the result anew, without ``units`` as well."""
        if not self.without.issuperset(units):
            self.without = self.without.union(units)
            self._carry_out(self.edits)

    def regions(self) -> list[Region]:
        """What was rewritten, for those who compare the two models."""
        from reparamc.equivalence.end_to_end import Region

        tensor = self.host.tensor
        return [
            Region(
                tensor(s.root), (*map(tensor, s.operands),), self.plan.graph.name(s.root), s.before, s.after,
                channel_axes(s.expr)[s.expr], s.original and partial(_read, s.original, s.expr, tensor),
            )
            for s in self.splices
            if not s.narrows  # the values in it have other channels
        ]  # fmt: skip

    def without_objections(self) -> list[Refusal]:
        """Leave out what the framework does better without; what the report says of that."""

        def without(units: Collection[str]) -> ResultT:
            return self.made(self.without.union(units))

        harm = self.host.objections(self.splices, self.result, without)
        harmful = [s for s in self.splices if self.unit(s) in harm]
        self.leave_out(harm)
        return [Refusal(self.plan.graph.name(s.root), [*s.counts][-1], harm[self.unit(s)]) for s in harmful]


def _read(
    original: Expr, replacement: Expr, name: Callable[[Value], str], values: Outputs
) -> tuple[Array, Array, Array]:
    """What ``original`` is in float64, from values by name, and the magnitudes of its terms and the other's."""
    found: list[Array] = []
    for root, signs in ((original, True), (original, False), (replacement, False)):
        given = {e: values[name(e.key)].astype(np.float64) for e in walk(root) if isinstance(e, Source)}
        if not signs:
            root, given = absolute(root), {e: np.abs(x) for e, x in given.items()}
        found.append(evaluate(root, given)[0])
    release(original)
    release(replacement)
    return found[0], found[1], found[2]


def rewritten(graph: Graph, splice: Splice, error: float | None, tensors: Iterable[str]) -> Rewrite:
    """The entry of ``splice``, with its largest error on samples."""
    operators = tuple(graph.name(v) for v in splice.members)
    where, counts = graph.name(splice.root), dict(splice.counts)
    return Rewrite(where, operators, counts, splice.parameters, splice.before, splice.after, error, tuple(tensors))

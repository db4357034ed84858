"""What both emitters do alike: the order of new operators, what is shared, and what sums subtract."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, MutableMapping
from typing import Generic, TypeVar

from reparamc.algebra.expr import Expr, Scale, Sum, is_negation
from reparamc.compiler.graph import Splice, new_nodes

HandleT = TypeVar("HandleT")
"""What a host's value goes by in the graph that is written."""


class Emission(ABC, Generic[HandleT]):
    """The operators of one splice, on their way into a host graph.

    Attributes:
        values: what computes an expression, known or emitted.
        emitted: the same for all splices of one edit, which may share operators.
        emitting: the expression whose operators are made now.
    """

    def __init__(self, splice: Splice, values: dict[Expr, HandleT], emitted: MutableMapping[Expr, HandleT]) -> None:
        self.splice, self.values, self.emitted = splice, values, emitted
        self.emitting = splice.expr
        splice.tensors.clear()

    @abstractmethod
    def _emit(self, e: Expr, top: bool) -> HandleT:
        """Make the operators of ``e`` over the values of its children; ``top``: it is what the splice computes."""

    def computed(self) -> HandleT:
        """What computes the replacement. Negations are left to the sums that subtract, but for the last operator."""
        top = self.splice.expr
        for e in new_nodes(self.splice):
            if e in self.emitted:  # in another region, that shares it
                self.values[e] = self.emitted[e]
            elif e is top or not is_negation(e):
                self.values[e] = self.emitted[e] = self._noted(e, e is top)
        return self.values[top]

    def value(self, e: Expr) -> HandleT:
        """What computes ``e``."""
        if e not in self.values:
            self.values[e] = self._noted(e, False)  # a negation that no sum absorbs
        return self.values[e]

    def addends(self, e: Sum) -> Iterator[tuple[Expr, bool]]:
        """The terms of a sum, and whether each is subtracted. Those come last, and the first term is never one."""
        ordered = sorted(e.terms, key=self._is_subtracted)
        yield ordered[0], False
        for t in ordered[1:]:
            yield (t.x, True) if isinstance(t, Scale) and self._is_subtracted(t) else (t, False)

    def record(self, tensor: str) -> None:
        """Say which parameters a new tensor is made from."""
        self.splice.tensors[tensor] = self.splice.parameters_of(self.emitting)

    def _is_subtracted(self, t: Expr) -> bool:
        return t not in self.values and is_negation(t)

    def _noted(self, e: Expr, top: bool) -> HandleT:
        outer, self.emitting = self.emitting, e
        made = self._emit(e, top)
        self.emitting = outer
        return made

"""What a fusion asks of a framework, and what a user asks of a fusion."""

from __future__ import annotations

from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

import numpy.typing as npt

from reparamc.algebra.records import record
from reparamc.algebra.rewrite import Pass
from reparamc.compiler.graph import Edit, Graph, Splice
from reparamc.compiler.readings import Value
from reparamc.report.data import Counts, OutputError

if TYPE_CHECKING:
    from reparamc.certificate.proof import Certificate
    from reparamc.equivalence.end_to_end import Alone, Region

ResultT = TypeVar("ResultT")

Trial: TypeAlias = "tuple[Alone, Callable[[npt.NDArray[Any]], float]]"
"""What regions give when they are run alone, and the machine epsilon that an array is judged by."""


@record
class Options:
    """What a user asks for.

    Attributes:
        passes: those to apply.
        level: how much to verify: "off", "region" or "full".
        objective: what to minimise.
        progress: called with (regions done, regions in all).
        told: what is known of kinds of regions, in all parts of a model; see `reparamc.compiler.reference.Reference`.
        described: whether the report has the two forms of each region as text, and tells for each new parameter which
            of the region's it is made from, not all of them.
    """

    passes: tuple[Pass, ...]
    level: str = "full"
    objective: str = "latency"
    progress: Callable[[int, int], None] = lambda done, of: None
    told: dict[Hashable, float] | None = None
    described: bool = True


class Host(Protocol[ResultT]):
    """One model in its framework. Nothing here changes the model. Tensors go by the names that certificates use."""

    @property
    def graph(self) -> Graph:
        """The model as a graph."""
        ...

    def carry_out(self, graph: Graph, edits: Iterable[Edit]) -> ResultT:
        """A copy of ``graph`` (`graph`, or what it became when its constants were folded) with ``edits`` in it."""
        ...

    def over(self, result: ResultT) -> Host[ResultT]:
        """The host of a result, which is to be rewritten further."""
        ...

    def size(self, result: ResultT | None) -> Counts:
        """The size of a result; of the model where that is None."""
        ...

    def tensor(self, value: Value) -> str:
        """The name of ``value``."""
        ...

    def shown(self, edit: Edit, result: ResultT) -> Collection[str]:
        """The tensors in both graphs in which it shows whether ``edit`` is right."""
        ...

    def operands(self, tensor: str) -> Sequence[str] | None:
        """What the operator of ``tensor`` reads in the model; None where nothing computes it."""
        ...

    def certify(self, result: ResultT) -> Certificate:
        """What can be proven of ``result``."""
        ...

    def trials(self, result: ResultT, regions: Sequence[Region]) -> Iterator[Trial]:
        """Runs of both sides, in which each of ``regions`` is fed with the values of the model itself.

        There are none without inputs, or where the model does not run on them.
        """
        ...

    def objections(
        self, splices: Sequence[Splice], result: ResultT, without: Callable[[Collection[str]], ResultT]
    ) -> Mapping[str, str]:
        """Units to leave out because the framework does better without them, each with the reason.

        Args:
            without: makes the result without some units.
        """
        ...

    def check(self, result: ResultT) -> None:
        """Raise InputError if the framework does not accept ``result``."""
        ...

    def can_compare(self, changed: bool) -> bool:
        """Whether both models are to be run on the same inputs: there are some, and they may differ."""
        ...

    def compare(self, result: ResultT, regions: Sequence[Region]) -> list[OutputError]:
        """Run both models on the same inputs.

        Raises:
            VerificationError: they differ by more than rounding explains.
        """
        ...

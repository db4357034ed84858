"""What reparamc asks of a host graph, and what it hands back: the protocol that both adapters implement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterator, Mapping, Sequence
from dataclasses import field
from math import inf
from typing import Protocol, TypeAlias

import numpy as np

from reparamc.algebra.expr import Array, Expr, LayoutOp, Source, arrays, walk
from reparamc.algebra.records import entity, record, replace
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.readings import Reading, Value, values_in

Interval: TypeAlias = tuple[float, float]

ALL: Interval = (-inf, inf)


class Graph(Protocol):
    """What reparamc needs of a host graph; values are whatever handles the adapter likes."""

    @property
    def pools_clamp(self) -> bool:
        """Whether a pooling whose window is larger than the map makes one element of it; others refuse it."""
        ...

    @property
    def stores_ones(self) -> bool:
        """Whether a normalization stores a gain where that is one."""
        ...

    def values(self) -> Sequence[Value]:
        """The results of all operators, in execution order."""
        ...

    def read(self, value: Value) -> Reading | Declined | None:
        """The operator of ``value`` as a linear one; Declined with the reason when it nearly is."""
        ...

    def users(self, value: Value) -> Sequence[Value | None]:
        """The values computed from ``value``; None for a user that is not a value (a graph output)."""
        ...

    def holders(self, parameter: str) -> Sequence[Value | None]:
        """What uses a parameter, apart from operators that are read; None for a user that is not a value."""
        ...

    def source(self, value: Value) -> Source:
        """``value``, which may be `Taps`, as an operand, with what is known of its channels and shape."""
        ...

    def name(self, value: Value) -> str:
        """What the user calls ``value``."""
        ...

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        """The floating dtype that all of ``members`` share; None when it is unknown or they differ."""
        ...

    def obstacle(
        self, root: Value, members: Sequence[Value], sources: Sequence[Value], made: Collection[Expr]
    ) -> str | None:
        """Why new operators ``made`` just before ``root`` could not replace ``members``; None when they can."""
        ...

    def is_written(self, value: Value, but: Value | None = None) -> bool:
        """Whether something other than ``but`` writes into the memory of ``value`` after it has been computed."""
        ...

    def moves(self, value: Value) -> tuple[Value, ...] | None:
        """What an operator reads that is linear by its kind but has no reading; None for all others."""
        ...

    def reads(self, value: Value) -> Sequence[Value]:
        """All values that the operator of ``value`` reads."""
        ...

    def separate(self, value: Value) -> Separate | None:
        """The operator of ``value``, which has no reading, as one that treats channels alike and each by itself."""
        ...

    def bounded(self, value: Value) -> Bounded | None:
        """What is known of the results of the operator of ``value``, which has no reading; None if nothing is."""
        ...

    def may_narrow(self, value: Value) -> bool:
        """Whether ``value`` may have fewer channels: nothing asks for their number, and no caller sees it."""
        ...

    def reach(self, value: Value) -> int:
        """The largest size, position or distance that an operator without a reading names."""
        ...

    def run(self, value: Value, operands: Mapping[Value, Array], sizes: Mapping[str, int] = {}) -> Array:
        """``value`` by the host's own operator, in float64, from what it reads. May raise anything.

        ``sizes`` says the sizes of the symbols in shapes, where a size is read from a value that is not given.
        """
        ...

    def kind(self, value: Value) -> Hashable:
        """The operator of ``value`` with its attributes; without weights, and numbers of channels if possible."""
        ...

    def folded(self, small: int) -> tuple[Graph, Sequence[Fold]]:
        """The graph in which operators over constants count as constants where that takes no more room, and these.

        ``small``: numbers that a result may have in any case.
        """
        ...


@record
class Separate:
    """An operator that does the same to every channel, and reads no other one: an activation, a pooling, a resize.

    Attributes:
        operands: what it reads, constants left out; one with a single channel counts for all.
        computes: whether an element depends on those at its own position alone; else it keeps a number that a channel
            has everywhere.
        multiplies: whether it is a product of its operands.
        homogeneous: whether a positive factor of its operand is one of its result.
        moves: what it does to axes.
    """

    operands: tuple[Value, ...]
    computes: bool = True
    multiplies: bool = False
    homogeneous: bool = False
    moves: LayoutOp | None = None


@record
class Bounded:
    """What is known of the results of an operator without a reading.

    Attributes:
        operands: what it reads, constants left out.
        gives: the interval of its results.
        keeps: where it is the identity of its only operand; None if nowhere.
        chooses: whether each result is an element of an operand (a maximum over positions).
        signed: whether no result is negative if no element of its operands is (a product, an average).
    """

    operands: tuple[Value, ...] = ()
    gives: Interval = ALL
    keeps: Interval | None = None
    chooses: bool = False
    signed: bool = False


@entity
class Splice:
    """One replacement: ``root`` is to be computed by ``expr``.

    Attributes:
        members: the operators of the region, in execution order.
        native: expressions that existing values already compute; never to be rebuilt.
        dtype: what new parameters are rounded to.
        counts: applications of each pass.
        parameters: names of those of the region, as in `Reading`.
        before, after: region and replacement as text, for the report.
        error: largest difference between region and replacement in float64, relative (None: unchecked).
        shared: the value that this and other splices compute anew together: all are made, or none, because one
            alone would not pay.
        original: the region as an expression; None if it has none.
        origins: which of ``parameters`` an array of ``expr`` is made from, by its id; of any other, all.
        tensors: what the host made of ``expr`` when it was last carried out: new tensors, by name, and the parameters
            that each is made from.
        narrows: the values that have fewer channels afterwards, because of this and the splices of the same unit.
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
    shared: Value | None = None
    original: Expr | None = None
    origins: Mapping[int, frozenset[str]] = field(default_factory=dict[int, frozenset[str]])
    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])
    narrows: tuple[Value, ...] = ()

    def parameters_of(self, e: Expr) -> tuple[str, ...]:
        """The parameters that those of ``e``, a node of the replacement, are made from."""
        names = frozenset[str]().union(*(self.origins.get(id(a), self.parameters) for a in arrays(e)))
        return tuple(p for p in self.parameters if p in names)

    @property
    def operands(self) -> tuple[Value, ...]:
        """The values that the region reads."""
        found = (v for e, v in self.native.items() if isinstance(e, Source))
        return tuple(dict.fromkeys(values_in(found)))

    @property
    def unit(self) -> Value:
        """Edits of one unit are all made, or none."""
        return self.root if self.shared is None else self.shared

    def without_arrays(self) -> Splice:
        """What can be told of it, also of its ``tensors`` when it is carried out."""
        return replace(self, expr=Source(self.root), native={}, original=None, origins={})


@entity
class Fold:
    """One value that is computed from constants alone, and kept as a constant instead; ``unit`` as in `Splice`."""

    root: Value
    unit: Value
    counts: Counter[str] = field(default_factory=Counter[str])


Edit: TypeAlias = "Splice | Fold"


def new_nodes(splice: Splice) -> Iterator[Expr]:
    """The nodes of the replacement that have to be emitted, operands first."""
    return not_native(splice.expr, splice.native)


def not_native(expr: Expr, native: Mapping[Expr, Value]) -> Iterator[Expr]:
    """The nodes of ``expr`` that no existing value computes, operands first."""
    return (e for e in walk(expr, stop=native.__contains__) if e not in native)

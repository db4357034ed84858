"""What reparamc asks of a host graph, and what it hands back: the protocol that both adapters implement."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias

import numpy as np

from reparamc.algebra.expr import Array, Conv, Expr, Layout, LayoutOp, Mean, Reshape, Source, Take, arrays, ranks, walk
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.shape import Dim, Shape, size

Value: TypeAlias = Hashable


@dataclass(frozen=True)
class Taps:
    """What the operator ``of`` multiplies by its weight, at each position of its result; it exists only in there.

    A convolution that pads by reflection, or one whose padding is computed at run time, is no kernel over its operand.
    But it is a matrix over what it gathers there, so that its weight can take in what is done to its result.

    Attributes:
        kind: what decides, together with ``operands``, what is gathered: equal for operators that gather alike.
        operands: the values that the operator reads, parameters left out.
        channels: how many numbers it gathers.
        spatial: how many axes are to the right of the channel axis, in its result.
    """

    kind: Hashable
    operands: tuple[Value, ...]
    channels: int
    spatial: int
    of: Value = field(compare=False)

    def __str__(self) -> str:
        return f"{self.of}.taps"

    def source(self, shape: Shape | None) -> Source:
        """The taps as an operand, where the result of the operator has this shape."""
        if shape is not None:
            axis = len(shape) - 1 - self.spatial
            shape = (*shape[:axis], Dim(self.channels), *shape[axis + 1 :])
        return Source(self, self.channels, -1 - self.spatial, shape, taps=True)

    def reading(
        self, weight: Callable[[], Array], bias: Callable[[], Array] | None, groups: int, parameters: tuple[str, ...]
    ) -> Reading:
        """The operator as a matrix over its taps; ``weight`` is (out, in / groups, *kernel)."""
        ones, zeros = (1,) * self.spatial, (0,) * self.spatial

        def build(operands: Sequence[Expr]) -> Expr:
            w = weight()
            rows = w.reshape(len(w), -1, *ones)
            return Conv(operands[0], rows, None if bias is None else bias(), ones, ones, zeros, zeros, groups)

        return Reading((self,), build, parameters, -1 - self.spatial)


def values_in(operands: Iterable[Value]) -> Iterator[Value]:
    """The values of the host graph among the operands of readings; for taps, those that their operator reads."""
    for value in operands:
        yield from value.operands if isinstance(value, Taps) else (value,)


@dataclass(frozen=True)
class Reading:
    """One linear operator of the host graph.

    Attributes:
        operands: the values it reads, parameters left out; or its `Taps` alone.
        build: its expression over the expressions of its operands; loads the parameters.
        parameters: names of the parameters it holds.
        axis: the channel axis of its result, where it is known.
        commutes: it scales or moves each channel by itself, so that readers may each take it in.
        scales: it scales, so that a linear operator in front of it would rather take it in.
        idle: why it ends a region where no scale is near: with most of what is linear it does not commute.
    """

    operands: tuple[Value, ...]
    build: Callable[[Sequence[Expr]], Expr]
    parameters: tuple[str, ...] = ()
    axis: int | None = None
    commutes: bool = field(default=False, kw_only=True)
    scales: bool = field(default=False, kw_only=True)
    idle: str | None = field(default=None, kw_only=True)


class Graph(Protocol):
    """What reparamc needs of a host graph; values are whatever handles the adapter likes."""

    @property
    def pools_clamp(self) -> bool:
        """Whether a pooling whose window is larger than the map makes one element of it; others refuse it."""
        ...

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
        """Why new operators ``made`` just before ``root`` could not stand for ``members``; None when they can."""
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

    def run(self, value: Value, operands: Mapping[Value, Array], extents: Mapping[str, int] = {}) -> Array:
        """``value`` by the host's own operator, in float64, from what it reads. May raise anything.

        ``extents`` says what symbols in shapes stand for, where a size is read from a value that is not given.
        """
        ...

    def kind(self, value: Value) -> Hashable:
        """The operator behind ``value`` with its attributes; without weights, and numbers of channels if possible."""
        ...

    def folded(self) -> tuple[Graph, Sequence[Fold]]:
        """The graph in which operators over constants count as constants where that takes no more room, and these."""
        ...


@dataclass(frozen=True, eq=False)
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
        original: the region as an expression; None where it is none.
        origins: which of ``parameters`` an array of ``expr`` is made from, by its id; of any other, all.
        tensors: what the host made of ``expr`` when it was last carried out: new tensors, by name, and the parameters
            that each is made from.
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
    origins: Mapping[int, frozenset[str]] = field(default_factory=dict)
    tensors: dict[str, tuple[str, ...]] = field(default_factory=dict)

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
        """What splices have in common of which all are made, or none."""
        return self.root if self.shared is None else self.shared


@dataclass(frozen=True, eq=False)
class Fold:
    """One value that is computed from constants alone, and kept as a constant instead; ``unit`` as in `Splice`."""

    root: Value
    unit: Value
    counts: Counter[str] = field(default_factory=Counter)


Edit: TypeAlias = "Splice | Fold"


def new_nodes(splice: Splice) -> Iterator[Expr]:
    """The nodes of the replacement that have to be emitted, operands first."""
    return not_native(splice.expr, splice.native)


def not_native(expr: Expr, native: Mapping[Expr, Value]) -> Iterator[Expr]:
    """The nodes of ``expr`` that no existing value computes, operands first."""
    return (e for e in walk(expr, stop=native.__contains__) if e not in native)


ACTIVATION = "a scalar constant behind a non-linear operator may belong to an activation that runtimes fuse"


def axis_of_constant(dims: Sequence[int], extent: Callable[[int], int | None]) -> int | Declined | None:
    """The axis, from the right, along which a constant of shape ``dims`` varies; None for a scalar.

    Args:
        extent: that of its operand along an axis, None where it is unknown. Unless the constant has as
            many elements there, it may broadcast the operand, which is declined.
    """
    axes = [i - len(dims) for i, d in enumerate(dims) if d != 1]
    if len(axes) > 1:
        return Declined("its constant varies along several axes")
    if axes and extent(axes[0]) != dims[axes[0]]:
        return Declined("its constant may broadcast its operand")
    return axes[0] if axes else None


CUTS = "it splits or merges the channel axis"
TAKES = "it takes one position of many"
AVERAGES = "it averages over the channels"


def layout_reading(x: Value, op: LayoutOp, axis: int | None, *, linear: bool = False) -> Reading | Declined | None:
    """The reading of a layout operator over ``x``; Declined where it would be one but for the channel axis.

    Args:
        axis: that of the channels of ``x``; None where nothing tells it, or its channel axis has been split before.
        linear: whether ``x`` has a reading. Then a scale behind the operator may have somewhere to go, even if the
            channel axis is split here, or is unknown because it has been split before.
    """
    rank, _ = ranks(op)
    if axis is not None and -axis > rank:
        return None
    moved = Layout(Source(x), op, axis).axis
    idle = TAKES if isinstance(op, Take) else None
    if moved is None:
        idle = AVERAGES if isinstance(op, Mean) else idle or CUTS
        unknown = isinstance(op, Reshape) and size(op.before) != size(op.after)  # so that it could not be evaluated
        if isinstance(op, Mean) or unknown or not linear:
            return None if axis is None else Declined(idle)
    return Reading((x,), lambda x: Layout(x[0], op, axis), (), moved, commutes=True, idle=idle)

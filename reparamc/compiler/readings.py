"""What an operator of a host graph is as a linear one: an expression over its operands."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import field
from math import prod
from typing import TypeAlias

from reparamc.algebra.arrays import Array, Parameter, derived, together
from reparamc.algebra.expr import (
    BatchNorm,
    Conv,
    Expr,
    Layout,
    LayoutOp,
    Mean,
    Reshape,
    Scale,
    Source,
    Sum,
    arrays,
    ranks,
    rebuild,
    walk,
)
from reparamc.algebra.infer import channel_axes, channels
from reparamc.algebra.kernels import arithmetic, averaged, equal_taps
from reparamc.algebra.records import lazy, record
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.shape import Dim, Shape, size

Value: TypeAlias = Hashable


@record
class Taps:
    """What the operator ``of`` multiplies by its weight, at each position of its result; it exists only in there.

    A convolution that pads by reflection, or one whose padding is computed at run time, is not a kernel over its
    operand. But it is a matrix over what it gathers there, so that its weight can take in what is done to its result.
    So is a normalization: its weight and bias are a factor and a shift for each channel of its normalized operand.

    Attributes:
        kind: what decides, together with ``operands``, what is gathered: equal for operators that gather alike.
        operands: the values that the operator reads, parameters left out.
        channels: how many numbers it gathers.
        spatial: how many axes are to the right of the channel axis, in its result.
        norm: whether it is a normalization, which gives one number for each channel.
    """

    kind: Hashable
    operands: tuple[Value, ...]
    channels: int
    spatial: int
    of: Value = field(compare=False)
    norm: bool = False

    def __str__(self) -> str:
        return f"{self.of}.taps"

    def source(self, shape: Shape | None) -> Source:
        """The taps as an operand, where the result of the operator has this shape."""
        if shape is not None:
            axis = len(shape) - 1 - self.spatial
            shape = (*shape[:axis], Dim(self.channels), *shape[axis + 1 :])
        return Source(self, self.channels, -1 - self.spatial, shape, taps=True)

    def reading(self, weight: Array, bias: Array | None, groups: int) -> Reading:
        """The operator as a matrix over its taps; ``weight`` is (out, in / groups, *kernel)."""
        ones, zeros = (1,) * self.spatial, (0,) * self.spatial
        shape = (weight.shape[0], self.channels // groups, *ones)
        rows = derived(weight, shape, lambda w: together(w)[0].reshape(w, shape))
        return Reading(Conv(self.source(None), rows, bias, ones, ones, zeros, zeros, groups))


def is_norm(e: Expr) -> bool:
    """Whether ``e`` is the weight and bias of a normalization."""
    return isinstance(e, Conv) and isinstance(e.x, Source) and isinstance(e.x.key, Taps) and e.x.key.norm


def values_in(operands: Iterable[Value]) -> Iterator[Value]:
    """The values of the host graph among the operands of readings; for taps, those that their operator reads."""
    for value in operands:
        yield from value.operands if isinstance(value, Taps) else (value,)


@record
class Reading:
    """One linear operator of the host graph: ``template`` is its expression over sources, one for each operand.

    The sources say what is known of the channels of the operands; parameters are loaded when they are needed.
    """

    template: Expr

    @lazy
    def operands(self) -> tuple[Value, ...]:
        """The values it reads, parameters left out; or its `Taps` alone."""
        return tuple(e.key for e in walk(self.template) if isinstance(e, Source))

    @lazy
    def leaves(self) -> tuple[Parameter, ...]:
        """The parameters it holds."""
        found = (a for e in walk(self.template) for a in arrays(e))
        return tuple(a for a in found if isinstance(a, Parameter))

    @lazy
    def parameters(self) -> tuple[str, ...]:
        """The names of the parameters it holds."""
        return tuple(dict.fromkeys(name for leaf in self.leaves for name in leaf.names))

    @lazy
    def axis(self) -> int | None:
        """The channel axis of its result, where it is known."""
        e = self.template
        return channel_axes(e)[e] if isinstance(e, Sum | Scale) else e.axis

    @lazy
    def channels(self) -> int | None:
        """The number of channels of its result, where it is known."""
        return channels(self.template)[self.template]

    @lazy
    def scales(self) -> bool:
        """Whether it scales, so that a linear operator before it would rather take it in."""
        return isinstance(self.template, BatchNorm | Scale) and isinstance(self.template.x, Source)

    @lazy
    def commutes(self) -> bool:
        """Whether it scales or moves each channel separately, so that each of its users may take it in."""
        e = self.template
        if isinstance(e, Conv):
            return not self.leaves and e.is_weightless and not e.reads_padding
        return self.scales or isinstance(e, Layout)

    def over(self, operands: Mapping[Value, Expr]) -> Expr:
        """Its expression over those of its operands."""
        done: dict[Expr, Expr] = {}
        for e in walk(self.template):
            done[e] = operands[e.key] if isinstance(e, Source) else rebuild(e, [done[c] for c in e.children])
        return done[self.template]


def scaled(op: str, x: Source, constant: Array, axis: int | None, *, first: bool, factor: float = 1.0) -> Reading:
    """``x`` and a constant that varies along ``axis``, or is a scalar where that is None; ``op`` as in `arithmetic`.

    Args:
        first: whether the constant is the first operand.
        factor: multiplies the second operand of a sum or difference.
    """
    shape = () if axis is None else (prod(constant.shape),)
    c = derived(constant, shape, lambda c: together(c)[0].reshape(c, shape))
    return Reading(Scale(x, *arithmetic(op, c, first, factor), axis))


ACTIVATION = "a scalar constant after a non-linear operator may belong to an activation that runtimes fuse"


def axis_of_constant(dims: Sequence[int], size: Callable[[int], int | None]) -> int | Declined | None:
    """The axis, from the right, along which a constant of shape ``dims`` varies; None for a scalar.

    Args:
        size: that of its operand along an axis, None where it is unknown. Unless the constant has as
            many elements there, it may broadcast the operand, which is declined.
    """
    axes = [i - len(dims) for i, d in enumerate(dims) if d != 1]
    if len(axes) > 1:
        return Declined("its constant varies along several axes")
    if axes and size(axes[0]) != dims[axes[0]]:
        return Declined("its constant may broadcast its operand")
    return axes[0] if axes else None


MOST_CHANNELS = 2**12
"""Channels that a repetition along one axis may make. More are not taken for channels: their indices take room."""

MOST_CONCATENATED = 2**16
"""Channels that a concatenation may have, and a selection: the same."""

LAST = 2**30
"""An end of a slice from here on means the end of the axis: exporters write the largest integers."""


def cropped(
    x: Source, channels: int, sizes: Sequence[int | None], cuts: Mapping[int, tuple[int, int, int]]
) -> Reading | None:
    """Every s-th position of a map from a to the last but b, as a kernel of one tap; ``cuts`` says (a, end, s)."""
    n = len(sizes)
    begin, end, stride = [0] * n, [0] * n, [1] * n
    for axis, (start, stop, step) in cuts.items():
        size = sizes[axis]
        if size is not None:
            start, stop, _ = slice(start, stop).indices(size)
            stop = min(stop - size, 0) or size
        if start < 0 or step < 1 or (0 <= stop < LAST and stop != size):
            return None
        begin[axis], end[axis], stride[axis] = -start, min(stop, 0), step
    ones = (1,) * n
    if max((abs(m) for m in (*begin, *end, *stride)), default=0) > MOST_REACH:
        return None
    return Reading(averaged(x, equal_taps(channels, ones), tuple(stride), ones, tuple(begin), tuple(end)))


MOST_REACH = 2**12
"""How far a kernel may read, pad or step: what reads further cannot be checked on samples."""

CUTS = "it splits or merges the channel axis"
AVERAGES = "it averages over the channels"


def moved(x: Source, op: LayoutOp, *, linear: bool = False) -> Reading | Declined | None:
    """The reading of a layout operator over ``x``; Declined where it would be one but for the channel axis.

    Args:
        linear: whether ``x`` has a reading. Then a scale after the operator may have somewhere to go, even if the
            channel axis is split here, or is unknown because it has been split before.
    """
    rank, _ = ranks(op)
    if x.axis is not None and -x.axis > rank:
        return None
    found = Layout(x, op, x.axis)
    if found.splits_channels:
        unknown = isinstance(op, Reshape) and size(op.before) != size(op.after)  # so that it could not be evaluated
        if isinstance(op, Mean) or unknown or not linear:
            return None if x.axis is None else Declined(AVERAGES if isinstance(op, Mean) else CUTS)
    return Reading(found)

"""Affine maps between grids of unknown size, in a form that two equal maps share.

A value of a network that is affine in its sources is a sum, over sources x and over *taps*, of

    y[o, p] += W[o, i] * x[i, S*p + a]        for every p with  p >= L  and  S*p + U <= H - 1  along each axis,

and of vectors with guards of the same kind. H is the extent of the source, S the stride. Whatever paths lead from x
to y, through paddings, crops and biases that meet a border, all that they ask of a position is one L and one U per
axis. These guards are linearly independent as functions of (p, H), so the map from (source, a, L, U) to the matrix W
is unique: two values are equal for every input and every input size if and only if these maps agree. The proof is in
docs/certificate.md.

Matrices stay as compact as the operators that they come from: a block of rows reads a run of channels each, so a dense
kernel is one array, a depthwise one has one channel a row, and an identity is a vector of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from reparamc.views import (
    UNIT,
    Digit,
    Extent,
    Unrepresentable,
    View,
    composed,
    extents,
    identity_view,
    joined,
    reshaped,
)

Array = npt.NDArray[Any]


# Values


@dataclass(frozen=True)
class Source:
    """A leaf of a window, seen through ``view``, with ``spread`` - 1 zeros between its elements along each axis."""

    leaf: str
    base: tuple[Extent, ...]
    view: View
    spread: tuple[int, ...]

    @property
    def extents(self) -> tuple[Extent, ...]:
        return tuple(_spread(e, s) for e, s in zip(extents(self.view), self.spread, strict=True))


def _spread(extent: Extent, by: int) -> Extent:
    if by == 1:
        return extent
    return Extent(by * (extent.known - 1) + 1) if extent.known else Extent(1, (f"{by}*({extent})",))


class Guard(NamedTuple):
    """Along one axis: position ``offset`` is read for every p >= low with stride*p + high <= extent - 1."""

    offset: int
    low: int
    high: int


Tap = tuple[Guard, ...]
"""One guard for each axis of the base; (0, 0, 0) along the channels."""


class Grid(NamedTuple):
    """How a result lies over a source along one axis: it has floor((extent - 1 - delta) / stride) + 1 positions."""

    stride: int = 1
    delta: int = 0


@dataclass(frozen=True, eq=False)
class Block:
    """Part of a linear map: ``y[rows[j]] += left[j] * sum over k, t of weight[j, k, t] * x[first[j] + k, at taps[t]]``.

    Attributes:
        rows: int (J,), ascending.
        first: int (J,).
        weight: real (J, K, T), never written to: it may be the array of the model.
        size: (J, K, T), the sums of the magnitudes that ``weight`` was added up from; None for its own.
        left: float64 (J,).
        rounded: how many stored parameters a coefficient is a product of, at most.
        computed: whether ``size`` is there for parameters that the model itself computes, and rounds on the way.
    """

    source: Source
    rows: Array
    first: Array
    weight: Array
    left: Array
    taps: tuple[Tap, ...]
    size: Array | None = None
    rounded: int = 0
    computed: bool = False


@dataclass(frozen=True, eq=False)
class Vector:
    """What is added to each channel where a guard holds: float64 (n,), and the magnitudes it was added up from.

    ``rounded`` and ``computed`` as for a `Block`.
    """

    value: Array
    size: Array
    rounded: int = 0
    computed: bool = False

    def plus(self, other: Vector) -> Vector:
        rounded, computed = max(self.rounded, other.rounded), self.computed or other.computed
        return Vector(self.value + other.value, self.size + other.size, rounded, computed)

    def mapped(self, change: Callable[[Array], Array]) -> Vector:
        """The vector with its elements moved by ``change``."""
        return replace(self, value=change(self.value), size=change(self.size))


Where = tuple[Source, Tap] | None
"""The guard of a vector, in terms of the extents of a source; None for everywhere."""


@dataclass(frozen=True, eq=False)
class Value:
    """``view`` of an affine map on a grid with the extents ``base``.

    Attributes:
        channel: the axis of ``base`` that matrices act on; None while all elements are treated alike, by matrices
            of one row and column.
        grids: one `Grid` for each axis of ``base``, by source.
        loose: axes of ``base`` along which a term of a sum may be repeated, at some input sizes.
    """

    base: tuple[Extent, ...]
    channel: int | None
    grids: Mapping[Source, tuple[Grid, ...]]
    blocks: tuple[Block, ...]
    vectors: Mapping[Where, Vector]
    view: View
    loose: frozenset[int] = frozenset()

    @property
    def channels(self) -> int:
        return 1 if self.channel is None else self.base[self.channel].factor

    @property
    def extents(self) -> tuple[Extent, ...]:
        return extents(self.view)

    @property
    def rank(self) -> int:
        return len(self.view)

    @property
    def is_plain(self) -> bool:
        """Whether the value is laid out as its base."""
        return self.view == identity_view(self.base)

    @property
    def is_pointwise(self) -> bool:
        """Whether every element depends on one position of each source, for every input size."""
        zero = ((0, 0, 0),) * len(self.base)
        return (
            all(all(grid == (1, 0) for grid in grids) for grids in self.grids.values())
            and all(len(b.taps) == 1 and b.taps[0] == zero for b in self.blocks)
            and set(self.vectors) <= {None}
        )


ONE = np.ones(1)
_START = np.zeros(1, np.int64)


def leaf(name: str, shape: Sequence[Extent]) -> Value:
    """The value that is the leaf ``name``."""
    base = tuple(shape)
    source = Source(name, base, identity_view(base), (1,) * len(base))
    block = Block(source, _START, _START, np.ones((1, 1, 1)), ONE, ((Guard(0, 0, 0),) * len(base),))
    return Value(base, None, {source: (Grid(),) * len(base)}, (block,), {}, identity_view(base))


def promoted(value: Value, axis: int) -> Value:
    """``value`` with its matrices on ``axis`` of its base."""
    if value.channel == axis:
        return value
    if value.channel is not None:
        raise Unrepresentable("its parts act on different axes")
    count = value.base[axis].known
    if count is None:
        raise Unrepresentable("the number of channels is unknown")
    if any(grids[axis] != (1, 0) for grids in value.grids.values()):
        raise Unrepresentable("its parts act on different axes")
    index = np.arange(count)
    blocks = tuple(
        replace(
            b,
            rows=index,
            first=index,
            weight=np.broadcast_to(b.weight, (count, *b.weight.shape[1:])),
            size=None if b.size is None else np.broadcast_to(b.size, (count, *b.size.shape[1:])),
            left=np.broadcast_to(b.left, count),
        )
        for b in value.blocks
    )
    vectors = {w: v.mapped(lambda a, n=count: np.broadcast_to(a, n)) for w, v in value.vectors.items()}
    return replace(value, channel=axis, blocks=blocks, vectors=vectors)


def _places(value: Value, axis: int) -> tuple[Value, Array]:
    """``value`` with matrices on what ``axis`` of its layout is made of, and the index along it of every channel."""
    digits = value.view[axis]
    owners = {d.axis for d in digits}
    if value.is_plain:
        value = promoted(value, axis)
    elif value.channel is None and len(owners) == 1:
        value = promoted(value, next(iter(owners)))
    if not owners <= {value.channel}:
        raise Unrepresentable("an axis mixes channels and positions")
    rows, index = np.arange(value.channels), np.zeros(value.channels, np.int64)
    for digit in digits:
        extent, inner = digit.extent.factor, digit.inner.factor
        index = index * extent + rows // inner % extent
    return value, index


def scaled(value: Value, factor: Array | float, axis: int | None = None) -> Value:
    """``value`` times a number (``axis`` None), or times a vector along one axis."""
    factor = np.asarray(factor, np.float64)
    if axis is not None:
        value, index = _places(value, axis)
        factor = factor.reshape(-1)[index]
    by_row = np.broadcast_to(factor if axis is not None else factor.reshape(()), value.channels)
    one = int(np.any(np.abs(by_row) != 1))
    blocks = tuple(replace(b, left=b.left * by_row[b.rows], rounded=b.rounded + one) for b in value.blocks)
    vectors = {
        w: replace(v, value=v.value * by_row, size=v.size * np.abs(by_row), rounded=v.rounded + one)
        for w, v in value.vectors.items()
    }
    return replace(value, blocks=blocks, vectors=vectors)


def least_extent(value: Value, axis: int) -> int:
    """The smallest extent that ``value`` can have along ``axis`` while every source has a position; 0 if unknown."""
    known = value.extents[axis].known
    if known is not None:
        return known
    if not value.is_plain:
        return 0
    return max((-g[axis].delta // g[axis].stride + 1 for g in value.grids.values()), default=0)


def computed(value: Value, magnitude: Value) -> Value:
    """``value``, whose parameters are known up to the rounding of numbers of which ``magnitude`` is the map."""
    doubts = tuple(
        replace(
            b, weight=np.broadcast_to(0.0, b.weight.shape), size=np.abs(b.weight) if b.size is None else b.size,
            computed=True,
        )
        for b in magnitude.blocks
    )  # fmt: skip
    vectors = [
        (w, Vector(np.zeros_like(v.value), np.abs(v.value) + v.size, v.rounded, True))
        for w, v in magnitude.vectors.items()
    ]
    return replace(value, blocks=value.blocks + doubts, vectors=_summed(value.vectors.items(), vectors))


def shifted(value: Value, term: Array | float, axis: int | None = None, size: Array | None = None) -> Value:
    """``value`` plus a number (``axis`` None), or plus a vector along one axis; ``size``: what that was summed from."""
    term = np.asarray(term, np.float64)
    size = np.abs(term) if size is None else size
    if axis is not None:
        value, index = _places(value, axis)
        term, size = term.reshape(-1)[index], size.reshape(-1)[index]
    else:
        term, size = term.reshape(()), size.reshape(())
    added = Vector(np.broadcast_to(term, value.channels), np.broadcast_to(size, value.channels), 1)
    return replace(value, vectors=_summed([(None, added)], value.vectors.items()))


def _summed(*parts: Iterable[tuple[Where, Vector]]) -> dict[Where, Vector]:
    found: dict[Where, Vector] = {}
    for part in parts:
        for where, vector in part:
            found[where] = found[where].plus(vector) if where in found else vector
    return found


def added(terms: Sequence[Value]) -> Value:
    """The sum of values of equal extents."""
    total = terms[0]
    for term in terms[1:]:
        _same_extents(total.extents, term.extents)
        axis = total.channel if total.channel is not None else term.channel
        if axis is not None and len(total.base) == len(term.base):
            total, term = promoted(total, axis), promoted(term, axis)
        if total.channel != term.channel or not same_layout(total, term):
            raise Unrepresentable("its terms are laid out differently")
        _never_repeated(total.grids, term.grids)
        total = replace(
            total,
            loose=total.loose | term.loose | _loose(total, term),
            grids=_grids(total.grids, term.grids),
            blocks=total.blocks + term.blocks,
            vectors=_summed(total.vectors.items(), term.vectors.items()),
        )
    return total


def same_layout(a: Value, b: Value) -> bool:
    """Whether two values are laid out alike; extents of a base that are unknown may have different names."""
    return (a.is_plain and b.is_plain) or a.view == b.view


def _same_extents(a: Sequence[Extent], b: Sequence[Extent]) -> None:
    """Raise unless the extents agree, as far as they are known, and neither of two can be repeated along an axis."""
    if len(a) != len(b):
        raise Unrepresentable("its terms have different ranks")
    for m, n in zip(a, b, strict=True):
        if m != n and (UNIT in (m, n) or (m.known is not None and n.known is not None)):
            raise Unrepresentable("one of its terms is repeated along an axis")


def _never_repeated(a: Mapping[Source, tuple[Grid, ...]], b: Mapping[Source, tuple[Grid, ...]]) -> None:
    """Raise where the extents of two terms differ at some size: one that leaves 1 element is repeated there."""
    for source in a.keys() & b.keys():
        for extent, m, n in zip(source.extents, a[source], b[source], strict=True):
            if extent.known is None and m != n:
                raise Unrepresentable("its terms are of one extent for some input sizes only")


def _loose(a: Value, b: Value) -> frozenset[int]:
    """The axes along which one of two terms may be repeated."""
    if not a.grids.keys().isdisjoint(b.grids):
        return frozenset()  # they lie alike over one source
    if a.is_plain and b.is_plain:
        return frozenset(i for i, (m, n) in enumerate(zip(a.base, b.base, strict=True)) if m != n)
    return frozenset(range(len(a.base)) if a.extents != b.extents else ())


def _one_extent(value: Value, kernel: Kernel) -> None:
    """Raise if a kernel meets the border of a sum, of whose terms one may be repeated: it would meet others then."""
    for axis, stride, delta, *taps in zip(kernel.axes, kernel.stride, kernel.delta, *kernel.offsets, strict=True):
        if axis in value.loose and (stride, delta, *taps) != (1, 0, 0):
            raise Unrepresentable("a kernel reads a sum of which a term may be repeated along an axis")


def _grids(
    a: Mapping[Source, tuple[Grid, ...]], b: Mapping[Source, tuple[Grid, ...]]
) -> dict[Source, tuple[Grid, ...]]:
    """The grids of a sum. Where deltas differ, only sizes at which the extents agree are admitted: the larger holds."""
    found = dict(a)
    for source, grids in b.items():
        if source not in found:
            found[source] = grids
            continue
        if any(m.stride != n.stride for m, n in zip(found[source], grids, strict=True)):
            raise Unrepresentable("its terms differ in stride")
        found[source] = tuple(Grid(m.stride, max(m.delta, n.delta)) for m, n in zip(found[source], grids, strict=True))
    return found


def stacked(terms: Sequence[Value], axis: int) -> Value:
    """Values one after the other along ``axis``, which holds the channels of each and nothing else."""
    whole = [_whole(_places(t, axis)[0], axis) for t in terms]
    first, at = whole[0], 0
    blocks: list[Block] = []
    grids: Mapping[Source, tuple[Grid, ...]] = {}
    vectors: list[tuple[Where, Vector]] = []
    total = sum(t.channels for t in whole)
    for t in whole:
        if t.channel != first.channel or len(t.base) != len(first.base):
            raise Unrepresentable("its terms are laid out differently")
        if not first.is_plain and _relabelled(t.view, first.channel, UNIT) != _relabelled(
            first.view, first.channel, UNIT
        ):
            raise Unrepresentable("its terms are laid out differently")
        kept = [i for i in range(len(t.base)) if i != t.channel]
        _same_extents([t.base[i] for i in kept], [first.base[i] for i in kept])
        blocks += [replace(b, rows=b.rows + at) for b in t.blocks]
        grids = _grids(grids, t.grids)
        for where, v in t.vectors.items():
            vectors.append((where, v.mapped(lambda a, at=at: np.pad(a, (at, total - at - len(a))))))
        at += t.channels
    loose = frozenset(i for t in whole for i in t.loose)  # what is stacked has one extent, or nothing runs
    stack = replace(first, grids=grids, blocks=tuple(blocks), vectors=_summed(vectors), loose=loose)
    return _resized(stack, total, axis)


def _whole(value: Value, axis: int) -> Value:
    """``value``, if all its channels and nothing else lie along ``axis``, in order."""
    if value.channel is None and not value.view[axis] and UNIT in value.base:
        value = promoted(value, value.base.index(UNIT))
    if value.channel is None or value.view[axis] != identity_view(value.base)[value.channel]:
        raise Unrepresentable("an axis mixes channels and positions, or holds only some of the channels")
    return value


def _relabelled(view: View, channel: int | None, extent: Extent) -> View:
    return tuple(tuple(d._replace(extent=extent) if d.axis == channel else d for d in axis) for axis in view)


def _resized(value: Value, channels: int, axis: int) -> Value:
    """``value``, whose channels lie along ``axis`` of its layout, with another number of them."""
    assert value.channel is not None
    base = tuple(Extent(channels) if i == value.channel else e for i, e in enumerate(value.base))
    if value.is_plain:
        return replace(value, base=base, view=identity_view(base))
    view = list(value.view)
    view[axis] = identity_view(base)[value.channel]
    return replace(value, base=base, view=tuple(view))


def selected(value: Value, index: Sequence[int], axis: int) -> Value:
    """The elements ``index`` along ``axis``, which is made of channels."""
    value, places = _places(value, axis)
    channel = value.channel
    if channel is None:
        raise Unrepresentable("a selection along an axis of extent 1")
    wanted = np.asarray(index, np.int64)
    if value.view[axis] == identity_view(value.base)[channel]:
        return _resized(_rows(value, wanted), len(wanted), axis)
    if UNIT in (value.base[channel], Extent(len(wanted))) or not value.view[axis]:
        raise Unrepresentable("a selection leaves an axis without channels")
    # Number the channels as the digits stand in the layout, with one digit for the axis itself.
    digits = [(i, d) for i, ds in enumerate(value.view) for d in ds if d.axis == channel]
    rows, size = np.arange(value.channels), value.extents[axis].factor
    numbers, done = np.zeros(value.channels, np.int64), False
    for i, d in digits:
        if i != axis:
            numbers = numbers * d.extent.factor + rows // d.inner.factor % d.extent.factor
        elif not done:
            numbers, done = numbers * size + places, True
    order = np.argsort(numbers)
    behind = 1
    seen = False
    for i, d in digits:
        if i == axis:
            seen = True
        elif seen:
            behind *= d.extent.factor
    table = order.reshape(-1, size, behind)[:, wanted].reshape(-1)
    inner, view = len(table), [list(ds) for ds in value.view]
    done = False
    for i, ds in enumerate(value.view):
        new: list[Digit] = []
        for d in ds:
            extent = len(wanted) if i == axis else d.extent.factor
            if d.axis != channel or (i == axis and done):
                new += [d] if d.axis != channel else []
                continue
            done = done or i == axis
            inner //= extent
            new.append(Digit(channel, Extent(inner), Extent(extent)))
        view[i] = new
    base = tuple(Extent(len(table)) if i == channel else e for i, e in enumerate(value.base))
    return _settled(replace(_rows(value, table), base=base, view=tuple(joined(ds) for ds in view)))


def _rows(value: Value, wanted: Array) -> Value:
    """The channels ``wanted``; the base is the caller's to change."""
    blocks = []
    for b in value.blocks:
        at = np.full(value.channels, -1)
        at[b.rows] = np.arange(len(b.rows))
        chosen = at[wanted]
        rows = np.flatnonzero(chosen >= 0)
        if len(rows):
            blocks.append(_take(b, chosen[rows], rows))
    vectors = {w: v.mapped(lambda a: a[wanted]) for w, v in value.vectors.items()}
    return replace(value, blocks=tuple(blocks), vectors=vectors)


def _take(b: Block, chosen: Array, rows: Array) -> Block:
    """The rows ``chosen`` of a block, as ``rows``; a run of them without a copy."""
    if len(chosen) == 0 or (chosen[-1] - chosen[0] == len(chosen) - 1 and np.all(np.diff(chosen) == 1)):
        at: Any = slice(chosen[0], chosen[-1] + 1) if len(chosen) else slice(0, 0)
    else:
        at = chosen
    return replace(
        b,
        rows=rows,
        first=b.first[at],
        weight=b.weight[at],
        left=b.left[at],
        size=None if b.size is None else b.size[at],
    )


# Layouts of values


def laid_out(value: Value, view: View) -> Value:
    """``view`` of a value; its axes are those of ``value``."""
    return _settled(replace(value, view=composed(value.view, view)))


def regrouped(value: Value, target: Sequence[Extent | None]) -> Value:
    """``value`` reshaped; one extent may be None, for what is left."""
    return _settled(replace(value, view=reshaped(value.view, target)))


def permuted(value: Value, axes: Sequence[int]) -> Value:
    return _settled(replace(value, view=tuple(value.view[a] for a in axes)))


def averaged(value: Value, axes: Sequence[int], keep: bool) -> Value:
    """The mean over ``axes``."""
    view: list[tuple[Digit, ...]] = []
    for i, digits in enumerate(value.view):
        if i not in axes:
            view.append(digits)
        elif any(d.axis == value.channel for d in digits):
            raise Unrepresentable("a mean over channels")
        elif keep:
            view.append(())
    return _settled(replace(value, view=tuple(view)))


def _settled(value: Value) -> Value:
    """``value`` in one form: channels numbered as its layout has them, and that layout at the sources if it can be.

    A layout that splits the channels stays behind the matrices, but what it does to positions is moved.
    """
    if value.is_plain:
        return value
    channel = value.channel
    if channel is not None:
        value = _renumbered(value, channel)
    if value.is_plain or not value.is_pointwise or any(s != 1 for source in value.grids for s in source.spread):
        return value
    if channel is None:
        return _unshuffled(_moved(value, value.view, None, None))
    whole = identity_view(value.base)[channel]
    at = next((i for i, digits in enumerate(value.view) if digits == whole), None)
    if at is not None:
        return _moved(value, value.view, at, None)
    groups: list[tuple[Digit, ...]] = []
    view: list[tuple[Digit, ...]] = []
    for digits in value.view:
        kept: list[Digit] = []
        for owned, run in groupby(digits, key=lambda d: d.axis == channel):
            if owned:
                kept += [d._replace(axis=-1) for d in run]
            else:
                groups.append(tuple(run))
                kept.append(Digit(len(groups) - 1, UNIT, extents([groups[-1]])[0]))
        view.append(tuple(kept))
    last = len(groups)
    behind = tuple(tuple(d._replace(axis=last) if d.axis == -1 else d for d in digits) for digits in view)
    return _moved(value, (*groups, whole), last, behind)


def _moved(value: Value, view: View, at: int | None, behind: View | None) -> Value:
    """``view`` of a pointwise value, taken of its sources; axis ``at`` has the channels, and ``behind`` stays."""
    base = extents(view)
    trivial, grids = (Guard(0, 0, 0),) * len(base), (Grid(),) * len(base)
    moved: dict[Source, Source] = {}
    for s in value.grids:
        of_source = list(view)
        if at is not None:  # matrices stand between: a source has its own number of channels
            assert value.channel is not None
            extent = s.extents[value.channel]
            of_source[at] = (Digit(value.channel, UNIT, extent),) if extent != UNIT else ()
        moved[s] = Source(s.leaf, s.base, composed(s.view, tuple(of_source)), (1,) * len(base))
    # What is averaged over keeps its coefficient, and the mean of a constant is this constant.
    blocks = tuple(replace(b, source=moved[b.source], taps=(trivial,)) for b in value.blocks)
    stays = identity_view(base) if behind is None else behind
    loose = frozenset(range(len(base)) if value.loose else ())
    return Value(base, at, dict.fromkeys(moved.values(), grids), blocks, value.vectors, stays, loose)


def _unshuffled(value: Value) -> Value:
    """``value``, all of whose elements are treated alike, with a shuffle along one axis written as a selection."""
    for source in value.grids:
        for axis, digits in enumerate(source.view):
            owners = {d.axis for d in digits}
            total = extents([digits])[0]
            if len(digits) < 2 or len(owners) > 1 or total != source.base[digits[0].axis] or total.known is None:
                continue
            places = np.zeros(total.known, np.int64)
            for d in digits:
                places = places * d.extent.factor + np.arange(total.known) // d.inner.factor % d.extent.factor
            value = promoted(value, axis)
            view = list(source.view)
            view[axis] = identity_view(source.base)[digits[0].axis]
            sorted_ = replace(source, view=tuple(view))
            blocks = tuple(
                replace(b, source=sorted_, first=np.argsort(places)[b.first]) if b.source == source else b
                for b in value.blocks
            )
            grids = {sorted_ if s == source else s: g for s, g in value.grids.items()}
            return replace(value, blocks=blocks, grids=grids)
    return value


def _renumbered(value: Value, channel: int) -> Value:
    """``value`` with its channels in the order in which their digits stand in the layout."""
    digits = [d for ds in value.view for d in ds if d.axis == channel]
    total = 1
    for d in digits:
        total *= d.extent.factor
    if total != value.channels:
        raise Unrepresentable("a mean over channels")
    inner = [d.inner.factor for d in digits]
    if inner == sorted(inner, reverse=True):
        return value
    order = np.zeros(value.channels, np.int64)
    rows = np.arange(value.channels)
    for d in digits:
        order = order * d.extent.factor + rows // d.inner.factor % d.extent.factor
    value = _rows(value, np.argsort(order))
    rest, view = total, []
    for ds in value.view:
        new = []
        for d in ds:
            if d.axis == channel:
                rest //= d.extent.factor
                d = Digit(channel, Extent(rest), d.extent)
            new.append(d)
        view.append(joined(new))
    return replace(value, view=tuple(view))


# Kernels


@dataclass(frozen=True, eq=False)
class Kernel:
    """A linear map from one grid to another: row o reads channels ``first[o] ... first[o] + K - 1`` at every tap.

    Attributes:
        weight: (O, K, T).
        first: int (O,).
        offsets: for each tap the position read, less stride * p, along each of ``axes``.
        axes: of the value.
        stride, delta: along each of ``axes``; see `Grid`.
        rounded: 1 if ``weight`` holds stored parameters, 0 if it is known exactly.
    """

    weight: Array
    first: Array
    offsets: tuple[tuple[int, ...], ...]
    axes: tuple[int, ...]
    stride: tuple[int, ...]
    delta: tuple[int, ...]
    rounded: int = 1


def grouped_first(rows: int, columns: int, groups: int) -> Array:
    """The first channel that each of ``rows`` reads, of a kernel of that many groups with ``columns`` channels each."""
    return np.repeat(np.arange(groups) * columns, rows // groups)


def mixed(value: Value, matrix: Array, axis: int) -> Value:
    """``matrix`` (O, C) applied along ``axis``."""
    first = np.zeros(len(matrix), np.int64)
    return convolved(value, Kernel(matrix[:, :, None], first, ((),), (), (), ()), axis)


def convolved(value: Value, kernel: Kernel, axis: int) -> Value:
    """A kernel applied to a value whose channels lie along ``axis``."""
    value = _whole(_places(value, axis)[0], axis)
    if kernel.axes and not value.is_plain:
        raise Unrepresentable("a kernel reads a layout that cannot be moved in front of what is under it")
    _one_extent(value, kernel)
    if value.channels < int(kernel.first.max(initial=0)) + kernel.weight.shape[1]:
        raise Unrepresentable("a weight does not fit the channels of its operand")
    grids = {s: _grids_behind(g, kernel) for s, g in value.grids.items()}
    blocks = [
        c for b in value.blocks for c in _compose(kernel, b, value.grids[b.source], grids[b.source], value.channels)
    ]
    parts: list[tuple[Where, Vector]] = []
    for where, vector in value.vectors.items():
        rounded = vector.rounded + kernel.rounded
        by_tap = zip(*_applied(kernel, vector), strict=True)
        for offset, (out, size) in zip(kernel.offsets, by_tap, strict=True):
            at = _where_behind(value, where, kernel, offset, grids)
            parts.append((at, Vector(out, size, rounded, vector.computed)))
    base = list(value.base)
    for axis_, s, d in zip(kernel.axes, kernel.stride, kernel.delta, strict=True):
        base[axis_] = _extent_behind(base[axis_], s, d)
    resized = _resized(
        replace(value, grids=grids, blocks=tuple(blocks), vectors=_summed(parts)), len(kernel.weight), axis
    )
    assert value.channel is not None
    base[value.channel] = Extent(len(kernel.weight))
    return replace(resized, base=tuple(base), view=identity_view(base)) if kernel.axes else resized


ROWS = 1 << 16
"""Coefficients that are made float64 at a time: few enough for a processor's cache."""


def _applied(kernel: Kernel, vector: Vector) -> tuple[Array, Array]:
    """What a kernel makes of a vector, and of its magnitudes: both (T, O)."""
    rows, width, taps = kernel.weight.shape
    found, size = np.empty((taps, rows)), np.empty((taps, rows))
    step = max(1, ROWS // max(1, width * taps))
    whole = width == len(vector.value)
    for start in range(0, rows, step):
        stop = min(start + step, rows)
        w = kernel.weight[start:stop].astype(np.float64)
        at: Any = slice(None) if whole else kernel.first[start:stop, None] + np.arange(width)
        value, magnitude = (a[None, None] if whole else a[at][:, None] for a in (vector.value, vector.size))
        found[:, start:stop] = (value @ w)[:, 0].T
        size[:, start:stop] = (magnitude @ np.abs(w, out=w))[:, 0].T
    return found, size


def _extent_behind(extent: Extent, stride: int, delta: int) -> Extent:
    if extent.known is not None:
        return Extent((extent.known - 1 - delta) // stride + 1)
    return (
        extent
        if (stride, delta) == (1, 0)
        else Extent(1, (f"(({extent.factor}{extent.symbols}) - {delta}) / {stride}",))
    )


def _grids_behind(grids: Sequence[Grid], kernel: Kernel) -> tuple[Grid, ...]:
    found = list(grids)
    for axis, s, d in zip(kernel.axes, kernel.stride, kernel.delta, strict=True):
        g = found[axis]
        found[axis] = Grid(g.stride * s, g.stride * d + g.delta)
    return tuple(found)


def _tap_behind(tap: Tap, kernel: Kernel, offset: Sequence[int], grids: Sequence[Grid], after: Sequence[Grid]) -> Tap:
    """The tap at which a kernel's tap ``offset`` reads what ``tap`` of the inner map gives."""
    found = list(tap)
    for axis, s, b in zip(kernel.axes, kernel.stride, offset, strict=True):
        g, stride = found[axis], grids[axis].stride
        found[axis] = Guard(
            stride * b + g.offset, max(0, -((b - g.low) // s)), max(after[axis].delta, stride * b + g.high)
        )
    return tuple(found)


def _where_behind(
    value: Value, where: Where, kernel: Kernel, offset: Sequence[int], after: Mapping[Source, tuple[Grid, ...]]
) -> Where:
    """The guard of what a vector becomes behind one tap: that the tap reads no padding, and what held before."""
    inside = all(b >= 0 and b <= d for b, d in zip(offset, kernel.delta, strict=True))
    if where is None and inside:
        return None
    if not value.grids:
        raise Unrepresentable("a constant map meets a border")
    source = where[0] if where is not None else min(value.grids, key=lambda s: (s.leaf, str(s)))
    grids = value.grids[source]
    tap = where[1] if where is not None else tuple(Guard(0, 0, g.delta) for g in grids)
    return _plain_where(source, _tap_behind(tap, kernel, offset, grids, after[source]), after[source])


def _plain_where(source: Source, tap: Tap, grids: Sequence[Grid]) -> Where:
    plain = tuple(Guard(0, g.low, max(g.high, grid.delta)) for g, grid in zip(tap, grids, strict=True))
    return None if all(g == (0, 0, d.delta) for g, d in zip(plain, grids, strict=True)) else (source, plain)


def _compose(kernel: Kernel, b: Block, grids: Sequence[Grid], after: Sequence[Grid], channels: int) -> list[Block]:
    """The product of a kernel and a block."""
    taps = [tuple(_tap_behind(t, kernel, o, grids, after) for t in b.taps) for o in kernel.offsets]
    rows, width = np.arange(len(kernel.weight)), kernel.weight.shape[1]
    rounded = b.rounded + kernel.rounded
    at = np.full(channels, -1)
    at[b.rows] = np.arange(len(b.rows))
    if width == 1:  # each row reads one channel: the rows of the block in another order, with a factor
        chosen = at[kernel.first]
        kept = np.flatnonzero(chosen >= 0)
        taken = _take(b, chosen[kept], rows[kept])
        if b.weight.shape[2] == 1 and b.weight.shape[1] == 1:
            weight = kernel.weight[kept] * (taken.weight[:, :, 0] * 1.0)[:, :, None]
            size = None if b.size is None else np.abs(kernel.weight[kept]) * taken.size  # pyright: ignore
            return [replace(taken, weight=weight, size=size, taps=tuple(t for (t,) in taps), rounded=rounded)]
        return [
            replace(
                taken, left=taken.left * kernel.weight[kept, 0, t].astype(np.float64), taps=taps[t], rounded=rounded
            )
            for t in range(len(taps))
        ]
    if b.weight.shape[1] == 1 and len(b.rows) == channels and np.all(np.diff(b.first) == 1):
        return [_times_diagonal(kernel.weight, b, rows, kernel.first, taps, rounded)]
    low, high = int(b.rows[0]), int(b.rows[-1]) + 1
    run = len(b.rows) == high - low
    found: list[Block] = []
    for first in np.unique(kernel.first):
        group = np.flatnonzero(kernel.first == first)
        lo, hi = max(low, int(first)), min(high, int(first) + width)
        if lo >= hi:
            continue
        members = at[lo:hi]
        members = members[members >= 0]
        if not len(members):
            continue
        columns = b.rows[members] - first
        w = kernel.weight[group[0] : group[-1] + 1] if len(group) == group[-1] - group[0] + 1 else kernel.weight[group]
        w = w[:, columns[0] : columns[-1] + 1] if run else w[:, columns]
        part = _take(b, members, members)
        follows = np.all(np.diff(part.first) == 1)
        if b.weight.shape[1] == 1 and follows:
            found.append(_times_diagonal(w, part, group, np.zeros(len(group), np.int64), taps, rounded))
        else:
            found.append(_times_matrix(w, part, group, taps, rounded))
    return found


def _times_diagonal(
    w: Array, b: Block, rows: Array, start: Array, taps: Sequence[tuple[Tap, ...]], rounded: int
) -> Block:
    """A matrix for each tap, times a block whose every row reads the channel behind that of the row before.

    Row o of ``w`` reads the rows ``start[o]`` and following of the block.
    """
    factor = b.left[:, None] * b.weight[:, 0]  # (C, T1)
    flat = tuple(t for inner in taps for t in inner)
    weight, size = w, None
    if b.size is not None or factor.shape[1] != 1 or not np.all(factor == 1):
        columns = start[:, None] + np.arange(w.shape[1]) if np.any(start) else np.arange(w.shape[1])[None]
        weight = (w[:, :, :, None] * factor[columns][:, :, None, :]).reshape(*w.shape[:2], -1)
        if b.size is not None:
            sizes = np.abs(b.left)[:, None] * b.size[:, 0]
            size = (np.abs(w)[:, :, :, None] * sizes[columns][:, :, None, :]).reshape(*w.shape[:2], -1)
    left = np.ones(len(rows))
    return replace(
        b, rows=rows, first=b.first[0] + start, weight=weight, left=left, taps=flat, size=size, rounded=rounded
    )


def _times_matrix(w: Array, b: Block, rows: Array, taps: Sequence[tuple[Tap, ...]], rounded: int) -> Block:
    """A matrix for each tap, times any block: dense over the channels that it reads."""
    low, high = int(b.first.min()), int(b.first.max()) + b.weight.shape[1]
    inner = np.zeros((len(b.rows), high - low, len(b.taps)))
    magnitude = np.zeros_like(inner)
    columns = (b.first - low)[:, None] + np.arange(b.weight.shape[1])
    row = np.arange(len(b.rows))[:, None]
    inner[row, columns] = b.left[:, None, None] * b.weight
    magnitude[row, columns] = np.abs(b.left)[:, None, None] * (np.abs(b.weight) if b.size is None else b.size)
    outer = np.moveaxis(w, 2, 0).astype(np.float64)  # (T2, O, K)

    def product(a: Array, c: Array) -> Array:
        found = a @ c.reshape(len(c), -1)
        return np.moveaxis(found.reshape(len(a), a.shape[1], high - low, -1), 0, 2).reshape(a.shape[1], high - low, -1)

    flat = tuple(t for inside in taps for t in inside)
    first = np.full(len(rows), low)
    weight, size = product(outer, inner), product(np.abs(outer), magnitude)
    return replace(
        b, rows=rows, first=first, weight=weight, size=size, left=np.ones(len(rows)), taps=flat, rounded=rounded
    )


def spread(value: Value, axes: Sequence[int], by: Sequence[int]) -> Value:
    """``value`` with ``by`` - 1 zeros between its elements along ``axes``: what a transposed convolution reads."""
    if not value.is_plain or not value.is_pointwise or any(np.any(v.value) for v in value.vectors.values()):
        raise Unrepresentable("a transposed convolution reads what is not a matrix of channels alone")
    if any(s != 1 for source in value.grids for s in source.spread):
        raise Unrepresentable("two transposed convolutions in a row")
    steps = [1] * len(value.base)
    for axis, step in zip(axes, by, strict=True):
        steps[axis] = step
    moved = {s: replace(s, spread=tuple(steps)) for s in value.grids}
    base = tuple(_spread(e, s) for e, s in zip(value.base, steps, strict=True))
    blocks = tuple(replace(b, source=moved[b.source]) for b in value.blocks)
    return replace(
        value, base=base, view=identity_view(base), blocks=blocks, vectors={},
        grids={moved[s]: g for s, g in value.grids.items()},
    )  # fmt: skip


def padded(
    value: Value, axes: Sequence[int], begin: Sequence[int], end: Sequence[int], fill: Array | float, channel: int
) -> Value:
    """``value`` with elements ``fill`` added along ``axes``, or taken away where an amount is negative.

    ``fill`` is one number, or one for each of the channels, which lie along ``channel``.
    """
    count = value.extents[channel].known
    if count is None:
        raise Unrepresentable("the number of channels is unknown")
    offset = tuple(-b for b in begin)
    kernel = Kernel(
        np.ones((count, 1, 1)), np.arange(count), (offset,), tuple(axes), (1,) * len(axes),
        tuple(-b - e for b, e in zip(begin, end, strict=True)), 0,
    )  # fmt: skip
    moved = convolved(value, kernel, channel)
    if not np.any(fill):
        return moved
    value = promoted(value, channel)
    where = _where_behind(value, None, kernel, offset, moved.grids)
    if where is None:
        return moved
    full, rounded = np.broadcast_to(np.asarray(fill, np.float64), moved.channels), int(np.ndim(fill) > 0)
    outside = [(None, Vector(full, np.abs(full), rounded)), (where, Vector(-full, np.abs(full), rounded))]
    return replace(moved, vectors=_summed(moved.vectors.items(), outside))


def overwritten(value: Value, axis: int, number: int, first: bool, by: Array, channel: int) -> Value:
    """``value`` with its ``first`` or last ``number`` positions along ``axis`` overwritten, ``by`` channel.

    All of them where the extent is less than ``number``, as an assignment to a slice has it.
    """
    begin, end = (number, 0) if first else (0, number)
    left = padded(value, (axis,), (-begin,), (-end,), 0.0, channel)
    return padded(left, (axis,), (begin,), (end,), by, channel)


def sliced(value: Value, axis: int, start: int, end: int, step: int) -> Value:
    """Every ``step``-th element from ``start`` to ``end``, as Python counts: of channels a selection, else a kernel."""
    width = value.extents[axis].known
    if step == 1 and start == 0 and (end >= WHOLE or end == width):
        return value
    if axis < 2 or value.rank < 3 or axis == value.channel:
        if width is None:
            raise Unrepresentable("a slice of an unknown extent")
        return selected(value, range(width)[start:end:step], axis)
    if step < 1:
        raise Unrepresentable("a slice in reverse")
    if width is not None:
        first, stop, _ = slice(start, end, step).indices(width)
        behind = width - stop
    elif start >= 0 and (end < 0 or end >= WHOLE):
        first, behind = start, -end if end < 0 else 0
    else:
        raise Unrepresentable("a slice of an unknown extent")
    owns = [i for i, digits in enumerate(value.view) if any(d.axis == value.channel for d in digits)]
    channel = owns[0] if owns else 1
    count = value.extents[channel].known
    if count is None or channel == axis:
        raise Unrepresentable("the number of channels is unknown")
    kernel = Kernel(np.ones((count, 1, 1)), np.arange(count), ((first,),), (axis,), (step,), (first + behind,), 0)
    return convolved(value, kernel, channel)


WHOLE = 2**30
"""An end of a slice from here on means the end of the axis."""

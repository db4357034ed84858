"""Affine maps between grids of unknown size, in a form that two equal maps share.

A value of a network that is affine in its sources is a sum, over sources x and over *taps*, of

    y[o, p] += W[o, i] * x[i, S*p + a]        for every p with  p >= L  and  S*p + U <= H - 1  along each axis,

and of vectors with guards of the same kind. H is the size of the source, S the stride. Whatever paths lead from x
to y, through paddings, crops and biases that meet a border, all that they ask of a position is one L and one U per
axis. These guards are linearly independent as functions of (p, H), so the map from (source, a, L, U) to the matrix W
is unique: two values are equal for every input and every input size if and only if these maps agree. The proof is in
docs/certificate.md.

Matrices stay as compact as the operators that they come from: a block of rows reads a run of channels each, so a dense
kernel is one array, a depthwise one has one channel a row, and an identity is a vector of ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any, NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from reparamc.certificate.axes import (
    UNIT,
    Dim,
    Unrepresentable,
    View,
    identity_view,
    shape_of,
)
from reparamc.certificate.budget import BLOCK, TAP, UNLIMITED, Meter

Array = npt.NDArray[Any]
RecordT = TypeVar("RecordT")


def replace(record: RecordT, **changes: Any) -> RecordT:
    """As `dataclasses.replace`, which takes several times as long for what is frozen."""
    made, held = object.__new__(type(record)), vars(record)
    vars(made).update({name: held[name] for name in type(record).__dataclass_fields__}, **changes)  # pyright: ignore
    return made


# Values


@dataclass(frozen=True)
class Source:
    """A leaf of a window, seen through ``view``, with ``spread`` - 1 zeros between its elements along each axis."""

    leaf: str
    base: tuple[Dim, ...]
    view: View
    spread: tuple[int, ...]

    @cached_property
    def shape(self) -> tuple[Dim, ...]:
        return tuple(spread_dim(e, s) for e, s in zip(shape_of(self.view), self.spread, strict=True))


def spread_dim(dim: Dim, by: int) -> Dim:
    if by == 1:
        return dim
    return Dim(by * (dim.known - 1) + 1) if dim.known else Dim(1, (f"{by}*({dim})",))


class Guard(NamedTuple):
    """Along one axis: position ``offset`` is read for every p >= low with stride*p + high <= size - 1."""

    offset: int
    low: int
    high: int


Tap = tuple[Guard, ...]
"""One guard for each axis of the base; (0, 0, 0) along the channels."""


class Grid(NamedTuple):
    """How a result lies over a source along one axis: it has floor((size - 1 - delta) / stride) + 1 positions."""

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
"""The guard of a vector, in terms of the sizes of a source; None for everywhere."""


@dataclass(frozen=True, eq=False)
class Value:
    """``view`` of an affine map on a grid with the sizes ``base``.

    Attributes:
        channel: the axis of ``base`` that matrices act on; None while all elements are treated alike, by matrices
            of one row and column.
        grids: one `Grid` for each axis of ``base``, by source.
        loose: axes of ``base`` along which a term of a sum may be repeated, at some input sizes.
        needs: for each axis of ``base``, a source is refused where its size less 1 is below this.
        filled: the sizes that are refused where they are zero.
        whole: (source, axis, grid, block): inputs are refused that give a grid no multiple of ``block`` positions.
        meter: counts what is done with the value.
    """

    base: tuple[Dim, ...]
    channel: int | None
    grids: Mapping[Source, tuple[Grid, ...]]
    blocks: tuple[Block, ...]
    vectors: Mapping[Where, Vector]
    view: View
    loose: frozenset[int] = frozenset()
    meter: Meter = UNLIMITED
    needs: tuple[int, ...] = ()
    filled: frozenset[str] = frozenset()
    whole: frozenset[tuple[Source, int, Grid, int]] = frozenset()

    @property
    def channels(self) -> int:
        return 1 if self.channel is None else self.base[self.channel].factor

    @cached_property
    def shape(self) -> tuple[Dim, ...]:
        return shape_of(self.view)

    @property
    def rank(self) -> int:
        return len(self.view)

    @cached_property
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


def leaf(name: str, shape: Sequence[Dim], meter: Meter = UNLIMITED) -> Value:
    """The value that is the leaf ``name``."""
    base = tuple(shape)
    source = Source(name, base, identity_view(base), (1,) * len(base))
    block = Block(source, _START, _START, np.ones((1, 1, 1)), ONE, ((Guard(0, 0, 0),) * len(base),))
    return Value(base, None, {source: (Grid(),) * len(base)}, (block,), {}, identity_view(base), meter=meter)


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


def with_places(value: Value, axis: int) -> tuple[Value, Array]:
    """``value`` with matrices on what ``axis`` of its layout is made of, and the index along it of every channel."""
    if value.is_plain:
        value = promoted(value, axis)
        return value, np.arange(value.channels)
    digits = value.view[axis]
    owners = {d.axis for d in digits}
    if value.channel is None and len(owners) == 1:
        value = promoted(value, next(iter(owners)))
    if not owners <= {value.channel}:
        raise Unrepresentable("an axis mixes channels and positions")
    rows, index = np.arange(value.channels), np.zeros(value.channels, np.int64)
    for digit in digits:
        dim, inner = digit.dim.factor, digit.inner.factor
        index = index * dim + rows // inner % dim
    return value, index


def scaled(value: Value, factor: Array | float, axis: int | None = None) -> Value:
    """``value`` times a number (``axis`` None), or times a vector along one axis."""
    factor = np.asarray(factor, np.float64)
    if axis is not None:
        value, index = with_places(value, axis)
        factor = factor.reshape(-1)[index]
    by_row = _spread(factor if axis is not None else factor.reshape(()), value.channels)
    one = int(np.any(np.abs(by_row) != 1))
    blocks = tuple(replace(b, left=b.left * by_row[b.rows], rounded=b.rounded + one) for b in value.blocks)
    vectors = {
        w: replace(v, value=v.value * by_row, size=v.size * np.abs(by_row), rounded=v.rounded + one)
        for w, v in value.vectors.items()
    }
    return replace(value, blocks=blocks, vectors=vectors)


def _spread(numbers: Array, count: int) -> Array:
    """One number for each of ``count`` channels."""
    return numbers if numbers.shape == (count,) else np.broadcast_to(numbers, count)


def least_size(value: Value, axis: int) -> int:
    """The smallest size that ``value`` can have along ``axis`` while every source has a position; 0 if unknown."""
    known = value.shape[axis].known
    if known is not None:
        return known
    if not value.is_plain:
        return 0
    return max((-g[axis].delta // g[axis].stride + 1 for g in value.grids.values()), default=0)


def computed(value: Value, magnitude: Value) -> Value:
    """``value``, whose parameters are known up to the rounding of what ``magnitude`` maps."""
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
    return replace(value, blocks=value.blocks + doubts, vectors=summed(value.vectors.items(), vectors))


def shifted(value: Value, term: Array | float, axis: int | None = None, size: Array | None = None) -> Value:
    """``value`` plus a number (``axis`` None), or plus a vector along one axis; ``size``: what that was summed from."""
    term = np.asarray(term, np.float64)
    size = np.abs(term) if size is None else size
    if axis is not None:
        value, index = with_places(value, axis)
        term, size = term.reshape(-1)[index], size.reshape(-1)[index]
    else:
        term, size = term.reshape(()), size.reshape(())
    added = Vector(_spread(term, value.channels), _spread(size, value.channels), 1)
    return replace(value, vectors=summed([(None, added)], value.vectors.items()))


def summed(*parts: Iterable[tuple[Where, Vector]]) -> dict[Where, Vector]:
    found: dict[Where, Vector] = {}
    for part in parts:
        for where, vector in part:
            found[where] = found[where].plus(vector) if where in found else vector
    return found


def added(terms: Sequence[Value]) -> Value:
    """The sum of values of equal sizes."""
    total = terms[0]
    for term in terms[1:]:
        _same_shapes(total.shape, term.shape)
        axis = total.channel if total.channel is not None else term.channel
        if axis is not None and len(total.base) == len(term.base):
            total, term = promoted(total, axis), promoted(term, axis)
        if total.channel != term.channel or not same_layout(total, term):
            raise Unrepresentable("its terms are laid out differently")
        _never_repeated(total.grids, term.grids)
        total = replace(
            total,
            loose=total.loose | term.loose | _loose(total, term),
            grids=grids_of_sum(total.grids, term.grids),
            blocks=_collected(total.blocks + term.blocks, total.meter),
            vectors=summed(total.vectors.items(), term.vectors.items()),
            needs=needed(total.needs, term.needs),
            filled=total.filled | term.filled,
            whole=total.whole | term.whole,
        )
    return total


class Span(NamedTuple):
    """The magnitudes that a value has for sources of magnitude 1.

    Attributes:
        largest: an upper bound of its coefficients.
        least: that of the part with the smallest, leaving out zeros.
        added: the largest number that is added.
    """

    largest: float
    least: float
    added: float

    @property
    def is_ordinary(self) -> bool:
        return self.largest <= 16 and self.least >= 2.0**-6 and self.added <= 256


def span(value: Value) -> Span:
    with np.errstate(all="ignore"):
        sizes = [float(np.abs(b.left).max(initial=0.0) * np.abs(b.weight).max(initial=0.0)) for b in value.blocks]
        added = max((float(np.abs(v.value).max(initial=0.0)) for v in value.vectors.values()), default=0.0)
    return Span(max(sizes, default=1.0), min((s for s in sizes if s), default=1.0), added)


def needed(*needs: tuple[int, ...]) -> tuple[int, ...]:
    """What all of several values need of their sources."""
    return tuple(max(n) for n in zip_longest(*needs, fillvalue=0))


FEW = 16
"""So many blocks may have the same rows and taps: their coefficients are added where they are compared."""


def _collected(blocks: tuple[Block, ...], meter: Meter) -> tuple[Block, ...]:
    """``blocks``; once there are many, those with the same rows and taps are added up."""
    meter.spend(TAP * len(blocks))
    if len(blocks) <= FEW:
        return blocks
    found: dict[Any, list[Block]] = {}
    for b in blocks:
        key = (b.source, b.taps, b.weight.shape, b.rows.tobytes(), b.first.tobytes(), b.computed)
        found.setdefault(key, []).append(b)
    return tuple(_total(alike, meter) for alike in found.values())


def _total(alike: Sequence[Block], meter: Meter) -> Block:
    """The sum of blocks that have the same rows and taps."""
    if len(alike) == 1:
        return alike[0]
    elements = alike[0].weight.size
    meter.spend(2 * len(alike) * elements, 2 * elements)
    weight, size = np.zeros(alike[0].weight.shape), np.zeros(alike[0].weight.shape)
    for b in alike:
        left = b.left[:, None, None]
        weight += left * b.weight
        size += np.abs(left) * (np.abs(b.weight) if b.size is None else b.size)
    one, rounded = np.ones(len(alike[0].rows)), max(b.rounded for b in alike)
    return replace(alike[0], weight=weight, size=size, left=one, rounded=rounded)


def same_layout(a: Value, b: Value) -> bool:
    """Whether two values are laid out alike; sizes of a base that are unknown may have different names."""
    return (a.is_plain and b.is_plain) or a.view == b.view


def _same_shapes(a: Sequence[Dim], b: Sequence[Dim]) -> None:
    """Raise unless the sizes agree, as far as they are known, and neither of two can be repeated along an axis."""
    if len(a) != len(b):
        raise Unrepresentable("its terms have different ranks")
    for m, n in zip(a, b, strict=True):
        if m != n and (UNIT in (m, n) or (m.known is not None and n.known is not None)):
            raise Unrepresentable("one of its terms is repeated along an axis")


def _never_repeated(a: Mapping[Source, tuple[Grid, ...]], b: Mapping[Source, tuple[Grid, ...]]) -> None:
    """Raise where the sizes of two terms differ at some size: one that leaves 1 element is repeated there."""
    for source in a.keys() & b.keys():
        for dim, m, n in zip(source.shape, a[source], b[source], strict=True):
            if dim.known is None and m != n:
                raise Unrepresentable("its terms are of one size for some input sizes only")


def _loose(a: Value, b: Value) -> frozenset[int]:
    """The axes along which one of two terms may be repeated."""
    if not a.grids.keys().isdisjoint(b.grids):
        return frozenset()  # they lie alike over one source
    if a.is_plain and b.is_plain:
        return frozenset(i for i, (m, n) in enumerate(zip(a.base, b.base, strict=True)) if m != n)
    return frozenset(range(len(a.base)) if a.shape != b.shape else ())


def grids_of_sum(
    a: Mapping[Source, tuple[Grid, ...]], b: Mapping[Source, tuple[Grid, ...]]
) -> dict[Source, tuple[Grid, ...]]:
    """The grids of a sum. Where deltas differ, only sizes at which the sizes agree are admitted: the larger holds."""
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
    whole = [unsplit(with_places(t, axis)[0], axis) for t in terms]
    first, at = whole[0], 0
    blocks: list[Block] = []
    grids: Mapping[Source, tuple[Grid, ...]] = {}
    vectors: list[tuple[Where, Vector]] = []
    total = sum(t.channels for t in whole)
    rows = total * (1 + sum(len(t.vectors) for t in whole)) + sum(len(b.rows) for t in whole for b in t.blocks)
    first.meter.spend(16 * rows + BLOCK * sum(len(t.blocks) for t in whole), 4 * rows)
    for t in whole:
        if t.channel != first.channel or len(t.base) != len(first.base):
            raise Unrepresentable("its terms are laid out differently")
        if not first.is_plain and _relabelled(t.view, first.channel, UNIT) != _relabelled(
            first.view, first.channel, UNIT
        ):
            raise Unrepresentable("its terms are laid out differently")
        kept = [i for i in range(len(t.base)) if i != t.channel]
        _same_shapes([t.base[i] for i in kept], [first.base[i] for i in kept])
        blocks += [replace(b, rows=b.rows + at) for b in t.blocks]
        grids = grids_of_sum(grids, t.grids)
        for where, v in t.vectors.items():
            vectors.append((where, v.mapped(lambda a, at=at: np.pad(a, (at, total - at - len(a))))))
        at += t.channels
    loose = frozenset(i for t in whole for i in t.loose)  # what is stacked has one size, or nothing runs
    stack = replace(
        first, grids=grids, blocks=tuple(blocks), vectors=summed(vectors), loose=loose,
        needs=needed(*(t.needs for t in whole)), filled=frozenset[str]().union(*(t.filled for t in whole)),
        whole=_filled(whole).union(*(t.whole for t in whole)),
    )  # fmt: skip
    return with_channels(stack, total, axis)


def _filled(terms: Sequence[Value]) -> frozenset[tuple[Source, int, Grid, int]]:
    """What `Value.whole` says of terms that have one size: of slices that begin at every place of a block."""
    found: set[tuple[Source, int, Grid, int]] = set()
    for source in {s for t in terms for s in t.grids}:
        of_source = [t.grids[source] for t in terms if source in t.grids]
        for axis, grids in enumerate(zip(*of_source, strict=True)):
            deltas, stride = [g.delta for g in grids], grids[0].stride
            step = stride - (max(deltas) - min(deltas))
            alike = axis != terms[0].channel and source.spread[axis] == 1 and {g.stride for g in grids} == {stride}
            if alike and 0 < step < stride and stride % step == 0:
                found.add((source, axis, Grid(step, min(deltas)), stride // step))
    return frozenset(found)


def unsplit(value: Value, axis: int) -> Value:
    """``value``, if all its channels and nothing else lie along ``axis``, in order."""
    if value.channel is None and not value.view[axis] and UNIT in value.base:
        value = promoted(value, value.base.index(UNIT))
    if value.channel is None or value.view[axis] != identity_view(value.base)[value.channel]:
        raise Unrepresentable("an axis mixes channels and positions, or holds only some of the channels")
    return value


def _relabelled(view: View, channel: int | None, dim: Dim) -> View:
    return tuple(tuple(d._replace(dim=dim) if d.axis == channel else d for d in axis) for axis in view)


def with_channels(value: Value, channels: int, axis: int) -> Value:
    """``value``, whose channels lie along ``axis`` of its layout, with another number of them."""
    assert value.channel is not None
    base = tuple(Dim(channels) if i == value.channel else e for i, e in enumerate(value.base))
    if value.is_plain:
        return replace(value, base=base, view=identity_view(base))
    view = list(value.view)
    view[axis] = identity_view(base)[value.channel]
    return replace(value, base=base, view=tuple(view))


def rows_of(value: Value, wanted: Array) -> Value:
    """The channels ``wanted``; the base is the caller's to change."""
    blocks = []
    for b in value.blocks:
        at = np.full(value.channels, -1)
        at[b.rows] = np.arange(len(b.rows))
        chosen = at[wanted]
        rows = np.flatnonzero(chosen >= 0)
        if len(rows):
            blocks.append(taken_rows(b, chosen[rows], rows))
    vectors = {w: v.mapped(lambda a: a[wanted]) for w, v in value.vectors.items()}
    return replace(value, blocks=tuple(blocks), vectors=vectors)


def taken_rows(b: Block, chosen: Array, rows: Array) -> Block:
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

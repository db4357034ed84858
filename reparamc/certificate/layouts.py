"""Layouts of values of a normal form: reshapes, transposes, means, selections and slices.

A layout is moved down to the sources where it can be, so that two values which lie alike have one form. One that makes
channels of positions is the slices that it puts side by side.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import groupby, product

import numpy as np

from reparamc.certificate.axes import (
    UNIT,
    Digit,
    Dim,
    Unrepresentable,
    View,
    composed,
    identity_view,
    joined,
    reshaped,
    shape_of,
)
from reparamc.certificate.kernels import Kernel, convolved
from reparamc.certificate.normal_form import (
    ONE,
    Block,
    Grid,
    Guard,
    Source,
    Tap,
    Value,
    promoted,
    replace,
    rows_of,
    stacked,
    unsplit,
    with_channels,
    with_places,
)


def regrouped(value: Value, target: Sequence[Dim | None]) -> Value:
    """``value`` reshaped; one size may be None, for what is left."""
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


RESIZED = "resized"
"""What the name of a leaf begins with that is a leaf of another name, resized."""


def resized(value: Value, key: Hashable, sizes: Mapping[int, Dim]) -> Value:
    """``value`` with the ``sizes`` along some axes that ``key`` makes of it.

    That is some linear map of positions, which is not looked into: the same one for each channel, with weights that sum
    to 1. So it commutes with matrices of channels, leaves what is added everywhere, and is taken of what a tap reads.
    What is added up to a border is a factor of each channel times a map of ones up to there, which is resized.
    """
    spread = any(s != 1 for source in value.grids for s in source.spread)
    if not value.is_plain or spread or value.channel in sizes:
        raise Unrepresentable("a resize of what is laid out otherwise")
    base = tuple(sizes.get(i, e) for i, e in enumerate(value.base))
    grids: dict[Source, tuple[Grid, ...]] = {}
    blocks: list[Block] = []
    for b in value.blocks:
        for n, tap in enumerate(b.taps):
            source = _resized_tap(b.source, tap, value, base, key)
            grids[source] = (Grid(),) * len(base)
            weight, size = b.weight[:, :, n : n + 1], None if b.size is None else b.size[:, :, n : n + 1]
            blocks.append(replace(b, source=source, weight=weight, size=size, taps=((Guard(0, 0, 0),) * len(base),)))
    rows = np.arange(value.channels)
    for where, vector in value.vectors.items():
        if where is None:
            continue
        source = _resized_tap(where[0], where[1], value, base, (key, "ones"), UNIT)
        grids[source] = (Grid(),) * len(base)
        column, size = vector.value[:, None, None], vector.size[:, None, None]
        tap = ((Guard(0, 0, 0),) * len(base),)
        blocks.append(
            Block(source, rows, rows * 0, column, ONE.repeat(len(rows)), tap, size, vector.rounded, vector.computed)
        )
    vectors = {w: v for w, v in value.vectors.items() if w is None}
    return replace(value, base=base, view=identity_view(base), blocks=tuple(blocks), grids=grids, vectors=vectors)


def _resized_tap(
    s: Source, tap: Tap, value: Value, base: Sequence[Dim], key: Hashable, channels: Dim | None = None
) -> Source:
    """What a tap reads of ``s``, resized, as a leaf: by its name, that of another graph is the same one."""
    shape = tuple((channels or s.shape[i]) if i == value.channel else e for i, e in enumerate(base))
    laid = "" if s.view == identity_view(s.base) else f" as {s.view}"
    whole = all(g == (1, 0) for g in value.grids[s]) and all(g == (0, 0, 0) for g in tap)
    read = "" if whole else f" at {[tuple(g) for g in tap]} of {[tuple(g) for g in value.grids[s]]}"
    return Source(f"{RESIZED} {key}: {s.leaf}{laid}{read}", shape, identity_view(shape), (1,) * len(shape))


def _settled(value: Value) -> Value:
    """``value`` in one form: channels numbered as its layout has them, and that layout at the sources if it can be.

    A layout that splits the channels stays after the matrices, but what it does to positions is moved.
    """
    value = _unwoven(value)
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
                kept.append(Digit(len(groups) - 1, UNIT, shape_of([groups[-1]])[0]))
        view.append(tuple(kept))
    last = len(groups)
    after = tuple(tuple(d._replace(axis=last) if d.axis == -1 else d for d in digits) for digits in view)
    return _moved(value, (*groups, whole), last, after)


def unshuffled(value: Value, block: int, outer: bool) -> Value:
    """Positions along the last two axes as channels: those of one position apart (``outer``), or side by side."""
    at, count = value.rank - 3, block * block
    if value.rank < 3 or block < 1 or (channels := value.shape[at].known) is None:
        raise Unrepresentable("the number of channels is unknown")
    *lead, _, height, width = value.shape
    sizes = [e.over(Dim(block)) for e in (height, width)]
    if (high := sizes[0]) is not None and (wide := sizes[1]) is not None:
        apart = regrouped(value, [*lead, Dim(channels), high, Dim(block), wide, Dim(block)])
        order = [at + 2, at + 4, at, at + 1, at + 3] if outer else [at, at + 2, at + 4, at + 1, at + 3]
        return regrouped(permuted(apart, [*range(at), *order]), [*lead, Dim(channels * count), high, wide])
    whole = stacked(_phases(value, at, {at + 1: block, at + 2: block}), at)
    order = np.arange(count * channels).reshape(count, channels).T.ravel()
    return whole if outer else selected(whole, order.tolist(), at)


def _phases(value: Value, channel: int, blocks: Mapping[int, int]) -> list[Value]:
    """The slices that have one element of each block of positions, where blocks of such sizes fill the axes."""
    axes, sizes, width = tuple(blocks), tuple(blocks.values()), value.shape[channel].factor
    if any(n is not None and n % b for n, b in ((value.shape[a].known, b) for a, b in blocks.items())):
        raise Unrepresentable("blocks that do not fill the map")
    ones, rows = np.ones((width, 1, 1)), np.arange(width)
    return [
        convolved(value, Kernel(ones, rows, (first,), axes, sizes, first, 0), channel)
        for first in product(*map(range, sizes))
    ]


def _unwoven(value: Value) -> Value:
    """``value``, if its layout takes blocks of positions as channels, as the slices that it puts side by side."""
    given, value = value, _lifted(value)
    mixed = [at for at, digits in enumerate(value.view) if len({d.axis for d in digits}) > 1]
    if len(mixed) != 1 or len(value.view) != len(value.base):
        return given
    (at,) = mixed
    digits, count = value.view[at], value.base[at].known
    blocks = {d.axis: d.dim.factor for d in digits if d.axis != at}
    wanted = list(identity_view(value.base))
    for axis, block in blocks.items():
        upper = value.base[axis].over(Dim(block))
        wanted[axis] = () if upper == UNIT or upper is None else (Digit(axis, Dim(block), upper),)
    lower = {Digit(axis, UNIT, Dim(block)) for axis, block in blocks.items()}
    rest = [digits if i == at else of for i, of in enumerate(value.view)]
    wanted[at] = digits
    whole = shape_of([[d for d in digits if d.axis == at]])[0] == value.base[at]
    if count is None or value.channel not in (None, at) or rest != wanted or not whole:
        return given
    if sum(d.axis != at for d in digits) != len(blocks) or not lower <= set(digits):
        return given
    stack = stacked(_phases(replace(value, view=identity_view(value.base)), at, blocks), at)
    steps, after = dict[int, int](), count
    for axis in reversed(blocks):
        steps[axis], after = after, after * blocks[axis]
    rows, number = np.arange(after), np.zeros(after, np.int64)
    for d in reversed(digits):
        number += rows % d.dim.factor * (d.inner.factor if d.axis == at else steps[d.axis])
        rows //= d.dim.factor
    return selected(stack, number.tolist(), at)


def _lifted(value: Value) -> Value:
    """``value`` over its source as that is, what was moved to it moved back; itself where that cannot be told."""
    s = next(iter(value.grids), None)
    if s is None or len(value.grids) > 1 or not value.is_pointwise or any(n != 1 for n in s.spread):
        return value
    base, view, channel = list(s.base), list(s.view), value.channel
    if channel is not None:
        if view[channel] not in (whole := identity_view(base)) or not view[channel]:
            return value
        at, channel = channel, whole.index(view[channel])
        base[channel] = Dim(value.channels)
        view[at] = (Digit(channel, UNIT, base[channel]),)
    source = replace(s, view=identity_view(s.base), spread=(1,) * len(base))
    trivial = (Guard(0, 0, 0),) * len(base)
    blocks = tuple(replace(b, source=source, taps=(trivial,)) for b in value.blocks)
    return replace(
        value, base=tuple(base), channel=channel, view=composed(tuple(view), value.view), blocks=blocks,
        grids={source: (Grid(),) * len(base)}, loose=frozenset(range(len(base)) if value.loose else ()),
        needs=(max(value.needs, default=0),) * len(base),
    )  # fmt: skip


def _moved(value: Value, view: View, at: int | None, after: View | None) -> Value:
    """``view`` of a pointwise value, taken of its sources; axis ``at`` has the channels, and ``after`` stays."""
    base = shape_of(view)
    trivial, grids = (Guard(0, 0, 0),) * len(base), (Grid(),) * len(base)
    moved: dict[Source, Source] = {}
    for s in value.grids:
        of_source = list(view)
        if at is not None:  # there are matrices between: a source has its own number of channels
            assert value.channel is not None
            dim = s.shape[value.channel]
            of_source[at] = (Digit(value.channel, UNIT, dim),) if dim != UNIT else ()
        moved[s] = Source(s.leaf, s.base, composed(s.view, tuple(of_source)), (1,) * len(base))
    # What is averaged over keeps its coefficient, and the mean of a constant is this constant.
    blocks = tuple(replace(b, source=moved[b.source], taps=(trivial,)) for b in value.blocks)
    stays = identity_view(base) if after is None else after
    loose = frozenset(range(len(base)) if value.loose else ())
    needs = (max(value.needs, default=0),) * len(base)
    grids = dict.fromkeys(moved.values(), grids)
    return Value(base, at, grids, blocks, value.vectors, stays, loose, value.meter, needs, value.filled)


def _unshuffled(value: Value) -> Value:
    """``value``, all of whose elements are treated alike, with a shuffle along one axis written as a selection."""
    for source in value.grids:
        for axis, digits in enumerate(source.view):
            owners = {d.axis for d in digits}
            total = shape_of([digits])[0]
            if len(digits) < 2 or len(owners) > 1 or total != source.base[digits[0].axis] or total.known is None:
                continue
            places = np.zeros(total.known, np.int64)
            for d in digits:
                places = places * d.dim.factor + np.arange(total.known) // d.inner.factor % d.dim.factor
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
    """``value`` with its channels in the order that their digits have in the layout."""
    digits = [d for ds in value.view for d in ds if d.axis == channel]
    total = 1
    for d in digits:
        total *= d.dim.factor
    if total != value.channels:
        raise Unrepresentable("a mean over channels")
    inner = [d.inner.factor for d in digits]
    if inner == sorted(inner, reverse=True):
        return value
    order = np.zeros(value.channels, np.int64)
    rows = np.arange(value.channels)
    for d in digits:
        order = order * d.dim.factor + rows // d.inner.factor % d.dim.factor
    value = rows_of(value, np.argsort(order))
    rest, view = total, []
    for ds in value.view:
        new = []
        for d in ds:
            if d.axis == channel:
                rest //= d.dim.factor
                d = Digit(channel, Dim(rest), d.dim)
            new.append(d)
        view.append(joined(new))
    return replace(value, view=tuple(view))


def taken(value: Value, at: int, axis: int) -> Value:
    """The position ``at`` along ``axis``, which goes."""
    found = selected(value, [at], axis)
    return regrouped(found, [e for i, e in enumerate(found.shape) if i != axis])


def repeated(value: Value, times: int, axis: int) -> Value:
    """``value`` that many times over along ``axis``, which holds its channels and nothing else."""
    if times == 1:
        return value
    value = unsplit(with_places(value, axis)[0], axis)
    count = value.channels * times
    value.meter.spend(16 * count * (1 + len(value.blocks) + len(value.vectors)), 4 * count)
    return with_channels(rows_of(value, np.tile(np.arange(value.channels), times)), count, axis)


def selected(value: Value, index: Sequence[int], axis: int) -> Value:
    """The elements ``index`` along ``axis``, which is made of channels."""
    if value.shape[axis] == UNIT and list(index) == [0]:
        return value
    value.meter.spend(8 * (len(index) + (value.shape[axis].known or 0)))
    value, places = with_places(value, axis)
    channel = value.channel
    if channel is None:
        raise Unrepresentable("a selection along an axis of size 1")
    wanted = np.asarray(index, np.int64)
    if value.view[axis] == identity_view(value.base)[channel]:
        return with_channels(rows_of(value, wanted), len(wanted), axis)
    kept = value.channels // (value.shape[axis].known or 1) * len(wanted)
    if UNIT in (value.base[channel], Dim(kept)) or not value.view[axis]:
        raise Unrepresentable("a selection leaves an axis without channels")
    # Number the channels as the digits are ordered in the layout, with one digit for the axis itself.
    digits = [(i, d) for i, ds in enumerate(value.view) for d in ds if d.axis == channel]
    rows, size = np.arange(value.channels), value.shape[axis].factor
    numbers, done = np.zeros(value.channels, np.int64), False
    for i, d in digits:
        if i != axis:
            numbers = numbers * d.dim.factor + rows // d.inner.factor % d.dim.factor
        elif not done:
            numbers, done = numbers * size + places, True
    order = np.argsort(numbers)
    after = 1
    seen = False
    for i, d in digits:
        if i == axis:
            seen = True
        elif seen:
            after *= d.dim.factor
    table = order.reshape(-1, size, after)[:, wanted].reshape(-1)
    inner, view = len(table), [list(ds) for ds in value.view]
    done = False
    for i, ds in enumerate(value.view):
        new: list[Digit] = []
        for d in ds:
            dim = len(wanted) if i == axis else d.dim.factor
            if d.axis != channel or (i == axis and done):
                new += [d] if d.axis != channel else []
                continue
            done = done or i == axis
            inner //= dim
            new.append(Digit(channel, Dim(inner), Dim(dim)))
        view[i] = new
    base = tuple(Dim(len(table)) if i == channel else e for i, e in enumerate(value.base))
    return _settled(replace(rows_of(value, table), base=base, view=tuple(joined(ds) for ds in view)))


def sliced(value: Value, axis: int, start: int, end: int, step: int) -> Value:
    """Every ``step``-th element from ``start`` to ``end``, as Python counts: of channels a selection, else a kernel."""
    width = value.shape[axis].known
    if step == 1 and start == 0 and (end >= WHOLE or end == width):
        return value
    if axis < 2 or value.rank < 3 or axis == value.channel:
        if width is None:
            raise Unrepresentable("a slice of an unknown size")
        return selected(value, range(width)[start:end:step], axis)
    if step < 1:
        raise Unrepresentable("a slice in reverse")
    if width is not None:
        first, stop, _ = slice(start, end, step).indices(width)
        after = width - stop
    elif start >= 0 and (end < 0 or end >= WHOLE):
        first, after = start, -end if end < 0 else 0
    else:
        raise Unrepresentable("a slice of an unknown size")
    owns = [i for i, digits in enumerate(value.view) if any(d.axis == value.channel for d in digits)]
    channel = owns[0] if owns else 1
    count = value.shape[channel].known
    if count is None or channel == axis:
        raise Unrepresentable("the number of channels is unknown")
    kernel = Kernel(np.ones((count, 1, 1)), np.arange(count), ((first,),), (axis,), (step,), (first + after,), 0)
    return convolved(value, kernel, channel)


WHOLE = 2**30
"""An end of a slice from here on means the end of the axis."""

"""Kernels of values of a normal form: convolutions, matrices and paddings, and what they do to guards."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from reparamc.certificate.axes import Digit, Dim, Unrepresentable, identity_view, joined
from reparamc.certificate.budget import PRODUCT, TAP
from reparamc.certificate.normal_form import (
    Array,
    Block,
    Grid,
    Guard,
    Source,
    Tap,
    Value,
    Vector,
    Where,
    needed,
    promoted,
    replace,
    rows_of,
    spread_dim,
    summed,
    taken_rows,
    unsplit,
    with_channels,
    with_places,
)


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

    @property
    def is_matrix(self) -> bool:
        """Whether it reads each position alone, where it is."""
        plain = all(s == 1 for s in self.stride) and not any(self.delta) and len(self.offsets) == 1
        return plain and not any(self.offsets[0])


def grouped_first(rows: int, columns: int, groups: int) -> Array:
    """The first channel that each of ``rows`` reads, of a kernel of that many groups with ``columns`` channels each."""
    return np.repeat(np.arange(groups) * columns, rows // groups)


def mixed(value: Value, matrix: Array, axis: int) -> Value:
    """``matrix`` (O, C) applied along ``axis``."""
    first = np.zeros(len(matrix), np.int64)
    return convolved(value, Kernel(matrix[:, :, None], first, ((),), (), (), ()), axis)


def convolved(value: Value, kernel: Kernel, axis: int) -> Value:
    """A kernel applied to a value whose channels lie along ``axis``."""
    if not value.is_plain and kernel.is_matrix:
        kernel = replace(kernel, axes=(), offsets=((),), stride=(), delta=())
        value, places = with_places(value, axis)
        if value.channels > len(np.unique(places)) > 1:
            return _on_part(value, kernel, axis, places)
    value = unsplit(with_places(value, axis)[0], axis)
    if kernel.axes and not value.is_plain:
        raise Unrepresentable("a kernel reads a layout that cannot be moved down to the sources")
    _one_size(value, kernel)
    if value.channels < int(kernel.first.max(initial=0)) + kernel.weight.shape[1]:
        raise Unrepresentable("a weight does not fit the channels of its operand")
    _spend(value, kernel)
    grids = {s: _grids_after(g, kernel) for s, g in value.grids.items()}
    blocks = [
        c for b in value.blocks for c in _compose(kernel, b, value.grids[b.source], grids[b.source], value.channels)
    ]
    parts: list[tuple[Where, Vector]] = []
    for where, vector in value.vectors.items():
        rounded = vector.rounded + kernel.rounded
        by_tap = zip(*_applied(kernel, vector), strict=True)
        for offset, (out, size) in zip(kernel.offsets, by_tap, strict=True):
            at = _where_after(value, where, kernel, offset, grids)
            parts.append((at, Vector(out, size, rounded, vector.computed)))
    base = list(value.base)
    for axis_, s, d in zip(kernel.axes, kernel.stride, kernel.delta, strict=True):
        base[axis_] = _dim_after(base[axis_], s, d)
    needs = needed(value.needs, *(tuple(g.delta for g in of) for of in grids.values()), (0,) * len(base))
    resized = with_channels(
        replace(value, grids=grids, blocks=tuple(blocks), vectors=summed(parts), needs=needs), len(kernel.weight), axis
    )
    assert value.channel is not None
    base[value.channel] = Dim(len(kernel.weight))
    return replace(resized, base=tuple(base), view=identity_view(base)) if kernel.axes else resized


def _on_part(value: Value, kernel: Kernel, axis: int, places: Array) -> Value:
    """A matrix along an axis that has some digits of the channels, ``places``: the same one for all that differ there.

    Channels are numbered with these digits last, for the matrices side by side, and then as the layout has them.
    """
    channel, size, made = value.channel, value.shape[axis].factor, len(kernel.weight)
    assert channel is not None
    digits = [(at, d) for at, of in enumerate(value.view) for d in of if d.axis == channel]
    rows = np.arange(value.channels)
    rest = np.zeros(value.channels, np.int64)
    for at, d in digits:
        if at != axis:
            rest = rest * d.dim.factor + rows // d.inner.factor % d.dim.factor
    times = value.channels // size
    first = (np.arange(times)[:, None] * size + kernel.first).ravel()
    wide = replace(kernel, weight=np.tile(kernel.weight, (times, 1, 1)), first=first)
    apart = replace(rows_of(value, np.argsort(rest * size + places)), view=identity_view(value.base))
    done = convolved(apart, wide, channel)
    seen, left, inner = False, times, times * made
    rows, number = np.arange(inner), np.zeros(inner, np.int64)
    view = [[d for d in of if d.axis != channel] if at == axis else list(of) for at, of in enumerate(value.view)]
    for at, d in digits:
        if at == axis and seen:
            continue
        seen = seen or at == axis
        dim = made if at == axis else d.dim.factor
        left = left if at == axis else left // dim
        inner //= dim
        number = number * dim + (rows % made if at == axis else rows // made // left % dim)
        new = Digit(channel, Dim(inner), Dim(dim))
        view[at] = [*view[at], new] if at == axis else [new if o is d else o for o in view[at]]
    return replace(rows_of(done, np.argsort(number)), view=tuple(joined(of) for of in view))


def _spend(value: Value, kernel: Kernel) -> None:
    """Count what it takes to multiply a kernel with all that is known of its operand."""
    rows, width, taps = kernel.weight.shape
    axes = len(value.base)
    value.meter.spend(kernel.weight.size * len(value.vectors) + TAP * taps * axes * max(1, len(value.vectors)))
    for b in value.blocks:
        inner, many, read = b.weight.shape[1], taps * len(b.taps), min(width, len(b.rows))
        if width > 1 and inner > 1:  # dense over all channels that are read
            reach = int(b.first.max() - b.first.min()) + inner if len(b.rows) else 0
            value.meter.spend(PRODUCT * 2 * rows * read * reach * many, 2 * rows * reach * many)
        elif b.size is not None or len(b.taps) > 1 or not np.all(b.left * b.weight[:, 0, 0] == 1):
            made = (2 if b.size is not None else 1) * rows * max(read, inner) * many
            value.meter.spend(2 * made, made)
        value.meter.spend(TAP * many * axes)


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


def _dim_after(dim: Dim, stride: int, delta: int) -> Dim:
    if dim.known is not None:
        return Dim((dim.known - 1 - delta) // stride + 1)
    return dim if (stride, delta) == (1, 0) else Dim(1, (f"(({dim.factor}{dim.symbols}) - {delta}) / {stride}",))


def _grids_after(grids: Sequence[Grid], kernel: Kernel) -> tuple[Grid, ...]:
    found = list(grids)
    for axis, s, d in zip(kernel.axes, kernel.stride, kernel.delta, strict=True):
        g = found[axis]
        found[axis] = Grid(g.stride * s, g.stride * d + g.delta)
    return tuple(found)


def _tap_after(tap: Tap, kernel: Kernel, offset: Sequence[int], grids: Sequence[Grid], after: Sequence[Grid]) -> Tap:
    """The tap at which a kernel's tap ``offset`` reads what ``tap`` of the inner map gives."""
    found = list(tap)
    for axis, s, b in zip(kernel.axes, kernel.stride, offset, strict=True):
        g, stride = found[axis], grids[axis].stride
        found[axis] = Guard(
            stride * b + g.offset, max(0, -((b - g.low) // s)), max(after[axis].delta, stride * b + g.high)
        )
    return tuple(found)


def _where_after(
    value: Value, where: Where, kernel: Kernel, offset: Sequence[int], after: Mapping[Source, tuple[Grid, ...]]
) -> Where:
    """The guard of what a vector becomes after one tap: that the tap reads no padding, and what held before."""
    inside = all(b >= 0 and b <= d for b, d in zip(offset, kernel.delta, strict=True))
    if where is None and inside:
        return None
    if not value.grids:
        raise Unrepresentable("a constant map meets a border")
    source = where[0] if where is not None else min(value.grids, key=lambda s: (s.leaf, str(s)))
    grids = value.grids[source]
    tap = where[1] if where is not None else tuple(Guard(0, 0, g.delta) for g in grids)
    return _plain_where(source, _tap_after(tap, kernel, offset, grids, after[source]), after[source])


def _plain_where(source: Source, tap: Tap, grids: Sequence[Grid]) -> Where:
    plain = tuple(Guard(0, g.low, max(g.high, grid.delta)) for g, grid in zip(tap, grids, strict=True))
    return None if all(g == (0, 0, d.delta) for g, d in zip(plain, grids, strict=True)) else (source, plain)


def _compose(kernel: Kernel, b: Block, grids: Sequence[Grid], after: Sequence[Grid], channels: int) -> list[Block]:
    """The product of a kernel and a block."""
    taps = [tuple(_tap_after(t, kernel, o, grids, after) for t in b.taps) for o in kernel.offsets]
    rows, width = np.arange(len(kernel.weight)), kernel.weight.shape[1]
    rounded = b.rounded + kernel.rounded
    at = np.full(channels, -1)
    at[b.rows] = np.arange(len(b.rows))
    if width == 1:  # each row reads one channel: the rows of the block in another order, with a factor
        chosen = at[kernel.first]
        kept = np.flatnonzero(chosen >= 0)
        taken = taken_rows(b, chosen[kept], rows[kept])
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
        part = taken_rows(b, members, members)
        follows = np.all(np.diff(part.first) == 1)
        if b.weight.shape[1] == 1 and follows:
            found.append(_times_diagonal(w, part, group, np.zeros(len(group), np.int64), taps, rounded))
        else:
            found.append(_times_matrix(w, part, group, taps, rounded))
    return found


def _times_diagonal(
    w: Array, b: Block, rows: Array, start: Array, taps: Sequence[tuple[Tap, ...]], rounded: int
) -> Block:
    """A matrix for each tap, times a block whose every row reads the next channel.

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
    base = tuple(spread_dim(e, s) for e, s in zip(value.base, steps, strict=True))
    blocks = tuple(replace(b, source=moved[b.source]) for b in value.blocks)
    return replace(
        value, base=base, view=identity_view(base), blocks=blocks, vectors={},
        grids={moved[s]: g for s, g in value.grids.items()},
    )  # fmt: skip


def padded(
    value: Value, axes: Sequence[int], begin: Sequence[int], end: Sequence[int], fill: Array | float, channel: int
) -> Value:
    """``value`` with elements ``fill`` added along ``axes``, or taken away where an amount is negative.

    ``fill`` is a scalar, or one for each of the channels, which lie along ``channel``.
    """
    count = value.shape[channel].known
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
    where = _where_after(value, None, kernel, offset, moved.grids)
    if where is None:
        return moved
    full, rounded = np.broadcast_to(np.asarray(fill, np.float64), moved.channels), int(np.ndim(fill) > 0)
    outside = [(None, Vector(full, np.abs(full), rounded)), (where, Vector(-full, np.abs(full), rounded))]
    return replace(moved, vectors=summed(moved.vectors.items(), outside))


def overwritten(value: Value, axis: int, number: int, first: bool, by: Array, channel: int) -> Value:
    """``value`` with its ``first`` or last ``number`` positions along ``axis`` overwritten, ``by`` channel.

    All of them where the size is less than ``number``, as an assignment to a slice has it.
    """
    begin, end = (number, 0) if first else (0, number)
    left = padded(value, (axis,), (-begin,), (-end,), 0.0, channel)
    return padded(left, (axis,), (begin,), (end,), by, channel)


def _one_size(value: Value, kernel: Kernel) -> None:
    """Raise if a kernel meets the border of a sum, of whose terms one may be repeated: it would meet others then."""
    for axis, stride, delta, *taps in zip(kernel.axes, kernel.stride, kernel.delta, *kernel.offsets, strict=True):
        if axis in value.loose and (stride, delta, *taps) != (1, 0, 0):
            raise Unrepresentable("a kernel reads a sum with a term that may be repeated along an axis")

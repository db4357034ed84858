"""Whether two normal forms agree: coefficient by coefficient, each held to its own rounding.

The one that was emitted holds parameters that were rounded once, so a coefficient may differ by half a unit in the
last place for each parameter that it is a product of. What float64 itself loses on the way is bounded by the
magnitudes that a coefficient was added up from. Nothing is compared relative to the largest channel.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from reparamc.certificate.axes import Dim, Unrepresentable
from reparamc.certificate.budget import ELEMENTS, TAP, Exceeded
from reparamc.certificate.normal_form import (
    Array,
    Block,
    Grid,
    Guard,
    Source,
    Tap,
    Value,
    Vector,
    promoted,
    same_layout,
)

DOUBLE = 2.0**-53
LOSS = 256 * DOUBLE
"""What float64 loses, relative to the sum of the magnitudes of what was added: some hundred roundings at worst."""

ON_THE_WAY = 8
"""How often what a model computes from parameters may be rounded differently, in units of the magnitudes it has."""

TRACE = 2.0**-100
"""What a model computes from constants and is smaller, and no normal number of its dtype, may be zero in a runtime."""

CHUNK = 1 << 16
"""Coefficients compared at a time: few enough for a processor's cache."""


class Precision(NamedTuple):
    """Of a stored dtype: half the distance of neighbours, relative (``unit``), and of subnormal numbers (``tiny``)."""

    unit: float
    tiny: float


@dataclass
class Agreement:
    """What the comparison of two values found.

    Attributes:
        verdict: "equal", "different", or "undecided" where the forms differ in more than coefficients.
        units: the largest difference of coefficients, in units of its bound; equal means at most 1.
        bound: how far the results can lie apart, relative to the sum of the magnitudes of all products: the worst row.
        reason: what differs, or why that cannot be said.
        excess: the largest difference in roundings of all that a coefficient was added up from, in either value: how
            far it is off for those who fold in the dtype of the parameters. In 16 bits, where a few roundings are a
            lot, in eighths of one.
    """

    verdict: str = "equal"
    units: float = 0.0
    bound: float = 0.0
    reason: str = ""
    excess: float = 0.0


def _apart(reason: str) -> Agreement:
    return Agreement("different", np.inf, np.inf, reason, np.inf)


@dataclass
class _Sums:
    """Per row: differences and magnitudes of all its coefficients, and the worst single difference met."""

    error: Array
    total: Array
    units: float = 0.0
    reason: str = ""
    excess: float = 0.0
    guards_only: bool = True

    def enter(self, ratio: float, reason: str, excess: float = 0.0, is_guarded_vector: bool = False) -> None:
        if ratio > 1 and not is_guarded_vector:
            self.guards_only = False
        self.excess = max(self.excess, excess)
        if not ratio <= self.units:
            self.units, self.reason = ratio, reason


def agree(original: Value, emitted: Value, precision: Precision) -> Agreement:
    """Compare two values of one tensor, for every size of their sources; failing that, for those that are known."""
    try:
        axis = original.channel if original.channel is not None else emitted.channel
        if axis is not None and len(original.base) == len(emitted.base):
            original, emitted = promoted(original, axis), promoted(emitted, axis)
    except Unrepresentable as error:
        return Agreement("undecided", reason=str(error))
    if reason := _shape_difference(original.shape, emitted.shape):
        return _apart(reason)
    if original.channel != emitted.channel or not same_layout(original, emitted):
        return Agreement("undecided", reason="the two are laid out differently")
    if original.channels != emitted.channels:
        return _apart(f"{original.channels} channels against {emitted.channels}")
    if original.loose - emitted.loose:
        return Agreement("undecided", reason="a term may be repeated along an axis, in one of the two alone")
    found = _agree(original, emitted, precision, fixed=False)
    if found.verdict != "equal" and any(
        e.known is not None and grid != (1, 0)
        for value in (original, emitted)
        for source, grids in value.grids.items()
        for e, grid in zip(source.shape, grids, strict=True)
    ):
        at_these = _agree(original, emitted, precision, fixed=True)
        found = at_these if at_these.verdict == "equal" or found.verdict == "undecided" else found
    if found.verdict == "equal" and (reason := _refusal(original, emitted)):
        return Agreement("undecided", found.units, found.bound, reason)
    return found


def _refusal(original: Value, emitted: Value) -> str:
    """Why the second may refuse an input that the first takes; empty where it does not."""
    if not emitted.filled <= original.filled:
        return "the result refuses inputs without elements"
    for axis, need in enumerate(emitted.needs):
        admitted = original.needs[axis] if axis < len(original.needs) else 0
        sizes = {s.shape[axis].known for s in emitted.grids}
        if need > admitted and any(size is None or size <= need for size in sizes):
            return "the result refuses small inputs"
    return ""


def _agree(original: Value, emitted: Value, precision: Precision, fixed: bool) -> Agreement:
    sources = list(dict.fromkeys([*original.grids, *emitted.grids]))
    frames: dict[Source, _Frame] = {}
    averaged = _averaged_axes(original)
    for source in sources:
        whole = tuple((axis, grid, block) for of, axis, grid, block in original.whole if of == source)
        frame = _Frame(source, (), averaged, fixed, whole)
        both = [frame.of_grids(value.grids[source]) for value in (original, emitted) if source in value.grids]
        if len(set(both)) > 1:
            strides = [[g.stride for g in grid] for grid in both]
            if any(m.stride != n.stride and _is_single(e, m, n) for e, m, n in zip(source.shape, *both, strict=True)):
                return Agreement("undecided", reason="strides differ along an axis with one position")
            if strides[0] != strides[1]:
                return _apart(f"strides {strides[0]} against {strides[1]}")
            deltas = [[g.delta for g in grid] for grid in both]
            if any(abs(m.delta - n.delta) >= m.stride for m, n in zip(*both, strict=True)):
                return _apart(f"sizes smaller by {deltas[0]} against {deltas[1]}")
            return Agreement("undecided", reason="the sizes of the two agree for some input sizes only")
        frames[source] = frame._replace(grids=both[0])
    names = [source.leaf for source in sources]
    unique = len(set(names)) == len(names)
    sums = _Sums(np.zeros(original.channels), np.zeros(original.channels))
    with np.errstate(all="ignore"):  # what is not finite is compared as what it is
        for source in sources:
            mine, other = ([b for b in v.blocks if b.source == source] for v in (original, emitted))
            _compare_blocks(mine, other, original, frames[source], precision, sums)
        _compare_vectors(original, emitted, frames, precision, sums)
        spread = float(np.max(np.where(sums.error > 0, sums.error / sums.total, 0), initial=0.0))
    if sums.units <= 1:
        if not original.grids.keys() & emitted.grids.keys() and not _same_shapes(original, emitted):
            return Agreement("undecided", sums.units, spread, "nothing shows that the two have the same sizes")
        if original.grids.keys() != emitted.grids.keys() and any(e.known == 0 for e in original.shape):
            return Agreement("undecided", sums.units, spread, "no element is left, as far as shapes can be inferred")
        return Agreement("equal", sums.units, spread)
    if not unique:
        return Agreement("undecided", sums.units, spread, "one source is read in several layouts")
    if any(
        step > 1 and (grid.stride > 1 or axis in averaged)
        for source in sources
        for axis, (grid, step) in enumerate(zip(frames[source].grids, source.spread, strict=True))
    ):
        return Agreement("undecided", sums.units, spread, "a strided kernel or a mean reads a transposed convolution")
    if averaged and (sums.guards_only or _splits(original)):
        return Agreement("undecided", sums.units, spread, "a mean hides the border: " + sums.reason)
    return Agreement("different", sums.units, spread, sums.reason, sums.excess)


class _Frame(NamedTuple):
    """What the taps of one source are brought to one form by.

    Attributes:
        averaged: axes that the mean is taken of.
        fixed: whether sizes that are known are taken for the only ones.
        whole: (axis, grid, block): the positions of this grid are a multiple of the block.
    """

    source: Source
    grids: tuple[Grid, ...]
    averaged: tuple[int, ...]
    fixed: bool
    whole: tuple[tuple[int, Grid, int], ...]

    def last(self, axis: int, high: int, stride: int) -> int:
        """The largest bound of a guard that is as good as ``high`` at all sizes that there are."""
        dim = self.source.shape[axis]
        if self.fixed and dim.known is not None:
            return (dim.known - 1) - stride * ((dim.known - 1 - high) // stride)
        for at, grid, block in self.whole:
            period = grid.stride * block
            # The last position of the grid is less than a step from the end. Bounds within a block are the same one
            # wherever in this step the end is.
            rest = (high - grid.delta) % period
            if at == axis and not stride % period and rest <= period - grid.stride:
                high += period - grid.stride - rest
        return high

    def of_grids(self, grids: Sequence[Grid]) -> tuple[Grid, ...]:
        """``grids`` with the largest deltas that give as many positions."""
        return tuple(Grid(g.stride, self.last(axis, g.delta, g.stride)) for axis, g in enumerate(grids))


def _is_single(dim: Dim, *grids: Grid) -> bool:
    """Whether the grids have one position at most, so that their strides mean nothing."""
    return dim.known is not None and all(dim.known - 1 - g.delta < g.stride for g in grids)


def _shape_difference(a: Sequence[Dim], b: Sequence[Dim]) -> str:
    if len(a) != len(b):
        return f"{len(a)} axes against {len(b)}"
    for axis, (m, n) in enumerate(zip(a, b, strict=True)):
        if m.known is not None and n.known is not None and m != n:
            return f"axis {axis} has {m.known} elements against {n.known}"
    return ""


def _same_shapes(a: Value, b: Value) -> bool:
    """Whether the sizes agree by what is known of them; those of values that read one source do in any case."""
    return all(m == n for m, n in zip(a.shape, b.shape, strict=True))


def _averaged_axes(value: Value) -> tuple[int, ...]:
    """Axes of the base that a layout takes the mean of, at least in part."""
    kept = {digit.axis for axis in value.view for digit in axis}
    return tuple(i for i, e in enumerate(value.base) if i not in kept and e != Dim())


def _splits(value: Value) -> bool:
    """Whether an axis other than the channels is split."""
    return any(d.axis != value.channel and d.dim != value.base[d.axis] for axis in value.view for d in axis)


def _key(tap: Tap, frame: _Frame) -> Tap | None:
    """``tap`` in the form that equal functions of position and size share; None if it reads nothing at all."""
    found: list[Guard] = []
    source = frame.source
    for axis, (guard, grid, step, dim) in enumerate(zip(tap, frame.grids, source.spread, source.shape, strict=True)):
        if guard == (0, 0, 0) and grid == (1, 0) and step == 1 and dim.factor:  # each position reads itself
            found.append(guard)
            continue
        offset, low, high = guard.offset, max(guard.low, 0), max(guard.high, grid.delta)
        if step > 1:  # only every step-th element is none of the zeros in between
            if grid.stride == 1:
                low += (-offset - low) % step
                high += (offset - high) % step
        else:
            high = frame.last(axis, high, grid.stride)
            if frame.fixed and dim.known is not None and grid.stride * low + high > dim.known - 1:
                return None
        if axis in frame.averaged and step == 1:  # all that counts is which elements are read
            offset, low, high = offset + grid.stride * low, 0, high + grid.stride * low
        found.append(Guard(offset, low, high))
    return tuple(found)


def _compare_blocks(
    original: Sequence[Block],
    emitted: Sequence[Block],
    value: Value,
    frame: _Frame,
    precision: Precision,
    sums: _Sums,
) -> None:
    # What has most taps comes first: it is likely to fill the whole array.
    both = [sorted(of, key=lambda b: -len(b.taps)) for of in (original, emitted)]
    blocks = both[0] + both[1]
    value.meter.spend(TAP * sum(len(b.taps) for b in blocks) * len(value.base))
    columns: dict[Tap, int] = {}
    places: dict[int, Array] = {}
    for b in blocks:
        keys = [_key(tap, frame) for tap in b.taps]
        places[id(b)] = np.array([-1 if k is None else columns.setdefault(k, len(columns)) for k in keys])
    taps = list(columns)
    low = np.full(value.channels, np.iinfo(np.int64).max)
    high = np.zeros(value.channels, np.int64)
    for b in blocks:
        low[b.rows] = np.minimum(low[b.rows], b.first)
        high[b.rows] = np.maximum(high[b.rows], b.first + b.weight.shape[1])
    width = int((high - low).max(initial=0))
    if width <= 0 or not columns:
        return
    value.meter.spend(4 * value.channels * width * len(taps))
    if 16 * width * len(taps) > ELEMENTS:
        raise Exceeded("one row of a kernel has too many taps")
    low[high == 0] = 0
    step = min(max(1, CHUNK // (width * len(taps))), value.channels)
    rounded = max((b.rounded for b in emitted), default=0)
    added = sum((v.size for v in value.vectors.values()), np.zeros(value.channels))
    mine, other = ([_Part(b, places[id(b)], low, len(taps)) for b in of if len(b.rows)] for of in both)
    doubts = [p for p in mine if p.block.computed]
    for start in range(0, value.channels, step):
        shape = (min(step, value.channels - start), width, len(taps))
        a, e = _total(mine, shape, start), _total(other, shape, start)
        gap, size = np.abs(a - e), np.abs(e)
        at = slice(start, start + shape[0])
        sums.error[at] += gap.sum(axis=(1, 2))
        sums.total[at] += size.sum(axis=(1, 2))
        allowed = size * (precision.unit * rounded)
        if rounded and np.isfinite(gap).all() and (gap <= allowed).all():  # no cancellation need be looked for
            sums.enter(float(np.nanmax(gap / allowed, initial=0.0)), "")
            continue
        sizes = [_total(parts, shape, start, True) for parts in (mine, other)]
        # A kernel that was asked for is the difference of two results, which hold the vectors of the row as well.
        allowed = sizes[1] * (precision.unit * rounded) + sizes[0] * LOSS + 16 * DOUBLE * added[at, None, None]
        if doubts:
            allowed += _total(doubts, shape, start, True) * (precision.unit * ON_THE_WAY)
        ratio = _ratio(a, e, allowed + (precision.tiny if rounded else 0.0))
        worst = float(ratio.max(initial=0.0))
        if worst > sums.units:
            row, column, tap = at_worst = np.unravel_index(int(ratio.argmax()), shape)
            channel = int(low[start + row]) + int(column)
            place = _place(taps[tap], value, frame.grids)
            said = f"channel {start + row} reads channel {channel} of {frame.source.leaf!r} {place}"
            said += f" with weight {a[at_worst]:.8g}, and {e[at_worst]:.8g} in the result"
            sums.enter(worst, said, _excess(gap, ratio, sizes, precision))


def _ratio(a: Array, e: Array, allowed: Array) -> Array:
    """How far two arrays are apart, in units of what is ``allowed``; 0 where both are the same infinity or NaN."""
    gap = np.abs(a - e)
    ratio = np.divide(gap, allowed, out=np.where(gap == 0, 0.0, np.inf), where=allowed > 0)
    same = (a == e) | (np.isnan(a) & np.isnan(e))
    return np.where(same, 0.0, np.where(np.isfinite(gap), ratio, np.inf))


def _excess(gap: Array, ratio: Array, sizes: Sequence[Array], precision: Precision) -> float:
    beyond = np.where(ratio > 1, np.nan_to_num(gap, nan=np.inf), 0.0)
    unit = precision.unit / (8 if precision.unit >= 2.0**-11 else 1)
    return float(np.nanmax(beyond / (unit * (sizes[0] + sizes[1])), initial=0.0))


class _Part:
    """A block, laid over an array (rows, width, taps) whose row r begins at channel ``low[r]``."""

    def __init__(self, block: Block, columns: Array, low: Array, taps: int) -> None:
        self.block = block
        self.kept = columns >= 0  # taps that read something
        self.columns = columns[self.kept]
        rows = block.rows
        self.shift = block.first - low[rows]
        whole = bool(np.array_equal(columns, np.arange(taps)))
        # A run of rows over the same channels is a slice of the array.
        is_run = rows[-1] - rows[0] == len(rows) - 1 and bool(np.all(self.shift == self.shift[0]))
        self.is_slice = is_run and (whole or len(self.columns) == 1)
        if self.is_slice:
            self.at = slice(None) if whole else slice(self.columns[0], self.columns[0] + 1)

    def rows(self, first: int, last: int, magnitude: bool) -> Array:
        """What its own rows from ``first`` to ``last`` have, or the magnitudes of that: float64 (rows, width, taps)."""
        b = self.block
        weight, left = (b.size if magnitude and b.size is not None else b.weight)[first:last], b.left[first:last]
        if not self.kept.all():
            weight = weight[:, :, self.kept]
        if magnitude:
            weight, left = np.abs(weight), np.abs(left)
        return weight.astype(np.float64, copy=False) if np.all(left == 1) else weight * left[:, None, None]

    def covers(self, shape: tuple[int, ...], start: int) -> bool:
        """Whether the rows from ``start`` on, of this shape, are its own."""
        b = self.block
        if not self.is_slice or self.shift[0] or (b.weight.shape[1], len(self.columns)) != shape[1:]:
            return False
        return len(b.rows) >= start + shape[0] and b.rows[0] == 0

    def add(self, found: Array, start: int, magnitude: bool) -> None:
        """Add what the rows from ``start`` on have to ``found``."""
        b = self.block
        i, j = np.searchsorted(b.rows, (start, start + len(found)))
        if i == j or not len(self.columns):
            return
        weight = self.rows(i, j, magnitude)
        if self.is_slice:
            row, channel = b.rows[i] - start, self.shift[0]
            found[row : row + j - i, channel : channel + weight.shape[1], self.at] += weight
        else:
            rows, channels = b.rows[i:j] - start, self.shift[i:j, None] + np.arange(weight.shape[1])
            np.add.at(found, (rows[:, None, None], channels[:, :, None], self.columns), weight)


def _total(parts: Sequence[_Part], shape: tuple[int, ...], start: int, magnitude: bool = False) -> Array:
    """The sum of the rows from ``start`` on, or of their magnitudes; not to be written to."""
    if len(parts) == 1 and parts[0].covers(shape, start):
        return parts[0].rows(start, start + shape[0], magnitude)
    found = np.zeros(shape)
    for part in parts:
        part.add(found, start, magnitude)
    return found


def _place(tap: Tap, value: Value, grids: Sequence[Grid]) -> str:
    axes = [i for i in range(len(tap)) if i != value.channel]
    offset = ", ".join(f"{tap[i].offset:+d}" for i in axes[-max(len(axes) - 1, 1) :])
    border = _border([tap[i] for i in axes], [grids[i] for i in axes])
    return f"at offset ({offset}){border}"


def _border(guards: Sequence[Guard], grids: Sequence[Grid]) -> str:
    """In words: where a guard holds, beyond what the tap itself asks for."""
    parts = []
    for axis, (g, grid) in enumerate(zip(guards, grids, strict=True)):
        inner_low, inner_high = max(0, -(g.offset // grid.stride)), max(grid.delta, g.offset)
        if g.low > inner_low:
            parts.append(f"from position {g.low} on along axis {axis}")
        if g.high > inner_high:
            parts.append(f"up to {g.high} before the end along axis {axis}")
    return f", {' and '.join(parts)}," if parts else ""


def _compare_vectors(
    original: Value,
    emitted: Value,
    frames: dict[Source, _Frame],
    precision: Precision,
    sums: _Sums,
) -> None:
    """What is added, guard by guard. Guards over sources of equal sizes are one."""
    found: list[dict[Any, Vector]] = [{}, {}]
    wheres: dict[Any, Any] = {}
    for value, mine in zip((original, emitted), found, strict=True):
        for where, vector in value.vectors.items():
            key = None
            if where is not None:
                source, tap = where
                frame, grids = frames[source], frames[source].grids
                clipped = [
                    Guard(0, max(g.low, 0), frame.last(axis, max(g.high, d.delta), d.stride))
                    for axis, (g, d) in enumerate(zip(tap, grids, strict=True))
                ]
                if any(g != (0, 0, d.delta) for g, d in zip(clipped, grids, strict=True)):
                    key = tuple(
                        (e, d.stride, g.low, g.high) if g != (0, 0, d.delta) else None
                        for e, g, d in zip(source.shape, clipped, grids, strict=True)
                    )
                    wheres[key] = (clipped, grids)
            mine[key] = mine[key].plus(vector) if key in mine else vector
    zero = Vector(np.zeros(original.channels), np.zeros(original.channels))
    for key in dict.fromkeys([*found[0], *found[1]]):
        a, e = found[0].get(key, zero), found[1].get(key, zero)
        gap = np.abs(a.value - e.value)
        allowed = e.size * (precision.unit * e.rounded) + a.size * LOSS + (precision.tiny if e.rounded else 0.0)
        if set(found[0]) - {None}:  # a border that a model stores in advance fits the rest up to its own rounding
            allowed += precision.unit * sum(v.size * v.rounded for v in found[0].values())
        if a.computed:
            allowed += precision.unit * ON_THE_WAY * a.size + min(precision.tiny / precision.unit, TRACE)
        sums.error += gap
        sums.total += np.abs(e.value)
        ratio = _ratio(a.value, e.value, allowed)
        worst = float(ratio.max(initial=0.0))
        if worst > sums.units or worst > 1:
            row = int(ratio.argmax())
            where = "" if key is None else _border(*wheres[key])
            sums.enter(
                worst,
                f"channel {row} adds{where} {a.value[row]:.8g}, and {e.value[row]:.8g} in the result",
                _excess(gap, ratio, (a.size, e.size), precision),
                key is not None,
            )

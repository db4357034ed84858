"""Where values are computed: at every position of a map, or at a few that show every border.

A convolution of 31 x 31 taps, or one whose taps lie 36 apart, needs maps that are larger still. What it computes
there at a few positions is enough to compare it, and those read a few positions of its operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from math import prod

import numpy as np
import numpy.typing as npt

from reparamc.algebra.arrays import taken
from reparamc.algebra.expr import Array, BatchNorm, Conv, Expr, Ints, Scale, Source, Sum, walk
from reparamc.algebra.records import record

Positions = npt.NDArray[np.intp]

WORK = 2**23
"""Elements that the taps of all convolutions may read for one image, beyond which fewer positions are computed."""
PRODUCTS = 16
"""Multiply-adds of a matrix product that take as long as an element that is read."""
FEWEST = 4
"""Positions along an axis: the first, the last, one between them and the second."""


@record
class Places:
    """The sizes of the spatial axes of every node, and the positions along each at which it is computed."""

    sizes: Mapping[Expr, Ints]
    at: Mapping[Expr, tuple[Positions, ...]]

    def shape(self, e: Expr) -> Ints:
        """The spatial axes of what is held of ``e``."""
        return tuple(map(len, self.at[e]))

    def of(self, x: Array, held: Expr, wanted: Expr) -> Array:
        """``x``, computed at the places of ``held``, at those of ``wanted``."""
        axes = len(self.at[held])
        for axis, (has, wants) in enumerate(zip(self.at[held], self.at[wanted], strict=True)):
            if len(has) != len(wants):
                x = taken(x, np.searchsorted(has, wants), axis=x.ndim - axes + axis)
        return x

    def work(self) -> int:
        """What the convolutions cost for one image, in elements that their taps read."""
        return sum(
            prod(self.shape(e)) * e.in_channels * prod(e.kernel) * (1 + e.out_channels // e.groups // PRODUCTS)
            for e in self.at
            if isinstance(e, Conv)
        )


def places(roots: Sequence[Expr], sources: Mapping[Source, Ints], rng: np.random.Generator) -> Places | None:
    """Where to compute ``roots`` on maps of these sizes: at as many positions as `WORK` allows, ends first.

    None means everywhere: where that costs little, where operators act along the axes of the maps, and where
    sizes do not fit together.
    """
    order = list(walk(Sum(tuple(roots))))[:-1]
    if not all(_keeps_positions(e, len(next(iter(sources.values()), ()))) for e in order):
        return None
    sizes = _sizes(order, sources)
    if any(len({sizes[x] for x in alike}) > 1 for alike in (roots, *(e.children for e in order))):
        return None
    count = most = max((n for e in order for n in sizes[e]), default=0)
    drawn = rng.permutation(most)
    found = _needed(order, roots, sizes, lambda n: np.arange(n))
    while found.work() > WORK and count > FEWEST:
        count = max(FEWEST, count * 3 // 4)
        found = _needed(order, roots, sizes, lambda n: _telling(n, count, drawn))  # noqa: B023
    return found if count < most else None


def _keeps_positions(e: Expr, axes: int) -> bool:
    return not isinstance(e, Conv | Scale | BatchNorm) or e.axis in (None, -1 - axes)


def _telling(size: int, count: int, drawn: Positions) -> Positions:
    """``count`` positions of an axis: the ends, the middle, those beside the ends, and then any."""
    first = [0, size - 1, size // 2, 1, size - 2, *(drawn[drawn < size])]
    chosen = list(dict.fromkeys(int(p) for p in first if 0 <= p < size))[:count]
    return np.array(sorted(chosen), np.intp)


def _sizes(order: Sequence[Expr], sources: Mapping[Source, Ints]) -> dict[Expr, Ints]:
    found: dict[Expr, Ints] = {}
    for e in order:
        if isinstance(e, Source):
            found[e] = sources[e]
        elif isinstance(e, Conv):
            found[e] = result_size(e, found[e.x])
        else:
            found[e] = found[e.children[0]]
    return found


def _needed(
    order: Sequence[Expr], roots: Sequence[Expr], sizes: Mapping[Expr, Ints], wanted: Callable[[int], Positions]
) -> Places:
    """Every node at the positions that its users read."""
    at: dict[Expr, tuple[Positions, ...]] = {root: tuple(map(wanted, sizes[root])) for root in roots}
    for e in reversed(order):
        for child in e.children:
            read = at[e]
            if isinstance(e, Conv):
                tables = reads(e, at[e], sizes[child])
                read = tuple(np.unique(t[t >= 0]) for t in tables)
            other = at.get(child, read)
            at[child] = tuple(reduce(np.union1d, pair) for pair in zip(read, other, strict=True))
    return Places(sizes, at)


def result_size(e: Conv, size: Ints) -> Ints:
    """The sizes of the spatial axes that ``e`` makes of those of its operand; 0 where nothing fits."""
    return tuple(max(e.size_after(axis, n), 0) for axis, n in enumerate(size))


def reads(e: Conv, at: Sequence[Positions], size: Ints) -> list[Positions]:
    """Per axis, which position of an operand of this size each tap reads for each position ``at``: [tap, position].

    -1 where that is outside, or where a transposed convolution reads nothing.
    """
    tables: list[Positions] = []
    for axis, n in enumerate(size):
        taps = (e.offset[axis] + e.dilation[axis] * np.arange(e.kernel[axis]))[:, None]
        if e.transposed:
            place, rest = np.divmod(at[axis] - taps, e.stride[axis])
            place = np.where(rest == 0, place, -1)
        else:
            place = e.stride[axis] * at[axis] + taps
        tables.append(np.where((place >= 0) & (place < n), place, -1))
    return tables

"""Where the channels of a value are after it has been moved: reshaped into heads, transposed, cut into q, k and v.

Once its axis is split, a channel has several indices: channel ``(3 h + i) d + j`` is at ``[..., h, i, j, ...]``. A
`ChannelMap` holds the channel at each combination of positions along these axes.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from reparamc.algebra.arrays import count, together
from reparamc.algebra.expr import (
    Array,
    Expr,
    Ints,
    Layout,
    LayoutOp,
    Mean,
    Permute,
    Reshape,
    Resize,
    Select,
    Spread,
    Take,
    axis_through,
    ranks,
)
from reparamc.algebra.records import record, replace
from reparamc.algebra.shape import Dim, Shape, size


@record
class ChannelMap:
    """A value of ``rank`` has the channel ``channels[i, j, ...]`` at the positions i, j, ... along ``axes``."""

    channels: npt.NDArray[np.int64]
    axes: Ints
    rank: int

    @staticmethod
    def of(rank: int, axis: int, width: int) -> ChannelMap:
        """The map of a value that has not been moved yet."""
        return ChannelMap(np.arange(width), (rank + axis,), rank)

    def through(self, e: Expr) -> ChannelMap | None:
        """What it is after ``e``, a `Layout` or a `Select`; None where it mixes channels with something else."""
        match e:
            case Select():
                return self._select(self.rank + e.axis, e.index)
            case Layout(op=Take(axis=axis, at=at)):
                return self._select(axis, (at,))._without((axis,))
            case Layout(op=Permute(axes=axes)):
                return replace(self, axes=tuple(axes.index(a) for a in self.axes))
            case Layout(op=Mean() as op):
                if not set(self.axes).isdisjoint(op.axes):
                    return None
                return self if op.keep else self._without(op.axes)
            case Layout(op=Resize() as op):
                return self if set(self.axes).isdisjoint(op.axes) else None
            case Layout(op=Reshape() as op):
                return self._reshape(op.before, op.after)
            case _:
                return None

    def along(self, vector: Array, axis: int | None) -> Array | None:
        """A factor for each of ``channels``, where ``vector`` has one for each position along ``axis``.

        None where that axis holds no channels.
        """
        if axis is None or not vector.ndim:
            return together(vector)[0].broadcast_to(vector, self.channels.shape)
        axis += self.rank
        if axis not in self.axes or self.channels.shape[self.axes.index(axis)] != count(vector):
            return None
        ones = [1] * self.channels.ndim
        ones[self.axes.index(axis)] = count(vector)
        xp, vector = together(vector)
        return xp.broadcast_to(xp.reshape(vector, tuple(ones)), self.channels.shape)

    def _select(self, axis: int, index: Ints) -> ChannelMap:
        if axis not in self.axes:
            return self
        return replace(self, channels=self.channels.take(index, self.axes.index(axis)))

    def _without(self, gone: Ints) -> ChannelMap:
        """After axes ``gone``, of one position, have been dropped."""
        kept = [n for n, axis in enumerate(self.axes) if axis not in gone]
        channels = np.reshape(self.channels, tuple(self.channels.shape[n] for n in kept))
        axes = tuple(self.axes[n] - sum(a < self.axes[n] for a in gone) for n in kept)
        return ChannelMap(channels, axes, self.rank - len(gone))

    def _reshape(self, before: Shape, after: Shape) -> ChannelMap | None:
        channels, axes = np.transpose(self.channels, np.argsort(self.axes)), sorted(self.axes)
        if len(before) != self.rank or any(before[a].known != n for a, n in zip(axes, channels.shape, strict=True)):
            return None
        sizes: list[int] = []
        found: list[int] = []
        for old, new in regrouped(before, after):
            ours = [a for a in old if a in axes]
            if not ours:
                continue
            if any(a not in axes and before[a] != Dim(1) for a in old):
                return None
            known = [n for a in new if (n := after[a].known) is not None]
            if len(known) < len(new):
                return None
            found += new
            sizes += known
        return ChannelMap(np.reshape(channels, tuple(sizes)), tuple(found), len(after))


def brought_back(op: LayoutOp, vector: Array, axis: int) -> tuple[Array, int] | None:
    """A ``vector`` that acts along ``axis`` of what ``op`` makes, as one that acts along an axis of the operand.

    None where it would vary along several axes there.
    """
    rank, rank_out = ranks(op)
    at = rank_out + axis
    if isinstance(op, Spread) and not op.back and axis == -3:
        return (_tiled if op.outer else _repeated)(vector, (op.block, op.block)), axis
    if isinstance(op, Reshape):
        old, new = next(pair for pair in regrouped(op.before, op.after) if at in pair[1])
        sizes = [op.after[a].known for a in new]
        if len(old) != 1 or None in sizes or op.after[at].known != count(vector):
            return None
        known = [n for n in sizes if n is not None]
        xp, vector = together(vector)
        shaped = xp.reshape(vector, tuple(n if a == at else 1 for a, n in zip(new, known, strict=True)))
        return xp.reshape(xp.broadcast_to(shaped, tuple(known)), (-1,)), old[0] - rank
    found = next((a for a in range(rank) if axis_through(op, a) == at), None)
    return None if found is None else (vector, found - rank)


def _tiled(vector: Array, times: Ints) -> Array:
    xp, vector = together(vector)
    return xp.reshape(xp.broadcast_to(vector, (*times, count(vector))), (-1,))


def _repeated(vector: Array, times: Ints) -> Array:
    xp, vector = together(vector)
    wide = xp.broadcast_to(xp.reshape(vector, (-1, *[1] * len(times))), (count(vector), *times))
    return xp.reshape(wide, (-1,))


def regrouped(before: Shape, after: Shape) -> Iterator[tuple[list[int], list[int]]]:
    """The smallest runs of axes of ``before`` and of ``after`` that hold the same elements, from the left."""
    i = j = 0
    while i < len(before) or j < len(after):
        old, new = [i] if i < len(before) else [], [j] if j < len(after) else []
        if old and new and (before[i] == Dim(1)) != (after[j] == Dim(1)):  # an axis of one comes or goes by itself
            old, new = (old, []) if before[i] == Dim(1) else ([], new)
        i, j = i + len(old), j + len(new)
        while (a := size([before[n] for n in old])) != (b := size([after[n] for n in new])):
            if i < len(before) and (j == len(after) or b.divided_by(a) is not None):
                old.append(i)
                i += 1
            elif j < len(after):
                new.append(j)
                j += 1
            else:
                break
        yield old, new

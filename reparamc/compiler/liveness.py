"""Which channels of a graph are needed: the rest is constant for every input, or read by nothing.

Every operator that has a reading, and every one that treats its channels separately, says what it makes of known
channels and which channels belong together: those of a sum and of its terms, of an activation and of its operand leave
together or not at all. All others need all channels that they read. What is needed is the least set that holds the
channels that the outputs need, found from the outputs to the inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Sequence

import numpy as np

from reparamc.algebra.alike import Alike, alike_after, frees_channels, multiples
from reparamc.algebra.arrays import is_moderate
from reparamc.algebra.channels import Index, Mask, is_separate, known_after, takes_constants, uses
from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Select,
    Source,
    arrays,
    axis_through,
    ranks,
    rebuild,
    walk,
)
from reparamc.algebra.infer import channel_axes, channels
from reparamc.algebra.kernels import coefficients
from reparamc.algebra.records import entity, lazy, replace
from reparamc.compiler.graph import Graph, Separate
from reparamc.compiler.readings import MOST_CONCATENATED, Reading, Taps, Value


@entity
class Channels:
    """The channels of one value: they have the numbers ``start`` and following, along ``axis`` from the right.

    ``alike``: which are multiples of others; a known one is not counted as such.
    """

    start: int
    axis: int
    known: Array
    alike: Alike

    @property
    def width(self) -> int:
        return len(self.known)

    @property
    def numbers(self) -> Index:
        return np.arange(self.start, self.start + self.width)

    @lazy
    def merged(self) -> Alike:
        """The channel of this value, counted from 0, that each is a multiple of."""
        return self.alike.within()


@entity
class _Matrix:
    """A dense kernel: [output, input] where it reads, None for everywhere; and the inputs whose numbers it takes."""

    out: Channels
    read: Channels
    entries: Mask | None
    takes: Mask


def _is_moderate(e: Expr) -> bool:
    """Whether no parameter of ``e`` makes what it reads NaN or infinite: zero times that is not zero."""
    with np.errstate(all="ignore"):
        held = coefficients(e) if isinstance(e, BatchNorm) else arrays(e)
    return all(map(is_moderate, held))


class Liveness:
    """The channels of all values of a graph, and which of them are needed.

    All are, where a parameter is NaN, infinite, or beyond 2**42.

    Attributes:
        found: the channels of each value, and of each node in `exprs`.
        exprs: the operators that have a reading, over sources that say their channels.
        needed: by number, whether a channel has to stay.
    """

    def __init__(self, graph: Graph, stuck: Collection[Value] = ()) -> None:
        self.graph, self.stuck = graph, stuck
        self.found: dict[Hashable, Channels] = {}
        self.exprs: dict[Value, Expr] = {}
        self._count = 0
        self._links: list[tuple[Index, Index]] = []
        self._stays: list[Index] = []
        self._matrices: list[_Matrix] = []
        self._readings = {v: r for v in graph.values() if isinstance(r := graph.read(v), Reading)}
        nodes = [e for r in self._readings.values() for e in walk(r.template)]
        frees = any(map(frees_channels, nodes)) or _leave_unread([e for e in nodes if isinstance(e, Select)])
        if not frees or not all(map(_is_moderate, nodes)):
            self.needed = np.ones(0, bool)
            return
        self._demands = self._demanded()
        for value in graph.values():
            self._follow(value)
        self.needed = self._needed()

    def kept(self, key: Hashable) -> Index:
        """The channels of a value, or of a node in `exprs`, that have to stay."""
        channels = self.found[key]
        return np.flatnonzero(self.needed[channels.start : channels.start + channels.width])

    # What is known

    def _demanded(self) -> dict[Value, int]:
        """The channel axis that linear operators expect of the values that they read."""
        found: dict[Value, int] = {}
        for reading in self._readings.values():
            axes = channel_axes(reading.template)
            for e in walk(reading.template):
                if isinstance(e, Source) and (axis := axes[e]) is not None:
                    found.setdefault(e.key, axis)
        return found

    def _enter(self, key: Hashable, axis: int, known: Array, alike: Alike | None = None) -> Channels:
        alone = Alike.alone(self._count, len(known))
        if alike is not None:
            varies = np.isnan(known)
            alone = Alike(np.where(varies, alike.of, alone.of), np.where(varies, alike.factor, alone.factor))
        channels = self.found[key] = Channels(self._count, axis, known, alone)
        self._count += len(known)
        return channels

    def _operand(self, value: Value) -> Channels | None:
        """The channels of ``value``; of an input of the graph, all of which stay, as one reads it."""
        if value not in self.found:
            self._opaque(value)
        return self.found.get(value)

    def _opaque(self, value: Value) -> None:
        """A value that keeps all channels, if their axis is known, and their number, which has a limit."""
        shape, axis = self.graph.source(value).shape, self._demands.get(value)
        width = shape[axis].known if shape is not None and axis is not None and -axis <= len(shape) else None
        if axis is not None and width is not None and width <= MOST_CONCATENATED:
            self._stays.append(self._enter(value, axis, np.full(width, np.nan)).numbers)

    def _follow(self, value: Value) -> None:
        reading, separate = self._readings.get(value), self.graph.separate(value)
        entered = False
        if reading is not None:
            entered = self._follow_reading(value, reading)
        elif separate is not None:
            entered = self._follow_separate(value, separate)
        if not entered:
            self._opaque(value)
            for operand in self.graph.reads(value):
                if (channels := self._operand(operand)) is not None:
                    self._stays.append(channels.numbers)
        if value in self.found and (value in self.stuck or not self.graph.may_narrow(value)):
            self._stays.append(self.found[value].numbers)

    # Operators with a reading

    def _follow_reading(self, value: Value, reading: Reading) -> bool:
        expr = self._placed(reading)
        if expr is None:
            return False
        axes, widths = channel_axes(expr), channels(expr)
        order = list(walk(expr))
        if any(axes[e] is None or widths[e] is None for e in order):
            return False
        if not all(self._fits(e, widths) and _keeps_to_axis(e, axes) for e in order):
            return False
        for e in order:
            if not isinstance(e, Source):
                self._follow_node(e, axes)
        root = self.found[expr if not isinstance(expr, Source) else expr.key]
        if isinstance(expr, Source):
            root = self._enter(value, root.axis, root.known, root.alike)
            self._links.append((root.numbers, self.found[expr.key].numbers))
        self.found[value], self.exprs[value] = root, expr
        return True

    def _placed(self, reading: Reading) -> Expr | None:
        """The expression of a reading over sources that say their channels; None where some do not."""
        done: dict[Expr, Expr] = {}
        for e in walk(reading.template):
            if isinstance(e, Source):
                channels = None if isinstance(e.key, Taps) else self._operand(e.key)
                if channels is None:
                    return None
                done[e] = Source(e.key, channels.width, channels.axis, self.graph.source(e.key).shape)
            else:
                done[e] = rebuild(e, [done[x] for x in e.children])
                if isinstance(e, Layout):
                    x = done[e.x]
                    done[e] = Layout(x, e.op, channel_axes(x)[x])
        return done[reading.template]

    @staticmethod
    def _fits(e: Expr, widths: dict[Expr, int | None]) -> bool:
        """Whether channels can be followed through ``e``: it mixes all of them, or none."""
        match e:
            case Conv():
                return widths[e.x] == e.in_channels and (e.groups == 1 or is_separate(e))
            case Concat():
                return [widths[t] for t in e.terms] == list(e.sizes)
            case Select():
                return widths[e.x] == e.width
            case _:
                return all(widths[x] == widths[e] for x in e.children)

    def _of(self, e: Expr) -> Channels:
        return self.found[e.key if isinstance(e, Source) else e]

    def _follow_node(self, e: Expr, axes: dict[Expr, int | None]) -> None:
        operands = [self._of(x) for x in e.children]
        axis = axes[e]
        assert axis is not None
        read = uses(e) if isinstance(e, Conv) else None
        alike = alike_after(e, self._count, [x.alike for x in operands])
        channels = self._enter(e, axis, known_after(e, [x.known for x in operands], read), alike)
        if isinstance(e, Conv) and read is not None and not is_separate(e):
            entries, x = read[0], operands[0]
            takes = takes_constants(e, x.known)
            self._matrices.append(_Matrix(channels, x, None if entries.all() else entries, takes))
        else:
            self._links += _joined(e, channels, operands)

    # Operators that treat channels separately

    def _follow_separate(self, value: Value, separate: Separate) -> bool:
        operands = [self._operand(v) for v in separate.operands]
        told = [x for x in operands if x is not None]
        width = max((x.width for x in told), default=0)
        if len(told) < len(operands) or len({x.axis for x in told}) > 1 or not width:
            return False
        axis: int | None = told[0].axis
        if separate.moves is not None:
            before, after = ranks(separate.moves)
            through = axis_through(separate.moves, before + told[0].axis)
            axis = None if through is None else through - after
        shape = self.graph.source(value).shape
        if axis is None or shape is None or -axis > len(shape) or shape[axis].known != width:
            return False
        full = [x for x in told if x.width == width]
        known = full[0].known
        if separate.computes:
            known = self._computed(value, separate, told, width, axis, len(shape))
        channels = self._enter(value, axis, known, self._alike_after(separate, told, width))
        self._links += [(channels.numbers, x.numbers) for x in full]
        self._stays += [x.numbers for x in told if x.width != width]
        if separate.moves is not None:
            x = replace(self.graph.source(separate.operands[0]), axis=told[0].axis, channels=width)
            self.exprs[value] = expr = Layout(x, separate.moves, told[0].axis)
            self.found[expr] = channels
        return True

    def _computed(
        self, value: Value, separate: Separate, operands: Sequence[Channels], width: int, axis: int, rank: int
    ) -> Array:
        """What the operator of ``value`` makes of the channels that are known in all its operands."""
        rows = [np.broadcast_to(x.known, width) for x in operands]
        fixed = np.all([~np.isnan(row) for row in rows], axis=0)
        found = np.full(width, np.nan)
        if separate.multiplies:
            found[np.any([row == 0 for row in rows], axis=0)] = 0.0
        if fixed.any():
            shape = [1] * rank
            shape[axis] = int(fixed.sum())
            given = {v: np.reshape(row[fixed], shape) for v, row in zip(separate.operands, rows, strict=True)}
            made = self.graph.run(value, given).ravel()
            found[fixed] = np.where(np.isfinite(made), made, np.nan)
        return found

    def _alike_after(self, separate: Separate, operands: Sequence[Channels], width: int) -> Alike:
        """Channels of what an operator makes of channels that are multiples of one another."""
        of, factors = (np.stack([np.broadcast_to(a, width) for a in arrays], 1) for arrays in
                       zip(*((x.alike.of, x.alike.factor) for x in operands), strict=True))  # fmt: skip
        if separate.multiplies or separate.homogeneous or not separate.computes:
            return multiples(self._count, of, [factors.prod(1, keepdims=True)])
        _, keys = np.unique(factors, axis=0, return_inverse=True)
        return multiples(self._count, np.concatenate([of, np.reshape(keys, (-1, 1))], 1), [np.ones((width, 1))])

    # What is needed

    def _needed(self) -> Mask:
        """Whether each channel has to stay."""
        group = _groups(self._count, self._links)
        known = np.zeros(self._count, bool)
        for c in self.found.values():
            known[c.numbers] = ~np.isnan(c.known)
        kept = np.zeros(self._count, bool)
        for numbers in self._stays:
            kept[group[numbers]] = True
        while True:
            self._spread(kept, group, known)
            empty = [c.start for c in self.found.values() if not kept[group[c.numbers]].any()]
            if not empty:
                return kept[group]
            kept[group[empty]] = True  # no value is left without channels

    def _spread(self, kept: Mask, group: Index, known: Mask) -> None:
        """Keep what kernels read for the channels that are kept, until nothing is added."""
        before = -1
        while before != (before := int(kept.sum())):
            for m in reversed(self._matrices):
                rows = kept[group[m.out.numbers]] & ~known[m.out.numbers]
                columns = np.full(m.read.width, rows.any()) if m.entries is None else m.entries[rows].any(0)
                kept[group[m.read.numbers[m.read.merged.of[columns & ~m.takes]]]] = True


def _leave_unread(selections: Sequence[Select]) -> bool:
    """Whether there is a channel that none of the ``selections`` from its value takes."""
    taken: dict[tuple[Hashable, int], set[int]] = {}
    for e in selections:
        taken.setdefault((e.x.key if isinstance(e.x, Source) else e, e.width), set()).update(e.index)
    return any(len(index) < width for (_, width), index in taken.items())


def _keeps_to_axis(e: Expr, axes: dict[Expr, int | None]) -> bool:
    """Whether what ``e`` takes for channels of its operands are those that are followed."""
    wanted = e.axis_in if isinstance(e, Layout) else axes[e]
    return all(axes[x] == wanted for x in e.children)


def _joined(e: Expr, channels: Channels, operands: Sequence[Channels]) -> list[tuple[Index, Index]]:
    """Which channels of ``e`` leave only together with which of its operands."""
    match e:
        case Conv():
            return [(channels.numbers, np.repeat(operands[0].numbers, channels.width // operands[0].width))]
        case Concat():
            return [(channels.numbers, np.concatenate([x.numbers for x in operands]))]
        case Select():
            return [(channels.numbers, operands[0].numbers[list(e.index)])]
        case _:
            return [(channels.numbers, x.numbers) for x in operands]


def _groups(count: int, links: Sequence[tuple[Index, Index]]) -> Index:
    """For each number the smallest that it is linked with."""
    group = np.arange(count)
    if not links:
        return group
    a, b = (np.concatenate(side) for side in zip(*links, strict=True))
    while True:
        least = np.minimum(group[a], group[b])
        new: Index = np.array(group)
        for side in (a, b):
            np.minimum.at(new, side, least)
            np.minimum.at(new, group[side], least)
        new = new[new]
        if np.array_equal(new, group):
            return group
        group = new

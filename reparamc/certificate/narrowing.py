"""Tensors that have fewer channels in the emitted graph: which those are, and what the others of the original are.

The tensor of the original is written as a function of the emitted one: some channels are those of the emitted one, some
are numbers, and the rest depends on a leaf that the emitted graph does not have. So whatever reads it can be compared.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

import reparamc.certificate.layouts as nl
import reparamc.certificate.normal_form as nf
from reparamc.certificate.axes import Dim, identity_view
from reparamc.certificate.normal_form import Array, Block, Grid, Guard, Value, Vector, Where, replace


@dataclass(frozen=True, eq=False)
class Narrowing:
    """How a tensor of the original is made of the one that was emitted.

    Attributes:
        axis: that of the channels, from the left.
        index: for each channel of the original the one that it is, or -1.
        known: the number that a channel is everywhere; NaN where it is none.
        like: the first emitted channel that each is a positive multiple of, or -1; and by what ``factor``. Equal
            channels are all written as the first of them.
    """

    axis: int
    index: Array
    known: Array
    like: Array
    factor: Array

    @property
    def kept(self) -> Array:
        return np.flatnonzero(self.index >= 0)

    @property
    def width(self) -> int:
        return len(self.kept)

    @property
    def emitted(self) -> Narrowing:
        """The tensor that was emitted, as a function of itself: its numbers are known as well."""
        kept = self.kept
        return Narrowing(self.axis, np.arange(self.width), self.known[kept], self.like[kept], self.factor[kept])

    @property
    def gone(self) -> Array:
        """The channels of the original that are neither emitted nor numbers nor multiples of those."""
        return np.flatnonzero((self.like < 0) & np.isnan(self.known))

    def alike(self, other: Narrowing) -> bool:
        """Whether two tensors lost the same channels."""
        return np.array_equal(self.index, other.index)


@dataclass(frozen=True)
class Separate:
    """An operator that does the same to every channel, and reads no other one.

    Attributes:
        axis: where the axis of the channels, from the left, is in the result; None where it does not stay whole.
        computed: what it makes of numbers, one for each channel, by operand; None if it keeps them.
        multiplies: whether it is the product of its operands.
        homogeneous: whether a positive factor of its operand is one of its result.
    """

    axis: Callable[[int], int | None]
    computed: Callable[[Mapping[str, Array]], Array] | None
    multiplies: bool = False
    homogeneous: bool = False


def shape_of(shape: Sequence[Dim], narrowing: Narrowing, width: int) -> list[Dim]:
    return [Dim(width) if i == narrowing.axis else e for i, e in enumerate(shape)]


def put_back(leaf: Value, rest: Value | None, narrowing: Narrowing) -> Value:
    """The tensor of the original, of the emitted ``leaf`` and of the ``rest`` that was not emitted; numbers stay."""
    axis, multiples = narrowing.axis, np.flatnonzero((narrowing.like >= 0) & np.isnan(narrowing.known))
    parts = [(leaf, multiples, narrowing.like[multiples])]
    if rest is not None:
        gone = narrowing.gone
        parts.append((rest, gone, np.arange(len(gone))))
    base = tuple(shape_of(leaf.base, narrowing, len(narrowing.index)))
    tap = (Guard(0, 0, 0),) * len(base)
    blocks = tuple(
        Block(next(iter(v.grids)), rows, first, np.ones((len(rows), 1, 1)), narrowing.factor[rows], (tap,))
        for v, rows, first in parts
        if len(rows)
    )
    numbers = np.nan_to_num(narrowing.known)
    vectors: dict[Where, Vector] = {None: Vector(numbers, np.abs(numbers), 1, True)} if numbers.any() else {}
    grids = {next(iter(v.grids)): (Grid(),) * len(base) for v, _, _ in parts}
    return Value(base, axis, grids, blocks, vectors, identity_view(base), meter=leaf.meter)


def narrowed_axis(original: Value, emitted: Value) -> int | None:
    """The only axis along which the emitted value has fewer elements; None where there is none."""
    if original.rank != emitted.rank:
        return None
    both = [(m.known, n.known) for m, n in zip(original.shape, emitted.shape, strict=True)]
    apart = [i for i, (m, n) in enumerate(both) if m is not None and n is not None and m != n]
    fewer = [i for i in apart if (both[i][0] or 0) > (both[i][1] or 0) > 0]
    return fewer[0] if len(apart) == len(fewer) == 1 else None


def matched(original: Value, emitted: Value, axis: int) -> tuple[Narrowing, Value] | None:
    """How the channels of the original are those of the emitted value, and the former that are kept.

    They are found in order, by a weighted sum of what each reads, the nearest first: the caller is to compare them.
    None where an emitted channel is like none that is left.
    """
    original = nf.unsplit(nf.with_places(original, axis)[0], axis)
    emitted = nf.unsplit(nf.with_places(emitted, axis)[0], axis)
    (mine, size, varies), (other, _, _) = _fingerprints(original), _fingerprints(emitted)
    index, at = np.full(len(mine), -1), 0
    for channel, number in enumerate(other):
        apart = np.abs(mine[at:] - number) / np.maximum(size[at:], np.finfo(np.float64).tiny)
        nearest = apart.min(initial=np.inf)
        if not nearest <= 2.0**-7:
            return None
        best = at + int(np.flatnonzero(apart <= max(4 * nearest, 2.0**-20))[0])
        index[best], at = channel, best + 1
    known = original.vectors[None].value if None in original.vectors else np.zeros(len(mine))
    found = Narrowing(axis, index, np.where(varies, np.nan, known), *_multiples(original, index, mine, size))
    return found, nl.selected(original, found.kept.tolist(), axis)


EXACT, MOST_TRIED = 2.0**-46, 8
"""Relative difference up to which numbers computed in float64 count as one; and channels that one is compared with."""


def _multiples(value: Value, index: Array, sums: Array, size: Array) -> tuple[Array, Array]:
    """The first emitted channel that each is a positive multiple of, and the factor."""
    like, factor = index.copy(), np.ones(len(index))
    share = sums / np.maximum(size, np.finfo(np.float64).tiny)  # the same for all multiples
    kept = np.flatnonzero((index >= 0) & (size > 0))
    for channel in np.flatnonzero(size > 0):
        for other in kept[np.abs(share[kept] - share[channel]) <= 2.0**-40][:MOST_TRIED]:
            by = _ratio(value, int(channel), int(other))
            if by is not None:
                like[channel], factor[channel] = index[other], by
                break
    return like, factor


def _ratio(value: Value, channel: int, other: int) -> float | None:
    """The positive number that makes the coefficients of one channel those of another; None if there is none."""
    mine, its = _coefficients(value, channel), _coefficients(value, other)
    widest = max(map(len, (*mine.values(), *its.values())))
    a, b = (np.zeros((len(mine | its), widest)) for _ in range(2))
    for at, key in enumerate(mine | its):
        for row, given in ((a[at], mine), (b[at], its)):
            row[: len(given.get(key, ()))] = given.get(key, 0.0)
    largest = np.unravel_index(np.argmax(np.abs(b)), b.shape)
    by = a[largest] / b[largest]
    return float(by) if by > 0 and np.all(np.abs(a - by * b) <= EXACT * np.abs(a)) else None


def _coefficients(value: Value, channel: int) -> dict[Hashable, Array]:
    """What a channel reads at each tap of each source, and what is added to it."""
    found: dict[Hashable, Array] = {("added", where): v.value[[channel]] for where, v in value.vectors.items()}
    for b in value.blocks:
        at = int(np.searchsorted(b.rows, channel))
        if at == len(b.rows) or b.rows[at] != channel:
            continue
        row = np.pad(b.left[at] * b.weight[at].astype(np.float64), ((int(b.first[at]), 0), (0, 0)))
        for n, tap in enumerate(b.taps):
            before = found.get((b.source, tap), np.zeros(0))
            total = np.zeros(max(len(before), len(row)))
            total[: len(before)] += before
            total[: len(row)] += row[:, n]
            found[b.source, tap] = total
    return found


def _fingerprints(value: Value) -> tuple[Array, Array, Array]:
    """For each channel a weighted sum of its coefficients, that of their magnitudes, and whether it reads anything."""
    found, size = np.zeros(value.channels), np.zeros(value.channels)
    varies = np.zeros(value.channels, bool)
    for b in value.blocks:
        of_channel = _weights(b.source.leaf, int(b.first.max(initial=0)) + b.weight.shape[1])
        of_tap = np.array([_weights(str(tap), 1)[0] for tap in b.taps])
        read = of_channel[b.first[:, None] + np.arange(b.weight.shape[1])]
        products = b.left[:, None, None] * b.weight * read[:, :, None] * of_tap
        found[b.rows] += products.sum((1, 2))
        size[b.rows] += np.abs(products).sum((1, 2))
        varies[b.rows] |= (products != 0).any((1, 2))
    for where, vector in value.vectors.items():
        weight = _weights(str(where and where[1]), 1)[0]
        found += weight * vector.value
        size += np.abs(weight * vector.value)
        varies |= (vector.value != 0) if where is not None else False
    return found, size, varies


def _weights(name: str, count: int) -> Array:
    """Numbers between 1 and 2 that follow from a name."""
    return np.random.default_rng(zlib.crc32(name.encode())).uniform(1, 2, count)


def passed(narrowings: Mapping[str, Narrowing], separate: Separate) -> Narrowing | None:
    """The narrowing of what an operator makes of operands that all lost the same channels."""
    first = next(iter(narrowings.values()))
    axis = separate.axis(first.axis)
    if axis is None or not all(first.alike(n) for n in narrowings.values()):
        return None
    known, like, factor = first.known, first.like, first.factor
    if separate.computed is not None:
        like, factor = _multiples_after(narrowings, separate)
        rows = [n.known for n in narrowings.values()]
        fixed = ~np.isnan(rows).any(0)
        made = separate.computed({name: np.where(fixed, n.known, 0.0) for name, n in narrowings.items()})
        known = np.where(fixed, made, np.nan)
        if separate.multiplies:
            known = np.where((np.array(rows) == 0).any(0), 0.0, known)
    return replace(first, axis=axis, known=known, like=like, factor=factor)


def _multiples_after(narrowings: Mapping[str, Narrowing], separate: Separate) -> tuple[Array, Array]:
    """What an elementwise operator makes of multiples of channels."""
    index = next(iter(narrowings.values())).index
    likes, factors = (np.stack(a, 1) for a in zip(*((n.like, n.factor) for n in narrowings.values()), strict=True))
    scales = separate.multiplies or (separate.homogeneous and len(narrowings) == 1)
    by = factors.prod(1) if scales else np.ones(len(index))
    like, factor = index.copy(), np.ones(len(index))
    _, group = np.unique(likes if scales else np.concatenate([likes, factors], 1), axis=0, return_inverse=True)
    for members in (np.flatnonzero(group.ravel() == g) for g in range(group.max(initial=-1) + 1)):
        emitted = members[index[members] >= 0]
        if len(emitted) and likes[members[0]].min() >= 0:
            like[members], factor[members] = index[emitted[0]], by[members] / by[emitted[0]]
    return like, factor

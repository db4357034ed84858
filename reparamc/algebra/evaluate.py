"""What an expression means: a reference evaluator in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product
from math import prod

import numpy as np

from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Scale,
    Select,
    Source,
    Sum,
    Take,
    rebuild,
    walk,
)
from reparamc.algebra.kernels import coefficients
from reparamc.algebra.places import Places, Positions, reads, result_size
from reparamc.algebra.shape import Shape


def evaluate(
    root: Expr,
    inputs: Mapping[Source, Array],
    extents: Mapping[str, int] | None = None,
    places: Places | None = None,
) -> tuple[Array, float]:
    """The value of ``root``, and the largest magnitude met on the way (the scale of its rounding errors).

    Args:
        inputs: a float64 array for each source, with its channels along the axis that its readers expect.
        extents: what the symbols in the shapes stand for, where the shapes of the inputs do not tell.
        places: where to compute it; the inputs are given and the value is returned there. None: everywhere.

    Raises:
        ValueError: neither tells an extent of a reshape.
    """
    values: dict[Expr, Array] = {}
    sizes = dict(extents or {})
    magnitude = 0.0
    for e in walk(root):
        if places is None or isinstance(e, Conv):
            x = [values[c] for c in e.children]
        else:
            x = [places.of(values[c], c, e) for c in e.children]
        match e:
            case Source():
                y = inputs[e]
                if e.shape is not None and places is None:
                    _bind(e.shape, y, sizes)
            case Conv():
                y = _convolve(e, x[0], places)
            case Scale():
                y = x[0] * _along(e.scale, e.axis) + _along(e.shift, e.axis)
            case BatchNorm():
                scale, shift = coefficients(e)
                y = x[0] * _along(scale, e.axis) + _along(shift, e.axis)
            case Sum():
                y = x[0]
                for term in x[1:]:
                    y = y + term
            case Concat():
                y = np.concatenate(x, axis=e.axis)
            case Select():
                y = np.take(x[0], e.index, axis=e.axis)
            case Layout():
                y = _move(e, x[0], sizes)
        values[e] = y
        magnitude = max(magnitude, float(np.abs(y).max(initial=0.0)))
    return values[root], magnitude


def absolute(root: Expr) -> Expr:
    """``root`` with the magnitude of every parameter.

    Evaluated on the magnitudes of the inputs, it gives for each element the sum of the magnitudes of all terms that
    went into it: the scale of its rounding errors, which exact cancellation does not make small.
    """
    done: dict[Expr, Expr] = {}
    for e in walk(root):
        x = [done[c] for c in e.children]
        match e:
            case Conv():
                bias = None if e.bias is None else np.abs(e.bias)
                done[e] = replace(e, x=x[0], weight=np.abs(e.weight), bias=bias)
            case Scale():
                done[e] = Scale(x[0], np.abs(e.scale), np.abs(e.shift), e.axis)
            case BatchNorm():
                scale, _ = coefficients(e)
                done[e] = Scale(x[0], np.abs(scale), np.abs(e.beta) + np.abs(e.mean * scale), e.axis)
            case _:
                done[e] = rebuild(e, x)
    return done[root]


def _along(v: Array, axis: int | None) -> Array:
    return v.reshape(-1, *[1] * (-1 - (axis or -1))) if v.ndim else v


def _bind(shape: Shape, x: Array, sizes: dict[str, int]) -> None:
    """Learn the extents of symbols from an array of that shape."""
    for dim, extent in zip(shape, x.shape, strict=False):
        if len(dim.symbols) == 1:
            sizes[dim.symbols[0]] = extent // dim.factor


def _move(e: Layout, x: Array, sizes: dict[str, int]) -> Array:
    if isinstance(e.op, Permute):
        return x.transpose(e.op.axes)
    if isinstance(e.op, Mean):
        return x.mean(axis=e.op.axes, keepdims=e.op.keep)
    if isinstance(e.op, Take):
        return np.take(x, e.op.at, axis=e.op.axis)
    _bind(e.op.before, x, sizes)
    unknown = [s for dim in e.op.after for s in dim.symbols if s not in sizes]
    if unknown:
        raise ValueError(f"the extent {unknown[0]!r} of a reshape is unknown")
    return x.reshape([dim.at(sizes) for dim in e.op.after])


COPIED = 2**22
"""Elements up to which what the taps of a convolution read is copied side by side, to be multiplied at once."""


def _convolve(e: Conv, x: Array, places: Places | None) -> Array:
    """``e`` of ``x`` [*batch, channels, *sizes], at all its positions or at those of ``places``."""
    n = e.spatial
    batch, held = x.shape[: x.ndim - n - 1], x.shape[x.ndim - n :]
    size = held if places is None else places.sizes[e.x]
    at = [np.arange(o) for o in result_size(e, size)] if places is None else places.at[e]
    tables = reads(e, at, size)
    if places is not None:
        tables = [np.where(t < 0, t, np.searchsorted(has, t)) for t, has in zip(tables, places.at[e.x], strict=True)]
    index, outs = _flat(tables, held), tuple(map(len, at))
    per_group, (taps, positions) = e.weight.shape[1], index.shape
    x = np.pad(x.reshape(prod(batch), e.groups, per_group, prod(held)), [(0, 0)] * 3 + [(0, 1)])
    weight = e.weight.reshape(e.groups, -1, per_group, taps)
    y = np.zeros((len(x), e.groups, weight.shape[1], positions))
    most = max(1, COPIED // max(1, len(x) * taps * positions))  # channels that are read at once
    groups, channels = max(1, most // per_group), min(per_group, most)
    for g, c in product(range(0, e.groups, groups), range(0, per_group, channels)):
        rows = weight[g : g + groups, :, c : c + channels]
        columns = x[:, g : g + groups, c : c + channels].take(index, axis=-1)
        rows, columns = rows.reshape(*rows.shape[:2], -1), columns.reshape(*columns.shape[:2], -1, positions)
        y[:, g : g + groups] += np.matmul(rows, columns)
    y = y.reshape(*batch, e.out_channels, *outs)
    return y if e.bias is None else y + e.bias.reshape(-1, *[1] * n)


def _flat(tables: Sequence[Positions], sizes: Sequence[int]) -> Positions:
    """``tables`` of all axes as one, of elements in row-major order: [tap, position]; -1 as there."""
    n = len(tables)
    index = np.zeros((1,) * 2 * n, np.intp)
    outside = np.zeros(index.shape, bool)
    for axis, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        place = table.reshape(
            [len(table) if d == axis else table.shape[1] if d == n + axis else 1 for d in range(2 * n)]
        )
        index, outside = index * size + place, outside | (place < 0)
    return np.where(outside, -1, index).reshape(prod(map(len, tables)), -1)


def channel_axes(root: Expr) -> dict[Expr, int | None]:
    """The channel axis of every node, inferred in both directions; None where nothing fixes it."""
    found: dict[Expr, int | None] = {}
    order = list(walk(root))
    for e in order:
        match e:
            case Sum():
                found[e] = next((axis for t in e.terms if (axis := found[t]) is not None), None)
            case Scale() if e.axis is None:
                found[e] = found[e.x]
            case _:
                found[e] = e.axis
    for e in reversed(order):
        want = e.axis_in if isinstance(e, Layout) else found[e]
        for child in e.children:
            found[child] = want if found[child] is None else found[child]
    return found


def _told(e: Expr) -> tuple[int | None, Sequence[int], int] | None:
    """(axis, channels read from each operand, channels made), where parameters of ``e`` itself tell."""
    match e:
        case Conv():
            return e.axis, (e.in_channels,), e.out_channels
        case BatchNorm():
            return e.axis, (e.gamma.size,), e.gamma.size
        case Scale() if e.scale.ndim or e.shift.ndim:
            count = e.scale.size if e.scale.ndim else e.shift.size
            return e.axis, (count,), count
        case Concat():
            return e.axis, e.sizes, sum(e.sizes)
        case Select():
            return e.axis, (e.width,), len(e.index)
        case _:
            return None


def channels(root: Expr) -> dict[Expr, int | None]:
    """The number of channels of every node, inferred in both directions; None where nothing fixes it."""
    found: dict[Expr, int | None] = {}
    order = list(walk(root))
    for e in order:
        told = _told(e)
        if told is not None:
            found[e] = told[2]
        elif isinstance(e, Source):
            found[e] = e.channels
        elif isinstance(e, Layout) and e.axis is None:
            found[e] = None
        else:
            found[e] = next((c for x in e.children if (c := found[x]) is not None), None)
    for e in reversed(order):
        told = _told(e)
        if isinstance(e, Layout) and e.axis is None:
            continue
        wanted: Sequence[int | None] = told[1] if told is not None else (found[e],) * len(e.children)
        for child, want in zip(e.children, wanted, strict=True):
            found[child] = want if found[child] is None else found[child]
    return found


def misfit(root: Expr) -> str | None:
    """Why ``root`` reads what no value has: a parameter made for another number of channels. None if all fit."""
    made: dict[Expr, tuple[int | None, int] | None] = {}  # axis and number of the channels, where they are told
    for e in walk(root):
        told = _told(e)
        wanted: Sequence[tuple[int | None, int] | None] = [None] * len(e.children)
        if told is not None:
            axis, read, count = told
            made[e], wanted = (axis, count), [(axis, n) for n in read]
        elif isinstance(e, Source):
            made[e] = None if e.axis is None or e.channels is None else (e.axis, e.channels)
        elif isinstance(e, Layout):
            inner = made[e.x]
            whole = e.axis is not None and inner is not None and inner[0] == e.axis_in
            made[e] = (e.axis, inner[1]) if whole and inner is not None else None
        else:
            made[e] = next((m for x in e.children if (m := made[x]) is not None), None)
            wanted = [made[e]] * len(e.children)
        for child, want in zip(e.children, wanted, strict=True):
            has = made[child]
            if want is not None and has is not None and want[0] == has[0] and want[1] != has[1]:
                return f"a parameter is made for {want[1]} channels, where its operand has {has[1]}"
    return None


def has_layout(root: Expr) -> bool:
    """Whether the axes of its values change on the way, so that their shapes must be known to evaluate it."""
    acting = {e.axis for e in walk(root) if isinstance(e, Conv | Concat | Select)} | {channel_axes(root)[root] or -1}
    return len(acting) > 1 or any(isinstance(e, Layout) for e in walk(root))

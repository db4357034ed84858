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
        summed = rows.shape[2] * taps
        rows, columns = rows.reshape(*rows.shape[:2], summed), columns.reshape(*columns.shape[:2], summed, positions)
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

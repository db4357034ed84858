"""What an expression means: a reference evaluator in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import ceil, prod

import numpy as np

from reparamc.algebra.arrays import added, beside, concatenated, fixed, largest, taken, together, zeros_of
from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
    rebuild,
    walk,
)
from reparamc.algebra.kernels import coefficients
from reparamc.algebra.places import Places, Positions, reads, result_size
from reparamc.algebra.records import replace
from reparamc.algebra.resample import resize_matrix
from reparamc.algebra.shape import Shape

MOST_ELEMENTS = 2**26
"""Elements that a value may have."""


class TooLargeError(ValueError):
    """A value has more elements than it may have."""


def _check(elements: int) -> None:
    if elements > MOST_ELEMENTS:
        raise TooLargeError("its values are too large")


def evaluate(
    root: Expr,
    inputs: Mapping[Source, Array],
    sizes: Mapping[str, int] | None = None,
    places: Places | None = None,
) -> tuple[Array, float]:
    """The value of ``root``, and the largest magnitude met on the way (the scale of its rounding errors).

    Args:
        inputs: a float64 array for each source, with its channels along the axis that its users expect.
        sizes: the sizes of the symbols in the shapes, where the shapes of the inputs do not tell.
        places: where to compute it; the inputs are given and the value is returned there. None: everywhere.

    Raises:
        ValueError: neither tells a size of a reshape.
        TooLargeError: a convolution or a resize makes too many elements.
    """
    values: dict[Expr, Array] = {}
    sizes = dict(sizes or {})
    magnitude = 0.0
    for e in walk(root):
        if isinstance(e, Source):
            y = inputs[e]
            if e.shape is not None and places is None:
                _bind(e.shape, y, sizes)
        elif isinstance(e, Conv):
            y = _convolve(e, values[e.x], places)
        else:
            operands = [values[c] if places is None else places.of(values[c], c, e) for c in e.children]
            y = _computed(e, operands, sizes)
        values[e] = y
        magnitude = max(magnitude, largest(y))
    return values[root], magnitude


def _computed(
    e: Scale | BatchNorm | Sum | Concat | Select | Layout, operands: Sequence[Array], sizes: dict[str, int]
) -> Array:
    """``e`` of ``operands``; ``sizes`` are the sizes of symbols."""
    x = operands[0]
    match e:
        case Scale() | BatchNorm():
            _, x, *factors = together(x, *(beside(x, c) for c in coefficients(e)))
            scale, shift = (_along(v, e.axis) for v in factors)
            return x * scale + shift
        case Sum():
            return added(operands)
        case Concat():
            return concatenated(operands, e.axis)
        case Select():
            return taken(x, e.index, e.axis)
        case Layout():
            return _move(e, x, sizes)


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
                bias = None if e.bias is None else abs(fixed(e.bias))
                done[e] = replace(e, x=x[0], weight=abs(fixed(e.weight)), bias=bias)
            case Scale():
                done[e] = Scale(x[0], abs(fixed(e.scale)), abs(fixed(e.shift)), e.axis)
            case BatchNorm():
                _, beta, mean, scale = together(*map(fixed, (e.beta, e.mean, coefficients(e)[0])))
                done[e] = Scale(x[0], abs(scale), abs(beta) + abs(mean * scale), e.axis)
            case _:
                done[e] = rebuild(e, x)
    return done[root]


def _along(v: Array, axis: int | None) -> Array:
    return together(v)[0].reshape(v, (-1, *[1] * (-1 - (axis or -1)))) if v.ndim else v


def _bind(shape: Shape, x: Array, sizes: dict[str, int]) -> None:
    """Learn the sizes of symbols from an array of that shape."""
    for dim, size in zip(shape, x.shape, strict=False):
        if len(dim.symbols) == 1:
            sizes[dim.symbols[0]] = size // dim.factor


def _move(e: Layout, x: Array, sizes: dict[str, int]) -> Array:
    xp, x = together(x)
    if isinstance(e.op, Permute):
        return xp.permute_dims(x, e.op.axes)
    if isinstance(e.op, Mean):
        return xp.mean(x, axis=e.op.axes, keepdims=e.op.keep)
    if isinstance(e.op, Take):
        return x[(*[slice(None)] * e.op.axis, e.op.at)]
    if isinstance(e.op, Resize):
        _check(prod(x.shape) * prod(max(1, ceil(scale)) for scale in e.op.scales))
        for axis, scale in zip(e.op.axes, e.op.scales, strict=True):
            rows = resize_matrix(x.shape[axis], scale, e.op.mode, e.op.place, e.op.rounding, e.op.cubic)
            _, x, rows = together(x, rows)
            x = xp.moveaxis(xp.matmul(xp.moveaxis(x, axis, -1), rows.T), -1, axis)
        return x
    if isinstance(e.op, Spread):
        return _spread(e.op, x)
    _bind(e.op.before, x, sizes)
    unknown = [s for dim in e.op.after for s in dim.symbols if s not in sizes]
    if unknown:
        raise ValueError(f"the size {unknown[0]!r} of a reshape is unknown")
    return xp.reshape(x, tuple(dim.at(sizes) for dim in e.op.after))


def _spread(op: Spread, x: Array) -> Array:
    """``x`` [..., channels, height, width] with channels as positions, or positions as channels."""
    *lead, c, h, w = x.shape
    n, b = len(lead), op.block
    xp, c, h, w = together(x)[0], *((c, h // b, w // b) if op.back else (c // b**2, h, w))
    order = [2, 4, 0, 1, 3] if op.outer else [0, 2, 4, 1, 3]  # block and block beside the channels, of [c, h, b, w, b]
    if op.back:
        x = xp.permute_dims(xp.reshape(x, (*lead, c, h, b, w, b)), (*range(n), *(n + a for a in order)))
        return xp.reshape(x, (*lead, c * b**2, h, w))
    apart = [(c, h, b, w, b)[a] for a in order]
    x = xp.permute_dims(xp.reshape(x, (*lead, *apart)), (*range(n), *(n + order.index(a) for a in range(5))))
    return xp.reshape(x, (*lead, c, h * b, w * b))


COPIED = 2**22
"""Elements up to which what the taps of a convolution read is copied side by side, to be multiplied at once."""


def _convolve(e: Conv, x: Array, places: Places | None) -> Array:
    """``e`` of ``x`` [*batch, channels, *sizes], at all its positions or at those of ``places``."""
    n = e.spatial
    batch, held = x.shape[: x.ndim - n - 1], x.shape[x.ndim - n :]
    size = held if places is None else places.sizes[e.x]
    _check(prod(batch) * e.out_channels * prod(result_size(e, size)) if places is None else 0)
    at = [np.arange(o) for o in result_size(e, size)] if places is None else places.at[e]
    tables = reads(e, at, size)
    if places is not None:
        tables = [np.where(t < 0, t, np.searchsorted(has, t)) for t, has in zip(tables, places.at[e.x], strict=True)]
    index, outs = _flat(tables, held), tuple(map(len, at))
    per_group, (taps, positions) = e.weight.shape[1], index.shape
    xp, x, weight, bias = together(x, beside(x, e.weight), beside(x, e.bias_or_zero))
    images = (prod(batch), e.groups, per_group)
    x = xp.concat([xp.reshape(x, (*images, prod(held))), zeros_of(x, (*images, 1))], axis=-1)
    weight = xp.reshape(weight, (e.groups, e.out_channels // e.groups, per_group, taps))
    y = zeros_of(x, (images[0], e.groups, weight.shape[1], positions))
    most = max(1, COPIED // max(1, images[0] * taps * positions))  # channels that are read at once
    groups, channels = max(1, most // per_group), min(per_group, most)
    for g, c in product(range(0, e.groups, groups), range(0, per_group, channels)):
        rows = weight[g : g + groups, :, c : c + channels]
        columns = taken(x[:, g : g + groups, c : c + channels], index.ravel(), axis=-1)
        summed = rows.shape[2] * taps
        rows = xp.reshape(rows, (*rows.shape[:2], summed))
        columns = xp.reshape(columns, (*columns.shape[:2], summed, positions))
        y[:, g : g + groups] += xp.matmul(rows, columns)
    y = xp.reshape(y, (*batch, e.out_channels, *outs))
    return y if e.bias is None else y + xp.reshape(bias, (-1, *[1] * n))


def _flat(tables: Sequence[Positions], sizes: Sequence[int]) -> Positions:
    """``tables`` of all axes as one, of elements in row-major order: [tap, position]; outside: the next after all."""
    n = len(tables)
    index = np.zeros((1,) * 2 * n, np.intp)
    outside = np.zeros(index.shape, bool)
    for axis, (table, size) in enumerate(zip(tables, sizes, strict=True)):
        place = np.expand_dims(table, tuple(d for d in range(2 * n) if d not in (axis, n + axis)))
        index, outside = index * size + place, outside | (place < 0)
    return np.reshape(np.where(outside, prod(sizes), index), (prod(map(len, tables)), -1))

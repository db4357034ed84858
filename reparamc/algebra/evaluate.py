"""What an expression means: a reference evaluator in float64, and inputs that reach every border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import product

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
    Reshape,
    Scale,
    Select,
    Source,
    Sum,
    Take,
    rebuild,
    walk,
)
from reparamc.algebra.kernels import coefficients
from reparamc.algebra.shape import Shape


def evaluate(
    root: Expr, inputs: Mapping[Source, Array], extents: Mapping[str, int] | None = None
) -> tuple[Array, float]:
    """The value of ``root``, and the largest magnitude met on the way (the scale of its rounding errors).

    Args:
        inputs: a float64 array for each source, with its channels along the axis that its readers expect.
        extents: what the symbols in the shapes stand for, where the shapes of the inputs do not tell.

    Raises:
        ValueError: neither tells an extent of a reshape.
    """
    values: dict[Expr, Array] = {}
    sizes = dict(extents or {})
    magnitude = 0.0
    for e in walk(root):
        match e:
            case Source():
                y = inputs[e]
                if e.shape is not None:
                    _bind(e.shape, y, sizes)
            case Conv():
                y = (_convolve_transposed if e.transposed else _convolve)(e, values[e.x])
            case Scale():
                y = values[e.x] * _along(e.scale, e.axis) + _along(e.shift, e.axis)
            case BatchNorm():
                scale, shift = coefficients(e)
                y = values[e.x] * _along(scale, e.axis) + _along(shift, e.axis)
            case Sum():
                y = values[e.terms[0]]
                for term in e.terms[1:]:
                    y = y + values[term]
            case Concat():
                y = np.concatenate([values[t] for t in e.terms], axis=e.axis)
            case Select():
                y = np.take(values[e.x], e.index, axis=e.axis)
            case Layout():
                y = _move(e, values[e.x], sizes)
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


def _convolve(e: Conv, x: Array) -> Array:
    n = e.spatial
    batch, extents = x.shape[: x.ndim - n - 1], x.shape[x.ndim - n :]
    outs = [(h - 1 - d) // s + 1 for h, d, s in zip(extents, e.delta, e.stride, strict=True)]
    if any(o <= 0 for o in outs):
        return np.zeros((*batch, e.out_channels, *(max(o, 0) for o in outs)))
    low = [max(0, -a) for a in e.offset]
    high = [max(0, s * (o - 1) + r - (h - 1)) for s, o, r, h in zip(e.stride, outs, e.reach, extents, strict=True)]
    x = np.pad(x.reshape(-1, *x.shape[x.ndim - n - 1 :]), [(0, 0), (0, 0), *zip(low, high, strict=True)])
    per_group, positions = e.weight.shape[1], x.shape[0] * int(np.prod(outs, dtype=int))
    x = np.ascontiguousarray(np.moveaxis(x.reshape(x.shape[0], e.groups, per_group, *x.shape[2:]), 0, 2))
    taps = list(product(*map(range, e.kernel)))

    def seen(tap: tuple[int, ...]) -> Array:
        """What each position of the result reads at ``tap``: [group, in, batch, *outs]."""
        start = [lo + a + d * t for lo, a, d, t in zip(low, e.offset, e.dilation, tap, strict=True)]
        at = tuple(slice(b, b + s * (o - 1) + 1, s) for b, s, o in zip(start, e.stride, outs, strict=True))
        return x[(..., *at)]

    rows = e.weight.reshape(e.groups, -1, per_group * len(taps))
    if per_group > 1 and e.in_channels * len(taps) * positions <= COPIED:
        columns = np.empty((e.groups, per_group, len(taps), x.shape[2], *outs))
        for place, tap in enumerate(taps):
            columns[:, :, place] = seen(tap)
        y = np.matmul(rows, columns.reshape(e.groups, -1, positions))
    else:  # one tap at a time, so that nothing large is copied
        y = np.zeros((e.groups, e.out_channels // e.groups, positions))
        for place, tap in enumerate(taps):
            weight, read = rows[..., place :: len(taps)], seen(tap).reshape(e.groups, per_group, positions)
            y += weight * read if per_group == 1 else np.matmul(weight, read)
    y = np.moveaxis(y.reshape(e.out_channels, x.shape[2], *outs), 0, 1)
    if e.bias is not None:
        y = y + e.bias.reshape(-1, *[1] * n)
    return y.reshape(*batch, e.out_channels, *outs)


def _convolve_transposed(e: Conv, x: Array) -> Array:
    n = e.spatial
    batch, extents = x.shape[: x.ndim - n - 1], x.shape[x.ndim - n :]
    outs = [s * (h - 1) + 1 + d for h, d, s in zip(extents, e.delta, e.stride, strict=True)]
    low = [max(0, -a) for a in e.offset]
    whole = [
        lo + max(o, s * (h - 1) + 1 + max(r, 0))
        for lo, o, s, h, r in zip(low, outs, e.stride, extents, e.reach, strict=True)
    ]
    per_group = e.weight.shape[1]
    x = x.reshape(-1, e.groups, per_group, int(np.prod(extents, dtype=int)))
    weight = e.weight.reshape(e.groups, -1, per_group, *e.kernel)
    y = np.zeros((x.shape[0], e.out_channels, *whole))
    for tap in product(*map(range, e.kernel)):
        start = [lo + a + d * t for lo, a, d, t in zip(low, e.offset, e.dilation, tap, strict=True)]
        at = tuple(slice(b, b + s * (h - 1) + 1, s) for b, s, h in zip(start, e.stride, extents, strict=True))
        y[(slice(None), slice(None), *at)] += np.matmul(weight[(..., *tap)], x).reshape(-1, e.out_channels, *extents)
    y = y[(slice(None), slice(None), *(slice(lo, lo + o) for lo, o in zip(low, outs, strict=True)))]
    if e.bias is not None:
        y = y + e.bias.reshape(-1, *[1] * n)
    return y.reshape(*batch, e.out_channels, *outs)


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


def sample_inputs(
    roots: Sequence[Expr], rng: np.random.Generator, extra: int = 0, small: int | None = None
) -> tuple[dict[Source, Array], dict[str, int]]:
    """Random inputs for expressions over the same sources, just larger than their kernels; extents of symbols.

    The first expression says which extents fit: another one that is equal to it takes them too. Every border case
    occurs: extents exceed the span of the widest kernel by a little (``extra`` more) and differ from axis to axis.
    With ``small`` (1, 2 or 3) the extents of the result are that and the next ones in turn instead, where its
    operators take such a map. The first axis is a batch: of ordinary values, and without ``extra`` and ``small`` also
    of zeros, where nothing hides a shift, and of values that differ by six decades, among which a large weight does
    not always hide a small one.

    Where layout operators stand, the sources' own shapes are used, with small numbers for their symbols, and values
    are ordinary.

    Raises:
        ValueError: no extents fit all branches, or a shape that a layout operator needs is unknown.
    """
    whole = Sum(tuple(roots)) if len(roots) > 1 else roots[0]
    order = list(walk(whole))
    channels_of, axis_of = channels(whole), channel_axes(whole)
    span = max(
        (r - min(a, 0) for e in order if isinstance(e, Conv) for a, r in zip(e.offset, e.reach, strict=True)),
        default=0,
    )
    smallest = 2 + span + extra
    sources = [e for e in walk(roots[0]) if isinstance(e, Source)]
    spatial = -1 - (axis_of[whole] or -1)
    if has_layout(whole):
        symbols = _channel_symbols(sources, axis_of, channels_of)
        for source in sources:
            if source.shape is None:
                raise ValueError("the shape of an operand is unknown")
        if small is not None and any(isinstance(e, Conv) and e.spatial for e in order):
            raise ValueError("its kernels may not fit into so small a map")
        reshapes = [e.op for e in order if isinstance(e, Layout) and isinstance(e.op, Reshape)]
        shapes = [s.shape or () for s in sources] + [s for op in reshapes for s in (op.before, op.after)]
        for symbol in (s for shape in shapes for dim in shape for s in dim.symbols):
            open_extent = smallest + len(symbols) if small is None else (small - 1 + len(symbols)) % 3 + 1
            symbols.setdefault(symbol, open_extent)
        return {e: rng.standard_normal([dim.at(symbols) for dim in e.shape or ()]) for e in sources}, symbols
    wanted = [smallest + axis if small is None else (small - 1 + axis) % 3 + 1 for axis in range(spatial)]
    for e in order:
        if isinstance(e, Scale) and e.axis is not None and -e.axis <= spatial:
            wanted[e.axis] = max(e.scale.size, e.shift.size)  # it acts on a spatial axis
    extents = _extents(roots[0], wanted)
    inputs, batch = {}, 1 if extra or small else 3
    for e in sources:
        spatial = [low + extra % (high - low + 1) for low, high in extents[e]]
        inputs[e] = x = rng.standard_normal((batch, channels_of[e] or 3, *spatial))
        if batch == 3:
            x[1], x[2] = 0.0, x[2] * 10.0 ** rng.uniform(-3, 3, x.shape[1:])
    return inputs, {}


def has_layout(root: Expr) -> bool:
    """Whether the axes of its values change on the way, so that their shapes must be known to evaluate it."""
    acting = {e.axis for e in walk(root) if isinstance(e, Conv | Concat | Select)} | {channel_axes(root)[root] or -1}
    return len(acting) > 1 or any(isinstance(e, Layout) for e in walk(root))


def _channel_symbols(
    sources: Sequence[Source], axis_of: Mapping[Expr, int | None], channels_of: Mapping[Expr, int | None]
) -> dict[str, int]:
    """Extents of the symbols that stand for channels, as the operators around them fix them."""
    found: dict[str, int] = {}
    for e in sources:
        axis, count = axis_of[e], channels_of[e]
        if e.shape is not None and axis is not None and count is not None and -axis <= len(e.shape):
            symbols = e.shape[axis].symbols
            if len(symbols) == 1:
                found[symbols[0]] = count
    return found


SEARCHED = 64
"""Extents tried for a result before its branches are said to agree in size for no input."""


def _extents(root: Expr, wanted: list[int]) -> dict[Expr, list[tuple[int, int]]]:
    """For every node the range of extents, per axis, that gives the root an extent of ``wanted`` or little more."""
    order = list(walk(root))
    found: dict[Expr, list[tuple[int, int]]] = {e: [] for e in order}
    for axis, least in enumerate(wanted):
        tried = (_extents_along(order, axis, len(wanted), n) for n in range(least, least + SEARCHED))
        ranges = next((r for r in tried if r is not None), None)
        if ranges is None:
            raise ValueError("its branches agree in size for no input")
        for e in order:
            found[e].append(ranges[e])
    return found


def _extents_along(order: Sequence[Expr], axis: int, axes: int, extent: int) -> dict[Expr, tuple[int, int]] | None:
    """The same along one axis, for one extent of the root; None when nothing gives it."""
    found = {order[-1]: (extent, extent)}
    for e in reversed(order):
        for child in e.children:
            low, high = found[e]
            if isinstance(e, Conv) and e.spatial == axes:
                s, d = e.stride[axis], e.delta[axis]
                if e.transposed:
                    low, high = -((1 + d - low) // s) + 1, (high - 1 - d) // s + 1
                else:
                    low, high = s * (low - 1) + 1 + d, s * high + d
            if child in found:
                low, high = max(low, found[child][0]), min(high, found[child][1])
            if low > high or high < 1:
                return None
            found[child] = max(low, 1), high
    return found

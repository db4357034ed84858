"""What an expression means: a reference evaluator in float64, and inputs that reach every border."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product

import numpy as np

from reparamc.expr import (
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
    walk,
)
from reparamc.kernel import coefficients
from reparamc.shape import Shape


def evaluate(
    root: Expr, inputs: Mapping[Source, Array], extents: Mapping[str, int] | None = None
) -> tuple[Array, float]:
    """The value of ``root``, and the largest magnitude met on the way (the scale of its rounding errors).

    Args:
        inputs: a float64 array for each source, channel axis ``frame`` places from the right.
        extents: what the symbols in the shapes stand for, where the shapes of the inputs do not tell.
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
                y = values[e.x] * _along(e.scale, e.frame) + _along(e.shift, e.frame)
            case BatchNorm():
                scale, shift = coefficients(e)
                y = values[e.x] * _along(scale, e.frame) + _along(shift, e.frame)
            case Sum():
                y = values[e.terms[0]]
                for term in e.terms[1:]:
                    y = y + values[term]
            case Concat():
                y = np.concatenate([values[t] for t in e.terms], axis=-1 - e.frame)
            case Select():
                y = np.take(values[e.x], e.index, axis=-1 - e.frame)
            case Layout():
                y = _move(e, values[e.x], sizes)
        values[e] = y
        magnitude = max(magnitude, float(np.abs(y).max(initial=0.0)))
    return values[root], magnitude


def _along(v: Array, frame: int | None) -> Array:
    return v.reshape(-1, *[1] * (frame or 0)) if v.ndim else v


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
    _bind(e.op.before, x, sizes)
    unknown = [s for dim in e.op.after for s in dim.symbols if s not in sizes]
    if unknown:
        raise ValueError(f"the extent {unknown[0]!r} of a reshape is unknown")
    return x.reshape([dim.at(sizes) for dim in e.op.after])


def _convolve(e: Conv, x: Array) -> Array:
    n = e.frame
    batch, extents = x.shape[: x.ndim - n - 1], x.shape[x.ndim - n :]
    outs = [(h - 1 - d) // s + 1 for h, d, s in zip(extents, e.delta, e.stride, strict=True)]
    if any(o <= 0 for o in outs):
        return np.zeros((*batch, e.out_channels, *(max(o, 0) for o in outs)))
    low = [max(0, -a) for a in e.offset]
    high = [max(0, s * (o - 1) + r - (h - 1)) for s, o, r, h in zip(e.stride, outs, e.reach, extents, strict=True)]
    x = np.pad(x.reshape(-1, *x.shape[x.ndim - n - 1 :]), [(0, 0), (0, 0), *zip(low, high, strict=True)])
    # One tap at a time: [batch, group, in, positions] meets [group, out, in], and nothing large is copied.
    per_group = e.weight.shape[1]
    weight = e.weight.reshape(e.groups, -1, per_group, *e.kernel)
    y = np.zeros((x.shape[0], e.groups, e.out_channels // e.groups, int(np.prod(outs, dtype=int))))
    for tap in product(*map(range, e.kernel)):
        start = [lo + a + d * t for lo, a, d, t in zip(low, e.offset, e.dilation, tap, strict=True)]
        at = tuple(slice(b, b + s * (o - 1) + 1, s) for b, s, o in zip(start, e.stride, outs, strict=True))
        seen = x[(slice(None), slice(None), *at)].reshape(x.shape[0], e.groups, per_group, -1)
        rows = weight[(..., *tap)]
        y += rows * seen if per_group == 1 else np.matmul(rows, seen)
    y = y.reshape(x.shape[0], e.out_channels, *outs)
    if e.bias is not None:
        y = y + e.bias.reshape(-1, *[1] * n)
    return y.reshape(*batch, e.out_channels, *outs)


def _convolve_transposed(e: Conv, x: Array) -> Array:
    n = e.frame
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


def frames(root: Expr) -> dict[Expr, int | None]:
    """The frame of every node, inferred in both directions; None where nothing fixes it."""
    found: dict[Expr, int | None] = {}
    order = list(walk(root))
    for e in order:
        match e:
            case Sum():
                found[e] = next((f for t in e.terms if (f := found[t]) is not None), None)
            case Scale() if e.frame is None:
                found[e] = found[e.x]
            case _:
                found[e] = e.frame
    for e in reversed(order):
        want = e.frame_in if isinstance(e, Layout) else found[e]
        for child in e.children:
            found[child] = want if found[child] is None else found[child]
    return found


def channels(root: Expr) -> dict[Expr, int | None]:
    """The number of channels of every node, inferred in both directions; None where nothing fixes it."""
    found: dict[Expr, int | None] = {}
    order = list(walk(root))

    def own(e: Expr) -> int | None:
        match e:
            case Source():
                return e.channels
            case Conv():
                return e.out_channels
            case BatchNorm():
                return e.gamma.shape[0]
            case Scale():
                return e.scale.shape[0] if e.scale.ndim else e.shift.shape[0] if e.shift.ndim else found[e.x]
            case Sum():
                return next((c for t in e.terms if (c := found[t]) is not None), None)
            case Concat():
                return sum(e.sizes)
            case Select():
                return len(e.index)
            case Layout():
                return found[e.x]

    for e in order:
        found[e] = own(e)
    for e in reversed(order):
        match e:
            case Conv():
                wanted: Sequence[int | None] = (e.in_channels,)
            case Concat():
                wanted = e.sizes
            case Select():
                wanted = (e.width,)
            case _:
                wanted = (found[e],) * len(e.children)
        for child, want in zip(e.children, wanted, strict=True):
            found[child] = want if found[child] is None else found[child]
    return found


def sample_inputs(
    roots: Sequence[Expr], rng: np.random.Generator, extra: int = 0
) -> tuple[dict[Source, Array], dict[str, int]]:
    """Random inputs for expressions over the same sources, just larger than their kernels; extents of symbols.

    Every border case occurs: extents exceed the span of the widest kernel by a little (``extra``
    more) and differ from axis to axis. Where layout operators stand, the sources' own shapes are
    used, with small numbers for their symbols.

    Raises:
        ValueError: no extents fit all branches, or a shape that a layout operator needs is unknown.
    """
    whole = Sum(tuple(roots)) if len(roots) > 1 else roots[0]
    order = list(walk(whole))
    channels_of, frame_of = channels(whole), frames(whole)
    span = max(
        (r - min(a, 0) for e in order if isinstance(e, Conv) for a, r in zip(e.offset, e.reach, strict=True)),
        default=0,
    )
    smallest = 2 + span + extra
    sources = [e for e in order if isinstance(e, Source)]
    frame = frame_of[whole] or 0
    acting = {e.frame for e in order if isinstance(e, Conv | Concat | Select)}
    if len(acting | {frame}) > 1 or any(isinstance(e, Layout) for e in order):
        symbols = _channel_symbols(sources, frame_of, channels_of)
        for source in sources:
            if source.shape is None:
                raise ValueError("the shape of an operand is unknown")
        reshapes = [e.op for e in order if isinstance(e, Layout) and isinstance(e.op, Reshape)]
        shapes = [s.shape or () for s in sources] + [s for op in reshapes for s in (op.before, op.after)]
        for symbol in (s for shape in shapes for dim in shape for s in dim.symbols):
            symbols.setdefault(symbol, smallest + len(symbols))
        return {e: rng.standard_normal([dim.at(symbols) for dim in e.shape or ()]) for e in sources}, symbols
    wanted = [smallest + axis for axis in range(frame)]
    for e in order:
        if isinstance(e, Scale) and e.frame is not None and e.frame < frame:
            wanted[frame - 1 - e.frame] = max(e.scale.size, e.shift.size)  # it acts on a spatial axis
    extents = _extents(whole, wanted)
    inputs = {}
    for e in sources:
        spatial = [low + extra % (high - low + 1) for low, high in extents[e]]
        inputs[e] = rng.standard_normal((1, channels_of[e] or 3, *spatial))
    return inputs, {}


def _channel_symbols(
    sources: Sequence[Source], frame_of: Mapping[Expr, int | None], channels_of: Mapping[Expr, int | None]
) -> dict[str, int]:
    """Extents of the symbols that stand for channels, as the operators around them fix them."""
    found: dict[str, int] = {}
    for e in sources:
        frame, count = frame_of[e], channels_of[e]
        if e.shape is not None and frame is not None and count is not None and frame < len(e.shape):
            symbols = e.shape[len(e.shape) - 1 - frame].symbols
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
            if isinstance(e, Conv) and e.frame == axes:
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

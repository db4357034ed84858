"""What can be told of the values in an expression: channel axes, numbers of channels, shapes."""

from __future__ import annotations

from collections.abc import Sequence

from reparamc.algebra.arrays import count
from reparamc.algebra.expr import BatchNorm, Concat, Conv, Expr, Layout, Scale, Select, Source, Sum, walk
from reparamc.algebra.shape import Dim, Shape


def channel_axes(root: Expr) -> dict[Expr, int | None]:
    """The channel axis of every node, inferred in both directions; None where nothing fixes it."""
    found: dict[Expr, int | None] = {}
    order = list(walk(root))
    for e in order:
        match e:
            case Sum():
                found[e] = next((axis for t in e.terms if (axis := found[t]) is not None), None)
            case Scale() if e.is_scalar:
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
            return e.axis, (count(e.gamma),), count(e.gamma)
        case Scale() if e.scale.ndim or e.shift.ndim:
            width = count(e.scale if e.scale.ndim else e.shift)
            return e.axis, (width,), width
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
        elif isinstance(e, Layout) and e.splits_channels:
            found[e] = None
        else:
            found[e] = next((c for x in e.children if (c := found[x]) is not None), None)
    for e in reversed(order):
        told = _told(e)
        if isinstance(e, Layout) and e.splits_channels:
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
            axis, read, width = told
            made[e], wanted = (axis, width), [(axis, n) for n in read]
        elif isinstance(e, Source):
            made[e] = None if e.axis is None or e.channels is None else (e.axis, e.channels)
        elif isinstance(e, Layout):
            inner = made[e.x]
            whole = not e.splits_channels and inner is not None and inner[0] == e.axis_in
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
    order = list(walk(root))
    acting = {e.axis for e in order if isinstance(e, Conv | Concat | Select)} | {channel_axes(root)[root] or -1}
    if any(isinstance(e, Concat | Select) for e in order):
        acting |= {e.axis for e in order if isinstance(e, BatchNorm | Scale) and e.axis is not None}
    return len(acting) > 1 or any(isinstance(e, Layout) for e in order)


def sizes(e: Expr, spatial: int) -> tuple[int | None, ...]:
    """The sizes of ``e`` along the last ``spatial`` axes, as far as what it is computed from tells."""
    while isinstance(e, Scale | BatchNorm) or (isinstance(e, Select) and e.axis == -1 - spatial):
        e = e.x
    shape = e.shape if isinstance(e, Source) else None
    return tuple(dim.known for dim in shape[len(shape) - spatial :]) if shape is not None else (None,) * spatial


def shape_of_value(root: Expr) -> Shape | None:
    """The shape of ``root``, where what it is computed from tells it in full."""
    found: dict[Expr, Shape | None] = {}
    for e in walk(root):
        inner = found[e.children[0]] if e.children else None
        match e:
            case Source():
                found[e] = e.shape
            case Scale() | BatchNorm():
                found[e] = inner
            case Sum():
                found[e] = next((shape for t in e.terms if (shape := found[t]) is not None), None)
            case Select() if inner is not None and -e.axis <= len(inner):
                found[e] = _with_channels(inner, len(e.index), inner[len(inner) + e.axis + 1 :])
            case Conv() if inner is not None and e.spatial < len(inner):
                spatial = [_size(e, axis, dim) for axis, dim in enumerate(inner[len(inner) - e.spatial :])]
                known = [dim for dim in spatial if dim is not None]
                found[e] = _with_channels(inner, e.out_channels, known) if len(known) == e.spatial else None
            case _:
                found[e] = None
    return found[root]


def _with_channels(shape: Shape, channels: int, after: Sequence[Dim]) -> Shape:
    """``shape`` with other channels, and other sizes ``after`` them."""
    return (*shape[: len(shape) - len(after) - 1], Dim(channels), *after)


def _size(conv: Conv, axis: int, dim: Dim) -> Dim | None:
    """What ``conv`` makes of the size ``dim``."""
    if conv.stride[axis] == 1 and conv.delta[axis] == 0:
        return dim
    return None if dim.known is None else Dim(conv.size_after(axis, dim.known))

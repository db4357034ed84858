"""Positions that become channels before a convolution, and channels that become positions after one, go into it.

    W * S(x) + b                =  W' * x + b                   S takes each block of positions as channels
    W * concat(x[i], x[j]) + b  =  W' * x + b                   x[i] and x[j] every s-th position of x
    W D(V * x + a) + b          =  D((W' V) * x + (W' a + b'))  D makes positions of channels; W' is W for each

YOLOv5 cuts its image into four (Focus), other networks call it space to depth, pixel unshuffle or patch merging: a
kernel over the result is a kernel over the image, of so many times the size and the stride. A matrix of channels
(EDSR: the mean of the images) that follows a pixel shuffle is one of the channels before it.

Exact for every size that the original takes: S demands that blocks fit, and a concatenation that its terms have one
size. So zeros that the kernel reads beyond S(x) are zeros beyond x, if a slice leaves out nothing at the end, and less
than a step at the start. Done where it is cheaper; a dilated kernel would be full of zeros.
"""

from __future__ import annotations

from itertools import accumulate

from reparamc.algebra.arrays import taken, together, zeros_of
from reparamc.algebra.cost import Objective
from reparamc.algebra.expr import Array, Concat, Conv, Expr, Layout, Spread
from reparamc.algebra.kernels import cannot_compose, compose, composed_shape, equal_taps, merge
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined, Pass

DEARER = "as one kernel over the positions that become channels, it would cost more"
BORDER = "a slice before it leaves out values at the border, where it reads zeros"


def into_kernel(e: Conv, objective: Objective) -> Expr | Declined | None:
    """W * S(x) = W' * x, and W * concat(x[i], x[j]) = W' * x."""
    if e.groups > 1 or e.transposed or e.spatial == 0:
        return None
    cuts = _cuts(e)
    if not cuts:
        return None
    if any(cannot_compose(e, cut) for cut, _ in cuts):
        return Declined(BORDER)
    found = _over_all(e, cuts)
    if found.skips_border:
        return Declined(BORDER)
    return found if objective.cost(found) < objective.cost(e) else Declined(DEARER)


def _cuts(e: Conv) -> list[tuple[Conv, range]]:
    """The slices of one value that ``e`` reads side by side, all of one step, and the channels that each is.

    None of them where it reads anything else.
    """
    match e.x:
        case Layout(op=Spread(back=True, block=b) as op) as layout if layout.axis_in == e.axis == -3:
            if isinstance(layout.x, Layout) and isinstance(layout.x.op, Spread):
                return []  # they cancel
            whole, count = range(e.in_channels), e.in_channels // b**2
            rows = [whole[n * count : (n + 1) * count] if op.outer else whole[n :: b**2] for n in range(b**2)]
            return [(_sliced(layout.x, count, b, divmod(n, b)), rows[n]) for n in range(b**2)]
        case Concat() if e.x.axis == e.axis:
            starts = accumulate(e.x.sizes, initial=0)
            found = [(_cut(t), range(at, at + n)) for t, n, at in zip(e.x.terms, e.x.sizes, starts, strict=False)]
        case _:
            return []
    cuts = [(cut, rows) for cut, rows in found if cut is not None]
    alike = {(cut.x, cut.stride) for cut, _ in cuts}
    return cuts if len(cuts) == len(found) and len(alike) == 1 and max(cuts[0][0].stride) > 1 else []


def _sliced(x: Expr, channels: int, step: int, first: tuple[int, ...]) -> Conv:
    """Every ``step``-th position of ``x``."""
    ones = (1,) * len(first)
    return Conv(x, equal_taps(channels, ones), None, (step,) * len(first), ones, first, first, channels)


def _cut(e: Expr) -> Conv | None:
    """``e``, and the slices before it, as one."""
    found = None
    while isinstance(e, Conv) and e.is_weightless and all(k == 1 for k in e.kernel):
        if found is not None and cannot_compose(found, e):
            break
        found = e if found is None else compose(found, e)
        e = e.x
    return found


def _over_all(e: Conv, cuts: list[tuple[Conv, range]]) -> Conv:
    """``e`` as a kernel over what ``cuts`` are slices of. These have one size wherever they are computed."""
    shapes = [composed_shape(e, cut) for cut, _ in cuts]
    delta = tuple(map(max, zip(*(shape.delta for shape in shapes), strict=True)))
    parts = [
        replace(shape, weight=taken(e.weight, rows, axis=1), delta=delta)
        for shape, (_, rows) in zip(shapes, cuts, strict=True)
    ]
    return replace(merge(parts), bias=e.bias)


def into_producer(e: Conv, objective: Objective) -> Expr | None:
    """W D(V * x) = D((W' V) * x)."""
    match e:
        case Conv(groups=1, x=Layout(op=Spread(back=False) as op, x=Conv() as inner) as layout) if e.axis == -3:
            if not e.is_pointwise or e.reads_taps:
                return None
        case _:
            return None
    bias = e.bias if e.bias is None else _each(e.bias, op)
    wide = replace(e, x=inner, weight=_each(e.weight, op), bias=bias)
    if cannot_compose(wide, inner):
        return None
    found = Layout(compose(wide, inner), op, layout.axis_in)
    return found if objective.cost(found) < objective.cost(e) else None


def _each(a: Array, op: Spread) -> Array:
    """A matrix of channels, or a bias, for each position of a block."""
    xp, a = together(a)
    times, sizes = op.block**2, a.shape[:2]
    grown = zeros_of(a, (*(n for size in sizes for n in ((times, size) if op.outer else (size, times))), *a.shape[2:]))
    for n in range(times):
        at = (n, slice(None)) if op.outer else (slice(None), n)
        grown[at * len(sizes)] = a
    return xp.reshape(grown, (*(size * times for size in sizes), *a.shape[2:]))


SPACE_TO_DEPTH = Pass(
    name="space-to-depth",
    equation="W * S(x) + b = W' * x + b;  W D(V * x + a) + b = D((W' V) * x + (W' a + b'))",
    exact_when="the slices are of one size, and what they leave out is less than a step; if cheaper",
    priced=(into_kernel, into_producer),
    refusals=(DEARER, BORDER),
)

"""The algebra of kernels: what may be done to one convolution, or to several, without any graph.

All of it is exact in real arithmetic; whether it is also *allowed* (borders, grids) is what the
rewrites decide before they call. Arrays are float64, of any library (`arrays`).
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import product
from math import gcd, prod
from typing import Any

import numpy as np

from reparamc.algebra.arrays import added, array_of, concatenated, derived, factor, is_all, taken, together, zeros_of
from reparamc.algebra.expr import ONE, ZERO, Array, BatchNorm, Conv, Expr, Ints, Scale
from reparamc.algebra.infer import sizes
from reparamc.algebra.records import replace

OF_AN_OPERATOR = "it is the weight of an operator into which only a matrix of channels can be multiplied"
ONE_EACH = "it is the weight of an operator that has one factor for each channel"
OF_THIS_SHAPE = "what its own Python does may depend on the shape of its weight"
BIAS_MEETS_PADDING = "its bias meets the zero padding of the next convolution"
VARYING = "before a transposed convolution its shift is not uniform: outputs receive different numbers of taps"
TRANSPOSED = "a transposed convolution only composes with a 1x1 convolution"
OTHER_AXES = "it acts on other axes than the next convolution"
READS_ZEROS = "the next convolution pads this result with zeros, which a composed kernel would not read"
NOT_COMPOSED = (OF_AN_OPERATOR, ONE_EACH, BIAS_MEETS_PADDING, VARYING, TRANSPOSED, OTHER_AXES, READS_ZEROS)
"""What `cannot_compose` may say."""


def coefficients(e: Scale | BatchNorm) -> tuple[Array, Array]:
    """(scale, shift) of ``y = scale * x + shift``; for BatchNorm scale = gamma / sqrt(var + eps)."""
    if isinstance(e, Scale):
        return e.scale, e.shift
    xp, gamma, beta, mean, var = together(e.gamma, e.beta, e.mean, e.var)
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = gamma / xp.sqrt(var + e.eps)
        return scale, beta - mean * scale


def scaled_again(scale: Array, shift: Array, inner: tuple[Array, Array]) -> tuple[Array, Array]:
    """(scale, shift) of ``scale * (s x + t) + shift``, where ``inner`` is (s, t)."""
    _, scale, shift, s, t = together(scale, shift, *inner)
    return scale * s, scale * t + shift


def arithmetic(op: str, c: Array, constant_first: bool, factor: float = 1.0) -> tuple[Array, Array]:
    """(scale, shift) of an operation of x and a constant ("add", "sub", "mul"), or of x divided by it ("div").

    ``factor`` multiplies the second operand of a sum or difference.
    """
    sign = -factor if op == "sub" else factor
    match op:
        case "add" | "sub" if constant_first:
            return np.asarray(sign), c
        case "add" | "sub":
            return ONE, derived(c, c.shape, lambda c: array_of(sign * c))
        case "mul":
            return c, ZERO
        case _:
            return derived(c, c.shape, _inverse), ZERO


def _inverse(c: Array) -> Array:
    with np.errstate(divide="ignore"):
        return array_of(1 / c)


def scale_outputs(conv: Conv, scale: Array, shift: Array) -> Conv:
    """``scale * conv(x) + shift``: W' = scale[o] W, b' = scale b + shift."""
    xp, weight, bias, scale, shift = together(factor(conv.weight), conv.bias_or_zero, scale, shift)
    rows = scale if scale.shape == (conv.out_channels,) else xp.broadcast_to(scale, (conv.out_channels,))
    weight = weight * xp.reshape(rows, (-1, *[1] * (weight.ndim - 1)))
    if conv.bias is None and is_all(shift, 0):
        return replace(conv, weight=weight)
    return replace(conv, weight=weight, bias=rows * bias + shift)


def scale_inputs(conv: Conv, x: Expr, scale: Array, shift: Array) -> Conv:
    """``conv(scale * x + shift)`` as a convolution of x: W' = W scale[i], b' = b + sum over i, t of W shift[i].

    The bias is right where every tap reads inside the size: callers see to it that the shift is
    zero or the kernel reads no padding.
    """
    per_group = conv.in_channels // conv.groups
    rows = conv.out_channels // conv.groups
    no_shift = is_all(shift, 0)
    held = factor(conv.weight) if no_shift else conv.weight  # a sum of it takes float64
    xp, weight, bias, scale, shift = together(held, conv.bias_or_zero, scale, shift)
    grouped = xp.reshape(weight, (conv.groups, rows, per_group, *conv.kernel))
    scales, shifts = (
        xp.reshape(xp.broadcast_to(v, (conv.in_channels,)), (conv.groups, 1, per_group)) for v in (scale, shift)
    )
    weight = xp.reshape(grouped * xp.reshape(scales, (*scales.shape, *[1] * conv.spatial)), conv.weight.shape)
    if no_shift:
        return replace(conv, x=x, weight=weight)
    taps = _summed_taps(xp, grouped)
    read = xp.matmul(taps, xp.permute_dims(shifts, (0, 2, 1)))
    return replace(conv, x=x, weight=weight, bias=bias + xp.reshape(read, (-1,)))


def _summed_taps(xp: Any, weight: Array) -> Array:
    """``weight`` [group, output, input, *kernel], summed over its taps."""
    if prod(weight.shape[3:]) == 1:  # a sum would take as long as a product
        return xp.reshape(weight, weight.shape[:3])
    return xp.sum(weight, axis=tuple(range(3, weight.ndim)))


def select_outputs(conv: Conv, index: Ints) -> Conv:
    """Some of the outputs of ``conv``, in the order of ``index``: rows of W and b. For one group only."""
    bias = None if conv.bias is None else taken(conv.bias, index)
    return replace(conv, weight=taken(conv.weight, index), bias=bias)


def gather_inputs(conv: Conv, x: Expr, index: Ints) -> Conv:
    """``conv`` of the channels ``index`` of ``x``, each of them at least once, as a convolution of x: for each channel
    the sum of the columns that read it. For one group only.
    """
    order, times = np.argsort(index, kind="stable"), np.bincount(index)
    first, last, weight = np.cumsum(times) - times, len(order) - 1, conv.weight
    if times.min() < times.max():  # some have columns of zeros among theirs
        weight = concatenated([weight, zeros_of(weight, (weight.shape[0], 1, *conv.kernel))], axis=1)
    turns = [np.where(turn < times, order[np.minimum(first + turn, last)], last + 1) for turn in range(times.max())]
    return replace(conv, x=x, weight=added([taken(weight, turn, axis=1) for turn in turns]))


def stacked_shape(convs: Sequence[Conv]) -> Conv:
    """What `stack` makes, all but its weights and bias: those are zero and take no memory."""
    shape = merged_shape(convs)
    rows = sum(c.out_channels for c in convs)
    return replace(shape, weight=_blank(rows, *shape.weight.shape[1:]))


def stack(convs: Sequence[Conv]) -> Conv:
    """The outputs of dense convolutions of one input and one grid, one after the other: rows put below rows."""
    spread = [merge([c, *_silent(convs, c)]) for c in convs]  # all on the hull of their taps
    weight = concatenated([c.weight for c in spread])
    bias = concatenated([c.bias_or_zero for c in convs]) if any(c.bias is not None for c in convs) else None
    return replace(spread[0], weight=weight, bias=bias)


def _silent(convs: Sequence[Conv], like: Conv) -> list[Conv]:
    """``convs`` with weights of zero and as many rows as ``like``: they span taps and add nothing."""
    shape = like.weight.shape[:2]
    return [replace(c, weight=np.zeros((*shape, *c.kernel)), bias=None) for c in convs]


def composed_shape(outer: Conv, inner: Conv) -> Conv:
    """``outer(inner(x))`` as one convolution, all but its weights: those are zero and take no memory."""
    transposed = inner.transposed or outer.transposed
    if transposed:  # the other is a matrix of channels
        spread = inner if inner.transposed else outer
        kernel, dilation = spread.kernel, spread.dilation
        stride, offset, delta = spread.stride, spread.offset, spread.delta
    else:
        pairs = list(zip(inner.stride, outer.stride, strict=True))
        stride = tuple(a * b for a, b in pairs)
        offset = tuple(a + s * b for a, s, b in zip(inner.offset, inner.stride, outer.offset, strict=True))
        delta = tuple(a + s * b for a, s, b in zip(inner.delta, inner.stride, outer.delta, strict=True))
        reach = [r + s * q for r, s, q in zip(inner.reach, inner.stride, outer.reach, strict=True)]
        dilation = tuple(
            gcd(*[d for d, k in ((da, ka), (s * db, kb)) if k > 1]) or 1
            for da, ka, s, db, kb in zip(
                inner.dilation, inner.kernel, inner.stride, outer.dilation, outer.kernel, strict=True
            )
        )
        kernel = tuple((r - a) // d + 1 for r, a, d in zip(reach, offset, dilation, strict=True))
    groups = gcd(inner.groups, outer.groups)
    weight = _blank(outer.out_channels, inner.in_channels // groups, *kernel)
    return Conv(inner.x, weight, None, stride, dilation, offset, delta, groups, transposed)


def compose(outer: Conv, inner: Conv) -> Conv:
    """``outer(inner(x))`` as one convolution: taps meet at ``a + d t + s (a' + d' u)``, W = sum over them of W' W.

    The callers see to it that ``outer`` reads no zero that ``inner`` would have computed otherwise.
    """
    shape = composed_shape(outer, inner)
    groups = shape.groups
    xp, *weights = together(*(regroup(c, groups) for c in (outer, inner)))
    blocks = [
        xp.reshape(w, (groups, c.out_channels // groups, c.in_channels // groups, *c.kernel))
        for c, w in zip((outer, inner), weights, strict=True)
    ]
    steps = (1,) * inner.spatial if shape.transposed else inner.stride
    weight = zeros_of(blocks[0], (groups, shape.out_channels // groups, shape.in_channels // groups, *shape.kernel))
    for u in product(*map(range, outer.kernel)):
        rows = blocks[0][(..., *u)]
        for t in product(*map(range, inner.kernel)):
            at = tuple(
                (da * a + s * db * b) // d
                for da, a, s, db, b, d in zip(inner.dilation, t, steps, outer.dilation, u, shape.dilation, strict=True)
            )
            weight[(..., *at)] += xp.matmul(rows, blocks[1][(..., *t)])
    bias = outer.bias
    if inner.bias is not None:
        taps = _summed_taps(xp, blocks[0])
        _, taps, added_before = together(taps, inner.bias)
        read = xp.reshape(xp.matmul(taps, xp.reshape(added_before, (groups, -1, 1))), (-1,))
        bias = read if bias is None else added([bias, read])
    return replace(shape, weight=xp.reshape(weight, shape.weight.shape), bias=bias)


def cannot_compose(outer: Conv, inner: Conv) -> str | None:
    """Why ``outer(inner(x))`` is not a convolution of x; None when it is.

    What the outer kernel reads beyond the size of the inner result is zero. The composition computes
    those values from x instead, which gives zero only for an inner kernel of one tap without bias that leaves
    nothing of x out at the end, and less than a stride at the start.
    """
    if outer.axis != inner.axis:
        return OTHER_AXES
    if inner.reads_taps and not outer.is_pointwise:
        return OF_AN_OPERATOR
    if inner.reads_taps and inner.is_per_channel and not outer.is_per_channel:
        return ONE_EACH
    if outer.transposed or inner.transposed:
        if inner.transposed:
            return None if outer.is_pointwise and not outer.transposed else TRANSPOSED
        return (None if inner.bias is None else VARYING) if inner.is_pointwise else TRANSPOSED
    if not outer.reads_padding:
        return None
    covers = all(a < s for a, s in zip(inner.offset, inner.stride, strict=True)) and min(inner.padding[1]) >= 0
    if covers and all(k == 1 for k in inner.kernel):
        return None if inner.bias is None or is_all(inner.bias, 0) else BIAS_MEETS_PADDING
    return READS_ZEROS


def pointwise(x: Expr, scale: Array, shift: Array, channels: int, spatial: int) -> Conv:
    """``scale * x + shift`` as a kernel of one tap at offset 0 along ``spatial`` axes, one group per channel."""
    ones, zeros = (1,) * spatial, (0,) * spatial
    xp, scale, shift = together(scale, shift)
    empty = zeros_of(scale, (channels,))
    weight = xp.reshape(empty + scale, (channels, 1, *ones))
    bias = None if is_all(shift, 0) else empty + shift
    return Conv(x, weight, bias, stride=ones, dilation=ones, offset=zeros, delta=zeros, groups=channels)


def equal_taps(channels: int, kernel: Ints) -> Array:
    """The weight of the mean over ``kernel``, per channel."""
    return np.full((channels, 1, *kernel), 1 / prod(kernel))


def averaged(x: Expr, taps: Array, stride: Ints, dilation: Ints, begin: Ints, end: Ints) -> Expr:
    """The mean of what ``taps`` read, per channel, which is a convolution; ``x`` if they read each position alone."""
    conv = Conv.padded(x, taps, None, stride, dilation, begin, end, groups=len(taps))
    return x if conv.is_pointwise else conv


def grid(conv: Conv) -> Hashable:
    """What convolutions of one input share if their results have the same sizes.

    They agree for every input size if strides and deltas do. Where the sizes of the input are known,
    those of the result are all that counts.
    """
    known = zip(sizes(conv.x, conv.spatial), conv.delta, strict=True)
    rows = [
        d if n is None or conv.transposed else ("size", conv.size_after(axis, n)) for axis, (n, d) in enumerate(known)
    ]
    return conv.stride, tuple(rows), conv.axis, conv.transposed


def merged_shape(convs: Sequence[Conv]) -> Conv:
    """What `merge` makes, all but its weights and bias: those are zero and take no memory.

    Where deltas differ, sizes are known, and the smallest is right: its padding reaches as far as any tap needs.
    """
    first = convs[0]
    delta = tuple(min(deltas) for deltas in zip(*(c.delta for c in convs), strict=True))
    offset, dilation, kernel = (
        zip(*(_span(convs, axis) for axis in range(first.spatial)), strict=True) if first.spatial else ((), (), ())
    )
    groups = gcd(*(c.groups for c in convs))
    weight = _blank(first.out_channels, first.in_channels // groups, *kernel)
    return replace(first, weight=weight, bias=None, dilation=dilation, offset=offset, delta=delta, groups=groups)


def _blank(*shape: int) -> Array:
    """Zeros that take no memory."""
    return np.ndarray(shape, np.float64, _ZERO, strides=(0,) * len(shape))


_ZERO = bytes(8)


def merge(convs: Sequence[Conv]) -> Conv:
    """The sum of convolutions of one input and one `grid`, as one.

    Taps add at their absolute offsets: the new kernel spans from the first tap of all to the last,
    on the coarsest grid that holds every tap. Its groups are the greatest common divisor of theirs.
    """
    shape = merged_shape(convs)
    _, *weights = together(*(regroup(c, shape.groups) for c in convs))
    merged = zeros_of(weights[0], shape.weight.shape)
    for conv, weight in zip(convs, weights, strict=True):
        at = tuple(
            slice((a - a0) // d0, (r - a0) // d0 + 1, max(1, d // d0))  # one tap may have any dilation
            for a, r, d, a0, d0 in zip(
                conv.offset, conv.reach, conv.dilation, shape.offset, shape.dilation, strict=True
            )
        )
        merged[(slice(None), slice(None), *at)] += weight
    biased = [c.bias for c in convs if c.bias is not None]
    return replace(shape, weight=merged, bias=added(biased) if biased else None)


def regroup(conv: Conv, groups: int) -> Array:
    """The weight of ``conv`` written with fewer groups (a divisor of its own): block-diagonal inside each."""
    ratio = conv.groups // groups
    if ratio == 1:
        return conv.weight
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    xp, weight = together(conv.weight)
    blocks = xp.reshape(weight, (groups, ratio, rows, columns, *conv.kernel))
    square = zeros_of(weight, (groups, ratio * ratio, rows, columns, *conv.kernel))
    square[:, :: ratio + 1] = blocks  # the diagonal
    square = xp.reshape(square, (groups, ratio, ratio, rows, columns, *conv.kernel))
    turned = xp.permute_dims(square, (0, 1, 3, 2, *range(4, square.ndim)))
    return xp.reshape(turned, (conv.out_channels, ratio * columns, *conv.kernel))


def _span(convs: Sequence[Conv], axis: int) -> Ints:
    """(offset, dilation, taps) of the coarsest grid along ``axis`` that holds the taps of all."""
    offset = min(c.offset[axis] for c in convs)
    steps = [c.dilation[axis] for c in convs if c.kernel[axis] > 1] + [c.offset[axis] - offset for c in convs]
    dilation = gcd(*steps) or 1
    return offset, dilation, (max(c.reach[axis] for c in convs) - offset) // dilation + 1


def swap_sides(weight: Array, groups: int) -> Array:
    """(out, in / groups, *kernel) as (in, out / groups, *kernel), the layout of transposed convolutions; and back."""
    first, second, *kernel = weight.shape
    shape = (groups * second, first // groups, *kernel)

    def swap(weight: Array) -> Array:
        xp, weight = together(weight)
        blocks = xp.reshape(weight, (groups, first // groups, second, *kernel))
        swapped = xp.permute_dims(blocks, (0, 2, 1, *range(3, blocks.ndim)))
        weight = zeros_of(weight, swapped.shape)
        weight[...] = swapped  # in row-major order, which a view is not
        return xp.reshape(weight, shape)

    return derived(weight, shape, swap)


def transposed(
    x: Expr, weight: Array, bias: Array | None, stride: Ints, dilation: Ints, begin: Ints, end: Ints, groups: int
) -> Conv:
    """The transposed convolution that drops ``begin`` results before and ``end`` after (negative: adds zeros).

    ``weight`` is (out, in / groups, *kernel). With stride one throughout it is the ordinary
    convolution with reversed taps.
    """
    offset = tuple(-b for b in begin)
    reach = tuple(d * (k - 1) - b for d, k, b in zip(dilation, weight.shape[2:], begin, strict=True))
    delta = tuple(r - e for r, e in zip(reach, end, strict=True))
    if all(s == 1 for s in stride):
        axes = tuple(range(2, weight.ndim))
        reversed_taps = derived(weight, weight.shape, lambda w: together(w)[0].flip(w, axis=axes))
        kept = tuple(-d for d in delta)
        return Conv(x, reversed_taps, bias, stride, dilation, tuple(-r for r in reach), kept, groups)
    return Conv(x, weight, bias, stride, dilation, offset, delta, groups, transposed=True)

"""What `bn_folding` and `scale_folding` share: one affine map per channel, into a convolution beside it.

Operators that move whole channels commute with it, and a sum shares it out:

    s P(x) + t  =  P(s x + t)                        P a layout operator that keeps the channel axis whole,
                                                     or splits it, so that s and t are the same in each part,
                                                     or any, where s and t are scalars
    s (a + b) + t  =  (s a + t) + s b
    s concat(a, b) + t  =  concat(s' a + t', s'' b + t'')
"""

from __future__ import annotations

from reparamc.algebra.arrays import Array, concatenated, is_all, taken, together
from reparamc.algebra.channel_map import brought_back
from reparamc.algebra.expr import ONE, ZERO, BatchNorm, Concat, Conv, Expr, Layout, Scale, Select, Sum, acts_on, rebuild
from reparamc.algebra.kernels import VARYING, coefficients, scale_inputs, scale_outputs, scaled_again
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined

OTHER_AXIS = "it acts on another axis than the convolution"
ONE_OUT = "it would broadcast the convolution's single channel"
ONE_IN = "it would broadcast a single channel"
BORDER = "its shift meets the zero padding of the next convolution"
REFUSALS = (OTHER_AXIS, ONE_OUT, ONE_IN, BORDER, VARYING)
DEPTH = 16
"""Sums within sums that are searched for convolutions; layout operators do not count."""


def into_producer(e: Scale | BatchNorm) -> Expr | Declined | None:
    """``s x + t`` as an operator no larger than x, where x ends in convolutions; None where it does not."""
    scale, shift = coefficients(e)
    return _absorb(e.x, scale, shift, e.axis)


def _absorb(e: Expr, scale: Array, shift: Array, axis: int | None, depth: int = 0) -> Expr | Declined | None:
    layouts, e, below = through_layouts(e, axis, shifted=not is_all(shift, 0))
    if axis is not None and below is None:
        found = _brought_back(layouts, scale, shift, axis)
        if found is None:
            return Declined(OTHER_AXIS) if isinstance(e, Conv) else None
        scale, shift, below = found
    axis = below
    match e:
        case Conv() if not e.is_weightless or (e.reads_padding and not e.skips_border):
            if axis is not None and axis != e.axis:
                return Declined(OTHER_AXIS)
            if not _fits(scale, shift, e.out_channels):
                return Declined(ONE_OUT)
            inner: Expr | Declined | None = scale_outputs(e, scale, shift)
        case Sum() | Concat() if depth < DEPTH:
            inner = _share_out(e, scale, shift, axis, depth)
        case Scale() | BatchNorm() if depth and axis in (None, e.axis):
            inner = _scaled(e, scale, shift)
        case _:
            inner = None
    return under(layouts, inner) if inner is not None and not isinstance(inner, Declined) else inner


def _brought_back(
    layouts: list[Layout | Conv], scale: Array, shift: Array, axis: int
) -> tuple[Array, Array, int] | None:
    """What acts along ``axis`` after ``layouts``, which split or merge the channels, as what acts before them."""
    for layout in layouts:
        if isinstance(layout, Conv):
            if axis != layout.axis:
                return None
            continue
        at, vectors = axis, list[Array]()
        for v in (scale, shift):
            found = brought_back(layout.op, v, axis) if v.ndim else (v, at)
            if found is None:
                return None
            vectors.append(found[0])
            at = found[1]
        (scale, shift), axis = vectors, at
    return scale, shift, axis


def _share_out(e: Sum | Concat, scale: Array, shift: Array, axis: int | None, depth: int) -> Expr | None:
    """``scale`` into every term; None unless all can take it, because otherwise nothing is saved."""
    terms: list[Expr] = []
    at = 0
    for place, term in enumerate(e.terms):
        s, t = scale, shift
        if isinstance(e, Concat):
            if axis not in (None, e.axis):
                return None
            s, t = (v[at : at + e.sizes[place]] if v.ndim else v for v in (scale, shift))
            at += e.sizes[place]
        elif place:
            t = ZERO
        part = _absorb(term, s, t, axis, depth + 1)
        if part is None or isinstance(part, Declined):
            return None
        terms.append(part)
    return rebuild(e, terms)


def _scaled(e: Scale | BatchNorm, scale: Array, shift: Array) -> Scale | BatchNorm:
    if isinstance(e, Scale):
        s, t = scaled_again(scale, shift, (e.scale, e.shift))
        return replace(e, scale=s, shift=t)
    s, t = scaled_again(scale, shift, (e.gamma, e.beta))
    return replace(e, gamma=s, beta=t)


def into_consumer(conv: Conv, kind: type[Scale] | type[BatchNorm]) -> Expr | Declined | None:
    """``conv(s x + t)`` as one convolution of x; x may be moved, selected or concatenated in between."""
    if conv.is_weightless:
        return None  # it would no longer be the pooling or padding that it is
    layouts, e, axis = through_layouts(conv.x, conv.axis, shifted=True)
    if isinstance(e, Concat):
        return _columns(conv, layouts, e, kind) if axis == e.axis else None
    outer, index = e, ()
    if isinstance(e, Select):
        e, index = e.x, e.index
    if not isinstance(e, kind):
        return None
    if not acts_on(e, axis) or (isinstance(outer, Select) and outer.axis != axis):
        return Declined(OTHER_AXIS)
    scale, shift = coefficients(e)
    if isinstance(outer, Select):
        scale, shift = (taken(v, index) if v.ndim else v for v in (scale, shift))
    if not _fits(scale, shift, conv.in_channels):
        return Declined(ONE_IN)
    if not is_all(shift, 0) and conv.reads_padding:
        return Declined(_border(conv), at_border=True)
    x = rebuild(outer, [e.x]) if isinstance(outer, Select) else e.x
    return scale_inputs(conv, under(layouts, x), scale, shift)


def _columns(
    conv: Conv, layouts: list[Layout | Conv], e: Concat, kind: type[Scale] | type[BatchNorm]
) -> Expr | Declined | None:
    """``conv(concat(s x + t, y))``: the columns of x take s and t, those of y stay."""
    terms: list[Expr] = []
    scales: list[Array] = []
    shifts: list[Array] = []
    refusal: Declined | None = None
    for term, size in zip(e.terms, e.sizes, strict=True):
        s, t = ONE, ZERO
        if isinstance(term, kind) and acts_on(term, e.axis):
            found = coefficients(term)
            if not is_all(found[1], 0) and conv.reads_padding:
                refusal = Declined(_border(conv), at_border=True)
            else:
                (s, t), term = found, term.x
        terms.append(term)
        for vectors, v in ((scales, s), (shifts, t)):
            vectors.append(together(v)[0].broadcast_to(v, (size,)))
    if all(a is b for a, b in zip(terms, e.terms, strict=True)):
        return refusal
    x = under(layouts, rebuild(e, terms))
    return scale_inputs(conv, x, concatenated(scales), concatenated(shifts))


def _border(conv: Conv) -> str:
    return VARYING if conv.transposed else BORDER


def through_layouts(e: Expr, axis: int | None, *, shifted: bool) -> tuple[list[Layout | Conv], Expr, int | None]:
    """The chain of operators that ends in ``e`` and commutes with a scale, last first, and what it starts from.

    Layout operators, and convolutions under another name: poolings, crops, paddings. A padding does not
    commute with a shift: where ``shifted``, the chain starts after it.

    Returns:
        The chain, what it starts from, and where ``axis`` is there; None where
        ``axis`` is None, or where an operator treats another axis as its channels or does not keep the axis whole.
    """
    chain: list[Layout | Conv] = []
    while isinstance(e, Layout) or (isinstance(e, Conv) and e.is_weightless and not (shifted and e.reads_padding)):
        chain.append(e)
        if axis is not None:
            axis_in = e.axis_in if isinstance(e, Layout) else e.axis
            axis = axis_in if axis == e.axis else None
        e = e.x
    return chain, e, axis


def under(layouts: list[Layout | Conv], e: Expr) -> Expr:
    """``e`` with a chain of such operators put back on top."""
    for layout in reversed(layouts):
        e = rebuild(layout, [e])
    return e


def _fits(scale: Array, shift: Array, channels: int) -> bool:
    return all(v.ndim == 0 or v.shape[0] == channels for v in (scale, shift))

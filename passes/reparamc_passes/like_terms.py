"""Like terms of a sum are collected, and branches that add nothing are dropped.

    (s x + t) + (s' x + t')  =  (s + s') x + (t + t')
    x + (0 * x + b)  =  x + b

A skip connection taken twice, a BatchNorm beside a skip connection without any convolution: what is left of a
block of branches when those with kernels were pruned, or are not trained yet. Collecting is exact if all scales act
on the same axis. x - x alone stays: it is +0, where 0 * x has the sign of x, which a division shows.

A branch whose weights are all zero (a last BatchNorm that was initialised to zero) is dropped if another branch
shows that its result has the same size: a convolution of the same value on the same grid, x itself, or any
value of the same shape. Alone it stays: its result is constant, but its size depends on the input.
"""

from __future__ import annotations

from collections import Counter

import numpy as np

from reparamc.algebra.arrays import added, is_all, values
from reparamc.algebra.expr import ONE, ZERO, Array, BatchNorm, Conv, Expr, Scale, Sum, total
from reparamc.algebra.infer import shape_of_value
from reparamc.algebra.kernels import coefficients, grid
from reparamc.algebra.rewrite import Declined, Pass


def collected(e: Sum) -> Expr | Declined | None:
    """(s x + t) + (s'x + t') = (s + s')x + (t + t')."""
    times = Counter(_base(t) for t in e.terms)
    alike: dict[Expr, list[Expr]] = {}
    for term in e.terms:
        alike.setdefault(_base(term) if times[_base(term)] > 1 else term, []).append(term)
    if len(alike) == len(e.terms):
        return None
    terms: list[Expr] = []
    for x, group in alike.items():
        if len(group) == 1:
            terms += group
            continue
        scaled = [t for t in group if t is not x and isinstance(t, Scale | BatchNorm)]
        axes = {t.axis for t in scaled} - {None}
        if len(axes) > 1:
            return Declined("its like terms are scaled along different axes")
        pairs = [coefficients(t) for t in scaled] + [(ONE, ZERO)] * (len(group) - len(scaled))
        scale, shift = (added(v) for v in zip(*pairs, strict=True))
        if len(alike) == 1 and _cancel(*map(values, (scale, shift, *(s for s, _ in pairs)))):
            return Declined("its like terms cancel: zeros times their operand would have its signs")
        terms.append(Scale(x, scale, shift, next(iter(axes), None)))
    return total(terms)


def _cancel(scale: Array, shift: Array, *scales: Array) -> bool:
    """Whether non-zero terms cancel in some channel. Their sum is +0 then, whatever the sign of their operand is."""
    nothing = (scale == 0) & (shift == 0)
    return bool(np.any(nothing & np.any(np.broadcast_arrays(*(s != 0 for s in scales)), axis=0)))


def _base(e: Expr) -> Expr:
    return e.x if isinstance(e, Scale | BatchNorm) else e


def dropped(e: Sum) -> Expr | None:
    """A branch of zeros is left out where another term has its sizes for certain."""
    for place, term in enumerate(e.terms):
        if not isinstance(term, Conv | Scale | BatchNorm):
            continue
        factor = {Conv: "weight", Scale: "scale", BatchNorm: "gamma"}[type(term)]
        if is_all(getattr(term, factor), 0) and _shown_equal(term, e):
            shift = term.bias_or_zero if isinstance(term, Conv) else coefficients(term)[1]
            rest = total([t for other, t in enumerate(e.terms) if other != place])
            return rest if is_all(shift, 0) else Scale(rest, ONE, shift, term.axis if shift.ndim else None)
    return None


def _shown_equal(zero: Conv | Scale | BatchNorm, e: Sum) -> bool:
    """Whether another term is known to have the sizes and channels of ``zero``."""
    others = [t for t in e.terms if t is not zero]
    if isinstance(zero, Conv):
        beside = [t for t in others if isinstance(t, Conv) and t.x is zero.x]
        if any(grid(t) == grid(zero) and t.out_channels == zero.out_channels for t in beside):
            return True
        if zero.keeps_grid and zero.in_channels == zero.out_channels and zero.x in others:
            return True
    shape = shape_of_value(zero)
    return shape is not None and any(shape_of_value(t) == shape for t in others)


LIKE_TERMS = Pass(
    name="like-terms",
    equation="(s x + t) + (s' x + t') = (s + s') x + (t + t');  x + (0*x + b) = x + b",
    exact_when="the scales act on one axis and do not cancel; a branch of zeros has the size of another branch",
    rules=(collected, dropped),
    refusals=(
        "its like terms are scaled along different axes",
        "its like terms cancel: zeros times their operand would have its signs",
    ),
)

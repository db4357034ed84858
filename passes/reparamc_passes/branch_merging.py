"""Parallel convolutions of one input become one convolution.

    W1 * x + b1 + W2 * x + b2  =  (W1 + W2) * x + (b1 + b2)

Taps add where they land: kernels of different sizes, even kernels, asymmetric paddings and dilations meet on
the hull of their offsets, and groups become their greatest common divisor. An average pooling beside a
convolution is one more branch (DBB).

Exact when the branches have equal strides and equal output sizes for every input size that the graph admits,
and all or none are transposed. Sizes agree for every input if `d (k - 1) - padding` agrees. If the graph fixes
the size of x, it is enough that the output sizes agree: conv 3x3 with padding 1 beside conv 2x2 without, both
of stride 2, on 8 positions; or `auto_pad SAME_UPPER` of stride 2.

Merged only if that is cheaper: first branches of equal groups, then across groups. A depthwise 7x7 beside a
dense 1x1 would become a dense 7x7, at 49 times the work, so it stays what it is.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import zip_longest
from typing import cast

from reparamc.algebra.cost import Objective, positions_after
from reparamc.algebra.expr import BatchNorm, Conv, Expr, Scale, Sum, acts_on, total
from reparamc.algebra.kernels import coefficients, grid, merge, merged_shape, scale_outputs
from reparamc.algebra.rewrite import Declined, Pass


def parallel_convs(e: Sum, objective: Objective) -> Expr | Declined | None:
    """W1*x + b1 + W2*x + b2 = (W1 + W2)*x + (b1 + b2), for all branches of a sum at once."""
    branches: dict[Expr, dict[Hashable, list[int]]] = {}  # input -> grid -> places in the sum
    kernels = [_kernel(term) for term in e.terms]
    for place, term in enumerate(kernels):
        if term is not None:
            branches.setdefault(term.x, {}).setdefault((grid(term), term.out_channels), []).append(place)
    terms: list[Expr | None] = list(e.terms)
    refusal: Declined | None = None
    for grids in branches.values():
        if len(grids) > 1:
            refusal = Declined(_difference([cast(Conv, kernels[places[0]]) for places in grids.values()]))
        for places in grids.values():
            merged = _merge_while_cheaper([cast(Conv, kernels[place]) for place in places], objective)
            if len(merged) == len(places) > 1:
                refusal = Declined("merging its branches would cost more multiply-adds than it saves")
            elif len(merged) < len(places):
                for place, conv in zip_longest(places, merged):
                    terms[place] = conv
    kept = [term for term in terms if term is not None]
    return refusal if len(kept) == len(terms) else total(kept)


def _kernel(e: Expr) -> Conv | None:
    """``e`` as a convolution, a crop that is scaled included: alone it could not take the scale in."""
    match e:
        case Conv():
            return e
        case Scale(x=Conv() as crop) | BatchNorm(x=Conv() as crop) if crop.skips_border and acts_on(e, crop.axis):
            return scale_outputs(crop, *coefficients(e))
        case _:
            return None


def _merge_while_cheaper(convs: list[Conv], objective: Objective) -> list[Conv]:
    by_groups: dict[int, list[Conv]] = {}
    for conv in convs:
        by_groups.setdefault(conv.groups, []).append(conv)
    return _if_cheaper([c for alike in by_groups.values() for c in _if_cheaper(alike, objective)], objective)


def _if_cheaper(convs: list[Conv], objective: Objective) -> list[Conv]:
    if len(convs) == 1:
        return convs
    added = objective.addition(convs[0].out_channels, positions_after(convs[0]))
    apart = sum(map(objective.price, convs)) + (len(convs) - 1) * added
    shape = merged_shape(convs)
    return [merge(convs)] if objective.price(shape) < apart and not shape.skips_border else convs


def _difference(convs: list[Conv]) -> str:
    a, b = convs[:2]
    for what, one, two in (
        ("stride", a.stride, b.stride),
        ("output channels", (a.out_channels,), (b.out_channels,)),
    ):
        if one != two:
            return f"its branches differ in {what} ({'x'.join(map(str, one))} and {'x'.join(map(str, two))})"
    if a.transposed != b.transposed:
        return "one of its branches is a transposed convolution"
    return "its branches differ in output size for some input sizes"


BRANCH_MERGING = Pass(
    name="branch-merging",
    equation="W1*x + b1 + W2*x + b2 = (W1 + W2)*x + (b1 + b2)",
    exact_when="same input, equal strides, and equal output sizes for every admitted input size; merged if cheaper",
    priced=(parallel_convs,),
    refusals=(
        "its branches differ in ... (... and ...)",
        "one of its branches is a transposed convolution",
        "its branches differ in output size for some input sizes",
        "merging its branches would cost more multiply-adds than it saves",
    ),
)

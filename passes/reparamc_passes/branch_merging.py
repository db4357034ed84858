"""Parallel convolutions of one input are one convolution.

    W1 * x + b1 + W2 * x + b2  =  (W1 + W2) * x + (b1 + b2)

Taps add where they land: kernels of different sizes, even kernels, asymmetric paddings and
dilations meet on the hull of their offsets, and groups become their greatest common divisor.

Exact when the branches have equal strides and equal extents for every input size (equal
``d (k - 1) - padding``). Merged as long as that is cheaper: first branches of equal groups, then
across groups, so that a large depthwise kernel beside a dense 1x1 stays what it is.
"""

from __future__ import annotations

from collections.abc import Hashable

from reparamc.cost import addition, price
from reparamc.expr import Conv, Expr, Sum, total
from reparamc.kernel import merge
from reparamc.rewrite import Declined, Pass


def parallel_convs(e: Expr) -> Expr | Declined | None:
    if not isinstance(e, Sum):
        return None
    branches: dict[Expr, dict[Hashable, list[Conv]]] = {}
    for term in e.terms:
        if isinstance(term, Conv):
            grid = (term.stride, term.delta, term.out_channels, term.frame)
            branches.setdefault(term.x, {}).setdefault(grid, []).append(term)
    replaced: dict[Expr, Conv | None] = {}  # a branch -> what stands in its place, if anything
    refusal: Declined | None = None
    for grids in branches.values():
        if len(grids) > 1:
            refusal = Declined(_difference([group[0] for group in grids.values()]))
        for convs in grids.values():
            merged = _merge_while_cheaper(convs)
            if len(merged) == len(convs) > 1:
                refusal = Declined("merging its branches would cost more multiply-adds than it saves")
            elif len(merged) < len(convs):
                kept = [c for c in convs if c in merged]
                fresh = [c for c in merged if c not in kept]
                gone = [c for c in convs if c not in kept]
                replaced.update(dict.fromkeys(gone))
                replaced.update(zip(gone, fresh, strict=False))
    if not replaced:
        return refusal
    return total([t for term in e.terms if (t := replaced.get(term, term)) is not None])


def _merge_while_cheaper(convs: list[Conv]) -> list[Conv]:
    by_groups: dict[int, list[Conv]] = {}
    for conv in convs:
        by_groups.setdefault(conv.groups, []).append(conv)
    merged: list[Conv] = []
    for alike in [*by_groups.values()]:
        merged += _if_cheaper(alike)
    return _if_cheaper(merged)


def _if_cheaper(convs: list[Conv]) -> list[Conv]:
    if len(convs) == 1:
        return convs
    one = merge(convs)
    apart = sum(price(c) for c in convs) + (len(convs) - 1) * addition(one.out_channels)
    return [one] if price(one) < apart else convs


def _difference(convs: list[Conv]) -> str:
    a, b = convs[:2]
    for what, one, two in (
        ("stride", a.stride, b.stride),
        ("output channels", (a.out_channels,), (b.out_channels,)),
    ):
        if one != two:
            return f"its branches differ in {what} ({'x'.join(map(str, one))} and {'x'.join(map(str, two))})"
    return "its branches differ in output extent for some input sizes"


BRANCH_MERGING = Pass(
    name="branch-merging",
    equation="W1*x + b1 + W2*x + b2 = (W1 + W2)*x + (b1 + b2)",
    exact_when="same input, equal strides, and equal output extents for every input size; merged when cheaper",
    rules=(parallel_convs,),
)

"""A convolution of a convolution becomes one convolution.

    W' * (W * x + b) + b'  =  (W' W) * x + (W' b + b')        taps meet at a + d t + s (a' + d' u)

It spans both kernels, its strides multiply, its groups are the greatest common divisor of theirs. Exact when
the outer kernel reads no padding, or the inner one is a single tap without bias that leaves nothing of x out (a
1x1 convolution, a zero padding): zeros beyond the inner result then come from zeros beyond x. A transposed
convolution composes only with a matrix of channels; before it, only without bias.

Done when the composed kernel is cheaper than the two, or becomes so by merging with another branch of the same
sum: a low-rank pair B A beside a full W (LoRA), 1x1 - kxk beside kxk (DBB). Up to eight convolutions in a row
are weighed. SESR and ExpandNets are such chains; GhostNetV3 has an average pooling before a 1x1.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate
from math import inf

from reparamc.algebra.cost import POSITIONS, Objective, multiply_adds, positions_after
from reparamc.algebra.expr import Conv, Expr, Sum, total
from reparamc.algebra.kernels import NOT_COMPOSED, cannot_compose, compose, composed_shape, grid, merge, merged_shape
from reparamc.algebra.rewrite import Declined, Pass
from reparamc.compiler.readings import is_norm

LONGEST = 8
"""Convolutions in a row that are weighed against one another."""


def in_a_row(e: Conv, objective: Objective) -> Expr | Declined | None:
    """W'*(W*x + b) + b' = (W'W)*x + (W'b + b'), where that alone is cheaper."""
    if not isinstance(e.x, Conv):
        return None
    if reason := cannot_compose(e, e.x):
        return None if is_norm(e.x) else Declined(reason, at_border=True)
    convs = _row(e)
    shapes = _shapes(convs)
    read = _positions(convs)
    apart = list(accumulate(map(objective.price, convs, read)))
    gains = [
        apart[n] - (inf if shape.skips_border else objective.price(shape, read[n])) for n, shape in enumerate(shapes)
    ]
    best = max(range(len(shapes)), key=gains.__getitem__)
    if gains[best] > 0:
        return _composed(convs[: best + 1])
    if shapes[1].skips_border:
        return Declined("composed with the next convolution, it would have to skip values at the border")
    ratio = multiply_adds(shapes[1], read[1]) / max(sum(map(multiply_adds, convs[:2], read)), 1)
    return Declined(f"composed with the next convolution, it would cost {ratio:.1f} times the multiply-adds")


def in_a_sum(e: Sum, objective: Objective) -> Expr | None:
    """The same inside a sum, where only merging the result with another branch pays."""
    if not any(isinstance(t, Conv) and isinstance(t.x, Conv) for t in e.terms):
        return None
    ways: dict[Hashable, list[tuple[int, list[Conv], Conv]]] = {}  # (input, grid) -> place, row, composed shape
    for place, term in enumerate(e.terms):
        if isinstance(term, Conv):
            row = _row(term)
            for n, shape in enumerate(_shapes(row)):
                ways.setdefault((shape.x, grid(shape), shape.out_channels), []).append((place, row[: n + 1], shape))
    for group in ways.values():
        if len(group) > 1 and any(len(row) > 1 for _, row, _ in group):
            one = group[0][2]
            apart = (len(group) - 1) * objective.addition(one.out_channels, positions_after(one))
            apart += sum(sum(map(objective.price, row, _positions(row))) for _, row, _ in group)
            merged = merged_shape([shape for *_, shape in group])
            if objective.price(merged) < apart and not merged.skips_border:
                one = merge([_composed(row) for _, row, _ in group])
                places = {place for place, *_ in group}
                return total([one, *(t for place, t in enumerate(e.terms) if place not in places)])
    return None


def _row(e: Conv) -> list[Conv]:
    """``e`` and the convolutions below it that it can be composed with, one after the other."""
    row, shape = [e], e
    while len(row) < LONGEST and isinstance(row[-1].x, Conv) and cannot_compose(shape, row[-1].x) is None:
        row.append(row[-1].x)
        shape = composed_shape(shape, row[-1])
    return row


def _shapes(row: list[Conv]) -> list[Conv]:
    return list(accumulate(row, composed_shape))


def _positions(row: list[Conv]) -> list[float]:
    """Positions of the maps that the convolutions of ``row`` read, the last of which reads a nominal one."""
    found = [POSITIONS]
    for conv in reversed(row[1:]):
        found.append(positions_after(conv, found[-1]))
    return found[::-1]


def _composed(row: list[Conv]) -> Conv:
    one = row[0]
    for inner in row[1:]:
        one = compose(one, inner)
    return one


SEQUENCE_MERGING = Pass(
    name="sequence-merging",
    equation="W'*(W*x + b) + b' = (W'W)*x + (W'b + b')",
    exact_when="the outer kernel reads no padding, or the inner is one tap without bias, cropping nothing; if cheaper",
    priced=(in_a_row, in_a_sum),
    refusals=(
        *NOT_COMPOSED,
        "composed with the next convolution, it would have to skip values at the border",
        "composed with the next convolution, it would cost ... times the multiply-adds",
    ),
)

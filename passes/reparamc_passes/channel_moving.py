"""Concatenations, selections and shuffles of channels go into the convolutions around them.

    concat(W * x + b, W' * x + b')  =  (W above W') * x + (b above b')
    (W * x + b)[i]                  =  W[i] * x + b[i]
    W * x[i]                        =  W' * x                     W'[:, j] the sum of W[:, k] over i[k] = j
    (V, W) * concat(x, x)           =  (V + W) * x

and what brings them together:

    concat(concat(x, y), z)         =  concat(x, y, z)
    concat(x, y)[i]                 =  concat(x[i'], y[i"])        i in the order of the terms, at most one cut
    x[i][j]                         =  x[i[j]]
    concat(x[i], x[j])              =  x[i, j]
    x[all, in order]                =  x

Selections are always exact. Rows are stacked for dense convolutions of one value with equal strides and output
sizes, if the hull of their taps costs less than they do apart. A selection of a depthwise or grouped
convolution, and one that exchanges the terms of a concatenation, are left alone. So is one before a convolution if it
leaves a channel out. GhostNetV3 needs this pass: it cuts every concatenation to the wanted number of channels, which
mostly is all of them. So does a network of colour images that is given grey ones three times over.
"""

from __future__ import annotations

from collections.abc import Hashable
from itertools import accumulate, groupby

from reparamc.algebra.cost import Objective
from reparamc.algebra.expr import Concat, Conv, Expr, Select
from reparamc.algebra.kernels import gather_inputs, grid, select_outputs, stack, stacked_shape
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined, Pass


def stacked(e: Concat, objective: Objective) -> Expr | Declined | None:
    """concat(W*x, W'*x) = (W above W')*x, for neighbouring terms of one input and grid."""
    parts: list[tuple[Expr, int]] = []
    refusal: Declined | None = None
    for key, run in groupby(zip(e.terms, e.sizes, strict=True), lambda part: _grid(part[0], e.axis)):
        group = list(run)
        convs = [t for t, _ in group if isinstance(t, Conv)]
        if key is not None and len(convs) > 1:
            if objective.price(stacked_shape(convs)) < sum(map(objective.price, convs)):
                group = [(stack(convs), sum(size for _, size in group))]
            else:
                refusal = Declined("stacking its branches would cost more multiply-adds than it saves")
        parts += group
    return refusal if len(parts) == len(e.terms) else _concat(parts, e.axis)


def _grid(e: Expr, axis: int) -> Hashable:
    """What dense convolutions must share to become one; None for everything else."""
    if not isinstance(e, Conv) or e.axis != axis or e.groups != 1 or e.transposed:
        return None
    return e.x, grid(e)


def _concat(parts: list[tuple[Expr, int]], axis: int) -> Expr:
    """The concatenation of one or more terms, each with its number of channels."""
    return parts[0][0] if len(parts) == 1 else Concat(tuple(t for t, _ in parts), tuple(n for _, n in parts), axis)


def flattened(e: Concat) -> Expr | None:
    """concat(concat(x, y), z); neighbouring selections of one value; a concatenation of one term."""
    parts: list[tuple[Expr, int]] = []
    for term, size in zip(e.terms, e.sizes, strict=True):
        before = parts[-1][0] if parts else None
        if isinstance(term, Concat) and term.axis == e.axis:
            parts += zip(term.terms, term.sizes, strict=True)
        elif (
            isinstance(term, Select)
            and isinstance(before, Select)
            and before.x is term.x
            and before.axis == term.axis == e.axis
        ):
            parts[-1] = (replace(before, index=before.index + term.index), parts[-1][1] + size)
        else:
            parts.append((term, size))
    unchanged = len(parts) == len(e.terms) > 1 and all(a is b for (a, _), b in zip(parts, e.terms, strict=True))
    return None if unchanged else _concat(parts, e.axis)


def selected(e: Select) -> Expr | None:
    """(W*x)[i] = W[i]*x: a selection goes into what computes the channels it selects."""
    match e.x:
        case Conv(groups=1) as conv if conv.axis == e.axis and len(e.index) <= e.width:
            return select_outputs(conv, e.index)
        case Select() as inner if inner.axis == e.axis:
            return replace(inner, index=tuple(inner.index[i] for i in e.index))
        case Concat() as inner if inner.axis == e.axis:
            return _select_terms(e, inner)
        case _:
            return e.x if e.index == tuple(range(e.width)) else None


def _select_terms(e: Select, concat: Concat) -> Expr | None:
    """A selection that keeps the terms of a concatenation in their order, as selections of the terms."""
    parts: list[tuple[Expr, int]] = []
    at = used = 0
    for term, size in zip(concat.terms, concat.sizes, strict=True):
        inside: list[int] = []
        while used < len(e.index) and at <= e.index[used] < at + size:
            inside.append(e.index[used] - at)
            used += 1
        if inside:
            whole = inside == list(range(size))
            parts.append((term if whole else Select(term, tuple(inside), size, e.axis), len(inside)))
        at += size
    if used < len(e.index) or sum(isinstance(part, Select) for part, _ in parts) > 1:
        return None  # in another order, or dearer
    return _concat(parts, e.axis)


def gathered(e: Conv) -> Expr | None:
    """W*x[i] = W'*x: a dense convolution of channels that are permuted or repeated adds up the columns of each."""
    if not (e.groups == 1 and isinstance(e.x, Select | Concat) and e.x.axis == e.axis):
        return None
    if isinstance(e.x, Select):
        return gather_inputs(e, e.x.x, e.x.index) if set(e.x.index) == set(range(e.x.width)) else None
    sizes = dict(zip(e.x.terms, e.x.sizes, strict=True))
    if len(sizes) == len(e.x.terms):
        return None
    starts = dict(zip(sizes, accumulate(sizes.values(), initial=0), strict=False))
    index = tuple(starts[t] + i for t in e.x.terms for i in range(sizes[t]))
    return gather_inputs(e, _concat([*sizes.items()], e.axis), index)


CHANNEL_MOVING = Pass(
    name="channel-moving",
    equation="concat(W*x + b, W'*x + b') = (W above W')*x + (b above b');  (W*x + b)[i] = W[i]*x + b[i]",
    exact_when="always for selections; stacked if strides and sizes are equal and it is cheaper",
    rules=(flattened, selected, gathered),
    priced=(stacked,),
    refusals=("stacking its branches would cost more multiply-adds than it saves",),
)

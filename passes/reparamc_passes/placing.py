"""A matrix of channels goes to the place where the map is smallest.

    W R(x) + b              =  R(W x + b)                           R a map of positions: a resize, a mean, a pooling
    W concat(R(x), y) + b   =  R(W' x) + (W" y + b)                 W' and W" the columns of x and of y
    W P(W' x + b') + b      =  P((W W') x + (W b' + b))             P a layout, a resize or a mean
    W concat(f(x), W'x) + b =  W1 f(x) + ((W2 W') x + b)            W1 and W2 the columns of f(x) and of W'x

Maps that act on positions only (a resize, a mean, a pooling, a crop, a reshape of positions) commute with maps that act
on channels only (a 1x1 convolution, a linear layer). Which comes first decides how many positions the matrix is applied
to, and how many channels the other one moves. SegFormer resizes the results of four linear layers, puts them side by
side and multiplies by a matrix: at a sixteenth of the positions, and once with the linear layers, it takes half the
time. DenseNet halves its maps after a 1x1 convolution. And RePaViT sends most channels of its feed-forward layers
around the activation: what is linear becomes one matrix from end to end, beside what is not.

Exact because the map of positions has the same coefficients for every channel, and every row of them sums to 1, so that
it leaves a bias as it is. A pooling or padding that reads zeros beyond the border does not: then it is done only
without a bias.

A matrix that follows a chain of such maps is priced at each place in the chain, and multiplied with the matrix before
the chain, if there is one; what comes after a matrix is priced before it. Sizes are those of the graph, where they are
known. Done where the price falls, one matrix after the other: chains are short, and no matrix is moved twice to the
same side.
"""

from __future__ import annotations

from reparamc.algebra.arrays import together
from reparamc.algebra.channels import with_width
from reparamc.algebra.cost import Objective
from reparamc.algebra.expr import Array, Concat, Conv, Expr, Layout, Mean, Reshape, Resize, Take, total
from reparamc.algebra.kernels import cannot_compose, compose, composed_shape
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined, Pass

DEARER = "apart, its columns would cost more than together"


def inwards(e: Conv, objective: Objective) -> Expr | None:
    """W R(x) = R(W x), and W R(W'x) = R((W W')x), at the cheapest place."""
    return _cheapest(e, objective) if e.is_pointwise and not e.reads_taps else None


def outwards(e: Layout | Conv, objective: Objective) -> Expr | None:
    """R(W x) = W R(x), if R makes the map smaller by more than W makes the channels fewer."""
    if not _counts(e):
        return None
    chain, base, axis = _chain(e, None)
    if not isinstance(base, Conv) or not _passes(base, chain) or axis is None or base.axis != axis:
        return None
    found = _at(base, _over(chain, base.x, base.in_channels), _axis_after(e))
    return found if objective.cost(found) < objective.cost(e) else None


def apart(e: Conv, objective: Objective) -> Expr | Declined | None:
    """W concat(R(x), y) = R(W'x) + W"y, where W' is cheaper before R, or as one with a matrix that is a term."""
    if not (e.is_pointwise and e.groups == 1 and isinstance(e.x, Concat)):
        return None
    moving = [_is_resized(t) or (isinstance(t, Conv) and t.axis == e.axis) for t in e.x.terms]
    if e.x.axis != e.axis or not any(moving):
        return None
    parts: list[Expr] = []
    rest: list[tuple[Expr, int, int]] = []
    resized = any(map(_is_resized, e.x.terms))
    bias, left = (e.bias, None) if all(moving) or not resized else (None, e.bias)  # beside that of a matrix
    at = 0
    for term, size, moves in zip(e.x.terms, e.x.sizes, moving, strict=True):
        if moves:
            parts.append(_placed(columns(e, [(at, size)], term, bias), objective))
            bias = None
        else:
            rest.append((term, at, size))
        at += size
    if rest:
        joined = rest[0][0] if len(rest) == 1 else Concat(
            tuple(t for t, _, _ in rest), tuple(n for _, _, n in rest), e.axis
        )  # fmt: skip
        parts.append(_placed(columns(e, [(at, n) for _, at, n in rest], joined, left), objective))
    found = total(parts)
    if objective.cost(found) < objective.cost(e):
        return found
    return Declined(DEARER) if resized else None


def _placed(e: Conv, objective: Objective) -> Expr:
    x = e.x
    if isinstance(x, Conv) and not x.is_weightless and cannot_compose(e, x) is None:
        return compose(e, x) if objective.price(composed_shape(e, x)) < sum(map(objective.price, (e, x))) else e
    return _cheapest(e, objective) or e


def columns(e: Conv, runs: list[tuple[int, int]], x: Expr, bias: Array | None) -> Conv:
    """``e`` with this bias, of the channels in ``runs`` (first, number) alone, which are ``x``."""
    xp, weight = together(e.weight)
    columns = xp.concat([weight[:, at : at + n] for at, n in runs], axis=1)
    return replace(e, x=x, weight=columns, bias=bias)


def _cheapest(e: Conv, objective: Objective) -> Expr | None:
    """``e`` at the cheapest place in the chain that it follows; None where it is there already."""
    chain, base, _ = _chain(e.x, e.axis)
    ways: list[Expr] = []
    for n in range(1, len(chain) + 1):
        inner = chain[n:]
        x: Expr = inner[0] if inner else base
        axis = _axis_after(x) if inner else _axis_before(chain[-1])
        if axis is None or not _passes(e, chain[:n]):
            break
        moved = _at(e, x, axis)
        if any(map(_counts, chain[:n])):
            ways.append(_over(chain[:n], moved, e.out_channels))
        if not inner and isinstance(base, Conv) and base.axis == axis and cannot_compose(moved, base) is None:
            ways.append(_over(chain, compose(moved, base), e.out_channels))
    best = min(ways, key=objective.cost, default=None)
    return best if best is not None and objective.cost(best) < objective.cost(e) else None


def _chain(e: Expr, axis: int | None) -> tuple[list[Layout | Conv], Expr, int | None]:
    """The maps of positions that end in ``e``, last first; what they start from; and the axis of its channels."""
    chain: list[Layout | Conv] = []
    while isinstance(e, Layout) or (isinstance(e, Conv) and e.is_weightless):
        if e.axis is None or (axis is not None and e.axis != axis):
            break
        chain.append(e)
        axis = _axis_before(e)
        e = e.x
    return chain, e, axis


def _axis_before(e: Layout | Conv) -> int | None:
    return e.axis_in if isinstance(e, Layout) else e.axis


def _axis_after(e: Expr) -> int:
    assert isinstance(e, Layout | Conv)
    assert e.axis is not None
    return e.axis


def _over(chain: list[Layout | Conv], x: Expr, width: int) -> Expr:
    """``chain`` of ``x``, which has that many channels."""
    for e in reversed(chain):
        x = _as_wide(e, x, width) if isinstance(e, Conv) else with_width(e, x, width)
    return x


def _as_wide(pool: Conv, x: Expr, width: int) -> Conv:
    """A pooling, padding or crop of another number of channels."""
    if width == pool.out_channels:
        return replace(pool, x=x)
    xp, weight = together(pool.weight)
    taps = xp.broadcast_to(weight[:1], (width, *weight.shape[1:]))
    return replace(pool, x=x, weight=xp.asarray(taps, copy=True), groups=width)


def _passes(e: Conv, chain: list[Layout | Conv]) -> bool:
    """Whether ``e`` commutes with all of ``chain``: it is a matrix, and its bias meets no border."""
    plain = e.is_pointwise and not e.reads_taps and not e.is_weightless
    if any(isinstance(p, Layout) and isinstance(p.op, Reshape) and not p.op.takes_any(_axis_after(p)) for p in chain):
        return False  # it takes the operator of the host, which says the number of channels
    return plain and (e.bias is None or not any(isinstance(p, Conv) and p.reads_padding for p in chain))


def _at(e: Conv, x: Expr, axis: int) -> Conv:
    """The matrix ``e`` along another axis."""
    spatial = -1 - axis
    ones, zeros = (1,) * spatial, (0,) * spatial
    xp, weight = together(e.weight)
    weight = xp.reshape(weight, (*weight.shape[:2], *ones))
    return replace(e, x=x, weight=weight, stride=ones, dilation=ones, offset=zeros, delta=zeros)


def _counts(e: Expr) -> bool:
    """Whether ``e`` makes more or fewer positions than it reads, and computes nothing from channels."""
    if isinstance(e, Layout):
        return isinstance(e.op, Mean | Resize | Take)
    return isinstance(e, Conv) and e.is_weightless


def _is_resized(e: Expr) -> bool:
    while isinstance(e, Layout):
        if isinstance(e.op, Resize):
            return True
        e = e.x
    return False


PLACING = Pass(
    name="placing",
    equation="W R(x) + b = R(W x + b);  W concat(R(x), y) + b = R(W'x) + (W\"y + b)",
    exact_when="R acts on positions alone, alike in all channels, with weights that sum to 1, or b = 0; if cheaper",
    priced=(apart, inwards, outwards),
    refusals=(DEARER,),
)

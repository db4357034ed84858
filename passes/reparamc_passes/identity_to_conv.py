"""A skip connection or a scale beside a convolution becomes a convolution itself.

    s x + t  =  K * x + t        K has one tap, at offset 0, with one group per channel and weight s

branch-merging then adds it to the convolution of the same x. Exact when that convolution has stride one, keeps
the size for every input (otherwise the two branches agree in size by accident, or by broadcasting) and has as
many channels out as in. A tap at offset 0 that the kernel does not span would enlarge it, so it is left alone.
"""

from __future__ import annotations

from reparamc.algebra.arrays import Array, count
from reparamc.algebra.expr import ONE, ZERO, BatchNorm, Conv, Expr, Scale, Sum, total
from reparamc.algebra.kernels import coefficients, pointwise
from reparamc.algebra.rewrite import Declined, Pass


def beside_conv(e: Sum) -> Expr | Declined | None:
    """s x + t + W*x = K*x + t + W*x, K with the tap s at offset 0."""
    convs: dict[Expr, list[Conv]] = {}
    for term in e.terms:
        if isinstance(term, Conv):
            convs.setdefault(term.x, []).append(term)
    out: list[Expr] = []
    refusal: Declined | None = None
    for term in e.terms:
        branch = _as_conv(term, convs)
        refusal = branch if isinstance(branch, Declined) else refusal
        out.append(branch if isinstance(branch, Conv) else term)
    return refusal if all(a is b for a, b in zip(out, e.terms, strict=True)) else total(out)


def _as_conv(term: Expr, convs: dict[Expr, list[Conv]]) -> Conv | Declined | None:
    if term in convs:
        x, axis, (s, t) = term, None, (ONE, ZERO)
    elif isinstance(term, Scale | BatchNorm) and term.x in convs:
        x, axis, (s, t) = term.x, term.axis, coefficients(term)
    else:
        return None
    obstacles = [_obstacle(conv, s, t, axis) for conv in convs[x]]
    if all(obstacles):
        return Declined(str(obstacles[0]))
    conv = convs[x][obstacles.index(None)]
    return pointwise(x, s, t, conv.in_channels, conv.spatial)


def _obstacle(conv: Conv, s: Array, t: Array, axis: int | None) -> str | None:
    """Why ``s x + t`` cannot be a tap of ``conv``; None when it can."""
    if conv.in_channels != conv.out_channels or any(v.ndim and count(v) != conv.in_channels for v in (s, t)):
        return "the convolution beside the skip connection changes the number of channels"
    if axis is not None and axis != conv.axis:
        return "the branches act on different axes"
    if not conv.keeps_grid:
        return "the convolution beside the skip connection changes the size (stride, or padding that does not match)"
    if any(a > 0 or r < 0 or a % d for a, r, d in zip(conv.offset, conv.reach, conv.dilation, strict=True)):
        return "the kernel has no tap at offset 0, so the skip connection would enlarge it"
    return None


IDENTITY_TO_CONV = Pass(
    name="identity-to-conv",
    equation="s x + t = K*x + t,  K one tap of weight s at offset 0",
    exact_when="the convolution beside it has stride 1, equal sizes for every input, and channels in = out",
    rules=(beside_conv,),
    refusals=(
        "the convolution beside the skip connection changes the number of channels",
        "the branches act on different axes",
        "the convolution beside the skip connection changes the size (stride, or padding that does not match)",
        "the kernel has no tap at offset 0, so the skip connection would enlarge it",
    ),
)

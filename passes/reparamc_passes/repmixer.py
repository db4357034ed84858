"""FastViT's token mixer becomes one depthwise convolution: skip connection, layer scale and all branches.

    x + s (mixer(x) - norm(x))  =  K * x + b
    K = I + s (K_mixer - K_norm),   b = s (b_mixer - b_norm)

mixer and norm are sums of depthwise convolutions and BatchNorms of x, I is the identity kernel, s the layer
scale (absent: one). FastViT, section 3.2, in the form that its code uses: BatchNorm comes after the
convolutions, never before their padding.

It is a macro: the other passes reach the same result in more steps. Every affine map of one channel at a time
is a depthwise kernel, so the whole block is read bottom-up into kernels. Exact when each branch has stride one
and keeps the size for every input. If one does not, the other passes do what can be done.
"""

from __future__ import annotations

from reparamc.algebra.expr import ONE, ZERO, BatchNorm, Conv, Expr, Scale, Sum, acts_on
from reparamc.algebra.kernels import coefficients, merge, pointwise, scale_outputs
from reparamc.algebra.rewrite import Pass

SMALL = 64
"""A token mixer has about ten operators; nothing larger is searched, so that work stays linear."""


def skip_elimination(e: Sum) -> Expr | None:
    """x + s(mixer(x) - norm(x)) + t = K*x + b."""
    if len(e.terms) > SMALL:
        return None
    for x in e.terms:  # the skip connection
        rest = [t for t in e.terms if t is not x]
        if len(rest) != len(e.terms) - 1 or not any(_nested(t) for t in rest):
            continue
        like = next((c for t in rest if (c := _depthwise_of(x, t)) is not None), None)
        kernel = like and _kernel(e, x, like)
        if kernel:
            return kernel
    return None


def _nested(e: Expr) -> bool:
    while isinstance(e, Scale | BatchNorm):
        e = e.x
    return isinstance(e, Sum)


def _depthwise_of(x: Expr, e: Expr) -> Conv | None:
    """A depthwise convolution of ``x`` below ``e``."""
    stack, budget = [e], SMALL
    while stack and budget:
        e, budget = stack.pop(), budget - 1
        if isinstance(e, Conv):
            if e.x is x and e.groups == e.in_channels == e.out_channels:
                return e
        elif e is not x:
            stack.extend(reversed(e.children))
    return None


def _kernel(e: Expr, x: Expr, like: Conv, depth: int = 0) -> Conv | None:
    """``e`` as a depthwise convolution of ``x``; None when it is anything else."""
    if e is x:
        return pointwise(x, ONE, ZERO, like.in_channels, like.spatial)
    match e:
        case _ if depth > SMALL:
            return None
        case Conv(groups=groups) if e.x is x and e.axis == like.axis and e.keeps_grid:
            return e if groups == e.in_channels == e.out_channels else None
        case Scale() | BatchNorm() if acts_on(e, like.axis):
            inner = _kernel(e.x, x, like, depth + 1)
            scale, shift = coefficients(e)
            return inner and scale_outputs(inner, scale, shift)
        case Sum():
            kernels = [_kernel(t, x, like, depth + 1) for t in e.terms]
            found = [k for k in kernels if k is not None]
            return merge(found) if len(found) == len(kernels) else None
        case _:
            return None


REPMIXER = Pass(
    name="repmixer",
    equation="x + s(mixer(x) - norm(x)) = K*x + b,  K = I + s(K_mixer - K_norm),  b = s(b_mixer - b_norm)",
    exact_when="all branches are depthwise, of stride 1, and keep the size for every input",
    rules=(skip_elimination,),
)

"""Layer scale and every other per-channel constant go into a neighbouring convolution.

    s (W * x + b) + t  =  (s W) * x + (s b + t)
    W * (s x + t) + b  =  (W s) * x + (b + sum W t)
    s (s' x + t') + t  =  (s s') x + (s t' + t)
    s (g N(x) + h) + t  =  (s g) N(x) + (s h + t)        N a normalization with weight g and bias h
    s P(x) + t  =  P(s x + t)               P a layout that keeps the channel axis whole; any, for scalars s and t

Layer scale (FastViT, CaiT), and every multiplication or addition of a constant that is a scalar or varies along
the channels only. The conditions and the ways through sums, concatenations and layouts are those of BatchNorm,
which is a scale with other parameters.

A scalar goes through reshapes that split or merge the channel axis as well: 1/sqrt(d) after a split into heads
goes into the projection of the queries, and 1/255 before an image is cut into patches goes into the layer after
it. If one projection computes q, k and v, piece-folding does it.

LayerNorm, RMSNorm, GroupNorm and InstanceNorm end in a factor and a shift for each channel, which take scales and
BatchNorms after them; sequence-merging brings depthwise 1x1 convolutions there. So the token mixer of RIFormer, a
depthwise 1x1 convolution of a norm less that norm, is the norm alone. A norm that another region reads stays.

Left alone: a constant that varies along several axes or may broadcast its operand; a scalar after a non-linear
operator and the scale of a normalisation, because runtimes recognise GELU, SiLU, LayerNorm and attention by
such constants. So the factor of attention scores, after the product of queries and keys, stays: ONNX Runtime
applies it inside that product for free.
"""

from __future__ import annotations

from reparamc.algebra.arrays import is_all
from reparamc.algebra.expr import BatchNorm, Conv, Expr, Scale
from reparamc.algebra.kernels import coefficients, scaled_again
from reparamc.algebra.rewrite import Declined, Pass
from reparamc_passes.absorb import REFUSALS, into_consumer, into_producer

OTHER_AXES = "the two scales act on different axes"


def after(e: Scale) -> Expr | Declined | None:
    """s(W*x + b) + t = (sW)*x + (sb + t)."""
    return into_producer(e)


def before(e: Conv) -> Expr | Declined | None:
    """W*(s x + t) + b = (W s)*x + (b + sum of W t)."""
    return into_consumer(e, Scale)


def by_one(e: Scale) -> Expr | None:
    """1 x + 0 = x."""
    return e.x if is_all(e.scale, 1) and is_all(e.shift, 0) else None


def of_scale(e: Scale | BatchNorm) -> Expr | Declined | None:
    """s(s'x + t') + t = (ss')x + (st' + t); one of the two may be a BatchNorm."""
    match e:
        case Scale(x=(Scale() | BatchNorm()) as inner) | BatchNorm(x=Scale() as inner):
            if None not in (e.axis, inner.axis) and e.axis != inner.axis:
                return Declined(OTHER_AXES)
            scale, shift = scaled_again(*coefficients(e), coefficients(inner))
            return Scale(inner.x, scale, shift, inner.axis if e.axis is None else e.axis)
        case _:
            return None


SCALE_FOLDING = Pass(
    name="scale-folding",
    equation="s(W*x + b) + t = (sW)*x + (sb + t);  W*(sx + t) + b = (Ws)*x + (b + sum W t)",
    exact_when="scale after the convolution: always; before it: t = 0, or the kernel reads no padding",
    rules=(by_one, after, before, of_scale),
    refusals=(*REFUSALS, OTHER_AXES),
)

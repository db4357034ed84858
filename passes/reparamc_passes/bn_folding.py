"""BatchNorm into the convolution on either side of it.

    bn(W * x + b)  =  (g W) * x + (g b + h)             g = gamma / sqrt(var + eps),  h = beta - mean g
    W * bn(x) + b  =  (W g) * x + (b + sum W h)         g scales input channels here

Layout operators that keep the channel axis whole may stand between the two. Behind a convolution
the fold is always exact. In front of one, h would have to be added to the zeros that the kernel
reads as padding, so a kernel that reads padding needs h = 0.
"""

from __future__ import annotations

from reparamc.algebra.expr import BatchNorm, Conv, Expr
from reparamc.algebra.rewrite import Declined, Pass
from reparamc_passes.absorb import into_consumer, into_producer


def behind(e: Expr) -> Expr | Declined | None:
    """bn(W*x + b) = (gW)*x + (gb + h)."""
    return into_producer(e) if isinstance(e, BatchNorm) else None


def in_front(e: Expr) -> Expr | Declined | None:
    """W*bn(x) + b = (W g)*x + (b + sum of W h)."""
    return into_consumer(e, BatchNorm) if isinstance(e, Conv) else None


BN_FOLDING = Pass(
    name="bn-folding",
    equation="bn(W*x + b) = (gW)*x + (gb + h);  W*bn(x) + b = (Wg)*x + (b + sum W h)",
    exact_when="BatchNorm behind the convolution: always; in front: h = 0, or the kernel reads no padding",
    rules=(behind, in_front),
)

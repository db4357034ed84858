"""BatchNorm goes into the convolution before or after it.

    bn(W * x + b)  =  (g W) * x + (g b + h)             g = gamma / sqrt(var + eps),  h = beta - mean g
    W * bn(x) + b  =  (W g) * x + (b + sum W h)         g scales input channels here
    bn(W * x + U * z)  =  (g W) * x + (g U) * z + h
    bn(concat(W * x, U * z))  =  concat((g' W) * x + h', (g" U) * z + h")

After a convolution, transposed or not, the fold is always exact. Before one, the shift h does not reach the
zeros that the kernel reads as padding, so the result would be wrong along the border. It is folded there only
if h = 0 or the kernel reads no padding. A transposed convolution counts as one that does: its outputs receive
different numbers of taps.

Operators that move or average within a channel (Reshape, Transpose, a mean over positions) may come between the
two, and before a convolution a selection of channels as well. After a sum, the factor goes to every term and
the shift to the first; after a concatenation, each term takes its own channels. All terms must be able to take
it, or nothing would be saved. Before a convolution of a concatenation, each term is folded separately.

A BatchNorm with several users is folded into all of them if that removes it: q, k and v after one norm. Its
operand must be the result of something non-linear, and all users, eight at most, must be linear; otherwise it
stays. Reshapes, transpositions and average poolings without padding may come between it and its users, and be
shared as well: they are computed once (NextViT pools the tokens between the norm and k and v).

A BatchNorm before a padded convolution could be kept exact in three ways, but none saves anything: fold
the factor and keep an addition of h/g; pad with -h/g, which Pad cannot do per channel; add a map that corrects
the border. Networks that mean to be fused write the border themselves, filled with what BatchNorm makes of zero
(DBB) or with the bias (ECB). Then the whole is one convolution, and impulse-response finds it.
"""

from __future__ import annotations

from reparamc.algebra.expr import BatchNorm, Conv, Expr
from reparamc.algebra.rewrite import Declined, Pass
from reparamc_passes.absorb import REFUSALS, into_consumer, into_producer


def after(e: BatchNorm) -> Expr | Declined | None:
    """bn(W*x + b) = (gW)*x + (gb + h)."""
    return into_producer(e)


def before(e: Conv) -> Expr | Declined | None:
    """W*bn(x) + b = (W g)*x + (b + sum of W h)."""
    return into_consumer(e, BatchNorm)


BN_FOLDING = Pass(
    name="bn-folding",
    equation="bn(W*x + b) = (gW)*x + (gb + h);  W*bn(x) + b = (Wg)*x + (b + sum W h)",
    exact_when="BatchNorm after the convolution: always; before it: h = 0, or the kernel reads no padding",
    rules=(after, before),
    refusals=REFUSALS,
)

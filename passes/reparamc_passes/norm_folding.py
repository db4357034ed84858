"""The gain and bias of a normalization go into all that reads it, and are stored no more.

    W (g n(x) + h) + b  =  (W g) n(x) + (W h + b)            n normalizes: it is LayerNorm, RMSNorm, ...

Exact for every linear layer and convolution that reads the normalized value, moved or not; a kernel that reads zero
padding takes the gain, and the bias if it is zero. It is done by ``--objective params`` alone: no runtime is faster
without a gain. What is quantized afterwards has one scale less.

All readers take it, or none: a reader that is not linear (an activation, an output of the model), one that cannot take
it (a skip connection), and a weight that something else holds as well (a tied embedding) keep it where it is. ONNX
stores a gain of ones: there it pays where a bias leaves. An InstanceNormalization of ONNX stores both, and is left.
"""

from __future__ import annotations

from weakref import WeakKeyDictionary

import numpy as np

from reparamc.algebra.arrays import is_all, together
from reparamc.algebra.cost import Objective
from reparamc.algebra.expr import ZERO, Array, Conv, Expr, Scale
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Declined, Pass
from reparamc.compiler.readings import is_norm
from reparamc_passes.absorb import into_consumer, through_layouts, under

BARE: WeakKeyDictionary[Conv, Conv] = WeakKeyDictionary()
"""Each normalization without gain and bias: one for all that reads it."""


def into_readers(e: Conv, objective: Objective) -> Expr | Declined | None:
    """W (g n(x) + h) + b = (W g) n(x) + (W h + b), where parameters count."""
    if not objective.stores or is_norm(e):
        return None
    layouts, norm, _ = through_layouts(e.x, e.axis, shifted=True)
    if not (isinstance(norm, Conv) and is_norm(norm) and norm.is_per_channel) or _is_bare(norm):
        return None
    xp, gain = together(norm.weight)
    scaled = Scale(bare(norm), xp.reshape(gain, (-1,)), _shift(norm), norm.axis)
    return into_consumer(replace(e, x=under(layouts, scaled)), Scale)


def bare(norm: Conv) -> Conv:
    if norm not in BARE:
        BARE[norm] = replace(norm, weight=np.ones(norm.weight.shape), bias=None)
    return BARE[norm]


def _shift(norm: Conv) -> Array:
    return ZERO if norm.bias is None else norm.bias


def _is_bare(norm: Conv) -> bool:
    return norm.bias is None and is_all(norm.weight, 1)


NORM_FOLDING = Pass(
    name="norm-folding",
    equation="W (g n(x) + h) + b = (W g) n(x) + (W h + b)",
    exact_when="every reader is a linear layer or convolution, and h = 0 where it reads padding; to store less",
    priced=(into_readers,),
)

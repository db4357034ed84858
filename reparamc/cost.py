"""What an expression costs to run, so that a splice happens only when it pays.

The unit is one multiply-add. Besides arithmetic, an operator moves its operands and its result
through memory and has a fixed price for being launched; the exchange rates below are round figures
for a CPU or a phone, where a multiply-add is cheap beside an element read from memory.
Extents are unknown to the algebra, so each map is taken to have the same nominal number of positions.
"""

from __future__ import annotations

from math import prod

import numpy as np

from reparamc.evaluate import channels
from reparamc.expr import BatchNorm, Concat, Conv, Expr, Layout, Scale, Select, Source, Sum, is_negation, walk

NODE = 20_000.0
"""Launching one operator, in multiply-adds."""
ELEMENT = 4.0
"""Reading or writing one element, in multiply-adds."""
POSITIONS = 196.0
"""Nominal positions of a map: 14 x 14."""


def cost(root: Expr) -> float:
    """The price of computing ``root`` from its sources, in multiply-adds."""
    count = channels(root)
    return sum(_price(e, count) for e in walk(root))


def price(conv: Conv) -> float:
    """The price of one convolution, in multiply-adds."""
    if conv.token is not None:  # a pooling or a padding: no weights are read, and its sums are no matter
        return NODE + POSITIONS * conv.out_channels * 2 * ELEMENT
    growth = prod(conv.stride) if conv.transposed else 1 / prod(conv.stride)
    moved = POSITIONS * (conv.in_channels + conv.out_channels * growth) + conv.weight.size
    return NODE + multiply_adds(conv) + ELEMENT * moved


def multiply_adds(conv: Conv) -> float:
    """The multiply-adds of one convolution over a map of the nominal size."""
    return POSITIONS / (1 if conv.transposed else prod(conv.stride)) * conv.weight.size


def addition(channels: int) -> float:
    """The price of adding two maps."""
    return NODE + POSITIONS * channels * (1 + 3 * ELEMENT)


def _price(e: Expr, count: dict[Expr, int | None]) -> float:
    width = count[e] or 64
    match e:
        case Conv():
            return price(e)
        case BatchNorm():
            return NODE + POSITIONS * width * (1 + 2 * ELEMENT)
        case Scale():
            return (is_multiplied(e) + is_shifted(e)) * (NODE + POSITIONS * width * (1 + 2 * ELEMENT))
        case Sum():
            return (len(e.terms) - 1) * addition(width)
        case Layout() | Concat() | Select():
            return NODE + POSITIONS * width * 2 * ELEMENT
        case Source():
            return 0.0


def is_multiplied(e: Scale) -> bool:
    """Whether ``e`` needs a multiplication. A factor of -1 does not: sums subtract instead."""
    return bool(np.any(e.scale != 1)) and not is_negation(e)


def is_shifted(e: Scale) -> bool:
    """Whether ``e`` needs an addition. The bias of a linear layer does not: it is part of the product."""
    is_bias = isinstance(e.x, Conv) and e.x.frame == 0 and e.x.bias is None and not np.any(e.scale != 1)
    return bool(np.any(e.shift)) and not is_bias

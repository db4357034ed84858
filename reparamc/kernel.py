"""The algebra of kernels: what may be done to one convolution, or to several, without any graph.

All of it is exact in real arithmetic; whether it is also *allowed* (borders, grids) is what the
rewrites decide before they call. Arrays are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import gcd

import numpy as np

from reparamc.expr import Array, BatchNorm, Conv, Expr, Ints, Scale


def coefficients(e: Scale | BatchNorm) -> tuple[Array, Array]:
    """(scale, shift) of ``y = scale * x + shift``; for BatchNorm scale = gamma / sqrt(var + eps)."""
    if isinstance(e, Scale):
        return e.scale, e.shift
    with np.errstate(divide="ignore", invalid="ignore"):
        scale = e.gamma / np.sqrt(e.var + e.eps)
        return scale, e.beta - e.mean * scale


def scale_outputs(conv: Conv, scale: Array, shift: Array) -> Conv:
    """``scale * conv(x) + shift``: W' = scale[o] W, b' = scale b + shift."""
    rows = np.broadcast_to(scale, (conv.out_channels,))
    weight = conv.weight * rows.reshape(-1, *[1] * (conv.weight.ndim - 1))
    if conv.bias is None and not np.any(shift):
        return replace(conv, weight=weight)
    return replace(conv, weight=weight, bias=rows * conv.bias_or_zero + shift)


def scale_inputs(conv: Conv, x: Expr, scale: Array, shift: Array) -> Conv:
    """``conv(scale * x + shift)`` as a convolution of x: W' = W scale[i], b' = b + sum over i, t of W shift[i].

    The bias is right where every tap reads inside the extent: callers see to it that the shift is
    zero or the kernel reads no padding.
    """
    per_group = conv.in_channels // conv.groups

    def columns(v: Array) -> Array:
        grouped = np.broadcast_to(v, (conv.in_channels,)).reshape(conv.groups, per_group)
        rows = np.repeat(grouped, conv.out_channels // conv.groups, axis=0)
        return rows.reshape(*rows.shape, *[1] * conv.frame)

    weight = conv.weight * columns(scale)
    if not np.any(shift):
        return replace(conv, x=x, weight=weight)
    bias = conv.bias_or_zero + (conv.weight * columns(shift)).sum(axis=tuple(range(1, conv.weight.ndim)))
    return replace(conv, x=x, weight=weight, bias=bias)


def pointwise(x: Expr, scale: Array, shift: Array, channels: int, frame: int) -> Conv:
    """``scale * x + shift`` as a kernel of one tap at offset 0, with one group per channel."""
    ones, zeros = (1,) * frame, (0,) * frame
    weight = np.broadcast_to(scale, (channels,)).reshape(channels, 1, *ones).astype(np.float64)
    bias = np.broadcast_to(shift, (channels,)).astype(np.float64) if np.any(shift) else None
    return Conv(x, weight, bias, stride=ones, dilation=ones, offset=zeros, delta=zeros, groups=channels)


def merge(convs: Sequence[Conv]) -> Conv:
    """The sum of convolutions of one input with equal channels, strides and deltas, as one.

    Taps add at their absolute offsets: the new kernel spans from the first tap of all to the last,
    on the coarsest grid that holds every tap. Its groups are the greatest common divisor of theirs.
    """
    first = convs[0]
    offset, dilation, kernel = (
        zip(*(_span(convs, axis) for axis in range(first.frame)), strict=True) if first.frame else ((), (), ())
    )
    groups = gcd(*(c.groups for c in convs))
    weight = np.zeros((first.out_channels, first.in_channels // groups, *kernel))
    for conv in convs:
        at = tuple(
            slice((a - a0) // d0, (r - a0) // d0 + 1, max(1, d // d0))  # one tap may have any dilation
            for a, r, d, a0, d0 in zip(conv.offset, conv.reach, conv.dilation, offset, dilation, strict=True)
        )
        weight[(slice(None), slice(None), *at)] += regroup(conv, groups)
    biased = [c.bias for c in convs if c.bias is not None]
    bias = sum(biased[1:], biased[0]) if biased else None
    return replace(first, weight=weight, bias=bias, dilation=dilation, offset=offset, groups=groups)


def regroup(conv: Conv, groups: int) -> Array:
    """The weight of ``conv`` written with fewer groups (a divisor of its own): block-diagonal inside each."""
    ratio = conv.groups // groups
    if ratio == 1:
        return conv.weight
    rows, columns = conv.out_channels // conv.groups, conv.in_channels // conv.groups
    blocks = conv.weight.reshape(groups, ratio, rows, columns, *conv.kernel)
    weight = np.zeros((groups, ratio, rows, ratio, columns, *conv.kernel))
    for r in range(ratio):
        weight[:, r, :, r] = blocks[:, r]
    return weight.reshape(conv.out_channels, ratio * columns, *conv.kernel)


def _span(convs: Sequence[Conv], axis: int) -> Ints:
    """(offset, dilation, taps) of the coarsest grid along ``axis`` that holds the taps of all."""
    offset = min(c.offset[axis] for c in convs)
    steps = [c.dilation[axis] for c in convs if c.kernel[axis] > 1] + [c.offset[axis] - offset for c in convs]
    dilation = gcd(*steps) or 1
    return offset, dilation, (max(c.reach[axis] for c in convs) - offset) // dilation + 1

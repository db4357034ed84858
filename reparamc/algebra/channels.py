"""Channels that are constant or that nothing uses: what an operator makes of them, and the operator without them.

A channel is *known* where it has one number at every position, for every input. Known channels are arrays of numbers,
with NaN for those that vary.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reparamc.algebra.arrays import glanced, values
from reparamc.algebra.expr import Array, BatchNorm, Concat, Conv, Expr, Layout, Reshape, Scale, Select, Source, Sum
from reparamc.algebra.kernels import coefficients
from reparamc.algebra.records import replace
from reparamc.algebra.shape import Dim

Index = npt.NDArray[np.intp]
Mask = npt.NDArray[np.bool_]


def known_after(e: Expr, operands: Sequence[Array], read: Mask | None = None) -> Array:
    """The known channels of ``e``, from those of its operands; ``read`` is what a kernel `uses`."""
    match e:
        case Conv():
            return _known_after_conv(e, operands[0], uses(e) if read is None else read)
        case Scale() | BatchNorm():
            with np.errstate(all="ignore"):
                scale, shift = map(values, coefficients(e))
                return np.where(scale == 0, shift, scale * operands[0] + shift)
        case Concat():
            return np.concatenate(operands)
        case Select():
            return operands[0][list(e.index)]
        case _:
            return sum(operands[1:], operands[0])  # a layout operator keeps its operand's


def uses(conv: Conv) -> Mask:
    """[group, output, input]: whether some tap of an output reads an input, numbered inside their group."""
    weight = glanced(conv.weight)
    shape = (conv.groups, conv.out_channels // conv.groups, conv.weight.shape[1])
    return np.ones(shape, bool) if weight.all() else (weight != 0).reshape(*shape, _taps(conv)).any(-1)


def takes_constants(conv: Conv, known: Array) -> Mask:
    """The inputs whose known number can go into the bias: any number, or zero alone where padding is read."""
    return known == 0 if conv.reads_padding else ~np.isnan(known)


def _taps(conv: Conv) -> int:
    return int(np.prod(conv.kernel, dtype=int))


def _known_after_conv(conv: Conv, known: Array, read: Mask) -> Array:
    grouped = (conv.groups, 1, conv.weight.shape[1])
    fixed = takes_constants(conv, known)
    varies = (read & ~np.reshape(fixed, grouped)).any(-1)
    if varies.all():
        return np.full(conv.out_channels, np.nan)
    summed = np.reshape(values(conv.weight), (conv.groups, -1, conv.weight.shape[1], _taps(conv))).sum(-1)
    total = (summed * np.reshape(np.where(fixed, known, 0), grouped)).sum(-1)
    return np.where(varies, np.nan, total).ravel() + values(conv.bias_or_zero)


def is_separate(conv: Conv) -> bool:
    """Whether every output reads one input alone."""
    return conv.weight.shape[1] == 1 and (conv.groups > 1 or conv.out_channels == 1)


def narrowed(
    e: Expr, x: Sequence[Expr], out: Index, read: Sequence[Index], known: Sequence[Array],
    merged: Sequence[tuple[Index, Array]], least: float = 0.0,
) -> Expr:  # fmt: skip
    """``e`` over operands ``x`` that have the channels ``read`` of its own, as far as its outputs ``out`` go.

    Args:
        known: the known channels of its own operands: those that are gone go into the bias.
        merged: for each channel of its operands the one that it is a multiple of, and by how much: the columns of
            those that are gone are added to those of the others.
        least: what is added to a bias there and is smaller is zero.
    """
    match e:
        case Conv():
            return _narrowed_conv(e, x[0], out, read[0], known[0], merged[0], least)
        case Scale():
            scale, shift = (values(v)[out] if v.ndim else v for v in (e.scale, e.shift))
            return replace(e, x=x[0], scale=scale, shift=shift)
        case BatchNorm():
            gamma, beta, mean, var = (values(v)[out] for v in (e.gamma, e.beta, e.mean, e.var))
            return replace(e, x=x[0], gamma=gamma, beta=beta, mean=mean, var=var)
        case Sum():
            return Sum(tuple(x))
        case Concat():
            return Concat(tuple(x), tuple(map(len, read)), e.axis)
        case Select():
            index = np.searchsorted(read[0], np.asarray(e.index)[out])
            return Select(x[0], tuple(index.tolist()), len(read[0]), e.axis)
        case Layout():
            return with_width(e, x[0], len(out))
        case Source():
            return e


def _narrowed_conv(
    conv: Conv, x: Expr, out: Index, read: Index, known: Array, merged: tuple[Index, Array], least: float
) -> Conv:
    weight = values(conv.weight)[out]
    bias = None if conv.bias is None else values(conv.bias)[out]
    if is_separate(conv):
        return replace(conv, x=x, weight=weight, bias=bias, groups=len(read))
    gone = np.setdiff1d(np.flatnonzero(~np.isnan(known)), read)
    taps = np.reshape(weight[:, gone], (len(out), len(gone), _taps(conv)))
    moved = (taps.sum(-1) * known[gone]).sum(-1)
    moved = np.where(np.abs(moved) < least, 0.0, moved)
    if moved.any():
        bias = moved if bias is None else bias + moved
    into, factor = merged
    for channel in np.setdiff1d(np.flatnonzero(np.isnan(known) & (into != np.arange(len(into)))), read):
        weight[:, into[channel]] += factor[channel] * weight[:, channel]
    return replace(conv, x=x, weight=np.ascontiguousarray(weight[:, read]), bias=bias)


def with_width(e: Layout, x: Expr, width: int) -> Layout:
    """``e`` of ``x``, which has another number of channels."""
    op = e.op
    if isinstance(op, Reshape) and e.axis is not None and e.axis_in is not None and op.before[e.axis_in] != Dim(width):
        before, after = list(op.before), list(op.after)
        before[e.axis_in], after[e.axis] = Dim(width), Dim(width)
        native = op.native if e.axis + len(after) in op.free else None
        op = Reshape(tuple(before), tuple(after), native, op.free)
    return Layout(x, op, e.axis_in)

"""What operators that ONNX and torch share mean, as affine maps, once their arguments are read."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import product
from math import prod

import numpy as np

import reparamc.certificate.kernels as nk
import reparamc.certificate.normal_form as nf
from reparamc.certificate.axes import Dim, Unrepresentable
from reparamc.certificate.kernels import Kernel
from reparamc.certificate.normal_form import Array, Value, replace

Numbers = Sequence[int]


def kernel_axes(x: Value, n: int) -> tuple[int, tuple[int, ...]]:
    """The axis of the channels, and those of a kernel over ``n`` axes."""
    if x.rank not in (n + 1, n + 2):
        raise Unrepresentable("a kernel over other axes than its operand has")
    return x.rank - n - 1, tuple(range(x.rank - n, x.rank))


def convolved(
    x: Value, weight: Array, bias: Array | None, groups: int, stride: Numbers, dilation: Numbers, begin: Numbers,
    end: Numbers, rounded: int = 1,
) -> Value:  # fmt: skip
    """A convolution; ``weight`` is (out, in / groups, *kernel)."""
    kernel = weight.shape[2:]
    channel, axes = kernel_axes(x, len(kernel))
    offsets = tuple(product(*(range(-b, -b + d * k, d) for b, d, k in zip(begin, dilation, kernel, strict=True))))
    delta = tuple(d * (k - 1) - b - e for k, d, b, e in zip(kernel, dilation, begin, end, strict=True))
    first = nk.grouped_first(weight.shape[0], weight.shape[1], groups)
    flat = weight.reshape(*weight.shape[:2], -1)
    return biased(
        nk.convolved(x, Kernel(flat, first, offsets, axes, tuple(stride), delta, rounded), channel), bias, channel
    )


def transposed(
    x: Value, weight: Array, bias: Array | None, groups: int, stride: Numbers, dilation: Numbers, begin: Numbers,
    end: Numbers, extra: Numbers,
) -> Value:  # fmt: skip
    """A transposed convolution; ``weight`` is (in, out / groups, *kernel)."""
    kernel = weight.shape[2:]
    channel, axes = kernel_axes(x, len(kernel))
    if any(s > 1 for s in stride):
        x = nk.spread(x, axes, stride)
    # What is written at offset o of an input position is read at offset -o of an output position.
    offsets = tuple(product(*(range(b, b - d * k, -d) for b, d, k in zip(begin, dilation, kernel, strict=True))))
    sides = zip(begin, end, extra, dilation, kernel, strict=True)
    delta = tuple(b + e - o - d * (k - 1) for b, e, o, d, k in sides)
    rows = turned(weight, groups)
    first = nk.grouped_first(len(rows), rows.shape[1], groups)
    return biased(nk.convolved(x, Kernel(rows, first, offsets, axes, (1,) * len(axes), delta), channel), bias, channel)


def turned(weight: Array, groups: int) -> Array:
    """The weight of a transposed convolution as (out, in / groups, taps)."""
    inside = weight.shape[0] // groups
    parts = weight.reshape(groups, inside, weight.shape[1], -1).swapaxes(1, 2)
    return parts.reshape(-1, inside, prod(weight.shape[2:]))


def weighted(gathered: Value, weight: Array, bias: Array | None, groups: int, is_transposed: bool) -> Value:
    """What a kernel makes of what it gathers: for each channel that it reads, all taps, one after the other."""
    axis = gathered.rank - weight.ndim + 1
    rows = turned(weight, groups) if is_transposed else weight
    rows = rows.reshape(len(rows), -1)
    first = nk.grouped_first(len(rows), rows.shape[1], groups)
    return biased(nk.convolved(gathered, Kernel(rows[:, :, None], first, ((),), (), (), ()), axis), bias, axis)


def biased(value: Value, bias: Array | None, axis: int) -> Value:
    return value if bias is None else nf.shifted(value, bias, axis)


def pooled(x: Value, kernel: Numbers, stride: Numbers, dilation: Numbers, begin: Numbers, end: Numbers) -> Value:
    """The average of each window, padding included."""
    channels = channels_of(x, kernel_axes(x, len(kernel))[0])
    weight = np.full((channels, 1, *kernel), 1 / prod(kernel))
    return convolved(x, weight, None, channels, stride, dilation, begin, end, 0)


def repeated(x: Value, times: Numbers) -> Value | None:
    """Each position that many times over: what a kernel of ones writes, its stride as its size.

    None where that cannot be said of ``x``, which is a result of a kernel.
    """
    ones, zeros = (1,) * len(times), (0,) * len(times)
    try:
        channels = channels_of(x, kernel_axes(x, len(times))[0])
        everywhere = x.vectors if x.vectors.keys() == {None} else {}  # what is added everywhere stays so
        bare = replace(x, vectors={}) if everywhere else x
        found = transposed(bare, np.ones((channels, 1, *times)), None, channels, times, ones, zeros, zeros, zeros)
        return replace(found, vectors={**found.vectors, **everywhere})
    except Unrepresentable:
        return None


def channels_of(x: Value, axis: int = 1) -> int:
    """How many channels lie along ``axis``."""
    count = x.shape[axis].known
    if count is None:
        raise Unrepresentable("the number of channels is unknown")
    return count


def padded(x: Value, amounts: Sequence[tuple[int, int, int]], fill: float) -> Value:
    """``fill`` added along axes: (axis, before, after) for each."""
    wanted = [a for a in amounts if a[1:] != (0, 0)]
    if not wanted:
        return x
    if min(axis for axis, _, _ in wanted) < 2:
        raise Unrepresentable("a padding adds channels or images")
    axes, begin, end = zip(*wanted, strict=True)
    return nk.padded(x, axes, begin, end, fill, 1)


def matrix(x: Value | None, y: Value | None, weight: Array | None) -> Value:
    """x W, or W y."""
    if weight is None or weight.ndim != 2 or (y is not None and y.rank < 2):
        raise Unrepresentable("a stack of matrices")
    if x is not None:
        return nk.mixed(x, weight.T, x.rank - 1)
    assert y is not None
    return nk.mixed(y, weight, y.rank - 2)


def rescaled(normal: Value, weight: Array | None, bias: Array | None, axis: int) -> Value:
    """What a normalization does after it has normalized: a factor and a shift for each channel."""
    if any(a is not None and a.shape != (normal.shape[axis].known,) for a in (weight, bias)):
        raise Unrepresentable("a normalization whose parameters do not fit the channels")
    return biased(normal if weight is None else nf.scaled(normal, weight, axis), bias, axis)


def normalized(x: Value, gamma: Array | None, beta: Array | None, mean: Array, var: Array, epsilon: float) -> Value:
    """BatchNorm with stored statistics."""
    axis = 1 if x.rank > 1 else 0
    gamma, beta = (np.full(mean.shape, other) if a is None else a for a, other in ((gamma, 1.0), (beta, 0.0)))
    gamma, beta, mean, var = (a.astype(np.float64) for a in (gamma, beta, mean, var))
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(var + epsilon)
        moved = mean * factor
    return nf.shifted(nf.scaled(x, factor, axis), beta - moved, axis, np.abs(beta) + np.abs(moved))


def arithmetic(op: str, x: Value, other: Value | Array, is_first: bool) -> Value:
    """``x op other``, or ``other op x`` where ``other`` is the first operand; op is add, sub, mul or div."""
    if isinstance(other, Value):
        if op not in ("add", "sub"):
            raise Unrepresentable("a product of two values")
        return nf.added([x, nf.scaled(other, -1.0) if op == "sub" else other])
    constant = other.astype(np.float64)
    axis = _along(constant, x)
    if op == "div" and is_first:
        raise Unrepresentable("a division by a value")
    with np.errstate(all="ignore"):
        if op in ("mul", "div"):
            return nf.scaled(x, constant if op == "mul" else 1 / constant, axis)
    if op == "sub":
        x, constant = (nf.scaled(x, -1.0), constant) if is_first else (x, -constant)
    return nf.shifted(x, constant, axis)


def _along(constant: Array, x: Value) -> int | None:
    """The axis of ``x`` that a constant varies along; None for a scalar."""
    wide = [i for i, d in enumerate(constant.shape) if d != 1]
    if constant.ndim > x.rank or len(wide) > 1:
        raise Unrepresentable("a constant varies along several axes, or raises the rank")
    if not wide:
        return None
    axis = x.rank - constant.ndim + wide[0]
    if x.shape[axis].known != constant.shape[wide[0]]:
        raise Unrepresentable("a constant may repeat its operand along an axis")
    return axis


def merged(x: Value, start: int, stop: int) -> list[Dim]:
    """The axes of ``x``, those from ``start`` to ``stop`` merged."""
    one = Dim()
    for e in x.shape[start:stop]:
        one = one.times(e)
    return [*x.shape[:start], one, *x.shape[stop:]]

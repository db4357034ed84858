"""Are two expressions equal? Both are evaluated in float64 on inputs that meet every border case."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import numpy as np
import numpy.typing as npt

from reparamc.algebra.arrays import values
from reparamc.algebra.evaluate import TooLargeError, absolute
from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
    walk,
)
from reparamc.algebra.samples import samples

REGION_TOLERANCE = 1e-11
"""Largest error accepted of an element in float64, relative to the magnitudes of the terms that it is the sum of."""


def compare_expressions(before: Expr, after: Expr) -> float:
    """Largest error of ``after`` over the same sources, relative to the terms of each element; inf if unlike in kind.

    Both are evaluated in float64: on inputs just larger than their kernels, so that every border case occurs, at two
    sizes of different parity, and on results of 1, 2 and 3 elements along each axis, where the region takes such
    maps. The first time on values of ordinary size, on zeros, and on values of all sizes.

    Raises:
        ValueError: no input fits all branches, or values overflow.
    """
    worst = 0.0
    terms = absolute(before)
    for sample in samples([before, after, terms]):
        with np.errstate(over="ignore", invalid="ignore"):
            try:
                a = values(sample.value(before))
            except TooLargeError:
                raise
            except (ValueError, IndexError) as error:
                raise ValueError("its shapes do not fit together on sample inputs") from error
            try:
                b = values(sample.value(after))
            except TooLargeError:
                raise
            except (ValueError, IndexError):
                return float("inf")
            scale = values(sample.magnitudes().value(terms))
        if not np.isfinite(scale).all():
            raise ValueError("its values overflow float64")
        worst = max(worst, relative(a, b, scale), key=lambda e: (np.isnan(e), e))
    return worst


def largest_by_channel(magnitudes: npt.NDArray[Any], axis: int | None) -> npt.NDArray[Any]:
    """The largest of each channel; of all together where the channel axis is unknown."""
    known = axis is not None and -axis <= magnitudes.ndim
    rows = np.reshape(magnitudes, (1, -1)) if axis is None or not known else np.moveaxis(magnitudes, axis, 0)
    return rows.max(axis=tuple(range(1, rows.ndim)), initial=0.0)


def relative(reference: Array, other: Array, terms: Array) -> float:
    """Largest difference of an element relative to its ``terms``; inf where shapes, NaN or infinities differ."""
    if reference.shape != other.shape:
        return float("inf")
    finite = np.isfinite(reference)
    if not np.array_equal(finite, np.isfinite(other)):
        return float("inf")
    if not np.array_equal(reference[~finite], other[~finite], equal_nan=True):
        return float("inf")
    gap, scale = np.abs(reference[finite] - other[finite]), np.broadcast_to(terms, reference.shape)[finite]
    with np.errstate(divide="ignore"):
        return float(np.divide(gap, scale, out=np.zeros_like(gap), where=gap > 0).max(initial=0.0))


def structure(root: Expr) -> Hashable:
    """What operators an expression has, weights and numbers of channels left out."""
    order = {e: n for n, e in enumerate(walk(root))}
    return tuple((*_structure(e), *(order[c] for c in e.children)) for e in order)


def _structure(e: Expr) -> tuple[Hashable, ...]:
    """What an operator is, weights and numbers of channels left out."""
    match e:
        case Source():
            return (Source, e.axis)
        case Conv():
            groups = 1 if e.groups == 1 else "all" if e.groups == e.in_channels else "some"
            grid = (e.kernel, e.stride, e.dilation, e.offset, e.delta, e.transposed)
            return (Conv, *grid, groups, e.bias is None, e.is_weightless)
        case Scale():
            return (Scale, e.axis, e.scale.ndim, e.shift.ndim)
        case BatchNorm() | Concat() | Select():
            return (type(e), e.axis)
        case Sum():
            return (Sum,)
        case Layout(op=Permute(axes=axes)):
            return (Permute, axes)
        case Layout(op=(Mean() | Take() | Resize() | Spread()) as op):
            return (op,)
        case Layout(op=Reshape() as op):
            return (Reshape, len(op.before), len(op.after), e.axis_in, e.axis)
        case _:
            raise AssertionError(f"{type(e).__name__} is not an expression")

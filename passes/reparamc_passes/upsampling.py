"""Nearest upsampling before a convolution goes into it: a transposed convolution over the small map.

    W * U(x) + b               =  T *^T x + b               U repeats each position r times, T[s - t] the sum of W[t]
    W * concat(U(x), y) + b    =  T *^T x + (W" * y + b)    T of the columns of x, W" those of y

A 3x3 kernel reads each position of a map that was doubled four or nine times over; the kernel of the transposed
convolution, 4x4 of stride 2, has the sum of what they are multiplied by: 16 multiply-adds where there were 36. Decoders
of segmentation networks upsample like that, and put a map of the encoder beside.

Exact because U repeats, whatever the size, and both read zeros beyond the border. The kernel is dense and of stride 1;
a depthwise one is left, for runtimes do not do transposed ones fast. What a multiply-add of a transposed convolution
takes depends on the runtime, so that the price does: see ``--target`` and `reparamc.algebra.cost`.
"""

from __future__ import annotations

from itertools import product
from math import prod

import numpy as np

from reparamc.algebra.arrays import together, zeros_of
from reparamc.algebra.cost import Objective
from reparamc.algebra.expr import Concat, Conv, Expr, Ints, Layout, Resize, total
from reparamc.algebra.records import replace
from reparamc.algebra.resample import resize_matrix
from reparamc.algebra.rewrite import Declined, Pass
from reparamc_passes.placing import columns

DEARER = "a transposed convolution over the small map would take longer on this target"
TRIED = (1, 2, 3, 5)
"""Sizes at which an upsampling is compared with a repetition."""


def into_kernel(e: Conv, objective: Objective) -> Expr | Declined | None:
    """W * U(x) = T *^T x."""
    if not _reads_grid(e) or (times := _times(e.x, e.axis)) is None:
        return None
    found = _transposed(e, times)
    if found is None:
        return None
    return found if objective.cost(found) < objective.cost(e) else Declined(DEARER)


def into_columns(e: Conv, objective: Objective) -> Expr | None:
    """W * concat(U(x), y) = T *^T x + W" * y."""
    if not (_reads_grid(e) and isinstance(e.x, Concat) and e.x.axis == e.axis):
        return None
    parts: list[Expr] = []
    rest: list[tuple[Expr, int, int]] = []
    at = 0
    for term, size in zip(e.x.terms, e.x.sizes, strict=True):
        times = _times(term, e.axis)
        part = None if times is None else _transposed(columns(e, [(at, size)], term, None), times)
        if part is None:
            rest.append((term, at, size))
        else:
            parts.append(part)
        at += size
    if not parts or not rest:
        return None
    terms, sizes = [t for t, _, _ in rest], [n for _, _, n in rest]
    joined = terms[0] if len(rest) == 1 else Concat(tuple(terms), tuple(sizes), e.axis)
    found = total([columns(e, [(first, n) for _, first, n in rest], joined, e.bias), *parts])
    return found if objective.cost(found) < objective.cost(e) else None


def _reads_grid(e: Conv) -> bool:
    """Whether ``e`` is a dense kernel over all positions, of more than one tap."""
    if e.groups > 1 or e.transposed or e.reads_taps:
        return False
    return prod(e.kernel) > 1 and all(n == 1 for n in (*e.stride, *e.dilation))


def _times(x: Expr, axis: int) -> Ints | None:
    """How often an upsampling repeats each position, along each axis of a kernel; None where it does anything else."""
    if not (isinstance(x, Layout) and isinstance(x.op, Resize) and x.axis == x.axis_in == axis):
        return None
    op = x.op
    whole = all(scale.denominator == 1 for scale in op.scales) and len(op.scales) == -1 - axis
    if op.mode != "nearest" or not whole:
        return None
    for scale in op.scales:
        for n in TRIED:
            made = resize_matrix(n, scale, op.mode, op.place, op.rounding, op.cubic)
            if not np.array_equal(made, np.repeat(np.eye(n), scale.numerator, 0)):
                return None
    return tuple(scale.numerator for scale in op.scales)


def _transposed(e: Conv, times: Ints) -> Conv | None:
    """``e`` over what its operand repeats; None where it would leave out values at the border."""
    assert isinstance(e.x, Layout)
    _, weight = together(e.weight)
    kernel = tuple(k + r - 1 for k, r in zip(e.kernel, times, strict=True))
    spread = zeros_of(weight, (*weight.shape[:2], *kernel))
    for shift in product(*map(range, times)):
        for tap in product(*map(range, e.kernel)):
            at = tuple(s + k - 1 - t for s, k, t in zip(shift, e.kernel, tap, strict=True))
            spread[(..., *at)] += weight[(..., *tap)]
    found = replace(
        e, x=e.x.x, weight=spread, stride=times, transposed=True,
        offset=tuple(-a - k + 1 for a, k in zip(e.offset, e.kernel, strict=True)),
        delta=tuple(r - 1 - d for r, d in zip(times, e.delta, strict=True)),
    )  # fmt: skip
    return None if found.skips_border else found


UPSAMPLING = Pass(
    name="upsampling",
    equation='W * U(x) + b = T *^T x + b;  W * concat(U(x), y) + b = T *^T x + (W" * y + b)',
    exact_when="U repeats each position a whole number of times; the kernel is dense and of stride 1; if cheaper",
    priced=(into_kernel, into_columns),
    refusals=(DEARER,),
)

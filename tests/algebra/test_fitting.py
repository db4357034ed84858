"""Sizes of sample inputs: what names one size is given one, and what is computed from others follows them."""

from __future__ import annotations

import numpy as np
import pytest

from reparamc.algebra.equal import compare_expressions
from reparamc.algebra.expr import (
    ONE,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Permute,
    Reshape,
    Scale,
    Select,
    Source,
    Sum,
)
from reparamc.algebra.shape import shape_of

C = 6
RNG = np.random.default_rng(0)


def source(name: str, *sizes: int | str) -> Source:
    return Source(name, shape=shape_of(sizes))


def reshaped(x: Expr, before: tuple[int | str, ...], after: tuple[int | str, ...], axis_in: int) -> Layout:
    return Layout(x, Reshape(shape_of(before), shape_of(after)), axis_in)


def norm(x: Expr, axis: int) -> BatchNorm:
    gamma, beta, mean = RNG.standard_normal((3, C))
    return BatchNorm(x, gamma, beta, mean, np.full(C, 1.5), 1e-5, axis)


def rows(name: str, batch: str, made: str) -> Expr:
    """[batch, 4, C] normed as rows [made, C], and back."""
    flat = reshaped(source(name, batch, 4, C), (batch, 4, C), (made, C), -1)
    return reshaped(norm(flat, -1), (made, C), (f"{made}_back", 4, C), -1)


def conv(x: Expr, stride: int) -> Conv:
    weight = RNG.standard_normal((C, C, 3, 3))
    return Conv.padded(x, weight, None, (stride, stride), (1, 1), (1, 1), (1, 1), 1)


def strided_rows(stride: int) -> Expr:
    """A strided map as rows [batch, h * w, C], plus rows whose number has a name of its own."""
    x = conv(source("x", "n", C, "h", 9), stride)
    wide = -(-9 // stride)
    flat = reshaped(x, ("n", C, "h2", wide), ("n", C, "l"), -3)
    return Sum((Layout(flat, Permute((0, 2, 1)), -2), source("z", "m", "tokens", C)))


CASES = {
    "another name of the batch": Sum((source("z", "m", 4, C), rows("x", "n", "p"))),
    "three names": Sum((rows("x", "n", "p"), source("z", "m", 4, C), rows("v", "k", "q"))),
    "a number and a name": Sum((rows("x", "n", "p"), source("z", 5, 4, C))),
    "a strided map": strided_rows(2),
    "a concatenation": Sum(
        (
            Concat((rows("x", "n", "p"), rows("v", "k", "q")), (C, C), -1),
            source("z", "m", 4, 2 * C),
        )
    ),
    "positions of the batch": Select(norm(source("x", 8, C, 5), -2), (5, 6, 7), 8, -3),
    "positions of the batch, then a scale": norm(Select(source("x", 8, C, 5), (5, 7), 8, -3), -2),
    "positions of an open axis": norm(Select(source("x", "n", C, 5), (5, 7), 8, -3), -2),
}


@pytest.mark.parametrize("name", CASES)
def test_its_operators_tell_which_sizes_fit(name: str) -> None:
    e = CASES[name]
    assert compare_expressions(e, e) == 0
    assert compare_expressions(e, Scale(e, ONE, 1e-3 * ONE, None)) > 1e-6


def test_sizes_that_never_fit_are_told() -> None:
    e = Sum((rows("x", "n", "p"), source("z", 5, 4, C), source("v", 3, 4, C)))
    with pytest.raises(ValueError, match="do not fit together"):
        compare_expressions(e, e)

"""The comparison of a region with its replacement: that it sees what is wrong, and only that."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reparamc.algebra.equal import REGION_TOLERANCE, compare_expressions, relative
from reparamc.algebra.evaluate import absolute, evaluate
from reparamc.algebra.expr import Array, BatchNorm, Concat, Conv, Expr, Scale, Source, Sum
from reparamc.algebra.kernels import coefficients, scale_outputs
from reparamc.algebra.samples import samples

SMALL = 1e-9
"""The size of the one small channel beside those of ordinary size."""


def drawn(*shape: int) -> Array:
    return np.random.default_rng(shape).standard_normal(shape)


def conv(x: Expr, out: int, channels: int, *, pad: int = 1, stride: int = 1, kernel: int = 3) -> Conv:
    weight = drawn(out, channels, kernel, kernel)
    return Conv.padded(x, weight, drawn(out), (stride, stride), (1, 1), (pad, pad), (pad, pad))


def region(small: float = 1.0) -> BatchNorm:
    """A convolution and a BatchNorm; ``small`` is the size of the last channel."""
    gamma, beta = drawn(4) + 3, drawn(4, 1)[:, 0]
    gamma[-1], beta[-1] = gamma[-1] * small, beta[-1] * small
    return BatchNorm(
        conv(Source("x", 3, -3), 4, 3), gamma, beta, drawn(1, 4)[0], np.abs(drawn(4, 2)[:, 0]) + 0.5, 1e-5, -3
    )


def folded(e: BatchNorm, change: Callable[[Conv], Conv] = lambda c: c) -> Expr:
    assert isinstance(e.x, Conv)
    return change(scale_outputs(e.x, *coefficients(e)))


def last(a: Array | None, factor: float) -> Array:
    """``a`` with its last entry, or last row, scaled."""
    assert a is not None
    b = a.copy()
    b[-1] *= factor
    return b


WRONG: dict[str, Callable[[Conv], Conv]] = {
    "bias of one channel": lambda c: replace(c, bias=last(c.bias, 1 + 1e-6)),
    "bias of one channel lost": lambda c: replace(c, bias=last(c.bias, 0.0)),
    "weights of one channel": lambda c: replace(c, weight=last(c.weight, 1 + 1e-6)),
    "offset by one": lambda c: replace(c, offset=(c.offset[0] + 1, c.offset[1])),
    "other padding": lambda c: replace(c, offset=(-2, -2)),
    "larger result": lambda c: replace(c, delta=(-1, 0)),
    "folded in float32": lambda c: replace(c, weight=c.weight.astype(np.float32).astype(np.float64)),
    "nothing at the border": lambda c: replace(c, weight=c.weight * np.array([[0, 1, 1], [1, 1, 1], [1, 1, 1]])),
    "not a number": lambda c: replace(c, bias=last(c.bias, np.nan)),
}


@pytest.mark.parametrize("small", [1.0, SMALL])
@pytest.mark.parametrize("fault", WRONG)
def test_a_fault_shows_also_in_a_channel_that_is_small(fault: str, small: float) -> None:
    before = region(small)
    assert compare_expressions(before, folded(before)) < 1e-14
    assert not compare_expressions(before, folded(before, WRONG[fault])) <= REGION_TOLERANCE


def test_sizes_that_agree_for_some_inputs_only_are_a_fault() -> None:
    before = conv(Source("x", 3, -3), 4, 3, stride=2)
    assert compare_expressions(before, replace(before, delta=(1, 1))) == np.inf


def test_a_small_shift_shows_beside_large_weights() -> None:
    x = Source("x", 3, -3)
    c = conv(x, 4, 3)
    before = Conv.padded(x, 1e9 * c.weight, 1e-9 * c.bias_or_zero, (1, 1), (1, 1), (1, 1), (1, 1))
    wrong = replace(before, bias=last(before.bias, 1.001))
    assert compare_expressions(before, wrong) == pytest.approx(1e-3)


def test_a_small_weight_shows_beside_large_ones() -> None:
    x, weight = Source("x", 3, -1), np.array([[1e6, 1.0, 1e6]])
    before, wrong = (Conv(x, weight * factor, None) for factor in (1, np.array([1, 1.01, 1])))
    assert compare_expressions(before, wrong) > 10 * REGION_TOLERANCE


def test_exact_cancellation_is_no_fault() -> None:
    """x + s(conv(x) - conv(x)) loses all digits of what cancels; the rounding left is no error."""
    x = Source("x", 3, -3)
    c = conv(x, 3, 3)
    factor = Scale(c, drawn(3) * 1e6, np.zeros(3), -3)
    near = Scale(c, (drawn(3) * 1e6) * (1 + 2**-40), np.zeros(3), -3)
    before = Sum((x, factor, Scale(near, -np.ones(()), np.zeros(()))))
    rest = drawn(3) * 1e6 - (drawn(3) * 1e6) * (1 + 2**-40)
    after = Sum((x, Scale(c, rest, np.zeros(3), -3)))
    assert compare_expressions(before, after) < 1e-13


def test_a_branch_of_wrong_size_is_no_smaller_fault_because_another_is_large() -> None:
    x = Source("x", 3, -3)
    a, b = conv(x, 2, 3), conv(x, 2, 3)
    before = Concat((Scale(a, 1e12 * np.ones(()), np.zeros(())), b), (2, 2), -3)
    after = Concat((Scale(a, 1e12 * np.ones(()), np.zeros(())), replace(b, bias=last(b.bias, 1 + 1e-8))), (2, 2), -3)
    assert compare_expressions(before, before) == 0
    assert compare_expressions(before, after) > REGION_TOLERANCE


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("pad", [0, 1])
def test_samples_reach_both_parities_and_the_smallest_results(stride: int, pad: int) -> None:
    before = conv(Source("x", 3, -3), 4, 3, pad=pad, stride=stride)
    results, operands = set[int](), set[int]()
    for sample in samples([before]):
        results.update(sample.value(before).shape[2:])
        operands.update(n for x in sample.inputs.values() for n in x.shape[2:])
    assert {1, 2, 3} < results
    assert {n % 2 for n in operands} == {0, 1}
    assert max(operands) > 3


def test_a_fault_of_the_smallest_maps_alone_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    before = region()

    def faulty(e: Expr, *given: Any) -> tuple[Array, float]:
        y, size = evaluate(e, *given)
        return (y + 1e-3 if isinstance(e, Conv) and y.shape[2] == 1 and e.bias is not None else y), size

    monkeypatch.setattr("reparamc.algebra.samples.evaluate", faulty)
    assert compare_expressions(before, folded(before)) > REGION_TOLERANCE


def test_terms_are_those_of_each_element() -> None:
    before = Scale(Sum((Source("x", 2, -1), Source("y", 2, -1))), np.array([2.0, -3.0]), np.array([-1.0, 0.5]), -1)
    x, y = before.children[0].children
    inputs = {x: np.array([[1.0, -2.0]]), y: np.array([[-1.0, -4.0]])}
    found, _ = evaluate(absolute(before), {e: np.abs(a) for e, a in inputs.items()})  # type: ignore[misc]
    np.testing.assert_array_equal(found, [[5.0, 18.5]])


def test_relative() -> None:
    a = np.array([1.0, np.nan, np.inf, -np.inf, 0.0])
    terms = np.array([2.0, 1.0, 1.0, 1.0, 0.0])
    assert relative(a, a.copy(), terms) == 0
    assert relative(a, a + np.array([1e-3, 0, 0, 0, 0]), terms) == pytest.approx(5e-4)
    assert relative(a, np.where(np.arange(5) == 4, 1e-30, a), terms) == np.inf  # nothing explains it
    for wrong in (a[:4], np.abs(a), np.nan_to_num(a), np.where(np.isnan(a), np.inf, a)):
        assert relative(a, wrong, terms[: len(wrong)]) == np.inf

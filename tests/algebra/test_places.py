"""Values at a few positions: they are those of the whole map, and show what is wrong with it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from reparamc.algebra.equal import REGION_TOLERANCE, compare_expressions
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import BatchNorm, Conv, Expr, Ints, Scale, Source, Sum
from reparamc.algebra.kernels import coefficients, scale_outputs
from reparamc.algebra.places import Places, places
from reparamc.algebra.samples import ODD, ORDINARY, draw


@pytest.fixture(autouse=True)
def few(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is too much work."""
    monkeypatch.setattr("reparamc.algebra.places.WORK", 0)


def drawn(*shape: int) -> np.ndarray:
    return np.random.default_rng(shape).standard_normal(shape)


def conv(x: Expr, kernel: Ints, *, stride: int = 1, dilation: int = 1, pad: int = 0, transposed: bool = False) -> Conv:
    weight, n = drawn(4, 4, *kernel), len(kernel)
    if transposed:
        return Conv(x, weight, drawn(4), (stride,) * n, (dilation,) * n, (-pad,) * n, (1 - pad,) * n, transposed=True)
    return Conv.padded(x, weight, drawn(4), (stride,) * n, (dilation,) * n, (pad,) * n, (pad,) * n)


X = Source("x", 4, -3)
EXPRESSIONS: dict[str, Expr] = {
    "wide": conv(X, (9, 11), pad=3),
    "strided": conv(X, (7, 7), stride=3, pad=2),
    "dilated": conv(X, (3, 3), dilation=7, pad=7),
    "cropped": conv(X, (7, 7), pad=-1),
    "transposed": conv(X, (5, 5), stride=3, transposed=True, pad=1),
    "transposed and dilated": conv(X, (5, 5), stride=2, dilation=3, transposed=True, pad=1),
    "a chain": conv(conv(conv(X, (1, 1)), (7, 7), pad=3), (3, 3), stride=2, pad=1),
    "branches": Sum((X, conv(X, (9, 9), pad=4), Scale(conv(X, (3, 3), dilation=4, pad=4), drawn(4), drawn(4), -3))),
    "an image of one axis": conv(Source("x", 4, -2), (15,), dilation=2, pad=5),
}


def taken(places: Sequence[Any]) -> Any:
    """Some positions along the axes of a map of 3 images with 4 channels."""
    positions: list[Any] = [range(3), range(4), *places]
    return np.ix_(*positions)


@pytest.mark.parametrize("name", EXPRESSIONS)
def test_they_are_those_of_the_whole_map(name: str) -> None:
    e = EXPRESSIONS[name]
    sample = draw([e], ORDINARY, np.random.default_rng(0))
    at = sample.places
    assert at is not None
    (source,) = sample.inputs
    assert isinstance(source, Source)
    whole = drawn(3, 4, *at.sizes[source])
    rows = taken(at.at[source])
    found = replace(sample, inputs={source: whole[rows]}).value(e)
    expected, _ = evaluate(e, {source: whole})
    assert expected.shape[2:] == at.sizes[e]
    np.testing.assert_allclose(found, expected[taken(at.at[e])], rtol=1e-12, atol=1e-12)


def test_ends_are_among_them() -> None:
    e = EXPRESSIONS["dilated"]
    at = places([e], {X: (40, 41)}, np.random.default_rng(0))
    assert at is not None
    assert at.sizes[e] == (40, 41)
    assert [{0, 1, n - 1} <= set(p.tolist()) for p, n in zip(at.at[e], at.sizes[e], strict=True)] == [True, True]


def test_how_many_there_are_does_not_grow_with_the_kernel() -> None:
    for kernel, dilation in (((3, 3), 100), ((3, 3), 400), ((31, 31), 1)):
        e = conv(X, kernel, dilation=dilation, pad=dilation * kernel[0] // 2)
        sample = draw([e], ORDINARY, np.random.default_rng(0))
        assert sample.value(e).shape == (3, 4, 4, 4)
        assert max(x.size for x in sample.inputs.values()) <= 12 * (4 * kernel[0]) ** 2


def test_sizes_that_do_not_fit_are_computed_everywhere() -> None:
    e, other = EXPRESSIONS["wide"], replace(EXPRESSIONS["wide"], delta=(3, 4))
    assert places([e, other], {X: (20, 20)}, np.random.default_rng(0)) is None
    assert compare_expressions(e, other) == np.inf


def test_a_vector_along_an_axis_of_the_map_is_computed_everywhere() -> None:
    e = conv(Scale(X, drawn(7), np.zeros(()), -1), (3, 3), pad=1)
    assert draw([e], ODD, np.random.default_rng(0)).places is None


WRONG: dict[str, Callable[[Conv], Conv]] = {
    "offset": lambda c: replace(c, offset=tuple(a + 1 for a in c.offset)),
    "bias": lambda c: replace(c, bias=None if c.bias is None else c.bias * 1.001),
    "one tap": lambda c: replace(c, weight=c.weight + 1e-3 * (np.arange(9).reshape(3, 3) == 2)),
    "dilation": lambda c: replace(c, dilation=(9, 8), delta=tuple(d + 2 for d in c.delta)),
    "stride": lambda c: replace(c, stride=(2, 2)),
}


def shifted_before() -> tuple[BatchNorm, Conv]:
    e = conv(X, (3, 3), dilation=9, pad=9)
    norm = BatchNorm(e, drawn(4), drawn(4), drawn(4), np.abs(drawn(4)) + 0.5, 1e-5, -3)
    return norm, scale_outputs(e, *coefficients(norm))


@pytest.mark.parametrize("fault", WRONG)
def test_faults_show(fault: str) -> None:
    before, after = shifted_before()
    assert compare_expressions(before, after) < 1e-13
    assert not compare_expressions(before, WRONG[fault](after)) <= REGION_TOLERANCE


def test_a_shift_that_is_lost_at_the_border_shows() -> None:
    """A shift before a padded convolution is no bias: the border reads zeros, not the shift."""
    shift = drawn(4)
    e = conv(Scale(X, np.ones(4), shift, -3), (5, 5), dilation=5, pad=10)
    assert e.bias is not None
    wrong = replace(e, x=X, bias=e.bias + (e.weight.sum(axis=(2, 3)) @ shift))
    assert compare_expressions(e, e) == 0
    assert compare_expressions(e, wrong) > 0.01


def test_places_of_one_node_are_those_of_all_its_users() -> None:
    wide, narrow = conv(X, (5, 5), pad=2), conv(X, (1, 1))
    at = places([Sum((wide, narrow, X))], {X: (30, 30)}, np.random.default_rng(0))
    assert isinstance(at, Places)
    assert all(set(b) <= set(a) for a, b in zip(at.at[X], at.at[narrow], strict=True))
    assert len(at.at[X][0]) > len(at.at[narrow][0])

"""A route must say of every element which channel it came from, or nothing."""

from __future__ import annotations

from itertools import pairwise
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reparamc.algebra.channel_map import ChannelMap, regrouped
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import Expr, Layout, Mean, Permute, Reshape, Select, Source, Take, ranks
from reparamc.algebra.shape import shape_of


def labels(route: ChannelMap, shape: tuple[int, ...]) -> np.ndarray:
    """The channel of every element of a value of ``shape``, as ``route`` has it."""
    ordered = np.moveaxis(route.channels, np.argsort(route.axes), range(len(route.axes)))
    ones = [n if axis in route.axes else 1 for axis, n in enumerate(shape)]
    return np.broadcast_to(ordered.reshape(ones), shape)


@st.composite
def moved(draw: st.DrawFn) -> tuple[Source, int, list[Expr]]:
    """A source, its channel axis, and moves of it, each over the one before."""
    shape = draw(st.lists(st.sampled_from((1, 2, 3, 4, 6)), min_size=1, max_size=4))
    channel = draw(st.integers(-len(shape), -1))
    source = Source("x", shape[channel], channel, shape_of(shape))
    steps: list[Expr] = [source]
    for _ in range(draw(st.integers(1, 5))):
        e, rank = steps[-1], len(shape)
        kind = draw(st.sampled_from(("permute", "split", "merge", "take", "select", "mean", "one")))
        axis = draw(st.integers(0, rank - 1))
        match kind:
            case "permute":
                axes = tuple(draw(st.permutations(range(rank))))
                op: Any = Permute(axes)
                shape = [shape[a] for a in axes]
            case "split" if parts := [d for d in (2, 3) if shape[axis] % d == 0]:
                part = draw(st.sampled_from(parts))
                after = [*shape[:axis], part, shape[axis] // part, *shape[axis + 1 :]]
                op, shape = Reshape(shape_of(shape), shape_of(after)), after
            case "merge" if axis + 1 < rank:
                after = [*shape[:axis], shape[axis] * shape[axis + 1], *shape[axis + 2 :]]
                op, shape = Reshape(shape_of(shape), shape_of(after)), after
            case "one":
                after = [*shape[:axis], 1, *shape[axis:]]
                op, shape = Reshape(shape_of(shape), shape_of(after)), after
            case "take" if rank > 1:
                op = Take(rank, axis, draw(st.integers(0, shape[axis] - 1)))
                shape = [*shape[:axis], *shape[axis + 1 :]]
            case "mean" if rank > 1:
                op = Mean(rank, (axis,), draw(st.booleans()))
                shape = [*shape[:axis], *[1] * op.keep, *shape[axis + 1 :]]
            case "select":
                index = draw(st.lists(st.integers(0, shape[axis] - 1), min_size=1, max_size=4))
                steps.append(Select(e, tuple(index), shape[axis], axis - rank))
                shape = [*shape[:axis], len(index), *shape[axis + 1 :]]
                continue
            case _:
                continue
        steps.append(Layout(e, op, None))
    return source, channel, steps


@given(moved())
def test_every_element(case: tuple[Source, int, list[Expr]]) -> None:
    source, channel, steps = case
    sizes = [d.known or 0 for d in source.shape or ()]
    width = sizes[channel]
    ones = [width if axis == len(sizes) + channel else 1 for axis in range(len(sizes))]
    x = np.broadcast_to(np.arange(width, dtype=float).reshape(ones), sizes)
    route: ChannelMap | None = ChannelMap.of(len(sizes), channel, width)
    for e in steps[1:]:
        expected = evaluate(e, {source: x})[0]
        route = route.through(e) if route is not None else None
        if route is None:
            return  # it says nothing of what is after that either
        assert route.rank == expected.ndim
        np.testing.assert_array_equal(labels(route, expected.shape), expected)


@given(moved())
def test_ranks(case: tuple[Source, int, list[Expr]]) -> None:
    source, _, steps = case
    x = np.zeros([d.known or 0 for d in source.shape or ()])
    for before, e in pairwise(steps):
        if isinstance(e, Layout):
            assert ranks(e.op) == tuple(evaluate(v, {source: x})[0].ndim for v in (before, e))


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        (["B", "N", 24], ["B", "N", 3, 2, 4], [([0], [0]), ([1], [1]), ([2], [2, 3, 4])]),
        (["B", "N", 3, 8], ["B", "N", 24], [([0], [0]), ([1], [1]), ([2, 3], [2])]),
        (["B", "N", 24], ["B*N", 24], [([0, 1], [0]), ([2], [1])]),
        ([3, "B", 8], [1, 3, "B", 1, 8], [([], [0]), ([0], [1]), ([1], [2]), ([], [3]), ([2], [4])]),
        ([1, "B", 8], ["B", 8], [([0], []), ([1], [0]), ([2], [1])]),
        ([6, 10], [4, 15], [([0, 1], [0, 1])]),
    ],
)
def test_regrouped(before: list[Any], after: list[Any], expected: list[Any]) -> None:
    shapes = [shape_of([_dim(d) for d in dims]) for dims in (before, after)]
    assert list(regrouped(*shapes)) == expected


def _dim(text: Any) -> Any:
    return prod(shape_of(text.split("*")), start=shape_of([1])[0]) if isinstance(text, str) else text


def test_channels_mixed_with_positions() -> None:
    route = ChannelMap.of(3, -1, 8)
    merged = Layout(Source("x"), Reshape(shape_of([2, 5, 8]), shape_of([2, 40])), -1)
    assert route.through(merged) is None
    assert route.through(Layout(Source("x"), Mean(3, (2,), False), -1)) is None


def test_another_shape_than_the_value_has() -> None:
    wrong = Layout(Source("x"), Reshape(shape_of([2, 5, 6]), shape_of([2, 5, 2, 3])), -1)
    assert ChannelMap.of(3, -1, 8).through(wrong) is None


def test_a_factor_for_every_head() -> None:
    heads = ChannelMap.of(3, -1, 6).through(
        Layout(Source("x"), Reshape(shape_of([2, 5, 6]), shape_of([2, 5, 3, 2])), -1)
    )
    assert heads is not None
    found = heads.along(np.array([1.0, 2.0, 3.0]), -2)
    assert found is not None
    assert found.tolist() == [[1, 1], [2, 2], [3, 3]]
    assert heads.along(np.array([1.0, 2.0, 3.0]), -1) is None, "another size"
    assert heads.along(np.ones(5), -3) is None, "an axis of positions"

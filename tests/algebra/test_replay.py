"""Steps found for some parameters are replayed on others: the result is that of a new search, or an error."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from expression_models import assert_close, draw, reference, source_shapes, time_limit
from hypothesis import given
from test_laws import LAW, expressions

from reparamc.algebra.expr import BatchNorm, Conv, Expr, Scale, Source, array_fields, flatten, rebuild, walk
from reparamc.algebra.rewrite import replay, simplify
from reparamc.algebra.text import parse, show
from reparamc.errors import RecipeError
from reparamc_passes import PASSES


def redrawn(e: Expr, seed: int) -> Expr:
    """``e`` with other parameters; scalars and zeros stay, for much depends on them."""
    rng = np.random.default_rng(seed)
    done: dict[Expr, Expr] = {}
    for node in walk(e):
        new = {k: a * rng.uniform(0.5, 1.5, a.shape) if a.ndim else a for k, a in array_fields(node).items()}
        done[node] = replace(rebuild(node, [done[c] for c in node.children]), **new)
    return done[e]


@LAW
@given(expressions())
def test_replay_equals_a_new_search(e: Expr) -> None:
    old = flatten(e)
    new = redrawn(old, 1)
    with time_limit(20):
        found = replay(old, simplify(old, PASSES), new)
        anew = simplify(new, PASSES).expr
    assert show(found) == show(anew)
    inputs = draw(source_shapes(new, (9, 10, 11)), 0)
    assert_close(reference(new, inputs), reference(found, inputs), 1e-10)


NORM_BEFORE = """%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = conv %0 4->6 k=3x3 s=1 p=1"""


def without_shift(e: Expr) -> Expr:
    assert isinstance(e, Conv)
    assert isinstance(e.x, BatchNorm)
    return replace(e, x=replace(e.x, beta=np.zeros(4), mean=np.zeros(4)))


def test_a_shift_that_was_zero() -> None:
    new = parse(NORM_BEFORE)
    old = without_shift(new)
    outcome = simplify(old, PASSES)
    assert isinstance(outcome.expr, Conv)
    assert isinstance(outcome.expr.x, Source)
    with pytest.raises(RecipeError, match="bn-folding does not apply to these parameters: its shift"):
        replay(old, outcome, new)


def test_another_form() -> None:
    old = parse(NORM_BEFORE)
    new = Scale(old, np.ones(6), np.ones(6), -3)
    with pytest.raises(RecipeError):
        replay(old, simplify(old, PASSES), new)


def test_an_array_that_two_nodes_share() -> None:
    """It may be another one in each of them."""
    shared = np.full(4, 2.0)

    def scaled(inner: np.ndarray, outer: np.ndarray) -> Expr:
        x = Scale(Source("x", 4, -3), inner, np.zeros(()), -3)
        return Scale(Conv(x, np.ones((4, 4, 1, 1)), None, (1, 1), (1, 1), (0, 0), (0, 0)), outer, np.zeros(()), -3)

    new = scaled(np.arange(1.0, 5.0), np.arange(5.0, 9.0))
    found = replay(old := scaled(shared, shared), simplify(old, PASSES), new)
    assert isinstance(found, Conv)
    assert np.array_equal(found.weight[..., 0, 0], np.outer(np.arange(5.0, 9.0), np.arange(1.0, 5.0)))


def test_the_steps_stay_as_they_are() -> None:
    old = without_shift(parse(NORM_BEFORE))
    outcome = simplify(old, PASSES)
    again = replay(old, outcome, old)
    assert show(again) == show(outcome.expr)
    for a, b in zip(walk(again), walk(outcome.expr), strict=True):
        for name, array in array_fields(a).items():
            assert np.array_equal(array, array_fields(b)[name])

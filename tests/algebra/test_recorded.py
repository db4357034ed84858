"""What rules make of recorded arrays is made again of others: the result is that of a new search, or an error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any, cast

import numpy as np
import pytest
from expression_models import assert_close, draw, reference, source_shapes, time_limit
from hypothesis import given
from test_laws import LAW, expressions

from reparamc.algebra.arrays import concatenated, values
from reparamc.algebra.expr import BatchNorm, Conv, Expr, Scale, Source, array_fields, flatten, rebuild, walk
from reparamc.algebra.recorded import Program, Recorded, Tape
from reparamc.algebra.rewrite import simplify
from reparamc.algebra.text import parse, show
from reparamc.errors import RecipeError
from reparamc_passes import PASSES

Name = tuple[int, str]


def mapped(e: Expr, change: Callable[[Name, Any], Any]) -> Expr:
    """``e`` with other parameters, made of the place of each and of what it is."""
    done: dict[Expr, Expr] = {}
    for at, node in enumerate(walk(e)):
        new = {name: change((at, name), a) for name, a in array_fields(node).items()}
        copied = rebuild(node, [done[c] for c in node.children])
        done[node] = replace(copied, **new) if new else copied
    return done[e]


def redrawn(e: Expr, seed: int) -> Expr:
    """``e`` with other parameters; scalars and zeros stay, for much depends on them."""
    rng = np.random.default_rng(seed)
    return mapped(e, lambda _, a: a * rng.uniform(0.5, 1.5, a.shape) if a.ndim else a)


def recorded(e: Expr, tape: Tape) -> Expr:
    def one(name: Name, a: Any) -> Any:
        tape.source(a, name)
        return tape.array(a, np.array(a))

    return mapped(e, one)


def again(found: Expr, tape: Tape, new: Expr) -> Expr:
    """``found``, which was made of recorded parameters, made of those of ``new``."""
    parameters: dict[Name, Any] = {}
    mapped(new, lambda name, a: parameters.setdefault(name, a))
    wanted = [a for node in walk(found) for a in array_fields(node).values() if isinstance(a, Recorded)]
    results = Program(tape, [a.at for a in wanted], values).run(parameters.__getitem__, np.zeros(()))
    made = iter(results)
    return mapped(found, lambda _, a: next(made) if isinstance(a, Recorded) else a)


def remade(old: Expr, new: Expr, generic: bool = False) -> Expr:
    tape = Tape(generic)
    return again(simplify(recorded(old, tape), PASSES).expr, tape, new)


@LAW
@given(expressions())
def test_it_equals_a_new_search(e: Expr) -> None:
    old = flatten(e)
    new = redrawn(old, 1)
    with time_limit(20):
        found = remade(old, new)
        anew = simplify(new, PASSES).expr
    assert show(found) == show(anew)
    inputs = draw(source_shapes(new, (9, 10, 11)), 0)
    assert_close(reference(new, inputs), reference(found, inputs), 1e-10)


@LAW
@given(expressions())
def test_a_generic_one_holds_for_all_parameters(e: Expr) -> None:
    """Zeros and scalars become others, too."""
    old = flatten(e)
    rng = np.random.default_rng(2)
    new = mapped(old, lambda _, a: rng.uniform(0.5, 1.5, a.shape))
    with time_limit(20):
        found = remade(old, new, generic=True)
    inputs = draw(source_shapes(new, (9, 10, 11)), 0)
    assert_close(reference(new, inputs), reference(found, inputs), 1e-10)


NORM_BEFORE = """%x = source c=4 axis=-3
%0 = batchnorm %x c=4 axis=-3
%1 = conv %0 4->6 k=3x3 s=1 p=1"""


def test_a_shift_that_was_zero() -> None:
    new = parse(NORM_BEFORE)
    assert isinstance(new, Conv)
    assert isinstance(new.x, BatchNorm)
    old = replace(new, x=replace(new.x, beta=np.zeros(4), mean=np.zeros(4)))
    fused = remade(old, old)
    assert isinstance(fused, Conv)
    assert isinstance(fused.x, Source)
    with pytest.raises(RecipeError, match="a condition on the values of parameters no longer holds"):
        remade(old, new)
    assert isinstance(remade(old, new, generic=True).children[0], BatchNorm)


def test_an_array_that_two_nodes_share() -> None:
    shared = np.full(4, 2.0)
    x = Scale(Source("x", 4, -3), shared, np.zeros(()), -3)
    old = Scale(Conv(x, np.ones((4, 4, 1, 1)), None, (1, 1), (1, 1), (0, 0), (0, 0)), shared, np.zeros(()), -3)
    other = np.arange(1.0, 5.0)
    found = remade(old, mapped(old, lambda _, a: other if a is shared else a))
    assert isinstance(found, Conv)
    assert np.array_equal(found.weight[..., 0, 0], np.outer(other, other))


def test_what_is_not_needed_is_not_done() -> None:
    tape = Tape()
    a, b = (recorded(parse(NORM_BEFORE), tape).weight for _ in "ab")  # type: ignore[union-attr]
    kept = a * 2
    _ = b * 3
    program = Program(tape, [cast(Any, kept).at], values)
    assert len(program.sources) == 1
    assert len(program._steps) == 2


@pytest.mark.parametrize(
    "careless",
    [np.asarray, np.abs, np.any, float, bool, lambda a: a == 0, lambda a: np.where(a, 1, 0), lambda a: a in [0]],
)
def test_values_are_not_read_by_accident(careless: Callable[[Any], Any]) -> None:
    tape = Tape()
    value = np.ones(())
    tape.source(value, "x")
    with pytest.raises(TypeError):
        careless(tape.array(value, value))


def test_arrays_of_numpy_and_recorded_ones_together() -> None:
    tape = Tape()
    thing = np.arange(3.0)
    tape.source(thing, "x")
    x: Any = tape.array(thing, thing)
    y: Any = concatenated([np.ones(2) * 2, -(np.ones(3) - x) / 2, x[1:]])
    y[0] = x[2]
    assert values(y).tolist() == [2, 2, -0.5, 0, 0.5, 1, 2]
    (found,) = Program(tape, [y.at], values).run({"x": np.array([3.0, 4, 5])}.__getitem__, thing)
    assert found.tolist() == [5, 2, 1, 1.5, 2, 4, 5]

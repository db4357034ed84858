"""The algebra on arrays of other libraries: tensors of torch, on which the same happens and gradients are kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from expression_models import assert_close, draw, reference, source_shapes, time_limit
from hypothesis import given
from test_laws import LAW, expressions

from reparamc.algebra.arrays import is_all, values
from reparamc.algebra.cost import LATENCY
from reparamc.algebra.equal import REGION_TOLERANCE, compare_expressions
from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Conv,
    Expr,
    Scale,
    Source,
    Sum,
    array_fields,
    arrays,
    flatten,
    rebuild,
    walk,
)
from reparamc.algebra.recorded import Program, Recorded, Tape
from reparamc.algebra.rewrite import simplify
from reparamc.algebra.text import show
from reparamc_passes import PASSES

torch: Any = pytest.importorskip("torch")


def mapped(e: Expr, change: Callable[[Array], Any]) -> Expr:
    """``e``, ``change`` made to every parameter."""
    done: dict[Expr, Expr] = {}
    for node in walk(e):
        if isinstance(node, Source):
            done[node] = node
            continue
        copied = rebuild(node, [done[c] for c in node.children])
        done[node] = replace(copied, **{name: change(a) for name, a in array_fields(node).items()})
    return done[e]


def tensor(a: Array) -> Any:
    return torch.from_numpy(np.array(a))


def leaf(a: Array) -> Any:
    return tensor(a).requires_grad_()


@LAW
@given(expressions())
def test_tensors_become_what_arrays_become(e: Expr) -> None:
    e = flatten(e)
    with time_limit(20):
        expected = simplify(e, PASSES).expr
        found = simplify(mapped(e, tensor), PASSES).expr
    assert show(found) == show(expected)
    assert LATENCY.cost(found) == LATENCY.cost(expected)
    inputs = draw(source_shapes(e, (9, 10, 11)), 1)
    before, magnitude = evaluate(mapped(e, tensor), inputs)
    assert_close(reference(e, inputs), values(before), 1e-11)
    assert magnitude == pytest.approx(evaluate(e, inputs)[1])
    assert_close(values(before), values(evaluate(found, inputs)[0]), 1e-10)


@LAW
@given(expressions())
def test_nothing_of_numpy_is_left_among_tensors(e: Expr) -> None:
    """Where a new parameter is made of a tensor and a constant, it is a tensor."""
    old = flatten(e)
    with time_limit(20):
        found = simplify(mapped(old, tensor), PASSES).expr
    made = [a for n in walk(found) if isinstance(n, Conv) for a in arrays(n) if not is_weightless(n)]
    assert all(isinstance(a, torch.Tensor) and a.dtype == torch.float64 for a in made)


def is_weightless(e: Expr) -> bool:
    return isinstance(e, Conv) and e.is_weightless


def test_tensors_are_compared() -> None:
    e = flatten(block(np.random.default_rng(0)))
    tensors = mapped(e, leaf)
    found = simplify(tensors, PASSES).expr
    assert compare_expressions(tensors, found) < REGION_TOLERANCE
    assert compare_expressions(tensors, Scale(found, np.full((), 1.001), np.zeros(()))) > REGION_TOLERANCE


# Gradients


def block(rng: np.random.Generator, width: int = 4) -> Expr:
    """A RepVGG block with a layer scale: bn(conv 3x3), bn(conv 1x1) and bn(x), summed and scaled."""
    x = Source("x", width, -3)

    def conv(size: int) -> Conv:
        pad = (size // 2,) * 2
        weight = rng.standard_normal((width, width, size, size))
        return Conv.padded(x, weight, None, (1, 1), (1, 1), pad, pad)

    def norm(e: Expr) -> BatchNorm:
        gamma, beta, mean = rng.standard_normal((3, width))
        return BatchNorm(e, gamma, beta, mean, rng.uniform(0.5, 2, width), 1e-5, -3)

    branches = Sum((norm(conv(3)), norm(conv(1)), norm(x)))
    return Scale(branches, rng.standard_normal(width), rng.standard_normal(width), -3)


def run(root: Expr, x: Any) -> Any:
    """``root`` of ``x`` by the operators of torch, another reading of the same expression."""
    done: dict[Expr, Any] = {}
    for e in walk(root):
        match e:
            case Source():
                done[e] = x
            case Conv():
                assert e.padding[0] == e.padding[1]
                done[e] = torch.nn.functional.conv2d(
                    done[e.x], e.weight, e.bias, e.stride, e.padding[0], e.dilation, e.groups
                )
            case BatchNorm():
                done[e] = torch.nn.functional.batch_norm(done[e.x], e.mean, e.var, e.gamma, e.beta, eps=e.eps)
            case Scale():
                done[e] = done[e.x] * e.scale[:, None, None] + e.shift[:, None, None]
            case Sum():
                done[e] = sum(done[t] for t in e.terms)
            case _:
                raise AssertionError(type(e).__name__)
    return done[root]


def manual_norm(e: Expr) -> Expr:
    """``e`` with each BatchNorm as a scale that torch differentiates by its statistics too."""
    done: dict[Expr, Expr] = {}
    for node in walk(e):
        done[node] = rebuild(node, [done[c] for c in node.children])
        if isinstance(node, BatchNorm):
            scale: Any = node.gamma / torch.sqrt(torch.as_tensor(node.var) + node.eps)
            done[node] = Scale(done[node.x], scale, node.beta - node.mean * scale, node.axis)
    return done[e]


def gradients(root: Expr, parameters: Mapping[str, Any], x: Any) -> dict[str, Any]:
    y = run(root, x)
    weights = torch.from_numpy(np.random.default_rng(9).standard_normal(tuple(y.shape)))
    found = torch.autograd.grad((weights * y).sum(), list(parameters.values()), allow_unused=True)
    return dict(zip(parameters, found, strict=True))


def named(root: Expr) -> dict[str, Any]:
    return {
        f"{type(e).__name__} {n}: {name}": a for n, e in enumerate(walk(root)) for name, a in array_fields(e).items()
    }


@pytest.mark.parametrize("size", [(1, 4, 7, 5), (3, 4, 6, 9)])
def test_gradients_through_a_recorded_search(size: tuple[int, ...]) -> None:
    old = flatten(block(np.random.default_rng(0)))
    new = mapped(flatten(block(np.random.default_rng(1))), leaf)
    tape, places = Tape(generic=True), dict[int, str]()

    def recorded(a: Any) -> Any:
        tape.source(a, name := f"p{len(places)}")
        places[id(a)] = name
        return tape.array(a, a)

    found = simplify(mapped(old, recorded), PASSES).expr
    leaves: list[Any] = []
    mapped(new, leaves.append)
    wanted = [a.at for a in arrays(found) if isinstance(a, Recorded)]
    made = Program(tape, wanted, values).run(lambda name: leaves[int(name[1:])], leaves[0])
    fused = mapped(found, lambda _: made.pop(0))
    assert isinstance(fused, Conv)
    assert isinstance(fused.x, Source)
    x = torch.from_numpy(np.random.default_rng(2).standard_normal(size))
    torch.testing.assert_close(run(fused, x), run(manual_norm(new), x), rtol=1e-11, atol=1e-11)
    parameters = named(new)
    assert len(parameters) == 2 + 3 * 4 + 2
    expected, found = gradients(manual_norm(new), parameters, x), gradients(fused, parameters, x)
    for name, gradient in expected.items():
        assert gradient.abs().max() > 1e-3, name
        torch.testing.assert_close(found[name], gradient, rtol=1e-10, atol=1e-10, msg=name)


@LAW
@given(expressions())
def test_gradients_are_those_before(e: Expr) -> None:
    """Of every parameter that has one, through whatever the passes made of the expression."""
    before = mapped(flatten(e), leaf)
    with time_limit(20):
        after = simplify(before, PASSES).expr
    parameters = [a for node in walk(before) for a in arrays(node)]
    if not parameters:
        return
    inputs = {s: tensor(x) for s, x in draw(source_shapes(e, (5, 6, 7)), 1).items()}
    found: list[Any] = []
    for root in (before, after):
        y: Any = evaluate(root, inputs)[0]
        weights = torch.from_numpy(np.random.default_rng(9).standard_normal(tuple(y.shape)))
        found.append(torch.autograd.grad((weights * y).sum(), parameters, allow_unused=True))
    for a, b in zip(*found, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            assert (a - b).abs().max() <= 1e-9 * (1 + a.abs().max())


def test_what_has_gradients_is_never_taken_for_zero() -> None:
    """A new BatchNorm shifts by zero, and will not once it is trained."""
    assert is_all(tensor(np.zeros(3)), 0)
    assert not is_all(leaf(np.zeros(3)), 0)
    x = Source("x", 4, -3)
    conv = Conv(x, np.ones((4, 4, 1, 1)), None, (1, 1), (1, 1), (0, 0), (0, 0))
    fresh = BatchNorm(conv, np.ones(4), np.zeros(4), np.zeros(4), np.ones(4), 1e-5, -3)
    new = mapped(fresh, leaf)
    found = simplify(new, PASSES).expr
    assert isinstance(found, Conv)
    assert found.bias is not None
    assert isinstance(new, BatchNorm)
    (gradient,) = torch.autograd.grad(run(found, torch.ones(1, 4, 2, 3, dtype=torch.float64)).sum(), [new.beta])
    assert gradient.tolist() == [6.0] * 4

"""The names of the parameters that new ones are made from, against what torch differentiates them by."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from expression_models import time_limit
from hypothesis import given
from test_laws import LAW, expressions

from reparamc.algebra.expr import BatchNorm, Conv, Expr, Source, Sum, arrays, flatten, walk
from reparamc.algebra.provenance import names_through
from reparamc.algebra.rewrite import simplify
from reparamc_passes import PASSES


def named(e: Expr) -> dict[int, frozenset[str]]:
    """A name for each array of ``e``."""
    every = [a for node in walk(e) for a in arrays(node)]
    return {id(a): frozenset({str(n)}) for n, a in enumerate(every)}


@LAW
@given(expressions())
def test_nothing_that_a_parameter_depends_on_is_left_out(e: Expr) -> None:
    torch: Any = pytest.importorskip("torch")
    from test_arrays import leaf, mapped

    before = mapped(flatten(e), leaf)
    with time_limit(20):
        outcome = simplify(before, PASSES)
    names = names_through(named(before), outcome.steps)
    known = named(before)
    leaves: list[Any] = [a for node in walk(before) for a in arrays(node)]
    made: list[Any] = [a for node in walk(outcome.expr) for a in arrays(node) if getattr(a, "requires_grad", False)]
    for array in made:
        found = torch.autograd.grad(array.sum(), leaves, allow_unused=True, retain_graph=True)
        for x, gradient in zip(leaves, found, strict=True):
            assert gradient is None or known[id(x)] <= names[id(array)]


def normed(x: Expr, seed: int) -> tuple[Expr, Conv]:
    rng = np.random.default_rng(seed)
    conv = Conv(x, rng.standard_normal((4, 4, 3, 3)), None, (1, 1), (1, 1), (-1, -1), (0, 0))
    gamma, beta, mean, var = rng.uniform(0.5, 2, (4, 4))
    return BatchNorm(conv, gamma, beta, mean, var, 1e-5, -3), conv


def test_names_of_other_operators_are_left_out() -> None:
    """Two branches of two values: nothing of one is in the other."""
    (one, first), (two, second) = (normed(Source(key, 4, -3), seed) for seed, key in enumerate("xy"))
    root = Sum((one, two))
    names = named(root)
    outcome = simplify(root, PASSES)
    found = names_through(names, outcome.steps)
    left, right = outcome.expr.children
    for e, conv, norm in ((left, first, one), (right, second, two)):
        own = frozenset[str]().union(*(names[id(a)] for a in (*arrays(conv), *arrays(norm))))
        assert len(own) == 5
        assert isinstance(e, Conv)
        assert [found[id(a)] for a in arrays(e)] == [own, own]

"""What pays under which objective."""

from __future__ import annotations

from fractions import Fraction

import numpy as np
import pytest

from reparamc.algebra.cost import LATENCY, MACS, OBJECTIVES, PARAMS, Objective, objective_of
from reparamc.algebra.expr import BatchNorm, Conv, Expr, Layout, Permute, Resize, Scale, Source, Sum
from reparamc.algebra.rewrite import simplify
from reparamc.algebra.shape import shape_of
from reparamc.errors import InputError
from reparamc_passes import PASSES

RNG = np.random.default_rng(0)


def conv(x: Expr, out: int, into: int, kernel: int, *, stride: int = 1, groups: int = 1, bias: bool = False) -> Conv:
    weight = RNG.standard_normal((out, into // groups, kernel, kernel))
    b = RNG.standard_normal(out) if bias else None
    half = kernel // 2
    pair = lambda n: (n, n)  # noqa: E731
    return Conv(x, weight, b, pair(stride), pair(1), pair(-half), pair(kernel - 1 - 2 * half), groups)


def norm(x: Expr, channels: int) -> BatchNorm:
    g, b, m, v = RNG.uniform(0.5, 1.5, (4, channels))
    return BatchNorm(x, g, b, m, v, 1e-5, -3)


def winner(a: Expr, b: Expr) -> dict[str, bool]:
    """Whether ``a`` is cheaper than ``b``, by objective."""
    return {name: objective.cost(a) < objective.cost(b) for name, objective in OBJECTIVES.items()}


def test_latency_counts_in_multiply_adds() -> None:
    x = Source("x")
    one = conv(x, 5, 3, 3)
    assert LATENCY.price(one) == 20_000 + 196 * 135 + 4 * (196 * 8 + 135)
    assert LATENCY.addition(5) == 20_000 + 196 * 5 * 13
    assert LATENCY.cost(norm(one, 5)) == LATENCY.price(one) + 20_000 + 196 * 5 * 9


def test_what_the_others_count() -> None:
    x = Source("x")
    e = Scale(norm(conv(x, 6, 3, 3, stride=2, bias=True), 6), RNG.standard_normal(6), np.ones(6), -3)
    assert MACS.cost(e) == pytest.approx(49 * 162 + 3 * 49 * 6, abs=0.01)
    assert MACS.cost(Sum((x, x))) == pytest.approx(196 * 64, abs=0.01)
    assert PARAMS.cost(e) == pytest.approx(162 + 6 + 24 + 12, abs=0.01)
    assert PARAMS.cost(Layout(x, Permute((0, 2, 3, 1)), -3)) == pytest.approx(0, abs=0.01)


def test_the_bias_of_a_linear_layer_is_stored_and_not_added() -> None:
    x = Source("x")
    linear = Conv(x, RNG.standard_normal((7, 5)), None)
    held = Scale(linear, np.ones(()), RNG.standard_normal(7), -1)
    assert MACS.cost(held) == MACS.cost(linear)
    assert PARAMS.cost(held) == PARAMS.cost(linear) + 7


def test_a_low_rank_pair_pays_in_time_only() -> None:
    """30 of 64 channels in between: 3840 parameters against 4096, and two operators against one."""
    x = Source("x")
    pair = conv(conv(x, 30, 64, 1), 64, 30, 1)
    whole = conv(x, 64, 64, 1)
    assert winner(whole, pair) == {"latency": True, "macs": False, "params": False}


def test_a_strided_pair_pays_in_multiply_adds_and_not_in_parameters() -> None:
    """Dense 1x1 and then depthwise 2x2 of stride 2, over 8 channels, against one dense 2x2 of stride 2."""
    x = Source("x")
    inner = conv(x, 8, 8, 1)
    pair = conv(inner, 8, 8, 2, stride=2, groups=8)
    whole = conv(x, 8, 8, 2, stride=2)
    assert winner(whole, pair) == {"latency": True, "macs": True, "params": False}


@pytest.mark.parametrize(
    ("channels", "kernel", "merged"),
    [(2, 7, ["latency"]), (4, 3, ["latency"]), (64, 7, [])],
)
def test_depthwise_beside_dense(channels: int, kernel: int, merged: list[str]) -> None:
    """Merging them is dense at the larger kernel: worth it where launching operators is what costs."""
    x = Source("x")
    e = Sum((conv(x, channels, channels, kernel, groups=channels), conv(x, channels, channels, 1)))
    for name, objective in OBJECTIVES.items():
        after = simplify(e, PASSES, objective).expr
        assert isinstance(after, Conv) == (name in merged), name


@pytest.mark.parametrize("objective", OBJECTIVES.values(), ids=lambda o: o.name)
def test_every_objective_likes_what_only_removes(objective: Objective) -> None:
    x = Source("x")
    dense = conv(x, 5, 5, 3)
    wide = conv(x, 512, 512, 3)
    there, back = Permute((0, 2, 3, 1)), Permute((0, 3, 1, 2))
    two = Layout(Layout(wide, there, -3), back, -1)
    assert objective.cost(wide) < objective.cost(two), "operators that do no arithmetic"
    for e in (
        norm(dense, 5),
        Sum((dense, conv(x, 5, 5, 1), x)),
        Scale(dense, RNG.standard_normal(5), np.ones(5), -3),
    ):
        after = simplify(e, PASSES, objective).expr
        assert isinstance(after, Conv)
        assert objective.cost(after) < objective.cost(e)


@pytest.mark.parametrize("objective", [MACS, PARAMS], ids=lambda o: o.name)
def test_ties_are_broken_also_beside_large_numbers(objective: Objective) -> None:
    x = Source("x")
    large = conv(x, 1024, 1024, 7, groups=1)
    assert objective.price(large) + objective.addition(1) > objective.price(large)
    assert objective.cost(Sum((large, x))) > objective.cost(large)
    assert objective.cost(Layout(large, Permute((0, 2, 3, 1)), -3)) > objective.cost(large)


def test_an_unknown_objective() -> None:
    with pytest.raises(InputError, match="unknown objective 'size'; the objectives are latency, macs, params, and "):
        objective_of("size")


def test_a_target_has_its_own_price_of_transposed_convolutions() -> None:
    x = Source("x")
    transposed = Conv(x, RNG.standard_normal((4, 4, 4, 4)), None, (2, 2), (1, 1), (-1, -1), (1, 1), transposed=True)
    prices = [objective_of(name).price(transposed) for name in ("latency", "latency@onnxruntime", "latency@openvino")]
    assert prices[0] == prices[1] != prices[2]


def test_the_positions_of_tokens() -> None:
    """Of [batch, tokens, channels] before a linear layer the last axis is that of the channels."""
    weight, ups = np.ones((4, 8)), Resize(3, (Fraction(2),), "linear")

    def lifted(tokens: int) -> Expr:
        x = Source("x", shape=shape_of((1, tokens, 8)))
        return Layout(Layout(Conv(x, weight, None, (), (), (), ()), Permute((0, 2, 1)), -1), ups, -2)

    assert MACS.cost(lifted(1000)) == pytest.approx(100 * MACS.cost(lifted(10)), rel=0.01)

"""How exporters write a convolution or linear layer, its bias and its BatchNorm: one small file for each habit."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from expression_models import operators
from onnx import NodeProto
from onnx_models import W1, W3, N, assert_folds, batchnorm, fuse, model, node, rand

from reparamc.algebra.rewrite import Declined

CONV = node("Conv", "x w", "c", pads=[1, 1, 1, 1])
STATISTICS = {
    "g": rand(6, 1, 1), "b": rand(6, 1, 1, seed=1), "m": rand(6, 1, 1, seed=2), "v": np.abs(rand(6, 1, 1)) + 0.5,
    "eps": np.array(1e-3, np.float32), "half": np.array(0.5, np.float32),
}  # fmt: skip
ROOT = [node("Add", "v eps", "ve"), node("Sqrt", "ve", "s")]

ARITHMETIC: dict[str, Sequence[NodeProto]] = {
    "subtract, divide, multiply, add": [
        node("Sub", "c m", "d"), *ROOT, node("Div", "d s", "n"), node("Mul", "n g", "k"), node("Add", "k b", "y"),
    ],
    "one factor, one term": [
        *ROOT, node("Reciprocal", "s", "r"), node("Mul", "r g", "k"), node("Mul", "c k", "n"), node("Mul", "m k", "mk"),
        node("Sub", "b mk", "t"), node("Add", "n t", "y"),
    ],
    "gamma first": [
        node("Sub", "c m", "d"), node("Mul", "g d", "k"), *ROOT, node("Div", "k s", "n"), node("Add", "b n", "y"),
    ],
    "a power for a root": [
        node("Sub", "c m", "d"), node("Add", "v eps", "ve"), node("Pow", "ve half", "s"), node("Div", "d s", "n"),
        node("Mul", "n g", "k"), node("Add", "k b", "y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("name", ARITHMETIC)
def test_batchnorm_as_arithmetic(name: str) -> None:
    nodes = [CONV, *ARITHMETIC[name]]
    used = {k: a for k, a in STATISTICS.items() if any(k in n.input for n in nodes)}
    assert_folds(model(nodes, {"w": W3, **used}), Conv=1)


NORM = batchnorm("c", "n", "y")
IMAGES = {
    "bias as Add": [CONV, node("Add", "c bias", "a"), batchnorm("a", "n", "y")],
    "bias through Reshape": [CONV, node("Reshape", "six s", "r"), node("Add", "c r", "a"), batchnorm("a", "n", "y")],
    "Pad before": [node("Pad", "x p", "q"), node("Conv", "q w", "c"), NORM],
    "a zero bias that is computed": [
        node("CastLike", "zero w", "z"), node("Expand", "z count", "e"), node("Conv", "x w e", "c", pads=[1] * 4), NORM,
    ],
    "Sum of many": [
        CONV, node("Conv", "x u", "d"), node("Conv", "x t", "e"), node("Sum", "c d e", "a"), batchnorm("a", "n", "y"),
    ],
    "Mean of many": [CONV, node("Conv", "x u", "d"), node("Mean", "c d", "a"), batchnorm("a", "n", "y")],
    "BatchNorm, then Scale": [CONV, batchnorm("c", "n", "q"), node("Mul", "q bias", "k"), node("Add", "k bias", "y")],
}  # fmt: skip
CONSTANTS = {
    "w": W3, "u": W1, "t": rand(6, 6, 1, 1, seed=5), "bias": rand(1, 6, 1, 1), "six": rand(6),
    "s": np.array([1, 6, 1, 1]), "p": np.array([0, 0, 1, 1, 0, 0, 1, 1]), "zero": np.array(0.0), "count": np.array([6]),
    "axes": np.array([2]), **N,
}  # fmt: skip


@pytest.mark.parametrize("name", IMAGES)
def test_images(name: str) -> None:
    nodes = IMAGES[name]
    fused, report = fuse(model(nodes, {k: a for k, a in CONSTANTS.items() if any(k in n.input for n in nodes)}))
    assert operators(fused) == {"Conv": 1}
    assert report.certificate is not None
    assert report.certificate.equal == 1


def test_sequences_as_images() -> None:
    nodes = [
        node("Unsqueeze", "x axes", "u"), node("Conv", "u w", "c", pads=[0, 1, 0, 1]), node("Squeeze", "c axes", "q"),
        batchnorm("q", "n", "y"),
    ]  # fmt: skip
    assert_folds(model(nodes, {"w": rand(6, 6, 1, 3), "axes": np.array([2]), **N}, ("N", 6, "L")), Conv=1)


def test_channels_last() -> None:
    def layer(x: str, y: str) -> list[NodeProto]:
        to, back = (
            node("Transpose", x, f"{y}1", perm=[0, 3, 1, 2]),
            node("Transpose", f"{y}2", f"{y}3", perm=[0, 2, 3, 1]),
        )
        return [
            to,
            node("Conv", f"{y}1 w", f"{y}2", pads=[1] * 4),
            back,
            node("Mul", f"{y}3 k", f"{y}4"),
            node("Add", f"{y}4 h", y),
        ]

    made = model(
        [*layer("x", "a"), node("Relu", "a", "r"), *layer("r", "y")],
        {"w": W3, "k": rand(6), "h": rand(6, seed=1)},
        ("N", "H", "W", 6),
    )
    kinds = operators(fuse(made)[0])
    assert (kinds["Conv"], kinds["Mul"], kinds["Add"]) == (2, 0, 0)


@pytest.mark.parametrize(
    ("equation", "shape", "left"),
    [
        ("blc,cd->bld", ("N", 5, 6), {"MatMul": 1, "Add": 1}),
        ("blc,dc->bld", ("N", 5, 6), {"MatMul": 1, "Add": 1}),
        ("dc,blc->bld", ("N", 5, 6), {"MatMul": 1, "Add": 1}),
        ("...c,cd->...d", ("N", 2, 5, 6), {"MatMul": 1, "Add": 1}),
        ("dc,bcl->bdl", ("N", 6, 5), {"Conv": 1}),
        ("dc,bchw->bdhw", ("N", 6, 5, 4), {"Conv": 1}),
    ],
)
def test_einsum_as_a_linear_layer(equation: str, shape: Sequence[int | str], left: dict[str, int]) -> None:
    first, second = equation.split("->")[0].split(",")
    matrix, value = (first, second) if len(first) == 2 else (second, first)
    ones = [1] * (len(value) - 1 - value.index("c")) if "." not in value else []
    operands = "w x" if matrix == first else "x w"
    nodes = [node("Einsum", operands, "e", equation=equation), node("Mul", "e k", "m"), node("Add", "m h", "y")]
    weight = rand(4, 6) if matrix == "dc" else rand(6, 4)
    fused, report = fuse(model(nodes, {"w": weight, "k": rand(4, *ones), "h": rand(4, *ones, seed=1)}, shape))
    assert operators(fused) == left
    assert report.certificate is not None
    assert report.certificate.equal == 1


@pytest.mark.parametrize("equation", ["blc,cd->dbl", "blc,lc->bl", "blc,cc->blc", "bll,ld->bd", "blc,cd->bd"])
def test_an_einsum_that_is_no_linear_layer(equation: str) -> None:
    from reparamc.onnx.graph import OnnxGraph

    weight = rand(5, 5)
    made = model([node("Einsum", "x w", "y", equation=equation)], {"w": weight}, (2, 5, 5))
    assert OnnxGraph(made).read("y") is None


@pytest.mark.parametrize("shape", [("N", 5, "C"), (2, 5, 1)])
def test_an_einsum_that_may_broadcast_a_size_of_one(shape: Sequence[int | str]) -> None:
    from reparamc.onnx.graph import OnnxGraph

    made = model([node("Einsum", "x w", "y", equation="blc,cd->bld")], {"w": rand(5, 4)}, shape)
    assert isinstance(OnnxGraph(made).read("y"), Declined)

"""Activations that are the identity on what they are given, and such that are not."""

from __future__ import annotations

import numpy as np
import pytest
from expression_models import run
from onnx import ModelProto, NodeProto
from onnx_models import model, node, rand

from reparamc import fuse_onnx
from reparamc.certificate.onnx import certify_onnx

SHAPE = (2, 6, 5, 7)
WEIGHTS = {
    "w": rand(6, 6, 1, 1) - 0.5, "zero": np.float32(0), "one": np.float32(1), "two": np.float32(2),
    "ones": np.ones((6, 1, 1), np.float32), "slope": np.full((6, 1, 1), 0.5, np.float32),
}  # fmt: skip
RELU, SIGMOID = node("Relu", "c", "r"), node("Sigmoid", "c", "r")


def _model(*nodes: NodeProto, opset: int = 17) -> ModelProto:
    """The operators from ``c`` to ``y``, after a convolution of the input."""
    used = {n for made in nodes for n in made.input}
    parameters = {name: a for name, a in WEIGHTS.items() if name == "w" or name in used}
    return model([node("Conv", "x w", "c"), *nodes], parameters, SHAPE, opset=opset)


def _wide(name: str) -> NodeProto:
    return node("Relu", name, "y")


GOES: dict[str, list[NodeProto]] = {
    "relu": [RELU, _wide("r")],
    "sigmoid": [SIGMOID, _wide("r")],
    "softmax": [node("Softmax", "c", "r"), _wide("r")],
    "leaky": [RELU, node("LeakyRelu", "r", "y", alpha=0.2)],
    "leaky, slope 1": [node("Tanh", "c", "r"), node("LeakyRelu", "r", "y", alpha=1.0)],
    "prelu": [RELU, node("PRelu", "r slope", "y")],
    "prelu, slope 1": [node("Tanh", "c", "r"), node("PRelu", "r ones", "y")],
    "elu": [SIGMOID, node("Elu", "r", "y")],
    "square": [node("Mul", "c c", "r"), _wide("r")],
    "product": [RELU, node("Sigmoid", "c", "s"), node("Mul", "r s", "p"), _wide("p")],
    "sum": [RELU, node("Sigmoid", "c", "s"), node("Add", "r s", "p"), _wide("p")],
    "concat": [RELU, node("Sigmoid", "c", "s"), node("Concat", "r s", "p", axis=1), _wide("p")],
    "pools": [
        RELU, node("AveragePool", "r", "m", kernel_shape=[2, 2]), node("GlobalAveragePool", "m", "a"),
        _wide("a"),
    ],
    "layout": [RELU, node("Transpose", "r", "t", perm=[0, 2, 3, 1]), _wide("t")],
    "clip, equal": [node("Clip", "c zero one", "r"), node("Clip", "r zero one", "y")],
    "clip, wider": [node("Clip", "c zero one", "r"), node("Clip", "r - two", "y")],
    "clip from zero": [node("Clip", "c zero", "r"), _wide("r")],
    "clip of nothing": [node("Clip", "c zero one", "r"), node("Clip", "r", "y")],
}  # fmt: skip

STAYS: dict[str, list[NodeProto]] = {
    "leaky": [node("LeakyRelu", "c", "r"), _wide("r")],
    "prelu": [node("PRelu", "c slope", "y")],
    "tanh": [node("Tanh", "c", "r"), _wide("r")],
    "sum": [RELU, node("Add", "r c", "p"), _wide("p")],
    "difference": [RELU, node("Sigmoid", "c", "s"), node("Sub", "r s", "p"), _wide("p")],
    "product": [RELU, node("Tanh", "c", "s"), node("Mul", "r s", "p"), _wide("p")],
    "clip, narrower": [node("Clip", "c zero two", "r"), node("Clip", "r zero one", "y")],
    "clip of relu": [RELU, node("Clip", "r zero two", "y")],
    "clip of infinity": [RELU, node("Clip", "r zero", "y")],
    "maximum of NaN": [RELU, node("MaxPool", "r", "m", kernel_shape=[1, 1]), _wide("m")],
    "clip below": [node("Clip", "c - two", "r"), _wide("r")],
}


def _count(made: ModelProto) -> int:
    return sum(n.op_type in ("Relu", "LeakyRelu", "PRelu", "Elu", "Clip") for n in made.graph.node)


@pytest.mark.parametrize("name", GOES)
def test_it_goes(name: str) -> None:
    given = _model(*GOES[name])
    fused = fuse_onnx(given)
    assert _count(fused) == _count(given) - 1
    for w in certify_onnx(given, fused).windows:
        assert (w.verdict, w.reason) == ("equal", "")
    x = rand(*SHAPE) - 0.5
    x[0, 0, 0, :4] = np.nan, np.inf, -np.inf, -0.0
    np.testing.assert_array_equal(run(fused, {"x": x})[0], run(given, {"x": x})[0])


@pytest.mark.parametrize("name", STAYS)
def test_it_stays(name: str) -> None:
    given = _model(*STAYS[name])
    assert _count(fuse_onnx(given)) == _count(given)


def test_it_stays_after_a_padding_with_a_negative_number() -> None:
    nodes = [RELU, node("Pad", "r", "q", pads=[0, 0, 1, 1, 0, 0, 1, 1], value=-1.0), _wide("q")]
    given = _model(*nodes, opset=10)
    assert _count(fuse_onnx(given)) == 2


def test_the_certificate_sees_that_an_activation_is_missing() -> None:
    given = _model(node("Tanh", "c", "r"), _wide("r"))
    without = _model(node("Tanh", "c", "r"), node("Identity", "r", "y"))
    assert [w.verdict for w in certify_onnx(given, without).windows] != ["equal"]

"""Ranks and sizes at the edge: no axes, no elements, open sizes that a graph takes few of."""

from __future__ import annotations

import numpy as np
import pytest
from expression_models import operators, run
from onnx import TensorProto, helper
from onnx_models import W3, batchnorm, conv_bn, fuse, model, node, norm, rand

from reparamc import verify_onnx
from reparamc.certificate.onnx import certify_onnx
from reparamc.errors import InputError
from reparamc.onnx.fuse import fuse_model
from reparamc.onnx.session import random_inputs

LEVELS = ("off", "region", "full")


@pytest.mark.parametrize("level", LEVELS)
def test_an_input_of_no_axes(level: str) -> None:
    made = conv_bn(inputs={"s": ()})
    made.graph.node.append(node("Mul", "y s", "z"))
    made.graph.output[0].name = "z"
    fused, _ = fuse(made, verify=level)
    assert operators(fused) == {"Conv": 1, "Mul": 1}
    assert verify_onnx(made, fused).equal


EMPTY = {
    "no channels": (("N", 0), [batchnorm("x", "o", "y")], {f"o.{k}": rand(0) for k in "gbmv"}),
    "no images": ((0, 6, 4, 4), [node("Conv", "x w", "c", pads=[1] * 4), batchnorm("c", "n", "y")], {"w": W3}),
    "a slice of nothing": (("N", 6, 5, 5), [node("Slice", "x a a b", "s"), batchnorm("s", "n", "y")], {}),
    "no output channels": ((2, 6, 4, 4), [node("Conv", "x v", "c"), node("Neg", "c", "y")], {"v": rand(0, 6, 1, 1)}),
    "no terms": ((2, 0), [node("MatMul", "x m", "p"), node("Add", "p three", "y")], {"m": rand(0, 3)}),
    "a weight of one axis": ((2, 6), [node("Mul", "x one", "p"), node("MatMul", "p six", "y")], {}),
    "a number scaled": ((), [node("Mul", "x number", "p"), node("Add", "p x", "y")], {}),
}
SHARED = {
    "a": np.array([2]), "b": np.array([2]), "one": rand(1), "three": rand(3), "six": rand(6), "number": rand(),
    **norm("n", 6),
}  # fmt: skip


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", EMPTY)
def test_nothing_is_legal(name: str, level: str) -> None:
    shape, nodes, constants = EMPTY[name]
    used = {key: a for key, a in (SHARED | constants).items() if any(key in n.input for n in nodes)}
    made = model(nodes, used, shape)
    fused, report = fuse_model(made, verify=level)
    assert not report.failed
    feeds = random_inputs(made, 0, 5)
    for a, b in zip(run(made, feeds), run(fused, feeds), strict=True):
        assert a.shape == b.shape
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("rest", "folds"), [(False, False), (True, True)])
def test_a_size_that_an_empty_batch_leaves_open(rest: bool, folds: bool) -> None:
    """A shape that is computed may be another one of no elements; ONNX Runtime refuses -1 of nothing."""
    sizes = [] if rest else [node("Slice", "s one big two", "t"), node("Shape", "t", "shape")]
    constants = {"one": np.array([1]), "big": np.array([2**31]), "two": np.array([2])}
    constants = norm("n", 4) | ({"shape": np.array([0, 4, -1])} if rest else constants)
    inputs = {"s": ("N", 4, "M")}
    nodes = [*sizes, node("Neg", "x", "z"), node("Reshape", "z shape", "r"), batchnorm("r", "n", "y")]
    made = model(nodes, constants, ("N", 4, "L"), inputs=inputs)
    without = model([node("Neg", "x", "z"), batchnorm("z", "n", "y")], norm("n", 4), ("N", 4, "L"), inputs=inputs)
    assert ("Reshape" not in operators(fuse_model(made, verify="off")[0])) == folds
    assert certify_onnx(made, without).holds == folds
    if not folds:
        feeds = {"x": np.zeros((0, 4, 5), np.float32), "s": np.zeros((0, 4, 3), np.float32)}
        assert [a.shape for a in run(made, feeds)] != [a.shape for a in run(without, feeds)]


def test_an_image_of_an_open_batch() -> None:
    """Verification has to find a batch that holds it."""
    nodes = [
        node("Conv", "x w", "c", pads=[1] * 4),
        batchnorm("c", "n", "b"),
        node("Gather", "b three", "y", axis=0),
    ]
    made = model(nodes, {"w": W3, "three": np.array(3)} | norm("n", 6))
    fused, report = fuse_model(made)
    assert operators(fused) == {"Conv": 1, "Select": 1}
    assert report.end_to_end


@pytest.mark.parametrize("level", LEVELS)
def test_sizes_below_zero_are_open(level: str) -> None:
    """As Paddle's exporter writes them; the result declares what the original declared."""
    made = conv_bn(opset=11, ir_version=6)
    for info in (*made.graph.input, *made.graph.output):
        for axis in (0, 2, 3):
            info.type.tensor_type.shape.dim[axis].dim_value = -1
    made.graph.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [-1, 6, -1, -1]))
    fused, _ = fuse_model(made, verify=level)
    assert [n.op_type for n in fused.graph.node] == ["Conv"]
    assert fused.graph.input == made.graph.input
    assert fused.graph.output == made.graph.output
    feeds = {"x": rand(3, 6, 5, 7)}
    np.testing.assert_allclose(run(made, feeds)[0], run(fused, feeds)[0], rtol=1e-4, atol=1e-5)


VAST = {
    "a padding": (
        6,
        [node("Pad", "x pads", "q"), node("Relu", "q", "p"), node("Conv", "p w", "c"), batchnorm("c", "n", "y")],
    ),
    "a repetition": (
        6,
        [node("Tile", "x times", "q"), node("Relu", "q", "p"), node("Conv", "p w", "c"), batchnorm("c", "n", "y")],
    ),
    "an expansion": (
        1,
        [node("Expand", "x shape", "q"), node("Relu", "q", "p"), node("Conv", "p w", "c"), batchnorm("c", "n", "y")],
    ),
}
SIZED = {
    "pads": np.array([0, 0, 2**16, 2**16, 0, 0, 0, 0]), "times": np.array([1, 1, 2**14, 2**12]),
    "shape": np.array([2, 6, 2**18, 2**18]),
}  # fmt: skip


@pytest.mark.parametrize("name", VAST)
def test_what_would_be_vast_is_not_run(name: str) -> None:
    """The sizes of the trial inputs are followed through the graph before anything is run."""
    channels, nodes = VAST[name]
    made = model(nodes, {"w": W3, **norm("n", 6), **SIZED}, ("N", channels, "H", "W"))
    with pytest.raises(InputError, match="on random inputs"):
        fuse_model(made)
    assert operators(fuse_model(made, verify="region")[0])["BatchNormalization"] == 0

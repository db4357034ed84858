"""Scales of the outputs of operators that are otherwise not understood, and weights in every form that is constant."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx_models import assert_folds, assert_left, batchnorm, fuse, model, node, norm, rand

N4 = norm("n", 4)
IMAGE = ("N", 3, "H", "W")


def after(
    first: Sequence[NodeProto], constants: dict[str, np.ndarray], shape: Sequence[int | str] = IMAGE
) -> ModelProto:
    """``first``, the last of which computes ``c`` of 4 channels, and BatchNorm and a scale on its output."""
    tail = [batchnorm("c", "n", "b"), node("Mul", "b k", "y")]
    return model([*first, *tail], {**constants, **N4, "k": rand(4, *[1] * (len(shape) - 2))}, shape)


UNREAD = {
    "SAME_UPPER": node("Conv", "x w", "c", auto_pad="SAME_UPPER", strides=[2, 2]),
    "SAME_LOWER in groups": node("Conv", "x v bias", "c", auto_pad="SAME_LOWER", strides=[3, 2], group=1),
    "transposed SAME_UPPER": node("ConvTranspose", "x t bias", "c", auto_pad="SAME_UPPER", strides=[2, 2]),
    "transposed, both": node("ConvTranspose", "x t", "c", auto_pad="SAME_LOWER", strides=[2, 2], output_padding=[1, 0]),
}
WEIGHTS = {"w": rand(4, 3, 3, 3), "v": rand(4, 3, 2, 2), "t": rand(3, 4, 4, 4), "bias": rand(4)}


@pytest.mark.parametrize("name", UNREAD)
def test_padding_that_follows_from_the_size(name: str) -> None:
    first = UNREAD[name]
    made = after([first], {k: a for k, a in WEIGHTS.items() if k in first.input})
    fused, report = fuse(made)
    assert operators(fused) == {first.op_type: 1}
    assert report.certificate is not None
    assert report.certificate is not None
    assert report.certificate.equal == 1
    (left,) = fused.graph.node
    kept = {a.name: a for a in left.attribute}
    assert all(a == kept[a.name] for a in first.attribute)


def test_a_wanted_output_shape() -> None:
    first = node("ConvTranspose", "x t", "c", output_shape=[11, 8], strides=[2, 2], group=1)
    assert_folds(after([first], {"t": WEIGHTS["t"]}, (2, 3, 5, 4)), ConvTranspose=1)


@pytest.mark.parametrize("groups", [2, 4])
def test_groups(groups: int) -> None:
    weight = rand(4, 4 // groups, 3, 3)
    first = node("Conv", "x w", "c", auto_pad="SAME_UPPER", strides=[2, 2], group=groups)
    assert_folds(after([first], {"w": weight}, ("N", 4, "H", "W")), Conv=1)


def test_a_convolution_that_the_runtime_has_named() -> None:
    first = helper.make_node("FusedConv", ["x", "w"], ["c"], domain="com.microsoft", pads=[1, 1, 1, 1])
    made = model([first, batchnorm("c", "n", "y")], {"w": WEIGHTS["w"], **N4}, IMAGE, domains=["com.microsoft"])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd")))
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 1}


def test_an_activation_lies_between() -> None:
    first = helper.make_node("FusedConv", ["x", "w"], ["c"], domain="com.microsoft", pads=[1] * 4, activation="Relu")
    made = model([first, batchnorm("c", "n", "y")], {"w": WEIGHTS["w"], **N4}, IMAGE, domains=["com.microsoft"])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd")))
    assert_left(made)


def test_the_weight_tells_the_rank() -> None:
    """What an operator of another domain computes is of unknown rank."""
    gelu = helper.make_node("QuickGelu", ["x"], ["g"], domain="com.microsoft")
    nodes = [gelu, node("Conv", "g w", "c", pads=[1] * 4), batchnorm("c", "n", "y")]
    made = model(nodes, {"w": WEIGHTS["w"], **N4}, IMAGE, domains=["com.microsoft"])
    made.graph.output[0].CopyFrom(helper.make_tensor_value_info("y", TensorProto.FLOAT, list("abcd")))
    fused, _ = fuse(made)
    assert operators(fused) == {"QuickGelu": 1, "Conv": 1}


# Stored weights

WHOLE = np.random.default_rng(3).integers(-100, 100, (4, 3, 3, 3)).astype(np.int8)
EACH = {"s": np.abs(rand(4)) + 0.1, "z": np.arange(-2, 2).astype(np.int8)}
ALL = {"s": np.array(0.05, np.float32), "z": np.array(3, np.int8)}
CONV = node("Conv", "x w", "c", pads=[1, 1, 1, 1])


@pytest.mark.parametrize(
    "scales", [EACH, ALL, {"s": EACH["s"]}, {"s": ALL["s"]}], ids=["each", "all", "no z", "neither"]
)
def test_whole_numbers_stay(scales: dict[str, np.ndarray]) -> None:
    stored = node("DequantizeLinear", " ".join(["q", *scales]), "w", axis=0)
    made = after([stored, CONV], {"q": WHOLE, **scales})
    fused = assert_folds(made, DequantizeLinear=1, Conv=1)
    held = {t.name: numpy_helper.to_array(t) for t in fused.graph.initializer}
    assert held["q"].dtype == np.int8
    np.testing.assert_array_equal(held["q"], WHOLE)
    assert sum(a.size for a in held.values() if a.dtype == np.float32) == 8  # scales and biases


@pytest.mark.parametrize("kind", [TensorProto.FLOAT8E4M3FN, TensorProto.INT4])
def test_coarse_numbers_stay(kind: int) -> None:
    made = after([node("DequantizeLinear", "q s", "w", axis=0), CONV], {"s": EACH["s"]})
    made.opset_import[0].version = 21
    made.ir_version = 10
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    values = np.random.default_rng(0).integers(-7, 7, (4, 3, 3, 3)).astype(dtype)
    made.graph.initializer.append(numpy_helper.from_array(values, "q"))
    fused, _ = fuse(made)
    assert operators(fused) == {"DequantizeLinear": 1, "Conv": 1}


@pytest.mark.parametrize("transposed", [0, 1])
def test_a_stored_linear_layer(transposed: int) -> None:
    shape, axis = ((4, 6), 0) if transposed else ((6, 4), 1)
    whole = np.random.default_rng(3).integers(-100, 100, shape).astype(np.int8)
    gemm = node("Gemm", "x w bias", "c", transB=transposed, alpha=0.5, beta=2.0)
    nodes = [node("DequantizeLinear", "q s z", "w", axis=axis), gemm, batchnorm("c", "n", "y")]
    made = model(nodes, {"q": whole, **EACH, "bias": rand(4), **N4}, ("N", 6))
    assert_folds(made, DequantizeLinear=1, Gemm=1)


def test_a_stored_matrix() -> None:
    whole = np.random.default_rng(3).integers(-100, 100, (6, 4)).astype(np.int8)
    nodes = [
        node("DequantizeLinear", "q s", "w"),
        node("MatMul", "x w", "c"),
        node("Mul", "c k", "m"),
        node("Add", "m k", "y"),
    ]
    made = model(nodes, {"q": whole, "s": ALL["s"], "k": rand(4)}, ("N", 5, 6))
    assert_folds(made, DequantizeLinear=1, MatMul=1, Add=1)


def test_a_stored_weight_takes_no_matrix() -> None:
    """A convolution after it would mix its rows, which only numbers that are not stored can hold."""
    stored = node("DequantizeLinear", "q s", "w", axis=0)
    made = model(
        [stored, node("Conv", "x w", "c"), node("Conv", "c v", "y")],
        {"q": WHOLE, "s": EACH["s"], "v": rand(2, 4, 1, 1)},
        IMAGE,
    )
    assert_left(made)


def test_scales_in_blocks_stay() -> None:
    made = after(
        [node("DequantizeLinear", "q s", "w", axis=1, block_size=3), CONV], {"q": WHOLE, "s": rand(4, 1, 3, 3)}
    )
    made.opset_import[0].version = 21
    made.ir_version = 10
    _, report = fuse(made)
    assert "the scales of its stored weight are not one for each output channel" in [k.reason for k in report.kept]


# Constants in every form

FORMS = {
    "Identity": ([node("Identity", "o", "w")], {"o": rand(4, 3, 3, 3)}),
    "Cast": ([node("Cast", "o", "w", to=1)], {"o": rand(4, 3, 3, 3)}),
    "CastLike": ([node("CastLike", "o n.g", "w")], {"o": rand(4, 3, 3, 3)}),
    "Transpose": ([node("Transpose", "o", "w", perm=[3, 2, 0, 1])], {"o": rand(3, 3, 3, 4)}),
    "Reshape": ([node("Reshape", "o s", "w")], {"o": rand(4, 27), "s": np.array([0, 3, 3, -1])}),
    "Unsqueeze": ([node("Unsqueeze", "o a", "w")], {"o": rand(4, 3), "a": np.array([2, -1])}),
    "Squeeze": ([node("Squeeze", "o a", "w")], {"o": rand(4, 1, 3, 3, 3), "a": np.array([1])}),
    "Flatten": (
        [node("Flatten", "o", "f"), node("Reshape", "f s", "w")], {"o": rand(4, 9, 3), "s": np.array([4, 3, 3, 3])},
    ),
}  # fmt: skip


@pytest.mark.parametrize("skip", [(), ("constant-folding",)])
@pytest.mark.parametrize("form", FORMS)
def test_a_weight_after(form: str, skip: tuple[str, ...]) -> None:
    """Also where its operator stays, because something else reads the constant."""
    first, constants = FORMS[form]
    made = after([*first, node("Conv", "x w", "c", pads=[1] * 4)], constants)
    made.graph.node.append(node("ReduceSum", "o", "z"))
    made.graph.output.append(helper.make_tensor_value_info("z", TensorProto.FLOAT, [1] * constants["o"].ndim))
    fused, _ = fuse(made, skip=skip)
    kinds = operators(fused)
    assert (kinds["Conv"], kinds["BatchNormalization"], kinds["Mul"]) == (1, 0, 0)


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("in_node", [False, True])
def test_a_sparse_weight(in_node: bool, flat: bool) -> None:
    dense = np.zeros((4, 3, 3, 3), np.float32)
    dense.reshape(-1)[[3, 50, 77, 107]] = [1.5, -2, 3, 0.5]
    at = np.argwhere(dense) if not flat else np.flatnonzero(dense)
    values = numpy_helper.from_array(dense[dense != 0], "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(at.astype(np.int64), "at"), dense.shape)
    first = [node("Constant", "", "w", sparse_value=sparse)] if in_node else []
    made = model([*first, CONV, batchnorm("c", "n", "y")], N4, IMAGE)
    if not in_node:
        made.graph.sparse_initializer.append(sparse)
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 1}

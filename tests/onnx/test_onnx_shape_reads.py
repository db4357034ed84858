"""Who reads the shape of a value is no user of its numbers: the value folds, and another one is asked."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from expression_models import operators
from onnx import NodeProto, TensorProto, helper
from onnx_models import BN, CONV, W3, N, assert_left, batchnorm, fuse, model, node, rand

from reparamc.certificate.onnx import certify_onnx
from reparamc.onnx.sizes import in_order

RELU = node("Relu", "y", "z")
PARAMETERS = {"w": W3, **N, "zero": np.array(0), "first": np.array([0]), "last": np.array([-1])}
OPEN, FIXED, BATCH = ("N", 6, "H", "W"), (2, 6, 7, 8), ("N", 6, 8, 8)


def asking(x: str, before: bool, *readers: NodeProto, op: str = "Shape", **attributes: Any) -> list[NodeProto]:
    """Conv, BatchNormalization, Relu, with a read of the shape of ``x`` before or after the BatchNormalization."""
    read = [node(op, x, "s", **attributes), *readers]
    return [CONV, *read, BN, RELU] if before else [CONV, BN, *read, RELU]


@pytest.mark.parametrize("level", ["off", "region", "full"])
@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize("shape", [OPEN, FIXED, BATCH])
def test_the_shape_of_the_convolution(shape: Any, before: bool, level: str) -> None:
    made = model(asking("c", before), PARAMETERS, shape, outputs="z s")
    made.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    fused, report = fuse(made, verify=level)
    assert operators(fused)["BatchNormalization"] == 0, report.kept
    assert certify_onnx(made, fused).holds


@pytest.mark.parametrize("skip", [[], ["constant-folding"]])
@pytest.mark.parametrize(
    ("op", "attributes"), [("Shape", {"start": 1}), ("Shape", {"start": -2, "end": -1}), ("Size", {})]
)
@pytest.mark.parametrize("shape", [OPEN, FIXED])
def test_a_part_of_it(shape: Any, op: str, attributes: dict[str, int], skip: list[str]) -> None:
    made = model(asking("c", True, op=op, **attributes), PARAMETERS, shape, outputs="z s")
    made.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    fused, _ = fuse(made, skip=skip)
    assert operators(fused)["BatchNormalization"] == 0


def test_several_reads() -> None:
    nodes = [
        CONV, node("Shape", "c", "s"), node("Gather", "s zero", "n"), node("Shape", "c", "s2"), BN,
        node("Gather", "s2 last", "w2"), node("Shape", "y", "s3"), RELU,
    ]  # fmt: skip
    made = model(nodes, PARAMETERS, outputs="z n w2 s3")
    for output in made.graph.output[1:]:
        output.type.tensor_type.elem_type = TensorProto.INT64
    fused, _ = fuse(made)
    assert operators(fused) == {"Conv": 1, "Relu": 1, "Shape": 3, "Select": 2}


def tokens(*more: NodeProto, reshaped: str = "s") -> list[NodeProto]:
    """BatchNormalization over tokens, their shape restored from that of the product: the way of LeViT."""
    return [
        node("MatMul", "x u", "p"), node("Flatten", "p", "f", axis=2), batchnorm("f", "n", "b"),
        node("Shape", "p", "s"), *more, node("Reshape", f"b {reshaped}", "y"), RELU,
    ]  # fmt: skip


@pytest.mark.parametrize("shape", [("N", 4, 6), ("N", "L", 6), (2, 4, 6)])
@pytest.mark.parametrize("level", ["off", "region", "full"])
def test_a_shape_that_a_reshape_of_the_region_reads(shape: Any, level: str) -> None:
    made = model(tokens(), {"u": rand(6, 6), **N}, shape, outputs="z")
    fused, report = fuse(made, verify=level)
    assert operators(fused)["BatchNormalization"] == 0, report.kept
    assert certify_onnx(made, fused).holds


def test_a_shape_that_is_put_together() -> None:
    """No value that stays has the shape that is read: the input tells the batch, and numbers the rest."""
    nodes = [
        node("Conv", "x w", "c", strides=[2, 2], pads=[1] * 4), node("Shape", "c", "s"), batchnorm("c", "n", "b"),
        node("Reshape", "b rows", "r"), node("Relu", "r", "q"), node("Reshape", "q s", "y"), RELU,
    ]  # fmt: skip
    made = model(nodes, {**PARAMETERS, "rows": np.array([0, 0, -1])}, BATCH, outputs="z")
    fused, _ = fuse(made)
    assert operators(fused)["BatchNormalization"] == 0
    assert certify_onnx(made, fused).holds


def test_a_read_that_its_answer_waits_for_stays() -> None:
    """What has the shape of c is computed from the shape of c, and nothing else tells it."""
    nodes = [
        CONV, node("Shape", "c", "s"), node("ConstantOfShape", "s", "o"), batchnorm("c", "n", "b"),
        node("Relu", "o", "t"), node("Add", "b t", "y"), RELU,
    ]  # fmt: skip
    fused, _ = fuse(model(nodes, PARAMETERS, outputs="z"))
    assert operators(fused)["Conv"] == 1


def test_two_reads_that_would_wait_for_one_another() -> None:
    """Each shape is told by a value that is computed from the other shape: one of them may be moved, not both."""
    nodes = [
        node("Conv", "x w", "c", pads=[1] * 4), node("Conv", "x w", "d", strides=[2, 2]),
        node("Shape", "c", "s"), node("Shape", "d", "t"),
        node("ConstantOfShape", "t", "to"), node("ReduceSum", "to", "ts", keepdims=0),
        node("ConstantOfShape", "s", "so"), node("ReduceSum", "so", "ss", keepdims=0),
        batchnorm("c", "n", "cb"), node("Add", "cb ts", "ca"), node("Relu", "ca", "y"),
        batchnorm("d", "n", "db"), node("Add", "db ss", "da"), node("Relu", "da", "z"),
    ]  # fmt: skip
    fuse(model(nodes, PARAMETERS, outputs="y z"))


def test_an_output_and_a_body_read_numbers() -> None:
    assert_left(model(asking("c", True), PARAMETERS, outputs="z c"))
    made = model(asking("c", False), PARAMETERS, outputs="z s c")
    made.graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    assert_left(made)


@pytest.mark.parametrize(("pads", "holds"), [([1] * 4, True), ([0] * 4, False), ([2, 1, 1, 1], False)])
def test_a_wrong_size_is_no_proof(pads: list[int], holds: bool) -> None:
    """The shape of the input is that of the convolution if this keeps sizes."""
    pair = []
    for asked in "cx":
        nodes = [node("Conv", "x w", "c", pads=pads), node("Shape", asked, "s"), BN, RELU]
        pair.append(model(nodes, PARAMETERS, BATCH, outputs="z s"))
        pair[-1].graph.output[1].type.tensor_type.elem_type = TensorProto.INT64
    assert certify_onnx(*pair).holds == holds


def chain(links: Sequence[str]) -> list[NodeProto]:
    return [helper.make_node("Relu", [a], [b]) for a, b in pairwise(links)]


def test_in_order() -> None:
    nodes = chain("abcdef")
    assert in_order(nodes[::-1]) == nodes
    assert in_order(nodes) == nodes
    with pytest.raises(ValueError, match="form a circle"):
        in_order([*nodes, helper.make_node("Relu", ["p"], ["q"]), helper.make_node("Relu", ["q"], ["p"])])


@pytest.mark.parametrize("level", ["off", "region", "full"])
@pytest.mark.parametrize("of", ["sizes", "channels", "positions"])
@pytest.mark.parametrize(("start", "end"), [(-1, 2**63 - 1), (2, 2**31 - 1), (-(2**62), -(2**63)), (-(2**40), -9)])
@pytest.mark.parametrize("shape", [BATCH, FIXED])
def test_a_slice_in_reverse_of_which_there_are_two_readings(
    shape: Any, start: int, end: int, of: str, level: str
) -> None:
    """ONNX Runtime takes the largest number for the beginning, shape inference for what is behind the end."""
    axis = {"sizes": 0, "channels": 1, "positions": 2}[of]
    given = {"start": np.array([start]), "end": np.array([end]), "axis": np.array([axis])}
    given |= {"back": np.array([-1]), **{name: PARAMETERS[name] for name in ("w", *N)}}
    turned = node("Slice", f"{'s' if of == 'sizes' else 'c'} start end axis back", "t")
    if of == "sizes":
        nodes = [CONV, node("Shape", "x", "s"), turned, node("ConstantOfShape", "t", "m"), node("ReduceSum", "m", "k")]
        nodes = [*nodes, BN, node("Add", "y k", "z")]
    else:
        nodes = [CONV, turned, node("Shape", "t", "s"), node("Cast", "s", "f", to=1), node("ReduceSum", "f", "k")]
        nodes = [*nodes, node("ReduceMax", "t", "l"), BN, node("Sum", "y k l", "z")]
    fuse(model(nodes, given, shape, outputs="z"), verify=level)  # which compares


@pytest.mark.parametrize("op", ["MaxPool", "AveragePool", "LpPool"])
@pytest.mark.parametrize(
    ("kernel", "said", "opset"),
    [
        (1, {"strides": [2, 2], "ceil_mode": 1}, 18),
        (2, {"strides": [2, 2], "ceil_mode": 1, "pads": [1, 1, 1, 1]}, 18),
        (2, {"dilations": [2, 2], "auto_pad": "SAME_UPPER"}, 19),
        (3, {"pads": [1] * 4, "auto_pad": "VALID"}, 18),
        (3, {"pads": [0] * 4, "auto_pad": "SAME_LOWER", "strides": [2, 2]}, 18),
        (3, {"strides": [2, 2], "ceil_mode": 1}, 18),  # this one is beyond doubt
    ],
)
def test_a_pooling_whose_windows_are_counted_otherwise(kernel: int, said: dict[str, Any], opset: int, op: str) -> None:
    """ONNX Runtime has no window that starts after the map, as PyTorch, and sees no pads beside auto_pad."""
    pooled = node(op, "c", "p", kernel_shape=[kernel] * 2, **said)
    nodes = [CONV, pooled, node("Shape", "p", "s"), node("Cast", "s", "f", to=1), node("ReduceSum", "f", "k")]
    nodes = [*nodes, BN, node("Add", "y k", "z")]
    for shape in (BATCH, (2, 6, 6, 8), (2, 6, 3, 5)):
        fuse(
            model(nodes, {name: PARAMETERS[name] for name in ("w", *N)}, shape, outputs="z", opset=opset), verify="off"
        )

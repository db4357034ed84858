"""What is told of sizes that a model computes, held to what ONNX Runtime gives wherever the model runs."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.certificate.axes import Dim
from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.onnx_shapes import Shapes

SIZES = ((2, 3, 4), (1, 1, 1), (0, 2, 3), (2, 0, 1), (3, 2, 0), (1, 5, 1), (5, 1, 2), (2, 7, 7), (0, 0, 0))
A, B = Dim(1, ("a",)), Dim(1, ("b",))
NUMBERS = {
    "zero": np.array(0), "one": np.array(1), "at0": np.array([0]), "at1": np.array([1]), "back": np.array([-1]),
    "ones": np.ones((1, 5), np.float32), "row": np.ones((1, 1, 3), np.float32),
}  # fmt: skip


def node(op: str, inputs: str, output: str, **attributes: Any) -> NodeProto:
    return helper.make_node(op, inputs.split(), [output], **attributes)


def number(value: int) -> Any:
    return numpy_helper.from_array(np.array([value]))


def model(nodes: list[NodeProto], outputs: str, kind: int = TensorProto.FLOAT) -> ModelProto:
    """Over x of the sizes a, b, 3, and z of b, c."""
    used = {name for n in nodes for name in n.input}
    given = [helper.make_tensor_value_info(*v) for v in (("x", 1, ["a", "b", 3]), ("z", 1, ["b", "c"])) if v[0] in used]
    results = [helper.make_tensor_value_info(o, kind, None) for o in outputs.split()]
    tensors = [numpy_helper.from_array(a, n) for n, a in NUMBERS.items() if n in used]
    graph = helper.make_graph(nodes, "g", given, results, tensors)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def run(made: ModelProto, sizes: tuple[int, int, int]) -> list[np.ndarray] | None:
    """What comes out; None where the model does not run."""
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    options.log_severity_level = 4
    session = ort.InferenceSession(made.SerializeToString(), options, providers=["CPUExecutionProvider"])
    a, b, c = sizes
    feeds = {"x": np.arange(a * b * 3, dtype=np.float32).reshape(a, b, 3), "z": np.zeros((b, c), np.float32)}
    try:
        return [np.asarray(y) for y in session.run(None, {v.name: feeds[v.name] for v in made.graph.input})]
    except Exception:
        return None


X_SIZES = [node("Shape", "x", "s"), node("Gather", "s zero", "n"), node("Gather", "s one", "m")]
COLUMN = [node("Unsqueeze", "n at0", "n_"), node("Unsqueeze", "m at0", "m_")]
WANTED = [
    *X_SIZES, *COLUMN, node("Concat", "n_ m_ back", "wanted", axis=0), node("Shape", "wanted", "rank"),
    node("ConstantOfShape", "rank", "units", value=number(1)), node("Mul", "units back", "minus"),
]  # fmt: skip
EXPAND = [*WANTED, node("Equal", "wanted minus", "is_left"), node("Where", "is_left units wanted", "sizes")]
"""How PyTorch exports x.expand(n, m, -1)."""

TOLD: dict[str, tuple[list[NodeProto], tuple[Dim, ...]]] = {
    "an expansion as exporters write it": ([*EXPAND, node("Expand", "row sizes", "y")], (A, B, Dim(3))),
    "with the comparison the other way round": (
        [*WANTED, node("Equal", "minus wanted", "is_left"), node("Where", "is_left units wanted", "sizes"),
         node("Expand", "row sizes", "y")],
        (A, B, Dim(3)),
    ),
    "a range": ([*X_SIZES, node("Range", "zero m one", "r"), node("Cast", "r", "y", to=1)], (B,)),
    "a table repeated": ([*X_SIZES, *COLUMN, node("Concat", "n_ m_ at1", "t", axis=0), node("Tile", "row t", "y")],
                         (A, B, Dim(3))),
    "a window that keeps the size": ([node("MaxPool", "x", "y", kernel_shape=[3], pads=[1, 1])], (A, B, Dim(3))),
    "with dilations": (
        [node("Transpose", "x", "t", perm=[0, 2, 1]),
         node("MaxPool", "t", "y", kernel_shape=[2], pads=[1, 1], dilations=[2])],
        (A, Dim(3), B),
    ),
    "a slice of positions, added": (
        [*X_SIZES, *COLUMN, node("Slice", "ones at0 m_ at1", "p"), node("Transpose", "p", "t", perm=[1, 0]),
         node("Add", "x t", "y")],
        (A, B, Dim(3)),
    ),
    "with steps, and the axis from the end": (
        [*X_SIZES, *COLUMN, node("Slice", "ones at0 m_ back at1", "p"), node("Transpose", "p", "t", perm=[1, 0]),
         node("Add", "t x", "y")],
        (A, B, Dim(3)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", TOLD)
def test_sizes_follow_from_what_a_model_computes(case: str) -> None:
    nodes, expected = TOLD[case]
    made = model(nodes, "y")
    assert Shapes(made).shape("y") == expected
    ran = [s for s in SIZES if (found := run(made, s)) is not None and found[0].shape == _at(expected, s)]
    assert ran == [s for s in SIZES if run(made, s) is not None]
    assert len(ran) > 2


def _at(shape: tuple[Dim, ...], sizes: tuple[int, int, int]) -> tuple[int, ...]:
    values = dict(zip("abc", sizes, strict=True))
    return tuple(e.factor * prod(values[s] for s in e.symbols) for e in shape)


SILENT = {
    "what is compared may be a size": [
        *WANTED, node("Equal", "wanted units", "is_left"), node("Where", "is_left units wanted", "sizes"),
        node("Expand", "row sizes", "y"),
    ],
    "a slice of what may be empty": [
        *X_SIZES, *COLUMN, node("Slice", "z at0 m_ at1", "p"), node("Transpose", "p", "t", perm=[1, 0]),
        node("Slice", "t at0 m_ at0", "u"), node("Slice", "x at0 n_ at1", "v"), node("Identity", "v", "y"),
    ],
    "a slice that starts later": [
        *X_SIZES, *COLUMN, node("Slice", "ones at1 m_ at1", "p"), node("Transpose", "p", "t", perm=[1, 0]),
        node("Add", "x t", "y"),
    ],
    "a window in steps": [
        node("Transpose", "x", "t", perm=[0, 2, 1]),
        node("MaxPool", "t", "y", kernel_shape=[2], pads=[0, 1], strides=[2]),
    ],
    "a range that starts later": [*X_SIZES, node("Range", "one m one", "r"), node("Cast", "r", "y", to=1)],
    "a reshape that copies where its size is zero": [
        *X_SIZES, *COLUMN, node("Slice", "ones at0 m_ at1", "p"), node("Shape", "p", "of_p"),
        node("Reshape", "ones of_p", "r"), node("Identity", "p", "y"),
    ],
}  # fmt: skip


@pytest.mark.parametrize("case", SILENT)
def test_nothing_is_told_that_does_not_hold(case: str) -> None:
    made = model(SILENT[case], "y")
    shape = Shapes(made).shape("y")
    assert shape is not None
    told = [axis for axis, e in enumerate(shape) if set(e.symbols) <= set("abc")]
    for sizes in SIZES:
        for found in run(made, sizes) or ():
            assert [found.shape[axis] for axis in told] == [_at(shape[axis : axis + 1], sizes)[0] for axis in told]
    assert any(not set(e.symbols) <= set("abc") for e in shape)


def test_truths_are_no_numbers() -> None:
    """They are told by the same ones and zeros."""
    truths = model([*EXPAND[:-1], node("Identity", "is_left", "y")], "y", TensorProto.BOOL)
    numbers = model([*EXPAND[:-1], node("Cast", "is_left", "y", to=TensorProto.INT64)], "y", TensorProto.INT64)
    assert not any(w.where == "y" for w in certify_onnx(truths, truths).windows)
    assert any(w.where == "y" for w in certify_onnx(truths, numbers).windows)


@pytest.mark.parametrize(("compared", "is_equal"), [("back", True), ("at0", False), ("at1", False)])
def test_an_expansion_is_the_one_to_the_sizes_themselves(compared: str, is_equal: bool) -> None:
    """A size may be zero, and never is -1."""
    spelled = [
        *X_SIZES,
        *COLUMN,
        node("Concat", "n_ m_ at1", "wanted", axis=0),
        node("Equal", f"wanted {compared}", "is_left"),
    ]
    spelled += [node("Where", "is_left at1 wanted", "sizes"), node("Expand", "row sizes", "y")]
    plain = [*X_SIZES, *COLUMN, node("Concat", "n_ m_ at1", "sizes", axis=0), node("Expand", "row sizes", "y")]
    assert certify_onnx(model(spelled, "y"), model(plain, "y")).holds == is_equal

"""Each operator that is read means what its expression says, and what is emitted for it computes the same, provably."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
import pytest
from expression_models import run
from onnx import ModelProto, NodeProto, helper
from onnx_models import Sizes, batchnorm, model, node, norm, rand

from reparamc.algebra.evaluate import evaluate
from reparamc.algebra.expr import ONE, ZERO, Scale, Source
from reparamc.certificate.onnx import certify_onnx
from reparamc.certificate.onnx_operators import NORMS as CERTIFICATE_NORMS
from reparamc.certificate.onnx_operators import READERS as CERTIFICATE_READERS
from reparamc.compiler.graph import Splice
from reparamc.compiler.readings import Reading
from reparamc.onnx.emit import OnnxEdit
from reparamc.onnx.graph import OnnxGraph
from reparamc.onnx.operators import READERS
from reparamc.onnx.taps import NORMS

MAP = (2, 6, 9, 7)
TOKENS = (2, 5, 6)
GREY = (2, 1, 5, 6)
N = norm("n", 6)
SCALE = {"s": rand(6, 1, 1)}
CONV = {"w": rand(4, 3, 3, 2), "b": rand(4)}


def ints(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


@dataclass(frozen=True)
class Row:
    """One operator that reads ``v``, a value of this shape, and computes ``y``."""

    operator: NodeProto
    parameters: dict[str, np.ndarray] = field(default_factory=dict[str, np.ndarray])
    shape: Sizes = MAP
    opset: int = 17

    def model(self, outputs: str) -> ModelProto:
        """The operator between a BatchNorm, which tells the channels of its operand, and a negation."""
        known = len(self.shape) > 2 and self.shape[1] == 6
        first = batchnorm("x", "front", "v") if known else node("Identity", "x", "v")
        parameters = {**self.parameters, **(norm("front", 6) if known else {})}
        domains = [self.operator.domain] if self.operator.domain else []
        nodes = [first, self.operator, node("Neg", "y", "z")]
        return model(nodes, parameters, self.shape, outputs=outputs, opset=self.opset, domains=domains)


ROWS: dict[str, Row] = {
    "conv": Row(
        node("Conv", "v w b", "y", group=2, strides=[2, 1], pads=[1, 0, 2, 1], dilations=[1, 2]), CONV
    ),
    "conv, same": Row(node("Conv", "v w", "y", group=2, auto_pad="SAME_LOWER"), {"w": CONV["w"]}),
    "conv of the runtime": Row(
        helper.make_node("FusedConv", ["v", "w", "b"], ["y"], domain="com.microsoft", group=2, pads=[1, 0, 1, 0]), CONV
    ),
    "transposed": Row(
        node("ConvTranspose", "v w b", "y", group=2, strides=[2, 3], pads=[1, 0, 2, 1], output_padding=[1, 2]),
        {"w": rand(6, 2, 3, 4), "b": rand(4)},
    ),
    "pool": Row(
        node("AveragePool", "v", "y", kernel_shape=[3, 2], strides=[2, 1], pads=[1, 0, 2, 1], count_include_pad=1)
    ),
    "pad": Row(node("Pad", "v p", "y"), {"p": ints(0, 0, 1, 0, 0, 0, 2, 3)}),
    "pad of named axes": Row(node("Pad", "v p - a", "y"), {"p": ints(1, 2), "a": ints(-2)}, opset=18),
    "pad 2": Row(node("Pad", "v", "y", pads=[0, 0, 1, 0, 0, 0, 2, 3]), opset=7),
    "norm": Row(batchnorm("v", "n", "y", epsilon=0.1), N),
    "norm 7": Row(batchnorm("v", "n", "y"), N, opset=7),
    "gemm": Row(node("Gemm", "v w b", "y", alpha=0.5, beta=2.0), {"w": rand(6, 4), "b": rand(4)}, (3, 6)),
    "gemm, turned": Row(node("Gemm", "v w b", "y", transB=1), {"w": rand(4, 6), "b": rand(1, 1)}, (3, 6)),
    "matmul": Row(node("MatMul", "v w", "y"), {"w": rand(6, 4)}, TOKENS),
    "matmul from the left": Row(node("MatMul", "w v", "y"), {"w": rand(4, 5)}, TOKENS),
    "einsum": Row(node("Einsum", "v w", "y", equation="blc,cd->bld"), {"w": rand(6, 4)}, TOKENS),
    "einsum over channels": Row(node("Einsum", "w v", "y", equation="oc,bchw->bohw"), {"w": rand(4, 6)}),
    "add": Row(node("Add", "v s", "y"), SCALE),
    "sub": Row(node("Sub", "s v", "y"), SCALE),
    "mul": Row(node("Mul", "v s", "y"), SCALE),
    "div": Row(node("Div", "v s", "y"), SCALE),
    "difference": Row(node("Sub", "v v", "y")),
    "sum": Row(node("Sum", "v v v", "y")),
    "mean of values": Row(node("Mean", "v v", "y")),
    "neg": Row(node("Neg", "v", "y")),
    "identity": Row(node("Identity", "v", "y")),
    "dropout": Row(node("Dropout", "v", "y")),
    "concat": Row(node("Concat", "v v", "y", axis=-3)),
    "split": Row(node("Split", "v p", "a y", axis=1), {"p": ints(1, 5)}),
    "slice of channels": Row(
        node("Slice", "v a b c d", "y"), {"a": ints(5), "b": ints(-9), "c": ints(1), "d": ints(-2)}
    ),
    "slice of a map": Row(
        node("Slice", "v a b c d", "y"), {"a": ints(1, -4), "b": ints(-2, 2**62), "c": ints(2, 3), "d": ints(2, 1)}
    ),
    "gather": Row(node("Gather", "v i", "y", axis=1), {"i": ints(4, -6, 4)}),
    "gather of one": Row(node("Gather", "v i", "y", axis=2), {"i": np.array(-1)}),
    "tile": Row(node("Tile", "v t", "y"), {"t": ints(1, 3, 1, 1)}),
    "tile of one channel": Row(node("Tile", "v t", "y"), {"t": ints(1, 3, 1, 1)}, GREY),
    "expand": Row(node("Expand", "v t", "y"), {"t": ints(1, 3, 1, 1)}, GREY),
    "expand, fewer axes": Row(node("Expand", "v t", "y"), {"t": ints(3, 5, 1)}, GREY),
    "expand to what is there": Row(node("Expand", "v t", "y"), {"t": ints(1, 1, 1, 1)}),
    "mean over the map": Row(node("GlobalAveragePool", "v", "y")),
    "mean": Row(node("ReduceMean", "v", "y", axes=[-1, 2], keepdims=0)),
    "mean 18": Row(node("ReduceMean", "v a", "y"), {"a": ints(3)}, opset=18),
    "resize": Row(
        node("Resize", "v - s", "y", mode="linear", coordinate_transformation_mode="half_pixel"),
        {"s": np.array([1, 1, 2, 3], np.float32)},
    ),
    "resize 9": Row(node("Upsample", "v s", "y", mode="nearest"), {"s": np.array([1, 1, 2, 3], np.float32)}, opset=9),
    "channels to positions": Row(node("DepthToSpace", "v", "y", blocksize=2), shape=(2, 8, 3, 5)),
    "channels to positions, side by side": Row(
        node("DepthToSpace", "v", "y", blocksize=2, mode="CRD"), shape=(2, 8, 3, 5)
    ),
    "positions to channels": Row(node("SpaceToDepth", "v", "y", blocksize=2), shape=(2, 3, 6, 4)),
    "flatten": Row(node("Flatten", "v", "y", axis=2)),
    "reshape": Row(node("Reshape", "v t", "y"), {"t": ints(0, 0, -1)}),
    "transpose": Row(node("Transpose", "v", "y", perm=[0, 2, 3, 1])),
    "squeeze": Row(node("Squeeze", "v a", "y"), {"a": ints(-1)}, (2, 6, 9, 1)),
    "unsqueeze": Row(node("Unsqueeze", "v a", "y"), {"a": ints(2, -1)}),
}  # fmt: skip


@pytest.mark.parametrize("name", ROWS)
def test_operator(name: str) -> None:
    row = ROWS[name]
    x = rand(*map(int, row.shape))
    v, y = (a.astype(np.float64) for a in run(row.model("v y"), {"x": x}))
    made = row.model("z")
    graph = OnnxGraph(made)
    reading = graph.read("y")
    assert isinstance(reading, Reading), reading
    source = Source("v", shape=graph.types.shape("v"))
    expr = reading.over({"v": source})
    np.testing.assert_allclose(evaluate(expr, {source: v})[0], y, rtol=1e-4, atol=1e-5)
    # Without the value ``y``, so that the certificate has to read the operator
    whole = Scale(expr, -ONE, ZERO)
    splice = Splice("z", ("y", "z"), whole, {source: "v"}, np.dtype(np.float32), Counter(), (), "", "", None)
    emitted = OnnxEdit(graph, graph.sizes).carry_out([splice])
    np.testing.assert_allclose(run(emitted, {"x": x})[0], -y, rtol=1e-4, atol=1e-5)
    assert [(w.where, w.verdict, w.reason) for w in certify_onnx(made, emitted).windows] == [("z", "equal", "")]


LEFT_ALONE: dict[str, Row] = {
    "tile of two axes": Row(node("Tile", "v t", "y"), {"t": ints(1, 2, 2, 1)}),
    "tile of images": Row(node("Tile", "v t", "y"), {"t": ints(2, 1, 1, 1)}),
    "tile of rows": Row(node("Tile", "v t", "y"), {"t": ints(1, 1, 2, 1)}),
    "tile of an unknown size": Row(node("Tile", "v t", "y"), {"t": ints(1, 1, 2, 1)}, ("N", 6, "H", "W")),
    "tile to nothing": Row(node("Tile", "v t", "y"), {"t": ints(1, 0, 1, 1)}),
    "expand by an axis": Row(node("Expand", "v t", "y"), {"t": ints(3, 1, 1, 1, 1)}),
    "expand where the size may be one": Row(node("Expand", "v t", "y"), {"t": ints(1, 8)}, ("N", 6, "H", "W")),
    "expand of a vast axis": Row(node("Expand", "v t", "y"), {"t": ints(1, 2**40, 1, 1)}, GREY),
}


@pytest.mark.parametrize("name", LEFT_ALONE)
def test_left_alone(name: str) -> None:
    assert not isinstance(OnnxGraph(LEFT_ALONE[name].model("z")).read("y"), Reading)


def test_what_is_read_is_tested_and_proven() -> None:
    assert set(READERS) <= {row.operator.op_type for row in ROWS.values()} | set(NORMS)
    assert set(READERS) <= {*CERTIFICATE_READERS, *CERTIFICATE_NORMS}

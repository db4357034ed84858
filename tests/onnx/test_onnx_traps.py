"""Where folding by pattern goes wrong: what each graph must end as, and that it computes the same."""

from collections import Counter
from typing import Any

import numpy as np
import pytest
from expression_models import operators
from onnx import ModelProto, helper, numpy_helper
from onnx_models import BN, CONV, PAD, W1, W3, N, batchnorm, conv_bn, fuse, model, node, norm, rand

from reparamc.onnx.fuse import fuse_model

D = {"w": W3, **N}
HALF = numpy_helper.from_array(np.array([0.5], np.float32))
BIASED = node("Conv", "x w b", "c", **PAD)
OTHER = node("Conv", "x v", "d")
ADD = node("Add", "c d", "y")
SCALE = rand(6, 1, 1)


def after_conv(op: str, inputs: str, **parameters: Any) -> ModelProto:
    return model([CONV, node(op, inputs, "y")], {"w": W3, **parameters})


def pair(first: dict[str, Any], second: dict[str, Any], w: np.ndarray, v: np.ndarray) -> ModelProto:
    return model([node("Conv", "x w", "c", **first), node("Conv", "x v", "d", **second), ADD], {"w": w, "v": v})


TRAPS: dict[str, tuple[ModelProto, dict[str, int]]] = {
    "one bias of two convolutions": (
        model(
            [BIASED, batchnorm("c", "n", "d"), node("Relu", "d", "e"), node("Conv", "e v b", "f"),
             batchnorm("f", "p", "y")],
            {**D, **norm("p", 6, 3), "v": W1, "b": rand(6)},
        ), {"Conv": 2, "Relu": 1},
    ),
    "a bias of ConstantOfShape": (
        model([node("ConstantOfShape", "s", "b", value=HALF), BIASED, BN], {**D, "s": np.array([6])}), {"Conv": 1},
    ),
    "a bias of Expand and Cast": (
        model([node("Cast", "z", "o", to=1), node("Expand", "o s", "b"), BIASED, BN],
              {**D, "z": np.array(0), "s": np.array([6])}), {"Conv": 1},
    ),
    "a sum with itself": (after_conv("Add", "c c"), {"Conv": 1}),
    "a BatchNorm after a concatenation": (
        model([CONV, OTHER, node("Concat", "c d", "e", axis=1), batchnorm("e", "q", "y")],
              {"w": W3, "v": rand(3, 6, 1, 1), **norm("q", 9)}), {"Conv": 2, "Concat": 1},
    ),
    "padding that is normalized": (
        model([node("Pad", "x p", "q"), batchnorm("q", "n", "r"), node("Conv", "r w", "y")],
              {**D, "p": np.array([0, 0, 1, 1, 0, 0, 1, 1])}), {"Conv": 1},
    ),
    "channels of a transposed convolution by groups": (
        model([node("ConvTranspose", "x w", "c", group=2), BN], {"w": rand(6, 3, 3, 3), **N}), {"Conv": 1},
    ),
    "a constant of rank 5": (after_conv("Mul", "c s", s=rand(1, 1, 1, 1, 1)), {"Conv": 1, "Mul": 1}),
    "a constant minus a map": (after_conv("Sub", "s c", s=SCALE), {"Conv": 1}),
    "a constant over a map": (after_conv("Div", "s c", s=SCALE), {"Conv": 1, "Div": 1}),
    "kernels in opposite corners": (
        pair({"pads": [1, 1, 0, 0]}, {"pads": [0, 0, 1, 1]}, rand(6, 6, 2, 2), rand(6, 6, 2, 2, seed=1)), {"Conv": 1},
    ),
    "a kernel that is spread and a dense one": (
        pair({"pads": [2] * 4, "dilations": [2, 2]}, {"pads": [2] * 4}, W3, rand(6, 6, 5, 5)), {"Conv": 1},
    ),
    "groups of 2 and 3": (pair({"group": 2, **PAD}, {"group": 3}, rand(6, 3, 3, 3), rand(6, 2, 1, 1)), {"Conv": 1}),
    "statistics of the batch": (
        model([CONV, node("BatchNormalization", "c n.g n.b n.m n.v", "y m v", training_mode=1)], D),
        {"Conv": 1, "BatchNormalization": 1},
    ),
    "a BatchNorm of opset 7": (model([CONV, batchnorm("c", "n", "y", momentum=0.8)], D, opset=7), {"Conv": 1}),
    "numbers cut to whole ones": (
        model([CONV, node("Cast", "c", "i", to=7), node("Cast", "i", "f", to=1), batchnorm("f", "n", "y")], D),
        {"Conv": 1, "Cast": 2, "BatchNormalization": 1},
    ),
    "a channel count that weights tell": (
        model([CONV, batchnorm("c", "n", "d"), node("Add", "d x", "y")], D, ("N", "C", "H", "W")), {"Conv": 1},
    ),
    "a cubic resize from corner to corner": (
        model([CONV, node("Resize", "c - by", "d", mode="cubic", coordinate_transformation_mode="align_corners"),
               batchnorm("d", "n", "y")], {**D, "by": np.array([1, 1, 2, 2], np.float32)}), {"Conv": 1, "Resize": 1},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", TRAPS)
def test_a_trap(name: str) -> None:
    made, expected = TRAPS[name]
    fused, report = fuse(made, verify="region")
    assert operators(fused) == Counter(expected), report.kept


@pytest.mark.parametrize(("last", "step"), [(1e12, 1.0), (-1e3, -1e-9), (2**30, 1)])
def test_a_vast_range(last: float, step: float) -> None:
    """Shape inference of onnx would follow its entries one by one."""
    dtype = np.int32 if isinstance(step, int) else np.float32
    made = conv_bn()  # the range comes later: `model` has the shapes inferred
    made.graph.node.append(node("Range", "first last step", "r"))
    ends = {"first": 0, "last": last, "step": step}
    made.graph.initializer.extend(numpy_helper.from_array(np.array(a, dtype), name) for name, a in ends.items())
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    made.graph.output.append(helper.make_tensor_value_info("r", kind, [None]))
    fused, _ = fuse_model(made, verify="off")
    assert operators(fused) == Counter(Conv=1, Range=1)

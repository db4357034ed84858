"""One operator of an ONNX graph in float64, by the reference implementation of ONNX, its known faults worked around.

- BatchNormalization before opset 14 is taken to be in training mode where it has a momentum, which is its default;
  it is run as that of opset 15, which means the same with one output.
- ConvTranspose with several groups keeps the first channel of each, and adds biases of other groups; it is run group by
  group, and the bias is added here.
- A number among the attributes is a numpy float32, which has numpy compute in float32: the weights of a cubic Resize.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import cast

import numpy as np
from onnx import NodeProto, TensorProto, helper, numpy_helper

from reparamc.algebra.expr import Array
from reparamc.onnx.values import FLOATS, attribute

Operator = Callable[[Mapping[str, Array]], Array]


def in_float64(
    node: NodeProto, output: str, constants: Mapping[str, np.ndarray], opset: int, ir_version: int
) -> Operator:
    """``output`` of one operator as a function of its operands by name, all floating values being float64.

    Args:
        constants: the operands that are not given.
        opset, ir_version: those of the model.
    """
    constants = {name: float64(array) for name, array in constants.items()}
    copy = NodeProto.FromString(node.SerializeToString())
    copy.domain, copy.op_type = "", "Conv" if node.op_type == "FusedConv" else node.op_type
    if node.op_type == "BatchNormalization" and opset < 14:
        opset = 15
        for name in ("spatial", "momentum"):
            _drop(copy, name)
    groups = attribute(node, "group", 1)
    if node.op_type == "ConvTranspose" and isinstance(groups, int) and groups > 1:
        return _by_group(copy, constants, groups, opset, ir_version)
    return _evaluator(copy, constants, output, opset, ir_version)


def float64(array: np.ndarray) -> np.ndarray:
    """``array`` in float64 if its entries are floating."""
    return array.astype(np.float64) if array.dtype in FLOATS.values() else array


def _drop(node: NodeProto, name: str) -> None:
    for a in node.attribute:
        if a.name == name:
            node.attribute.remove(a)
            return


def _evaluator(
    node: NodeProto, constants: Mapping[str, np.ndarray], output: str, opset: int, ir_version: int
) -> Operator:
    from onnx.reference import ReferenceEvaluator  # it takes as long as onnx itself

    operands = [n for n in dict.fromkeys(node.input) if n and n not in constants]
    inputs = [helper.make_tensor_value_info(name, TensorProto.DOUBLE, None) for name in operands]
    result = helper.make_tensor_value_info(output, TensorProto.DOUBLE, None)
    body = helper.make_graph(
        [node], "float64", inputs, [result], [numpy_helper.from_array(a, name) for name, a in constants.items()]
    )
    evaluator = ReferenceEvaluator(
        helper.make_model(body, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)
    )
    for implementation in evaluator.rt_nodes_:
        numbers = {k: float(v) for k, v in vars(implementation).items() if isinstance(v, np.floating)}
        vars(implementation).update(numbers)

    def run(values: Mapping[str, Array]) -> Array:
        (found,) = cast("list[Array]", evaluator.run(None, {name: values[name] for name in operands}))
        return float64(np.asarray(found))

    return run


def _by_group(
    node: NodeProto, constants: Mapping[str, np.ndarray], groups: int, opset: int, ir_version: int
) -> Operator:
    """A transposed convolution as one of a single group for each, side by side, and the bias."""
    x, weight, *rest = node.input
    bias = constants[rest[0]] if rest and rest[0] else None
    _drop(node, "group")
    del node.input[2:]
    parts: Sequence[np.ndarray] = np.split(constants[weight], groups)
    runs = [_evaluator(node, {weight: part}, node.output[0], opset, ir_version) for part in parts]

    def run(operands: Mapping[str, Array]) -> Array:
        pieces = np.split(operands[x], groups, axis=1)
        y = np.concatenate([f({x: piece}) for f, piece in zip(runs, pieces, strict=True)], axis=1)
        return y if bias is None else y + bias.reshape(-1, *[1] * (y.ndim - 2))

    return run

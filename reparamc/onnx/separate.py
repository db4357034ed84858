"""Operators of ONNX that treat channels alike and each by itself, and values that may have fewer of them."""

from __future__ import annotations

from typing import cast

from onnx import NodeProto

from reparamc.algebra.expr import Mean, Permute
from reparamc.compiler.graph import Separate
from reparamc.onnx.facts import Facts
from reparamc.onnx.values import attribute, captured, is_placed, is_standard, operand

ELEMENTWISE = {
    "Abs", "Add", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log",
    "Max", "Min", "Mish", "Mul", "Neg", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Sub", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Each element of the result depends on those of the operands at its own position."""

HOMOGENEOUS = {"Abs", "LeakyRelu", "PRelu", "Relu"}
"""Of one value, which a positive factor passes."""

KEEPING = {"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "MaxPool", "Resize", "Upsample"}
"""Over positions, with coefficients that sum to 1: what a channel is everywhere, it stays."""


def separate(graph: Facts, name: str) -> Separate | None:
    """See `reparamc.compiler.graph.Graph.separate`."""
    node = graph.producers[name]
    if not is_standard(node) or is_placed(node) or any(node.output[1:]) or graph.types.dtype(name) is None:
        return None
    if node.op_type in ELEMENTWISE:
        return _elementwise(graph, node)
    if node.op_type in KEEPING:
        return Separate((node.input[0],), computes=False) if _keeps(graph, node) else None
    return _moving(graph, node)


def _elementwise(graph: Facts, node: NodeProto) -> Separate | None:
    given = [n for n in node.input if n]
    operands = tuple(n for n in given if n not in graph.constants)
    scalars = all(graph.constants.shape(n) in ((), (1,)) for n in given if n in graph.constants)
    if not operands or not scalars or len({graph.types.rank(n) for n in operands}) > 1:
        return None
    homogeneous = node.op_type in HOMOGENEOUS and len(operands) == 1
    return Separate(operands, multiplies=node.op_type == "Mul", homogeneous=homogeneous)


def _keeps(graph: Facts, node: NodeProto) -> bool:
    """Whether a constant stays what it is, and the operator says no number of channels."""
    match node.op_type:
        case "AveragePool":
            return not cast(int, attribute(node, "count_include_pad", 0))
        case "Resize" | "Upsample":
            mode = cast(bytes, attribute(node, "coordinate_transformation_mode", b"half_pixel"))
            return (
                mode != b"tf_crop_and_resize"
                and not operand(node, 3)
                and all(n in graph.constants for n in node.input[1:] if n)
            )
        case _:
            return True


def _moving(graph: Facts, node: NodeProto) -> Separate | None:
    x = node.input[0] if node.input else ""
    rank = graph.types.rank(x)
    if rank is None or x in graph.constants:
        return None
    if node.op_type == "Transpose":
        perm = attribute(node, "perm")
        axes = range(rank)[::-1] if perm is None else cast("list[int]", perm)
        return Separate((x,), computes=False, moves=Permute(tuple(axes)))
    if node.op_type == "ReduceMean":
        name = graph.constant(node, 1)
        axes = graph.constants.integers(name) if name else cast("list[int] | None", attribute(node, "axes"))
        keep = bool(cast(int, attribute(node, "keepdims", 1)))
        found = Mean(rank, tuple(sorted(a % rank for a in axes or ())), keep)
        return Separate((x,), computes=False, moves=found) if axes else None
    if node.op_type in ("Flatten", "Reshape", "Squeeze", "Unsqueeze"):
        op = graph.reshapes(node)
        return None if op is None else Separate((x,), computes=False, moves=op)
    return None


def may_narrow(graph: Facts, name: str) -> bool:
    """See `reparamc.compiler.graph.Graph.may_narrow`."""
    users = graph.uses.get(name, [])
    counting = ("Shape", "Size", "If", "Loop", "Scan")
    plain = all(u is not None and u.op_type not in counting and name not in captured(u) for u in users)
    return bool(users) and plain and name not in graph.constants

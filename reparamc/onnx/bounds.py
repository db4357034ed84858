"""Operators of ONNX by the interval of their results: see `reparamc.compiler.ranges`."""

from __future__ import annotations

from typing import Any, cast

import ml_dtypes
from onnx import NodeProto

from reparamc.compiler.graph import ALL, Bounded
from reparamc.compiler.ranges import POSITIVE, bounded_by_name, clip
from reparamc.onnx.facts import Facts
from reparamc.onnx.values import attribute, is_standard, operand

CHOOSING = ("Flatten", "Reshape", "Squeeze", "Transpose", "Unsqueeze")
"""Whose results are elements of the first operand, NaN or not: of NaN alone, ONNX Runtime finds another maximum."""


def bounded(graph: Facts, name: str) -> Bounded | None:
    """See `reparamc.compiler.graph.Graph.bounded`."""
    node = graph.producers[name]
    if not is_standard(node) or name != node.output[0] or graph.types.dtype(name) is None or not node.input:
        return None
    x = node.input[0]
    match node.op_type:
        case "Clip":
            return _clip(graph, node)
        case "LeakyRelu" if attribute(node, "alpha", 0.01) == 1.0:
            return Bounded((x,), keeps=ALL)
        case "PRelu":
            slope = graph.constant(node, 1)
            ones = slope is not None and bool((graph.constants.array(slope) == 1).all())
            return Bounded((x,), keeps=ALL if ones else POSITIVE)
        case "Mul":
            a, b = node.input
            return Bounded((a,), POSITIVE) if a == b else Bounded((a, b), signed=True)
        case "AveragePool" | "GlobalAveragePool" | "ReduceMean":
            return Bounded((x,), signed=True)
        case kind:
            return Bounded((x,), chooses=True) if kind in CHOOSING else bounded_by_name(kind, x)


def _clip(graph: Facts, node: NodeProto) -> Bounded | None:
    dtype = graph.types.dtype(node.output[0])
    if graph.opset < 6 or dtype is None:
        return None
    largest = float(cast(Any, ml_dtypes).finfo(dtype).max)  # by default, so that an infinity does not stay
    ends = [cast(float, attribute(node, key, end)) for key, end in (("min", -largest), ("max", largest))]
    for i in (0, 1):
        if operand(node, 1 + i):
            name = graph.constant(node, 1 + i)
            array = None if name is None else graph.constants.array(name)
            if array is None or array.size != 1:
                return None
            ends[i] = float(array.ravel()[0])
    return clip(node.input[0], *ends)

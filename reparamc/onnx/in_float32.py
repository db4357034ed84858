"""A model of doubles or bfloat16 in float32, for runtimes that lack operators of these types."""

from __future__ import annotations

import numpy as np
from onnx import AttributeProto, FunctionProto, GraphProto, ModelProto, TensorProto, TypeProto

from reparamc.onnx.values import FLOATS
from reparamc.onnx.weights import array, tensor

OTHER = {TensorProto.DOUBLE, TensorProto.BFLOAT16}
NAMING = {"to", "dtype", "output_dtype", "stash_type"}
"""The attributes that name an element type."""
DTYPES = tuple(FLOATS[kind] for kind in OTHER)


class _OutOfRangeError(Exception):
    """A number has no counterpart in float32."""


def in_float32(model: ModelProto) -> ModelProto | None:
    """A copy of ``model`` in which float32 stands for double and bfloat16.

    None where ``model`` holds neither, or a number that float32 cannot hold.
    """
    copy = ModelProto()
    copy.CopyFrom(model)
    try:
        changed = _change(copy.graph) + sum(_change(f) for f in copy.functions)
    except _OutOfRangeError:
        return None
    return copy if changed else None


def _change(graph: GraphProto | FunctionProto) -> int:
    """Change ``graph`` and its bodies; how much there was to change."""
    del graph.value_info[:]
    changed = 0
    if isinstance(graph, GraphProto):
        changed += sum(_retyped(v.type) for v in (*graph.input, *graph.output))
        changed += sum(map(_converted, graph.initializer))
    for node in graph.node:
        for a in node.attribute:
            changed += _converted(a.t) if a.type == AttributeProto.TENSOR else 0
            changed += sum(map(_converted, a.tensors)) + sum(map(_change, a.graphs))
            changed += _change(a.g) if a.type == AttributeProto.GRAPH else 0
            if a.name in NAMING and a.i in OTHER:
                a.i, changed = TensorProto.FLOAT, changed + 1
    return changed


def _retyped(kind: TypeProto) -> int:
    if kind.HasField("sequence_type"):
        return _retyped(kind.sequence_type.elem_type)
    if kind.HasField("optional_type"):
        return _retyped(kind.optional_type.elem_type)
    if kind.tensor_type.elem_type not in OTHER:
        return 0
    kind.tensor_type.elem_type = TensorProto.FLOAT
    return 1


def _converted(t: TensorProto) -> int:
    if t.data_type not in OTHER:
        return 0
    value = array(t)
    with np.errstate(over="ignore", under="ignore"):
        made = value.astype(np.float32)
    wide = np.asarray(value, np.float64)
    lost = np.isfinite(wide) & (~np.isfinite(made) | ((wide != 0) & (np.abs(made) < np.finfo(np.float32).tiny)))
    if t.data_type == TensorProto.DOUBLE and lost.any():
        raise _OutOfRangeError
    t.CopyFrom(tensor(made, t.name))
    return 1

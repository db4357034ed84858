"""Constant folding on ONNX graphs: operators whose operands are all constant are computed once, now.

A node is folded when it is deterministic, its result takes no more bytes than its operands (small
results always may), and no operand of weight size is read elsewhere: the file never grows. The extents of a
value that are known count as constant, also where others are not.
"""

from __future__ import annotations

from math import prod
from typing import cast

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

from reparamc.onnx.values import SMALL, Constants, Types, attribute, captured, commit, is_standard, readers, subgraphs

LEFT = {
    "Constant", "Identity", "DequantizeLinear", "QuantizeLinear", "DynamicQuantizeLinear",
    "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
    "Dropout", "Optional", "SequenceConstruct", "SequenceEmpty", "StringNormalizer",
}  # fmt: skip
"""Not deterministic, inflating, without tensor results, or constant as they are. Quantised weights stay quantised."""

MOVES = {
    "Concat",
    "Cast",
    "Flatten",
    "Gather",
    "Reshape",
    "Shape",
    "Slice",
    "Squeeze",
    "Transpose",
    "Unsqueeze",
}
"""Operators that cannot inflate; others are folded only when shape inference tells the size of the result."""


INFLATING = {"ConstantOfShape": 0, "Expand": 1}
"""Operators whose result has the extents that an operand spells out, and where that operand stands."""


def fold_constants(model: ModelProto) -> int:
    """Fold the constant operators of the main graph in place; the number of operators folded."""
    total = 0
    while folded := _sweep(model):
        total += folded
        if not any(node.op_type == "Shape" for node in model.graph.node):
            break  # nothing more can have become known
    return total


def _sweep(model: ModelProto) -> int:
    constants, types, uses = Constants(model), Types(model), readers(model.graph)
    apart: set[str] = set()
    while True:
        foldable, shapes, sizes = _foldable(model, constants, types, apart)
        done = {name for node in foldable for name in node.output if name} | set(shapes)
        # What is large and read by something that stays would be kept beside what is computed from it.
        still = {
            name
            for node in foldable
            for name in node.input
            if sizes.get(name, 0) > 4 * SMALL
            and len(uses.get(name, [])) > 1
            and not all(user is not None and done.issuperset(filter(None, user.output)) for user in uses[name])
        }
        if still <= apart:
            break
        apart |= still
    values = shapes | _compute(model, foldable, constants, shapes)
    fresh = [numpy_helper.from_array(np.asarray(value, order="C"), name) for name, value in values.items()]
    kept, folded = [], []
    for node in model.graph.node:
        done = all(name in values for name in node.output if name)
        (folded if done and any(node.output) else kept).append(node)
    if folded:
        read = {name for node in kept for name in (*node.input, *captured(node))}
        fed = {name for node in folded for name in node.input}
        commit(model, kept, [t for t in fresh if t.name in read], fed)
    return len(folded)


def _is_misread(model: ModelProto, node: NodeProto) -> bool:
    """Whether the reference implementation of ONNX computes something else than the standard says.

    It takes BatchNormalization before opset 14 to be in training mode, and mistakes the bias of grouped
    transposed convolutions.
    """
    opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
    return node.op_type == "ConvTranspose" or (node.op_type == "BatchNormalization" and opset < 14)


def _foldable(
    model: ModelProto, constants: Constants, types: Types, apart: set[str]
) -> tuple[list[NodeProto], dict[str, np.ndarray], dict[str, int]]:
    """The nodes that can be computed now, what shapes tell without being computed, and the bytes of every constant.

    Nothing is computed from the constants in ``apart``.
    """
    outputs = {o.name for o in model.graph.output}
    known = {name: _bytes(constants, name) for name in constants.tensors}
    foldable: list[NodeProto] = []
    shapes: dict[str, np.ndarray] = {}
    partly: dict[str, np.ndarray] = {}  # results of Shape of which some extents are unknown
    for node in model.graph.node:
        if not is_standard(node) or node.op_type in LEFT or any(subgraphs(node)) or outputs.intersection(node.output):
            continue
        if _is_misread(model, node):
            continue
        given = [name for name in node.input if name]
        extents = None
        if node.op_type == "Shape":
            extents = _extents(node, types)
        elif node.op_type in ("Gather", "Slice") and given[0] in partly:
            extents = _picked(node, partly[given[0]], constants)
        if extents is not None and all(n is not None for n in extents.flat):
            shapes[node.output[0]] = extents.astype(np.int64)
            known[node.output[0]] = shapes[node.output[0]].nbytes
            continue
        if extents is not None and node.op_type == "Shape":
            partly[node.output[0]] = extents
        if node.op_type == "CastLike" and given[0] in known and (kind := types.dtype(given[1])) is not None:
            node.CopyFrom(helper.make_node("Cast", given[:1], node.output, to=helper.np_dtype_to_tensor_dtype(kind)))
            given = given[:1]
        if not given or not all(name in known for name in given) or not apart.isdisjoint(given):
            continue
        room = max(sum(known[name] for name in given), 4 * SMALL)
        sizes = [_size(types, name, node.op_type, room) for name in node.output if name]
        if any(size is None or size > room for size in sizes):
            continue
        known.update(zip((name for name in node.output if name), (s or 0 for s in sizes), strict=True))
        foldable.append(node)
    return foldable, shapes, known


def _extents(node: NodeProto, types: Types) -> np.ndarray | None:
    """What a Shape gives, with None for an extent that is unknown; None where the rank is."""
    shape = types.shape(node.input[0])
    if shape is None:
        return None
    first, last = cast(int, attribute(node, "start", 0)), cast("int | None", attribute(node, "end"))
    return np.array([dim.known for dim in shape[first:last]], dtype=object)


def _picked(node: NodeProto, extents: np.ndarray, constants: Constants) -> np.ndarray | None:
    """What a Gather or Slice takes of the vector ``extents``; None where its own operands are not known, or wrong."""
    if any(name and name not in constants for name in node.input[1:]) or len(node.input) < 2:
        return None
    given = [constants.array(name) if name else None for name in node.input[1:]]
    index = given[0]
    try:
        if node.op_type == "Slice":
            start, end, _, step = (None if a is None else a.item() for a in [*given, None, None][:4])
            index = slice(start, end, step)
        return np.asarray(extents[index], dtype=object)
    except (IndexError, ValueError):
        return None


def _bytes(constants: Constants, name: str) -> int:
    tensor = constants.tensors[name]
    return prod(tensor.dims) * helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize


def _size(types: Types, name: str, op_type: str, room: int) -> int | None:
    """Bytes of the value ``name``; ``room`` when unknown but bounded by the operands; None when unknown."""
    extents, dtype = types.extents(name), types.dtype(name)
    if extents is not None:
        return prod(extents) * (dtype.itemsize if dtype is not None else 8)
    return room if op_type in MOVES or op_type in INFLATING else None


def _compute(
    model: ModelProto, nodes: list[NodeProto], constants: Constants, shapes: dict[str, np.ndarray]
) -> dict[str, np.ndarray]:
    """The values of all foldable nodes; without those whose operator fails or has no reference."""
    values: dict[str, np.ndarray] = {}
    for node in nodes:
        given = [name for name in node.input if name]
        if not all(name in values or name in shapes or name in constants for name in given):
            continue
        feeds = {
            name: values[name] if name in values else shapes[name] if name in shapes else constants.array(name)
            for name in given
        }
        if node.op_type in INFLATING and prod(feeds[node.input[INFLATING[node.op_type]]].tolist()) > SMALL:
            continue
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in feeds.items()
        ]
        outputs = [onnx.ValueInfoProto(name=name) for name in node.output if name]
        body = helper.make_graph([node], "constant", inputs, outputs)
        try:
            single = helper.make_model(body, opset_imports=model.opset_import, ir_version=model.ir_version)
            results = ReferenceEvaluator(single).run(None, feeds)
        except Exception:  # the reference lacks an operator or a type: the node stays, which is always right
            continue
        if all(isinstance(r, np.ndarray | np.generic) for r in results):
            values.update(zip((name for name in node.output if name), map(np.asarray, results), strict=True))
    return values

"""How far shape inference may go: where onnx propagates data, it keeps every entry of every vector that it meets."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator
from math import prod

import numpy as np
import onnx
from onnx import AttributeProto, GraphProto, ModelProto, NodeProto, TensorProto, helper, inliner, numpy_helper

VAST, LAST = 2**20, 2**62
"""Vectors of more entries take too long. From the second on, a number is no size: exporters mean the end of an axis."""

WHOLE = (TensorProto.INT64, TensorProto.INT32)
"""The types of shapes."""

MOST_READ = 1024
"""A constant of more entries is no shape."""

FAILURES = (onnx.shape_inference.InferenceError, onnx.checker.ValidationError, ValueError, TypeError, RuntimeError)
"""What onnx raises of contradictions, and of what none of its readers has thought of."""


GRAPH, GRAPHS = AttributeProto.GRAPH, AttributeProto.GRAPHS


WITH_BODIES = {"FlexAttention", "If", "Loop", "Scan", "SequenceMap"}
"""The standard operators that run graphs."""


def bodies(node: NodeProto) -> list[GraphProto]:
    """The graphs that an operator runs."""
    if node.op_type not in WITH_BODIES and node.domain in ("", "ai.onnx"):
        return []  # all nodes are asked, again and again
    found: list[GraphProto] = []
    for a in node.attribute:
        if (kind := a.type) == GRAPH:
            found.append(a.g)
        elif kind == GRAPHS:
            found += a.graphs
    return found


def stand_in(node: NodeProto) -> None:
    """Make of ``node`` what tells the type of its result, if that is one that inference is silent on."""
    if node.op_type == "GroupNormalization" and not node.domain:
        node.op_type = "Identity"
        del node.attribute[:], node.input[1:]


def unnamed(symbol: str, named: Collection[str]) -> str:
    """``symbol``, for a size without a name, or one like it, if it is among those that inputs have ``named``."""
    while symbol in named:
        symbol += "'"
    return symbol


def hide_doubtful(light: ModelProto) -> None:
    """Have inference say nothing of sizes that ONNX Runtime takes otherwise.

    A slice in reverse to the largest number, which is behind the last position, goes on to the first there. And a
    pooling that rounds up has no window that would start after the map and its padding; auto_pad hides dilations, pads.
    """
    for graph in [*nested(light.graph)]:
        slices = [n for n in graph.node if n.op_type == "Slice" and not n.domain and len(n.input) > 4]
        small = _small_constants(light.graph, graph) if slices else {}
        for node in slices:
            ends, steps = small.get(node.input[2], ()), small.get(node.input[4], ())
            if any(step < 0 and end in ENDLESS for end, step in zip(ends, steps, strict=False)):
                node.input[2] = _unknown(light, node.output[0], [len(ends)])
        for node in graph.node:
            if node.op_type in POOLS and not node.domain and _is_doubtful(node):
                for name in node.output[1:]:
                    light.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, None))
                node.op_type = "Slice"
                del node.attribute[:], node.output[1:]
                node.input.extend([_unknown(light, node.output[0], None)] * 2)


POOLS = ("AveragePool", "LpPool", "MaxPool")


def _unknown(light: ModelProto, name: str, shape: list[int] | None) -> str:
    """A new input of whole numbers, the bounds of ``name``."""
    name = f"bounds of {name}"
    light.graph.input.append(helper.make_tensor_value_info(name, TensorProto.INT64, shape))
    return name


def _is_doubtful(pool: NodeProto) -> bool:
    """Whether ONNX Runtime may take a pooling to have other sizes than inference; see `hide_doubtful`."""
    said = {a.name: helper.get_attribute_value(a) for a in pool.attribute}
    kernel = said.get("kernel_shape", [])
    n = len(kernel)
    steps, spread = (said.get(key, [1] * n) for key in ("strides", "dilations"))
    ends = said.get("pads", [0] * 2 * n)[n:]
    rows = zip(kernel, steps, spread, ends, strict=False)
    if said.get("auto_pad", b"NOTSET") != b"NOTSET" and ("pads" in said or any(d > 1 for d in spread)):
        return True
    return bool(said.get("ceil_mode")) and any(s > 1 and e + s > d * (k - 1) + 1 for k, s, d, e in rows)


ENDLESS = (2**31 - 1, 2**63 - 1)
"""The largest numbers of their types."""


def _small_constants(*graphs: GraphProto) -> dict[str, list[int]]:
    """The entries of small constants that are whole numbers."""
    found = [(t.name, t) for graph in graphs for t in graph.initializer]
    found += [
        (n.output[0], a.t)
        for graph in graphs
        for n in graph.node
        if n.op_type == "Constant"
        for a in n.attribute
        if a.name == "value"
    ]
    found = [(n, t) for n, t in found if t.data_type in WHOLE and prod(t.dims) <= MOST_READ and not t.external_data]
    return {name: np.ravel(numpy_helper.to_array(t)).tolist() for name, t in found}


def may_propagate(light: ModelProto, told: ModelProto | None = None) -> bool:
    """Whether no vector in ``light``, its bodies and local functions, gets too many entries, as far as can be told.

    Args:
        light: a model without large weights.
        told: the same with what inference tells of it from shapes alone, where that is known.
    """
    inside = [node for f in light.functions for node in f.node]
    every = [*nested(light.graph), *(g for node in inside for body in bodies(node) for g in nested(body))]
    numbers = [*_numbers(every, inside)]
    if not numbers and not any(map(_tells_numbers, (*inside, *(node for g in every for node in g.node)))):
        return False  # there is nothing to propagate
    dims = (d.dim_value for v in light.graph.input for d in v.type.tensor_type.shape.dim)
    if any(VAST < n < LAST for n in (*dims, *numbers)):
        return False
    try:
        plain = inliner.inline_local_functions(light) if inside else light
        plain = onnx.shape_inference.infer_shapes(plain) if told is None or inside else told
    except FAILURES:
        return False
    values = [v for g in nested(plain.graph) for v in (*g.input, *g.value_info, *g.output)]
    shapes = [v.type.tensor_type.shape.dim for v in values]
    return all(len(dims) != 1 or dims[0].dim_value <= VAST for dims in shapes)


def _tells_numbers(node: NodeProto) -> bool:
    """Whether a node gives whole numbers that `_numbers` does not see."""
    return node.op_type in ("Shape", "Size") or (
        node.op_type == "Constant" and any(a.name.startswith("value_int") for a in node.attribute)
    )


def nested(graph: GraphProto) -> Iterator[GraphProto]:
    """``graph`` and the bodies in it, at any depth."""
    stack = [graph]
    while stack:
        graph = stack.pop()
        yield graph  # whose nodes may be put in another order meanwhile
        stack += [body for node in graph.node for body in bodies(node)]


def _numbers(graphs: Iterable[GraphProto], inside: Iterable[NodeProto]) -> Iterator[int]:
    """The entries of all small constants that something else than a slice reads."""
    for nodes, stored in [*((g.node, g.initializer) for g in graphs), (inside, ())]:
        named = [(t.name, t) for t in stored]
        named += [
            (n.output[0], a.t) for n in nodes if n.op_type == "Constant" for a in n.attribute if a.name == "value"
        ]
        named = [(n, t) for n, t in named if t.data_type in WHOLE and prod(t.dims) <= MOST_READ and not t.external_data]
        if not named:
            continue
        read = {n for node in nodes for at, n in enumerate(node.input) if node.op_type != "Slice" or not at}
        steps = {node.input[4] for node in nodes if node.op_type == "Slice" and len(node.input) > 4}
        for name, tensor in named:
            if name in read:
                yield from np.ravel(numpy_helper.to_array(tensor)).tolist()
            if name in steps:  # inference adds them to places, which overflows
                yield from (min(abs(n), LAST - 1) for n in np.ravel(numpy_helper.to_array(tensor)).tolist())

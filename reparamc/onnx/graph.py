"""The ONNX adapter: a main graph as regions of linear operators, and expressions as operators.

Nodes that no rewrite touches are never rebuilt: they keep their names, doc strings and metadata.
What bodies of If, Loop and Scan capture counts as read; they are graphs of their own (see `bodies`).
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping, Sequence
from functools import cached_property
from itertools import zip_longest
from math import prod
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.algebra.expr import (
    ONE,
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Ints,
    Layout,
    LayoutOp,
    Mean,
    Permute,
    Reshape,
    Scale,
    Select,
    Source,
    Sum,
    Take,
    is_negation,
    ranks,
)
from reparamc.algebra.kernels import regroup, swap_sides
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.shape import sizes_after
from reparamc.compiler.graph import Fold, Reading, Splice, Taps, Value, new_nodes
from reparamc.errors import InputError
from reparamc.onnx import taps
from reparamc.onnx.constants import fold_constants
from reparamc.onnx.operators import LAST, READERS
from reparamc.onnx.reference import Operator, in_float64
from reparamc.onnx.values import (
    FLOATS,
    Constants,
    Names,
    Types,
    attribute,
    commit,
    defined_names,
    is_fused_conv,
    is_placed,
    is_standard,
    operand,
    opset_of,
    read_elsewhere,
    readers,
)

LINEAR_KINDS = {
    "Add", "Concat", "CumSum", "DepthToSpace", "Div", "Einsum", "Expand", "Flatten", "Gather", "GatherElements",
    "GatherND", "Gemm", "Identity", "MatMul", "Mean", "Mul", "Neg", "Pad", "ReduceMean", "ReduceSum", "Reshape",
    "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split", "Squeeze", "Sub", "Sum", "Tile", "Transpose",
    "Trilu", "Unsqueeze", "Where",
}  # fmt: skip
"""Operators that are affine in each operand that is no constant, all other operands being constant."""


MOST_ELEMENTS = 2**24
"""Of a value that is computed to find out what it is."""


class OnnxGraph:
    """`reparamc.compiler.graph.Graph` over the main graph of a model. Values are tensor names."""

    pools_clamp = True

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = Constants(model)
        self.opset = opset_of(model)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self.uses = readers(model.graph)
        for name in read_elsewhere(model):
            self.uses.setdefault(name, []).append(None)
        """The nodes that read each value, once per operand; None for a graph output or a body that captures it."""
        self._readings: dict[str, Reading | Declined | None] = {}
        self._functions: dict[str, Operator] = {}

    @cached_property
    def types(self) -> Types:
        return Types(self.model)

    # Reading

    def values(self) -> Sequence[str]:
        return [name for node in self.nodes for name in _results(node) if name not in self.constants]

    def name(self, value: Value) -> str:
        node = self.producers.get(str(value))
        return node.name if node is not None and node.name else str(value)

    def readers(self, value: Value) -> Sequence[Value | None]:
        found: list[str | None] = []
        for node in self.uses.get(str(value), []):
            found += [None] if node is None else [name for name in _results(node) if name in self.uses] or [None]
        return found

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        dtypes = {self.types.dtype(str(v)) for v in members}
        return dtypes.pop() if len(dtypes) == 1 else None

    def source(self, value: Value) -> Source:
        if isinstance(value, Taps):
            return value.source(self.types.shape(str(value.of)))
        return Source(value, shape=self.types.shape(str(value)))

    def obstacle(
        self, root: Value, members: Sequence[Value], sources: Sequence[Value], made: Collection[Expr]
    ) -> str | None:
        """ONNX Runtime convolves no doubles: a model that it runs must not be given a convolution of them."""
        for e in made:
            if isinstance(e, Conv) and e.reads_taps and (why := taps.obstacle(self, e)) is not None:
                return why
        if self.dtype(members) != np.float64 or any(node.op_type in ("Conv", "ConvTranspose") for node in self.nodes):
            return None
        kernels = any(isinstance(e, Conv) and e.spatial and not e.is_weightless and not _is_rows(e) for e in made)
        return "it would be a convolution of doubles, which ONNX Runtime does not have" if kernels else None

    def read(self, value: Value) -> Reading | Declined | None:
        name = str(value)
        if name not in self._readings:
            node = self.producers[name]
            reader = READERS.get(node.op_type) if is_standard(node) or is_fused_conv(node) else None
            readable = (
                name in _results(node)
                and not is_placed(node)
                and self.types.dtype(name) is not None
                and not self._is_empty(node)
            )
            self._readings[name] = reader(self, node, name) if reader is not None and readable else None
        return self._readings[name]

    def _is_empty(self, node: NodeProto) -> bool:
        """Whether an operand or a result of ``node`` has no elements, for every input: there is nothing to gain."""
        shapes = (self.types.shape(name) for name in (*node.input, *node.output) if name)
        return any(dim.factor == 0 for shape in shapes for dim in shape or ())

    def _is_vast(self, name: str) -> bool:
        """Whether ``name`` has too many elements, as far as its size is known, to be computed for a try."""
        shape = self.types.shape(name)
        return shape is not None and prod(dim.factor for dim in shape) > MOST_ELEMENTS

    def axis(self, name: str) -> int | None:
        """The channel axis of ``name``, where a linear operator fixes it."""
        reading = self.read(name) if name in self.producers else None
        return reading.axis if isinstance(reading, Reading) else None

    def reshapes(self, node: NodeProto) -> Reshape | None:
        """What ``node`` does to the shape of its operand, where both shapes are known."""
        before, after = self.types.shape(node.input[0]), self.types.shape(node.output[0])
        return None if before is None or after is None else Reshape(before, after, node.output[0])

    def is_linear(self, name: str) -> bool:
        """Whether ``name`` is computed by an operator that has a reading."""
        return name in self.producers and isinstance(self.read(name), Reading)

    def constant(self, node: NodeProto, position: int) -> str | None:
        """The name of the constant operand at ``position``; None when it is absent or no constant."""
        name = operand(node, position)
        return name if name is not None and name in self.constants else None

    def array(self, name: str) -> Array:
        """The parameter ``name`` in float64.

        Raises:
            InputError: it is no tensor of floating numbers, which the checker overlooks.
        """
        kind = self.constants.element_type(name)
        if kind not in FLOATS:
            stored = TensorProto.DataType.Name(kind).lower()
            raise InputError(f"the parameter {name!r} is of type {stored}, where a floating type is needed")
        return self.constants.array(name).astype(np.float64)

    def is_written(self, value: Value) -> bool:
        return False

    def moves(self, value: Value) -> tuple[Value, ...] | None:
        node = self.producers[str(value)]
        if not is_standard(node) or node.op_type not in LINEAR_KINDS or self.types.dtype(str(value)) is None:
            return None
        if self._is_empty(node) or self._is_vast(str(value)):
            return None
        if isinstance(self.read(value), Declined) and node.op_type in ("Add", "Sub", "Mul", "Div"):
            return None  # it broadcasts, or is part of an activation
        if node.op_type == "Pad" and attribute(node, "mode", b"constant") != b"constant":
            return None  # what stands at the border depends on what stands beside it
        if len(node.output) > 1 and node.op_type != "Split":
            return None
        floating = [name for name in node.input if name and name not in self.constants]
        if any(self.types.dtype(name) is None for name in floating):
            return None  # indices that are computed at run time
        most = {"Mul": 1, "Div": 1, "MatMul": 1, "Gemm": 1, "Einsum": 1}.get(node.op_type, len(floating))
        by_itself = node.op_type == "Div" and node.input[0] in self.constants
        return tuple(floating) if 0 < len(floating) <= most and not by_itself else None

    def reach(self, value: Value) -> int:
        node = self.producers[str(value)]
        found = [0]
        for a in node.attribute:
            found += [abs(n) for n in (a.i, *a.ints)]
        for name in node.input:
            if name in self.constants:
                array = self.constants.array(name)
                found += [abs(int(n)) for n in array.ravel()] if array.dtype.kind in "iu" else list(array.shape[2:])
        return max(n for n in found if n < LAST)  # ends that mean "all" do not count

    def run(self, value: Value, operands: Mapping[Value, Array], extents: Mapping[str, int] = {}) -> Array:
        name = str(value)
        if name not in self._functions:
            self._functions[name] = in_float64(self, self.producers[name], name)
        return self._functions[name]({str(v): x for v, x in operands.items()})

    def kind(self, value: Value) -> Hashable:
        node = self.producers[str(value)]
        attributes = [a.SerializeToString(deterministic=True) for a in node.attribute if a.name != "group"]
        inputs: list[Hashable] = [str(value) == name for name in node.output]
        for name in node.input:
            if name not in self.constants:
                inputs.append(bool(name))
                continue
            shape = self.constants.shape(name)
            whole = self.constants.element_type(name) not in FLOATS and node.op_type not in (
                "Reshape",
                "Split",
                "Gather",
            )
            inputs.append((tuple(n == 1 for n in shape[:2]), shape[2:], whole and self.constants.array(name).tobytes()))
        return node.op_type, frozenset(attributes), tuple(inputs)

    def folded(self) -> tuple[OnnxGraph, list[Fold]]:
        """As `Graph.folded`: the graph of a copy in which it is done already, for all or none."""
        copy = ModelProto()
        copy.CopyFrom(self.model)
        names = fold_constants(copy)
        return (OnnxGraph(copy), [Fold(name, names[0]) for name in names]) if names else (self, [])


class OnnxEdit:
    """A copy of a model in which splices are carried out. The graph that it is made of stays as it is.

    Attributes:
        names: all that are taken.
        emitted: what has been emitted so far, for other splices that share it.
        slices: those that were emitted, by operand and axis: bounds, and the node that lacks them.
    """

    def __init__(self, graph: OnnxGraph) -> None:
        self.model = ModelProto()
        self.model.CopyFrom(graph.model)
        self.producers, self.types, self.opset = graph.producers, graph.types, graph.opset
        self.constants, self.array, self.reshapes = graph.constants, graph.array, graph.reshapes
        self.names = Names(defined_names(self.model.graph))
        self.emitted: dict[Expr, str] = {}
        self.slices: dict[tuple[str, int], list[tuple[Ints, NodeProto]]] = {}
        self._inserted: dict[str, list[NodeProto]] = {}
        self._initializers: list[TensorProto] = []
        self._replaced: set[str] = set()
        self._suspects: set[str] = set()

    def carry_out(self, splices: Iterable[Splice]) -> ModelProto:
        """The copy with ``splices`` in it, in one edit, and without what is dead then."""
        for splice in splices:
            self._splice(splice)
        self._finish()
        return self.model

    def _splice(self, splice: Splice) -> None:
        root = str(splice.root)
        self._inserted[root] = _Emitter(self, splice, root).run()
        self._replaced.add(root)
        self._suspects.update(str(v) for v in splice.members)

    def add_initializer(self, wanted: str, array: Array, dtype: np.dtype) -> str:
        name = self.names.fresh(wanted)
        self._initializers.append(numpy_helper.from_array(np.asarray(array, dtype, order="C"), name))
        return name

    def add_copies(self, wanted: str, name: str, times: int) -> str:
        """Store a vector of that many copies of the number that is the constant ``name``, in its type."""
        array = np.repeat(self.constants.array(name).ravel(), times)
        self._initializers.append(numpy_helper.from_array(array, fresh := self.names.fresh(wanted)))
        return fresh

    def add_integers(self, wanted: str, values: Sequence[int]) -> str:
        return self.add_initializer(wanted, np.array(values), np.dtype(np.int64))

    def _finish(self) -> None:
        if not self._replaced:
            return
        self._complete_slices()
        nodes: list[NodeProto] = []
        for node in self.model.graph.node:
            roots = [name for name in node.output if name in self._replaced]
            if not roots or any(name not in self._replaced for name in _results(node)):
                nodes.append(self._without(node, roots))
            else:
                self._suspects.update(name for name in node.input if name)
            for root in roots:
                nodes.extend(node for node in self._inserted[root] if node.output)
        commit(self.model, nodes, self._initializers, self._suspects)

    def _complete_slices(self) -> None:
        """Give slices their bounds; those that cut a value into all its parts become one Split, the first of them."""
        for (x, axis), slices in self.slices.items():
            parts = sorted(slices, key=lambda part: part[0])
            starts, ends, widths = zip(*(bounds for bounds, _ in parts), strict=True)
            if len(parts) == 1 or (*starts, widths[0]) != (0, *ends):
                for (start, end, _), node in slices:
                    bounds = {"start": start, "end": end, "axis": axis}
                    node.input.extend(self.add_integers(f"{x}.{key}", [n]) for key, n in bounds.items())
                continue
            outputs, sizes = [node.output[0] for _, node in parts], [b - a for a, b in zip(starts, ends, strict=True)]
            for _, node in slices:
                del node.output[:]
            split = slices[0][1]
            split.op_type, split.name = "Split", self.names.fresh(f"{x}/fused_Split")
            split.output.extend(outputs)
            split.attribute.append(helper.make_attribute("axis", axis))
            if self.opset < 13:
                split.attribute.append(helper.make_attribute("split", sizes))
            else:
                split.input.append(self.add_integers(f"{x}.split", sizes))

    def _without(self, node: NodeProto, roots: list[str]) -> NodeProto:
        """``node``, with outputs that something else computes now under names that nothing reads."""
        for i, name in enumerate(node.output):
            if name in roots:
                node.output[i] = self.names.fresh(f"{name}_unused")
        return node


def _results(node: NodeProto) -> list[str]:
    """The outputs of ``node`` that values are read from: one, but for Split."""
    outputs = list(node.output) if node.op_type == "Split" else node.output[:1]
    return [name for name in outputs if name]


def _is_rows(e: Conv) -> bool:
    """Whether ``e`` is a product with a matrix from the left."""
    return e.spatial == 1 and e.is_pointwise


class _Emitter:
    """The nodes that compute one splice."""

    def __init__(self, graph: OnnxEdit, splice: Splice, root: str) -> None:
        self.graph, self.splice, self.root, self.base = graph, splice, root, str(splice.unit)
        self.nodes: list[NodeProto] = []
        self.names: dict[Expr, str] = {e: str(v) for e, v in splice.native.items()}
        self.note = f"reparamc: {', '.join(splice.counts)}"

    def run(self) -> list[NodeProto]:
        top = self.splice.expr
        for e in new_nodes(self.splice):
            if e in self.graph.emitted:  # in another region, that shares it
                self.names[e] = self.graph.emitted[e]
            elif e is top or not is_negation(e):  # sums subtract instead
                self.names[e] = self.graph.emitted[e] = self._emit(e, self.root if e is top else None)
        if top in self.splice.native:
            self._node("Identity", [self.names[top]], self.root)
        return self.nodes

    def _emit(self, e: Expr, output: str | None) -> str:
        match e:
            case Conv() if e.reads_taps:
                return taps.with_weight(self.graph, e, self._parameter, self._node, output)
            case Conv() if e.is_weightless and (name := self._weightless(e, output)) is not None:
                return name
            case Conv() if _is_rows(e) and (self._rank(e.x) != 3 or self.splice.dtype == np.float64):
                return self._rows(e, output)
            case Conv() if e.spatial:
                begin, end = e.padding
                weight = swap_sides(e.weight, e.groups) if e.transposed else e.weight
                inputs = [self._value(e.x), self._parameter("weight", weight)]
                inputs += [self._parameter("bias", e.bias)] if e.bias is not None else []
                attributes: dict[str, Any] = {
                    "kernel_shape": e.kernel, "strides": e.stride, "dilations": e.dilation,
                    "pads": (*begin, *end), "group": e.groups,
                }  # fmt: skip
                if e.transposed:
                    attributes["output_padding"] = tuple(max(-p, 0) for p in end)
                    attributes["pads"] = (*begin, *(max(p, 0) for p in end))
                return self._node("ConvTranspose" if e.transposed else "Conv", inputs, output, **attributes)
            case Conv():
                return self._linear(e, output)
            case Scale():
                return self._scale(e, output)
            case BatchNorm():
                arrays = {"scale": e.gamma, "bias": e.beta, "mean": e.mean, "var": e.var}
                inputs = [self._value(e.x), *(self._parameter(kind, a) for kind, a in arrays.items())]
                return self._node("BatchNormalization", inputs, output, epsilon=e.eps)
            case Sum():
                return self._sum(e, output)
            case Concat():
                return self._node("Concat", [self._value(t) for t in e.terms], output, axis=self._axis(e))
            case Select():
                return self._select(e, output)
            case Layout():
                return self._layout(self._value(e.x), e.op, output)
            case _:
                raise AssertionError(f"{type(e).__name__} is never emitted")

    def _layout(self, x: str, op: LayoutOp, output: str | None) -> str:
        match op:
            case Permute(axes=axes):
                return self._node("Transpose", [x], output, perm=axes)
            case Take(axis=axis, at=at):
                index = self.graph.add_initializer(f"{self.base}.index", np.array(at), np.dtype(np.int64))
                return self._node("Gather", [x, index], output, axis=axis)
            case Mean():
                return self._mean(x, op, output)
            case Reshape():
                return self._reshape(x, op, output)

    def _weightless(self, e: Conv, output: str | None) -> str | None:
        """A padding and a slice, or a pooling; None where this opset, or ONNX Runtime, has none like it."""
        begin, end = e.padding
        x, opset = self._value(e.x), self.graph.opset
        if any(k != 1 for k in e.kernel):
            too_wide = any(p >= k for p, k in zip((*begin, *end), (*e.kernel, *e.kernel), strict=True))
            padded, spread = any((*begin, *end)), any(d != 1 for d in e.dilation)
            if e.skips_border or too_wide or (padded and opset < 7) or (spread and opset < 19):
                return None
            attributes: dict[str, Any] = {"kernel_shape": e.kernel, "strides": e.stride}
            attributes |= {"pads": (*begin, *end), "count_include_pad": 1} if padded else {}
            attributes |= {"dilations": e.dilation} if spread else {}
            return self._node("AveragePool", [x], output, **attributes)
        cut = [max(0, -p) for p in begin], [max(0, -p) for p in end]
        slices = any(cut[0]) or any(cut[1]) or any(s != 1 for s in e.stride)
        if slices and opset < 10:
            return None
        if any(p > 0 for p in (*begin, *end)):
            x = self._pad(x, begin, end, None if slices else output)
        return self._slice(x, *cut, e.stride, output) if slices else x

    def _pad(self, x: str, begin: Ints, end: Ints, output: str | None) -> str:
        pads = [0, 0, *(max(p, 0) for p in begin), 0, 0, *(max(p, 0) for p in end)]
        if self.graph.opset < 11:
            return self._node("Pad", [x], output, pads=pads)
        return self._node("Pad", [x, self.graph.add_integers(f"{self.base}.pads", pads)], output)

    def _slice(self, x: str, begin: Sequence[int], end: Sequence[int], steps: Ints, output: str | None) -> str:
        bounds = {
            "starts": begin,
            "ends": [-n or np.iinfo(np.int64).max for n in end],
            "axes": range(2, 2 + len(steps)),
            "steps": steps,
        }
        names = [self.graph.add_integers(f"{self.base}.{key}", [*values]) for key, values in bounds.items()]
        return self._node("Slice", [x, *names], output)

    def _mean(self, x: str, op: Mean, output: str | None) -> str:
        if op.keep and op.rank > 2 and op.axes == tuple(range(2, op.rank)) and self.splice.dtype != np.float64:
            return self._node("GlobalAveragePool", [x], output)
        if self.graph.opset < 18:
            return self._node("ReduceMean", [x], output, axes=op.axes, keepdims=int(op.keep))
        axes = self.graph.add_integers(f"{self.base}.axes", op.axes)
        return self._node("ReduceMean", [x, axes], output, keepdims=int(op.keep))

    def _reshape(self, x: str, op: Reshape, output: str | None) -> str:
        node = self.graph.producers.get(str(op.native))
        if node is not None and self.graph.reshapes(node) == op:
            copy = NodeProto.FromString(node.SerializeToString())
            copy.name = self.graph.names.fresh(f"{node.name}/fused") if node.name else ""
            copy.input[0] = x
            copy.output[0] = output or self.graph.names.fresh(f"{op.native}_fused")
            self.nodes.append(copy)
            return copy.output[0]
        sizes = sizes_after(op.before, op.after)
        assert sizes is not None, f"the sizes of {op} are not told by its operand"
        if self.graph.opset < 5:
            return self._node("Reshape", [x], output, shape=sizes)
        return self._node("Reshape", [x, self.graph.add_integers(f"{self.base}.shape", sizes)], output)

    def _axis(self, e: Concat | Select) -> int:
        """The channel axis, from the left: early opsets know no other."""
        return (self._rank(e) or 0) + e.axis

    def _select(self, e: Select, output: str | None) -> str:
        x, axis, first, end = self._value(e.x), self._axis(e), e.index[0], e.index[-1] + 1
        if e.index != tuple(range(first, end)) or self.graph.opset < 10:
            index = self.graph.add_integers(f"{self.base}.index", e.index)
            return self._node("Gather", [x, index], output, axis=axis)
        name = self._node("Slice", [x], output)  # its bounds follow when all slices are known
        self.graph.slices.setdefault((x, axis), []).append(((first, end, e.width), self.nodes[-1]))
        return name

    def _rows(self, e: Conv, output: str | None) -> str:
        inputs = [self._parameter("weight", regroup(e, 1)[..., 0]), self._value(e.x)]
        if e.bias is None:
            return self._node("MatMul", inputs, output)
        return self._node("Add", [self._node("MatMul", inputs, None), self._parameter("bias", e.bias[:, None])], output)

    def _linear(self, e: Conv, output: str | None) -> str:
        x = self._value(e.x)
        weight = regroup(e, 1)
        if self._rank(e.x) == 2 and (e.bias is not None or self.graph.opset >= 11):
            inputs = [x, self._parameter("weight", weight)]
            inputs += [self._parameter("bias", e.bias)] if e.bias is not None else []
            return self._node("Gemm", inputs, output, transB=1)
        inputs = [x, self._parameter("weight", weight.T)]
        if e.bias is None:
            return self._node("MatMul", inputs, output)
        return self._node("Add", [self._node("MatMul", inputs, None), self._parameter("bias", e.bias)], output)

    def _scale(self, e: Scale, output: str | None) -> str:
        if is_negation(e):
            return self._node("Neg", [self._value(e.x)], output)
        ones = (1,) * (-1 - (e.axis or -1))
        factor = (
            self._parameter("scale", e.scale.reshape(-1, *ones) if e.scale.ndim else e.scale)
            if np.any(e.scale != 1)
            else None
        )
        term = (
            self._parameter("shift", e.shift.reshape(-1, *ones) if e.shift.ndim else e.shift)
            if np.any(e.shift)
            else None
        )
        y = self._value(e.x)
        if factor or not term:
            y = self._node("Mul", [y, factor or self._parameter("scale", ONE)], None if term else output)
        return self._node("Add", [y, term], output) if term else y

    def _sum(self, e: Sum, output: str | None) -> str:
        ordered = sorted(e.terms, key=lambda t: t not in self.names and is_negation(t))
        y = self._value(ordered[0])
        for t, after in zip_longest(ordered[1:], ordered[2:]):
            op, addend = "Add", t
            if t not in self.names and isinstance(t, Scale) and is_negation(t):
                op, addend = "Sub", t.x
            y = self._node(op, [y, self._value(addend)], None if after else output)
        return y

    def _rank(self, e: Expr) -> int | None:
        while True:
            match e:
                case Source():
                    return self.graph.types.rank(str(e.key))
                case Layout(op=op):
                    return ranks(op)[1]
                case _:
                    e = e.children[0]

    def _value(self, e: Expr) -> str:
        if e not in self.names:
            self.names[e] = self._emit(e, None)  # a negation that no sum absorbs
        return self.names[e]

    def _parameter(self, kind: str, array: Array) -> str:
        return self.graph.add_initializer(f"{self.base}.{kind}", array, self.splice.dtype)

    def _node(self, op: str, inputs: list[str], output: str | None, **attributes: Any) -> str:
        output = output or self.graph.names.fresh(f"{self.base}_{op.lower()}")
        name = self.graph.names.fresh(f"{self.base}/fused_{op}")
        node = helper.make_node(op, inputs, [output], name, doc_string=self.note, **attributes)
        if (origin := self._origin(op)) is not None:
            node.metadata_props.extend(origin.metadata_props)
            node.doc_string = "\n".join(filter(None, (self.note, origin.doc_string)))
        self.nodes.append(node)
        return output

    def _origin(self, op: str) -> NodeProto | None:
        """The node that a new one says it is from: the last of the same operator in the region, or its root."""
        members = [self.graph.producers[str(v)] for v in self.splice.members]
        return next((node for node in reversed(members) if node.op_type == op), members[-1] if members else None)

"""The ONNX adapter: linear operators of a main graph as expressions, and expressions as operators.

Nodes that no rewrite touches are never rebuilt: they keep their names, doc strings and metadata.
Bodies of If, Loop and Scan and local functions are left alone; what they capture counts as read.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, cast

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper

from reparamc.expr import (
    ONE,
    ZERO,
    Array,
    BatchNorm,
    Conv,
    Expr,
    Layout,
    Permute,
    Reshape,
    Scale,
    Source,
    Sum,
    is_negation,
)
from reparamc.kernel import regroup
from reparamc.onnx_values import (
    Constants,
    Names,
    Types,
    attribute,
    commit,
    defined_names,
    is_standard,
    readers,
)
from reparamc.region import Reading, Splice, Value, layout_reading, new_nodes
from reparamc.rewrite import Declined

ACTIVATION = "a scalar constant behind a non-linear operator may belong to an activation that runtimes fuse"
NORMALISATION = "it belongs to a normalisation that runtimes fuse"


class OnnxGraph:
    """`reparamc.region.Graph` over the main graph of a model. Values are tensor names."""

    def __init__(self, model: ModelProto) -> None:
        self.model = model
        self.nodes = list(model.graph.node)
        self.constants = Constants(model)
        self.types = Types(model)
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.producers = {name: node for node in self.nodes for name in node.output if name}
        self._readers = readers(model.graph)
        self._readings: dict[str, Reading | Declined | None] = {}
        self.names = Names(defined_names(model.graph))
        self._inserted: dict[str, list[NodeProto]] = {}
        self._initializers: list[TensorProto] = []
        self._replaced: set[str] = set()
        self._suspects: set[str] = set()

    # Reading

    def values(self) -> Sequence[str]:
        return [
            node.output[0]
            for node in self.nodes
            if node.output and node.output[0] and node.output[0] not in self.constants
        ]

    def name(self, value: Value) -> str:
        node = self.producers.get(str(value))
        return node.name if node is not None and node.name else str(value)

    def readers(self, value: Value) -> Sequence[Value | None]:
        return [node and node.output[0] for node in self._readers.get(str(value), [])]

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        dtypes = {self.types.dtype(str(v)) for v in members}
        return dtypes.pop() if len(dtypes) == 1 else None

    def source(self, value: Value) -> Source:
        return Source(value, shape=self.types.shape(str(value)))

    def obstacle(self, root: Value, members: Sequence[Value], sources: Sequence[Value]) -> str | None:
        return None

    def read(self, value: Value) -> Reading | Declined | None:
        name = str(value)
        if name not in self._readings:
            node = self.producers[name]
            reader = READERS.get(node.op_type) if is_standard(node) else None
            floating = self.types.dtype(name) is not None
            self._readings[name] = reader(self, node) if reader and floating else None
        return self._readings[name]

    def frame(self, name: str) -> int | None:
        """The frame of ``name``, where a linear operator fixes it."""
        reading = self.read(name) if name in self.producers else None
        return reading.frame if isinstance(reading, Reading) else None

    def constant(self, node: NodeProto, position: int) -> str | None:
        """The name of the constant operand at ``position``; None when it is absent or no constant."""
        name = operand(node, position)
        return name if name is not None and name in self.constants else None

    def array(self, name: str) -> Array:
        return self.constants.array(name).astype(np.float64)

    # Writing

    def splice(self, splice: Splice) -> None:
        root = str(splice.root)
        emitter = _Emitter(self, splice, root)
        self._inserted[root] = emitter.run()
        self._replaced.add(root)
        self._suspects.update(str(v) for v in splice.members)

    def add_initializer(self, wanted: str, array: Array, dtype: np.dtype) -> str:
        name = self.names.fresh(wanted)
        self._initializers.append(numpy_helper.from_array(np.asarray(array, dtype, order="C"), name))
        return name

    def finish(self) -> None:
        """Carry out all splices in one edit of the model."""
        if not self._replaced:
            return
        nodes: list[NodeProto] = []
        for node in self.nodes:
            root = next((name for name in node.output if name in self._replaced), None)
            nodes.extend([node] if root is None else self._inserted[root])
        commit(self.model, nodes, self._initializers, self._suspects)


def operand(node: NodeProto, position: int) -> str | None:
    """The name of the operand at ``position``; None when it is absent or empty."""
    return node.input[position] or None if position < len(node.input) else None


# Readers: one function per operator, from a node to a `Reading`.

Reader = Callable[[OnnxGraph, NodeProto], "Reading | Declined | None"]


def _read_conv(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    weight, bias = graph.constant(node, 1), graph.constant(node, 2)
    if weight is None:
        return Declined(_not_constant(graph, node, 1))
    if operand(node, 2) and bias is None:
        return Declined(_not_constant(graph, node, 2))
    kernel = graph.constants.shape(weight)[2:]
    n = len(kernel)
    stride = tuple(cast(list[int], attribute(node, "strides", [1] * n)))
    dilation = tuple(cast(list[int], attribute(node, "dilations", [1] * n)))
    groups = cast(int, attribute(node, "group", 1))
    pads = _pads(graph, node, kernel, stride, dilation)
    if isinstance(pads, Declined):
        return pads
    if bias is not None and graph.constants.shape(bias) != graph.constants.shape(weight)[:1]:
        return Declined("its bias does not fit its weight")
    channels = _channels(graph, node.input[0], n)
    if channels is not None and channels != graph.constants.shape(weight)[1] * groups:
        return Declined("its weight does not fit the channels of its input")
    begin, end = pads[:n], pads[n:]
    offset = tuple(-b for b in begin)
    delta = tuple(d * (k - 1) - b - e for d, k, b, e in zip(dilation, kernel, begin, end, strict=True))

    def build(operands: Sequence[Expr]) -> Expr:
        b = graph.array(bias) if bias else None
        return Conv(operands[0], graph.array(weight), b, stride, dilation, offset, delta, groups)

    return Reading((node.input[0],), build, _names(weight, bias), n)


def _pads(
    graph: OnnxGraph,
    node: NodeProto,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...] | Declined:
    n = len(kernel)
    auto = cast(bytes, attribute(node, "auto_pad", b"NOTSET")).decode()
    if auto == "NOTSET":
        return tuple(cast(list[int], attribute(node, "pads", [0] * 2 * n)))
    if auto == "VALID":
        return (0,) * 2 * n
    shape = graph.types.shape(node.input[0])
    totals = []
    for axis in range(n):
        reach = dilation[axis] * (kernel[axis] - 1)
        extent = shape[2 + axis].known if shape is not None and len(shape) == n + 2 else None
        if stride[axis] != 1 and extent is None:
            return Declined(f"auto_pad {auto} with stride {stride[axis]} pads differently for different input sizes")
        outs = -(-(extent or 1) // stride[axis])
        totals.append(max(0, (outs - 1) * stride[axis] + reach + 1 - (extent or 1)) if stride[axis] != 1 else reach)
    begin = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]
    return (*begin, *(t - b for t, b in zip(totals, begin, strict=True)))


def _read_batchnorm(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    if cast(int, attribute(node, "training_mode", 0)) or any(node.output[1:]):
        return Declined("BatchNormalization is in training mode")
    if graph.opset < 9 and cast(int, attribute(node, "spatial", 1)) != 1:
        return Declined("BatchNormalization keeps statistics per position (spatial=0)")
    names = [graph.constant(node, i) for i in range(1, 5)]
    if None in names:
        return Declined(_not_constant(graph, node, 1 + names.index(None)))
    parameters = [name for name in names if name]
    rank = graph.types.rank(node.input[0])
    if rank is None:
        return Declined("the rank of its input is unknown")
    frame = max(rank - 2, 0)
    counts = {graph.constants.shape(name) for name in parameters} | (
        {(c,)} if (c := _channels(graph, node.input[0], frame)) else set()
    )
    if len(counts) != 1:
        return Declined("its parameters do not fit the channels of its input")
    eps = cast(float, attribute(node, "epsilon", np.float32(1e-5)))  # attributes are float32

    def build(operands: Sequence[Expr]) -> Expr:
        gamma, beta, mean, var = (graph.array(name) for name in parameters)
        return BatchNorm(operands[0], gamma, beta, mean, var, float(eps), frame)

    return Reading((node.input[0],), build, tuple(parameters), frame)


def _read_arithmetic(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    """Add, Sub, Mul, Div of two values or of a value and a constant that varies along one axis."""
    fixed = [graph.constant(node, 0), graph.constant(node, 1)]
    if all(fixed):
        return None
    if not any(fixed):
        return _read_sum(graph, node) if node.op_type in ("Add", "Sub") else None
    side = 1 if fixed[1] else 0
    constant, value = cast(str, fixed[side]), node.input[1 - side]
    if node.op_type == "Div" and side == 0:
        return None
    found = _along_one_axis(graph, constant, value)
    if isinstance(found, Declined):
        return found
    frame = found
    if reason := _protected(graph, node, value, scalar=frame is None):
        return Declined(reason)
    op = node.op_type

    def build(operands: Sequence[Expr]) -> Expr:
        c = graph.array(constant).reshape(() if frame is None else -1)
        with np.errstate(divide="ignore"):
            scale, shift = {
                "Add": (ONE, c),
                "Sub": (ONE, -c) if side else (-ONE, c),
                "Mul": (c, ZERO),
                "Div": (1 / c, ZERO),
            }[op]
        return Scale(operands[0], scale, shift, frame)

    return Reading((value,), build, (constant,), graph.frame(value) if frame is None else frame)


def _along_one_axis(graph: OnnxGraph, constant: str, value: str) -> int | Declined | None:
    """The frame of the axis along which ``constant`` varies; None for one number; Declined if it may broadcast."""
    dims, shape = graph.constants.shape(constant), graph.types.shape(value)
    if shape is None:
        return None if not dims else Declined("the rank of its operand is unknown")
    if len(dims) > len(shape):
        return Declined("its constant raises the rank")
    axes = [len(dims) - 1 - i for i, d in enumerate(dims) if d != 1]
    if len(axes) > 1:
        return Declined("its constant varies along several axes")
    if axes and shape[len(shape) - 1 - axes[0]].known != dims[len(dims) - 1 - axes[0]]:
        return Declined("its constant may broadcast its operand")
    return axes[0] if axes else None


def _protected(graph: OnnxGraph, node: NodeProto, value: str, *, scalar: bool) -> str | None:
    """Why the constant of ``node`` belongs to a pattern that runtimes fuse by themselves; None when it does not.

    GELU, SiLU, HardSwish and the scale inside attention end in a scalar behind something non-linear;
    LayerNorm and RMSNorm end in a scale, and a shift, behind a division by a square root.
    """
    producer = graph.producers.get(value)
    if scalar:
        readers = graph._readers.get(value, [])
        clipped = any(r is not None and r.op_type == "Clip" for r in graph._readers.get(node.output[0], []))
        if clipped and node.op_type in ("Add", "Sub"):
            return ACTIVATION
        linear = producer is None or value in graph.constants or isinstance(graph.read(value), Reading)
        return None if linear and readers else ACTIVATION
    if producer is not None and producer.op_type == "Mul" and node.op_type == "Add":
        source = next((name for name in producer.input if name not in graph.constants), None)
        producer = graph.producers.get(source) if source else None
    if producer is not None and producer.op_type in ("Div", "Mul"):
        roots = [graph.producers.get(name) for name in producer.input]
        deep = [
            graph.producers.get(r.input[0])
            for r in roots
            if r is not None and r.op_type in ("Reciprocal", "Expand") and r.input
        ]
        if any(r is not None and r.op_type in ("Sqrt", "Reciprocal", "ReduceL2", "Rsqrt") for r in (*roots, *deep)):
            return NORMALISATION
    return None


def _read_sum(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    names = list(node.input)
    if not names or any(name in graph.constants for name in names):
        return None
    shapes = {graph.types.extents(name) for name in names} - {None}
    if len(shapes) > 1 or len({graph.types.rank(name) for name in names}) > 1:
        return None  # one operand is broadcast
    negative = node.op_type == "Sub"

    def build(operands: Sequence[Expr]) -> Expr:
        if negative:
            return Sum((operands[0], Scale(operands[1], -ONE, ZERO)))
        return Sum(tuple(operands)) if len(operands) > 1 else operands[0]

    frame = next((f for name in names if (f := graph.frame(name)) is not None), None)
    return Reading(tuple(names), build, (), frame)


def _read_neg(graph: OnnxGraph, node: NodeProto) -> Reading:
    return Reading((node.input[0],), lambda operands: Scale(operands[0], -ONE, ZERO), (), graph.frame(node.input[0]))


def _read_identity(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    return Reading((node.input[0],), lambda operands: operands[0], (), graph.frame(node.input[0]))


def _read_dropout(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    mask_read = len(node.output) > 1 and graph._readers.get(node.output[1])
    training = operand(node, 2)
    live = training is not None and (training not in graph.constants or bool(graph.constants.array(training).any()))
    if mask_read or live or graph.opset < 7:
        return Declined("Dropout is in training mode, or its mask is read")
    return _read_identity(graph, node)


def _read_gemm(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    weight, bias = graph.constant(node, 1), graph.constant(node, 2)
    if cast(int, attribute(node, "transA", 0)):
        return Declined("Gemm with transA mixes the batch")
    if weight is None:
        return Declined(_not_constant(graph, node, 1))
    if operand(node, 2) and bias is None:
        return Declined(_not_constant(graph, node, 2))
    transposed = cast(int, attribute(node, "transB", 0))
    out = graph.constants.shape(weight)[0 if transposed else 1]
    if bias is not None and graph.constants.shape(bias) not in ((), (1,), (1, 1), (out,), (1, out)):
        return Declined("the bias of Gemm varies along the batch")
    alpha, beta = (float(cast(float, attribute(node, key, 1.0))) for key in ("alpha", "beta"))

    def build(operands: Sequence[Expr]) -> Expr:
        w = graph.array(weight) * alpha
        b = np.broadcast_to(graph.array(bias).reshape(-1) * beta, (out,)).copy() if bias else None
        return Conv(operands[0], w if transposed else w.T, b)

    return Reading((node.input[0],), build, _names(weight, bias), 0)


def _read_matmul(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    weight = graph.constant(node, 1)
    if weight is None or graph.constant(node, 0) is not None:
        return None
    if len(graph.constants.shape(weight)) != 2:
        return Declined("its constant is not a matrix")
    return Reading((node.input[0],), lambda operands: Conv(operands[0], graph.array(weight).T, None), (weight,), 0)


def _read_layout(graph: OnnxGraph, node: NodeProto) -> Reading | Declined | None:
    before, after = graph.types.shape(node.input[0]), graph.types.shape(node.output[0])
    if before is None or after is None:
        return None
    if node.op_type == "Transpose":
        axes = tuple(cast(list[int], attribute(node, "perm", list(reversed(range(len(before)))))))
        op: Permute | Reshape = Permute(axes)
    else:
        op = Reshape(before, after)
    return layout_reading(node.input[0], op, graph.frame(node.input[0]), node.output[0])


def _channels(graph: OnnxGraph, name: str, frame: int) -> int | None:
    shape = graph.types.shape(name)
    return shape[len(shape) - 1 - frame].known if shape is not None and len(shape) > frame else None


def _not_constant(graph: OnnxGraph, node: NodeProto, position: int) -> str:
    name = operand(node, position)
    if name in graph.constants.overridable:
        return f"its parameter {name!r} is a graph input that a caller may override"
    return f"its parameter {name!r} is computed at run time"


def _names(*names: str | None) -> tuple[str, ...]:
    return tuple(name for name in names if name)


READERS: dict[str, Reader] = {
    "Conv": _read_conv,
    "BatchNormalization": _read_batchnorm,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _read_arithmetic),
    "Sum": _read_sum,
    "Neg": _read_neg,
    "Identity": _read_identity,
    "Dropout": _read_dropout,
    **dict.fromkeys(("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"), _read_layout),
}


class _Emitter:
    """The nodes that compute one splice."""

    def __init__(self, graph: OnnxGraph, splice: Splice, root: str) -> None:
        self.graph, self.splice, self.root = graph, splice, root
        self.nodes: list[NodeProto] = []
        self.names: dict[Expr, str] = {e: str(v) for e, v in splice.native.items()}
        self.note = f"reparamc: {', '.join(splice.counts)}"

    def run(self) -> list[NodeProto]:
        top = self.splice.expr
        for e in new_nodes(self.splice):
            if e is top or not is_negation(e):  # sums subtract instead
                self.names[e] = self._emit(e, self.root if e is top else None)
        if top in self.splice.native:
            self._node("Identity", [self.names[top]], self.root)
        return self.nodes

    def _emit(self, e: Expr, output: str | None) -> str:
        match e:
            case Conv() if e.frame:
                begin, end = e.padding
                inputs = [self._value(e.x), self._parameter("weight", e.weight)]
                inputs += [self._parameter("bias", e.bias)] if e.bias is not None else []
                attributes: dict[str, Any] = {
                    "kernel_shape": e.kernel, "strides": e.stride, "dilations": e.dilation,
                    "pads": (*begin, *end), "group": e.groups,
                }  # fmt: skip
                return self._node("Conv", inputs, output, **attributes)
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
            case Layout():
                node = self.graph.producers[str(e.token)]
                copy = NodeProto.FromString(node.SerializeToString())
                copy.name = self.graph.names.fresh(f"{node.name}/fused") if node.name else ""
                copy.input[0] = self._value(e.x)
                copy.output[0] = output or self.graph.names.fresh(f"{e.token}_fused")
                self.nodes.append(copy)
                return copy.output[0]
            case _:
                raise AssertionError(f"{type(e).__name__} is never emitted")

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
        ones = (1,) * (e.frame or 0)
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
                case Layout():
                    return len(e.op.axes) if isinstance(e.op, Permute) else len(e.op.after)
                case _:
                    e = e.children[0]

    def _value(self, e: Expr) -> str:
        if e not in self.names:
            self.names[e] = self._emit(e, None)  # a negation that no sum absorbs
        return self.names[e]

    def _parameter(self, kind: str, array: Array) -> str:
        return self.graph.add_initializer(f"{self.root}.{kind}", array, self.splice.dtype)

    def _node(self, op: str, inputs: list[str], output: str | None, **attributes: Any) -> str:
        output = output or self.graph.names.fresh(f"{self.root}_{op.lower()}")
        name = self.graph.names.fresh(f"{self.root}/fused_{op}")
        self.nodes.append(helper.make_node(op, inputs, [output], name, doc_string=self.note, **attributes))
        return output

"""Certificates of ONNX models: how each operator is read as an affine map, from the specification alone.

See `proof` for what is proven, and `normal_form` for the algebra. Only the main graph is read;
operators with bodies, functions and other domains are atoms, and so is all that is not listed in `READERS`.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from itertools import product
from math import prod
from typing import cast

import numpy as np
from onnx import AttributeProto, ModelProto, NodeProto, ValueInfoProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

import reparamc.certificate.kernels as nk
import reparamc.certificate.layouts as nl
import reparamc.certificate.normal_form as nf
from reparamc.certificate.agreement import Precision
from reparamc.certificate.axes import Extent, Unrepresentable
from reparamc.certificate.kernels import Kernel
from reparamc.certificate.normal_form import Array, Value
from reparamc.certificate.proof import Certificate, Window, certify, same_bytes
from reparamc.onnx.values import Types, attribute, skeleton

PRECISIONS = {
    "float64": Precision(2.0**-53, 2.0**-1075),
    "float32": Precision(2.0**-24, 2.0**-150),
    "float16": Precision(2.0**-11, 2.0**-25),
    "bfloat16": Precision(2.0**-8, 2.0**-134),
}

RANDOM = {
    "Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike",
}  # fmt: skip
"""Operators whose result is not decided by their operands."""

MIXING = {"AveragePool", "Conv", "ConvTranspose", "Gemm", "MatMul"}
"""Operators with a kernel or a matrix."""

OLDEST = 7
"""The operator set from which on the readings here hold; before it, an attribute names the axis of a broadcast."""

MISREAD = {"BatchNormalization": 14, "ConvTranspose": None}
"""Operators that the reference implementation of ONNX computes otherwise than the standard says, before a version."""


def certify_onnx(original: ModelProto, result: ModelProto) -> Certificate:
    """Prove that ``result`` computes what ``original`` does, for every input size.

    Parameters of ``result`` may be off by the rounding of their dtype. Neither model is run.
    """
    _keep_what_is_freed()
    after = _Side(result)
    # A tensor has the extents in the original that it has in the result, once it is proven to be the same.
    before = _Side(original, after)
    computed = set(before.order)
    stands_for = {name: name for name in after.order if name in computed}
    stands_for.update({v.name: v.name for v in result.graph.input if v.name in before.inputs})
    outputs = [(o.name, o.name) for o in result.graph.output]
    return certify(before, after, outputs, stands_for, after.precision, _outside(original, result))


def _keep_what_is_freed() -> None:
    """Have the arrays of each window lie where those of the last one lay.

    The C library of Linux hands large blocks back when they are freed, and the system has to clear every page of the
    next. Once a larger one was freed, it keeps them.
    """
    np.empty(2**25 - 2**16, np.uint8)


def _outside(original: ModelProto, result: ModelProto) -> list[Window]:
    """What a caller would see differ: inputs, outputs, operator sets."""
    found = []
    for what in ("input", "output"):
        lists = [[(v.name, v.type.SerializeToString()) for v in getattr(m.graph, what)] for m in (original, result)]
        if original.ir_version < 4 and what == "input":  # every initializer is listed among the inputs
            lists = [
                [v for v in values if v[0] not in {i.name for i in m.graph.initializer}]
                for values, m in zip(lists, (original, result), strict=True)
            ]
        if lists[0] != lists[1]:
            found.append(Window(what, "different", np.inf, np.inf, f"the {what}s of the graph differ"))
    if (name := _other_default(original, result)) is not None:
        found.append(Window("input", "different", np.inf, np.inf, f"the default of the input {name!r} differs"))
    versions = [{(o.domain, o.version) for o in m.opset_import} for m in (original, result)]
    if versions[0] != versions[1]:
        found.append(Window("opset", "different", np.inf, np.inf, "the operator sets differ"))
    if [f.SerializeToString() for f in original.functions] != [f.SerializeToString() for f in result.functions]:
        found.append(Window("functions", "different", np.inf, np.inf, "the local functions differ"))
    return found


def _other_default(original: ModelProto, result: ModelProto) -> str | None:
    """The first input that a caller may leave out in one of the two, or that has another value then."""
    defaults = []
    for m in (original, result):
        inputs = {v.name for v in m.graph.input} if m.ir_version >= 4 else set()
        defaults.append({t.name: t for t in m.graph.initializer if t.name in inputs})
    for name in dict.fromkeys((*defaults[0], *defaults[1])):
        a, b = (d.get(name) for d in defaults)
        if a is None or b is None or not same_bytes(numpy_helper.to_array(a), numpy_helper.to_array(b)):
            return name
    return None


class _Side:
    """`certify.Side` over the main graph of a model."""

    def __init__(self, model: ModelProto, other: _Side | None = None) -> None:
        graph = model.graph
        self.model, self.described = model, model if other is None else _informed(model, other)
        self.types = Types(self.described)
        self.inferred = self.types if other is None else None
        self.which = "emitted" if other is None else "original"
        # Unknowns that both graphs name alike; others are numbered by shape inference.
        self.symbols = {d.dim_param for v in graph.input for d in v.type.tensor_type.shape.dim if d.dim_param}
        self.opset = next((o.version for o in model.opset_import if o.domain in ("", "ai.onnx")), 1)
        self.inputs = {v.name for v in graph.input}
        self.producers = {name: (node, at) for node in graph.node for at, name in enumerate(node.output) if name}
        overridable = self.inputs if model.ir_version >= 4 else set()
        self.tensors = {t.name: t for t in graph.initializer if t.name not in overridable}
        self.arrays: dict[str, Array] = {}
        self._kinds: dict[str, Hashable] = {}
        self._operands: dict[str, Sequence[str]] = {}
        self.constants = self._constants()
        self._infer_further()
        sparse = (t.values.name for t in graph.sparse_initializer)
        self.known = {*self.inputs, *self.producers, *self.tensors, *sparse}
        self.order = [name for node in graph.node for name in node.output if name and name not in self.constants]

    # Constants

    def _constants(self) -> set[str]:
        """The names of all tensors that no input reaches."""
        found = set(self.tensors)
        for node in self.model.graph.node:
            standard = node.domain in ("", "ai.onnx")
            if not standard or node.op_type in RANDOM or _has_body(node):
                continue
            if node.op_type == "Constant":
                if _constant_array(node) is not None:
                    found.update(node.output)
            elif self._shape(node) is not None or self._picked(node) is not None:
                found.update(node.output)
            elif self._is_misread(node):
                continue
            elif node.input and all(name in found for name in node.input if name):
                found.update(name for name in node.output if name)
        return found

    def _is_misread(self, node: NodeProto) -> bool:
        right_from = MISREAD.get(node.op_type, 0)
        return right_from is None or self.opset < right_from

    def _shape(self, node: NodeProto) -> tuple[int, ...] | None:
        """The extents that a Shape reads from declared ones, whatever its operand is."""
        return self.types.extents(node.input[0]) if node.op_type == "Shape" else None

    def _is_computed(self, name: str) -> bool:
        return name in self.producers and self.producers[name][0].op_type != "Constant"

    def _picked(self, node: NodeProto) -> Array | None:
        """What a Gather or Slice picks of declared extents, of which others may be unknown."""
        made, _ = self.producers.get(node.input[0], (node, 0)) if node.input else (node, 0)
        is_pick = node.op_type in ("Gather", "Slice") and len(node.input) > 1
        if not is_pick or made.op_type != "Shape" or made.domain not in ("", "ai.onnx"):
            return None
        shape = self.types.shape(made.input[0])
        given = [self._stored(name) for name in node.input[1:]]
        if shape is None or any(g is None for g, name in zip(given, node.input[1:], strict=True) if name):
            return None
        first, last = cast(int, attribute(made, "start", 0)), cast("int | None", attribute(made, "end"))
        extents = [d.known for d in shape[first:last]]
        index = given[0]
        if node.op_type == "Slice":
            start, end, _, step = (None if g is None else int(g.item()) for g in [*given, None, None][:4])
            if step is not None and step < 1:
                return None
            index = np.arange(len(extents))[start:end:step]
        assert index is not None
        places = [int(i) for i in index.reshape(-1)]
        if not all(-len(extents) <= i < len(extents) for i in places):
            return None
        found = [extents[i] for i in places]
        return None if None in found else np.array(found, np.int64).reshape(index.shape)

    def _stored(self, name: str) -> Array | None:
        """The value of a constant that no operator computes; None for all others."""
        if name in self.tensors:
            return numpy_helper.to_array(self.tensors[name])
        node, _ = self.producers.get(name, (None, 0))
        is_constant = node is not None and node.op_type == "Constant" and node.domain in ("", "ai.onnx")
        return _constant_array(node) if node is not None and is_constant else None

    def _infer_further(self) -> None:
        """Infer shapes again where what decides them is a constant to be computed, until nothing is added."""
        given: dict[str, Array] = {}
        while True:
            named = {
                name
                for node in self.model.graph.node
                if node.op_type in ("Expand", "Pad", "Reshape", "Slice") and self.types.extents(node.output[0]) is None
                for name in node.input[1:]
                if name in self.constants and name not in given and self._is_computed(name)
            }
            for name in named:
                try:
                    array = self.constant(name)
                except Unrepresentable:
                    continue
                if array is not None and array.dtype == np.int64 and array.size <= 16:
                    given[name] = array
            if named.isdisjoint(given):
                return
            self.types = Types(_with_constants(self.described, given))
            self.constants = self._constants()

    def constant(self, name: str) -> Array | None:
        if name not in self.constants:
            return None
        if name in self.tensors:  # read again where it is read again: the weights need not all be held twice
            return numpy_helper.to_array(self.tensors[name])
        stack = [name]
        while stack:
            top = stack[-1]
            if top in self.arrays:
                stack.pop()
            elif top in self.tensors:
                self.arrays[top] = numpy_helper.to_array(self.tensors[top])
            else:
                node, _ = self.producers[top]
                waiting = [n for n in node.input if n and n in self.constants and n not in self.arrays]
                if waiting and self._shape(node) is None and self._picked(node) is None:
                    stack.extend(waiting)
                else:
                    self._compute(node)
        return self.arrays[name]

    def _compute(self, node: NodeProto) -> None:
        """Enter what a node makes of constants."""
        if node.op_type == "Constant":
            self.arrays[node.output[0]] = cast(Array, _constant_array(node))
            return
        if node.op_type == "Identity":
            self.arrays[node.output[0]] = self.arrays[node.input[0]]
            return
        if (extents := self._shape(node)) is not None:
            start, end = cast(int, attribute(node, "start", 0)), cast("int | None", attribute(node, "end"))
            self.arrays[node.output[0]] = np.array(extents[start:end], np.int64)
            return
        if (picked := self._picked(node)) is not None:
            self.arrays[node.output[0]] = picked
            return
        feeds = {name: self.arrays[name] for name in node.input if name}
        inputs = [
            helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
            for name, a in feeds.items()
        ]
        outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
        body = helper.make_graph([node], "constant", inputs, outputs)
        made = helper.make_model(body, opset_imports=self.model.opset_import, ir_version=self.model.ir_version)
        try:
            with np.errstate(all="ignore"):
                results = cast("list[Array]", ReferenceEvaluator(made).run(None, feeds))
        except Exception as error:  # the reference lacks an operator or a type
            raise Unrepresentable(f"the constant {node.output[0]!r} cannot be computed") from error
        self.arrays.update(zip((n for n in node.output if n), map(np.asarray, results), strict=True))

    # The protocol

    def operands(self, name: str) -> Sequence[str]:
        """Operands by position, and what the bodies of an operator capture."""
        if name not in self.producers:
            return ()
        if name not in self._operands:
            node, _ = self.producers[name]
            given = [n for n in node.input if n]
            captured = _captured(node) if _has_body(node) else ()
            self._operands[name] = [*given, *(n for n in captured if n in self.known)]
        return self._operands[name]

    def kind(self, name: str) -> Hashable:
        if name not in self.producers:
            return None
        if name not in self._kinds:
            self._kinds[name] = self._kind(name)
        return self._kinds[name]

    def _kind(self, name: str) -> Hashable:
        node, at = self.producers[name]
        domain = ("" if node.domain == "ai.onnx" else node.domain, node.overload)
        attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
        absent = tuple(bool(n) for n in node.input)
        if node.op_type in RANDOM or _has_body(node):  # only the very same node, by its name, may be the same
            return (domain, node.op_type, attributes, absent, at, len(node.output), tuple(node.output))
        return (domain, node.op_type, attributes, absent, at, len(node.output))

    def is_input(self, name: str) -> bool:
        return name not in self.producers

    def mixes(self, name: str) -> bool:
        return name in self.producers and self.producers[name][0].op_type in MIXING

    def leaf(self, name: str, known_as: str) -> Value:
        shape = self.types.shape(name)
        if shape is None:
            raise Unrepresentable(f"the rank of {name!r} is unknown")
        named = [tuple(s if s in self.symbols else f"{self.which} {s}" for s in d.symbols) for d in shape]
        return nf.leaf(known_as, [Extent(d.factor, tuple(sorted(n))) for d, n in zip(shape, named, strict=True)])

    def value(self, name: str, of: Callable[[str], Value]) -> Value:
        node, at = self.producers[name]
        reader = READERS.get(node.op_type) if node.domain in ("", "ai.onnx") else None
        if reader is None or self.types.dtype(name) is None or self.opset < OLDEST:
            raise Unrepresentable(f"{node.op_type} is not affine")
        return reader(_Call(self, node, at, of))

    def precision(self, name: str) -> Precision:
        dtype = self.types.dtype(name)
        return PRECISIONS["float32" if dtype is None else dtype.name]


def _informed(model: ModelProto, other: _Side) -> ModelProto:
    """``model`` for shape inference: tensors that are computed in another graph, too, have their extents from there."""
    light = skeleton(model)
    given: dict[str, ValueInfoProto] = {}
    nodes: list[NodeProto] = []
    computed = set(other.order)
    for node in model.graph.node:
        names = [name for name in node.output if name]
        found = {name: (other.types.dtype(name), other.types.extents(name)) for name in names}
        if (
            not names
            or not computed.issuperset(names)
            or any(dtype is None or extents is None for dtype, extents in found.values())
        ):
            nodes.append(node)
            continue
        for name, (dtype, extents) in found.items():
            assert dtype is not None
            given[name] = helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(dtype), extents)
    outputs = [o for o in light.graph.output if o.name not in given]
    del light.graph.node[:], light.graph.output[:]
    light.graph.node.extend(nodes)
    light.graph.output.extend(outputs)
    light.graph.input.extend(given.values())
    return light


def _with_constants(model: ModelProto, arrays: Mapping[str, Array]) -> ModelProto:
    """``model`` for shape inference, with ``arrays`` stored instead of computed."""
    light = skeleton(model)
    kept = [node for node in light.graph.node if arrays.keys().isdisjoint(node.output)]
    del light.graph.node[:]
    light.graph.node.extend(kept)
    light.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in arrays.items())
    return light


def _has_body(node: NodeProto) -> bool:
    return any(a.type in (AttributeProto.GRAPH, AttributeProto.GRAPHS) for a in node.attribute)


def _captured(node: NodeProto) -> list[str]:
    """All names that the bodies of ``node`` read, their own among them."""
    found: list[str] = []
    stack = [g for a in node.attribute for g in (a.g, *a.graphs)]
    while stack:
        graph = stack.pop()
        found += [o.name for o in graph.output]
        for inner in graph.node:
            found += inner.input
            stack += [g for a in inner.attribute for g in (a.g, *a.graphs)]
    return list(dict.fromkeys(found))


def _constant_array(node: NodeProto) -> Array | None:
    for a in node.attribute:
        if a.name == "value":
            return numpy_helper.to_array(a.t)
        if a.name in ("value_float", "value_floats"):
            return np.array(helper.get_attribute_value(a), np.float32)
        if a.name in ("value_int", "value_ints"):
            return np.array(helper.get_attribute_value(a), np.int64)
    return None


class _Call:
    """A node, with its operands as values or constants."""

    def __init__(self, side: _Side, node: NodeProto, at: int, of: Callable[[str], Value]) -> None:
        self.side, self.node, self.at, self._of = side, node, at, of

    def name(self, position: int) -> str | None:
        return self.node.input[position] or None if position < len(self.node.input) else None

    def is_constant(self, position: int) -> bool:
        name = self.name(position)
        return name is not None and name in self.side.constants

    def value(self, position: int = 0) -> Value:
        name = self.name(position)
        if name is None or name in self.side.constants:
            raise Unrepresentable("a constant stands where a value is read")
        return self._of(name)

    def constant(self, position: int) -> Array:
        name = self.name(position)
        found = None if name is None else self.side.constant(name)
        if found is None:
            raise Unrepresentable("a parameter is computed at run time")
        if found.dtype.kind not in "iub" and found.dtype != self.side.types.dtype(self.node.output[self.at]):
            raise Unrepresentable("a parameter has another dtype than the result")
        return found

    def optional(self, position: int) -> Array | None:
        return None if self.name(position) is None else self.constant(position)

    def integer(self, key: str, default: int = 0) -> int:
        return cast(int, attribute(self.node, key, default))

    def integers(self, key: str, default: Sequence[int]) -> list[int]:
        return list(cast("Sequence[int]", attribute(self.node, key, default)))

    def text(self, key: str, default: str) -> str:
        return cast(bytes, attribute(self.node, key, default.encode())).decode()


# Kernels


def _geometry(call: _Call, kernel: Sequence[int], x: Value) -> tuple[list[int], list[int], list[int], list[int]]:
    """Stride, dilation, and padding before and behind."""
    n = len(kernel)
    stride, dilation = call.integers("strides", [1] * n), call.integers("dilations", [1] * n)
    auto = call.text("auto_pad", "NOTSET")
    if auto == "NOTSET":
        pads = call.integers("pads", [0] * 2 * n)
        return stride, dilation, pads[:n], pads[n:]
    if auto == "VALID":
        return stride, dilation, [0] * n, [0] * n
    begin, end = [], []
    for extent, k, s, d in zip(x.extents[2:], kernel, stride, dilation, strict=True):
        reach = d * (k - 1)
        if s == 1:
            total = reach
        elif extent.known is None:
            raise Unrepresentable("the padding follows from the extents")
        else:
            total = max(0, (-(-extent.known // s) - 1) * s + reach + 1 - extent.known)
        front = total // 2 if auto == "SAME_UPPER" else total - total // 2
        begin.append(front)
        end.append(total - front)
    return stride, dilation, begin, end


def _convolution(
    x: Value,
    weight: Array,
    groups: int,
    geometry: tuple[Sequence[int], Sequence[int], Sequence[int], Sequence[int]],
    rounded: int = 1,
) -> Value:
    kernel = weight.shape[2:]
    stride, dilation, begin, end = geometry
    if x.rank != len(kernel) + 2:
        raise Unrepresentable("a kernel over other axes than its operand has")
    offsets = product(*(range(-b, -b + d * k, d) for b, d, k in zip(begin, dilation, kernel, strict=True)))
    delta = tuple(d * (k - 1) - b - e for k, d, b, e in zip(kernel, dilation, begin, end, strict=True))
    first = nk.grouped_first(weight.shape[0], weight.shape[1], groups)
    flat = weight.reshape(*weight.shape[:2], -1)
    axes = tuple(range(2, x.rank))
    return nk.convolved(x, Kernel(flat, first, tuple(offsets), axes, tuple(stride), delta, rounded), 1)


def _weight(call: _Call) -> Array:
    weight = call.constant(1)
    extents = list(weight.shape[2:])
    if call.integers("kernel_shape", extents) != extents:
        raise Unrepresentable("the kernel_shape of a convolution contradicts its weight")
    return weight


def _read_conv(call: _Call) -> Value:
    x, weight, bias = call.value(), _weight(call), call.optional(2)
    y = _convolution(x, weight, call.integer("group", 1), _geometry(call, weight.shape[2:], x))
    return y if bias is None else nf.shifted(y, bias, 1)


def _read_conv_transpose(call: _Call) -> Value:
    x, weight, bias = call.value(), _weight(call), call.optional(2)
    kernel = weight.shape[2:]
    n, groups = len(kernel), call.integer("group", 1)
    if attribute(call.node, "output_shape") or call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unrepresentable("the padding follows from a wanted output shape")
    stride, dilation = call.integers("strides", [1] * n), call.integers("dilations", [1] * n)
    pads, extra = call.integers("pads", [0] * 2 * n), call.integers("output_padding", [0] * n)
    axes = tuple(range(2, 2 + n))
    if any(s > 1 for s in stride):
        x = nk.spread(x, axes, stride)
    # What is written at offset o of an input position is read at offset -o of an output position.
    offsets = product(*(range(b, b - d * k, -d) for b, d, k in zip(pads[:n], dilation, kernel, strict=True)))
    delta = tuple(
        b + e - o - d * (k - 1) for b, e, o, d, k in zip(pads[:n], pads[n:], extra, dilation, kernel, strict=True)
    )
    inside = weight.shape[0] // groups
    turned = weight.reshape(groups, inside, weight.shape[1], -1).swapaxes(1, 2).reshape(-1, inside, prod(kernel))
    first = nk.grouped_first(len(turned), inside, groups)
    y = nk.convolved(x, Kernel(turned, first, tuple(offsets), axes, (1,) * n, delta), 1)
    return y if bias is None else nf.shifted(y, bias, 1)


def _read_average_pool(call: _Call) -> Value:
    x, kernel = call.value(), call.integers("kernel_shape", [])
    geometry = _geometry(call, kernel, x)
    if call.integer("ceil_mode"):
        raise Unrepresentable("the last window of a pooling may hang over")
    if any(geometry[2] + geometry[3]) and not call.integer("count_include_pad"):
        raise Unrepresentable("a pooling divides by fewer elements at the border")
    stride, dilation, begin, end = geometry
    for axis, k, s, d, b, e in zip(range(2, x.rank), kernel, stride, dilation, begin, end, strict=True):
        # The standard says that no position is left then, and ONNX Runtime, which rounds towards zero, that one is.
        if s > 1 and nf.least_extent(x, axis) + b + e < d * (k - 1) + 1:
            raise Unrepresentable("the window of a pooling may be larger than its map")
    channels = x.extents[1].known
    if channels is None:
        raise Unrepresentable("the number of channels is unknown")
    return _convolution(x, np.full((channels, 1, *kernel), 1 / prod(kernel)), channels, geometry, 0)


def _read_pad(call: _Call) -> Value:
    x = call.value()
    if call.text("mode", "constant") != "constant":
        raise Unrepresentable("a padding repeats what stands at the border")
    amounts = call.optional(1)
    fill, given = call.optional(2), call.optional(3)
    pads = call.integers("pads", []) if amounts is None else [int(n) for n in amounts]
    value = cast(float, attribute(call.node, "value", 0.0)) if fill is None else float(fill.reshape(-1)[0])
    over = list(range(x.rank)) if given is None else [int(a) % x.rank for a in given]
    begin, end = pads[: len(pads) // 2], pads[len(pads) // 2 :]
    wanted = [(a, b, e) for a, b, e in zip(over, begin, end, strict=True) if (b, e) != (0, 0)]
    if any(a < 2 for a, _, _ in wanted):
        raise Unrepresentable("a padding adds channels or images")
    if not wanted:
        return x
    axes, begin, end = ([w[i] for w in wanted] for i in range(3))
    return nk.padded(x, axes, begin, end, value, 1)


def _slab(written: Array) -> tuple[int, int, bool]:
    """The axis along which the first or the last positions are True, and no others; their number; whether the first."""
    for axis in range(2, written.ndim):
        along = [bool(np.any(part)) for part in np.moveaxis(written, axis, 0)]
        number = sum(along)
        whole = number * written.size == np.count_nonzero(written) * len(along)
        if whole and number < len(along) and (all(along[:number]) or all(along[-number:])):
            return axis, number, along[0]
    raise Unrepresentable("elements are written that are not the first or last along one axis")


def _read_scatter(call: _Call) -> Value:
    """Constants written over the first or the last positions along one axis: how exporters spell an assignment."""
    x, where, what = call.value(), call.constant(1), call.constant(2)
    shape = tuple(e.known for e in x.extents)
    if call.text("reduction", "none") != "none" or None in shape or where.ndim < 1 or x.rank < 3:
        raise Unrepresentable("elements are written one by one")
    extents = cast("tuple[int, ...]", shape)
    depth = where.shape[-1]
    if depth > x.rank or what.shape != (*where.shape[:-1], *extents[depth:]) or not where.size:
        raise Unrepresentable("elements are written one by one")
    at = where.reshape(-1, depth)
    if np.any(at < -np.array(extents[:depth])) or np.any(at >= np.array(extents[:depth])):
        raise Unrepresentable("elements are written that are not there")
    written, values = np.zeros(extents, bool), np.zeros(extents)
    written[tuple(at.T)] = True
    values[tuple(at.T)] = what.reshape(-1, *extents[depth:])
    if np.count_nonzero(written) != what.size:
        raise Unrepresentable("an element is written twice")
    axis, number, is_first = _slab(written)
    slab = np.moveaxis(values, (1, axis), (0, 1))
    slab = slab[:, :number] if is_first else slab[:, -number:]
    border = slab.reshape(len(slab), -1)[:, 0]
    if np.any(np.moveaxis(slab, 0, -1) != border):
        raise Unrepresentable("what is written varies along other axes than the channels")
    return nk.overwritten(x, axis, number, is_first, border, 1)


# Matrices


def _read_gemm(call: _Call) -> Value:
    if call.integer("transA"):
        raise Unrepresentable("Gemm with transA mixes the batch")
    x, weight, bias = call.value(), call.constant(1), call.optional(2)
    alpha, beta = (cast(float, attribute(call.node, key, 1.0)) for key in ("alpha", "beta"))
    y = nk.mixed(x, weight if call.integer("transB") else weight.T, 1)
    if alpha != 1:
        y = nf.scaled(y, alpha)
    if bias is None:
        return y
    if bias.ndim == 2 and bias.shape[0] != 1:
        raise Unrepresentable("a bias that varies along the batch")
    bias = bias.astype(np.float64).reshape(-1) * beta
    return nf.shifted(y, bias[0]) if bias.size == 1 else nf.shifted(y, bias, 1)


def _read_matmul(call: _Call) -> Value:
    if call.is_constant(1):
        x, weight = call.value(0), call.constant(1)
        axis, weight = x.rank - 1, weight.T
    else:
        x, weight = call.value(1), call.constant(0)
        axis = x.rank - 2
    if weight.ndim != 2 or axis < 0:
        raise Unrepresentable("a stack of matrices")
    return nk.mixed(x, weight, axis)


# Each channel by itself


def _read_batchnorm(call: _Call) -> Value:
    if call.integer("training_mode") or any(call.node.output[1:]):
        raise Unrepresentable("BatchNormalization in training mode")
    if call.side.opset < 9 and call.integer("spatial", 1) != 1:
        raise Unrepresentable("BatchNormalization over positions")
    x = call.value()
    gamma, beta, mean, var = (call.constant(i).astype(np.float64) for i in range(1, 5))
    eps = float(np.float32(cast(float, attribute(call.node, "epsilon", 1e-5))))
    with np.errstate(all="ignore"):
        factor = gamma / np.sqrt(var + eps)
        moved = mean * factor
    return nf.shifted(nf.scaled(x, factor, 1), beta - moved, 1, np.abs(beta) + np.abs(moved))


def _read_arithmetic(call: _Call) -> Value:
    op = call.node.op_type
    fixed = [call.is_constant(0), call.is_constant(1)]
    if not any(fixed):
        if op not in ("Add", "Sub"):
            raise Unrepresentable("a product of two values")
        second = call.value(1)
        return nf.added([call.value(0), nf.scaled(second, -1.0) if op == "Sub" else second])
    side = 1 if fixed[1] else 0
    x, constant = call.value(1 - side), call.constant(side).astype(np.float64)
    axis = _along(constant, x)
    if op == "Div" and side == 0:
        raise Unrepresentable("a division by a value")
    with np.errstate(all="ignore"):
        if op == "Mul":
            return nf.scaled(x, constant, axis)
        if op == "Div":
            return nf.scaled(x, 1 / constant, axis)
        if op == "Sub" and side == 0:
            x = nf.scaled(x, -1.0)
        return nf.shifted(x, -constant if op == "Sub" and side == 1 else constant, axis)


def _along(constant: Array, x: Value) -> int | None:
    """The axis of ``x`` that a constant varies along; None for one number."""
    if constant.ndim > x.rank:
        raise Unrepresentable("a constant raises the rank")
    wide = [i for i, d in enumerate(constant.shape) if d != 1]
    if len(wide) > 1:
        raise Unrepresentable("a constant varies along several axes")
    if not wide:
        return None
    axis = x.rank - constant.ndim + wide[0]
    if x.extents[axis].known != constant.shape[wide[0]]:
        raise Unrepresentable("a constant may repeat its operand along an axis")
    return axis


def _read_sum(call: _Call) -> Value:
    return nf.added([call.value(i) for i in range(len(call.node.input))])


def _read_neg(call: _Call) -> Value:
    return nf.scaled(call.value(), -1.0)


def _read_identity(call: _Call) -> Value:
    return call.value()


def _read_dropout(call: _Call) -> Value:
    training = call.optional(2)
    if call.at or call.side.opset < 7 or (training is not None and training.any()):
        raise Unrepresentable("Dropout in training mode")
    return call.value()


# Channels


def _read_concat(call: _Call) -> Value:
    terms = [call.value(i) for i in range(len(call.node.input))]
    return nf.stacked(terms, call.integer("axis", 1) % terms[0].rank)


def _read_split(call: _Call) -> Value:
    x = call.value()
    axis = call.integer("axis", 0) % x.rank
    width = x.extents[axis].known
    given = call.optional(1)
    sizes = call.integers("split", []) if given is None else [int(n) for n in given]
    if width is None:
        raise Unrepresentable("the extent that is split is unknown")
    if not sizes:
        parts = len(call.node.output)
        each = -(-width // parts)
        sizes = [min(each, width - each * i) for i in range(parts)]
    if min(sizes) < 0 or sum(sizes) != width:
        raise Unrepresentable("a split into parts that do not add up")
    start = sum(sizes[: call.at])
    return nl.selected(x, range(start, start + sizes[call.at]), axis)


def _read_slice(call: _Call) -> Value:
    x = call.value()
    if call.side.opset < 10:
        starts, ends = call.integers("starts", []), call.integers("ends", [])
        axes, steps = call.integers("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = ([int(n) for n in call.constant(i)] for i in (1, 2))
        given = [call.optional(i) for i in (3, 4)]
        axes = list(range(len(starts))) if given[0] is None else [int(n) for n in given[0]]
        steps = [1] * len(starts) if given[1] is None else [int(n) for n in given[1]]
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        width = x.extents[axis % x.rank].known
        if step < 0 and width is not None and (start < -width or end >= width):
            # The standard, its reference implementation and ONNX Runtime do not agree on what is clamped to what.
            raise Unrepresentable("a slice in reverse, of which an end is out of range")
        x = nk.sliced(x, axis % x.rank, start, end, step)
    return x


def _read_gather(call: _Call) -> Value:
    x, index = call.value(), call.constant(1)
    axis = call.integer("axis", 0) % x.rank
    width = x.extents[axis].known
    if width is None or index.ndim > 1:
        raise Unrepresentable("a gather by a table, or along an unknown extent")
    places = [int(i) % width for i in index.reshape(-1)]
    return nl.selected(x, places, axis) if index.ndim else nl.taken(x, places[0], axis)


# Layouts


def _read_transpose(call: _Call) -> Value:
    x = call.value()
    return nl.permuted(x, call.integers("perm", range(x.rank)[::-1]))


def _read_reshape(call: _Call) -> Value:
    x = call.value()
    if call.is_constant(1) or call.side.opset < 5:
        given = [int(n) for n in call.constant(1)] if call.side.opset >= 5 else call.integers("shape", [])
        zero_is_zero = call.integer("allowzero")
        target = [
            None if n == -1 else x.extents[i] if n == 0 and not zero_is_zero else Extent(n) for i, n in enumerate(given)
        ]
        return nl.regrouped(x, target)
    return nl.regrouped(x, _inferred(call, x))


def _inferred(call: _Call, x: Value) -> list[Extent | None]:
    """The extents of the result as shape inference has them; None for what is no product of those of the operand."""
    side = call.side
    if side.inferred is None:  # what the other graph says of this very tensor is what is to be proven
        side.inferred = Types(side.model)
    shape = side.inferred.shape(call.node.output[call.at])
    if shape is None:
        raise Unrepresentable("the rank of a reshape is unknown")
    symbols = {s for e in x.extents for s in e.symbols} & side.symbols
    return [Extent(d.factor, d.symbols) if symbols.issuperset(d.symbols) else None for d in shape]


def _read_flatten(call: _Call) -> Value:
    x = call.value()
    axis = call.integer("axis", 1)
    axis = axis + x.rank if axis < 0 else axis
    front, back = Extent(), Extent()
    for i, e in enumerate(x.extents):
        front, back = (front.times(e), back) if i < axis else (front, back.times(e))
    return nl.regrouped(x, [front, back])


def _axes(call: _Call) -> list[int] | None:
    given = call.optional(1)
    if given is not None:
        return [int(n) for n in given.reshape(-1)]
    return cast("list[int] | None", attribute(call.node, "axes"))


def _read_squeeze(call: _Call) -> Value:
    x, axes = call.value(), _axes(call)
    if axes is None:
        raise Unrepresentable("a squeeze of all axes of extent 1")
    gone = {a % x.rank for a in axes}
    if any(x.extents[a] != Extent() for a in gone):
        raise Unrepresentable("a squeeze of an unknown extent")
    return nl.regrouped(x, [e for i, e in enumerate(x.extents) if i not in gone])


def _read_unsqueeze(call: _Call) -> Value:
    x, axes = call.value(), _axes(call)
    if axes is None:
        raise Unrepresentable("Unsqueeze without axes")
    rank = x.rank + len(axes)
    new, rest = {a % rank for a in axes}, iter(x.extents)
    return nl.regrouped(x, [Extent() if i in new else next(rest) for i in range(rank)])


def _read_mean(call: _Call) -> Value:
    x = call.value()
    if call.node.op_type == "GlobalAveragePool":
        return nl.averaged(x, range(2, x.rank), keep=True)
    axes = _axes(call)
    if not axes:
        if call.integer("noop_with_empty_axes"):
            return x
        raise Unrepresentable("a mean over all axes")
    return nl.averaged(x, [a % x.rank for a in axes], bool(call.integer("keepdims", 1)))


READERS: dict[str, Callable[[_Call], Value]] = {
    "Conv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    "AveragePool": _read_average_pool,
    "Pad": _read_pad,
    "ScatterND": _read_scatter,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    "BatchNormalization": _read_batchnorm,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _read_arithmetic),
    "Sum": _read_sum,
    "Neg": _read_neg,
    "Identity": _read_identity,
    "Dropout": _read_dropout,
    "Concat": _read_concat,
    "Split": _read_split,
    "Slice": _read_slice,
    "Gather": _read_gather,
    "Transpose": _read_transpose,
    "Reshape": _read_reshape,
    "Flatten": _read_flatten,
    "Squeeze": _read_squeeze,
    "Unsqueeze": _read_unsqueeze,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _read_mean),
}

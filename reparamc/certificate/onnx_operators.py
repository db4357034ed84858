"""What the operators of ONNX mean, as affine maps, from the specification alone."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from math import ceil, floor, prod
from typing import Any, Protocol, cast

import ml_dtypes
import numpy as np
from onnx import NodeProto

import reparamc.certificate.kernels as nk
import reparamc.certificate.layouts as nl
import reparamc.certificate.meaning as meaning
import reparamc.certificate.normal_form as nf
from reparamc.certificate.axes import Dim, Unrepresentable
from reparamc.certificate.normal_form import Array, Value, replace
from reparamc.certificate.onnx_shapes import attribute, is_plain_fused, may_be_copied
from reparamc.certificate.ranges import ANY, SIGNED, Bound, bound_of, clamp

MIXING = {"AveragePool", "Conv", "ConvTranspose", "Einsum", "Gemm", "MatMul"}
"""Operators with a kernel or a matrix."""


ELEMENTWISE = {
    "Abs", "Celu", "Clip", "Div", "Elu", "Erf", "Exp", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log",
    "Max", "Min", "Mish", "Mul", "PRelu", "Pow", "Reciprocal", "Relu", "Selu", "Sigmoid", "Softplus", "Softsign",
    "Sqrt", "Tanh", "ThresholdedRelu",
}  # fmt: skip
"""Operators that the specification defines element by element; sums, which are linear, are followed instead."""

HOMOGENEOUS = {"Abs", "LeakyRelu", "PRelu", "Relu"}
"""Those of one value that commute with a positive factor."""


class Side(Protocol):
    """What readers ask of a graph; see `reparamc.certificate.onnx`."""

    opset: int

    @property
    def constants(self) -> Collection[str]: ...
    def constant(self, name: str) -> Array | None: ...
    def dtype(self, name: str) -> np.dtype | None: ...
    def inferred(self, name: str) -> list[Dim | None] | None: ...
    def measured(self, name: str) -> str | None: ...
    def known_as(self, name: str) -> Sequence[Dim] | None: ...
    def told(self, name: str, shape_of: Callable[[str], Sequence[Dim] | None]) -> Any: ...


class Call:
    """A node, with its operands as values or constants."""

    def __init__(self, side: Side, node: NodeProto, at: int, of: Callable[[str], Value]) -> None:
        self.side, self.node, self.at, self._of = side, node, at, of

    def name(self, position: int) -> str | None:
        return self.node.input[position] or None if position < len(self.node.input) else None

    def is_constant(self, position: int) -> bool:
        name = self.name(position)
        return name is not None and name in self.side.constants

    def value(self, position: int = 0) -> Value:
        name = self.name(position)
        if name is None or name in self.side.constants:
            raise Unrepresentable("a constant where a value is read")
        return self._of(name)

    def of(self, name: str) -> Value:
        """A tensor from which an operand is computed."""
        try:
            return self._of(name)
        except KeyError as error:
            raise Unrepresentable(f"{name!r} is not followed") from error

    def shape(self, name: str) -> Sequence[Dim] | None:
        """The shape of a tensor from which an operand is computed; None where that is unknown."""
        try:
            return self._of(name).shape
        except KeyError:
            return self.side.known_as(name)

    def constant(self, position: int) -> Array:
        name = self.name(position)
        found = None if name is None else self.side.constant(name)
        if found is None:
            raise Unrepresentable("a parameter is computed at run time")
        return found

    def vector(self, position: int) -> list[int]:
        """Whole numbers in a row."""
        found = self.constant(position)
        if found.ndim != 1 or found.dtype not in (np.int64, np.int32):
            raise Unrepresentable("axes, bounds or sizes that are no vector of whole numbers")
        return [int(n) for n in found]

    def optional_vector(self, position: int) -> list[int] | None:
        return None if self.name(position) is None else self.vector(position)

    def parameter(self, position: int) -> Array:
        """A constant of the dtype of the result."""
        found = self.constant(position)
        if found.dtype != self.side.dtype(self.node.output[self.at]):
            raise Unrepresentable("a parameter has another dtype than the result")
        return found

    def optional(self, position: int) -> Array | None:
        return None if self.name(position) is None else self.constant(position)

    def optional_parameter(self, position: int) -> Array | None:
        return None if self.name(position) is None else self.parameter(position)

    def integer(self, key: str, default: int = 0) -> int:
        return cast(int, attribute(self.node, key, default))

    def flag(self, key: str, default: int = 0) -> bool:
        """An attribute that is 0 or 1; runtimes do not agree on other numbers."""
        value = self.integer(key, default)
        if value not in (0, 1):
            raise Unrepresentable(f"{key} is neither 0 nor 1")
        return value == 1

    def axis(self, rank: int, default: int = 0) -> int:
        return within(self.integer("axis", default), rank)

    def integers(self, key: str, default: Sequence[int]) -> list[int]:
        return list(cast("Sequence[int]", attribute(self.node, key, default)))

    def text(self, key: str, default: str) -> str:
        return cast(bytes, attribute(self.node, key, default.encode())).decode(errors="replace")


def within(axis: int, rank: int) -> int:
    """An axis counted from the start.

    Raises:
        Unrepresentable: there is no such axis.
    """
    if not -rank <= axis < rank:
        raise Unrepresentable("an axis that is not there")
    return axis % rank


def _axes_within(axes: Sequence[int], rank: int) -> list[int]:
    """Different axes, counted from the start."""
    found = [within(a, rank) for a in axes]
    if len(set(found)) != len(found):
        raise Unrepresentable("an axis is named twice")
    return found


def keeps_numbers(node: NodeProto, constant: Callable[[str], Array | None]) -> bool:
    """Whether an operator does to every channel the same, over positions only, and gives a constant map its number."""
    match node.op_type:
        case "GlobalAveragePool" | "GlobalMaxPool" | "MaxPool":
            return True
        case "AveragePool":
            return not attribute(node, "count_include_pad", 0)
        case "Resize" | "Upsample":
            crops = attribute(node, "coordinate_transformation_mode", b"half_pixel") == b"tf_crop_and_resize"
            scales = constant([*node.input[1:3]][-1]) if len(node.input) > 1 else None
            return not crops and not any(node.input[3:]) and scales is not None and list(scales[:2]) == [1, 1]
        case _:
            return False


# Kernels


def _checked(call: Call, n: int, pads: Sequence[int], *steps: Sequence[int]) -> None:
    """Raise unless a kernel over ``n`` axes has pads and steps that every runtime takes."""
    if len(pads) != 2 * n or min(pads, default=0) < 0 or any(len(s) != n or min(s, default=1) < 1 for s in steps):
        raise Unrepresentable("pads, strides or dilations that do not fit the kernel")
    if attribute(call.node, "pads") is not None and call.text("auto_pad", "NOTSET") != "NOTSET":
        raise Unrepresentable("pads beside auto_pad")


def _geometry(call: Call, kernel: Sequence[int], x: Value) -> tuple[list[int], list[int], list[int], list[int]]:
    """Stride, dilation, and padding before and after."""
    n = len(kernel)
    stride, dilation = call.integers("strides", [1] * n), call.integers("dilations", [1] * n)
    auto, pads = call.text("auto_pad", "NOTSET"), call.integers("pads", [0] * 2 * n)
    _checked(call, n, pads, stride, dilation)
    if auto == "NOTSET":
        return stride, dilation, pads[:n], pads[n:]
    if auto == "VALID":
        return stride, dilation, [0] * n, [0] * n
    if auto not in ("SAME_UPPER", "SAME_LOWER") or x.rank != n + 2:
        raise Unrepresentable("auto_pad is none of the four")
    if any(d > 1 for d in dilation):
        raise Unrepresentable("runtimes do not take auto_pad beside dilations")
    begin, end = [], []
    for dim, k, s, d in zip(x.shape[2:], kernel, stride, dilation, strict=True):
        reach = d * (k - 1)
        if s == 1:
            total = reach
        elif dim.known is None:
            raise Unrepresentable("the padding follows from the sizes")
        else:
            total = max(0, (-(-dim.known // s) - 1) * s + reach + 1 - dim.known)
        front = total // 2 if auto == "SAME_UPPER" else total - total // 2
        begin.append(front)
        end.append(total - front)
    return stride, dilation, begin, end


def _weight(call: Call) -> Array:
    weight = call.parameter(1)
    dims = list(weight.shape[2:])
    if weight.ndim < 3 or not weight.size:
        raise Unrepresentable("a kernel without axes or elements")
    if call.integers("kernel_shape", dims) != dims:
        raise Unrepresentable("the kernel_shape of a convolution contradicts its weight")
    return weight


def _read_conv(call: Call) -> Value:
    x, weight, groups = call.value(), _weight(call), call.integer("group", 1)
    bias = _bias(call, weight.shape[0])
    if groups < 1 or weight.shape[0] % groups or x.shape[1].known != weight.shape[1] * groups:
        raise Unrepresentable("groups that do not fit the channels")
    if x.rank != weight.ndim:
        raise Unrepresentable("a kernel over other axes than its operand has")
    return meaning.convolved(x, weight, bias, groups, *_geometry(call, weight.shape[2:], x))


def _bias(call: Call, channels: int) -> Array | None:
    bias = call.optional_parameter(2)
    if bias is not None and bias.shape != (channels,):
        raise Unrepresentable("a bias that does not fit the channels")
    return bias


def is_convolution(node: NodeProto) -> bool:
    """Whether ``node`` applies a kernel and nothing else: also one of ONNX Runtime's own, without an activation."""
    return is_plain_fused(node) or (node.domain in ("", "ai.onnx") and node.op_type in ("Conv", "ConvTranspose"))


def weighted(call: Call, gathered: Value) -> Value:
    """What a convolution makes of what it gathers; see `meaning.weighted`."""
    weight, groups, is_transposed = _weight(call), call.integer("group", 1), call.node.op_type == "ConvTranspose"
    rows = weight.shape[1] * groups if is_transposed else len(weight)
    inside = weight.shape[0] if is_transposed else weight.shape[1] * groups
    of_group = weight.shape[0] if is_transposed else rows
    bias = _bias(call, rows)
    if groups < 1 or of_group % groups or gathered.shape[1].known != inside * prod(weight.shape[2:]):
        raise Unrepresentable("groups that do not fit the channels")
    return meaning.weighted(gathered, weight, bias, groups, is_transposed)


NORMS = {"GroupNormalization": 1, "InstanceNormalization": 1, "LayerNormalization": -1, "RMSNormalization": -1}
"""Operators that normalize, and then have a factor and a shift for each channel; along which axis these lie."""


def rescaled(call: Call, normal: Value) -> Value:
    """What one of `NORMS` makes of what it has normalized."""
    axis = NORMS[call.node.op_type] % normal.rank
    if axis == normal.rank - 1 and NORMS[call.node.op_type] < 0 and call.axis(normal.rank, -1) != axis:
        raise Unrepresentable("a normalization over several axes")
    return meaning.rescaled(normal, call.parameter(1), call.optional_parameter(2), axis)


def _read_conv_transpose(call: Call) -> Value:
    x, weight, groups = call.value(), _weight(call), call.integer("group", 1)
    kernel = weight.shape[2:]
    n = len(kernel)
    bias = _bias(call, weight.shape[1] * groups)
    if groups < 1 or weight.shape[0] % groups or x.shape[1].known != weight.shape[0] or x.rank != n + 2:
        raise Unrepresentable("groups that do not fit the channels")
    if attribute(call.node, "output_shape") or call.text("auto_pad", "NOTSET") not in ("NOTSET", "VALID"):
        raise Unrepresentable("the padding follows from a wanted output shape")
    stride, dilation = call.integers("strides", [1] * n), call.integers("dilations", [1] * n)
    pads, extra = call.integers("pads", [0] * 2 * n), call.integers("output_padding", [0] * n)
    _checked(call, n, pads, stride, dilation)
    if len(extra) != n or any(not 0 <= e < max(s, d) for e, s, d in zip(extra, stride, dilation, strict=True)):
        raise Unrepresentable("an output_padding that does not fit the kernel")
    return meaning.transposed(x, weight, bias, groups, stride, dilation, pads[:n], pads[n:], extra)


def _read_average_pool(call: Call) -> Value:
    x, kernel = call.value(), call.integers("kernel_shape", [])
    if not kernel or min(kernel) < 1:
        raise Unrepresentable("a pooling without a window")
    geometry = _geometry(call, kernel, x)
    if any(p >= k for pads in geometry[2:] for p, k in zip(pads, kernel, strict=True)):
        raise Unrepresentable("pads as large as the window of a pooling")
    if call.flag("ceil_mode"):
        raise Unrepresentable("the last window of a pooling may hang over")
    if any(geometry[2] + geometry[3]) and not call.flag("count_include_pad"):
        raise Unrepresentable("a pooling divides by fewer elements at the border")
    stride, dilation, begin, end = geometry
    for axis, k, s, d, b, e in zip(range(2, x.rank), kernel, stride, dilation, begin, end, strict=True):
        # The standard says that no position is left then, and ONNX Runtime, which rounds towards zero, that one is.
        if s > 1 and nf.least_size(x, axis) + b + e < d * (k - 1) + 1:
            raise Unrepresentable("the window of a pooling may be larger than its map")
    if x.rank != len(kernel) + 2:
        raise Unrepresentable("a pooling over other axes than its operand has")
    return meaning.pooled(x, kernel, *geometry)


def _read_pad(call: Call) -> Value:
    x = call.value()
    if call.text("mode", "constant") != "constant":
        raise Unrepresentable("a padding repeats the border")
    amounts = call.optional_vector(1)
    fill, given = call.optional_parameter(2), call.optional_vector(3)
    pads = call.integers("pads", []) if amounts is None else amounts
    value = cast(float, attribute(call.node, "value", 0.0)) if fill is None else float(fill.reshape(-1)[0])
    over = list(range(x.rank)) if given is None else _axes_within(given, x.rank)
    if len(pads) != 2 * len(over):
        raise Unrepresentable("pads that do not fit the axes")
    return meaning.padded(x, [*zip(over, pads[: len(over)], pads[len(over) :], strict=True)], value)


def _slab(written: Array) -> tuple[int, int, bool]:
    """The axis along which the first or the last positions are True, and no others; their number; whether the first."""
    for axis in range(2, written.ndim):
        along = [bool(np.any(part)) for part in np.moveaxis(written, axis, 0)]
        number = sum(along)
        whole = number * written.size == np.count_nonzero(written) * len(along)
        if whole and number < len(along) and (all(along[:number]) or all(along[-number:])):
            return axis, number, along[0]
    raise Unrepresentable("elements are written that are not the first or last along one axis")


def _read_scatter(call: Call) -> Value:
    """Constants written over the first or the last positions along one axis: how exporters spell an assignment."""
    x, where, what = call.value(), call.constant(1), call.parameter(2)
    shape = tuple(e.known for e in x.shape)
    if call.text("reduction", "none") != "none" or None in shape or where.ndim < 1 or x.rank < 3:
        raise Unrepresentable("elements are written one by one")
    dims = cast("tuple[int, ...]", shape)
    depth = where.shape[-1]
    if depth > x.rank or what.shape != (*where.shape[:-1], *dims[depth:]) or not where.size:
        raise Unrepresentable("elements are written one by one")
    at = where.reshape(-1, depth)
    if np.any(at < -np.array(dims[:depth])) or np.any(at >= np.array(dims[:depth])):
        raise Unrepresentable("elements are written that are not there")
    written, values = np.zeros(dims, bool), np.zeros(dims)
    written[tuple(at.T)] = True
    values[tuple(at.T)] = what.reshape(-1, *dims[depth:])
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


def _read_gemm(call: Call) -> Value:
    if call.flag("transA"):
        raise Unrepresentable("Gemm with transA mixes the batch")
    x, weight, bias = call.value(), call.parameter(1), call.optional_parameter(2)
    if x.rank != 2 or weight.ndim != 2:
        raise Unrepresentable("Gemm of what is no matrix")
    alpha, beta = (cast(float, attribute(call.node, key, 1.0)) for key in ("alpha", "beta"))
    y = nk.mixed(x, weight if call.flag("transB") else weight.T, 1)
    if alpha != 1:
        y = nf.scaled(y, alpha)
    if bias is None:
        return y
    if bias.ndim > 2 or (bias.ndim == 2 and bias.shape[0] != 1) or bias.size not in (1, y.shape[1].known):
        raise Unrepresentable("a bias that varies along the batch")
    bias = bias.astype(np.float64).reshape(-1) * beta
    return nf.shifted(y, bias[0]) if bias.size == 1 else nf.shifted(y, bias, 1)


def _read_matmul(call: Call) -> Value:
    if call.is_constant(1):
        return meaning.matrix(call.value(0), None, call.parameter(1))
    return meaning.matrix(None, call.value(1), call.parameter(0))


def _read_einsum(call: Call) -> Value:
    """A matrix along one axis, which the equation leaves where it is."""
    terms, _, result = call.text("equation", "").replace(" ", "").partition("->")
    parts = terms.split(",")
    if len(parts) != 2 or not result or call.is_constant(0) == call.is_constant(1):
        raise Unrepresentable("an Einsum of other operands than a value and a constant")
    at = 0 if call.is_constant(1) else 1
    x, weight, (of_x, of_weight) = call.value(at), call.constant(1 - at), (parts[at], parts[1 - at])
    inside = [label for label in of_weight if label in of_x]
    outside = [label for label in of_weight if label not in of_x]
    if len(of_weight) != 2 or len(inside) != 1 or len(outside) != 1 or "." in of_weight:
        raise Unrepresentable("an Einsum with another constant than a matrix")
    labels = of_x.replace("...", ".")
    if of_x.replace(inside[0], outside[0]) != result or len(set(labels)) < len(labels) or inside[0] in result:
        raise Unrepresentable("an Einsum that moves axes, or sums over several")
    before = labels.index(inside[0])
    axis = before if "." not in labels[:before] else x.rank - (len(labels) - before)
    return nk.mixed(x, weight.T if of_weight[0] == inside[0] else weight, axis)


# Channel by channel


def _read_batchnorm(call: Call) -> Value:
    if call.integer("training_mode") or any(call.node.output[1:]):
        raise Unrepresentable("BatchNormalization in training mode")
    if call.side.opset < 9 and call.integer("spatial", 1) != 1:
        raise Unrepresentable("BatchNormalization over positions")
    x = call.value()
    parameters = [call.parameter(i) for i in range(1, 5)]
    if x.rank < 2 or any(p.shape != (x.shape[1].known,) for p in parameters):
        raise Unrepresentable("statistics that do not fit the channels")
    gamma, beta, mean, var = parameters
    return meaning.normalized(
        x, gamma, beta, mean, var, float(np.float32(cast(float, attribute(call.node, "epsilon", 1e-5))))
    )


def _read_arithmetic(call: Call) -> Value:
    op = call.node.op_type.lower()
    if call.is_constant(1):
        return meaning.arithmetic(op, call.value(0), call.parameter(1), is_first=False)
    if call.is_constant(0):
        return meaning.arithmetic(op, call.value(1), call.parameter(0), is_first=True)
    return meaning.arithmetic(op, call.value(0), call.value(1), is_first=False)


def _read_sum(call: Call) -> Value:
    return nf.added([call.value(i) for i in range(len(call.node.input))])


def _read_average(call: Call) -> Value:
    return nf.scaled(_read_sum(call), 1 / len(call.node.input))


def _read_dropout(call: Call) -> Value:
    training = call.optional(2)
    if call.at or call.side.opset < 7 or (training is not None and training.any()):
        raise Unrepresentable("Dropout in training mode")
    return call.value()


# Intervals


def bound(call: Call) -> Bound:
    """What the specification says of the sizes of what a node gives."""
    inputs = [n for n in call.node.input if n]
    match call.node.op_type:
        case "Clip":
            return _bound_of_clip(call) if call.side.opset >= 6 else Bound()
        case "LeakyRelu" if attribute(call.node, "alpha", 0.01) == 1:
            return Bound(same_in=ANY)
        case "PRelu" if call.is_constant(1) and (call.constant(1) == 1).all():
            return Bound(same_in=ANY)
        case "Mul" if inputs[0] == inputs[1]:
            return Bound(SIGNED)
        case "Mul" | "Add" | "Sum" | "Mean":
            return Bound(signed=inputs)
        case "Pad" if len(inputs) < 3 and attribute(call.node, "value", 0.0) == 0:
            return Bound(signed=inputs[:1])
        case "Resize" | "Upsample":
            outside = call.text("coordinate_transformation_mode", "half_pixel") == "tf_crop_and_resize"
            return Bound() if outside or call.text("mode", "nearest") == "cubic" else Bound(signed=inputs[:1])
        case kind:
            return bound_of(kind, inputs)


def _bound_of_clip(call: Call) -> Bound:
    dtype = call.side.dtype(call.node.output[0])
    if dtype is None:
        return Bound()
    largest = float(cast(Any, ml_dtypes).finfo(dtype).max)  # the default
    ends = [cast(float, attribute(call.node, key, end)) for key, end in (("min", -largest), ("max", largest))]
    for i in (0, 1):
        if call.name(1 + i) is not None:
            if not call.is_constant(1 + i) or (given := call.constant(1 + i)).size != 1:
                return Bound()
            ends[i] = float(given.reshape(()))
    return clamp(*ends)


# Channels


def _read_concat(call: Call) -> Value:
    terms = [call.value(i) for i in range(len(call.node.input))]
    return nf.stacked(terms, call.axis(terms[0].rank, 1))


def _read_split(call: Call) -> Value:
    x = call.value()
    axis = call.axis(x.rank)
    width = x.shape[axis].known
    given = call.optional_vector(1)
    sizes = call.integers("split", []) if given is None else given
    if width is None:
        raise Unrepresentable("the size that is split is unknown")
    if not sizes:
        parts = len(call.node.output)
        each = -(-width // parts)
        sizes = [min(each, width - each * i) for i in range(parts)]
    if min(sizes) < 0 or sum(sizes) != width or len(sizes) != len(call.node.output):
        raise Unrepresentable("a split into parts that do not add up")
    start = sum(sizes[: call.at])
    return nl.selected(x, range(start, start + sizes[call.at]), axis)


def _read_slice(call: Call) -> Value:
    x = call.value()
    if call.side.opset < 10:
        starts, ends = call.integers("starts", []), call.integers("ends", [])
        axes, steps = call.integers("axes", range(len(starts))), [1] * len(starts)
    else:
        starts, ends = (call.vector(i) for i in (1, 2))
        axes, steps = (call.optional_vector(i) for i in (3, 4))
        axes = list(range(len(starts))) if axes is None else axes
        steps = [1] * len(starts) if steps is None else steps
    for axis, start, end, step in zip(_axes_within(axes, x.rank), starts, ends, steps, strict=True):
        width = x.shape[axis].known
        if step < 0 and width is not None and (start < -width or end >= width):
            # The standard, its reference implementation and ONNX Runtime do not agree on what is clamped to what.
            raise Unrepresentable("a slice in reverse with an end out of range")
        x = nl.sliced(x, axis, start, end, step)
    return x


def _read_gather(call: Call) -> Value:
    x, index = call.value(), call.constant(1)
    axis = call.axis(x.rank)
    width = x.shape[axis].known
    if width is not None and index.size and not -width <= int(index.min()) <= int(index.max()) < width:
        raise Unrepresentable("a gather of what is not there")
    if width is None or index.ndim > 1:
        raise Unrepresentable("a gather by a table, or along an unknown size")
    places = [int(i) % width for i in index.reshape(-1)]
    return nl.selected(x, places, axis) if index.ndim else nl.taken(x, places[0], axis)


def _read_tile(call: Call) -> Value:
    x, times = call.value(), call.vector(1)
    if len(times) != x.rank or min(times, default=1) < 1:
        raise Unrepresentable("repeats that do not fit the axes")
    return _repeated(x, times)


def _read_expand(call: Call) -> Value:
    x, wanted = call.value(), call.vector(1)
    if len(wanted) > x.rank or min(wanted, default=1) < 1:
        raise Unrepresentable("an expansion by an axis, or to no elements")
    times = [1] * (x.rank - len(wanted)) + [*wanted]
    for axis, size in enumerate(x.shape):
        if size.known not in (1, None, times[axis]) and times[axis] != 1:
            raise Unrepresentable("an expansion to a size that does not fit")
        if size.known is None and times[axis] != 1:
            raise Unrepresentable("an expansion that repeats for some input sizes only")
        times[axis] = 1 if size.known == times[axis] else times[axis]
    return _repeated(x, times)


def _repeated(x: Value, times: Sequence[int]) -> Value:
    for axis, n in enumerate(times):
        x = nl.repeated(x, n, axis)
    return x


# Layouts


def _read_transpose(call: Call) -> Value:
    x = call.value()
    perm = call.integers("perm", range(x.rank)[::-1])
    if sorted(perm) != list(range(x.rank)):
        raise Unrepresentable("a transpose by what is no permutation")
    return nl.permuted(x, perm)


def _read_reshape(call: Call) -> Value:
    x = call.value()
    if call.is_constant(1) or call.side.opset < 5:
        given = call.vector(1) if call.side.opset >= 5 else call.integers("shape", [])
        return _regrouped(call, x, list(map(Dim, given)))
    measured = call.side.measured(call.node.input[1])
    if measured is not None and call.of(measured).shape == x.shape:
        return x
    told = call.side.told(call.node.input[1], call.shape)
    if told is not None:
        try:
            return _regrouped(call, x, told.sizes)
        except Unrepresentable:  # shape inference may know more
            pass
    return _regrouped(call, x, _inferred(call, x))


def _regrouped(call: Call, x: Value, given: Sequence[Dim]) -> Value:
    """``x`` reshaped to ``given``: -1 means the elements that are left, and 0 may mean the size of ``x`` there.

    The result refuses inputs for which no elements are left, or a size is zero and another one replaces it.
    """
    zero_is_zero = call.flag("allowzero")
    if any(n.factor < -1 or (n == Dim(0) and not zero_is_zero and i >= x.rank) for i, n in enumerate(given)):
        raise Unrepresentable("a reshape to sizes that are not there")
    target = [
        None if n == Dim(-1) else x.shape[i] if n == Dim(0) and not zero_is_zero else n for i, n in enumerate(given)
    ]
    y = nl.regrouped(x, target)
    refused = [e for e in target if e is not None] if None in target else []
    if not zero_is_zero:
        refused += [n for n, own in zip(given, [*x.shape, *[None] * len(given)], strict=False) if may_be_copied(n, own)]
    return replace(y, filled=y.filled.union(*(e.symbols for e in refused)))


def _inferred(call: Call, x: Value) -> list[Dim]:
    """The sizes of the result as shape inference has them, if all are products of those of the operand.

    Where one is not, the others do not tell it: there may be no elements.
    """
    shape = call.side.inferred(call.node.output[call.at])
    own = {s for e in x.shape for s in e.symbols}
    found = [e for e in shape or [None] if e is not None and own.issuperset(e.symbols)]
    if shape is None or len(found) < len(shape):
        raise Unrepresentable("the sizes of a reshape are unknown")
    return found


def _read_flatten(call: Call) -> Value:
    x = call.value()
    axis = call.integer("axis", 1)
    if not -x.rank <= axis <= x.rank:
        raise Unrepresentable("an axis that is not there")
    axis = axis + x.rank if axis < 0 else axis
    front = meaning.merged(x, 0, axis)[0]
    return nl.regrouped(x, [front, *meaning.merged(x, axis, x.rank)[axis:]])


def _axes(call: Call) -> list[int] | None:
    given = call.optional_vector(1)
    if given is not None:
        return given
    return cast("list[int] | None", attribute(call.node, "axes"))


def _read_squeeze(call: Call) -> Value:
    x, axes = call.value(), _axes(call)
    if axes is None:
        raise Unrepresentable("a squeeze of all axes of size 1")
    gone = set(_axes_within(axes, x.rank))
    if any(x.shape[a] != Dim() for a in gone):
        raise Unrepresentable("a squeeze of an unknown size")
    return nl.regrouped(x, [e for i, e in enumerate(x.shape) if i not in gone])


def _read_unsqueeze(call: Call) -> Value:
    x, axes = call.value(), _axes(call)
    if axes is None:
        raise Unrepresentable("Unsqueeze without axes")
    rank = x.rank + len(axes)
    new, rest = set(_axes_within(axes, rank)), iter(x.shape)
    return nl.regrouped(x, [Dim() if i in new else next(rest) for i in range(rank)])


def _read_mean(call: Call) -> Value:
    x = call.value()
    if call.node.op_type == "GlobalAveragePool":
        return nl.averaged(x, range(2, x.rank), keep=True)
    axes = _axes(call)
    if not axes:
        if call.flag("noop_with_empty_axes"):
            return x
        raise Unrepresentable("a mean over all axes")
    return nl.averaged(x, _axes_within(axes, x.rank), call.flag("keepdims", 1))


def _read_resize(call: Call) -> Value:
    """A resize of the axes after the first two: no channel has weights of its own, and all weights sum to 1."""
    x = call.value()
    place = call.text("coordinate_transformation_mode", "half_pixel")
    if place == "tf_crop_and_resize" or x.rank < 3:
        raise Unrepresentable("a resize that crops")
    if call.integer("exclude_outside") or attribute(call.node, "axes"):
        raise Unrepresentable("a resize with exclude_outside, or of chosen axes")
    older = call.side.opset < 11 or call.node.op_type == "Upsample"
    scales, sizes = (1, None) if older else (2, 3)
    if any(i is not None and call.name(i) and not call.is_constant(i) for i in (scales, sizes)):
        raise Unrepresentable("a resize to sizes of run time")
    by = call.optional(scales)
    after = call.side.inferred(call.node.output[0])
    if by is not None and by.size == x.rank and np.isfinite(by).all():
        factors = [Fraction(float(f)) for f in by]
    elif sizes is not None and call.name(sizes) and all(e.known for e in x.shape[2:]):
        factors = [Fraction(1), Fraction(1)]
        factors += [Fraction(n, e.factor) for n, e in zip(call.vector(sizes)[2:], x.shape[2:], strict=True)]
    else:
        raise Unrepresentable("a resize by unknown factors")
    if factors[:2] != [1, 1] or after is None:
        raise Unrepresentable("a resize of channels or images")
    if set(factors) == {1}:
        return x  # every result is at a position, for all weights
    mode = call.text("mode", "nearest")
    place, rounding = ("asymmetric", "floor") if older else (place, call.text("nearest_mode", "round_prefer_floor"))
    whole = mode == "nearest" and all(_repeats(f, place, rounding) for f in factors)
    if whole and (found := meaning.repeated(x, [f.numerator for f in factors[2:]])) is not None:
        return found
    cubic = attribute(call.node, "cubic_coeff_a", -0.75)
    more = rounding if mode == "nearest" else cubic if mode == "cubic" else None
    key = (mode, place, more, call.integer("antialias"), *map(str, factors[2:]))
    made: dict[int, Dim] = {}
    for axis, factor in enumerate(factors):
        known, before = after[axis], x.shape[axis]
        if factor != 1:
            open_ = Dim(1, (f"{factor} * {before}",))
            made[axis] = known if known is not None and known.known is not None else open_
    return nl.resized(x, key, made)


def _repeats(factor: Fraction, place: str, rounding: str) -> bool:
    """Whether the nearest position is that of which there are ``factor`` copies."""
    if factor.denominator != 1 or place not in ("asymmetric", "half_pixel", "pytorch_half_pixel"):
        return False
    shift = Fraction(0) if place == "asymmetric" else (1 / factor - 1) / 2
    at = [Fraction(o) / factor + shift for o in range(factor.numerator)]
    half = Fraction(1, 2)
    match rounding:
        case "floor" | "ceil":
            found = [floor(a) if rounding == "floor" else ceil(a) for a in at]
        case _:
            found = [ceil(a - half) if rounding == "round_prefer_floor" else floor(a + half) for a in at]
    return not any(found)


def _read_depth_to_space(call: Call) -> Value:
    """Channels as positions: those of one position lie apart (CRD), or side by side."""
    x, b, mode = call.value(), call.integer("blocksize"), call.text("mode", "DCR")
    inner = x.shape[1].over(Dim(b * b)) if x.rank == 4 and b > 0 else None
    if inner is None or mode not in ("DCR", "CRD"):
        raise Unrepresentable("channels that do not fit the block")
    n, _, height, width = x.shape
    block, (apart, order) = Dim(b), ([inner, Dim(b), Dim(b)], [0, 1, 4, 2, 5, 3])
    if mode == "DCR":
        apart, order = [block, block, inner], [0, 3, 4, 1, 5, 2]
    apart = nl.permuted(nl.regrouped(x, [n, *apart, height, width]), order)
    return nl.regrouped(apart, [n, inner, height.times(block), width.times(block)])


def _read_space_to_depth(call: Call) -> Value:
    x = call.value()
    if x.rank != 4:
        raise Unrepresentable("blocks of what is no image")
    return nl.unshuffled(x, call.integer("blocksize"), outer=True)


READERS: dict[str, Callable[[Call], Value]] = {
    "DepthToSpace": _read_depth_to_space,
    "SpaceToDepth": _read_space_to_depth,
    "Conv": _read_conv,
    "FusedConv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    "AveragePool": _read_average_pool,
    "Pad": _read_pad,
    "ScatterND": _read_scatter,
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    "BatchNormalization": _read_batchnorm,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _read_arithmetic),
    "Sum": _read_sum,
    "Mean": _read_average,
    "Einsum": _read_einsum,
    "Neg": lambda call: nf.scaled(call.value(), -1.0),
    "Identity": Call.value,
    "Dropout": _read_dropout,
    "Concat": _read_concat,
    "Split": _read_split,
    "Slice": _read_slice,
    "Gather": _read_gather,
    "Tile": _read_tile,
    "Expand": _read_expand,
    **dict.fromkeys(("Resize", "Upsample"), _read_resize),
    "Transpose": _read_transpose,
    "Reshape": _read_reshape,
    "Flatten": _read_flatten,
    "Squeeze": _read_squeeze,
    "Unsqueeze": _read_unsqueeze,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _read_mean),
}

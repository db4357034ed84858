"""Readers: one function per ONNX operator, from a node to what it means as a linear operator.

A reader answers None where the operator is not linear, and `Declined` with the reason where it nearly
is. To add one, write it here, enter it in `READERS`, and let the certificate read it as well;
`tests/onnx/test_onnx_operators.py` says what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, cast

import numpy as np
from onnx import NodeProto

from reparamc.algebra.arrays import derived
from reparamc.algebra.expr import (
    ONE,
    ZERO,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    LayoutOp,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Spread,
    Take,
    total,
)
from reparamc.algebra.kernels import averaged, equal_taps, swap_sides, transposed
from reparamc.algebra.records import replace
from reparamc.algebra.resample import MODES, PLACES, ROUNDINGS
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.shape import Shape
from reparamc.compiler.readings import (
    ACTIVATION,
    MOST_CHANNELS,
    MOST_CONCATENATED,
    MOST_REACH,
    Reading,
    axis_of_constant,
    cropped,
    moved,
    scaled,
)
from reparamc.errors import InputError
from reparamc.onnx.facts import Facts, Reader
from reparamc.onnx.taps import NORMS, Stored, read_norm, read_stored, read_taps, stored
from reparamc.onnx.values import attribute, is_standard, operand

if TYPE_CHECKING:
    from fractions import Fraction

NORMALISATION = "it belongs to a normalisation that runtimes fuse"

MOST_GROWN = 2**14
"""Results that a resize may make of a position. A region with more cannot be checked on samples."""


MOST_TAPS = 2**14
"""Positions under the window of a pooling that is written as a kernel."""

FAR = "it reads too far to be checked on samples"


def _weight_and_bias(graph: Facts, node: NodeProto) -> tuple[str | None, str | None] | Declined:
    """The names of the constant weight (None where it is stored as whole numbers) and bias of a linear operator."""
    weight, bias = graph.constant(node, 1), graph.constant(node, 2)
    if weight is None and not isinstance(stored(graph, node), Stored):
        found = stored(graph, node)
        return found if isinstance(found, Declined) else Declined(_not_constant(graph, node, 1))
    if operand(node, 2) and bias is None:
        return Declined(_not_constant(graph, node, 2))
    return weight, bias


def _integers(node: NodeProto, name: str, count: int, default: int = 1) -> tuple[int, ...]:
    """An attribute of that many whole numbers.

    Raises:
        InputError: it has another length, which the checker overlooks.
    """
    found = tuple(cast(list[int], attribute(node, name)) or [default] * count)
    if len(found) != count:
        where = node.name or node.output[0]
        raise InputError(f"{node.op_type} {where!r} has {len(found)} {name}, where {count} are needed")
    return found


def _unfit(
    graph: Facts, node: NodeProto, bias: str | None, weight: tuple[int, ...], channels: int, inside: int
) -> str | None:
    """Why a convolution with ``channels`` results and ``inside`` operands does not run; None where it may."""
    if bias is not None and graph.constants.shape(bias) != (channels,):
        return "its bias does not fit its weight"
    given = _channels(graph, node.input[0], 1 - len(weight))
    return "its weight does not fit the channels of its input" if given not in (None, inside) else None


def _is_far(kernel: Sequence[int], dilation: Sequence[int], *steps: Sequence[int]) -> bool:
    reach = [d * (k - 1) for k, d in zip(kernel, dilation, strict=True)]
    return max((abs(n) for ns in (reach, *steps) for n in ns), default=0) > MOST_REACH


def _read_conv(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    found = _weight_and_bias(graph, node)
    if isinstance(found, Declined):
        return found
    weight, bias = found
    if weight is None:
        return read_stored(graph, node, bias)
    shape = graph.constants.shape(weight)
    kernel = shape[2:]
    n = len(kernel)
    stride, dilation = _integers(node, "strides", n), _integers(node, "dilations", n)
    groups = cast(int, attribute(node, "group", 1))
    pads = _pads(graph, node, kernel, stride, dilation)
    if why := _unfit(graph, node, bias, shape, shape[0], shape[1] * groups):
        return Declined(why)
    if isinstance(pads, Declined) or _is_far(kernel, dilation, stride, pads):
        return read_taps(graph, node, weight, bias)
    x, w, b = graph.operand(node.input[0]), graph.parameter(weight), graph.parameter(bias) if bias else None
    return Reading(Conv.padded(x, w, b, stride, dilation, pads[:n], pads[n:], groups))


def _read_conv_transpose(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    found = _weight_and_bias(graph, node)
    if isinstance(found, Declined):
        return found
    weight, bias = found
    if weight is None:
        return read_stored(graph, node, bias)
    shape, groups = graph.constants.shape(weight), cast(int, attribute(node, "group", 1))
    n = len(shape) - 2
    if why := _unfit(graph, node, bias, shape, shape[1] * groups, shape[0]):
        return Declined(why)
    if attribute(node, "output_shape") or attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID"):
        return read_taps(graph, node, weight, bias)
    stride, dilation = _integers(node, "strides", n), _integers(node, "dilations", n)
    pads, extra = _integers(node, "pads", 2 * n, 0), _integers(node, "output_padding", n, 0)
    if _is_far(shape[2:], dilation, stride, pads, extra):
        return read_taps(graph, node, weight, bias)
    begin, end = tuple(pads[:n]), tuple(p - e for p, e in zip(pads[n:], extra, strict=True))
    x, b = graph.operand(node.input[0]), graph.parameter(bias) if bias else None
    w = swap_sides(graph.parameter(weight), groups)
    return Reading(transposed(x, w, b, stride, dilation, begin, end, groups))


def _read_average_pool(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    kernel = tuple(cast(list[int], attribute(node, "kernel_shape", [])))
    n = len(kernel)
    stride, dilation = _integers(node, "strides", n), _integers(node, "dilations", n)
    channels = _channels(graph, node.input[0], -1 - n)
    pads = _pads(graph, node, kernel, stride, dilation)
    if isinstance(pads, Declined) or channels is None:
        return pads if isinstance(pads, Declined) else None
    if prod(kernel) > MOST_TAPS or _is_far(kernel, dilation, stride, pads):
        return Declined(FAR)
    if cast(int, attribute(node, "ceil_mode", 0)):
        return Declined("with ceil_mode the last window of the pooling may hang over")
    if any(pads) and not cast(int, attribute(node, "count_include_pad", 0)):
        return Declined("the pooling divides by fewer elements at the border (count_include_pad=0)")
    x, taps = graph.operand(node.input[0]), equal_taps(channels, kernel)
    return Reading(averaged(x, taps, stride, dilation, pads[:n], pads[n:]))


def _read_pad(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    shape = graph.types.shape(node.input[0])
    if shape is None or len(shape) < 3 or (channels := shape[1].known) is None:
        return None
    if attribute(node, "mode", b"constant") != b"constant":
        mode = cast(bytes, attribute(node, "mode")).decode(errors="replace")
        return Declined(f"it pads with mode {mode!r}, not with zeros")
    given = [graph.constant(node, i) for i in (1, 2, 3)]
    if any(name is None and operand(node, i) for i, name in enumerate(given, 1)):
        return Declined("its padding is computed at run time")
    value = graph.constants.array(given[1]).ravel().any() if given[1] else attribute(node, "value", 0.0)
    amounts = graph.constants.integers(given[0]) if given[0] else cast(list[int], attribute(node, "pads", []))
    axes = graph.constants.integers(given[2]) if given[2] else list(range(len(shape)))
    if len(amounts) != 2 * len(axes):
        return None
    half = len(amounts) // 2
    pads = {
        a % len(shape): pair for a, pair in zip(axes, zip(amounts[:half], amounts[half:], strict=True), strict=True)
    }
    if (
        value
        or any(p < 0 for pair in pads.values() for p in pair)
        or any(pads.get(axis, (0, 0)) != (0, 0) for axis in (0, 1))
    ):
        return Declined("it pads with another value than zero, crops, or pads the channels")
    begin, end = zip(*(pads.get(axis, (0, 0)) for axis in range(2, len(shape))), strict=True)
    if _is_far((), (), begin, end):
        return Declined(FAR)
    ones = (1,) * len(begin)
    return Reading(averaged(graph.operand(node.input[0]), equal_taps(channels, ones), ones, ones, begin, end))


def _pads(
    graph: Facts,
    node: NodeProto,
    kernel: tuple[int, ...],
    stride: tuple[int, ...],
    dilation: tuple[int, ...],
) -> tuple[int, ...] | Declined:
    n = len(kernel)
    auto = cast(bytes, attribute(node, "auto_pad", b"NOTSET")).decode(errors="replace")
    if auto == "NOTSET":
        return _integers(node, "pads", 2 * n, 0)
    if auto == "VALID":
        return (0,) * 2 * n
    shape = graph.types.shape(node.input[0])
    totals = []
    for axis in range(n):
        reach = dilation[axis] * (kernel[axis] - 1)
        size = shape[2 + axis].known if shape is not None and len(shape) == n + 2 else None
        if stride[axis] != 1 and size is None:
            return Declined(f"auto_pad {auto} with stride {stride[axis]} pads differently for different input sizes")
        outs = -(-(size or 1) // stride[axis])
        totals.append(max(0, (outs - 1) * stride[axis] + reach + 1 - (size or 1)) if stride[axis] != 1 else reach)
    begin = [t // 2 if auto == "SAME_UPPER" else t - t // 2 for t in totals]
    return (*begin, *(t - b for t, b in zip(totals, begin, strict=True)))


def _read_batchnorm(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    if cast(int, attribute(node, "training_mode", 0)) or any(node.output[1:]):
        return Declined("BatchNormalization is in training mode")
    if graph.opset < 9 and cast(int, attribute(node, "spatial", 1)) != 1:
        return Declined("BatchNormalization keeps statistics per position (spatial=0)")
    names = [graph.constant(node, i) for i in range(1, 5)]
    if None in names:
        return Declined(_not_constant(graph, node, 1 + names.index(None)))
    parameters = [name for name in names if name]
    rank = graph.types.rank(node.input[0]) or graph.types.rank(output)
    if rank is None:
        return Declined("the rank of its input is unknown")
    axis = -1 - max(rank - 2, 0)
    counts = {graph.constants.shape(name) for name in parameters} | (
        {(c,)} if (c := _channels(graph, node.input[0], axis)) else set()
    )
    if len(counts) != 1:
        return Declined("its parameters do not fit the channels of its input")
    eps = cast(float, attribute(node, "epsilon", np.float32(1e-5)))  # attributes are float32
    gamma, beta, mean, var = map(graph.parameter, parameters)
    return Reading(BatchNorm(graph.operand(node.input[0]), gamma, beta, mean, var, float(eps), axis))


def _read_arithmetic(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    """Add, Sub, Mul, Div of two values or of a value and a constant that varies along one axis."""
    fixed = [graph.constant(node, 0), graph.constant(node, 1)]
    if all(fixed):
        return None
    if not any(fixed):
        return _read_sum(graph, node, output) if node.op_type in ("Add", "Sub") else None
    side = 1 if fixed[1] else 0
    constant, value = cast(str, fixed[side]), node.input[1 - side]
    if node.op_type == "Div" and side == 0:
        return None
    axis = _along_one_axis(graph, constant, value)
    if isinstance(axis, Declined):
        return axis
    if reason := _protected(graph, node, value, scalar=axis is None):
        return Declined(reason)
    return scaled(node.op_type.lower(), graph.operand(value), graph.parameter(constant), axis, first=not side)


def _along_one_axis(graph: Facts, constant: str, value: str) -> int | Declined | None:
    """The axis along which ``constant`` varies; None for a scalar; Declined if it may broadcast."""
    dims, shape = graph.constants.shape(constant), graph.types.shape(value)
    if shape is None:
        return None if not dims else Declined("the rank of its operand is unknown")
    if len(dims) > len(shape):
        return Declined("its constant raises the rank")
    return axis_of_constant(dims, lambda axis: shape[axis].known)


def _protected(graph: Facts, node: NodeProto, value: str, *, scalar: bool) -> str | None:
    """Why the constant of ``node`` belongs to a pattern that runtimes fuse by themselves; None when it does not.

    GELU, SiLU, HardSwish and the scale inside attention end in a scalar after something non-linear;
    LayerNorm and RMSNorm end in a scale, and a shift, after a division by a square root.
    """
    producer = graph.producers.get(value)
    if scalar:
        clipped = any(r is not None and r.op_type == "Clip" for r in graph.uses.get(node.output[0], []))
        if clipped and node.op_type in ("Add", "Sub"):
            return ACTIVATION
        linear = producer is None or value in graph.constants or graph.is_linear(value)
        return None if linear else ACTIVATION
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


def _read_sum(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    names = list(node.input)
    if not names or any(name in graph.constants for name in names):
        return None
    if len(ranks := {graph.types.rank(name) for name in names}) > 1 or None in ranks:
        return None  # one operand is broadcast, or may be
    shapes = [shape for name in names if (shape := graph.types.shape(name)) is not None]
    if any(len({d.known for d in dims} - {None}) > 1 for dims in zip(*shapes, strict=True)):
        return None  # the same
    terms: list[Expr] = [graph.operand(name) for name in names]
    if node.op_type == "Sub":
        terms[1] = Scale(terms[1], -ONE, ZERO)
    return Reading(total(terms))


def _read_average(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    """The mean of several values."""
    found = _read_sum(graph, node, output)
    if not isinstance(found, Reading):
        return found
    return Reading(Scale(found.template, np.array(1 / len(node.input)), ZERO))


def _read_neg(graph: Facts, node: NodeProto, output: str) -> Reading:
    return Reading(Scale(graph.operand(node.input[0]), -ONE, ZERO))


def _read_identity(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    return Reading(graph.operand(node.input[0]))


def _read_dropout(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    mask_read = len(node.output) > 1 and graph.uses.get(node.output[1])
    training = operand(node, 2)
    live = training is not None and (training not in graph.constants or bool(graph.constants.array(training).any()))
    if mask_read or live or graph.opset < 7:
        return Declined("Dropout is in training mode, or its mask is read")
    return _read_identity(graph, node, output)


def _read_gemm(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    if cast(int, attribute(node, "transA", 0)):
        return Declined("Gemm with transA mixes the batch")
    found = _weight_and_bias(graph, node)
    if isinstance(found, Declined):
        return found
    weight, bias = found
    transposed = cast(int, attribute(node, "transB", 0))
    whole = stored(graph, node) if weight is None else None
    if weight is not None and len(graph.constants.shape(weight)) != 2:
        return Declined("its constant is not a matrix")
    out = whole.out if isinstance(whole, Stored) else graph.constants.shape(weight or "")[0 if transposed else 1]
    if bias is not None and graph.constants.shape(bias) not in ((), (1,), (1, 1), (out,), (1, out)):
        return Declined("the bias of Gemm varies along the batch")
    if weight is None:
        return read_stored(graph, node, bias)
    alpha, beta = (float(cast(float, attribute(node, key, 1.0))) for key in ("alpha", "beta"))
    rows = (out, graph.constants.shape(weight)[1 if transposed else 0])
    w = derived(graph.parameter(weight), rows, lambda w: (w if transposed else w.T) * alpha, moves=alpha == 1)
    b = None
    if bias is not None:
        b = derived(graph.parameter(bias), (out,), lambda b: np.broadcast_to(b.reshape(-1) * beta, (out,)).copy())
    return Reading(Conv(graph.operand(node.input[0]), w, b))


def _read_matmul(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    fixed = [graph.constant(node, 0), graph.constant(node, 1)]
    weight = fixed[0] or fixed[1]
    if weight is None:
        return read_stored(graph, node, None)
    if all(fixed):
        return None
    shape = graph.constants.shape(weight)
    if len(shape) != 2:
        return Declined("its constant is not a matrix")
    if fixed[1]:
        rows = derived(graph.parameter(weight), shape[::-1], lambda w: w.T, moves=True)
        return Reading(Conv(graph.operand(node.input[0]), rows, None))
    if (graph.types.rank(node.input[1]) or 0) < 2:
        return None
    # ``W x`` multiplies the last axis but one: a convolution with one tap along the last
    rows = derived(graph.parameter(weight), (*shape, 1), lambda w: w[..., None], moves=True)
    return Reading(Conv(graph.operand(node.input[1]), rows, None, (1,), (1,), (0,), (0,)))


def _read_einsum(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    """A matrix along one axis: "blc,cd->bld", "oc,bcp->bop". One that moves axes, or sums over several, is none."""
    equation = cast(bytes, attribute(node, "equation", b"")).decode(errors="replace").replace(" ", "")
    terms, _, result = equation.partition("->")
    parts = terms.split(",")
    fixed = [graph.constant(node, i) for i in range(len(node.input))]
    if len(parts) != 2 or len(fixed) != 2 or not result or (fixed[0] is None) == (fixed[1] is None):
        return None
    at = 1 if fixed[0] else 0
    x, weight, labels, matrix = node.input[at], cast(str, fixed[1 - at]), parts[at].replace("...", "."), parts[1 - at]
    inside, outside = [c for c in matrix if c in labels], [c for c in matrix if c not in labels]
    if len(matrix) != 2 or len(inside) != 1 or len(outside) != 1 or "." in matrix:
        return None
    (inner,), (outer,) = inside, outside
    if labels.replace(inner, outer) != result.replace("...", ".") or len(set(labels)) < len(labels):
        return None
    spatial = len(labels) - 1 - labels.index(inner)
    rank = graph.types.rank(x)
    if "." in labels[-spatial:] * bool(spatial) or rank is None or (spatial > 1 and rank != spatial + 2):
        return None
    ones, zeros = (1,) * spatial, (0,) * spatial
    shape = (*graph.constants.shape(weight)[:: 1 if matrix[0] == outer else -1], *ones)
    sizes = graph.types.shape(x)
    if sizes is None or sizes[-1 - spatial].known != shape[1]:
        return Declined("a size of 1 would be broadcast, and that of its operand is unknown")
    rows = derived(graph.parameter(weight), shape, lambda w: (w if matrix[0] == outer else w.T).reshape(shape))
    return Reading(Conv(graph.operand(x), rows, None, ones, ones, zeros, zeros))


def _read_concat(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    shapes = [graph.types.shape(name) for name in node.input]
    if any(name in graph.constants for name in node.input) or any(shape is None for shape in shapes):
        return None
    rank = len(shapes[0] or ())
    axis = cast(int, attribute(node, "axis", 1)) % max(rank, 1)
    sizes = tuple(shape[axis].known or 0 for shape in shapes if shape is not None and len(shape) == rank)
    if len(sizes) < len(shapes) or 0 in sizes or sum(sizes) > MOST_CONCATENATED:
        return None
    axis -= rank
    return Reading(Concat(tuple(map(graph.operand, node.input)), sizes, axis))


def _selection(graph: Facts, x: str, axis: int, index: Sequence[int]) -> Reading | None:
    """Elements ``index`` of ``x`` along ``axis``; None where the size there is unknown."""
    shape = graph.types.shape(x)
    width = shape[axis].known if shape is not None and -len(shape) <= axis < len(shape) else None
    if shape is None or width is None or not 0 < len(index) <= MOST_CONCATENATED or width > MOST_CONCATENATED:
        return None
    if not all(0 <= i < width for i in index):
        return None
    return Reading(Select(graph.operand(x), tuple(index), width, axis % len(shape) - len(shape)))


def _read_split(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    axis, at = cast(int, attribute(node, "axis", 0)), 0
    for name in node.output:
        shape = graph.types.shape(name)
        size = shape[axis].known if shape is not None and -len(shape) <= axis < len(shape) else None
        if size is None:
            return None
        if name == output:
            return _selection(graph, node.input[0], axis, range(at, at + size))
        at += size
    return None


def _read_slice(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    """A slice of channels, or of a map: every s-th position from a to the last but b."""
    shape = graph.types.shape(node.input[0])
    given = [graph.constant(node, i) for i in range(1, 5)]
    if shape is None or graph.opset < 10 or any(n is None and operand(node, i) for i, n in enumerate(given, 1)):
        return None
    starts, ends, axes, steps = (graph.constants.integers(name) if name else None for name in given)
    if not starts or not ends or not len(starts) == len(ends) == len(axes or starts) == len(steps or starts):
        return None
    if 0 in (steps or ()):
        return None
    axes = [axis % len(shape) for axis in axes or range(len(starts))]
    steps = steps or [1] * len(starts)
    of_channels = [axis - len(shape) for axis in axes] == [graph.axis(node.input[0])]
    if not of_channels and min(axes) >= 2 and len(shape) > 2 and (channels := shape[1].known) is not None:
        cuts = {axis - 2: bounds for axis, bounds in zip(axes, zip(starts, ends, steps, strict=True), strict=True)}
        return cropped(graph.operand(node.input[0]), channels, [d.known for d in shape[2:]], cuts)
    if len(axes) == 1 and (width := shape[axes[0]].known) is not None:
        if steps[0] < 0 and not (-width <= starts[0] and ends[0] < width):
            return None  # the standard and runtimes do not agree on it
        return _selection(graph, node.input[0], axes[0], range(width)[starts[0] : ends[0] : steps[0]])
    return None


def _read_gather(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    x = node.input[0]
    index, shape = graph.constant(node, 1), graph.types.shape(x)
    axis = cast(int, attribute(node, "axis", 0))
    width = shape[axis].known if shape is not None and -len(shape) <= axis < len(shape) else None
    if index is None or shape is None or not width or len(graph.constants.shape(index)) > 1:
        return None
    positions = graph.constants.integers(index)
    if not all(-width <= i < width for i in positions):
        return None  # it does not run
    positions = [i % width for i in positions]
    if graph.constants.shape(index):
        return _selection(graph, x, axis, positions)
    return moved(graph.operand(x), Take(len(shape), axis % len(shape), positions[0]), linear=graph.is_linear(x))


def _read_repeat(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    """Tile and Expand along the channels: all of them, a known number of times over."""
    x, name = node.input[0], graph.constant(node, 1)
    shape = graph.types.shape(x)
    if shape is None or name is None or x in graph.constants:
        return None
    given = graph.constants.integers(name)
    if node.op_type == "Expand":
        if len(given) > len(shape):
            return None  # it adds axes
        given = [1] * (len(shape) - len(given)) + given
        given = [1 if n == d.known else n for n, d in zip(given, shape, strict=True)]
        if any(n != 1 and d.known != 1 for n, d in zip(given, shape, strict=True)):
            return None  # it does not run, or repeats what is of size 1 for some inputs only
    if len(given) != len(shape):
        return None
    repeated = [axis for axis, n in enumerate(given) if n != 1]
    if not repeated:
        return _read_identity(graph, node, output)
    axis, channel = repeated[0], graph.axis(x)
    width, times = shape[axis].known, given[axis]
    if len(repeated) > 1 or axis == 0 or channel not in (None, axis - len(shape)):
        return None  # images are repeated, or positions
    if width is None or not 0 < width * times <= MOST_CHANNELS:
        return None
    return _selection(graph, x, axis, [*range(width)] * times)


def _turned(graph: Facts, node: NodeProto) -> tuple[str, Shape, Shape, Shape, list[int]] | None:
    """The operand of Reshape, Transpose, Reshape (``node``), the three shapes, and the order of the axes."""
    turn = graph.producers.get(node.input[0])
    split = graph.producers.get(turn.input[0]) if turn is not None and turn.op_type == "Transpose" else None
    if turn is None or split is None or split.op_type != "Reshape" or not (is_standard(turn) and is_standard(split)):
        return None
    x = split.input[0]
    before, middle, after = (graph.types.shape(name) for name in (x, split.output[0], node.output[0]))
    if before is None or middle is None or after is None:
        return None
    return x, before, middle, after, list(cast(list[int], attribute(turn, "perm", [])))


def _shuffle(graph: Facts, node: NodeProto) -> Reading | None:
    """Reshape, Transpose, Reshape that only permute channels: [N, g c, *] to [N, g, c, *], [N, c, g, *], back."""
    if (found := _turned(graph, node)) is None:
        return None
    x, before, middle, after, order = found
    if before != after or len(middle) != len(before) + 1:
        return None
    turned = [i for i, axis in enumerate(order) if axis != i]
    if len(turned) != 2 or turned[1] != turned[0] + 1:
        return None
    axis = turned[0]
    groups, per_group = middle[axis].known, middle[axis + 1].known
    if groups is None or per_group is None or before[axis].known != groups * per_group:
        return None
    if middle[:axis] != before[:axis] or middle[axis + 2 :] != before[axis + 1 :]:
        return None
    return _selection(graph, x, axis, np.arange(groups * per_group).reshape(groups, per_group).T.ravel().tolist())


def _read_mean(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    x = node.input[0]
    rank = graph.types.rank(x)
    if rank is None:
        return None
    if node.op_type == "GlobalAveragePool":
        return moved(graph.operand(x), Mean(rank, tuple(range(2, rank)), keep=True))
    name = graph.constant(node, 1)
    axes = graph.constants.integers(name) if name else cast("list[int] | None", attribute(node, "axes"))
    if not axes or (operand(node, 1) and name is None):
        return None  # over all axes, or over axes computed at run time
    keep = bool(cast(int, attribute(node, "keepdims", 1)))
    return moved(graph.operand(x), Mean(rank, tuple(sorted(a % rank for a in axes)), keep))


def _read_resize(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    """A resize by whole numbers, or by halves, of all axes but the batch and the channels."""
    x = node.input[0]
    before, after = graph.types.shape(x), graph.types.shape(output)
    if before is None or after is None or len(before) < 3:
        return None
    op = _resize_op(graph, node, before, after)
    if not isinstance(op, Resize):
        return op
    source = graph.operand(x)
    if op.growth == 1 == max(op.scales):
        return Reading(source)  # every result is at a position
    return moved(source if source.axis is not None else replace(source, axis=1 - len(before)), op)


def _resize_op(graph: Facts, node: NodeProto, before: Shape, after: Shape) -> Resize | Declined | None:
    given = [operand(node, i) for i in range(1, 4)]
    if node.op_type == "Upsample" or graph.opset < 11:  # nothing but scales
        given = [None, given[0], None]
    scales, sizes = (name if name is None or name in graph.constants else "" for name in given[1:])
    place = cast(bytes, attribute(node, "coordinate_transformation_mode", b"half_pixel")).decode(errors="replace")
    mode = cast(bytes, attribute(node, "mode", b"nearest")).decode(errors="replace")
    rounding = cast(bytes, attribute(node, "nearest_mode", b"round_prefer_floor")).decode(errors="replace")
    if graph.opset < 11:
        place, rounding = "asymmetric", "floor"
    if "" in (scales, sizes) or (scales is None and sizes is None):
        return Declined("its size is computed at run time")
    if any(attribute(node, name) for name in ("antialias", "exclude_outside", "axes", "keep_aspect_ratio_policy")):
        return Declined("it resizes with antialias, exclude_outside or chosen axes")
    if place not in PLACES or mode not in MODES or (mode == "nearest" and rounding not in ROUNDINGS):
        return Declined(f"it resizes with mode {mode!r} and coordinates {place!r}")
    factors = _factors(graph, scales if scales and graph.constants.shape(scales) != (0,) else None, before, after)
    if factors is None:
        return Declined("it resizes the channels, or by a factor that is no whole number and no power of a half")
    if prod(factors) > MOST_GROWN:
        return Declined("it makes too large a map")
    cubic = cast(float, attribute(node, "cubic_coeff_a", -0.75))
    return Resize(len(before), factors, mode, place, rounding, float(cubic), node.output[0])


def _factors(graph: Facts, scales: str | None, before: Shape, after: Shape) -> tuple[Fraction, ...] | None:
    """The factors along all axes but the first two, if they are exact in float32."""
    from fractions import Fraction

    if scales is not None:
        given = graph.constants.array(scales).ravel()
        found = [Fraction(float(s)) for s in given] if np.isfinite(given).all() else []
    else:
        sizes = [(m.known, n.known) for m, n in zip(before, after, strict=True)]
        if any(not m or not n for m, n in sizes[2:]) or before[:2] != after[:2]:
            return None
        found = [Fraction(1), Fraction(1), *(Fraction(n or 1, m or 1) for m, n in sizes[2:])]
    exact = all(f.denominator == 1 or (f.numerator == 1 and f.denominator.bit_count() == 1) for f in found)
    return tuple(found[2:]) if exact and found[:2] == [1, 1] and len(found) == len(before) else None


def _read_depth_to_space(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    x, block = node.input[0], cast(int, attribute(node, "blocksize", 0))
    channels, mode = _channels(graph, x, -3), attribute(node, "mode", b"DCR")
    if channels is None or block < 1 or channels % block**2 or mode not in (b"DCR", b"CRD"):
        return None
    return _spread(graph, x, Spread(4, block, mode == b"DCR", native=output))


def _read_space_to_depth(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    x, block = node.input[0], cast(int, attribute(node, "blocksize", 0))
    if _channels(graph, x, -3) is None or block < 1:
        return None
    return _spread(graph, x, Spread(4, block, outer=True, back=True, native=output))


def _spread(graph: Facts, x: str, op: Spread) -> Reading | Declined | None:
    source = graph.operand(x)
    source = source if source.axis is not None else replace(source, axis=-3, channels=_channels(graph, x, -3))
    return moved(source, op, linear=op.back or graph.is_linear(x)) if source.axis == -3 else None


def _unfolded(graph: Facts, node: NodeProto) -> Reading | Declined | None:
    """Reshape, Transpose, Reshape: [N, C b b, H, W] to [N, C, H b, W b], positions made of channels; or back."""
    if (found := _turned(graph, node)) is None or (how := _ORDERS.get(tuple(found[-1]))) is None or graph.opset < 11:
        return None
    x, before, middle, after, _ = found
    outer, back = how
    if len(before) != 4 or len(middle) != 6 or len(after) != 4:
        return None
    few, many = (before, after) if back else (after, before)
    block = middle[5] if back else middle[1] if outer else middle[2]
    n, inner, *sizes = few[0], few[1], *many[2:]
    apart = [block, block, inner] if outer else [inner, block, block]
    split = [n, inner, sizes[0], block, sizes[1], block] if back else [n, *apart, *sizes]
    if block.known is None or inner.known is None or list(middle) != split:
        return None
    if list(many) != [n, inner * block * block, *sizes] or list(few) != [n, inner, *(e * block for e in sizes)]:
        return None
    return _spread(graph, x, Spread(4, block.known, outer, back, node.output[0]))


_ORDERS: dict[tuple[int, ...], tuple[bool, bool]] = {
    (0, 3, 4, 1, 5, 2): (True, False), (0, 1, 4, 2, 5, 3): (False, False),
    (0, 3, 5, 1, 2, 4): (True, True), (0, 1, 3, 5, 2, 4): (False, True),
}  # fmt: skip
"""The orders of axes in which a `Spread` is written: whether it is ``outer``, and whether it goes ``back``."""


def _read_layout(graph: Facts, node: NodeProto, output: str) -> Reading | Declined | None:
    before, after = graph.types.shape(node.input[0]), graph.types.shape(node.output[0])
    if before is None or after is None:
        return None
    if node.op_type == "Transpose":
        axes = tuple(cast(list[int], attribute(node, "perm", list(reversed(range(len(before)))))))
        op: LayoutOp = Permute(axes)
    else:
        op = Reshape(before, after, output)
    x = node.input[0]
    shuffled = (_shuffle(graph, node) or _unfolded(graph, node)) if node.op_type == "Reshape" else None
    return shuffled or moved(graph.operand(x), op, linear=graph.is_linear(x))


def _channels(graph: Facts, name: str, axis: int) -> int | None:
    shape = graph.types.shape(name)
    return shape[axis].known if shape is not None and len(shape) >= -axis else None


def _not_constant(graph: Facts, node: NodeProto, position: int) -> str:
    name = operand(node, position)
    if name in graph.constants.overridable:
        return f"its parameter {name!r} is a graph input that a caller may override"
    return f"its parameter {name!r} is computed at run time"


READERS: dict[str, Reader] = {
    "Conv": _read_conv,
    "ConvTranspose": _read_conv_transpose,
    "AveragePool": _read_average_pool,
    "Pad": _read_pad,
    "BatchNormalization": _read_batchnorm,
    **dict.fromkeys(NORMS, read_norm),
    "Gemm": _read_gemm,
    "MatMul": _read_matmul,
    **dict.fromkeys(("Add", "Sub", "Mul", "Div"), _read_arithmetic),
    "Sum": _read_sum,
    "Mean": _read_average,
    "Einsum": _read_einsum,
    "Concat": _read_concat,
    "Split": _read_split,
    "Slice": _read_slice,
    "DepthToSpace": _read_depth_to_space,
    "SpaceToDepth": _read_space_to_depth,
    "Gather": _read_gather,
    **dict.fromkeys(("Tile", "Expand"), _read_repeat),
    "Neg": _read_neg,
    "Identity": _read_identity,
    "Dropout": _read_dropout,
    "FusedConv": _read_conv,
    **dict.fromkeys(("GlobalAveragePool", "ReduceMean"), _read_mean),
    **dict.fromkeys(("Resize", "Upsample"), _read_resize),
    **dict.fromkeys(("Flatten", "Reshape", "Transpose", "Squeeze", "Unsqueeze"), _read_layout),
}

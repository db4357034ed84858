"""Operators that end in a matrix of constants, whatever they gather before: their outputs take scales and shifts.

A convolution whose padding follows from the size of its operand is no kernel, and a weight that is stored as whole
numbers must stay so. But a factor for each output channel only touches the rows of the weight, or the scale that its
whole numbers are multiplied by. `Taps` are what such rows, or such scales, multiply.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any, cast

import numpy as np
from onnx import NodeProto, helper

from reparamc.algebra.arrays import Array, derived
from reparamc.algebra.expr import Conv, Source
from reparamc.algebra.kernels import ONE_EACH, swap_sides
from reparamc.algebra.records import record
from reparamc.algebra.rewrite import Declined
from reparamc.compiler.readings import Reading, Taps, is_norm
from reparamc.onnx.facts import Facts
from reparamc.onnx.values import FLOATS, attribute, is_standard, operand

OF_THE_WEIGHT = ("group", "alpha", "beta")
"""Attributes that decide what is done with what is gathered, or with the bias."""


def read_taps(graph: Facts, node: NodeProto, weight: str, bias: str | None) -> Reading:
    """A convolution with a constant weight as a matrix over what it gathers."""
    shape, groups = graph.constants.shape(weight), cast(int, attribute(node, "group", 1))
    transposed = node.op_type == "ConvTranspose"
    inside = shape[0] if transposed else shape[1] * groups
    kind = (node.op_type, shape[2:], _attributes(node))
    taps = Taps(kind, (node.input[0],), inside * prod(shape[2:]), len(shape) - 2, node.output[0])
    rows = graph.parameter(weight)
    return taps.reading(swap_sides(rows, groups) if transposed else rows, _vector(graph, bias), groups)


def _attributes(node: NodeProto) -> Sequence[bytes]:
    return tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute if a.name not in OF_THE_WEIGHT))


def _vector(graph: Facts, name: str | None, out: int | None = None, factor: float = 1.0) -> Array | None:
    """The entries of a parameter, each of them ``factor`` times; copied for ``out`` channels where there is but one."""
    if name is None:
        return None
    shape = (prod(graph.constants.shape(name)) if out is None else out,)
    return derived(graph.parameter(name), shape, lambda a: np.broadcast_to(a.ravel() * factor, shape).copy())


@record
class Stored:
    """A weight that is stored as whole numbers, or as coarse floating ones, times a scale.

    Attributes:
        node: the DequantizeLinear.
        scale: the name of the scale, a scalar or one for each output channel.
        axis: that of the output channels, in the weight.
        out: how many there are.
    """

    node: NodeProto
    scale: str
    axis: int
    out: int


NORMS = ("GroupNormalization", "InstanceNormalization", "LayerNormalization", "RMSNormalization")
"""Operators that normalize by statistics of their operand, and then have a factor and a shift for each channel."""


def read_norm(graph: Facts, node: NodeProto, output: str) -> Reading | None:
    """A normalization as a factor and a shift of each channel of what it gives without them."""
    shape, along_last = graph.types.shape(node.input[0]), node.op_type in ("LayerNormalization", "RMSNormalization")
    names = [graph.constant(node, i) for i in (1, 2)]
    if shape is None or any(name is None and operand(node, i) for i, name in enumerate(names, 1)) or not names[0]:
        return None
    if any(node.output[1:]) or (along_last and attribute(node, "axis", -1) not in (-1, len(shape) - 1)):
        return None
    channels = shape[-1 if along_last else 1].known
    if channels is None or any(name and graph.constants.shape(name) != (channels,) for name in names):
        return None
    attributes = tuple(sorted(a.SerializeToString(deterministic=True) for a in node.attribute))
    spatial = 0 if along_last else len(shape) - 2
    taps = Taps((node.op_type, attributes), (node.input[0],), channels, spatial, node.output[0], norm=True)
    return taps.reading(graph.parameter(names[0]), graph.parameter(names[1]) if names[1] else None, channels)


def stored(graph: Facts, node: NodeProto) -> Stored | Declined | None:
    """The weight of ``node`` as it is stored; None where that is no DequantizeLinear of constants."""
    name = node.input[1] if len(node.input) > 1 else ""
    made = graph.producers.get(name)
    if made is None or made.op_type != "DequantizeLinear" or not is_standard(made):
        return None
    if not all(n in graph.constants for n in made.input if n):
        return None
    shape, scale = graph.constants.shape(made.input[0]), made.input[1]
    axis = _output_axis(node, len(shape))
    if isinstance(axis, Declined):
        return axis
    scales = graph.constants.shape(scale)
    along = cast(int, attribute(made, "axis", 1)) % max(len(shape), 1)
    if attribute(made, "block_size") or (scales not in ((), (1,)) and (scales != (shape[axis],) or along != axis)):
        return Declined("the scales of its stored weight are not one for each output channel")
    kind = graph.constants.element_type(scale)
    if kind not in FLOATS or FLOATS[kind] != graph.types.dtype(node.output[0]):
        return Declined("the scales of its stored weight are of another type than the result")
    return Stored(made, scale, axis, shape[axis])


def _output_axis(node: NodeProto, rank: int) -> int | Declined:
    """The axis of the output channels in the weight of ``node``."""
    match node.op_type:
        case "Conv":
            return 0
        case "ConvTranspose" if attribute(node, "group", 1) == 1:
            return 1
        case "Gemm" if not attribute(node, "transA", 0):
            return 0 if attribute(node, "transB", 0) else 1
        case "MatMul" if rank == 2:
            return 1
    return Declined("its stored weight has no axis of output channels")


def read_stored(graph: Facts, node: NodeProto, bias: str | None) -> Reading | Declined | None:
    """A linear operator whose weight is stored as whole numbers, as a scale of each channel of what these give."""
    found = stored(graph, node)
    if found is None or isinstance(found, Declined):
        return found
    operands = (node.input[0],)
    alpha, beta = (cast(float, attribute(node, key, 1.0)) for key in ("alpha", "beta"))
    group = attribute(node, "group", 1)
    whole = (found.node.input[0], found.node.input[2] if len(found.node.input) > 2 else "")
    kind = ("stored", node.op_type, whole, _attributes(node), group, alpha)
    spatial = len(graph.constants.shape(whole[0])) - 2
    taps = Taps(kind, operands, found.out, spatial, node.output[0])

    scale = _vector(graph, found.scale, found.out)
    assert scale is not None
    rows = derived(scale, (found.out, 1, *(1,) * spatial), lambda a: a.reshape(-1, 1, *(1,) * spatial))
    return taps.reading(rows, _vector(graph, bias, found.out, float(beta)), found.out)


def obstacle(graph: Facts, e: Conv) -> str | None:
    """Why the operator whose taps ``e`` reads cannot have the weight of ``e``; None when it can."""
    if is_norm(e) and not e.is_per_channel:
        return ONE_EACH
    if is_norm(e) and e.bias is None and graph.producers[_operator(e)].op_type == "InstanceNormalization":
        return "an InstanceNormalization has to have a bias"
    found = stored(graph, graph.producers[_operator(e)])
    if isinstance(found, Stored) and not (e.groups == found.out == e.out_channels):
        return "its weight is stored as whole numbers, which only a factor for each channel leaves as they are"
    return None


def _operator(e: Conv) -> str:
    return str(cast(Taps, cast(Source, e.x).key).of)


def with_weight(
    graph: Facts,
    e: Conv,
    parameter: Callable[[str, Array], str],
    copies: Callable[[str, str, int], str],
    add: Callable[..., str],
    output: str | None,
) -> str:
    """Add the operator whose taps ``e`` reads, with the weight and bias of ``e``; the name of its result.

    Args:
        parameter: stores an array under a name of that kind.
        copies: stores a vector of that many copies of a constant number, given a name for it and that of the number.
        add: adds a node, given the operator, its operands, the name of its result and its attributes.
        output: the name of the result; None for a new one.
    """
    node = graph.producers[_operator(e)]
    found = stored(graph, node)
    attributes: dict[str, Any] = {a.name: helper.get_attribute_value(a) for a in node.attribute}
    if isinstance(found, Stored):
        weight = _rescaled(graph, found, e.weight.ravel(), parameter, copies, add)
        attributes.pop("beta", None)
    elif is_norm(e):
        weight = parameter("scale", e.weight.ravel())
    else:
        kernel = graph.constants.shape(node.input[1])[2:]
        matrix = e.weight.reshape(e.out_channels, -1, *kernel)
        weight = parameter("weight", swap_sides(matrix, e.groups) if node.op_type == "ConvTranspose" else matrix)
        attributes["group"] = e.groups
    inputs = [node.input[0], weight]
    if node.op_type in ("MatMul", "RMSNormalization") and e.bias is not None:
        return add("Add", [add(node.op_type, inputs, None, **attributes), parameter("bias", e.bias)], output)
    inputs += [parameter("bias", e.bias)] if e.bias is not None else []
    return add(node.op_type, inputs, output, **attributes)


def _rescaled(
    graph: Facts,
    found: Stored,
    scales: Array,
    parameter: Callable[[str, Array], str],
    copies: Callable[[str, str, int], str],
    add: Callable[..., str],
) -> str:
    """Add the stored weight times other scales; its name."""
    whole, _, *zero = found.node.input
    one = graph.constants.shape(found.scale) in ((), (1,)) and bool(np.all(scales == scales[0]))
    given = [whole, parameter("weight_scale", scales[0] if one else scales)]
    attributes = {a.name: helper.get_attribute_value(a) for a in found.node.attribute}
    if zero and zero[0]:
        each = not one and graph.constants.shape(zero[0]) != (found.out,)
        given.append(copies(f"{zero[0]}.each", zero[0], found.out) if each else zero[0])
    if not one:
        attributes["axis"] = found.axis
    return add("DequantizeLinear", given, None, **attributes)

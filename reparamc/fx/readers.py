"""Readers: one function per torch operator, from a call in its one form to what it means as a linear operator.

A reader answers None where the operator is not linear, and `Declined` with the reason where it nearly is. To add one,
enter the operator in `reparamc.fx.operators` and its shape in `reparamc.fx.shapes`, write its reader here, enter that
in `READERS`, and let the certificate read it as well; `tests/fx/test_fx_table.py` says what is missing. The first line
of a reader is what the documentation says of its operator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn

from reparamc.algebra.arrays import Parameter, derived, together
from reparamc.algebra.expr import (
    ONE,
    ZERO,
    Array,
    BatchNorm,
    Concat,
    Conv,
    LayoutOp,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Spread,
    Sum,
    Take,
)
from reparamc.algebra.kernels import averaged, equal_taps, swap_sides, transposed
from reparamc.algebra.resample import OTHER
from reparamc.algebra.rewrite import Declined
from reparamc.algebra.shape import Dim
from reparamc.compiler.readings import (
    ACTIVATION,
    LAST,
    MOST_CHANNELS,
    Reading,
    Taps,
    axis_of_constant,
    cropped,
    moved,
    scaled,
)
from reparamc.fx.calls import Call, aten_name, integers, lookup, takes_all
from reparamc.fx.readings import HOOKED, Reader, Readings, array

if TYPE_CHECKING:
    from reparamc.algebra.shape import Shape

CHANNELS_UNKNOWN = "the number of its channels is unknown: pass example_inputs"


def _read_conv(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A convolution; with its taps as channels where it pads other than with known numbers of zeros."""
    found = _parameters(graph, call)
    if found is None or isinstance(found, Declined):
        return found
    weight, bias = found
    x = cast(fx.Node, call.input)
    n = weight.ndim - 2
    groups = call.get("groups", 1)
    if not isinstance(groups, int):
        return Declined("the number of its groups is computed at run time")
    stride, dilation = (integers(call.get(key, 1), n) for key in ("stride", "dilation"))
    pads = None if dilation is None else _padding(call.get("padding", 0), dilation, tuple(weight.shape[2:]))
    if stride is None or dilation is None or pads is None or call.get("padding_mode", "zeros") != "zeros":
        return _read_taps(graph, node, call, weight, bias)
    return Reading(Conv.padded(graph.operand(x), weight, bias, stride, dilation, *pads, groups))


def _padding(
    wanted: Any, dilation: tuple[int, ...], kernel: tuple[int, ...]
) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Zeros before and after, per axis; None where they are computed at run time."""
    if wanted == "same":
        totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
        begin = tuple(t // 2 for t in totals)
        return begin, tuple(t - b for t, b in zip(totals, begin, strict=True))
    pads = integers(0 if wanted == "valid" else wanted, len(kernel))
    return None if pads is None else (pads, pads)


def _read_gathering(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A convolution of a class of its own that does something to its operand first: with its taps as channels."""
    found = _parameters(graph, call)
    return found if found is None or isinstance(found, Declined) else _read_taps(graph, node, call, *found)


def _read_conv_transpose(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A transposed convolution; with its taps as channels where it is given an output size."""
    found = _parameters(graph, call)
    if found is None or isinstance(found, Declined):
        return found
    weight, bias = found
    x = cast(fx.Node, call.input)
    n = weight.ndim - 2
    groups = call.get("groups", 1)
    keys = {"stride": 1, "padding": 0, "output_padding": 0, "dilation": 1}
    geometry = [integers(call.get(key, default), n) for key, default in keys.items()]
    if not isinstance(groups, int):
        return Declined("the number of its groups is computed at run time")
    sized = node.op == "call_module" and (len(node.args) > 1 or "output_size" in node.kwargs)
    if None in geometry or sized:
        return _read_taps(graph, node, call, weight, bias)
    stride, begin, more, dilation = cast("list[tuple[int, ...]]", geometry)
    end = tuple(b - m for b, m in zip(begin, more, strict=True))
    rows = swap_sides(weight, groups)
    return Reading(transposed(graph.operand(x), rows, bias, stride, dilation, begin, end, groups))


def _read_taps(graph: Readings, node: fx.Node, call: Call, weight: Array, bias: Array | None) -> Reading:
    """A convolution that is no kernel over its operand, as a matrix over what it reads at each position."""
    groups, transposed = call.get("groups", 1), call.op == "conv_transpose"
    geometry = {name: str(value) for name, value in call.args.items() if name not in ("weight", "bias", "groups")}
    beside = (str(node.args[1:]), str(node.kwargs)) if node.op == "call_module" else ()
    kind = (call.op, tuple(weight.shape[2:]), *sorted(geometry.items()), *beside)
    operands = tuple(n for n in node.all_input_nodes if n not in graph.facts.known)
    inside = weight.shape[0] if transposed else weight.shape[1] * groups
    taps = Taps(kind, operands, inside * prod(weight.shape[2:]), weight.ndim - 2, node)
    return taps.reading(swap_sides(weight, groups) if transposed else weight, bias, groups)


def _read_linear(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A matrix along the last axis."""
    found = _parameters(graph, call)
    if found is None or isinstance(found, Declined):
        return found
    weight, bias = found
    return None if weight.ndim != 2 else Reading(Conv(graph.operand(cast(fx.Node, call.input)), weight, bias))


def _read_product(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """``x @ W``, ``W @ x`` and ``bias + x @ W`` with a constant matrix."""
    x = call.args.get("input")
    weight, bias = graph.leaf(call.args.get("other")), graph.leaf(call.args.get("bias"))
    if call.op == "matmul" and graph.facts.contraction(call) is not None:
        return _read_einsum(graph, node, call)
    if weight is None or not isinstance(x, fx.Node) or x in graph.facts.constants:
        return None
    if weight.ndim != 2 or not weight.origin.is_floating_point():
        return Declined("its constant is not a matrix")
    plain = call.get("alpha", 1) == 1 and call.get("beta", 1) == 1
    if call.op == "addmm" and (not plain or bias is None or bias.shape != weight.shape[1:]):
        return Declined("its bias is no constant vector, or it is scaled")
    rows = derived(_array(weight), weight.shape[::-1], lambda w: w.T)
    return Reading(Conv(graph.operand(x), rows, _array(bias)))


def _read_einsum(graph: Readings, node: fx.Node, call: Call) -> Reading | None:
    """A constant matrix along one axis, told by letters."""
    found = graph.facts.contraction(call)
    weight = None if found is None else graph.leaf(found.weight)
    if found is None or weight is None or found.x in graph.facts.known or not weight.origin.is_floating_point():
        return None
    rows = derived(_array(weight), weight.shape[::-1], lambda w: w.T) if found.transposed else _array(weight)
    spatial, rank = -1 - found.axis, graph.facts.rank(found.x) or found.rank
    if not spatial:
        return Reading(Conv(graph.operand(found.x), rows, None))
    if rank != spatial + 2 or spatial > 3:  # it is no map
        return None
    shape, ones, zeros = (*rows.shape, *(1,) * spatial), (1,) * spatial, (0,) * spatial
    taps = derived(rows, shape, lambda w: together(w)[0].reshape(w, shape))
    return Reading(Conv(graph.operand(found.x), taps, None, ones, ones, zeros, zeros))


def _parameters(graph: Readings, call: Call) -> tuple[Array, Array | None] | Declined | None:
    """The weight and bias of a convolution or linear layer over a value that is no constant."""
    weight, bias = graph.leaf(call.args.get("weight")), graph.leaf(call.args.get("bias"))
    if call.input is None or call.input in graph.facts.known:
        return None
    if weight is None or (call.args.get("bias") is not None and bias is None):
        return Declined("its weight or bias is computed at run time")
    if not weight.origin.is_floating_point():
        return None
    return _array(weight), _array(bias)


def _read_batchnorm(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A BatchNorm that uses running statistics."""
    x = call.input
    if call.get("training", False) is not False or call.get("running_mean") is None:
        return Declined("BatchNorm uses the statistics of the batch")
    if x is None:
        return None
    if not call.plain:
        return Declined(HOOKED)
    given = [call.args.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
    held = [graph.leaf(value) for value in given]
    eps = call.get("eps", 1e-5)
    if any(v is not None and h is None for v, h in zip(given, held, strict=True)) or not isinstance(eps, int | float):
        return Declined("the parameters of batch_norm are computed at run time")
    rank = graph.facts.rank(node) or graph.facts.rank(x)
    if rank is None:
        return Declined("the rank of its input is unknown, and with it the axis it acts on: pass example_inputs")
    gamma, beta, mean, var = map(_array, held)
    if mean is None or var is None:
        return None
    gamma, beta = np.ones(mean.shape) if gamma is None else gamma, np.zeros(mean.shape) if beta is None else beta
    return Reading(BatchNorm(graph.operand(x), gamma, beta, mean, var, float(eps), -1 - max(rank - 2, 0)))


def _read_norm(graph: Readings, node: fx.Node, call: Call) -> Reading | None:
    """A normalization by statistics of its operand, as a factor and a shift of each channel of what that gives."""
    x, rank = call.input, graph.facts.rank(node)
    if x is None or x in graph.facts.known or rank is None or not call.plain or call.get("running_mean") is not None:
        return None
    axis = graph.facts.axis_of_norm(call, rank)
    given = [call.args.get(key) for key in ("weight", "bias")]
    held = [graph.leaf(value) for value in given]
    shape, counts = graph.facts.shapes.get(x), {p.shape for p in held if p is not None}
    if shape is not None and -axis <= rank and (size := shape[axis].known) is not None:
        counts.add((size,))
    if "normalized_shape" in call.args:
        counts.add(tuple(integers(call.get("normalized_shape"), 1) or ()))
    channels = counts.pop() if len(counts) == 1 else ()
    if len(channels) != 1 or any(v is not None and p is None for v, p in zip(given, held, strict=True)):
        return None
    weight, bias = map(_array, held)
    options = sorted((key, str(value)) for key, value in call.args.items() if key not in ("input", "weight", "bias"))
    taps = Taps((call.op, *options), (x,), channels[0], -1 - axis, node, norm=True)
    return taps.reading(np.ones(channels) if weight is None else weight, bias, channels[0])


def _read_neg(graph: Readings, node: fx.Node, call: Call) -> Reading | None:
    """A factor of -1."""
    x = call.input
    return None if x is None else Reading(Scale(graph.operand(x), -ONE, ZERO))


def _read_identity(graph: Readings, node: fx.Node, call: Call) -> Reading | None:
    """Its operand."""
    x = call.input
    return None if x is None or x in graph.facts.known else Reading(graph.operand(x))


def _read_dropout(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """Its operand, in eval mode."""
    if call.args.get("training", True) is not False:
        return None
    return _read_identity(graph, node, call) if call.plain else Declined("it has hooks")


def _read_arithmetic(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """Sums and differences of two values, and a value with a constant that varies along one axis."""
    op, factor = call.op, call.get("alpha", 1)
    left, right = call.args.get("input"), call.args.get("other")
    if set(call.args) - {"alpha", "input", "other"} or not isinstance(factor, int | float):
        return None
    if left is None or right is None:
        return None
    fixed = [_constant(graph, left), _constant(graph, right)]
    if all(c is not None for c in fixed):
        return None
    if all(c is None for c in fixed):
        return _read_sum(graph, left, right, float(factor if op == "add" else -factor)) if op in _SUMS else None
    side = 1 if fixed[1] is not None else 0
    constant, x = cast(Tensor, fixed[side]), (left, right)[1 - side]
    if not isinstance(x, fx.Node) or x in graph.facts.dims or (op == "div" and side == 0):
        return None
    if op == "add" and constant.ndim == 0 and constant == 0 and factor == 1:
        return Reading(graph.operand(x))  # sum() starts from zero
    axis = _along_one_axis(graph, constant, x)
    if isinstance(axis, Declined):
        return axis
    if x.op == "placeholder" and x not in graph.facts.shapes:
        return Declined("the dtype of its operand is unknown: pass example_inputs")
    linear = x.op == "placeholder" or isinstance(graph.read(x), Reading)
    if axis is None and not linear:
        return Declined(ACTIVATION)
    if axis is None and op in _SUMS and any(_clips(u, graph.module) for u in node.users):
        return Declined(ACTIVATION)
    leaf = _array(graph.leaf((left, right)[side]))
    c = array(constant) if leaf is None else leaf
    return scaled(op, graph.operand(x), c, axis, first=not side, factor=float(factor))


_SUMS = ("add", "sub")


def _read_sum(graph: Readings, left: Any, right: Any, weight: float) -> Reading | None:
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    if any(n in graph.facts.dims or n in graph.facts.known for n in (left, right)):
        return None
    shapes = [graph.facts.shapes.get(n) for n in (left, right)]
    if None not in shapes and len(cast(tuple, shapes[0])) != len(cast(tuple, shapes[1])):
        return None
    sizes = [[d.known for d in shape or ()] for shape in shapes]
    if any(None not in pair and pair[0] != pair[1] for pair in zip(*sizes, strict=False)):
        return None  # one operand is broadcast
    a, b = graph.operand(left), graph.operand(right)
    return Reading(Sum((a, b if weight == 1 else Scale(b, np.asarray(weight), ZERO))))


def _constant(graph: Readings, arg: Any) -> Tensor | None:
    value = graph.facts.known.get(arg) if isinstance(arg, fx.Node) else arg
    if isinstance(value, int | float) and not isinstance(value, bool):
        return torch.tensor(value, dtype=torch.float64)
    return value if isinstance(value, Tensor) and not value.is_complex() else None


def _along_one_axis(graph: Readings, constant: Tensor, x: fx.Node) -> int | Declined | None:
    """The axis along which ``constant`` varies; None for a scalar; Declined if it may broadcast."""
    dims, shape, axis = tuple(constant.shape), graph.facts.shapes.get(x), graph.axis(x)
    rank = len(shape) if shape is not None else None if axis is None else -axis
    if dims and (rank is None or len(dims) > rank):
        return Declined("its constant may raise the rank: pass example_inputs")

    def size(along: int) -> int | None:
        known = shape[along].known if shape is not None else None
        return graph.channels(x, axis) if known is None and axis == along else known

    return axis_of_constant(dims, size)


def _read_layout(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """Axes in another order or other groups; a channel shuffle where reshapes and a transpose make one."""
    if node in graph.shuffles:
        x, groups, _ = graph.shuffles[node]
        rank, axis = graph.facts.rank(x), _image_axis(graph, x)
        return (
            _select(graph, x, _shuffled(graph, x, groups), axis)
            if axis not in (None, -1) and rank == 1 - axis
            else None
        )
    found, x = graph.facts.layout(node), call.input
    if found is None or x is None or found[0] is None or x in graph.facts.known:
        return None
    before, after, axes = cast("tuple[Shape, Shape, tuple[int, ...] | None]", found)
    lists = call.op == "reshape" and isinstance(call.get("shape"), tuple | list)
    free = frozenset(range(len(after)) if lists else ())
    return _moved(graph, x, Reshape(before, after, node, free) if axes is None else Permute(axes))


def _moved(graph: Readings, x: fx.Node, op: LayoutOp) -> Reading | Declined | None:
    return moved(graph.operand(x), op, linear=isinstance(graph.read(x), Reading))


_INTERPOLATED = {
    "nearest": "nearest", "linear": "linear", "bilinear": "linear", "trilinear": "linear", "bicubic": "cubic",
    "nearest-exact": OTHER, "area": OTHER,
}  # fmt: skip


def _read_interpolate(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A resize: known if it is by whole numbers or by halves, nearest, linear or cubic; or else some linear map."""
    x = call.input
    shape = graph.facts.shapes.get(x) if x is not None else None
    mode = _INTERPOLATED.get(call.get("mode", "nearest"))
    if x is None or shape is None or x in graph.facts.known or len(shape) < 3 or mode is None or not call.plain:
        return None
    if call.get("antialias", False) is not False or call.get("recompute_scale_factor") is not None:
        mode = OTHER
    axes, size, scale = len(shape) - 2, call.args.get("size"), call.args.get("scale_factor")
    factors: list[Fraction] = []
    for at in range(axes):
        given: Any = scale if size is None else size
        one = given[at] if isinstance(given, tuple | list) else given
        known = shape[2 + at].known
        if isinstance(one, int | float) and size is None:
            factors.append(Fraction(one))
        elif isinstance(one, int) and known:
            factors.append(Fraction(one, known))
    exact = all(f.denominator == 1 or (f.numerator == 1 and f.denominator.bit_count() == 1) for f in factors)
    if len(factors) < axes or not exact:
        mode = OTHER
    corners = call.get("align_corners", False) is True
    place = "asymmetric" if mode == "nearest" else "align_corners" if corners else "half_pixel"
    if mode == OTHER:
        place = ",".join(f"{key}={value}".replace(" ", "") for key, value in call.args.items() if key != "input")
        factors = factors if len(factors) == axes else [Fraction(2)] * axes
    op = Resize(len(shape), tuple(factors), mode, place, native=node)
    if mode != OTHER and op.growth == 1 == max(op.scales):
        return Reading(graph.operand(x))  # every result is at a position
    return _resized(graph, x, op)


def _resized(graph: Readings, x: fx.Node, op: Resize) -> Reading | Declined | None:
    source = graph.operand(x)
    return moved(source if source.axis is not None else replace(source, axis=-1 - len(op.scales)), op)


def _read_mean(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A mean over some axes; over all spatial axes for an adaptive pooling to one element, or else some linear map."""
    x = call.input
    rank = graph.facts.rank(x) if x is not None else None
    if x is None or rank is None or x in graph.facts.known or call.args.get("dtype") is not None:
        return None
    if call.op == "adaptive_avg_pool":
        if call.axes is None:
            return None
        if integers(sizes := call.get("output_size"), call.axes) != (1,) * call.axes:
            place = str(sizes).replace(" ", "")
            return _resized(graph, x, Resize(rank, (Fraction(1, 2),) * call.axes, OTHER, place, native=node))
        axes, keep = tuple(range(rank - (call.axes or 0), rank)), True
    else:
        dims = call.get("dim")
        dims = (dims,) if isinstance(dims, int) else dims
        keep = call.get("keepdim", False)
        if not isinstance(dims, tuple | list) or not all(isinstance(d, int) for d in dims) or keep not in (True, False):
            return None
        axes = tuple(sorted(d % rank for d in dims))
    return _moved(graph, x, Mean(rank, axes, keep)) if axes else None


# Routing of channels


def _image_axis(graph: Readings, x: fx.Node) -> int | None:
    """The channel axis of ``x``, or that of an image of its rank where nothing linear fixes it."""
    axis, rank = graph.axis(x), graph.facts.rank(x)
    return axis if axis is not None or rank is None or rank < 4 else 1 - rank


def _select(graph: Readings, x: fx.Node, index: Sequence[int], axis: int) -> Reading | Declined:
    width = graph.channels(x, axis)
    if width is None:
        return Declined(CHANNELS_UNKNOWN)
    if not index:
        return Declined("it selects nothing")
    return Reading(Select(graph.operand(x), tuple(index), width, axis))


def _read_getitem(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """An index; or one result of what has several."""
    made = graph.facts.calls.get(call.input) if call.input is not None else None
    if call.input is None or made is None or made.op not in ("split", "chunk", "unbind"):
        return _read_slice(graph, node, call)
    if made.input is None or call.input not in graph.through:
        return None
    if made.op == "unbind":
        return _position(graph, made.input, made.get("dim", 0), call.args.get("index"))
    return _piece(graph, made.input, made, call.args.get("index"))


def _read_slice(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """Some positions along one axis, or one of them; or every n-th position of a map."""
    x = call.input
    if x is None or x in graph.facts.known:
        return None
    if call.op == "slice" and takes_all(call):
        return _read_identity(graph, node, call)  # torch.export writes one for every colon
    channel, shape = _image_axis(graph, x), graph.facts.shapes.get(x)
    at = graph.facts.position(call, shape) if shape is not None else None
    if at is not None:
        return _position(graph, x, *at)
    if shape is None or channel is None:
        return None
    found, first = graph.facts.sliced(call, shape), len(shape) + channel + 1
    if found is not None and found[0] == first - 1:
        return _select(graph, x, list(found[1]), channel)
    cuts = graph.facts.cuts(call, shape) or {}
    bounds = {a - first: (s.start or 0, LAST if s.stop is None else s.stop, s.step or 1) for a, s in cuts.items()}
    if not bounds or min(bounds) < 0 or not all(type(n) is int for cut in bounds.values() for n in cut):
        return None
    if (channels := graph.channels(x, channel)) is None:
        return None
    return cropped(graph.operand(x), channels, [d.known for d in shape[first:]], bounds)


def _position(graph: Readings, x: fx.Node, axis: Any, at: Any) -> Reading | Declined | None:
    """One position along an axis, which goes; both may be counted from the end."""
    shape = graph.facts.shapes.get(x)
    if shape is None or x in graph.facts.known or not isinstance(axis, int) or not -len(shape) <= axis < len(shape):
        return None
    axis %= len(shape)
    size = shape[axis].known
    if not isinstance(at, int) or size is None or not -size <= at < size:
        return None
    return _moved(graph, x, Take(len(shape), axis, at % size))


def _piece(graph: Readings, x: fx.Node, made: Call, index: Any) -> Reading | Declined | None:
    """One result of a split or chunk of ``x`` along the channels."""
    shape = graph.facts.shapes.get(x)
    if shape is None or not isinstance(index, int):
        return None
    channel, parts, axis = _image_axis(graph, x), graph.facts.parts(made, shape), made.get("dim", 0)
    if channel is None or parts is None or axis % len(shape) != len(shape) + channel:
        return None
    if not -len(parts) <= index < len(parts):
        return None
    index %= len(parts)
    start = sum(parts[:index])
    return _select(graph, x, range(start, start + parts[index]), channel)


def _read_cat(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A concatenation of channels."""
    terms, axis = call.get("tensors"), call.get("dim", 0)
    if not isinstance(terms, tuple | list) or len(terms) < 2 or not isinstance(axis, int):
        return None
    if any(not isinstance(t, fx.Node) or t in graph.facts.known for t in terms):
        return None
    operands = tuple(cast("Sequence[fx.Node]", terms))
    rank = next((r for t in operands if (r := graph.facts.rank(t)) is not None), None)
    if axis >= 0 and rank is None:
        return Declined("the rank of its operands is unknown: pass example_inputs")
    axis = axis if axis < 0 else axis - cast(int, rank)
    if {_image_axis(graph, t) for t in operands} - {None} != {axis}:
        return None
    sizes = [graph.channels(t, axis) for t in operands]
    if None in sizes:
        return Declined(CHANNELS_UNKNOWN)
    counts = tuple(cast("list[int]", sizes))
    return Reading(Concat(tuple(map(graph.operand, operands)), counts, axis))


def _shuffled(graph: Readings, x: fx.Node, groups: int) -> list[int]:
    width = graph.channels(x, _image_axis(graph, x)) or 0
    return np.arange(width).reshape(groups, -1).T.reshape(-1).tolist() if width % groups == 0 else []


def _read_shuffle(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A permutation of channels."""
    x, groups = call.input, call.get("groups")
    axis = _image_axis(graph, x) if x is not None else None
    rank = graph.facts.rank(x) if x is not None else None
    if x is None or axis is None or not isinstance(groups, int) or (rank is not None and axis != 1 - rank):
        return None
    return _select(graph, x, _shuffled(graph, x, groups), axis)


def _read_pixel_shuffle(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """Channels as positions, or positions as channels."""
    x, block = call.input, call.get("groups")
    rank = graph.facts.rank(x) if x is not None else None
    if x is None or rank is None or x in graph.facts.known or type(block) is not int or _image_axis(graph, x) != -3:
        return None
    if graph.channels(x, -3) is None:
        return Declined(CHANNELS_UNKNOWN)
    back, source = call.op == "pixel_unshuffle", graph.operand(x)
    source = source if source.axis is not None else replace(source, axis=-3)
    return moved(source, Spread(rank, block, back=back, native=node), linear=back or isinstance(graph.read(x), Reading))


def _read_repeated(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """The channels, a known number of times over; its operand where no axis grows."""
    x = call.input
    shape = graph.facts.shapes.get(x) if x is not None else None
    times = graph.facts.times(call, shape) if shape is not None else None
    if x is None or times is None or x in graph.facts.known:
        return None
    repeated = [axis for axis, n in enumerate(times) if n != Dim(1)]
    if not repeated:
        return _read_identity(graph, node, call)
    channel, number = _image_axis(graph, x), times[repeated[0]].known
    width = graph.channels(x, channel)
    if channel is None or repeated != [len(times) + channel] or width is None or number is None:
        return None
    return _select(graph, x, [*range(width)] * number, channel) if 0 < width * number <= MOST_CHANNELS else None


# Poolings and paddings: convolutions under another name


def _read_avg_pool(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A convolution with equal taps; no `ceil_mode`, no divisor of its own."""
    x, n = call.input, call.axes
    if x is None or n is None:
        return None
    kernel = integers(call.get("kernel_size"), n)
    stride = kernel if call.get("stride", ()) in ((), []) else integers(call.get("stride"), n)
    pads = integers(call.get("padding", 0), n)
    if kernel is None or stride is None or pads is None:
        return Declined("its geometry is computed at run time")
    if call.get("ceil_mode", False) or call.args.get("divisor_override") is not None:
        return Declined("it has a divisor of its own, or may end in a window that is not full")
    if any(pads) and not call.args.get("count_include_pad", True):
        return Declined("it divides by the number of values that are no padding")
    channels = graph.channels(x, -1 - n)
    if channels is None:
        return Declined(CHANNELS_UNKNOWN)
    return Reading(averaged(graph.operand(x), equal_taps(channels, kernel), stride, (1,) * n, pads, pads))


def _read_pad(graph: Readings, node: fx.Node, call: Call) -> Reading | Declined | None:
    """A convolution with one tap; zeros only, and no other axes than those of a map."""
    x, pads = call.input, call.args.get("pad")
    if x is None or call.get("mode", "constant") != "constant" or call.get("value", 0) != 0:
        return None
    axis = _image_axis(graph, x) if call.axes is None else -1 - call.axes
    spatial = 0 if axis is None else -1 - axis
    numbers: list[Any] = list(pads) if isinstance(pads, tuple | list) else [None]
    if not all(isinstance(p, int) for p in numbers):
        return Declined("its padding is computed at run time")
    if axis is None or any(numbers[2 * spatial :]) or min(numbers, default=0) < 0:
        return Declined("it cuts, or pads other axes than those of a map")
    channels = graph.channels(x, axis)
    if channels is None:
        return Declined(CHANNELS_UNKNOWN)
    numbers = [*numbers, *[0] * (2 * spatial)][: 2 * spatial]
    begin, end = tuple(reversed(numbers[0::2])), tuple(reversed(numbers[1::2]))
    ones = (1,) * spatial
    return Reading(averaged(graph.operand(x), equal_taps(channels, ones), ones, ones, begin, end))


def _clips(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(lookup(module, str(node.target)), nn.ReLU6 | nn.Hardtanh)
    name = aten_name(node.target) or getattr(node.target, "__name__", str(node.target))
    return name.rstrip("_") in ("relu6", "hardtanh", "clamp", "clip")


def _array(leaf: Parameter | None) -> Any:
    """A parameter as the array that it is for the algebra."""
    return leaf


READERS: dict[str, Reader] = {
    "conv": _read_conv,
    "gathering": _read_gathering,
    "conv_transpose": _read_conv_transpose,
    "linear": _read_linear,
    "matmul": _read_product,
    "addmm": _read_product,
    "einsum": _read_einsum,
    "batch_norm": _read_batchnorm,
    **dict.fromkeys(("layer_norm", "rms_norm", "group_norm", "instance_norm"), _read_norm),
    "neg": _read_neg,
    "identity": _read_identity,
    "dropout": _read_dropout,
    **dict.fromkeys(("add", "sub", "mul", "div"), _read_arithmetic),
    **dict.fromkeys(("reshape", "reshape_as", "permute", "transpose", "flatten", "unflatten"), _read_layout),
    **dict.fromkeys(("mean", "adaptive_avg_pool"), _read_mean),
    **dict.fromkeys(("squeeze", "unsqueeze"), _read_layout),
    **dict.fromkeys(("slice", "narrow", "select"), _read_slice),
    "getitem": _read_getitem,
    "cat": _read_cat,
    "channel_shuffle": _read_shuffle,
    **dict.fromkeys(("pixel_shuffle", "pixel_unshuffle"), _read_pixel_shuffle),
    **dict.fromkeys(("expand", "repeat"), _read_repeated),
    "interpolate": _read_interpolate,
    "avg_pool": _read_avg_pool,
    "pad": _read_pad,
}

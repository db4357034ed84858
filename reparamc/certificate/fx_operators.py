"""What the operators of torch mean, as affine maps, from torch's documentation alone."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Collection, Sequence
from fractions import Fraction
from typing import Any, Protocol, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload
from torch.nn import functional as F

import reparamc.certificate.kernels as nk
import reparamc.certificate.layouts as nl
import reparamc.certificate.meaning as meaning
import reparamc.certificate.normal_form as nf
from reparamc.certificate.axes import Dim, Unrepresentable
from reparamc.certificate.fx_calls import Described, attribute, name_of
from reparamc.certificate.fx_memory import Memory
from reparamc.certificate.normal_form import Array, Value
from reparamc.certificate.ranges import ANY, SIGNED, Bound, bound_of, clamp

ON_PARAMETERS = {"conv", "convolution", "conv_transpose", "linear", "matmul", "addmm", "einsum", "add", "sub", "mul"}
"""Operators that are linear in parameters, so that they are off by as much as these."""


NUMBERS = {
    operator.add, operator.sub, operator.mul, operator.floordiv, operator.truediv, operator.mod, operator.neg, int,
    math.ceil, math.floor, math.sqrt, torch.sym_int, torch.sym_float, torch.sym_max, torch.sym_min, min, max,
}  # fmt: skip
"""Functions that make numbers of sizes."""


ELEMENTWISE = (
    "abs", "celu", "clamp", "div", "elu", "erf", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "log", "maximum", "minimum", "mish", "mul", "prelu", "relu", "relu6", "rsqrt", "selu", "sigmoid",
    "silu", "softplus", "softsign", "sqrt", "tanh", "truediv", "imul", "itruediv",
)  # fmt: skip
"""Functions and methods whose result at a position depends on the operands there; sums are followed instead."""
_ELEMENTWISE = {f for home in (torch, F, operator) for name in ELEMENTWISE if (f := getattr(home, name, None))}
_ELEMENTWISE_MODULES = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6,
    nn.PReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
}  # fmt: skip
HOMOGENEOUS = {"abs", "leaky_relu", "prelu", "relu", "LeakyReLU", "PReLU", "ReLU"}
"""Those of one value that commute with a positive factor: functions, methods and modules."""
_POOLINGS = {
    getattr(nn, f"{kind}{n}d") for kind in ("AdaptiveAvgPool", "AdaptiveMaxPool", "MaxPool") for n in (1, 2, 3)
}
_KEEPING = {F.interpolate, F.max_pool1d, F.max_pool2d, F.max_pool3d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d}


def is_elementwise(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether an operator is defined element by element."""
    if node.op == "call_method":
        return str(node.target).removesuffix("_") in ELEMENTWISE
    if node.op == "call_function":
        return node.target in _ELEMENTWISE
    of_channels = node.op == "call_module" and getattr(attribute(module, str(node.target)), "num_parameters", 1) > 1
    return _is_one_of(node, module, _ELEMENTWISE_MODULES) and not of_channels


def keeps_numbers(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether an operator does to every channel the same, over positions only, and gives a constant map its number."""
    indices = node.kwargs.get("return_indices", False) or len(node.all_input_nodes) != 1
    if node.op == "call_function":
        return node.target in _KEEPING and not indices
    return not indices and _is_one_of(node, module, {nn.Upsample, *_POOLINGS})


def _is_one_of(node: fx.Node, module: fx.GraphModule, kinds: Collection[type]) -> bool:
    """Whether a node calls a module of exactly one of ``kinds``, and no hook."""
    if node.op != "call_module":
        return False
    called = attribute(module, str(node.target))
    return type(called) in kinds and not (
        called._forward_hooks or called._forward_pre_hooks or getattr(called, "return_indices", False)
    )


_OPTIONS = {
    "add": ("other",), "avgpool": ("kernel_size", "stride", "padding", "ceil_mode", "count", "divisor_override"),
    "clamp": ("min", "max"), "clip": ("min", "max"), "hardtanh": ("min_val", "max_val"),
    "interpolate": ("size", "scale_factor", "mode"), "leakyrelu": ("negative_slope",), "mul": ("other",),
    "pad": ("pad", "mode", "value"), "prelu": ("weight",), "upsample": ("size", "scale_factor", "mode"),
}  # fmt: skip
"""Arguments after the first, of which some decide the sizes of a result."""

_HOMES = (torch, F, operator)


def _plain_name(node: fx.Node, module: fx.GraphModule) -> str:
    """The name of one of torch's own operators, alike for all spellings; empty for anything else."""
    name = name_of(node)
    if node.op == "call_module":
        called = attribute(module, str(node.target))
        own = type(called).__module__.startswith("torch.nn.modules") and "forward" not in vars(called)
        own, name = own and not (called._forward_hooks or called._forward_pre_hooks), type(called).__name__
    elif isinstance(node.target, OpOverload):
        own = node.target.namespace == "aten"
    else:
        own = node.op == "call_method" or any(node.target is getattr(home, name, None) for home in _HOMES)
    name = re.sub(r"_|\d+d$", "", name.lower())
    return {"imul": "mul", "iadd": "add"}.get(name, name) if own else ""


def bound(node: fx.Node, module: fx.GraphModule, given: Sequence[str], tensor: Callable[[Any], Tensor | None]) -> Bound:
    """What the documentation says of the sizes of what a node gives; ``given`` are its operands."""
    name = _plain_name(node, module)
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return Bound()  # the same bits may mean another value
    names = _OPTIONS.get(name, ())
    options = {**dict(zip(names, node.args[1:], strict=False)), **node.kwargs}
    if node.op == "call_module":
        options = {key: getattr(attribute(module, str(node.target)), key, None) for key in names}
    signed = Bound(signed=given[:1])
    match name:
        case "clamp" | "clip" | "hardtanh":
            default = (-1.0, 1.0) if name == "hardtanh" else ANY
            ends: list[Any] = [d if (e := options.get(k)) is None else e for k, d in zip(names, default, strict=True)]
            return clamp(*ends) if all(isinstance(e, int | float) for e in ends) else Bound()
        case "leakyrelu" if options.get("negative_slope") == 1:
            return Bound(same_in=ANY)
        case "prelu" if (slope := tensor(options.get("weight"))) is not None and bool((slope == 1).all()):
            return Bound(same_in=ANY)
        case "mul" if len(given) == 2 and given[0] == given[1]:
            return Bound(SIGNED)
        case "mul" | "add":
            return Bound(signed=given) if len(given) == len(node.args) == 2 and not node.kwargs else Bound()
        case "pad":
            return signed if node.op != "call_module" and options.get("value") in (None, 0) else Bound()
        case "interpolate" | "upsample":
            return Bound() if options.get("mode") == "bicubic" else signed
        case "avgpool":
            return signed if options.get("divisor_override") is None else Bound()
        case _:
            return bound_of(name, given)


class Size:
    """Sizes of a node: what ``x.size(axis)`` and its like read; several where ``axis`` is a slice."""

    def __init__(self, node: fx.Node, axis: int | slice) -> None:
        self.node, self.axis = node, axis


def as_array(tensor: Tensor) -> Array:
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        tensor = tensor.float()
    return tensor.contiguous().numpy()


class Side(Protocol):
    """What readers ask of a graph; see `reparamc.certificate.fx`."""

    module: fx.GraphModule
    memory: Memory
    constants: set[str]
    sizes: dict[fx.Node, Size]

    def call(self, node: fx.Node) -> Described | None: ...

    def tensor(self, name: str) -> Tensor | None: ...
    def magnitude(self, name: str) -> Array | None: ...
    def shape(self, node: fx.Node) -> tuple[Dim, ...] | None: ...
    def told(self, node: fx.Node) -> Dim | list[Dim] | None: ...


class Read:
    """A described call, with its operands as values or constants.

    With ``magnitudes``, constants that the module computes are what they were added up from.
    """

    def __init__(
        self, side: Side, node: fx.Node, call: Described, of: Callable[[str], Value], magnitudes: bool = False
    ) -> None:
        self.side, self.node, self.call, self._of, self.magnitudes = side, node, call, of, magnitudes

    def get(self, name: str, default: Any = None) -> Any:
        value = self.call.args.get(name)
        return default if value is None else value

    def is_value(self, given: Any) -> bool:
        return isinstance(given, fx.Node) and given.name not in self.side.constants

    def value(self, given: Any) -> Value:
        if not self.is_value(given) or given in self.side.sizes:
            raise Unrepresentable("a constant or a size where a value is read")
        return self._of(self.side.memory.seen(given, self.node).name)

    @property
    def x(self) -> Value:
        return self.value(self.call.args.get("input"))

    def array(self, given: Any) -> Array | None:
        """A parameter; None where there is none."""
        if given is None:
            return None
        if isinstance(given, fx.Node):
            name, given = given.name, self.side.tensor(given.name)
            if self.magnitudes and (found := self.side.magnitude(name)) is not None:
                return found
        if not isinstance(given, Tensor):
            raise Unrepresentable("a parameter is computed at run time")
        if given.is_complex():
            raise Unrepresentable("a parameter of complex numbers")
        return as_array(given)

    def parameter(self, name: str) -> Array:
        found = self.array(self.call.args.get(name))
        if found is None:
            raise Unrepresentable(f"there is no {name}")
        return found

    def dim(self, given: Any) -> Dim | None:
        """An argument that is an size; None for -1."""
        if isinstance(given, int):
            return None if given == -1 else Dim(given)
        if isinstance(given, fx.Node) and isinstance(told := self.side.told(given), Dim):
            return told
        if isinstance(given, fx.Node) and given.target in (operator.mul, operator.floordiv) and len(given.args) == 2:
            a, b = (self.dim(arg) for arg in given.args)
            found = None if a is None or b is None else a.times(b) if given.target is operator.mul else a.over(b)
            if found is None:
                raise Unrepresentable("an size that is no product of others")
            return found
        size = self.side.sizes.get(given) if isinstance(given, fx.Node) else None
        if size is None or not isinstance(size.axis, int):
            raise Unrepresentable("an size is computed at run time")
        return self._of(size.node.name).shape[size.axis]

    def dims(self, given: Any) -> list[Dim | None]:
        """An argument that is a shape."""
        if isinstance(given, list | tuple):
            return [e for inner in given for e in self.dims(inner)]
        if isinstance(given, fx.Node) and isinstance(told := self.side.told(given), list):
            return list(told)
        size = self.side.sizes.get(given) if isinstance(given, fx.Node) else None
        if size is not None and isinstance(size.axis, slice):
            return list(self._of(size.node.name).shape[size.axis])
        return [self.dim(given)]

    def integers(self, name: str, n: int, default: int) -> tuple[int, ...]:
        given = self.get(name, default)
        if isinstance(given, int):
            return (given,) * n
        if isinstance(given, list | tuple) and all(isinstance(v, int) for v in given):
            return tuple(given) * n if len(given) == 1 else tuple(given)
        raise Unrepresentable(f"{name} is computed at run time")

    def axis(self, name: str, x: Value, default: int = 0) -> int:
        given = self.get(name, default)
        if not isinstance(given, int):
            raise Unrepresentable("an axis is computed at run time")
        return given % x.rank


def _read_conv(call: Read) -> Value:
    if call.call.op == "convolution" and call.get("transposed", False):
        return _read_conv_transpose(call)
    if call.get("padding_mode", "zeros") != "zeros":
        raise Unrepresentable("a padding repeats the border")
    x, weight, bias = call.x, call.parameter("weight"), call.array(call.call.args.get("bias"))
    n = weight.ndim - 2
    stride, dilation = call.integers("stride", n, 1), call.integers("dilation", n, 1)
    if isinstance(padding := call.get("padding", 0), str):
        total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        begin = [t // 2 for t in total]
        end = [t - b for t, b in zip(total, begin, strict=True)]
    else:
        begin = end = call.integers("padding", n, 0)
    return meaning.convolved(x, weight, bias, call.get("groups", 1), stride, dilation, begin, end)


def _read_conv_transpose(call: Read) -> Value:
    if call.get("output_size") is not None:
        raise Unrepresentable("a transposed convolution to a wanted size")
    x, weight, bias = call.x, call.parameter("weight"), call.array(call.call.args.get("bias"))
    n, groups = weight.ndim - 2, call.get("groups", 1)
    stride, dilation = call.integers("stride", n, 1), call.integers("dilation", n, 1)
    pads, extra = call.integers("padding", n, 0), call.integers("output_padding", n, 0)
    return meaning.transposed(x, weight, bias, groups, stride, dilation, pads, pads, extra)


KERNELS = ("conv", "convolution", "conv_transpose", "gathering")
"""Operators that add up, with their weight, what they gather at each position, wherever that is."""


def _read_gathering(call: Read) -> Value:
    raise Unrepresentable("a module decides in Python what it applies its weight to")


def is_transposed(call: Described) -> bool:
    return call.op == "conv_transpose" or (call.op == "convolution" and bool(call.args.get("transposed")))


def weighted(call: Read, gathered: Value) -> Value:
    """What one of `KERNELS` makes of what it gathers; see `meaning.weighted`."""
    weight, bias = call.parameter("weight"), call.array(call.call.args.get("bias"))
    return meaning.weighted(gathered, weight, bias, call.get("groups", 1), is_transposed(call.call))


NORMS = ("group_norm", "instance_norm", "layer_norm", "rms_norm")
"""Operators that normalize, and then have a factor and a shift for each channel."""


def axis_of_norm(call: Described, rank: int) -> int:
    """The axis along which the factors of one of `NORMS` lie."""
    if call.op in ("layer_norm", "rms_norm"):
        return rank - 1
    return rank - 1 - call.axes if call.op == "instance_norm" and call.axes is not None else 1


def rescaled(call: Read, normal: Value) -> Value:
    """What one of `NORMS` makes of what it has normalized."""
    weight, bias = (call.array(call.call.args.get(key)) for key in ("weight", "bias"))
    return meaning.rescaled(normal, weight, bias, axis_of_norm(call.call, normal.rank))


def _read_avg_pool(call: Read) -> Value:
    x, n = call.x, call.call.axes or 2
    size = call.integers("kernel_size", n, 1)
    given = call.get("stride")
    stride = size if given is None or given in ([], ()) else call.integers("stride", n, 1)
    padding = call.integers("padding", n, 0)
    if call.get("ceil_mode", False) or call.get("divisor_override") is not None:
        raise Unrepresentable("the last window of a pooling may hang over, or its divisor is given")
    if any(padding) and not call.get("count_include_pad", True):
        raise Unrepresentable("a pooling divides by fewer elements at the border")
    return meaning.pooled(x, size, stride, (1,) * n, padding, padding)


def _read_adaptive_avg_pool(call: Read) -> Value:
    x, n = call.x, call.call.axes or 2
    if (sizes := call.integers("output_size", n, 0)) != (1,) * n:
        return nl.resized(x, ("adaptive", sizes), {x.rank - n + i: Dim(size) for i, size in enumerate(sizes)})
    return nl.averaged(x, range(x.rank - n, x.rank), keep=True)


def _read_interpolate(call: Read) -> Value:
    """A resize of all axes but the first two: no channel has weights of its own, and all weights sum to 1."""
    x, mode, size = call.x, call.get("mode", "nearest"), call.call.args.get("shape")
    n, scale, anew = x.rank - 2, call.call.args.get("scale_factor"), bool(call.get("recompute_scale_factor", False))
    if n < 1 or mode not in INTERPOLATED:
        raise Unrepresentable("a resize of another mode")
    options = (mode, bool(call.get("align_corners", False)), bool(call.get("antialias", False)), anew)
    if size is not None:
        outs = _sizes_of_run_time(call, size, n)
        if outs == list(x.shape[2:]) and not (options[2] or anew):
            return x  # every result is at a position, for all weights
        known = [(a.known, b.known) for a, b in zip(outs, x.shape[2:], strict=True)]
        whole = mode == "nearest" and all(a and b and a % b == 0 for a, b in known)
        if whole and (found := meaning.repeated(x, [(a or 1) // (b or 1) for a, b in known])) is not None:
            return found
        return nl.resized(x, (*options, *map(str, x.shape[2:]), "to", *map(str, outs)), dict(enumerate(outs, 2)))
    each = list(scale) if isinstance(scale, list | tuple) else [scale] * n
    if not all(type(one) in (int, float) for one in each):
        raise Unrepresentable("a resize by a factor of run time")
    factors = [Fraction(cast("float", one)) for one in each]
    if set(factors) == {1} and not options[2]:
        return x
    whole = mode == "nearest" and all(f.denominator == 1 for f in factors)
    if whole and (found := meaning.repeated(x, [f.numerator for f in factors])) is not None:
        return found
    made: dict[int, Dim] = {}
    for axis, factor in enumerate(factors, 2):
        dim = x.shape[axis]
        known = dim.known and dim.known * factor.numerator // factor.denominator
        made[axis] = Dim(known) if known else Dim(1, (f"{factor} * {dim}",))
    return nl.resized(x, (*options, *map(str, factors)), made)


def _sizes_of_run_time(call: Read, size: Any, n: int) -> list[Dim]:
    """The sizes that a resize is given, as numbers or as what is read from a shape."""
    told = call.side.told(size) if isinstance(size, fx.Node) else size
    each = list(told) if isinstance(told, list | tuple) else [told] * n
    found = [call.side.told(one) if isinstance(one, fx.Node) else one for one in each]
    dims = [Dim(one) if type(one) is int else one for one in found]
    if len(dims) != n or not all(isinstance(dim, Dim) for dim in dims):
        raise Unrepresentable("a resize to sizes of run time")
    return cast("list[Dim]", dims)


INTERPOLATED = ("nearest", "nearest-exact", "linear", "bilinear", "bicubic", "trilinear", "area")


def _read_linear(call: Read) -> Value:
    x, weight, bias = call.x, call.parameter("weight"), call.array(call.call.args.get("bias"))
    if weight.ndim != 2:
        raise Unrepresentable("a linear layer of one row, which takes the axis away")
    return meaning.biased(nk.mixed(x, weight, x.rank - 1), bias, x.rank - 1)


def _read_matmul(call: Read) -> Value:
    a, b = call.call.args["input"], call.call.args["other"]
    if call.is_value(a):
        return meaning.matrix(call.value(a), None, call.array(b))
    return meaning.matrix(None, call.value(b), call.array(a))


def _read_addmm(call: Read) -> Value:
    if {"alpha", "beta"} & set(call.call.args):
        raise Unrepresentable("a product and a sum with factors")
    y, bias = _read_matmul(call), call.parameter("bias")
    if bias.ndim != 1 or bias.shape[0] != y.shape[-1].known:
        raise Unrepresentable("a bias that varies along the rows, or is repeated")
    return nf.shifted(y, bias, y.rank - 1)


def _read_einsum(call: Read) -> Value:
    """A constant matrix along one axis, whose letter it replaces."""
    given, _, new = str(call.call.args["equation"]).replace(" ", "").partition("->")
    operands, names = call.call.args.get("operands", call.call.args.get("tensors")), given.split(",")
    operands = operands if isinstance(operands, list | tuple) else ()
    values = [i for i, t in enumerate(operands) if call.is_value(t)]
    if len(values) != 1 or len(operands) != 2 or len(names) != 2:
        raise Unrepresentable("an einsum of other than one value and one constant")
    (i,) = values
    x, weight, old, letters = call.value(operands[i]), call.array(operands[1 - i]), names[i], names[1 - i]
    changed = [(at, *pair) for at, pair in enumerate(zip(old, new, strict=False)) if pair[0] != pair[1]]
    named = old.removeprefix("...")
    if (
        weight is None
        or len(old) != len(new)
        or len(changed) != 1
        or not named.isalpha()
        or len(set(named)) < len(named)
    ):
        raise Unrepresentable("an einsum that is no matrix along one axis")
    at, gone, made = changed[0]
    if sorted(letters) != sorted((gone, made)) or made in old or len(letters) != 2:
        raise Unrepresentable("an einsum that is no matrix along one axis")
    return nk.mixed(x, weight.T if letters[0] == gone else weight, x.rank - len(old) + at)


def _read_batch_norm(call: Read) -> Value:
    if call.get("training", False) or call.get("running_mean") is None:
        raise Unrepresentable("BatchNorm in training mode")
    x = call.x
    gamma, beta = (call.array(call.call.args.get(name)) for name in ("weight", "bias"))
    mean, var = call.parameter("running_mean"), call.parameter("running_var")
    return meaning.normalized(x, gamma, beta, mean, var, float(call.get("eps", 1e-5)))


def _read_arithmetic(call: Read) -> Value:
    op, a, b = call.call.op, call.call.args["input"], call.call.args["other"]
    factor = call.get("alpha", 1)
    if set(call.call.args) - {"input", "other", "alpha"} or type(factor) not in (int, float):
        raise Unrepresentable("an addition with a computed factor, or a division that rounds")
    if op == "rsub":
        op, a, b = "sub", b, a
    if not call.is_value(b):
        constant = np.asarray(_operand(call, b).astype(np.float64) * factor)
        return meaning.arithmetic(op, call.value(a), constant, is_first=False)
    y = call.value(b) if factor == 1 else nf.scaled(call.value(b), float(factor))
    if not call.is_value(a):
        return meaning.arithmetic(op, y, _operand(call, a), is_first=True)
    return meaning.arithmetic(op, call.value(a), y, is_first=False)


def _operand(call: Read, given: Any) -> Array:
    """A constant operand of arithmetic."""
    if isinstance(given, bool | complex):
        raise Unrepresentable("arithmetic with a truth value")
    found = np.asarray(float(given)) if isinstance(given, int | float) else call.array(given)
    if found is None:
        raise Unrepresentable("a parameter is computed at run time")
    return found


def _read_dropout(call: Read) -> Value:
    if call.get("training", True):
        raise Unrepresentable("Dropout in training mode")
    return call.x


def _read_pad(call: Read) -> Value:
    x, amounts = call.x, call.call.args["pad"]
    if call.get("mode", "constant") != "constant" or not all(isinstance(p, int) for p in amounts):
        raise Unrepresentable("a padding repeats the border, or is computed")
    pairs = [(x.rank - 1 - i, *amounts[2 * i : 2 * i + 2]) for i in range(len(amounts) // 2)]
    return meaning.padded(x, pairs, float(call.get("value", 0.0)))


def _read_cat(call: Read) -> Value:
    terms = [call.value(t) for t in call.call.args["tensors"]]
    return nf.stacked(terms, call.axis("dim", terms[0]))


def _read_narrow(call: Read) -> Value:
    x, start, length = call.x, call.get("start", 0), call.call.args["length"]
    if not isinstance(start, int) or not isinstance(length, int):
        raise Unrepresentable("a slice that is computed at run time")
    end = start + length
    return nl.sliced(x, call.axis("dim", x), start, nl.WHOLE if start < 0 and end == 0 else end, 1)


def _read_slice(call: Read) -> Value:
    x, start, end, step = call.x, call.get("start", 0), call.get("end", 2**62), call.get("step", 1)
    if not all(isinstance(v, int) for v in (start, end, step)):
        raise Unrepresentable("a slice that is computed at run time")
    return nl.sliced(x, call.axis("dim", x), start, end, step)


def _read_index_select(call: Read) -> Value:
    x, index = call.x, call.parameter("index")
    return nl.selected(x, [int(i) for i in index.reshape(-1)], call.axis("dim", x))


def _read_getitem(call: Read) -> Value:
    given, index = call.call.args["input"], call.call.args["index"]
    inner = call.side.call(given) if isinstance(given, fx.Node) else None
    if inner is not None and inner.op in ("split", "chunk") and isinstance(index, int):
        return _piece(call, inner, index)
    if inner is not None and inner.op == "unbind":
        whole = Read(call.side, call.node, inner, call._of)
        return _taken(whole.x, index, whole.axis("dim", whole.x))
    x = call.x
    items = _items(index, x.rank)
    if sum(isinstance(i, fx.Node | list) for i in items) == 1:
        return _selected(call, x, items)
    if not all(isinstance(i, slice) or type(i) is int for i in items):
        raise Unrepresentable("an index that adds an axis, or is computed at run time")
    for axis, s in reversed([*enumerate(items)]):
        if isinstance(s, int):
            x = _taken(x, s, axis)
            continue
        bounds = (s.start or 0, 2**62 if s.stop is None else s.stop, s.step or 1)
        if not all(isinstance(b, int) for b in bounds):
            raise Unrepresentable("a slice that is computed at run time")
        x = nl.sliced(x, axis, *bounds)
    return x


def _selected(call: Read, x: Value, items: Sequence[Any]) -> Value:
    """What a constant vector of positions, or a mask, takes along one axis, all others being whole."""
    axis = next(at for at, item in enumerate(items) if isinstance(item, fx.Node | list))
    given, width = items[axis], x.shape[axis].known
    index = call.array(given) if isinstance(given, fx.Node) else np.array(given)
    if index is not None and index.dtype == bool and index.shape == (width,):
        index = np.flatnonzero(index)
    if index is None or index.ndim != 1 or index.dtype.kind not in "iu" or width is None:
        raise Unrepresentable("an index that is no vector of positions, or along an unknown size")
    if any(item != slice(None) for at, item in enumerate(items) if at != axis) or (abs(index + 0.5) > width).any():
        raise Unrepresentable("positions along one axis and a part of another")
    return nl.selected(x, [int(i) % width for i in index], axis)


def _read_select(call: Read) -> Value:
    return _taken(call.x, call.call.args["index"], call.axis("dim", call.x))


def _taken(x: Value, at: Any, axis: int) -> Value:
    """The position ``at`` along ``axis``, which goes."""
    width = x.shape[axis].known
    if width is None or type(at) is not int or not -width <= at < width:
        raise Unrepresentable("an index along an unknown size, or one that is computed at run time")
    return nl.taken(x, at % width, axis)


def _items(index: Any, rank: int) -> tuple[Any, ...]:
    """An index by axis."""
    items = tuple(index) if isinstance(index, tuple | list) else (index,)
    at = [i is Ellipsis for i in items]
    if True not in at:
        return items
    return (*items[: at.index(True)], *[slice(None)] * (rank - len(items) + 1), *items[at.index(True) + 1 :])


def _read_setitem(call: Read) -> Value:
    x, what = call.x, call.call.args["value"]
    items = _items(call.call.args["index"], x.rank)
    at = [i for i, s in enumerate(items) if s != slice(None)]
    if len(at) != 1 or not isinstance(part := items[at[0]], slice) or part.step not in (None, 1):
        raise Unrepresentable("elements are written that are not the first or last along one axis")
    (axis,), start, stop = at, part.start or 0, nl.WHOLE if part.stop is None else part.stop
    if axis < 2 or not isinstance(start, int) or not isinstance(stop, int):
        raise Unrepresentable("channels or images are written, or how many is computed")
    if start == 0 and 0 < stop < nl.WHOLE:
        number, is_first = stop, True
    elif start < 0 and stop >= nl.WHOLE:
        number, is_first = -start, False
    else:
        raise Unrepresentable("elements are written that are not the first or last along one axis")
    return nk.overwritten(x, axis, number, is_first, _by_channel(call, what, x), 1)


def _by_channel(call: Read, what: Any, x: Value) -> Array:
    """What is written, for each channel."""
    channels = x.shape[1].known
    if channels is None:
        raise Unrepresentable("the number of channels is unknown")
    if isinstance(what, int | float) and not isinstance(what, bool):
        return np.full(channels, float(what))
    given = call.array(what)
    if given is None or given.ndim > x.rank:
        raise Unrepresentable("what is written is computed at run time")
    wide = given.astype(np.float64).reshape((1,) * (x.rank - given.ndim) + given.shape)
    border = wide[(0, slice(None), *(0,) * (x.rank - 2))]
    if np.any(np.moveaxis(wide, 1, -1) != border):
        raise Unrepresentable("what is written varies along other axes than the channels")
    return np.broadcast_to(border, channels)


def _piece(call: Read, split: Described, index: int) -> Value:
    whole = Read(call.side, call.node, split, call._of)
    x = whole.x
    axis = whole.axis("dim", x)
    width = x.shape[axis].known
    if width is None:
        raise Unrepresentable("the size that is split is unknown")
    sizes: Any = split.args.get("sizes")
    if split.op == "chunk":
        sizes = -(-width // int(split.args["chunks"]))
    if isinstance(sizes, int):
        sizes = [min(sizes, width - start) for start in range(0, width, sizes)]
    start = sum(sizes[: index % len(sizes)])
    return nl.sliced(x, axis, start, start + sizes[index % len(sizes)], 1)


def _read_channel_shuffle(call: Read) -> Value:
    x, groups = call.x, call.call.args["groups"]
    width = x.shape[1].known
    if width is None:
        raise Unrepresentable("the number of channels is unknown")
    return nl.selected(x, np.arange(width).reshape(groups, -1).T.reshape(-1).tolist(), 1)


def _read_pixel_shuffle(call: Read) -> Value:
    x, block = call.x, call.call.args["upscale_factor"]
    *lead, channels, height, width = x.shape
    inner = channels.over(Dim(block * block)) if type(block) is int else None
    if inner is None:
        raise Unrepresentable("the number of channels is unknown")
    n, b = len(lead), Dim(block)
    apart = nl.permuted(
        nl.regrouped(x, [*lead, inner, b, b, height, width]), [*range(n + 1), n + 3, n + 1, n + 4, n + 2]
    )
    return nl.regrouped(apart, [*lead, inner, height.times(b), width.times(b)])


def _read_pixel_unshuffle(call: Read) -> Value:
    block = call.call.args["downscale_factor"]
    if type(block) is not int:
        raise Unrepresentable("a block that is computed at run time")
    return nl.unshuffled(call.x, block, outer=False)


def _read_mean(call: Read) -> Value:
    x, dims = call.x, call.call.args.get("dim")
    if dims is None or set(call.call.args) - {"input", "dim", "keepdim"}:
        raise Unrepresentable("a mean over all axes, or in another dtype")
    axes = [dims] if isinstance(dims, int) else list(dims)
    return nl.averaged(x, [a % x.rank for a in axes], bool(call.get("keepdim", False)))


def _read_expand(call: Read) -> Value:
    x, wanted = call.x, call.dims(call.call.args["shape"])
    if len(wanted) != x.rank:
        raise Unrepresentable("an expansion by an axis")
    for axis, size in enumerate(wanted):
        if size is None or size == x.shape[axis]:
            continue
        if not size.known or x.shape[axis] != Dim():
            raise Unrepresentable("an expansion that depends on the sizes")
        x = nl.repeated(x, size.known, axis)
    return x


def _read_repeat(call: Read) -> Value:
    x, times = call.x, call.integers("repeats", call.x.rank, 1)
    if len(times) != x.rank or min(times) < 1:
        raise Unrepresentable("repeats by an axis, or to no elements")
    for axis, number in enumerate(times):
        x = nl.repeated(x, number, axis)
    return x


def _read_reshape(call: Read) -> Value:
    return nl.regrouped(call.x, call.dims(call.call.args["shape"]))


def _read_unflatten(call: Read) -> Value:
    x, axis = call.x, call.axis("dim", call.x)
    return nl.regrouped(x, [*x.shape[:axis], *call.dims(call.call.args["sizes"]), *x.shape[axis + 1 :]])


def _read_reshape_as(call: Read) -> Value:
    other = call.call.args["other"]
    shape = call.side.shape(other) if isinstance(other, fx.Node) else None
    return nl.regrouped(call.x, call.value(other).shape if shape is None else shape)


def _read_permute(call: Read) -> Value:
    x, dims = call.x, call.call.args["dims"]
    return nl.permuted(x, [d % x.rank for d in dims])


def _read_transpose(call: Read) -> Value:
    x = call.x
    axes = list(range(x.rank))
    a, b = call.axis("dim0", x), call.axis("dim1", x)
    axes[a], axes[b] = axes[b], axes[a]
    return nl.permuted(x, axes)


def _read_flatten(call: Read) -> Value:
    x = call.x
    start, end = call.axis("start_dim", x, 0), call.axis("end_dim", x, -1)
    return nl.regrouped(x, meaning.merged(x, start, end + 1))


def _read_squeeze(call: Read) -> Value:
    x, dims = call.x, call.call.args.get("dim")
    if dims is None:
        raise Unrepresentable("a squeeze of all axes of size 1")
    gone = {d % x.rank for d in ([dims] if isinstance(dims, int) else dims)}
    if any(x.shape[a].known is None for a in gone):
        raise Unrepresentable("a squeeze of an unknown size")
    return nl.regrouped(x, [e for i, e in enumerate(x.shape) if i not in gone or e != Dim()])


def _read_unsqueeze(call: Read) -> Value:
    x = call.x
    axis = call.call.args["dim"] % (x.rank + 1)
    return nl.regrouped(x, [*x.shape[:axis], Dim(), *x.shape[axis:]])


READERS: dict[str, Callable[[Read], Value]] = {
    "conv": _read_conv,
    "convolution": _read_conv,
    "conv_transpose": _read_conv_transpose,
    "gathering": _read_gathering,
    "avg_pool": _read_avg_pool,
    "adaptive_avg_pool": _read_adaptive_avg_pool,
    "linear": _read_linear,
    "interpolate": _read_interpolate,
    "matmul": _read_matmul,
    "addmm": _read_addmm,
    "einsum": _read_einsum,
    "batch_norm": _read_batch_norm,
    **dict.fromkeys(("add", "sub", "rsub", "mul", "div"), _read_arithmetic),
    "neg": lambda call: nf.scaled(call.x, -1.0),
    "identity": lambda call: call.x,
    "dropout": _read_dropout,
    "pad": _read_pad,
    "cat": _read_cat,
    "narrow": _read_narrow,
    "slice": _read_slice,
    "index_select": _read_index_select,
    "select": _read_select,
    "getitem": _read_getitem,
    "setitem": _read_setitem,
    "channel_shuffle": _read_channel_shuffle,
    "pixel_shuffle": _read_pixel_shuffle,
    "pixel_unshuffle": _read_pixel_unshuffle,
    "mean": _read_mean,
    "reshape": _read_reshape,
    "unflatten": _read_unflatten,
    "expand": _read_expand,
    "repeat": _read_repeat,
    **dict.fromkeys(("reshape_as", "view_as"), _read_reshape_as),
    "permute": _read_permute,
    "transpose": _read_transpose,
    "flatten": _read_flatten,
    "squeeze": _read_squeeze,
    "unsqueeze": _read_unsqueeze,
}

"""The torch.fx adapter, writing: expressions as modules and calls."""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from functools import cache
from itertools import zip_longest
from math import prod
from typing import Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparamc.algebra.arrays import is_all, loaded, values, zeros_of
from reparamc.algebra.expr import (
    Array,
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Ints,
    Layout,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
    is_negation,
)
from reparamc.algebra.kernels import regroup, swap_sides
from reparamc.algebra.recorded import Recorded
from reparamc.algebra.shape import sizes_after
from reparamc.compiler.emit import Emission
from reparamc.compiler.graph import Splice
from reparamc.compiler.readings import Taps, Value
from reparamc.fx.calls import Call, as_plain, first_operand, lookup, operation, put, with_arguments
from reparamc.fx.operators import OPERATORS
from reparamc.fx.readings import Readings

TensorT = TypeVar("TensorT", bound=Tensor)

LINEAR_MODULES: dict[int, type[nn.Module]] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED_MODULES: dict[int, type[nn.Module]] = {
    1: nn.ConvTranspose1d,
    2: nn.ConvTranspose2d,
    3: nn.ConvTranspose3d,
}
POOLS: dict[int, Callable[..., Tensor]] = {1: F.avg_pool1d, 2: F.avg_pool2d, 3: F.avg_pool3d}
CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
NORM_MODULES: dict[int, type[nn.Module]] = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


def channels_last(t: Tensor) -> torch.memory_format | None:
    """The memory format of ``t`` where its channels are last; None for any other."""
    last = CHANNELS_LAST.get(t.ndim)
    return last if last is not None and not t.is_contiguous() and t.is_contiguous(memory_format=last) else None


class Target:
    """A copy of the graph of a traced module, and what has been written into it.

    Attributes:
        copies: the node of the copy for each node of the module.
        module: what holds the modules and tensors that are new.
    """

    def __init__(self, source: fx.GraphModule) -> None:
        self.source = source
        self.copies: dict[Any, Any] = {None: None}  # not empty, or else it would not be filled
        self.graph: fx.Graph = copy.deepcopy(source.graph, self.copies)
        (end,), (copied_end,) = (g.find_nodes(op="output") for g in (source.graph, self.graph))
        self.copies[end] = copied_end
        self.module = fx.GraphModule(nn.Module(), fx.Graph())
        called = (str(node.target) for node in self.graph.find_nodes(op="call_module"))
        put(self.module, source, (p for p in called if lookup(source, p)._modules))  # what is new may be put into it
        self.emitted: dict[Expr, fx.Node] = {}
        self.spliced: dict[fx.Node, fx.Node] = {}
        """What has taken the place of a node."""
        self._next: dict[str, int] = {}
        self._fresh: set[str] = set()

    def fresh_path(self, wanted: str) -> str:
        """``wanted``, or that with a number after it: a path that names nothing yet."""
        path, n = wanted, self._next.get(wanted, 1)
        while _exists(self.module, path) or _exists(self.source, path):
            path, n = f"{wanted}_{n}", n + 1
        self._next[wanted] = n
        self._fresh.add(path)
        return path

    def holder(self) -> nn.Module:
        """A module with all that the graph calls and reads, as it is now."""
        named = (str(node.target) for node in self.graph.nodes if node.op in ("call_module", "get_attr"))
        put(self.module, self.source, (p for p in named if self._fresh.isdisjoint((p, p.rpartition(".")[0]))))
        return self.module

    def current(self, value: Value) -> fx.Node:
        """The node of the copy that now computes ``value``."""
        node = self.copies[value]
        while node in self.spliced:
            node = self.spliced[node]
        return node


class Emitter(Emission[fx.Node]):
    """The nodes that compute one splice, inserted at the graph's current point."""

    def __init__(self, readings: Readings, target: Target, splice: Splice, root: fx.Node) -> None:
        self.readings, self.target, self.root = readings, target, root
        members = cast(Sequence[fx.Node], splice.members)
        tensors = readings.tensors(members)
        native = {e: cast(fx.Node, v) for e, v in splice.native.items() if not isinstance(v, Taps)}
        tensors = tensors or [t for v in native.values() if (t := readings.like(v)) is not None]
        self._like = next((t for t in tensors if t.ndim >= 4), next(iter(tensors), None))
        self.channels_last = any(channels_last(t) is not None for t in tensors)
        self.trainable = any(t.requires_grad for t in tensors)
        self.modules = [str(m.target) for m in members if m.op == "call_module"]
        self.modules = self.modules or [name.rpartition(".")[0] for name in splice.parameters if "." in name]
        super().__init__(splice, {e: target.current(v) for e, v in native.items()}, target.emitted)
        facts = readings.facts
        shifts = any((call := facts.calls[m]) is not None and call.op == "batch_norm" for m in members)
        self._biased = _last_conv(splice) if shifts else None
        """What takes the shift of a BatchNorm: it has a bias, be it of zeros, so that all values give one structure."""

    @property
    def like(self) -> Tensor:
        """A tensor of the dtype and device that new parameters take."""
        assert self._like is not None
        return self._like

    def _emit(self, e: Expr, top: bool) -> fx.Node:
        match e:
            case Conv() if e.reads_taps:
                return self._with_weight(e)
            case Conv() if e.is_weightless and not (any(k > 1 for k in e.kernel) and any(d > 1 for d in e.dilation)):
                return self._weightless(e)
            case Conv() if e.transposed:
                return self._conv_transpose(e)
            case Conv():
                return self._conv(e)
            case BatchNorm():
                return self._batchnorm(e)
            case Scale():
                return self._scale(e)
            case Sum():
                return self._sum(e)
            case Layout(op=Take(axis=axis, at=at)):
                return self._call(torch.select, self.value(e.x), axis, at)
            case Layout(op=Permute(axes=axes)):
                return self._call(torch.permute, self.value(e.x), axes)
            case Layout(op=Mean() as op):
                return self._call(torch.mean, self.value(e.x), op.axes, op.keep)
            case Layout(op=(Resize() | Spread()) as op):
                return self._resize(self.value(e.x), op)
            case Layout(op=Reshape() as op):
                return self._reshape(self.value(e.x), op)
            case Concat():
                return self._call(torch.cat, tuple(self.value(t) for t in e.terms), e.axis)
            case Select():
                return self._select(e)
            case _:
                raise AssertionError(f"{type(e).__name__} is never emitted")

    def _again(self, native: fx.Node, x: fx.Node) -> fx.Node:
        """The operator ``native`` of ``x``."""
        old = self.target.copies[native]
        moved = first_operand(old)
        return self.target.graph.node_copy(old, lambda n: x if n is moved else n)

    def _resize(self, x: fx.Node, op: Resize | Spread) -> fx.Node:
        """As the operator of the module, which says no channels; see `readers` for what it may be."""
        if op.native is not None:
            return self._again(cast(fx.Node, op.native), x)
        if isinstance(op, Spread):
            return self._call(F.pixel_unshuffle if op.back else F.pixel_shuffle, x, op.block)
        names = {"linear": ("linear", "bilinear", "trilinear"), "cubic": ("", "bicubic", "")}
        mode = names.get(op.mode, (op.mode,) * 3)[len(op.scales) - 1]
        options: dict[str, Any] = {"scale_factor": tuple(map(float, op.scales)), "mode": mode}
        if op.mode != "nearest":
            options["align_corners"] = op.place == "align_corners"
        return self.target.graph.call_function(F.interpolate, (x,), options)

    def _reshape(self, x: fx.Node, op: Reshape) -> fx.Node:
        native = cast("fx.Node | None", op.native)
        if native is not None:
            found = self._again(native, x)
            call = operation(found, self.target.source)
            if call is not None and call.op == "reshape" and isinstance(dims := call.get("shape"), tuple | list):
                told = {at: d.known for at, d in enumerate(op.after) if d.known is not None and dims[at] != -1}
                found.op, found.target = "call_function", torch.reshape
                found.args, found.kwargs = (x, tuple(told.get(at, n) for at, n in enumerate(dims))), {}
            return found
        sizes = sizes_after(op.before, op.after)
        assert sizes is not None, f"the sizes of {op} are not told by its operand"
        kept = {at: self.target.graph.call_method("size", (x, at)) for at, n in enumerate(sizes) if n == 0}
        return self._call(torch.reshape, x, tuple(kept.get(at, n) for at, n in enumerate(sizes)))

    def _weightless(self, e: Conv) -> fx.Node:
        """A padding, a strided slice, or a pooling."""
        x, (begin, end) = self.value(e.x), e.padding
        pools = any(k > 1 for k in e.kernel)
        fits = begin == end and all(0 <= 2 * p <= k for p, k in zip(begin, e.kernel, strict=True))
        if any((*begin, *end)) and not (pools and fits):
            x, begin = self._pad(x, begin, end), (0,) * e.spatial
        if pools:
            return self._call(POOLS[e.spatial], x, e.kernel, e.stride, begin)
        if all(s == 1 for s in e.stride):
            return x
        return self._call(operator.getitem, x, (Ellipsis, *(slice(None, None, s) for s in e.stride)))

    def _pad(self, x: fx.Node, begin: Ints, end: Ints) -> fx.Node:
        pads = [p for pair in reversed(list(zip(begin, end, strict=True))) for p in pair]
        return self._call(F.pad, x, pads)

    def _with_weight(self, e: Conv) -> fx.Node:
        """The operator whose taps ``e`` reads, with the weight and bias of ``e``."""
        taps = cast(Taps, cast(Source, e.x).key)
        native = cast(fx.Node, taps.of)
        call = cast(Call, self.readings.facts.calls[native])
        if taps.norm:
            return self._norm(e, native, call.op)
        weight, _ = cast("tuple[Tensor, Any]", self.readings.facts.held(call.args["weight"]))
        matrix = e.weight.reshape(e.out_channels, -1, *weight.shape[2:])
        holder = nn.Module()
        if call.op == "gathering":
            holder = as_plain(lookup(self.readings.module, str(native.target)))
        elif native.op == "call_module":
            keys = ("stride", "padding", "dilation", "padding_mode", "output_padding")
            kinds = TRANSPOSED_MODULES if call.op == "conv_transpose" else LINEAR_MODULES
            given = {key: call.args[key] for key in keys if key in call.args}
            holder = _without_values(kinds[e.spatial])(
                e.in_channels // prod(weight.shape[2:]), e.out_channels, tuple(weight.shape[2:]), groups=e.groups,
                **given, **self._options(e),
            )  # fmt: skip
        bias = self._bias(e)
        self._fill(holder, swap_sides(matrix, e.groups) if call.op == "conv_transpose" else matrix, bias)
        groups = {"groups": e.groups} if e.groups != call.get("groups", 1) else {}
        return self._copied(native, call.op, holder, groups | {"bias": None})

    def _norm(self, e: Conv, native: fx.Node, op: str) -> fx.Node:
        """The normalization ``native`` with the weight and bias of ``e``; one without a bias has it added."""
        holder, bias = nn.Module(), self._bias(e)
        bare = e.bias is None and is_all(e.weight, 1)
        if native.op == "call_module":
            holder = copy.deepcopy(lookup(self.readings.module, str(native.target)))
            for flag in ("elementwise_affine", "affine"):
                if hasattr(holder, flag):
                    setattr(holder, flag, not bare)
        if bare:
            gone = {name: None for name in ("weight", "bias") if name in OPERATORS[op].arguments}
            for name in gone:
                holder.register_parameter(name, None)
            return self._copied(native, op, holder, gone)
        takes = "bias" in OPERATORS[op].arguments
        self._fill(holder, e.weight.reshape(-1), bias if takes else None)
        made = self._copied(native, op, holder, {})
        if bias is not None and not takes:
            shift = bias.reshape(-1, *[1] * e.spatial)
            made = self.target.graph.call_function(operator.add, (made, self._operand(shift, e.axis)))
        return made

    def _copied(self, native: fx.Node, op: str, holder: Any, named: dict[str, Any]) -> fx.Node:
        """``native`` with the parameters of ``holder``: that module, or a function with those."""
        path = self._add(holder)
        made = self.target.graph.node_copy(self.target.copies[native])
        if native.op == "call_module":
            made.target = path
            return made
        with self.target.graph.inserting_before(made):
            held = {name: self.target.graph.get_attr(f"{path}.{name}") for name, _ in holder.named_parameters()}
        made.args, made.kwargs = with_arguments(made, op, named | held)
        return made

    def _call(self, function: Callable[..., Any], *args: Any) -> fx.Node:
        return self.target.graph.call_function(function, args)

    def _select(self, e: Select) -> fx.Node:
        x, axis, first = self.value(e.x), e.axis, e.index[0]
        if list(e.index) == list(range(first, first + len(e.index))):
            return self._call(torch.narrow, x, axis, first, len(e.index))
        holder = nn.Module()
        holder.register_buffer("index", torch.tensor(e.index, device=self.like.device))
        index = self.target.graph.get_attr(f"{self._add(holder)}.index")
        return self._call(torch.index_select, x, axis, index)

    def _conv_transpose(self, e: Conv) -> fx.Node:
        """Taps of zero before and after make every padding one that the module accepts; the rest is cut."""
        begin, end = (list(side) for side in e.padding)
        more: list[tuple[int, int]] = []
        for axis, (d, s) in enumerate(zip(e.dilation, e.stride, strict=True)):
            front = after = 0
            while begin[axis] < 0:
                begin[axis], front = begin[axis] + d, front + 1
            while begin[axis] - end[axis] >= max(s, d):
                end[axis], after = end[axis] + d, after + 1
            more.append((front, after))
        kernel = tuple(f + k + b for k, (f, b) in zip(e.kernel, more, strict=True))
        weight = zeros_of(e.weight, (*e.weight.shape[:2], *kernel))
        weight[(..., *(slice(f, f + k) for k, (f, _) in zip(e.kernel, more, strict=True)))] = e.weight
        grown = [max(b - f, 0) for b, f in zip(begin, end, strict=True)]
        module = _without_values(TRANSPOSED_MODULES[e.spatial])(
            e.in_channels, e.out_channels, weight.shape[2:], stride=e.stride, padding=tuple(begin),
            output_padding=tuple(grown), dilation=e.dilation, groups=e.groups, **self._options(e),
        )  # fmt: skip
        self._fill(module, swap_sides(weight, e.groups), self._bias(e))
        y = self.target.graph.call_module(self._add(module), (self.value(e.x),))
        cut = [f - b + g for b, f, g in zip(begin, end, grown, strict=True)]
        if any(cut):
            y = self._call(F.pad, y, [n for c in reversed(cut) for n in (0, -c)])
        return y

    def _bias(self, e: Conv) -> Array | None:
        return e.bias_or_zero if e is self._biased else e.bias

    def _options(self, e: Conv) -> dict[str, Any]:
        return {"bias": self._bias(e) is not None, "device": "meta", "dtype": self.like.dtype}

    def _fill(self, module: Any, weight: Array, bias: Array | None) -> None:
        module.weight = self._parameter(weight)
        if bias is not None:
            module.bias = self._parameter(bias)

    def _conv(self, e: Conv) -> fx.Node:
        x = self.value(e.x)
        if e.spatial == 0:
            module = _without_values(nn.Linear)(e.in_channels, e.out_channels, **self._options(e))
        else:
            begin, end = e.padding
            padding: Any = begin
            if begin != end or min(begin) < 0:
                x, padding = self._pad(x, begin, end), (0,) * e.spatial
            module = _without_values(LINEAR_MODULES[e.spatial])(
                e.in_channels, e.out_channels, e.kernel,
                stride=e.stride, padding=padding, dilation=e.dilation, groups=e.groups, **self._options(e),
            )  # fmt: skip
        self._fill(module, e.weight if e.spatial else regroup(e, 1), self._bias(e))
        return self.target.graph.call_module(self._add(module), (x,))

    def _batchnorm(self, e: BatchNorm) -> fx.Node:
        kind = _without_values(NORM_MODULES[-1 - e.axis])
        module = kind(e.gamma.size, eps=e.eps, device="meta", dtype=self.like.dtype)
        module.weight, module.bias = map(self._parameter, (e.gamma, e.beta))
        module.running_mean, module.running_var = self._tensor(e.mean), self._tensor(e.var)
        module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=self.like.device)
        return self.target.graph.call_module(self._add(module), (self.value(e.x),))

    def _scale(self, e: Scale) -> fx.Node:
        y = self.value(e.x)
        if is_negation(e):
            return self.target.graph.call_function(operator.neg, (y,))
        for op, vector, neutral in ((operator.mul, e.scale, 1), (operator.add, e.shift, 0)):
            if not is_all(vector, neutral):
                y = self.target.graph.call_function(op, (y, self._operand(vector, e.axis or -1)))
        return y

    def _operand(self, vector: Array, axis: int) -> Any:
        vector = loaded(vector)
        if not vector.ndim and isinstance(vector, np.ndarray):
            return float(vector)
        holder = nn.Module()
        holder.value = self._parameter(vector.reshape(-1, *[1] * (-1 - axis)) if vector.ndim else vector)
        return self.target.graph.get_attr(f"{self._add(holder)}.value")

    def _sum(self, e: Sum) -> fx.Node:
        (first, _), *others = self.addends(e)
        y = self.value(first)
        for t, subtracted in others:
            function = operator.sub if subtracted else operator.add
            y = self.target.graph.call_function(function, (y, self.value(t)))
        return y

    def _tensor(self, a: Array) -> Tensor:
        plain = np.array(values(a), dtype=np.float64, order="C", copy=True)
        t = torch.from_numpy(plain).to(self.like.device, self.like.dtype)
        if self.channels_last and t.ndim in CHANNELS_LAST:
            t = t.to(memory_format=CHANNELS_LAST[t.ndim])
        return self._remembered(t, a)

    def _parameter(self, a: Array) -> nn.Parameter:
        return self._remembered(nn.Parameter(self._tensor(a), requires_grad=self.trainable), a)

    def _remembered(self, t: TensorT, a: Array) -> TensorT:
        """``t``, and how ``a`` was made, as which it is kept."""
        if isinstance(a := loaded(a), Recorded):
            a.tape.place(t, a.at)
        return t

    def _add(self, module: nn.Module) -> str:
        """Put ``module`` where the modules it replaces have their common home; its path."""
        homes = [name.split(".") for name in dict.fromkeys(self.modules)]
        if len(homes) == 1:
            wanted = ".".join(homes[0]) + "_fused"
        else:
            common = []
            for parts in zip_longest(*homes):
                if len(set(parts)) != 1:
                    break
                common.append(parts[0])
            wanted = ".".join([*common, "fused"])
        path = self.target.fresh_path(wanted)
        module.eval()
        self.target.module.add_submodule(path, module)
        for name, t in (*module.named_parameters(), *module.named_buffers()):
            if t.is_floating_point():
                self.record(f"{path}.{name}")
        return path


def _last_conv(splice: Splice) -> Conv | None:
    """The convolution or linear layer that a replacement ends in, if it is one alone."""
    found: dict[Expr, None] = {}
    stack = [splice.expr]
    while stack:
        e = stack.pop()
        if isinstance(e, Conv) and not e.is_weightless:
            found[e] = None
        elif e not in splice.native:
            stack += e.children
    only = next(iter(found), None) if len(found) == 1 else None
    return only if isinstance(only, Conv) and only not in splice.native else None


@cache
def _without_values(kind: type[nn.Module]) -> Callable[..., Any]:
    """``kind``, but that its parameters are not filled, which takes long on the meta device too."""
    bare = type(kind.__name__, (kind,), {"reset_parameters": lambda self: None})

    def make(*args: Any, **options: Any) -> nn.Module:
        made: Any = bare(*args, **options)
        made.__class__ = kind
        return made

    return make


def _exists(module: nn.Module, path: str) -> bool:
    try:
        lookup(module, path)
    except AttributeError:
        return False
    return True

"""The torch.fx adapter: linear operators of a traced module as expressions, and expressions as modules.

Nodes that no rewrite touches stay the same objects with the same metadata. Parameters are read by
value, so that modules called twice and tied weights get private copies where they are folded.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from itertools import zip_longest
from typing import Any, cast

import ml_dtypes
import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

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
from reparamc.fx_values import (
    Memory,
    Values,
    first_operand,
    is_plain,
    lookup,
    only_asserted,
    operation,
    reads_size_only,
)
from reparamc.kernel import regroup
from reparamc.region import Reading, Splice, Value, layout_reading, new_nodes
from reparamc.rewrite import Declined

DTYPES: dict[torch.dtype, np.dtype] = {
    torch.float32: np.dtype(np.float32),
    torch.float64: np.dtype(np.float64),
    torch.float16: np.dtype(np.float16),
    torch.bfloat16: np.dtype(ml_dtypes.bfloat16),
}
ACTIVATION = "a scalar constant behind a non-linear operator may belong to an activation that runtimes fuse"


class FxGraph:
    """`reparamc.region.Graph` over a traced module. Values are nodes."""

    def __init__(self, module: fx.GraphModule, ranks: dict[str, int]) -> None:
        self.module, self.graph = module, module.graph
        self.facts = Values(module, ranks)
        self.order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.memory = Memory(self.graph, module)
        self._readings: dict[fx.Node, Reading | Declined | None] = {}
        self.tensors: dict[fx.Node, list[Tensor]] = {}
        self.channels: dict[fx.Node, int | None] = {}
        self._spliced: dict[fx.Node, fx.Node] = {}
        self._suspects: list[fx.Node] = []
        self._next: dict[str, int] = {}
        self._hoist_size_reads()

    def _hoist_size_reads(self) -> None:
        """Let size reads of a BatchNorm's result ask its operand instead: same shape, and no reader of the result."""
        for node in reversed(self.graph.nodes):
            operand = first_operand(node)
            if operand is not None and isinstance(self._batchnorm(node), tuple):
                for user in [u for u in node.users if reads_size_only(u)]:
                    user.replace_input_with(node, operand)

    # Reading

    def values(self) -> Sequence[fx.Node]:
        return [
            n
            for n in self.graph.nodes
            if n.op in ("call_module", "call_function", "call_method") and n not in self.facts.constants
        ]

    def name(self, value: Value) -> str:
        node = cast(fx.Node, value)
        return str(node.target) if node.op == "call_module" else node.name

    def readers(self, value: Value) -> Sequence[Value | None]:
        found: list[Value | None] = []
        for user in cast(fx.Node, value).users:
            if user.op == "output":
                found.append(None)
            elif not (reads_size_only(user) and only_asserted(user)):
                found += [user] * _mentions(user, value)
        return found

    def source(self, value: Value) -> Source:
        return Source(value, shape=self.facts.shapes.get(cast(fx.Node, value)))

    def dtype(self, members: Sequence[Value]) -> np.dtype | None:
        found = {t.dtype for m in members for t in self.tensors.get(cast(fx.Node, m), [])}
        return DTYPES.get(found.pop()) if len(found) == 1 else None

    def obstacle(self, root: Value, members: Sequence[Value], sources: Sequence[Value]) -> str | None:
        """Devices must agree, and nothing that is written in place may look different to any reader."""
        nodes = cast(Sequence[fx.Node], members)
        if len({t.device for m in nodes for t in self.tensors.get(m, [])}) > 1:
            return "its parameters are on different devices"
        last = self.order[cast(fx.Node, root)]
        for value in (*cast(Sequence[fx.Node], sources), *nodes[:-1]):
            reads = [self.order[u] for u in value.users if u in nodes]
            for writer in self.memory.writers(value):
                if writer in nodes:
                    visible = not self._is_private(value, writer)
                else:
                    visible = bool(reads) and min(reads) < self.order[writer] < last
                if visible:
                    return f"{writer.name!r} changes an operand in place"
        return None

    def _is_private(self, value: fx.Node, writer: fx.Node) -> bool:
        """Whether nothing but the result of ``writer`` shows that it writes into the memory of ``value``."""
        aliases = self.memory.aliases(value)
        older = [a for a in aliases if self.order[a] < self.order[writer]]
        late = any(self.order[u] > self.order[writer] for a in older for u in a.users)
        return aliases[0].op not in ("placeholder", "get_attr") and not late

    def frame(self, value: Any) -> int | None:
        reading = self.read(value) if isinstance(value, fx.Node) and value in self.order else None
        return reading.frame if isinstance(reading, Reading) else None

    def read(self, value: Value) -> Reading | Declined | None:
        node = cast(fx.Node, value)
        if node not in self._readings:
            self._readings[node] = self._read(node)
        return self._readings[node]

    def _read(self, node: fx.Node) -> Reading | Declined | None:
        if node.op not in ("call_module", "call_function", "call_method") or node in self.facts.constants:
            return None
        normed = self._batchnorm(node)
        if normed is not None:
            return normed if isinstance(normed, Declined) else self._read_batchnorm(node, *normed)
        if node.op == "call_module":
            return self._read_module(node, lookup(self.module, str(node.target)))
        if node in self.facts.dims or reads_size_only(node):
            return None
        if node.op == "call_function" and node.target in (F.conv1d, F.conv2d, F.conv3d, F.linear):
            return self._read_functional(node, node.target is F.linear)
        name = operation(node)
        if name in ("dropout", "detach"):
            live = name == "dropout" and (node.kwargs.get("training", node.args[2] if len(node.args) > 2 else True))
            return None if live else self._passing(node)
        if name in ("add", "sub", "mul", "div", "neg"):
            return self._read_arithmetic(node, name)
        return self._read_layout(node)

    def _read_module(self, node: fx.Node, module: nn.Module) -> Reading | Declined | None:
        if type(module) in (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d) and not module.training:
            return self._passing(node) if is_plain(module) else Declined("it has hooks")
        if type(module) is nn.Flatten:
            return self._read_layout(node)
        if type(module) not in (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear):
            return None
        if not is_plain(module):
            return Declined("it has hooks or a forward of its own, which folding would drop")
        prefix = str(node.target)
        if isinstance(module, nn.Linear):
            return self._linear(node, module.weight, module.bias, (f"{prefix}.weight", f"{prefix}.bias"))
        conv = cast(nn.Conv2d, module)
        if conv.padding_mode != "zeros":
            return Declined(f"it pads with mode {conv.padding_mode!r}, not with zeros")
        names = (f"{prefix}.weight", f"{prefix}.bias")
        return self._conv(node, conv.weight, conv.bias, conv.stride, conv.padding, conv.dilation, conv.groups, names)

    def _read_functional(self, node: fx.Node, linear: bool) -> Reading | Declined | None:
        keys = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
        given = dict(zip(keys, node.args, strict=False)) | node.kwargs
        weight, bias = given.get("weight"), given.get("bias")
        if weight not in self.facts.constants or (bias is not None and bias not in self.facts.constants):
            return Declined("its weight or bias is computed at run time")
        w = self.facts.constants[cast(fx.Node, weight)]
        b = None if bias is None else self.facts.constants[cast(fx.Node, bias)]
        names = tuple(n for k in (weight, bias) if k is not None for n in self.facts.names[cast(fx.Node, k)])
        if linear:
            return self._linear(node, w, b, names)
        n = w.ndim - 2
        stride, dilation = (_each(given.get(key, 1), n) for key in ("stride", "dilation"))
        padding = given.get("padding", 0)
        groups = given.get("groups", 1)
        if stride is None or dilation is None or not isinstance(groups, int):
            return Declined("its geometry is computed at run time")
        return self._conv(node, w, b, stride, padding, dilation, groups, names)

    def _conv(
        self,
        node: fx.Node,
        weight: Tensor,
        bias: Tensor | None,
        stride: Any,
        padding: Any,
        dilation: Any,
        groups: int,
        names: tuple[str, ...],
    ) -> Reading | Declined | None:
        if not weight.is_floating_point():
            return None
        n = weight.ndim - 2
        kernel = tuple(weight.shape[2:])
        if padding == "same":
            totals = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            begin = [t // 2 for t in totals]
            end = [t - b for t, b in zip(totals, begin, strict=True)]
        else:
            pads = _each(0 if padding == "valid" else padding, n)
            if pads is None:
                return Declined("its padding is computed at run time")
            begin = end = list(pads)
        operand = first_operand(node)
        if operand is None:
            return None
        offset = tuple(-b for b in begin)
        delta = tuple(d * (k - 1) - b - e for d, k, b, e in zip(dilation, kernel, begin, end, strict=True))
        self._note(node, weight.shape[0], weight, bias)

        def build(operands: Sequence[Expr]) -> Expr:
            b = None if bias is None else array(bias)
            return Conv(operands[0], array(weight), b, tuple(stride), tuple(dilation), offset, delta, groups)

        return Reading((operand,), build, names if bias is not None else names[:1], n)

    def _linear(self, node: fx.Node, weight: Tensor, bias: Tensor | None, names: tuple[str, ...]) -> Reading | None:
        operand = first_operand(node)
        if operand is None:
            return None
        self._note(node, weight.shape[0], weight, bias)

        def build(operands: Sequence[Expr]) -> Expr:
            return Conv(operands[0], array(weight), None if bias is None else array(bias))

        return Reading((operand,), build, names if bias is not None else names[:1], 0)

    def _batchnorm(self, node: fx.Node) -> tuple[list[Tensor | None], float, tuple[str, ...]] | Declined | None:
        """([weight, bias, mean, var], eps, names) of a BatchNorm with stored statistics; None for other operators."""
        if node.op == "call_module":
            module = lookup(self.module, str(node.target))
            if type(module) not in (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm):
                return None
            norm = cast(nn.BatchNorm2d, module)
            if norm.training or norm.running_mean is None:
                return Declined("BatchNorm uses the statistics of the batch")
            if not is_plain(norm):
                return Declined("it has hooks or a forward of its own, which folding would drop")
            keys = ("weight", "bias", "running_mean", "running_var")
            tensors = [cast("Tensor | None", getattr(norm, key)) for key in keys]
            names = tuple(f"{node.target}.{k}" for k, t in zip(keys, tensors, strict=True) if t is not None)
            return tensors, norm.eps, names
        if node.op == "call_function" and node.target is F.batch_norm:
            keys = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
            given = dict(zip(keys, node.args, strict=False)) | node.kwargs
            if given.get("training", False) is not False:
                return Declined("batch_norm uses the statistics of the batch")
            nodes = [given.get(key) for key in ("weight", "bias", "running_mean", "running_var")]
            if nodes[2] is None or any(n is not None and n not in self.facts.constants for n in nodes):
                return Declined("the parameters of batch_norm are computed at run time")
            tensors = [None if n is None else self.facts.constants[cast(fx.Node, n)] for n in nodes]
            names = tuple(name for n in nodes if n is not None for name in self.facts.names[cast(fx.Node, n)])
            return tensors, cast(float, given.get("eps", 1e-5)), names
        return None

    def _read_batchnorm(
        self, node: fx.Node, tensors: list[Tensor | None], eps: float, names: tuple[str, ...]
    ) -> Reading | Declined | None:
        operand = first_operand(node)
        if operand is None:
            return None
        rank = self.facts.rank(node) or self.facts.rank(operand)
        if rank is None:
            return Declined("the rank of its input is unknown, and with it the axis it acts on: pass example_inputs")
        gamma, beta, mean, var = tensors
        assert mean is not None
        assert var is not None
        self._note(node, mean.numel(), *tensors)

        def build(operands: Sequence[Expr]) -> Expr:
            m = array(mean)
            g, b = np.ones_like(m) if gamma is None else array(gamma), np.zeros_like(m) if beta is None else array(beta)
            return BatchNorm(operands[0], g, b, m, array(var), eps, max(rank - 2, 0))

        return Reading((operand,), build, names, max(rank - 2, 0))

    def _read_arithmetic(self, node: fx.Node, op: str) -> Reading | Declined | None:
        factor = node.kwargs.get("alpha", 1)
        if (
            set(node.kwargs) - {"alpha"}
            or not isinstance(factor, int | float)
            or len(node.args) != (1 if op == "neg" else 2)
        ):
            return None
        if op == "neg":
            x = node.args[0]
            if not isinstance(x, fx.Node):
                return None
            self._pass_on(node, x)
            return Reading((x,), lambda operands: Scale(operands[0], -ONE, ZERO), (), self.frame(x))
        left, right = node.args[:2]
        fixed = [self._constant(left), self._constant(right)]
        if all(c is not None for c in fixed):
            return None
        if all(c is None for c in fixed):
            return self._read_sum(node, left, right, op, float(factor))
        side = 1 if fixed[1] is not None else 0
        constant, x = cast(Tensor, fixed[side]), cast(fx.Node, (left, right)[1 - side])
        if not isinstance(x, fx.Node) or (op == "div" and side == 0):
            return None
        if op == "add" and constant.ndim == 0 and constant == 0 and factor == 1:
            return self._passing(node, x)  # sum() starts from zero
        frame = self._along_one_axis(constant, x)
        if isinstance(frame, Declined):
            return frame
        if x.op == "placeholder" and x not in self.facts.shapes:
            return Declined("the dtype of its operand is unknown: pass example_inputs")
        linear = x.op == "placeholder" or isinstance(self.read(x), Reading)
        if frame is None and not linear:
            return Declined(ACTIVATION)
        if frame is None and op in ("add", "sub") and any(_clips(u, self.module) for u in node.users):
            return Declined(ACTIVATION)
        names = tuple(n for arg in (left, right) if isinstance(arg, fx.Node) for n in self.facts.names.get(arg, ()))
        self._pass_on(node, x)
        if isinstance((left, right)[side], fx.Node):
            self.tensors[node] = [constant]
        elif x in self.tensors:
            self.tensors[node] = self.tensors[x][:1]

        def build(operands: Sequence[Expr]) -> Expr:
            c = array(constant).reshape(() if frame is None else -1)
            with np.errstate(divide="ignore"):
                scale, shift = {
                    "add": (ONE, c * factor) if side else (np.float64(factor) * ONE, c),
                    "sub": (ONE, -c * factor) if side else (-np.float64(factor) * ONE, c),
                    "mul": (c, ZERO),
                    "div": (1 / c, ZERO),
                }[op]
            return Scale(operands[0], np.asarray(scale), np.asarray(shift), frame)

        return Reading((x,), build, names, self.frame(x) if frame is None else frame)

    def _read_sum(self, node: fx.Node, left: Any, right: Any, op: str, factor: float) -> Reading | None:
        if op not in ("add", "sub") or not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        shapes = [self.facts.shapes.get(n) for n in (left, right)]
        if None not in shapes and len(cast(tuple, shapes[0])) != len(cast(tuple, shapes[1])):
            return None
        extents = [[d.known for d in shape or ()] for shape in shapes]
        if any(None not in pair and pair[0] != pair[1] for pair in zip(*extents, strict=False)):
            return None  # one operand is broadcast
        frames = [self.frame(n) for n in (left, right)]
        weight = factor if op == "add" else -factor
        self._pass_on(node, left if self.channels.get(left) is not None else right)

        def build(operands: Sequence[Expr]) -> Expr:
            a, b = operands
            return Sum((a, b if weight == 1 else Scale(b, np.asarray(weight), ZERO)))

        return Reading((left, right), build, (), next((f for f in frames if f is not None), None))

    def _read_layout(self, node: fx.Node) -> Reading | Declined | None:
        if node.op == "call_module":
            module, x = lookup(self.module, str(node.target)), first_operand(node)
            if x is None:
                return None
            before, after, axes = self.facts.shapes.get(x), self.facts.shapes.get(node), None
            if type(module) is not nn.Flatten or after is None:
                return None
        else:
            found = self.facts.layout(node)
            if found is None:
                return None
            x, (before, after, axes) = cast(fx.Node, node.args[0]), found
        if before is None:
            return None
        op = Reshape(before, after) if axes is None else Permute(axes)
        reading = layout_reading(x, op, self.frame(x), node)
        if isinstance(reading, Reading):
            self._pass_on(node, x)
        return reading

    def _passing(self, node: fx.Node, x: Any = None) -> Reading | None:
        x = first_operand(node) if x is None else x
        if not isinstance(x, fx.Node):
            return None
        self._pass_on(node, x)
        return Reading((x,), lambda operands: operands[0], (), self.frame(x))

    def _note(self, node: fx.Node, channels: int, *tensors: Tensor | None) -> None:
        self.channels[node] = channels
        self.tensors[node] = [t for t in tensors if t is not None]

    def _pass_on(self, node: fx.Node, x: fx.Node) -> None:
        self.read(x)
        self.channels[node] = self.channels.get(x)

    def _constant(self, arg: Any) -> Tensor | None:
        if isinstance(arg, bool):
            return None
        if isinstance(arg, int | float):
            return torch.tensor(arg, dtype=torch.float64)
        return self.facts.constants.get(arg) if isinstance(arg, fx.Node) else None

    def _along_one_axis(self, constant: Tensor, x: fx.Node) -> int | Declined | None:
        """The frame of the axis along which ``constant`` varies; None for one number; Declined if it may broadcast."""
        dims, shape, frame = tuple(constant.shape), self.facts.shapes.get(x), self.frame(x)
        rank = len(shape) if shape is not None else None if frame is None else frame + 1
        if dims and (rank is None or len(dims) > rank):
            return Declined("its constant may raise the rank: pass example_inputs")
        axes = [len(dims) - 1 - i for i, d in enumerate(dims) if d != 1]
        if len(axes) > 1:
            return Declined("its constant varies along several axes")
        if not axes:
            return None
        extent = shape[len(shape) - 1 - axes[0]].known if shape is not None else None
        if extent is None and frame == axes[0]:
            extent = self.channels.get(x)
        if extent != dims[len(dims) - 1 - axes[0]]:
            return Declined("its constant may broadcast its operand")
        return axes[0]

    def moves(self, value: Value) -> tuple[Value, ...] | None:
        return None

    def run(self, root: Value, source: Value, x: Array) -> Array:
        raise NotImplementedError

    # Writing

    def splice(self, splice: Splice) -> None:
        root = cast(fx.Node, splice.root)
        emitter = _Emitter(self, splice, root)
        with self.graph.inserting_before(root):
            result = emitter.run()
        root.replace_all_uses_with(result, propagate_meta=False)
        if not result.meta:
            result.meta.update({k: v for k, v in root.meta.items() if k in ("tensor_meta", "val")})
        result.meta["reparamc"] = dict(splice.counts)
        self._spliced[root] = result
        self._suspects += cast(Sequence[fx.Node], splice.members)

    def fresh_path(self, wanted: str) -> str:
        """``wanted``, or that with a number behind it: a path that names nothing yet."""
        path, n = wanted, self._next.get(wanted, 1)
        while _exists(self.module, path):
            path, n = f"{wanted}_{n}", n + 1
        self._next[wanted] = n
        return path

    def current(self, value: Value) -> fx.Node:
        """The node that now stands for ``value``."""
        node = cast(fx.Node, value)
        while node in self._spliced:
            node = self._spliced[node]
        return node

    def finish(self) -> fx.GraphModule:
        """Drop what is dead, and what only it used."""
        suspects = list(self._suspects)
        while suspects:
            node = suspects.pop()
            if node.graph is not self.graph or getattr(node, "_erased", False):
                continue
            for user in list(node.users):
                if reads_size_only(user) and only_asserted(user):
                    _erase_tree(self.graph, user)
            if not node.users and node.op not in ("placeholder", "output"):
                suspects.extend(n for n in node.all_input_nodes if n.op != "placeholder" and _is_quiet(n, self))
                self.graph.erase_node(node)
        self.graph.lint()
        fused = fx.GraphModule(self.module, self.graph, type(self.module).__name__)
        fused.training = False
        for module in fused.modules():
            if type(module) is nn.Module:  # a container that tracing made; the modules in it keep their modes
                module.training = False
        return fused


def _mentions(user: fx.Node, value: Value) -> int:
    count = 0

    def see(n: fx.Node) -> fx.Node:
        nonlocal count
        count += n is value
        return n

    map_arg((user.args, user.kwargs), see)
    return count


def _is_quiet(node: fx.Node, graph: FxGraph) -> bool:
    """Whether ``node`` may be erased once nothing reads it."""
    return node.op == "get_attr" or node in graph.facts.constants or node in graph._suspects or reads_size_only(node)


def _erase_tree(graph: fx.Graph, node: fx.Node) -> None:
    order: list[fx.Node] = []
    stack = [node]
    while stack:
        n = stack.pop()
        if n not in order:
            order.append(n)
            stack.extend(n.users)
    for n in sorted(order, reverse=True):
        graph.erase_node(n)


def _clips(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        return isinstance(lookup(module, str(node.target)), nn.ReLU6 | nn.Hardtanh)
    return node.target in (F.relu6, F.hardtanh, torch.clamp, "clamp")


def _each(value: Any, n: int) -> tuple[int, ...] | None:
    if isinstance(value, int):
        return (value,) * n
    if isinstance(value, tuple | list) and all(isinstance(v, int) for v in value):
        return tuple(value) * n if len(value) == 1 else tuple(value)
    return None


def array(tensor: Tensor) -> Array:
    """A tensor as a float64 array of its own."""
    return np.array(tensor.detach().to("cpu", torch.float64).numpy(), copy=True)


LINEAR_MODULES: dict[int, Callable[..., nn.Module]] = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
NORM_MODULES = {0: nn.BatchNorm1d, 1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}


class _Emitter:
    """The nodes that compute one splice, inserted at the graph's current point."""

    def __init__(self, graph: FxGraph, splice: Splice, root: fx.Node) -> None:
        self.graph, self.splice, self.root = graph, splice, root
        members = cast(Sequence[fx.Node], splice.members)
        tensors = [t for m in members for t in graph.tensors.get(m, [])]
        self.like = next((t for t in tensors if t.ndim >= 4), tensors[0])
        self.channels_last = any(
            t.ndim == 4 and not t.is_contiguous() and t.is_contiguous(memory_format=torch.channels_last)
            for t in tensors
        )
        self.trainable = any(t.requires_grad for t in tensors)
        self.modules = [str(m.target) for m in members if m.op == "call_module"]
        self.values: dict[Expr, fx.Node] = {e: graph.current(v) for e, v in splice.native.items()}

    def run(self) -> fx.Node:
        top = self.splice.expr
        for e in new_nodes(self.splice):
            if e is top or not is_negation(e):
                self.values[e] = self._emit(e)
        return self.values[top]

    def _emit(self, e: Expr) -> fx.Node:
        match e:
            case Conv():
                return self._conv(e)
            case BatchNorm():
                return self._batchnorm(e)
            case Scale():
                return self._scale(e)
            case Sum():
                return self._sum(e)
            case Layout():
                native = cast(fx.Node, e.token)
                moved = first_operand(native)
                return self.graph.graph.node_copy(
                    native, lambda n: self._value(e.x) if n is moved else self.graph.current(n)
                )
            case _:
                raise AssertionError(f"{type(e).__name__} is never emitted")

    def _conv(self, e: Conv) -> fx.Node:
        x = self._value(e.x)
        options: dict[str, Any] = {"bias": e.bias is not None, "device": "meta", "dtype": self.like.dtype}
        if e.frame == 0:
            module: nn.Module = nn.Linear(e.in_channels, e.out_channels, **options)
        else:
            begin, end = e.padding
            padding: Any = begin
            if begin != end or min(begin) < 0:
                pads = [p for pair in reversed(list(zip(begin, end, strict=True))) for p in pair]
                x = self.graph.graph.call_function(F.pad, (x, pads))
                padding = (0,) * e.frame
            module = LINEAR_MODULES[e.frame](
                e.in_channels, e.out_channels, e.kernel,
                stride=e.stride, padding=padding, dilation=e.dilation, groups=e.groups, **options,
            )  # fmt: skip
        weight = self._tensor(e.weight if e.frame else regroup(e, 1))
        if self.channels_last and weight.ndim == 4:
            weight = weight.to(memory_format=torch.channels_last)
        module.weight = self._parameter(weight)
        if e.bias is not None:
            module.bias = self._parameter(self._tensor(e.bias))
        return self.graph.graph.call_module(self._add(module), (x,))

    def _batchnorm(self, e: BatchNorm) -> fx.Node:
        module = NORM_MODULES[e.frame](e.gamma.size, eps=e.eps, device="meta", dtype=self.like.dtype)
        module.weight, module.bias = (self._parameter(self._tensor(a)) for a in (e.gamma, e.beta))
        module.running_mean, module.running_var = self._tensor(e.mean), self._tensor(e.var)
        module.num_batches_tracked = torch.zeros((), dtype=torch.long, device=self.like.device)
        return self.graph.graph.call_module(self._add(module), (self._value(e.x),))

    def _scale(self, e: Scale) -> fx.Node:
        y = self._value(e.x)
        if is_negation(e):
            return self.graph.graph.call_function(operator.neg, (y,))
        for op, vector, neutral in ((operator.mul, e.scale, 1), (operator.add, e.shift, 0)):
            if np.any(vector != neutral):
                y = self.graph.graph.call_function(op, (y, self._operand(vector, e.frame or 0)))
        return y

    def _operand(self, vector: Array, frame: int) -> Any:
        if not vector.ndim:
            return float(vector)
        holder = nn.Module()
        holder.value = self._parameter(self._tensor(vector.reshape(-1, *[1] * frame)))
        return self.graph.graph.get_attr(f"{self._add(holder)}.value")

    def _sum(self, e: Sum) -> fx.Node:
        ordered = sorted(e.terms, key=lambda t: t not in self.values and is_negation(t))
        y = self._value(ordered[0])
        for t in ordered[1:]:
            if t not in self.values and isinstance(t, Scale) and is_negation(t):
                y = self.graph.graph.call_function(operator.sub, (y, self._value(t.x)))
            else:
                y = self.graph.graph.call_function(operator.add, (y, self._value(t)))
        return y

    def _value(self, e: Expr) -> fx.Node:
        if e not in self.values:
            self.values[e] = self._emit(e)  # a negation that no sum absorbs
        return self.values[e]

    def _tensor(self, a: Array) -> Tensor:
        return torch.from_numpy(np.array(a, dtype=np.float64, copy=True)).to(self.like.device, self.like.dtype)

    def _parameter(self, t: Tensor) -> nn.Parameter:
        return nn.Parameter(t, requires_grad=self.trainable)

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
        path = self.graph.fresh_path(wanted)
        module.eval()
        self.graph.module.add_submodule(path, module)
        return path


def _exists(module: nn.Module, path: str) -> bool:
    try:
        lookup(module, path)
    except AttributeError:
        return False
    return True

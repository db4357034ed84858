"""What is known about the values of a torch.fx graph: constants, symbolic shapes, mutations."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.nn import functional as F

from reparamc.shape import Dim, Shape, shape_of, size

CONSTANT_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.getitem,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.reshape, torch.unsqueeze, torch.squeeze,
    torch.flatten, torch.transpose, torch.permute, torch.sqrt, torch.rsqrt, torch.exp,
}  # fmt: skip
CONSTANT_METHODS = {
    "add", "sub", "mul", "div", "neg", "view", "reshape", "unsqueeze", "squeeze", "flatten", "transpose",
    "permute", "sqrt", "rsqrt", "exp", "t", "detach", "contiguous", "float", "double", "half", "to", "expand",
}  # fmt: skip

SAME_SHAPE_MODULES = (
    nn.ReLU, nn.ReLU6, nn.GELU, nn.SiLU, nn.Sigmoid, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU, nn.Mish,
    nn.Tanh, nn.Softmax, nn.Dropout, nn.Dropout2d, nn.Identity, nn.LayerNorm, nn.PReLU,
)  # fmt: skip
SAME_SHAPE_FUNCTIONS = {
    F.relu, F.relu6, F.gelu, F.silu, F.sigmoid, F.hardswish, F.hardsigmoid, F.leaky_relu, F.softmax, F.dropout,
    F.layer_norm, torch.relu, torch.sigmoid, torch.tanh, torch.softmax, torch.neg, operator.neg,
}  # fmt: skip
SAME_SHAPE_METHODS = {"relu", "sigmoid", "tanh", "softmax", "contiguous", "clone", "neg", "float", "half", "double"}
ARITHMETIC = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.iadd, operator.isub, operator.imul,
    torch.add, torch.sub, torch.mul, torch.div, "add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_",
}  # fmt: skip
FUNCTIONS: dict[Any, str] = {
    operator.add: "add", operator.iadd: "add", torch.add: "add",
    operator.sub: "sub", operator.isub: "sub", torch.sub: "sub", torch.subtract: "sub",
    operator.mul: "mul", operator.imul: "mul", torch.mul: "mul", torch.multiply: "mul",
    operator.truediv: "div", operator.itruediv: "div", torch.div: "div", torch.divide: "div",
    operator.neg: "neg", torch.neg: "neg",
    torch.reshape: "reshape", torch.flatten: "flatten", torch.transpose: "transpose", torch.permute: "permute",
    torch.squeeze: "squeeze", torch.unsqueeze: "unsqueeze", torch.unflatten: "unflatten",
    torch.mean: "mean", torch.amax: "amax", torch.split: "split", torch.chunk: "chunk",
    torch.detach: "detach", F.dropout: "dropout",
    F.scaled_dot_product_attention: "scaled_dot_product_attention",
}  # fmt: skip
"""What a called function is, by identity: a user's function may bear any name."""

METHODS = {
    "add", "add_", "sub", "sub_", "mul", "mul_", "div", "div_", "neg", "subtract", "multiply", "divide",
    "reshape", "view", "flatten", "transpose", "permute", "squeeze", "unsqueeze", "unflatten", "mean", "amax",
    "split", "chunk", "detach", "contiguous",
}  # fmt: skip


def operation(node: fx.Node) -> str:
    """The name of the operator that ``node`` calls as a function or method; empty where it is none known here."""
    if node.op == "call_function":
        return FUNCTIONS.get(node.target, "")
    if node.op == "call_method" and node.target in METHODS:
        return {"subtract": "sub", "multiply": "mul", "divide": "div"}.get(
            str(node.target), str(node.target).rstrip("_")
        )
    return ""


def first_operand(node: fx.Node) -> fx.Node | None:
    """The first operand of a call, given by position or as ``input``."""
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if isinstance(first, fx.Node) else None


ALLOCATING_METHODS = {
    "add", "sub", "mul", "div", "neg", "pow", "exp", "log", "sqrt", "rsqrt", "abs", "sigmoid", "tanh", "relu",
    "softmax", "mean", "sum", "amax", "amin", "max", "min", "var", "std", "clone", "matmul", "bmm", "clamp",
    "size", "dim", "ndimension", "numel",
}  # fmt: skip
ALLOCATING_FUNCTIONS = {
    operator.add, operator.sub, operator.mul, operator.truediv, operator.neg, operator.pow, operator.matmul,
    operator.floordiv, operator.mod, operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge,
    torch.add, torch.sub, torch.mul, torch.div, torch.neg, torch.relu, torch.sigmoid, torch.tanh, torch.softmax,
    torch.cat, torch.concat, torch.stack, torch.matmul, torch.bmm, torch.mean, torch.sum, torch.exp, torch.sqrt,
    torch.rsqrt, torch.clone, torch._assert,
    F.conv1d, F.conv2d, F.conv3d, F.linear, F.batch_norm, F.layer_norm, F.group_norm, F.relu, F.relu6, F.gelu, F.silu,
    F.hardswish, F.hardsigmoid, F.hardtanh, F.leaky_relu, F.elu, F.mish, F.sigmoid, F.softmax, F.softplus, F.pad,
    F.max_pool2d, F.avg_pool2d, F.interpolate, F.scaled_dot_product_attention,
}  # fmt: skip
"""Operators whose result has memory of its own; any other result may share that of its operands."""

IN_PLACE_DUNDERS = {
    f"__{name}__": getattr(operator, name)
    for name in (
        "iadd", "isub", "imul", "itruediv", "ifloordiv", "ipow", "imod", "iand", "ior", "ixor", "imatmul",
        "ilshift", "irshift",
    )
}  # fmt: skip

SIZE_READS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


def lookup(module: nn.Module, target: str) -> Any:
    """The attribute that a dotted ``target`` names."""
    for part in target.split("."):
        module = getattr(module, part)
    return module


def reads_size_only(node: fx.Node) -> bool:
    """Whether ``node`` asks its operand for nothing but its shape, rank, dtype or device."""
    if node.op == "call_function":
        return node.target is getattr and node.args[1] in SIZE_READS
    return node.op == "call_method" and node.target in ("size", "dim", "ndimension", "numel")


def only_asserted(node: fx.Node) -> bool:
    """Whether everything computed from ``node`` ends in assertions or in nothing."""
    stack, seen = [node], {node}
    while stack:
        n = stack.pop()
        if n.target is torch._assert:
            continue
        if n is not node and not (n.op == "call_function" and n.target in _PREDICATES) and not reads_size_only(n):
            return False
        if n.op == "output":
            return False
        fresh = [u for u in n.users if u not in seen]
        seen.update(fresh)
        stack.extend(fresh)
    return True


_PREDICATES = {
    operator.eq, operator.ne, operator.lt, operator.le, operator.gt, operator.ge, operator.getitem, operator.and_,
    operator.or_, operator.not_, operator.mod,
}  # fmt: skip


class Values:
    """Constants and symbolic shapes of a traced graph, found in one sweep in execution order.

    A shape is known from the rank of an example input, from operators that accept one rank only
    (BatchNorm2d), from assertions on the rank, and through everything computed from such a value.
    """

    def __init__(self, module: fx.GraphModule, ranks: dict[str, int]) -> None:
        self.module = module
        self.constants: dict[fx.Node, Tensor] = {}
        self.names: dict[fx.Node, tuple[str, ...]] = {}
        self.shapes: dict[fx.Node, Shape] = {}
        self.dims: dict[fx.Node, Dim] = {}
        self.sizes: dict[fx.Node, Shape] = {}
        self.pieces: dict[fx.Node, Shape] = {}
        for node in module.graph.nodes:
            self._visit(node, ranks)

    def rank(self, node: fx.Node) -> int | None:
        shape = self.shapes.get(node)
        return None if shape is None else len(shape)

    def _visit(self, node: fx.Node, ranks: dict[str, int]) -> None:
        if node.op == "placeholder" and node.target in ranks:
            self.shapes[node] = self._fresh(node, ranks[str(node.target)])
        elif node.op == "get_attr":
            value = lookup(self.module, str(node.target))
            if isinstance(value, Tensor):
                self.constants[node] = value
                self.names[node] = (str(node.target),)
        elif self._is_constant(node):
            self._compute(node)
        else:
            shape = self._shape(node)
            if shape is not None:
                self.shapes[node] = shape
            self._learn_rank(node)
            self._learn_dim(node)

    def _is_constant(self, node: fx.Node) -> bool:
        known = node.target in (CONSTANT_FUNCTIONS if node.op == "call_function" else CONSTANT_METHODS)
        operands = node.all_input_nodes
        return (
            node.op in ("call_function", "call_method")
            and known
            and bool(operands)
            and all(n in self.constants for n in operands)
        )

    def _compute(self, node: fx.Node) -> None:
        args, kwargs = map_arg((node.args, node.kwargs), lambda n: self.constants[n])
        with torch.no_grad():
            run: Callable[..., Any] = node.target if callable(node.target) else getattr(args[0], str(node.target))
            value = run(*(args if callable(node.target) else args[1:]), **kwargs)
        if isinstance(value, Tensor):
            self.constants[node] = value
            self.names[node] = tuple(name for n in node.all_input_nodes for name in self.names.get(n, ()))

    def _fresh(self, node: fx.Node, rank: int, channels: int | None = None, axis: int = 1) -> Shape:
        dims: list[int | str] = [f"{node.name}.{i}" for i in range(rank)]
        if channels is not None:
            dims[axis] = channels
        return shape_of(dims)

    def _shape(self, node: fx.Node) -> Shape | None:
        x = first_operand(node)
        before = self.shapes.get(x) if x is not None else None
        if node.op == "call_module":
            module = lookup(self.module, str(node.target))
            match module:
                case nn.BatchNorm2d() | nn.BatchNorm3d():
                    if before is None and x is not None:
                        before = self._fresh(node, 4 if isinstance(module, nn.BatchNorm2d) else 5, module.num_features)
                        self.shapes[x] = before
                    return before
                case nn.Conv1d() | nn.Conv2d() | nn.Conv3d() if before is not None:
                    return self._convolved(node, before, module.out_channels, len(module.kernel_size))
                case nn.Linear() if before is not None:
                    return (*before[:-1], Dim(module.out_features))
                case nn.Flatten() if before is not None:
                    return flattened(before, module.start_dim, module.end_dim)
                case nn.modules.batchnorm._BatchNorm():
                    return before
                case nn.MaxPool2d() | nn.AvgPool2d() | nn.AdaptiveAvgPool2d() if before is not None:
                    return self._convolved(node, before, before[-3], 2)
            return before if isinstance(module, SAME_SHAPE_MODULES) else None
        if node.op == "call_function":
            if node.target in SAME_SHAPE_FUNCTIONS or node.target is F.batch_norm:
                return before
            given = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
            weight = self.constants.get(given) if isinstance(given, fx.Node) else None
            if before is not None and weight is not None:
                if node.target in (F.conv1d, F.conv2d, F.conv3d):
                    return self._convolved(node, before, weight.shape[0], weight.ndim - 2)
                if node.target is F.linear:
                    return (*before[:-1], Dim(weight.shape[0]))
        if node.op == "call_method" and node.target in SAME_SHAPE_METHODS:
            return before
        if node.target in ARITHMETIC and node.op in ("call_function", "call_method"):
            return self._broadcast(node)
        if before is not None and (reduced := self._reduced(node, before)) is not None:
            return reduced
        if node.target is operator.getitem and x in self.pieces:
            return self.pieces[x]  # an integer: tuples have no other items
        moved = self.layout(node)
        return moved[1] if moved is not None else None

    def _reduced(self, node: fx.Node, before: Shape) -> Shape | None:
        """Means over axes, pieces of a split, and attention."""
        name = operation(node)
        args: Any = node.args[1:]
        rank = len(before)
        if name in ("mean", "amax"):
            axes = args[0] if args else node.kwargs.get("dim")
            axes = (axes,) if isinstance(axes, int) else axes
            if not isinstance(axes, tuple | list) or not all(isinstance(a, int) for a in axes):
                return None
            gone = {cast(int, a) % rank for a in axes}
            if args[1:2] == (True,) or node.kwargs.get("keepdim"):
                return tuple(Dim(1) if i in gone else d for i, d in enumerate(before))
            return tuple(d for i, d in enumerate(before) if i not in gone)
        if name in ("split", "chunk") and args and isinstance(args[0], int):
            axis = args[1] if len(args) > 1 else node.kwargs.get("dim", 0)
            extent = before[axis].known if isinstance(axis, int) else None
            part = args[0] if name == "split" else -(-(extent or 0) // args[0])
            if isinstance(axis, int) and extent and extent % part == 0:
                axis %= rank
                self.pieces[node] = (*before[:axis], Dim(part), *before[axis + 1 :])
        if name == "scaled_dot_product_attention" and len(args) > 1 and isinstance(args[1], fx.Node):
            value = self.shapes.get(args[1])
            return None if value is None else (*before[:-1], value[-1])
        return None

    def _convolved(self, node: fx.Node, before: Shape, channels: int | Dim, n: int) -> Shape | None:
        if len(before) not in (n + 1, n + 2):
            return None
        batch = before[: len(before) - n - 1]
        return (*batch, Dim.of(channels), *(Dim.of(f"{node.name}.{i}") for i in range(n)))

    def _broadcast(self, node: fx.Node) -> Shape | None:
        """Shapes of two operands: as they are where they agree, unknown extents where they do not."""
        found: list[Shape] = []
        for arg in node.args[:2]:
            if isinstance(arg, fx.Node):
                shape = shape_of(self.constants[arg].shape) if arg in self.constants else self.shapes.get(arg)
                if shape is None:
                    return None
                found.append(shape)
        if not found:
            return None
        a, b = max(found, key=len), min(found, key=len)
        lead = len(a) - len(b)
        dims = [
            da if da == db or db == Dim(1) else db if da == Dim(1) else Dim.of(f"{node.name}.{i}")
            for i, (da, db) in enumerate(zip(a[lead:], b, strict=True), lead)
        ]
        return (*a[:lead], *dims)

    def _learn_rank(self, node: fx.Node) -> None:
        """``_assert(x.ndim == 4)`` and ``_assert(x.dim() == 4)`` tell the rank of x."""
        condition = node.args[0] if node.target is torch._assert and node.args else None
        if not (isinstance(condition, fx.Node) and condition.target is operator.eq):
            return
        read, rank = condition.args[:2]
        if isinstance(read, fx.Node) and isinstance(rank, int) and reads_size_only(read):
            is_rank = read.target in ("dim", "ndimension") or (read.target is getattr and read.args[1] == "ndim")
            x = read.args[0]
            if is_rank and isinstance(x, fx.Node):
                self.shapes.setdefault(x, self._fresh(x, rank))

    def _learn_dim(self, node: fx.Node) -> None:
        x = first_operand(node)
        if x is None:
            return
        shape = self.shapes.get(x)
        at: Any = node.args[1] if len(node.args) > 1 else None
        whole = (node.target is getattr and at == "shape") or (node.target == "size" and at is None)
        if whole and shape is not None:
            self.sizes[node] = shape
        elif node.target == "size" and isinstance(at, int) and shape is not None:
            self.dims[node] = shape[at]
        elif node.target is operator.getitem and x in self.sizes:
            picked = self.sizes[x][at] if isinstance(at, int | slice) else None
            if isinstance(picked, Dim):
                self.dims[node] = picked
            elif picked is not None:
                self.sizes[node] = picked
        elif node.target is operator.mul:
            a, b = (self.dim(arg) for arg in node.args[:2])
            if a is not None and b is not None:
                self.dims[node] = a * b

    def dim(self, arg: Any) -> Dim | None:
        """An argument of a reshape as an extent."""
        if isinstance(arg, int):
            return Dim(arg)
        return self.dims.get(arg) if isinstance(arg, fx.Node) else None

    def layout(self, node: fx.Node) -> tuple[Shape | None, Shape, tuple[int, ...] | None] | None:
        """(shape before, shape after, permutation or None) of a layout operator; None when ``node`` is none."""
        name = operation(node)
        x = first_operand(node)
        if not name or x is None or node.kwargs or not node.args:
            return None
        args: Any = node.args[1:]
        before = self.shapes.get(x)
        if name in ("reshape", "view"):
            dims = args[0] if len(args) == 1 and isinstance(args[0], tuple | list | fx.Node) else args
            after = self._reshaped(node, before, dims)
            return None if after is None else (before, after, None)
        fixed = args[:1] if name == "unflatten" else args
        if before is None or _nodes_in(fixed):
            return None
        rank = len(before)
        if name == "flatten":
            return before, flattened(before, *args), None
        if name == "transpose" and len(args) == 2:
            axes = list(range(rank))
            i, j = args
            axes[i], axes[j] = axes[j], axes[i]
            return before, tuple(before[a] for a in axes), tuple(a % rank for a in axes)
        if name == "permute":
            order = args[0] if len(args) == 1 and isinstance(args[0], tuple | list) else args
            axes = [a % rank for a in order]
            return before, tuple(before[a] for a in axes), tuple(axes)
        if name == "unflatten" and len(args) == 2:
            axis = args[0] % rank
            dims = self._reshaped(node, (before[axis],), args[1])
            return None if dims is None else (before, (*before[:axis], *dims, *before[axis + 1 :]), None)
        if name == "unsqueeze" and len(args) == 1:
            axis = args[0] % (rank + 1)
            return before, (*before[:axis], Dim(1), *before[axis:]), None
        if name == "squeeze" and len(args) == 1 and before[args[0]] == Dim(1):
            axis = args[0] % rank
            return before, (*before[:axis], *before[axis + 1 :]), None
        return None

    def _reshaped(self, node: fx.Node, before: Shape | None, dims: Any) -> Shape | None:
        if isinstance(dims, fx.Node):
            return self.sizes.get(dims)
        wanted = [self.dim(d) for d in dims]
        if any(d is None for d in wanted):
            return None
        known = [d for d in wanted if d is not None and d != Dim(-1)]
        if len(known) < len(wanted):
            rest = size(before).divided_by(size(known)) if before is not None else None
            rest = Dim.of(f"{node.name}.rest") if rest is None else rest
            wanted = [rest if d == Dim(-1) else d for d in wanted]
        return tuple(d for d in wanted if d is not None)


def _nodes_in(args: Any) -> list[fx.Node]:
    found: list[fx.Node] = []
    map_arg(tuple(args), lambda n: (found.append(n), n)[1])
    return found


def flattened(shape: Shape, start: Any = 0, end: Any = -1) -> Shape:
    start, end = start % len(shape), end % len(shape)
    return (*shape[:start], size(shape[start : end + 1]), *shape[end + 1 :])


class Memory:
    """Which nodes may share memory, and which may write into it."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        for node in graph.nodes:
            self._parent[node] = node
            if not _allocates(node, module):
                shared = _written(node, module) or node.all_input_nodes  # what is written in place is the result
                for x in shared:
                    self._parent[self._base(x)] = self._base(node)
        self._aliases: dict[fx.Node, list[fx.Node]] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._aliases.setdefault(self._base(node), []).append(node)
            for target in _written(node, module):
                self._writers.setdefault(self._base(target), []).append(node)

    def _base(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that may write into the memory of ``node``, directly or through a view."""
        return self._writers.get(self._base(node), [])

    def aliases(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that may share memory with ``node``, itself included, in execution order."""
        return self._aliases[self._base(node)]


def _allocates(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        called = lookup(module, str(node.target))
        passing = nn.Identity | nn.Dropout | nn.Dropout1d | nn.Dropout2d | nn.Dropout3d | nn.Flatten | nn.Unflatten
        return is_plain(called) and not isinstance(called, passing) and not getattr(called, "inplace", False)
    if _written(node, module):
        return False
    if node.op == "call_method":
        return node.target in ALLOCATING_METHODS
    if node.op == "call_function":
        return node.target in ALLOCATING_FUNCTIONS or reads_size_only(node)
    return True


def is_plain(module: nn.Module) -> bool:
    """Whether ``module`` is one of torch's own and runs nothing but its own forward."""
    hooked = any(
        getattr(module, name, None)
        for name in ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    )
    return type(module).__module__.startswith("torch.nn.modules") and not hooked and "forward" not in vars(module)


def _written(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """The operands that ``node`` may write into."""
    first = first_operand(node)
    if node.op == "call_module":
        called = lookup(module, str(node.target))
        if not is_plain(called):
            return list(node.all_input_nodes)  # it may do anything
        return [first] if first is not None and getattr(called, "inplace", False) else []
    out = node.kwargs.get("out")
    found = [out] if isinstance(out, fx.Node) else []
    if node.op == "call_method":
        name = str(node.target)
        writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__"
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        flag = node.kwargs.get("inplace") or (node.target in _INPLACE_SECOND and node.args[1:2] == (True,))
        name = name.split(".")[0]  # overloads of aten operators carry theirs behind a dot
        writes = bool(flag) or node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if not writes and not _is_known(node.target):
            return list(node.all_input_nodes)
    else:
        return found
    return [*found, first] if writes and first is not None else found


def _is_known(function: Any) -> bool:
    """Whether a function comes with Python or torch, and so writes only where its name says so."""
    home = getattr(function, "__module__", None) or ""
    return home.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "")


_IN_PLACE = {*IN_PLACE_DUNDERS.values(), operator.setitem}
_INPLACE_SECOND = {F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.mish}

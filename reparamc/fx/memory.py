"""What may share memory in a torch.fx graph, and who may write into it.

What is not known here to have memory of its own may share that of its operands, and what is not known to leave its
operands alone may write into them.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import HigherOrderOperator, OpOverload, OpOverloadPacket
from torch.nn import functional as F

from reparamc.fx.calls import allocates, aten_name, first_operand, is_plain, lookup, spelled
from reparamc.fx.operators import IN_PLACE

SIZE_READS = ("shape", "ndim", "dtype", "device", "is_cuda", "requires_grad")


RESHAPING = (
    *("squeeze_", "unsqueeze_", "transpose_", "t_", "swapaxes_", "swapdims_", "resize_", "resize_as_", "set_"),
    *("as_strided_", "rename_"),
)
"""Operators that change what a tensor is, not only what is in it."""

_SIZES = ("sym_size", "sym_numel", "_assert_tensor_metadata")
GUARDS = "_guards_fn"
"""The module by which torch.export checks the inputs of what it made."""


def reads_size_only(node: fx.Node) -> bool:
    """Whether ``node`` asks its operand for nothing but its shape, rank, dtype or device."""
    if node.op == "call_function":
        return (node.target is getattr and node.args[1] in SIZE_READS) or aten_name(node.target) in _SIZES
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


class Memory:
    """Which nodes may share memory, and which may write into it."""

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}
        stored: dict[int, fx.Node] = {}  # each reading of one attribute is a node of its own
        writes = {node: written(node, module) for node in graph.nodes}
        self._fresh = {node for node in graph.nodes if _allocates(node, module, writes[node])}
        for node in graph.nodes:
            self._parent[node] = node
            if node.op == "get_attr" and (place := _storage(lookup(module, str(node.target)))) is not None:
                self._parent[node] = self._base(stored.setdefault(place, node))
            if node not in self._fresh:
                shared = writes[node] or node.all_input_nodes  # what is written in place is the result
                for x in shared:
                    self._parent[self._base(x)] = self._base(node)
        self._aliases: dict[fx.Node, list[fx.Node]] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        for node in graph.nodes:
            self._aliases.setdefault(self._base(node), []).append(node)
            for target in writes[node]:
                self._writers.setdefault(self._base(target), []).append(node)
        self._reshaped = {self._base(x) for node, found in writes.items() for x in found if _reshapes(node, module)}
        self._changed = {place for place, node in stored.items() if self.writers(node)}

    def is_changed(self, tensor: Tensor) -> bool:
        """Whether a call may write into ``tensor``, a parameter or buffer."""
        return bool(self._changed) and _storage(tensor) in self._changed

    def _base(self, node: fx.Node) -> fx.Node:
        while self._parent[node] is not node:
            self._parent[node] = node = self._parent[self._parent[node]]
        return node

    def writers(self, node: fx.Node) -> list[fx.Node]:
        """The nodes that may write into the memory of ``node``, directly or through a view."""
        return self._writers.get(self._base(node), [])

    def keeps_shape(self, node: fx.Node) -> bool:
        """Whether ``node`` has one and the same shape as long as it lives."""
        return self._base(node) not in self._reshaped

    def is_fresh(self, node: fx.Node) -> bool:
        """Whether nothing older shares memory with ``node``."""
        return node in self._fresh

    def aliases(self, node: fx.Node) -> list[fx.Node]:
        """All nodes that may share memory with ``node``, itself included, in execution order."""
        return self._aliases[self._base(node)]


def _storage(value: Any) -> int | None:
    """Where a tensor that holds anything lies in memory."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.numel() == 0:
        return None
    return value.untyped_storage().data_ptr() or None


def _allocates(node: fx.Node, module: nn.Module, writes: list[fx.Node]) -> bool:
    if node.op == "call_module":
        called = lookup(module, str(node.target))
        if node.target == GUARDS:
            return True
        passing = spelled(node, module) is not None and not allocates(node, module)
        return is_plain(called) and not passing and not getattr(called, "inplace", False)
    if writes:
        return False
    return not node.op.startswith("call_") or allocates(node, module) or reads_size_only(node)


def written(node: fx.Node, module: nn.Module) -> list[fx.Node]:
    """The operands that ``node`` may write into."""
    first = first_operand(node)
    if node.op == "call_module":
        called = lookup(module, str(node.target))
        if node.target == GUARDS:
            return []
        if not is_plain(called):
            return list(node.all_input_nodes)  # it may do anything
        return [first] if first is not None and getattr(called, "inplace", False) else []
    if isinstance(node.target, HigherOrderOperator):
        return list(node.all_input_nodes)
    out = node.kwargs.get("out")
    found = [out] if isinstance(out, fx.Node) else []
    if node.op == "call_method":
        name = str(node.target)
        writes = (name.endswith("_") and not name.endswith("__")) or name in IN_PLACE
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        flag = node.kwargs.get("inplace") or (node.target in _INPLACE_SECOND and node.args[1:2] == (True,))
        name = name.split(".")[0]  # overloads of aten operators carry theirs after a dot
        writes = bool(flag) or node.target in _IN_PLACE or (name.endswith("_") and not name.endswith("__"))
        if not is_known(node.target) and (not writes or isinstance(node.target, _OF_LIBRARIES)):
            return list(node.all_input_nodes)
    else:
        return found
    if writes and first is None:  # it is given many at once, as those of torch._foreach_add_
        return list(node.all_input_nodes)
    return [*found, first] if writes and first is not None else found


def _reshapes(node: fx.Node, module: nn.Module) -> bool:
    """Whether ``node`` may give what it writes into another shape."""
    if node.op == "call_module":
        return not is_plain(lookup(module, str(node.target)))
    name = aten_name(node.target) or (
        str(node.target) if node.op == "call_method" else getattr(node.target, "__name__", "")
    )
    return name in RESHAPING or "out" in node.kwargs or not (node.op == "call_method" or is_known(node.target))


def is_known(function: Any) -> bool:
    """Whether a function comes with Python or torch, and so writes only where its name says so; or makes a tuple.

    Or it is an operator of another library that is declared to write into nothing.
    """
    if isinstance(function, type) and issubclass(function, tuple):
        return True
    if isinstance(function, _OF_LIBRARIES):
        is_one = isinstance(function, OpOverload)
        overloads = [function] if is_one else [getattr(function, name) for name in function.overloads()]
        return all(o.namespace in ("aten", "prims") or not o._schema.is_mutable for o in overloads)
    home = getattr(function, "__module__", None) or ""
    return home.split(".")[0] in ("torch", "_operator", "operator", "builtins", "math", "")


_OF_LIBRARIES = OpOverload, OpOverloadPacket
_IN_PLACE = set(IN_PLACE.values())
_INPLACE_SECOND = {F.relu, F.relu6, F.silu, F.hardswish, F.hardsigmoid, F.mish}

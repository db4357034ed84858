"""Graphs of core ATen operators, as they were before.

Normalizations give no statistics, reshapes make no copies, and a matrix is not repeated for each example.
"""

from __future__ import annotations

import operator
from typing import Any, cast

import torch
from torch import fx

from reparamc.fx.calls import aten_name, lookup
from reparamc.fx.memory import written

_BATCH_NORMS = (
    "native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit", "_batch_norm_no_update",
    "cudnn_batch_norm", "miopen_batch_norm",
)  # fmt: skip
_WHOLE = {
    **dict.fromkeys(_BATCH_NORMS, torch.ops.aten.batch_norm.default),
    "native_layer_norm": torch.ops.aten.layer_norm.default,
    "native_group_norm": torch.ops.aten.group_norm.default,
}
"""What gives the first result alone of an operator that gives its statistics as well."""
_NAMES = {"group": "num_groups", "exponential_average_factor": "momentum", "epsilon": "eps"}
_DEFAULTS = {"running_mean": None, "running_var": None, "training": False, "cudnn_enabled": True}
_COPIES, _VIEWS = ("clone", "contiguous"), ("view", "_unsafe_view")


def recompose(module: fx.GraphModule) -> None:
    """Change ``module`` to what it is decomposed from, as far as operators take care of more than their result."""
    nodes = [n for n in module.graph.nodes if n.op == "call_function"]
    for node in nodes:
        if (name := _name(node)) in _WHOLE:
            _without_statistics(node, name)
        elif name == "bmm" and (matrix := _repeated(node.args[1], module)) is not None:
            node.target, node.args = torch.ops.aten.matmul.default, (node.args[0], matrix)
    if not any(written(n, module) for n in module.graph.nodes):
        for node in nodes:
            if aten_name(node.target) in _COPIES and all(u.op != "output" for u in node.users):
                node.replace_all_uses_with(cast(fx.Node, node.args[0]))
                module.graph.erase_node(node)
            elif aten_name(node.target) in _VIEWS and isinstance(node.args[1], tuple | list):
                node.target = torch.ops.aten.reshape.default  # it may need another layout than that of its operand now


def _name(node: fx.Node) -> str:
    is_torch = getattr(node.target, "__module__", None) == "torch"
    return aten_name(node.target) or (str(getattr(node.target, "__name__", "")) if is_torch else "")


def _repeated(batch: Any, module: fx.GraphModule) -> fx.Node | None:
    """The parameter, transposed or as it is, that each example of ``batch`` is."""
    sizes = list(batch.args[1]) if aten_name(batch.target) in (*_VIEWS, "expand") else []
    while aten_name(batch.target) in (*_VIEWS, "expand") and list(batch.args[1]) == sizes:
        batch, last = batch.args[0], batch
        if aten_name(last.target) == "expand":
            shape = _shape(batch, module)
            return batch if shape == sizes[1:] and len(shape) == 2 else None
    return None


def _shape(node: fx.Node, module: fx.GraphModule) -> list[int]:
    if node.op == "get_attr" and isinstance(held := lookup(module, str(node.target)), torch.Tensor):
        return list(held.shape)
    if aten_name(node.target) == "permute":
        inner = _shape(cast(fx.Node, node.args[0]), module)
        return [inner[axis] for axis in cast("list[int]", node.args[1])] if inner else []
    return []


def _without_statistics(node: fx.Node, name: str) -> None:
    if any(u.target is not operator.getitem or (u.users and u.args[1] != 0) for u in node.users):
        return
    decomposed: Any = node.target if aten_name(node.target) else getattr(torch.ops.aten, name).default
    names = (_NAMES.get(a.name, a.name) for a in decomposed._schema.arguments)
    given = {**_DEFAULTS, **dict(zip(names, node.args, strict=False))}
    given |= {_NAMES.get(key, key): value for key, value in node.kwargs.items()}
    graph = node.graph
    with graph.inserting_before(node):
        args = tuple(given[a.name] for a in _WHOLE[name]._schema.arguments if a.name in given)
        whole = graph.call_function(_WHOLE[name], args)
    for user in list(node.users):
        if user.args[1] == 0:
            whole.meta |= user.meta
            user.replace_all_uses_with(whole)
        graph.erase_node(user)
    graph.erase_node(node)

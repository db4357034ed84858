"""Casts of values to the dtype that they have anyway, as mixed precision is written, or to their own device."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, fx, nn

from reparamc.fx.calls import Call, Held, aten_name, lookup, operation
from reparamc.fx.operators import OPERATORS

_NAMED = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_CASTS = {*_NAMED, "to", "_to_copy", "type", "type_as"}
_WEIGHTED = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "other", "addmm": "other"}
_PROMOTED = ("add", "sub", "mul", "div")


class DTypes:
    """The floating dtypes of values that weights tell, for any arguments: operators with a weight take and give its.

    ``graph`` may grow between one question and the next.
    """

    def __init__(self, graph: fx.Graph, module: nn.Module) -> None:
        self.graph, self.module = graph, module
        self._known: dict[fx.Node, torch.dtype | None] = {}

    def of(self, node: object) -> torch.dtype | None:
        """The dtype of ``node``; None where it is not known."""
        fresh: list[fx.Node] = []
        for n in reversed(self.graph.nodes):
            if n in self._known:
                break
            fresh.append(n)
        for n in reversed(fresh):
            call = operation(n, self.module)
            dtype = self._dtype(n, call)
            self._known[n] = dtype if dtype is not None and dtype.is_floating_point else None
            if call is not None and call.input is not None and self._known[call.input] is None:
                self._known[call.input] = self._weight(call)
        return self._known.get(node) if isinstance(node, fx.Node) else None

    def wanted(self, cast_: fx.Node) -> torch.dtype | None:
        """The dtype that a cast is to, where nothing else is asked of it."""
        given = [*cast_.args[1:], *cast_.kwargs.values()]
        if _name(cast_) in _NAMED:
            return None if given else _NAMED[_name(cast_)]
        if len(given) != 1:
            return None
        (one,) = given
        if isinstance(one, fx.Node):
            known = self._known.get(cast(fx.Node, one.args[0]) if _is_read(one) else one)
            is_device = _is_read(one) and one.args[1] == "device"  # that of weights, where they tell the dtype
            return self._known.get(cast(fx.Node, cast_.args[0])) if is_device and known is not None else known
        return one if isinstance(one, torch.dtype) else None

    def _weight(self, call: Call) -> torch.dtype | None:
        """The dtype of the weight that a call multiplies with."""
        weight = call.args.get(_WEIGHTED.get(call.op, ""))
        if isinstance(weight, fx.Node):
            return self._known.get(weight) if call.plain else None
        weight = weight.tensor if isinstance(weight, Held) else weight
        return weight.dtype if isinstance(weight, Tensor) and call.plain else None

    def _dtype(self, node: fx.Node, call: Call | None) -> torch.dtype | None:
        if node.op == "get_attr":
            held = lookup(self.module, str(node.target))
            return held.dtype if isinstance(held, Tensor) else None
        if _name(node) in _CASTS:
            return self.wanted(node)
        if call is None or not call.plain:
            return None
        if (dtype := self._weight(call)) is not None:
            return dtype
        if call.op in _PROMOTED:
            given = [v for v in (call.args.get("input"), call.args.get("other")) if not isinstance(v, int | float)]
            found = {self._known[v] if isinstance(v, fx.Node) else None for v in given}
            return found.pop() if len(found) == 1 else None
        keeps = "dtype" in OPERATORS[call.op].keeps or call.op == "batch_norm"
        return self._known[call.input] if keeps and call.input is not None and "dtype" not in call.args else None


def drop_casts(module: fx.GraphModule) -> None:
    """Erase the casts in ``module`` that do nothing for any arguments.

    A cast of what is returned to a dtype by its name stays, for autocast.
    """
    casts = [n for n in module.graph.nodes if _name(n) in _CASTS]
    if not casts or len({t.device for t in (*module.parameters(), *module.buffers())}) > 1:
        return
    dtypes = DTypes(module.graph, module)
    for node in casts:
        x, is_named = node.args[0], len(node.all_input_nodes) == 1
        dtype = dtypes.of(x)
        if dtype is None or dtype != dtypes.wanted(node) or (is_named and any(u.op == "output" for u in node.users)):
            continue
        reads = [a for a in node.all_input_nodes if _is_read(a)]
        node.replace_all_uses_with(cast(fx.Node, x))
        module.graph.erase_node(node)
        for read in reads:
            if not read.users:
                module.graph.erase_node(read)
    module.recompile()


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else aten_name(node.target)


def _is_read(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is getattr and node.args[1] in ("dtype", "device")

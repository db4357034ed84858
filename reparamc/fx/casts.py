"""Casts of values to the dtype that they have anyway, as mixed precision is written, or to their own device."""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, fx, nn

from reparamc.fx.calls import Call, Held, aten_name, lookup, operation
from reparamc.fx.operators import OPERATORS

_NAMED = {"float": torch.float32, "double": torch.float64, "half": torch.float16, "bfloat16": torch.bfloat16}
_CASTS = {*_NAMED, "to", "_to_copy", "type", "type_as"}
_WEIGHTED = {"conv": "weight", "conv_transpose": "weight", "linear": "weight", "matmul": "other", "addmm": "other"}
_PROMOTED = ("add", "sub", "mul", "div")
_STEADY = {
    "batch_norm", "relu", "relu6", "gelu", "silu", "sigmoid", "hardswish", "hardsigmoid", "leaky_relu", "tanh",
    "hardtanh", "neg", "abs", "identity", "copy", "dropout", "reshape", "reshape_as", "permute", "transpose",
    "flatten", "unflatten", "squeeze", "unsqueeze", "expand", "repeat", "pixel_shuffle", "pixel_unshuffle",
    "max_pool", "split", "chunk", "unbind", "getitem", "slice", "narrow", "select", "channel_shuffle",
}  # fmt: skip
"""What gives the dtype of its operand under autocast, too."""


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
                self._known[call.input] = self.weight(call)
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

    def weight(self, call: Call) -> torch.dtype | None:
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
        if (dtype := self.weight(call)) is not None:
            return dtype
        if call.op in _PROMOTED:
            given = [v for v in (call.args.get("input"), call.args.get("other")) if not isinstance(v, int | float)]
            found = {self._known[v] if isinstance(v, fx.Node) else None for v in given}
            return found.pop() if len(found) == 1 else None
        keeps = "dtype" in OPERATORS[call.op].keeps or call.op == "batch_norm"
        return self._known[call.input] if keeps and call.input is not None and "dtype" not in call.args else None


def drop_casts(module: fx.GraphModule) -> None:
    """Erase the casts in ``module`` that nobody can see, also where a copy is converted or autocast is on.

    A cast between an operator with a weight and a BatchNorm is done after both, so that they can become one.
    """
    casts = [n for n in module.graph.nodes if _name(n) in _CASTS]
    if not casts or len({t.device for t in (*module.parameters(), *module.buffers())}) > 1:
        return
    dtypes = DTypes(module.graph, module)
    casts = [n for n in casts if dtypes.of(n.args[0]) is not None and dtypes.of(n.args[0]) == dtypes.wanted(n)]
    origins, kept = _Origins(module, dtypes), list[fx.Node]()
    for node in casts:
        if origins.is_nothing(node):
            reads = [a for a in node.all_input_nodes if _is_read(a)]
            node.replace_all_uses_with(cast(fx.Node, node.args[0]))
            module.graph.erase_node(node)
            for read in reads:
                if not read.users:
                    module.graph.erase_node(read)
        else:
            kept.append(node)
    for node in kept:
        origins.move_after_norm(node)
    module.recompile()


class _Origins:
    """What decides the dtype of each value: two of the same origin agree in each copy, and under autocast.

    It is "weights" for parameters and buffers, "operators" for what is computed with them (in another dtype under
    autocast), and the dtype itself where one is asked for by its name.
    """

    def __init__(self, module: fx.GraphModule, dtypes: DTypes) -> None:
        self.module, self.dtypes = module, dtypes
        self.calls = {n: operation(n, module) for n in module.graph.nodes}
        self._of: dict[fx.Node, str | torch.dtype | None] = {}
        for node, call in self.calls.items():
            self._of[node] = self._origin(node, call)

    def is_nothing(self, cast_: fx.Node) -> bool:
        """Whether no user of ``cast_`` could tell it from its operand."""
        x, asked = cast(fx.Node, cast_.args[0]), _asked(cast_)
        if _is_read(asked) and cast(fx.Node, asked).args[1] == "device":
            return True
        if self._of[x] is not None and self._of[x] == self._of[cast_]:
            return True
        return isinstance(asked, fx.Node) and bool(cast_.users) and all(self._takes(u, cast_, x) for u in cast_.users)

    def move_after_norm(self, cast_: fx.Node) -> None:
        """Cast the result of the BatchNorm that alone takes ``cast_``, where its operand may be folded with it."""
        x, users = cast(fx.Node, cast_.args[0]), list(cast_.users)
        call = operation(users[0], self.module) if len(users) == 1 else None
        if call is None or call.op != "batch_norm" or not call.plain or call.input is not cast_ or len(x.users) > 1:
            return
        if (before := self.calls.get(x)) is None or self.dtypes.weight(before) is None:
            return
        (norm,) = users
        cast_.replace_all_uses_with(x)
        norm.replace_all_uses_with(cast_)
        cast_.replace_input_with(x, norm)
        norm.append(cast_)

    def _takes(self, user: fx.Node, cast_: fx.Node, x: fx.Node) -> bool:
        """Whether ``user`` multiplies with a weight, in the dtype of autocast; or is folded, ``x`` being constant."""
        call = self.calls[user]
        if call is None or not call.plain:
            return False
        if call.op in _PROMOTED and self._of[x] == "weights":
            others = [v for v in (call.args.get("input"), call.args.get("other")) if v is not cast_]
            return all(isinstance(v, fx.Node) and self._of[v] == "operators" for v in others)
        return self.dtypes.weight(call) == self.dtypes.wanted(cast_)

    def _origin(self, node: fx.Node, call: Call | None) -> str | torch.dtype | None:
        if node.op == "get_attr":
            return "weights"
        if _name(node) in _CASTS:
            asked = _asked(node)
            if _is_read(asked):
                read = cast(fx.Node, asked)
                return self._of.get(cast(fx.Node, (node if read.args[1] == "device" else read).args[0]))
            return self._of.get(asked) if isinstance(asked, fx.Node) else self.dtypes.wanted(node)
        if call is None or not call.plain:
            return None
        if self.dtypes.weight(call) is not None:
            weight = call.args[_WEIGHTED[call.op]]
            follows = not isinstance(weight, fx.Node) or self._of[weight] in ("weights", "operators")
            return "operators" if follows else None
        if call.op in _PROMOTED:
            given = [v for v in (call.args.get("input"), call.args.get("other")) if not isinstance(v, int | float)]
            found = {self._of.get(v) if isinstance(v, fx.Node) else None for v in given}
            return found.pop() if len(found) == 1 else None
        return self._of.get(call.input) if call.op in _STEADY and call.input is not None else None


def names_dtype(node: fx.Node) -> bool:
    """Whether a call names the dtype of its result, which is no whole one, so that operands do not change it."""
    named = (a for a in (*node.args, *node.kwargs.values()) if isinstance(a, torch.dtype))
    return _name(node) in (*_NAMED, "new_tensor") or any(t.is_floating_point or t.is_complex for t in named)


def _asked(cast_: fx.Node) -> Any:
    """What a cast is to: a node, a dtype, or nothing but its name."""
    return next(iter([*cast_.args[1:], *cast_.kwargs.values()]), None)


def _name(node: fx.Node) -> str:
    return str(node.target) if node.op == "call_method" else aten_name(node.target)


def _is_read(node: Any) -> bool:
    return (
        isinstance(node, fx.Node)
        and node.op == "call_function"
        and node.target is getattr
        and node.args[1] in ("dtype", "device")
    )

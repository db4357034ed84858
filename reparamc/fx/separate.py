"""Operators of torch that treat channels alike and each by itself, and values that may have fewer of them."""

from __future__ import annotations

import operator
from typing import cast

import torch
from torch import Tensor, fx, nn
from torch.nn import functional as F

from reparamc.algebra.expr import Mean, Permute, Reshape
from reparamc.algebra.shape import Shape
from reparamc.compiler.graph import Separate
from reparamc.fx.calls import Call, class_of, integers, lookup
from reparamc.fx.readings import Readings

ELEMENTWISE = (
    "abs", "add", "celu", "clamp", "div", "elu", "erf", "exp", "gelu", "hardsigmoid", "hardswish", "hardtanh",
    "leaky_relu", "log", "maximum", "minimum", "mish", "mul", "prelu", "relu", "relu6", "rsqrt", "selu", "sigmoid",
    "silu", "softplus", "softsign", "sqrt", "sub", "tanh", "truediv",
)  # fmt: skip
"""Each element of the result depends on those of the operands at its own position; functions, and methods."""

FUNCTIONS = {f for home in (torch, F, operator) for name in ELEMENTWISE if (f := getattr(home, name, None)) is not None}
FUNCTIONS |= {operator.iadd, operator.isub, operator.imul, operator.itruediv}

HOMOGENEOUS = {"abs", "leaky_relu", "prelu", "relu", "LeakyReLU", "PReLU", "ReLU"}
"""Functions, methods and modules that a positive factor passes."""

MODULES = {
    nn.CELU, nn.ELU, nn.GELU, nn.Hardsigmoid, nn.Hardswish, nn.Hardtanh, nn.LeakyReLU, nn.Mish, nn.ReLU, nn.ReLU6,
    nn.PReLU, nn.SELU, nn.SiLU, nn.Sigmoid, nn.Softplus, nn.Tanh,
}  # fmt: skip

KEEPING = ("adaptive_avg_pool", "adaptive_max_pool", "interpolate", "max_pool")
"""Over positions, with coefficients that sum to 1: what a channel is everywhere, it stays."""


def separate(graph: Readings, node: fx.Node) -> Separate | None:
    """See `reparamc.compiler.graph.Graph.separate`."""
    if node in graph.facts.known or node in graph.facts.dims or node in graph.written or node in graph.inner:
        return None
    call = graph.facts.calls.get(node)
    if is_elementwise(node, graph.module):
        return _elementwise(graph, node)
    if call is None or call.input is None or not call.plain or call.input in graph.facts.known:
        return None
    if call.op in KEEPING:
        keeps = call.op != "max_pool" or call.get("return_indices", False) is False
        return Separate((call.input,), computes=False) if keeps and len(node.all_input_nodes) == 1 else None
    return _moving(graph, node, call, call.input)


def is_elementwise(node: fx.Node, module: nn.Module) -> bool:
    if node.op == "call_module":
        kind = lookup(module, str(node.target))
        one = not isinstance(kind, nn.PReLU) or kind.num_parameters == 1
        return one and class_of(kind) in MODULES and not (kind._forward_hooks or kind._forward_pre_hooks)
    if node.op == "call_method":
        return str(node.target).removesuffix("_") in ELEMENTWISE
    return node.op == "call_function" and node.target in FUNCTIONS


PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", "mul_")


def _elementwise(graph: Readings, node: fx.Node) -> Separate | None:
    operands = [n for n in node.all_input_nodes if n not in graph.facts.known]
    constants = [graph.facts.known[n] for n in node.all_input_nodes if n in graph.facts.known]
    scalars = all(isinstance(c, int | float) or (isinstance(c, Tensor) and c.numel() == 1) for c in constants)
    ranks = {graph.facts.rank(n) for n in operands}
    if not operands or not scalars or len(ranks) > 1 or any(n in graph.facts.dims for n in operands):
        return None
    kind = node.target if node.op != "call_module" else class_of(lookup(graph.module, str(node.target)))
    name = getattr(kind, "__name__", str(kind)).removesuffix("_")
    return Separate(tuple(operands), multiplies=node.target in PRODUCTS, homogeneous=name in HOMOGENEOUS)


def _moving(graph: Readings, node: fx.Node, call: Call, x: fx.Node) -> Separate | None:
    rank = graph.facts.rank(x)
    if call.op == "mean" and rank is not None:
        dims, keep = call.get("dim"), call.get("keepdim", False)
        axes = integers(dims, 1) if isinstance(dims, int) else dims
        plain = isinstance(axes, tuple | list) and all(isinstance(d, int) for d in axes) and axes
        if not plain or keep not in (True, False) or call.args.get("dtype") is not None:
            return None
        found = Mean(rank, tuple(sorted(d % rank for d in cast("tuple[int, ...]", axes))), keep)
        return Separate((x,), computes=False, moves=found)
    found = graph.facts.layout(node)
    if found is None or found[0] is None:
        return None
    before, after, axes = cast("tuple[Shape, Shape, tuple[int, ...] | None]", found)
    return Separate((x,), computes=False, moves=Reshape(before, after, node) if axes is None else Permute(axes))


def may_narrow(graph: Readings, node: fx.Node) -> bool:
    """See `reparamc.compiler.graph.Graph.may_narrow`. What torch.export recorded says all sizes."""
    if graph.exported or not node.users or node in graph.written or graph.facts.rank(node) is None:
        return False
    return all(u.op != "output" and u not in graph.facts.dims and u not in graph.facts.sizes for u in node.users)

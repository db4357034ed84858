"""Operators of torch by the interval of their results: see `reparamc.compiler.ranges`."""

from __future__ import annotations

from math import inf
from typing import cast

import torch
from torch import fx

from reparamc.algebra.arrays import Array, is_all
from reparamc.compiler.graph import ALL, Bounded
from reparamc.compiler.ranges import POSITIVE, bounded_by_name, clip
from reparamc.fx.calls import Call, spelled
from reparamc.fx.readings import Readings

CHOOSING = (
    "adaptive_max_pool", "amax", "flatten", "getitem", "max_pool", "permute", "reshape", "squeeze", "transpose",
    "unflatten", "unsqueeze",
)  # fmt: skip
"""Whose results are elements of the first operand."""


def bounded(graph: Readings, node: fx.Node) -> Bounded | None:
    """See `reparamc.compiler.graph.Graph.bounded`."""
    found, call = spelled(node, graph.module), graph.facts.calls.get(node)
    operands = tuple(n for n in node.all_input_nodes if n not in graph.facts.known)
    if found is None or not operands or node in graph.facts.known or (call is not None and not call.plain):
        return None
    if call is None or call.input is None:
        return Bounded(operands, POSITIVE) if found[0].name == "exp" and node.op != "call_module" else None
    x, name = call.input, call.op
    if any(isinstance(a, torch.dtype) for a in (*node.args, *node.kwargs.values())):
        return None  # the same bits may mean another value
    if name in ("adaptive_avg_pool", "mean", "mul") and graph.dtype(operands) is None:
        return None  # an integer that overflows changes its sign
    match name:
        case "clamp":
            return _clip(call, "min", "max", -inf, inf) if graph.dtype([x]) is not None else None
        case "hardtanh":
            return _clip(call, "min_val", "max_val", -1.0, 1.0)
        case "leaky_relu" if call.get("negative_slope", 0.01) == 1:
            return Bounded((x,), keeps=ALL)
        case "prelu":
            slope = graph.leaf(call.args.get("weight"))
            return Bounded((x,), keeps=ALL if slope is not None and is_all(cast(Array, slope), 1) else POSITIVE)
        case "mul" if operands == (x,) and call.get("other") is x:
            return Bounded((x,), POSITIVE)
        case "mul" if len(operands) == 2:
            return Bounded(operands, signed=True)
        case "adaptive_avg_pool" | "mean":
            return Bounded((x,), signed=True)
        case _:
            return Bounded((x,), chooses=True) if name in CHOOSING else bounded_by_name(name, x)


def _clip(call: Call, least: str, most: str, low: float, high: float) -> Bounded | None:
    ends = call.get(least, low), call.get(most, high)
    return clip(cast(fx.Node, call.input), *ends) if all(type(e) in (int, float) for e in ends) else None

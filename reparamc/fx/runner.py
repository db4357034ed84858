"""Operators of a traced module, run by torch itself on values that are given."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from reparamc.algebra.expr import Array
from reparamc.compiler.readings import Value
from reparamc.fx.calls import as_plain, lookup
from reparamc.fx.readings import Readings


def run(readings: Readings, value: Value, operands: Mapping[Value, Array], sizes: Mapping[str, int]) -> Array:
    """``value`` by torch's own operators, in float64 on the CPU; see `reparamc.compiler.graph.Graph.run`."""
    root = cast(fx.Node, value)
    values: dict[fx.Node, Any] = {
        cast(fx.Node, v): torch.from_numpy(np.array(x, copy=True)) for v, x in operands.items()
    }
    if sizes:  # sizes may be read from a value that is not given
        for node, dims in (*((n, (d,)) for n, d in readings.facts.dims.items()), *readings.facts.sizes.items()):
            if all(s in sizes for d in dims for s in d.symbols):
                found = torch.Size(d.at(sizes) for d in dims)
                values.setdefault(node, found if node in readings.facts.sizes else found[0])
    modules: dict[str, nn.Module] = {}
    with torch.no_grad():
        for node in _between(readings, set(values), root):
            known = readings.facts.known.get(node)
            if known is not None:
                is_float = isinstance(known, Tensor) and known.is_floating_point()
                values[node] = known.detach().to("cpu", torch.float64, copy=True) if is_float else known
                continue
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_module":
                path = str(node.target)
                if path not in modules:
                    modules[path] = as_plain(lookup(readings.module, path)).to("cpu", torch.float64)
                values[node] = modules[path](*args, **kwargs)
            elif node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            else:
                values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
    return values[root].numpy()


def _between(readings: Readings, given: set[fx.Node], root: fx.Node) -> list[fx.Node]:
    """What has to be computed for ``root`` where ``given`` is there, in execution order."""
    found = set(given)
    stack = [root]
    while stack:
        node = stack.pop()
        if node not in found:
            found.update((node, *readings.written.get(node, ())))
            stack += [n for w in readings.written.get(node, ()) for n in w.all_input_nodes]
            stack += [] if node in readings.facts.known else node.all_input_nodes
    return sorted(found - given, key=readings.order.__getitem__)

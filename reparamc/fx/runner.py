"""Operators of a traced module, run by torch itself on values that are given."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from reparamc.algebra.expr import Array
from reparamc.algebra.recorded import Recorded, tape
from reparamc.compiler.readings import Value
from reparamc.fx.calls import as_plain, is_plain, lookup
from reparamc.fx.readings import Readings, array


def run(readings: Readings, value: Value, operands: Mapping[Value, Array], sizes: Mapping[str, int]) -> Array:
    """``value`` by torch's own operators, in float64 on the CPU; see `reparamc.compiler.graph.Graph.run`."""
    root, given = cast(fx.Node, value), {cast(fx.Node, v): x for v, x in operands.items()}
    values: dict[fx.Node, Any] = {}
    if sizes:  # sizes may be read from a value that is not given
        for node, dims in (*((n, (d,)) for n, d in readings.facts.dims.items()), *readings.facts.sizes.items()):
            if node not in given and all(s in sizes for d in dims for s in d.symbols):
                found = torch.Size(d.at(sizes) for d in dims)
                values[node] = found if node in readings.facts.sizes else found[0]
    nodes = _between(readings, {*given, *values}, root)
    values |= {node: readings.facts.known[node] for node in nodes if node in readings.facts.known}
    modules = {str(n.target): _apart(lookup(readings.module, str(n.target))) for n in nodes if n.op == "call_module"}
    region = _Region([n for n in nodes if n not in values], values, modules, root)
    on = tape()
    if on is None or not any(isinstance(x, Recorded) for x in operands.values()):
        return region([*given], *given.values())
    if any([*m.parameters(), *m.buffers()] for m in modules.values()):
        raise NotImplementedError("parameters of a module that has no reading are not recorded")
    numbers = {n: t for n, t in values.items() if isinstance(t, Tensor) and t.is_floating_point()}  # no indices
    held = {n: array(t) for n, t in numbers.items() if on.at(t) is not None}
    return cast(Array, on.computed(partial(region, [*given, *held]), *given.values(), *held.values()))


@dataclass
class _Region:
    """Calls of torch in float64, of ``values`` that they hold and others."""

    calls: list[fx.Node]
    values: dict[fx.Node, Any]
    modules: dict[str, nn.Module]
    root: fx.Node

    def __call__(self, nodes: list[fx.Node], *arrays: Any) -> Any:
        """The result where ``nodes`` are ``arrays``; of NumPy or, with gradients, of torch, as they are."""
        is_torch = isinstance(arrays[0], Tensor)
        where = arrays[0].device if is_torch else "cpu"
        values = {n: _own(v, where) for n, v in self.values.items() if n not in nodes}
        values.update((n, _own(torch.as_tensor(a), where)) for n, a in zip(nodes, arrays, strict=True))
        for node in self.calls:
            args, kwargs = map_arg((node.args, node.kwargs), values.__getitem__)
            if node.op == "call_method":
                values[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
            elif node.op == "call_module":
                values[node] = self.modules[str(node.target)].to(where, torch.float64)(*args, **kwargs)
            else:
                values[node] = cast(Callable[..., Any], node.target)(*args, **kwargs)
        made = values[self.root]
        return made if is_torch else made.detach().numpy()


def _apart(module: nn.Module) -> nn.Module:
    """A copy of ``module`` that can be given another dtype; one of torch's own writes into nothing that it holds."""
    if module._modules or module._forward_pre_hooks or not is_plain(module):
        return as_plain(module)
    made = copy.copy(module)
    held = {name: None if p is None else nn.Parameter(p.detach(), False) for name, p in module._parameters.items()}
    vars(made).update(_parameters=held, _buffers=dict(module._buffers))
    return made


def _own(value: Any, where: Any) -> Any:
    """A tensor of numbers in float64, that may be written to; anything else as it is."""
    if not isinstance(value, Tensor) or not value.is_floating_point():
        return value
    return (value if value.grad_fn is not None else value.detach()).to(where, torch.float64, copy=True)


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

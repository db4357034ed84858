"""``torch.compile(model, backend="reparamc")``: the graph is fused, and compiled by another backend."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch.fx.node import map_arg

from reparamc.errors import ReparamcError, one_line
from reparamc.fx.fuse import fuse_fx


def backend(
    graph: fx.GraphModule, inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """``graph``, its parameters frozen and fused, compiled by the backend ``options["inner"]``, inductor by default.

    Where gradients are recorded nothing is fused: parameters that are trained are not to be frozen. Neither is
    anything where the graph cannot be fused; a warning says why.
    """
    chosen = dict(options or {})
    compiler = lookup_backend(chosen.pop("inner", "inductor"))
    if torch.is_grad_enabled():
        return compiler(graph, list(inputs), **chosen)
    frozen, kept = _frozen(graph, inputs)
    given = [inputs[n] for n in kept]
    try:
        fused = fuse_fx(frozen, tuple(given), verify="region")
    except ReparamcError as error:
        warnings.warn(f"not fused: {one_line(error)}", RuntimeWarning, stacklevel=2)
        return compiler(graph, list(inputs), **chosen)
    with torch.no_grad():
        compiled = compiler(fused, given, **chosen)
    return lambda *args: compiled(*(args[n] for n in kept))


def _frozen(graph: fx.GraphModule, inputs: Sequence[Any]) -> tuple[fx.GraphModule, list[int]]:
    """``graph`` with its parameters and buffers in it, and the numbers of the inputs that it still takes."""
    made = fx.GraphModule(graph, fx.Graph(), type(graph).__name__)
    copies: dict[fx.Node, fx.Node] = {}
    kept: list[int] = []
    number = 0
    for node in graph.graph.nodes:
        if node.op == "placeholder" and _is_held(node, inputs[number]):
            name = f"held_{number}"
            value = inputs[number].detach()
            made.register_buffer(name, value)
            copies[node] = made.graph.get_attr(name)
        elif node.op == "output":
            made.graph.output(map_arg(node.args[0], lambda n: copies[n]))
            continue
        else:
            copies[node] = made.graph.node_copy(node, copies.__getitem__)
            if node.op == "placeholder":
                kept.append(number)
        number += node.op == "placeholder"
    made.recompile()
    return made.eval(), kept


def _is_held(node: fx.Node, value: Any) -> bool:
    """Whether a module holds what is given for ``node``, by the name that torch.compile gives to such inputs."""
    name = str(node.target)
    return isinstance(value, nn.Parameter) or (
        isinstance(value, Tensor) and "_modules_" in name and "_buffers_" in name
    )

"""A graph that is being made is run on the example without data, to see how many axes a value has."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg
from torch.utils import _pytree as pytree

from reparamc.fx.calls import lookup, with_operands


class DryRun:
    """The values of the nodes of a graph, as tensors without data.

    Args:
        root: the module that the graph is of.
        examples: what its arguments are in the example, by name.
    """

    def __init__(self, root: nn.Module, examples: Mapping[str, Any]) -> None:
        self._root, self._examples = root, examples
        self._values: dict[fx.Node, Any] = {}

    def rank(self, node: fx.Node) -> int | None:
        """The number of axes of ``node``; None where it cannot be told."""
        needed = sorted(n for n in with_operands([node]) if n not in self._values)
        try:
            with ThreadPoolExecutor(1) as other:  # in this thread, modules and functions of torch make nodes
                other.submit(self._run, needed).result()
        except Exception:  # whatever an operator raises without data
            return None
        value = self._values[node]
        return value.dim() if isinstance(value, Tensor) else None

    @torch.no_grad()
    def _run(self, needed: list[fx.Node]) -> None:
        for node in needed:
            args, kwargs = map_arg((node.args, node.kwargs), self._values.__getitem__)
            match node.op:
                case "placeholder":
                    name = str(node.target).lstrip("*")
                    found = self._examples[name] if name in self._examples else args[0]
                case "get_attr":
                    found = lookup(self._root, str(node.target))
                case "call_module":
                    found = _without_data(lookup(self._root, str(node.target)))(*args, **kwargs)
                case "call_method":
                    found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                case _:
                    found = cast(Any, node.target)(*args, **kwargs)
            self._values[node] = pytree.tree_map_only(Tensor, lambda t: t.detach().to("meta"), found)


def _without_data(module: nn.Module) -> nn.Module:
    """A copy of ``module`` with tensors of the same shapes; ``module`` stays as it is."""
    made = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        held = vars(module)[kind]
        vars(made)[kind] = {name: t if t is None else t.detach().to("meta") for name, t in held.items()}
    inner = {name: m if m is None else _without_data(m) for name, m in module._modules.items()}
    vars(made)["_modules"] = inner
    return made

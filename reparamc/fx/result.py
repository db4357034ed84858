"""What takes the place of a module: its fused graph, with what else others may ask of it."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparamc.fx.calls import is_exported
from reparamc.fx.operators import IN_PLACE

HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks"),
)
_OWN = frozenset(dir(fx.GraphModule(nn.Module(), fx.Graph())))
_AS_METHODS = {function: name for name, function in IN_PLACE.items()}


class FusedModule(fx.GraphModule):
    """A graph module that keeps its hooks and its report, in copies and in files; to read a file takes torch alone."""

    def __deepcopy__(self, memo: dict[int, Any]) -> fx.GraphModule:
        made = super().__deepcopy__(memo)
        give(made, {name: copy.deepcopy(vars(self)[name], memo) for name in HOOKS if name in vars(self)})
        give(made, copy.deepcopy(attributes(self), memo))
        return made

    def __reduce__(self) -> tuple[Any, ...]:
        """As the one of torch, and its meta. torch traces the code anew, so writes in place become calls of methods."""
        plain = fx.GraphModule(self, _in_words(self.graph), type(self).__name__)
        _with_constants(plain)
        vars(plain).update({k: v for k, v in vars(self).items() if k not in vars(plain)} | {"_tracer_cls": None})
        kept = {name: vars(self)[name] for name in HOOKS if vars(self).get(name)}
        return (*fx.GraphModule.__reduce__(plain), {"meta": self.meta, "training": self.training, **kept})


def _with_constants(module: fx.GraphModule) -> None:
    """Let modules of their own make the constants of other tensors: torch would run such a call where it is read."""
    calls = [n for n in module.graph.nodes if n.op == "call_method" and n.target in ("new_tensor", "view")]
    for at, node in enumerate(calls):
        held, given = node.args[0], (*node.args[1:], *node.kwargs.values())
        is_read = isinstance(held, fx.Node) and held.op == "get_attr"
        if is_read and any(isinstance(one, torch.dtype) for one in given):
            inner = fx.Graph()
            inner.output(inner.call_method(str(node.target), (inner.placeholder("held"), *node.args[1:]), node.kwargs))
            module.add_submodule(f"constant_{at}", fx.GraphModule(nn.Module(), inner))
            node.op, node.target, node.args, node.kwargs = "call_module", f"constant_{at}", (held,), {}
    module.recompile()


def _in_words(graph: fx.Graph) -> fx.Graph:
    made = copy.deepcopy(graph)
    made._codegen = copy.deepcopy(graph._codegen)
    for node in made.nodes:
        if isinstance(node.type, str):  # an annotation in quotes, which is no class that can be imported
            node.type = None
        if node.op == "call_function" and (name := _AS_METHODS.get(node.target)) and isinstance(node.args[0], fx.Node):
            node.op, node.target = "call_method", name
    return made


def give(module: nn.Module, values: dict[str, Any]) -> None:
    vars(module).update(values)


def attributes(module: nn.Module) -> dict[str, Any]:
    """What ``module`` holds beside tensors, submodules and what torch keeps in it."""
    if is_exported(module):  # these are about the program that it comes from
        return {}
    return {
        name: value
        for name, value in vars(module).items()
        if not name.startswith("_") and name not in _OWN and not isinstance(value, Tensor | nn.Module)
    }


def within(module: nn.Module, graph: nn.Module) -> nn.Module:
    """``module``, of its own class, with its hooks and attributes, which holds and runs nothing but ``graph``."""
    made = object.__new__(type(module))
    empty: dict[str, Any] = {"_parameters": {}, "_buffers": {}, "_non_persistent_buffers_set": set()}
    give(made, vars(module) | empty | {"_modules": {"graph": graph}, "forward": graph.forward})
    return made


def in_place_of(module: nn.Module, graph: fx.GraphModule) -> FusedModule:
    """``graph`` with the hooks and the plain attributes of ``module``, whose forward it computes.

    A `FusedModule` is given these; of any other graph it is a copy.
    """
    hooks = () if is_exported(module) else HOOKS  # those check the inputs of the program
    made = graph
    if not isinstance(made, FusedModule):
        made = FusedModule(graph, copy.deepcopy(graph.graph), type(module).__name__)
        made.meta.update(graph.meta)
    give(made, {name: vars(module)[name] for name in hooks if name in vars(module)})
    give(made, attributes(module))
    for part in made.modules():
        if part is made or type(part) is nn.Module:  # a container that tracing made; others keep their modes
            part.training = False
    return made

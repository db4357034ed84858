"""Modules that are arguments of functions: one that reads ``conv.stride`` is given what has no weights.

Where torch.fx cannot follow a function, a graph calls it as it is, with the module. The source of the function tells
what it reads of that. Where this is numbers, strings and shapes of tensors, the graph keeps nothing else of it.
"""

from __future__ import annotations

import ast
import inspect
import types
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from reparamc.fx.calls import is_constant, lookup
from reparamc.fx.sources import definition, nodes_of

SHAPES = ("shape", "size", "ndim", "dim", "numel")
"""Attributes of a tensor that tell its shape."""
_HIDING = ("locals", "vars", "eval", "exec")

Read = tuple[str, bool]
"""The name of an attribute, and whether it is read for its shape alone."""


def describe_handed(module: fx.GraphModule) -> None:
    """Where functions are given modules in the graph, give them what they read of those."""
    described = False
    for node in handed(module):
        whole, path = lookup(module, str(node.target)), f"{node.target}_read"
        found = [_read_by(user, node) for user in node.users]
        reads = {read for one in found for read in one or ()}
        if None in found or hasattr(module, path) or not all(_is_readable(whole, *read) for read in reads):
            continue
        made = nn.Module()
        made.training = False
        for name, is_shape in reads:
            value = getattr(whole, name)
            vars(made)[name] = torch.empty_like(value, device="meta") if is_shape else value
        module.add_submodule(path, made)
        node.target, described = path, True
    if described:
        module.recompile()


def handed(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The modules that are values in the graph."""
    nodes = module.graph.find_nodes(op="get_attr")
    return (node for node in nodes if isinstance(lookup(module, str(node.target)), nn.Module))


def _is_readable(module: nn.Module, name: str, is_shape: bool) -> bool:
    """Whether ``name`` is a tensor, if its shape is read, or else a constant; and no property computes it."""
    if hasattr(inspect.getattr_static(type(module), name, None), "__get__"):
        return False
    value = {**vars(module), **module._parameters, **module._buffers}.get(name, module)
    return isinstance(value, Tensor) if is_shape else is_constant(value)


def _read_by(user: fx.Node, node: fx.Node) -> set[Read] | None:
    """What the call ``user`` reads of ``node``; None where that is not known."""
    if user.op != "call_function" or not isinstance(user.target, types.FunctionType):
        return None
    bound = inspect.signature(user.target).bind(*user.args, **user.kwargs).arguments
    names = [name for name, value in bound.items() if value is node]
    given = [*user.args, *user.kwargs.values()]
    return _all(_reads(user.target, name) for name in names) if given.count(node) == len(names) > 0 else None


def _all(found: Iterator[set[Read] | None]) -> set[Read] | None:
    every = list(found)
    return None if None in every else {read for one in every for read in one or ()}


def _reads(function: Any, parameter: str, depth: int = 3) -> set[Read] | None:
    """What ``function`` reads of its argument ``parameter``; None where it may do something else with it."""
    if not isinstance(function, types.FunctionType) or hasattr(function, "__wrapped__") or not depth:
        return None
    tree = definition(function)
    if tree is None or tree.decorator_list:
        return None
    found, fine = set[Read](), set[int]()
    for node in nodes_of(tree):
        match node:
            case ast.Attribute(ast.Attribute(ast.Name(name) as own, held) as inner, shape) if name == parameter:
                if shape in SHAPES and isinstance(inner.ctx, ast.Load):
                    found.add((held, True))
                    fine |= {id(own), id(inner)}
            case ast.Attribute(ast.Name(name) as own, held) if name == parameter and id(node) not in fine:
                found.add((held, False))
                fine |= {id(own)} if isinstance(node.ctx, ast.Load) else set()
            case ast.Call(ast.Name("getattr"), [ast.Name(name) as own, ast.Constant(str() as held)], []):
                if name == parameter:
                    found.add((held, False))
                    fine.add(id(own))
            case ast.Call(ast.Name(called), given, []) if at := _places(given, parameter):
                code = function.__code__
                inside = {*code.co_varnames, *code.co_freevars, *code.co_cellvars}
                home = None if called in inside else function.__globals__.get(called)
                names = list(inspect.signature(home).parameters) if isinstance(home, types.FunctionType) else []
                inner = _all(_reads(home, names[n], depth - 1) for n in at) if len(names) > max(at) else None
                if inner is None:
                    return None
                found |= inner
                fine |= {id(given[n]) for n in at}
            case ast.Name(name) if (name == parameter and id(node) not in fine) or name in _HIDING:
                return None
            case _:
                pass
    return found


def _places(given: list[ast.expr], name: str) -> list[int]:
    """Where the variable ``name`` is among arguments by position."""
    found = [n for n, one in enumerate(given) if isinstance(one, ast.Name) and one.id == name]
    return [] if any(isinstance(one, ast.Starred) for one in given) else found

"""A convolution and the BatchNorm after it, both called in Python that cannot be traced.

The source tells that each result of the one goes to the other, for all arguments and branches: ``self.b(self.a(x))``,
or ``y = self.a(x)`` right before the one use of ``y``, ``self.b(y)``. Neither is mentioned anywhere else in the class.
A class derived from `nn.Sequential` tells it of its neighbours where it leaves running them to ``super().forward``.
Then the pair may become one operator in the place of the first, and the second passes on what it is given.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import Counter
from collections.abc import Iterator
from functools import cache
from itertools import pairwise

from torch import nn


def chained(module: nn.Module) -> list[tuple[str, str]]:
    """Pairs of submodules of ``module``: the second is called on each result of the first, and on nothing else.

    Whether the submodules are what their names say now is for the caller to see.
    """
    if "forward" in vars(module):
        return []
    found = list(_chained(type(module)))
    if isinstance(module, nn.Sequential) and (named := _named_beside_super(type(module))) is not None:
        found += [pair for pair in pairwise(module._modules) if named.isdisjoint(pair)]
    return found


@cache
def _chained(kind: type[nn.Module]) -> tuple[tuple[str, str], ...]:
    methods = [m for base in kind.__mro__ if not base.__module__.startswith("torch.") for m in _methods(base)]
    mentioned = Counter(name for method in methods for name in _mentions(method))
    return tuple(
        dict.fromkeys(
            pair
            for method in methods
            for pair in (*_nested(method), *_in_turn(method))
            if pair[0] != pair[1] and mentioned[pair[0]] == mentioned[pair[1]] == 1
        )
    )


@cache
def _named_beside_super(kind: type[nn.Sequential]) -> frozenset[str] | None:
    """The names in the methods of ``kind``, where only ``super().forward`` runs what it holds; or None."""
    names = set[str]()
    for base in kind.__mro__:
        if base.__module__.startswith("torch.") or base is object:
            continue
        methods = _methods(base)
        plain = {name for name, value in vars(base).items() if callable(value) and name != "__init__"}
        if not plain <= {m.name for m in methods} or not all(map(_leaves_children_alone, methods)):
            return None
        names.update(name for method in methods for name in _mentions(method))
    return frozenset(names)


_OWN = frozenset(("_modules", *dir(nn.Sequential))) - {"training"}


def _leaves_children_alone(method: ast.FunctionDef) -> bool:
    """Whether ``self`` and ``super()`` are only there for their attributes, none of them one that gives submodules."""
    owner, fine = method.args.args[0].arg, set[ast.AST]()
    for node in ast.walk(method):
        match node:
            case ast.Attribute(ast.Name(name) as own, attr) if name == owner and attr not in _OWN:
                fine.add(own)
            case ast.Attribute(ast.Call(ast.Name("super"), arguments) as call, "forward"):
                fine.update((call.func, *arguments))
            case _:
                continue
    named = (node for node in ast.walk(method) if isinstance(node, ast.Name) and node.id in (owner, "super"))
    return all(node in fine for node in named)


def _methods(kind: type) -> list[ast.FunctionDef]:
    if kind is object:
        return []
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(kind)))
    except (OSError, TypeError, SyntaxError):  # it has no source
        return []
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [f for f in functions if f.name != "__init__" and f.args.args]


def _mentions(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _called(node: ast.AST, method: ast.FunctionDef) -> tuple[str, ast.expr] | None:
    """The name and the argument of ``self.name(argument)``."""
    match node:
        case ast.Call(ast.Attribute(ast.Name(owner), name), [argument], []) if owner == method.args.args[0].arg:
            return None if isinstance(argument, ast.Starred) else (name, argument)
        case _:
            return None


def _nested(method: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """``self.b(self.a(x))``"""
    for node in ast.walk(method):
        if (outer := _called(node, method)) is not None and (inner := _called(outer[1], method)) is not None:
            yield inner[0], outer[0]


def _in_turn(method: ast.FunctionDef) -> Iterator[tuple[str, str]]:
    """``y = self.a(x)`` and, in the statement after it, ``self.b(y)``, where nothing else reads that ``y``."""
    for block in _blocks(method):
        for first, second in pairwise(block):
            match first:
                case ast.Assign([ast.Name(name)], value):
                    made = _called(value, method)
                case _:
                    continue
            simple = isinstance(second, ast.Assign | ast.Return | ast.Expr)
            used = [c for n in ast.walk(second) if (c := _called(n, method)) and _is_name(c[1], name)] if simple else []
            if made is None or len(used) != 1 or _loads(second, name) != 1:
                continue
            if _is_assigned(second, name) or _loads(method, name) == 1:
                yield made[0], used[0][0]


def _blocks(method: ast.FunctionDef) -> Iterator[list[ast.stmt]]:
    for node in ast.walk(method):
        for name in ("body", "orelse", "finalbody"):
            if isinstance(block := getattr(node, name, None), list):
                yield block


def _is_name(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Name) and node.id == name


def _loads(node: ast.AST, name: str) -> int:
    return sum(_is_name(n, name) and isinstance(n.ctx, ast.Load) for n in ast.walk(node))  # pyright: ignore


def _is_assigned(statement: ast.stmt, name: str) -> bool:
    match statement:
        case ast.Assign([ast.Name(target)]):
            return target == name
        case _:
            return False

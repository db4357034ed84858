"""A convolution and the BatchNorm after it, both called in Python that cannot be traced.

The source tells that each result of the one goes to the other, for all arguments and branches: ``self.b(self.a(x))``,
or ``y = self.a(x)`` right before the one use of ``y``, ``self.b(y)``. The class mentions neither in any other way.
A class derived from `nn.Sequential` tells it of its neighbours where it leaves running them to ``super().forward``.
Then the pair may become one operator in the place of the first, and the second passes on what it is given.

The source is that of the functions which really run. They read attributes of ``self`` and use it for nothing else, and
no other class of the model reads an attribute of that name from anything but its own ``self``.
"""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cache, cached_property
from itertools import pairwise
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodDescriptorType,
)
from typing import Any, cast

from torch import nn

from reparamc.fx.sources import definition

_WALKS = frozenset(("apply", "get_submodule", "get_parameter", "get_buffer", "state_dict", "__dict__", "__getattr__"))
_WALKS |= {f"{named}{kind}" for named in ("", "named_") for kind in ("children", "modules", "parameters", "buffers")}
_WALKS |= {"_modules", "_parameters", "_buffers"}
_OWN = frozenset((*vars(nn.Module()), *dir(nn.Module), *dir(nn.Sequential))) - {"training", "forward"}
_SCOPES = frozenset(("locals", "vars", "globals", "eval", "exec"))


def chained(module: nn.Module, kinds: Iterable[type]) -> tuple[list[tuple[str, str]], str]:
    """Pairs of submodules of ``module``: the second is called on each result of the first, and on nothing else.

    Whether the submodules are what their names say now is for the caller to see. ``kinds`` are the classes of the
    modules around it. With the pairs comes why others are none, where they only look like it.
    """
    kind = type(module)
    neighbours = list(pairwise(module._modules)) if isinstance(module, nn.Sequential) else []
    if not (neighbours or _chained(kind)):
        return [], ""
    if why := _unread(kind) or _replaced(module):
        return [], why
    named = {name for method, _ in _methods(kind) for name in _mentions(method)} if neighbours else set[str]()
    others = [f for k in kinds for f in _reached(k) if f not in _functions(kind)]
    found, why = list[tuple[str, str]](), ""
    for pair in (*_chained(kind), *(pair for pair in neighbours if named.isdisjoint(pair))):
        reader = next((f for f in others if _reaches_in(f, pair)), None)
        if reader is None:
            found.append(pair)
        else:
            why = f"{reader.__qualname__} may read {' or '.join(map(repr, pair))} of it"
    return found, why


@cache
def reaches_into(kind: type, name: str) -> frozenset[str]:
    """The attributes that ``forward`` of ``kind``, and methods that it names, read from its attribute ``name``."""
    methods, run, found = _methods(kind), {"forward"}, set[str]()
    while names := {n for method, _ in methods if method.name in run for n in _mentions(method)} - run:
        run |= names
    for method, owner in methods:
        for node in ast.walk(method) if method.name in run else ():
            match node:
                case ast.Attribute(ast.Attribute(ast.Name(first), middle), attr) if (first, middle) == (owner, name):
                    found.add(attr)
                case _:
                    continue
    return frozenset(found)


@cache
def _chained(kind: type) -> tuple[tuple[str, str], ...]:
    methods = _methods(kind)
    mentioned = Counter(name for method, _ in methods for name in _mentions(method))
    pairs = Counter(p for method, owner in methods if owner for p in (*_nested(method), *_in_turn(method)))
    return tuple(p for p, n in pairs.items() if p[0] != p[1] and mentioned[p[0]] == mentioned[p[1]] == n)


@cache
def _unread(kind: type) -> str:
    """Why the methods of ``kind`` do not tell all that happens to its submodules; empty where they do."""
    for function in _functions(kind):
        if function is None or (method := _source(function)) is None:
            return f"a method of {kind.__name__} has no source of its own"
        if not _leaves_children_alone(method, _functions(kind)[function]):
            return f"{function.__qualname__} does not only read attributes of {_owner(method) or 'modules'}"
    return ""


def _replaced(module: nn.Module) -> str:
    """Something that runs for ``module`` beside the methods of its class."""
    for name, value in vars(module).items():
        plain = isinstance(value, type | BuiltinFunctionType | MethodDescriptorType | FunctionType)
        plain = plain and not (getattr(value, "__defaults__", None) or getattr(value, "__kwdefaults__", None))
        torchs = str(getattr(value, "__module__", None)).startswith("torch.")
        knows = getattr(value, "__closure__", None) or not (plain or torchs)  # what may know the module untold
        if callable(value) and (hasattr(type(module), name) or knows):
            return f"{name!r} of the module itself is code"
    return "it has hooks" if any(value for name, value in vars(module).items() if name.endswith("_hooks")) else ""


@cache
def _functions(kind: type) -> dict[FunctionType | None, bool]:
    """The functions that run as methods of ``kind``, and whether they are given the instance; None for others."""
    found = dict[FunctionType | None, bool]()
    for base in kind.__mro__:
        if base is object or base.__module__.startswith("torch."):
            continue
        for name, value in vars(base).items():
            match value:
                case staticmethod() | classmethod():
                    inner, given = [value.__func__], False
                case property():
                    inner, given = [f for f in (value.fget, value.fset, value.fdel) if f is not None], True
                case cached_property():
                    inner, given = [value.func], True
                case GetSetDescriptorType() | MemberDescriptorType():
                    continue
                case _ if hasattr(type(value), "__get__"):
                    inner, given = [value], True
                case _:
                    continue
            if name != "__init__":
                found |= {f if isinstance(f, FunctionType) else None: given for f in map(_bare, inner)}
    return found


def _bare(function: Any) -> Any:
    """What torch put a decorator around, as `torch.no_grad`."""
    while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
        if not function.__globals__["__name__"].startswith("torch."):
            break
        function = cast(Any, function).__wrapped__
    return function


@cache
def _source(function: FunctionType) -> ast.FunctionDef | None:
    """The definition that ``function`` was compiled from; None where it is no longer there."""
    tree = definition(function)
    if tree is None:
        return None
    compiled = compile(ast.Module([tree], []), "", "exec", dont_inherit=True)
    free = set(function.__code__.co_freevars)
    names = [name for name in _names(function.__code__) if name not in free]
    codes = [c for c in compiled.co_consts if isinstance(c, CodeType) and c.co_name == function.__code__.co_name]
    return tree if any([n for n in _names(c) if n not in free] == names for c in codes) else None


def _names(code: CodeType) -> list[str]:
    inner = [name for const in code.co_consts if isinstance(const, CodeType) for name in _names(const)]
    return [*code.co_names, *inner]


def _leaves_children_alone(method: ast.FunctionDef, given: bool) -> bool:
    """Whether ``self`` and ``super()`` are only there for their attributes, none of them one that gives submodules."""
    owner, fine = _owner(method) if given else "", set[ast.AST]()
    for node in ast.walk(method):
        match node:
            case ast.Attribute(_, attr) if attr in _WALKS:
                return False
            case ast.Name(name) if name in _SCOPES or (given and not owner):
                return False
            case ast.Attribute(ast.Name(name) as own, attr) if name == owner and attr not in _OWN:
                fine.add(own)
            case ast.Attribute(ast.Call(ast.Name("super"), arguments) as call, attr) if attr not in _OWN:
                fine.update((call.func, *arguments))
            case _:
                continue
    named = (node for node in ast.walk(method) if isinstance(node, ast.Name) and node.id in (owner, "super"))
    return all(node in fine for node in named)


def _owner(method: ast.FunctionDef) -> str:
    arguments = [*method.args.posonlyargs, *method.args.args]
    return arguments[0].arg if arguments else ""


def _methods(kind: type) -> list[tuple[ast.FunctionDef, str]]:
    """The methods of ``kind`` that have a source, and what each calls the instance."""
    sources = [(_source(f), given) for f, given in _functions(kind).items() if f is not None]
    return [(method, _owner(method) if given else "") for method, given in sources if method is not None]


@cache
def _reached(kind: type) -> dict[FunctionType, bool]:
    """The methods of ``kind``, with the functions of the same package that they name, and those that these name.

    Class methods, which make instances, are among them where one of these reads them from a class of ``kind``.
    """
    makers = {name: f for base in kind.__mro__ for name, f in vars(base).items() if isinstance(f, classmethod)}
    makers = {name: _bare(f.__func__) for name, f in makers.items()}
    found = {f: given for f, given in _functions(kind).items() if f is not None and f not in makers.values()}
    left = list(found)
    while left:
        function = left.pop()
        package = function.__module__.partition(".")[0]
        named = [_bare(function.__globals__.get(name)) for name in _names(function.__code__)]
        if not makers.keys().isdisjoint(_names(function.__code__)):
            named += [makers.get(name) for name in _read_from(function, kind)]
        for other in named:
            if isinstance(other, FunctionType) and other not in found and other.__module__.startswith(package):
                found[other] = False
                left.append(other)
    return found


def _read_from(function: FunctionType, kind: type) -> Iterator[str]:
    """The attributes that ``function`` reads, but for those of other classes than ``kind`` that it names."""
    if (method := _source(function)) is None:
        yield from _names(function.__code__)
        return
    names = [node for node in ast.walk(method) if isinstance(node, ast.Name)]
    may_be = {base.__name__ for base in kind.__mro__} | {n.id for n in names if isinstance(n.ctx, ast.Store)}
    may_be |= {n.id for n in names if function.__globals__.get(n.id) in kind.__mro__}
    may_be |= {argument.arg for argument in ast.walk(method.args) if isinstance(argument, ast.arg)}
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute) and (not isinstance(node.value, ast.Name) or node.value.id in may_be):
            yield node.attr


def _reaches_in(function: FunctionType, pair: tuple[str, str]) -> bool:
    every = ("parameters", "named_parameters", "state_dict", "modules", "named_modules")
    return not _others_read(function).isdisjoint((*pair, *(every if function.__name__ == "forward" else ())))


@cache
def _others_read(function: FunctionType) -> frozenset[str]:
    """The attributes that ``function`` reads from anything but its first argument; of a method, from ``self``."""
    method, found = _source(function), set[str]()
    if method is None:
        return frozenset(_names(function.__code__))
    own = _owner(method) if "." in function.__qualname__.rpartition("<locals>.")[2] else None
    for node in ast.walk(method):
        match node:
            case ast.Attribute(value, attr):
                pass
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(attr)), *_]):
                pass
            case _:
                continue
        if not (isinstance(value, ast.Name) and value.id == own):
            found.add(attr)
    return frozenset(found)


def _mentions(method: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(method):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def _called(node: ast.AST, method: ast.FunctionDef) -> tuple[str, ast.expr] | None:
    """The name and the argument of ``self.name(argument)``, which may be given as ``input``."""
    match node:
        case ast.Call(ast.Attribute(ast.Name(owner), name), [argument], []) | ast.Call(
            ast.Attribute(ast.Name(owner), name), [], [ast.keyword("input", argument)]
        ) if owner == _owner(method):
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

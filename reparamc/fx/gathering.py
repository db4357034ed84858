"""Convolutions of classes of their own, whose Python decides what they are given.

"Same" padding that depends on the size of a map is written so. No graph holds such a forward, but its source tells that
it returns its weight and bias, applied to what depends on neither. So they take scales of the result.
"""

from __future__ import annotations

import ast
import builtins
import inspect
from functools import cache
from typing import Any

from torch import nn
from torch.nn import functional as F

from reparamc.fx.sources import definition

_BASES = {nn.Conv1d: F.conv1d, nn.Conv2d: F.conv2d, nn.Conv3d: F.conv3d}
_OF_MODULES = frozenset(("_modules", "_parameters", "_buffers", *dir(nn.Module))) - {"training"}
_SIZES = ("shape", "size", "dtype", "device", "ndim", "dim")
_HIDING = (getattr, setattr, delattr, vars, globals, locals, eval, exec)
_REFUSED = (
    ast.AugAssign,
    ast.Delete,
    ast.Global,
    ast.Nonlocal,
    ast.Yield,
    ast.YieldFrom,
    ast.Await,
    ast.With,
    ast.ClassDef,
)


@cache
def applies_weight(kind: type[nn.Module]) -> bool:
    """Whether all that forward of ``kind`` returns is its weight and bias over what depends on neither.

    It writes into nothing then, and returns memory of its own.
    """
    base = next((k for k in _BASES if issubclass(kind, k)), None)
    forward = inspect.getattr_static(kind, "forward", None)
    if base is None or not inspect.isfunction(forward) or hasattr(forward, "__wrapped__"):
        return False  # of what is wrapped, the source is that of what is inside
    if forward is base.forward or forward.__code__.co_freevars not in ((), ("__class__",)):
        return False
    function = definition(forward)
    if function is None or function.decorator_list:
        return False
    return _Forward(kind, base, function, forward.__globals__).applies_weight()


class _Forward:
    """The source of one forward."""

    def __init__(
        self, kind: type[nn.Module], base: type[nn.Module], function: ast.FunctionDef, globals_: dict[str, Any]
    ) -> None:
        self.kind, self.base, self.function = kind, base, function
        self.nodes = list(ast.walk(function))
        self.owner = function.args.args[0].arg
        self.inner = {n.name for n in self.nodes if isinstance(n, ast.FunctionDef)}
        stored = {n.id for n in self.nodes if isinstance(n, ast.Name) and not isinstance(n.ctx, ast.Load)}
        stored |= {n.arg for n in self.nodes if isinstance(n, ast.arg)} | self.inner
        self.names = {k: v for k, v in {**vars(builtins), **globals_}.items() if k not in stored}

    def applies_weight(self) -> bool:
        inside = {id(n) for f in self.nodes if isinstance(f, ast.FunctionDef) and f is not self.function
                  for n in ast.walk(f)}  # fmt: skip
        returned = [n.value for n in self.nodes if isinstance(n, ast.Return) and id(n) not in inside]
        uses = [self._applied(value) for value in returned]
        if None in uses or not isinstance(self.function.body[-1], ast.Return):
            return False
        fine = {id(node) for found in uses for node in found or ()}
        return all(self._is_harmless(node, fine) for node in self.nodes)

    def _applied(self, value: ast.expr | None) -> list[ast.AST] | None:
        """What a returned call of a convolution reads of the module, and its function; None for anything else."""
        found: list[ast.AST]
        match value:
            case ast.Call(ast.Attribute(ast.Call(ast.Name("super"), []) as above, "forward") as f, [_], []):
                return [f, above, above.func] if _next(self.kind, "forward") is self.base else None
            case ast.Call(ast.Attribute(ast.Name(self.owner) as own, "_conv_forward") as f, [_, *given], []):
                found = [f, own]
                is_torch = _next(self.kind, "_conv_forward", 0) is self.base
            case ast.Call(f, [_, *given], named) if all(k.arg not in ("weight", "bias", None) for k in named):
                found = [f]
                is_torch = self._value(f) is _BASES[self.base]
            case _:
                return None
        if not is_torch or len(given) < 2:
            return None
        owners = [self._of(node, name) for node, name in zip(given, ("weight", "bias"), strict=False)]
        return None if None in owners else [*found, *(node for node in owners if node is not None)]

    def _of(self, node: ast.AST, *names: str) -> ast.Name | None:
        """The module in ``self.name``; None where that is something else."""
        match node:
            case ast.Attribute(ast.Name(self.owner) as own, name) if name in names:
                return own
            case _:
                return None

    def _value(self, node: ast.AST) -> Any:
        """What a dotted name of a global is."""
        match node:
            case ast.Name(name):
                return self.names.get(name)
            case ast.Attribute(home, name) if inspect.ismodule(found := self._value(home)):
                return getattr(found, name, None)
            case _:
                return None

    def _is_harmless(self, node: ast.AST, fine: set[int]) -> bool:
        """Whether ``node`` neither hands on the module or its weight, nor writes; ``fine`` is what may."""
        match node:
            case ast.Attribute(inner, name) if (own := self._of(inner, "weight", "bias")) and name in _SIZES:
                fine.add(id(own))
            case ast.Attribute(ast.Name(self.owner) as own, name) if name not in ("weight", "bias"):
                if name not in _OF_MODULES and not callable(getattr(self.kind, name, None)):
                    fine.add(id(own))
            case ast.Name(name) if name in (self.owner, "super"):
                return id(node) in fine
            case ast.Call(f, _, named):
                return id(f) in fine or (self._is_known(f) and all(k.arg != "out" for k in named))
            case ast.Attribute() | ast.Subscript():
                return isinstance(node.ctx, ast.Load)
            case _:
                return not isinstance(node, _REFUSED)
        return isinstance(node.ctx, ast.Load)

    def _is_known(self, function: ast.expr) -> bool:
        """Whether a call writes nothing, and reads what it is given alone: one of torch, of Python, or a method."""
        if isinstance(function, ast.Name) and function.id in self.inner:
            return True
        value = self._value(function)
        if value is None:
            if not isinstance(function, ast.Attribute) or self._of(function, function.attr) is not None:
                return False
            return not function.attr.endswith("_")
        home = str(getattr(value, "__module__", "")).partition(".")[0]
        is_quiet = value not in _HIDING and not getattr(value, "__name__", "_").endswith("_")
        return home in ("torch", "math", "builtins", "_operator") and is_quiet


def _next(kind: type, name: str, start: int = 1) -> type:
    """The first class that ``name`` comes from; the one after ``kind`` itself by default."""
    return next(k for k in kind.__mro__[start:] if name in vars(k))

"""Convolutions with a forward of their own: whether its source says that it returns its weight and bias, applied.

Then what they are applied to may be anything: it is the same for every weight and bias of the same shape.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
from torch import nn

APPLYING = {nn.Conv1d: torch.conv1d, nn.Conv2d: torch.conv2d, nn.Conv3d: torch.conv3d}
_PURE = ("torch", "math", "builtins")
_REFUSED = (
    ast.AugAssign, ast.Delete, ast.Global, ast.Nonlocal, ast.With, ast.Yield, ast.YieldFrom, ast.Await, ast.ClassDef,
)  # fmt: skip
_OF_MODULES = {"_parameters", "_buffers", "_modules", *dir(nn.Module)}
_REACHING = {"getattr", "setattr", "delattr", "vars", "locals", "globals", "eval", "exec", "__import__"}


@cache
def applied_by(kind: type) -> type | None:
    """The class of torch whose weight and bias a forward of ``kind`` returns, applied; None where that is not sure."""
    base = next((k for k in APPLYING if issubclass(kind, k) and kind is not k), None)
    written = vars(kind).get("forward", kind.__mro__[1].__dict__.get("forward"))
    if base is None or not inspect.isfunction(written) or hasattr(written, "__wrapped__"):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(written))).body[0]
    except (OSError, TypeError, SyntaxError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or not isinstance(tree.body[-1], ast.Return):
        return None
    owner = next((k for k in kind.__mro__ if vars(k).get("forward") is written), kind)
    found = _Source(owner, base, tree, written.__globals__)
    found.visit_all(tree)
    return base if found.holds else None


class _Source(ast.NodeVisitor):
    """Goes through a forward; ``holds`` as long as the weight leaves it by a returned convolution alone."""

    def __init__(self, kind: type, base: Any, tree: ast.FunctionDef, scope: Mapping[str, Any]) -> None:
        self.kind, self.base, self.scope = kind, base, scope
        self.me = tree.args.args[0].arg
        self.own = {n.arg for n in ast.walk(tree) if isinstance(n, ast.arg)}
        self.own |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
        self.local = {n.name for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}
        self.depth, self.holds = 0, True

    def visit_all(self, tree: ast.FunctionDef) -> None:
        for statement in tree.body:
            self.visit(statement)

    def visit(self, node: ast.AST) -> None:
        self.holds = self.holds and not isinstance(node, _REFUSED)
        super().visit(node)

    def visit_FunctionDef(self, node: ast.FunctionDef) -> None:
        self.depth += 1
        self.generic_visit(node)
        self.depth -= 1

    def visit_Return(self, node: ast.Return) -> None:
        data: list[Any] | None = [node] if self.depth else self.data(node.value)
        self.holds = self.holds and data is not None
        for inner in data or ():
            self.generic_visit(inner) if inner is node else self.visit(inner)

    def data(self, call: ast.expr | None) -> list[Any] | None:
        """What a returned convolution is given beside the weight and bias; None for anything else."""
        if not isinstance(call, ast.Call) or any(k.arg in (None, "weight", "bias") for k in call.keywords):
            return None
        text, rest = ast.unparse(call.func), [k.value for k in call.keywords]
        if text == "super().forward":
            above = next(k for k in self.kind.__mro__[1:] if "forward" in vars(k))
            return [*call.args, *rest] if above is self.base and len(call.args) == 1 else None
        both = [ast.unparse(a) for a in call.args[1:3]]
        if both != [f"{self.me}.weight", f"{self.me}.bias"]:
            return None
        of_class = text == f"{self.me}._conv_forward" and inspect.getattr_static(self.kind, "_conv_forward") is (
            inspect.getattr_static(self.base, "_conv_forward")
        )
        return [call.args[0], *call.args[3:], *rest] if of_class or self.value(text) is APPLYING[self.base] else None

    def value(self, text: str) -> Any:
        """A global by its dotted name."""
        first, *path = text.split(".")
        found = None if first in self.own else self.scope.get(first, vars(builtins).get(first))
        for name in path:
            found = getattr(found, name, None) if inspect.ismodule(found) else None
        return found

    def visit_Attribute(self, node: ast.Attribute) -> None:
        text = ast.unparse(node)
        if not isinstance(node.ctx, ast.Load):
            self.holds = False
        elif text.partition(".")[0] != self.me:
            self.generic_visit(node)
        else:
            _, name, *more = text.split(".")
            if name in ("weight", "bias"):
                self.holds = self.holds and more[:1] in (["shape"], ["size"], ["dtype"], ["device"], ["ndim"])
            elif name != "training" and (name in _OF_MODULES or callable(getattr(self.kind, name, None))):
                self.holds = False

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.holds = self.holds and isinstance(node.ctx, ast.Load)
        self.generic_visit(node)

    def visit_Name(self, node: ast.Name) -> None:
        self.holds = self.holds and node.id not in (self.me, "super")

    def visit_Call(self, node: ast.Call) -> None:
        text = ast.unparse(node.func)
        name, found = text.rpartition(".")[2], self.value(text)
        of_me = isinstance(node.func, ast.Attribute) and ast.unparse(node.func.value) == self.me
        pure = text in self.local or (found is None and isinstance(node.func, ast.Attribute) and not of_me)
        pure = pure or str(getattr(found, "__module__", "")).partition(".")[0] in _PURE
        out = any(k.arg in ("out", "inplace") for k in node.keywords)
        self.holds = self.holds and pure and not out and not name.endswith("_") and name not in _REACHING
        self.generic_visit(node)

"""The source of a function, as a tree."""

from __future__ import annotations

import ast
import inspect
import textwrap
from functools import cache
from types import FunctionType


@cache
def definition(function: FunctionType) -> ast.FunctionDef | None:
    """The definition of ``function`` itself, not of what it wraps; None where there is no source of it alone."""
    try:
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(function.__code__))).body
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    return tree if isinstance(tree, ast.FunctionDef) else None


@cache
def nodes_of(tree: ast.AST) -> list[ast.AST]:
    """What is in ``tree``, an expression before those in it."""
    return [*ast.walk(tree)]

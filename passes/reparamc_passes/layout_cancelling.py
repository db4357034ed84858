"""A layout operator and its inverse cancel.

    P'(P(x))  =  x        P' P = 1

They meet once the BatchNorm between them is folded (LeViT's Linear + BatchNorm over flattened tokens). Two
permutations cancel if their composition is the identity, two reshapes if the second restores the shape that the
first was given, for every input size: sizes are compared as products of symbols. A reshape to the shape that is
there already does nothing by itself.
"""

from __future__ import annotations

from reparamc.algebra.expr import Expr, Layout, Permute, Reshape
from reparamc.algebra.rewrite import Pass


def inverse_pair(e: Expr) -> Expr | None:
    """P'(P(x)) = x, and P(x) = x for a reshape that changes nothing."""
    match e:
        case Layout(op=Permute(axes=outer), x=Layout(op=Permute(axes=inner), x=x)):
            return x if all(inner[axis] == i for i, axis in enumerate(outer)) else None
        case Layout(op=Reshape(after=after), x=Layout(op=Reshape(before=before), x=x)):
            return x if before == after else None
        case Layout(op=Reshape(before=before, after=after), x=x):
            return x if before == after else None
        case _:
            return None


LAYOUT_CANCELLING = Pass(
    name="layout-cancelling",
    equation="P'(P(x)) = x",
    exact_when="P' P = 1: the permutations compose to the identity, or the shape comes back, for every input size",
    rules=(inverse_pair,),
)

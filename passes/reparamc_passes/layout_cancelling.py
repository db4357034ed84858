"""Two layout operators of one kind are one, or cancel.

    P'(P(x))  =  x             where P' P = 1
    P'(P(x))  =  (P' P)(x)

They meet once the BatchNorm between them is folded (LeViT's Linear + BatchNorm over flattened tokens). Two
permutations cancel if their composition is the identity, two reshapes if the second restores the shape that the first
was given, for every input size: sizes are compared as products of symbols. A reshape to the shape of its operand does
nothing. Channels that become positions and then channels again are unchanged. Two reshapes become one if at most one
size is left open until run time, besides those that stay in their place.
"""

from __future__ import annotations

from reparamc.algebra.expr import Expr, Layout, Permute, Reshape, Spread
from reparamc.algebra.records import replace
from reparamc.algebra.rewrite import Pass
from reparamc.algebra.shape import sizes_after


def inverse_pair(e: Layout) -> Expr | None:
    """P'(P(x)) = x, and P(x) = x for a reshape that changes nothing."""
    match e:
        case Layout(op=Permute(axes=outer), x=Layout(op=Permute(axes=inner), x=x)):
            return x if all(inner[axis] == i for i, axis in enumerate(outer)) else None
        case Layout(op=Reshape(after=after), x=Layout(op=Reshape(before=before), x=x)):
            return x if before == after else None
        case Layout(op=Reshape(before=before, after=after), x=x):
            return x if before == after else None
        case Layout(op=Spread(back=True) as outer, x=Layout(op=Spread() as inner, x=x)):
            return x if inner == replace(outer, back=False) else None
        case _:
            return None


def in_a_row(e: Layout) -> Expr | None:
    """P'(P(x)) = (P' P)(x): two permutations are one, and two reshapes."""
    match e:
        case Layout(op=Permute(axes=outer), x=Layout(op=Permute(axes=inner), x=x) as below):
            return Layout(x, Permute(tuple(inner[axis] for axis in outer)), below.axis_in)
        case Layout(op=Reshape(after=after), x=Layout(op=Reshape(before=before), x=x) as below):
            moved = Layout(x, Reshape(before, after), below.axis_in)
            return moved if sizes_after(before, after) is not None else None
        case _:
            return None


LAYOUT_CANCELLING = Pass(
    name="layout-cancelling",
    equation="P'(P(x)) = x;  P'(P(x)) = (P' P)(x)",
    exact_when="always; nothing where P' P = 1: the identity, or a shape that comes back for every input size",
    rules=(inverse_pair, in_a_row),
)

"""Intervals that tensors never leave: where an activation gives what it is given."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import NamedTuple

ANY = (-inf, inf)
SIGNED = (0.0, inf)
"""What is never below zero."""


class Bound(NamedTuple):
    """What the definition of an operator says of the sizes of its results.

    Attributes:
        gives: they are in this interval.
        same_in: where an element of the first operand is in this interval, it stays.
        chosen: each is an element of one of these.
        signed: none is below zero if no element of these is.
    """

    gives: tuple[float, float] = ANY
    same_in: tuple[float, float] | None = None
    chosen: Sequence[str] = ()
    signed: Sequence[str] = ()


def clamp(low: float, high: float) -> Bound:
    return Bound((low, high), (low, high)) if low <= high else Bound()


_SIGNED = {"abs", "exp", "hardsigmoid", "sigmoid", "softmax", "softplus"}
_SAME_IF_SIGNED = {"celu", "elu", "leakyrelu", "prelu"}
_CHOOSING = {
    "adaptivemaxpool", "amax", "chunk", "clone", "contiguous", "expand", "flatten", "gather", "getitem",
    "globalmaxpool", "identity", "maxpool", "permute", "reshape", "slice", "split", "squeeze", "tile", "transpose",
    "unflatten", "unsqueeze", "view",
}  # fmt: skip
"""Those that give elements of their first operand and no others."""
_AVERAGING = {"adaptiveavgpool", "averagepool", "globalaveragepool", "mean", "reducemean"}
"""None below zero if no element of their first operand is."""


def bound_of(kind: str, operands: Sequence[str]) -> Bound:
    """What the name of an operator tells, where its attributes do not matter."""
    kind = re.sub(r"_|\d+d$", "", kind.lower())
    if kind == "relu":
        return clamp(0.0, inf)
    if kind == "relu6":
        return clamp(0.0, 6.0)
    if kind in _SIGNED:
        return Bound(SIGNED)
    if kind in _SAME_IF_SIGNED:
        return Bound(same_in=SIGNED)
    if kind in ("cat", "concat"):
        return Bound(chosen=operands)
    if kind in _CHOOSING:
        return Bound(chosen=operands[:1])
    return Bound(signed=operands[:1] if kind in _AVERAGING else ())


def unchanged(
    order: Iterable[str], bound: Callable[[str], Bound], operands: Callable[[str], Sequence[str]]
) -> dict[str, str]:
    """The tensors that are equal to the first operand of their operator, with that."""
    found: dict[str, tuple[float, float]] = {}
    equal: dict[str, str] = {}

    def of(name: str) -> tuple[float, float]:
        return found.get(name, ANY)

    for name in order:
        says = bound(name)
        if says.same_in is not None:
            x = operands(name)[0]
            if says.same_in[0] <= of(x)[0] and of(x)[1] <= says.same_in[1]:
                equal[name], found[name] = x, of(x)
                continue
        if says.chosen:
            found[name] = min(of(n)[0] for n in says.chosen), max(of(n)[1] for n in says.chosen)
        elif says.signed and all(of(n)[0] >= 0 for n in says.signed):
            found[name] = SIGNED
        elif says.gives != ANY:
            found[name] = says.gives
    return equal

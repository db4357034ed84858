"""Symbolic tensor shapes: each size is a product of an integer and named unknowns.

Layout operators permute and regroup axes; whether one axis survives whole is a question about
products of sizes, so products are all the arithmetic needed here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from math import prod

from reparamc.algebra.records import record


@record
class Dim:
    """The size ``factor * symbols[0] * symbols[1] * ...``; symbols are sorted, repeats allowed."""

    factor: int = 1
    symbols: tuple[str, ...] = ()

    @staticmethod
    def of(value: int | str | Dim) -> Dim:
        if isinstance(value, Dim):
            return value
        return Dim(1, (value,)) if isinstance(value, str) else Dim(int(value))

    @property
    def known(self) -> int | None:
        """The size, when it does not depend on a symbol."""
        return None if self.symbols else self.factor

    def __mul__(self, other: Dim) -> Dim:
        return Dim(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def divided_by(self, other: Dim) -> Dim | None:
        """The exact quotient, or None when it is not a product of the same kind."""
        rest = Counter(self.symbols)
        rest.subtract(other.symbols)
        if other.factor == 0 or self.factor % other.factor or any(n < 0 for n in rest.values()):
            return None
        return Dim(self.factor // other.factor, tuple(sorted(rest.elements())))

    def at(self, sizes: Mapping[str, int]) -> int:
        return self.factor * prod(sizes[s] for s in self.symbols)

    def __str__(self) -> str:
        parts = ([str(self.factor)] if self.factor != 1 or not self.symbols else []) + list(self.symbols)
        return "*".join(parts)


Shape = tuple[Dim, ...]


def shape_of(sizes: Sequence[int | str | Dim]) -> Shape:
    return tuple(Dim.of(e) for e in sizes)


def size(dims: Sequence[Dim]) -> Dim:
    total = Dim()
    for dim in dims:
        total = total * dim
    return total


def sizes_after(before: Shape, after: Shape) -> list[int] | None:
    """The sizes of ``after`` as ONNX writes them: 0 keeps that of the same place, and one may be -1, what is left.

    None where that is too little, because several sizes are open until run time.
    """
    sizes: list[int] = []
    for at, dim in enumerate(after):
        kept = at < len(before) and before[at] == dim
        sizes.append(dim.known if dim.known is not None else 0 if kept else -1)
    told = sizes.count(-1) <= 1 and all(dim != Dim(0) for dim in after)
    return sizes if told else None


def axis_through_reshape(before: Shape, after: Shape, axis: int) -> int | None:
    """Where ``axis`` of ``before`` is in ``after``, or None when the reshape splits or merges it.

    Row-major order keeps an axis whole exactly when its size and the product of the sizes to its
    left are found again. Sizes of one are skipped over: they may be added or dropped anywhere.
    """
    left = Dim()
    for candidate, dim in enumerate(after):
        if left == size(before[:axis]) and dim == before[axis]:
            return candidate
        left = left * dim
    return None

"""Layouts: how the axes of a result are made of the axes of a base.

Reshapes, transposes and means only move elements. What they make of an index is written as digits, as of a number in a
mixed radix, so that layouts which move elements alike are equal, for all spellings of the operators. Sizes are
products of a number and of unknowns, because a reshape needs to know products and quotients only.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import NamedTuple


class Unrepresentable(Exception):
    """An operator leaves the algebra; the message says why."""


# Sizes


class Dim(NamedTuple):
    """The product of a number and of unknowns, sorted by name."""

    factor: int = 1
    symbols: tuple[str, ...] = ()

    @property
    def known(self) -> int | None:
        return None if self.symbols else self.factor

    def times(self, other: Dim) -> Dim:
        return Dim(self.factor * other.factor, tuple(sorted(self.symbols + other.symbols)))

    def over(self, other: Dim) -> Dim | None:
        """The exact quotient; None when there is none."""
        symbols = list(self.symbols)
        for symbol in other.symbols:
            if symbol not in symbols:
                return None
            symbols.remove(symbol)
        if not other.factor or self.factor % other.factor:
            return None
        return Dim(self.factor // other.factor, tuple(symbols))


UNIT = Dim()


# Layouts


class Digit(NamedTuple):
    """``index // inner % size``, where ``index`` runs along one axis of the base."""

    axis: int
    inner: Dim
    dim: Dim


View = tuple[tuple[Digit, ...], ...]
"""For every axis of a result the digits that its index is made of, the most significant first. The elements of a base
that differ only in digits which occur nowhere are averaged."""


def identity_view(base: Sequence[Dim]) -> View:
    """The layout of a base itself."""
    return _identity_view(tuple(base))


@lru_cache(maxsize=1024)
def _identity_view(base: tuple[Dim, ...]) -> View:
    return tuple(() if e == UNIT else (Digit(i, UNIT, e),) for i, e in enumerate(base))


def shape_of(view: Sequence[Sequence[Digit]]) -> tuple[Dim, ...]:
    found = []
    for digits in view:
        total = UNIT
        for digit in digits:
            total = total.times(digit.dim)
        found.append(total)
    return tuple(found)


def joined(digits: Iterable[Digit]) -> tuple[Digit, ...]:
    """``digits`` with neighbours that continue one another made one, and those of size 1 left out."""
    done: list[Digit] = []
    for digit in digits:
        if digit.dim == UNIT:
            continue
        if done and done[-1].axis == digit.axis and done[-1].inner == digit.inner.times(digit.dim):
            digit = Digit(digit.axis, digit.inner, digit.dim.times(done.pop().dim))
        done.append(digit)
    return tuple(done)


def _split(digits: Sequence[Digit], inner: Dim) -> tuple[list[Digit], list[Digit]]:
    """``digits`` in two parts; the second has the size ``inner``."""
    first, second = list(digits), []
    while inner != UNIT:
        if not first:
            raise Unrepresentable("a reshape asks for more elements than there are")
        digit = first.pop()
        rest = inner.over(digit.dim)
        if rest is not None:
            second.insert(0, digit)
            inner = rest
            continue
        upper = digit.dim.over(inner)
        if upper is None:
            raise Unrepresentable("a reshape cuts across the sizes")
        second.insert(0, Digit(digit.axis, digit.inner, inner))
        first.append(Digit(digit.axis, digit.inner.times(inner), upper))
        break
    return first, second


def reshaped(view: View, target: Sequence[Dim | None]) -> View:
    """``view`` with its elements regrouped to ``target``; one size may be None, for what is left."""
    digits = [d for axis in view for d in axis]
    after: list[tuple[Digit, ...]] = []
    target = list(target)
    while target and target[-1] is not None:
        dim = target.pop()
        assert dim is not None
        digits, taken = _split(digits, dim)
        after.insert(0, joined(taken))
    before: list[tuple[Digit, ...]] = []
    if target:
        for dim in target[:-1]:
            if dim is None:
                raise Unrepresentable("a reshape has two unknown sizes")
            total = UNIT
            for digit in digits:
                total = total.times(digit.dim)
            rest = total.over(dim)
            if rest is None:
                raise Unrepresentable("a reshape cuts across the sizes")
            taken, digits = _split(digits, rest)
            before.append(joined(taken))
        before.append(joined(digits))
    elif digits:
        raise Unrepresentable("a reshape asks for fewer elements than there are")
    return (*before, *after)


def composed(inner: View, outer: View) -> View:
    """The view that takes ``inner``, and of its result ``outer``."""
    found = []
    for digits in outer:
        parts: list[Digit] = []
        for digit in digits:
            upper, _ = _split(inner[digit.axis], digit.inner)
            parts += _split(upper, digit.dim)[1]
        found.append(joined(parts))
    return tuple(found)

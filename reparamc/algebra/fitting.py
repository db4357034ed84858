"""Sizes that fit an expression: what its operators demand of the symbols in the shapes of its sources.

Symbols that name one size, because values are added or reshaped, become one. The size of a strided map, or of a
concatenation, is a symbol of its own that is computed from others.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from fractions import Fraction
from math import gcd, prod

from reparamc.algebra.expr import (
    BatchNorm,
    Concat,
    Conv,
    Expr,
    Layout,
    Mean,
    Permute,
    Reshape,
    Resize,
    Scale,
    Select,
    Source,
    Spread,
    Sum,
    Take,
)
from reparamc.algebra.resample import resized_size
from reparamc.algebra.shape import Dim, Shape, size


class Sizes:
    """What the symbols in an expression stand for, as its operators demand.

    Attributes:
        least: the smallest size of a symbol, from the positions that are taken of it.
    """

    def __init__(self, order: Sequence[Expr], fixed: Mapping[str, int]) -> None:
        self._is: dict[str, Dim] = {symbol: Dim(n) for symbol, n in fixed.items()}
        self._made: dict[str, tuple[Callable[[Sequence[int]], int], tuple[Dim, ...]]] = {}
        self.least: Counter[str] = Counter()
        shapes: dict[Expr, Shape | None] = {}
        for e in order:
            shapes[e] = self._shape(e, [shapes[c] for c in e.children])

    def bind(self, symbols: Sequence[str], free: Callable[[str, int], int]) -> dict[str, int]:
        """The sizes of ``symbols``; ``free`` gives that of one that nothing fixes, from its name and its number."""
        found: dict[str, int] = {}

        def at(dim: Dim) -> int:
            return dim.factor * prod(value(s) for s in dim.symbols)

        def value(symbol: str) -> int:
            if symbol not in found:
                if symbol in self._is:
                    found[symbol] = at(self._is[symbol])
                elif symbol in self._made:
                    function, dims = self._made[symbol]
                    found[symbol] = function([at(dim) for dim in dims])
                else:
                    found[symbol] = max(free(symbol, len(found)), self.least[symbol])
            return found[symbol]

        for symbol in symbols:
            value(symbol)
        return found

    def _shape(self, e: Expr, inner: Sequence[Shape | None]) -> Shape | None:
        """The shape of ``e`` over operands of these shapes; None where it is unknown."""
        if isinstance(e, Source):
            return e.shape
        known = [shape for shape in inner if shape is not None]
        x = known[0] if len(known) == len(inner) else None
        if isinstance(e, Sum):
            for other in known[1:]:
                self._agree(known[0], other)
            return known[0] if known else None
        if x is None or isinstance(e, Scale | BatchNorm):
            return e.op.after if isinstance(e, Layout) and isinstance(e.op, Reshape) else x
        return self._moved(e, x) if isinstance(e, Layout) else self._computed(e, x, known)

    def _computed(self, e: Expr, x: Shape, inner: Sequence[Shape]) -> Shape | None:
        shape = list(x)
        match e:
            case Select() if -e.axis <= len(x):
                dim = self._now(x[e.axis])
                if len(dim.symbols) == 1:
                    self.least[dim.symbols[0]] = max(self.least[dim.symbols[0]], -(-e.width // dim.factor))
                shape[e.axis] = Dim(len(e.index))
            case Concat() if -e.axis <= len(x):
                alike = [s for s in inner if len(s) == len(x)]
                shape[e.axis] = self._sum([s[e.axis] for s in alike])
                for other in alike:
                    self._agree(*([*s[: e.axis], *s[len(x) + e.axis + 1 :]] for s in (x, other)))
            case Conv() if -e.axis <= len(x):
                shape[e.axis] = Dim(e.out_channels)
                for axis in range(e.spatial):
                    shape[axis - e.spatial] = self._strided(e, axis, x[axis - e.spatial])
            case _:
                return None
        return tuple(shape)

    def _moved(self, e: Layout, x: Shape) -> Shape:
        match e.op:
            case Permute(axes=axes):
                return tuple(x[a] for a in axes)
            case Mean(axes=axes, keep=keep):
                return tuple(Dim() if a in axes else dim for a, dim in enumerate(x) if keep or a not in axes)
            case Take(axis=axis):
                return tuple(dim for a, dim in enumerate(x) if a != axis % len(x))
            case Spread(block=b, back=True):
                return (*x[:-3], x[-3] * Dim(b * b), *(self._divided(dim, b) for dim in x[-2:]))
            case Spread(block=b):
                return (*x[:-3], x[-3].divided_by(Dim(b * b)) or x[-3], x[-2] * Dim(b), x[-1] * Dim(b))
            case Resize():
                scales = dict(zip(e.op.axes, e.op.scales, strict=True))
                return tuple(self._resized(dim, scales.get(a, Fraction(1))) for a, dim in enumerate(x))
            case _:
                self._agree(x, e.op.before)
                self._unify(size(e.op.before), size(e.op.after))
                return e.op.after

    def _sum(self, dims: Sequence[Dim]) -> Dim:
        numbers = [dim.known for dim in dims]
        known = [n for n in numbers if n is not None]
        return Dim(sum(known)) if len(known) == len(dims) else self._make(("sum",), sum, dims)

    def _divided(self, dim: Dim, by: int) -> Dim:
        """``dim``, a multiple of ``by``, divided by that."""
        part = dim.divided_by(Dim(by)) or Dim(1, (f"({dim})/{by}",))
        self._unify(dim, part * Dim(by))
        return part

    def _strided(self, e: Conv, axis: int, dim: Dim) -> Dim:
        stride, delta = e.stride[axis], e.delta[axis]
        if stride == 1 and delta == 0:
            return dim
        return self._make(("strided", stride, delta, e.transposed), lambda sizes: e.size_after(axis, sizes[0]), [dim])

    def _resized(self, dim: Dim, scale: Fraction) -> Dim:
        if scale.denominator == 1:
            return dim * Dim(scale.numerator)
        if dim.known is not None:
            return Dim(resized_size(dim.known, scale))
        return self._make(("resized", scale), lambda sizes: resized_size(sizes[0], scale), [dim])

    def _make(self, key: tuple[object, ...], function: Callable[[Sequence[int]], int], dims: Sequence[Dim]) -> Dim:
        """A size that is ``function`` of others; one symbol for all of one ``key`` and equal ``dims``."""
        now = tuple(self._now(dim) for dim in dims)
        symbol = f"{key}({', '.join(map(str, now))})"
        self._made[symbol] = function, now
        return Dim(1, (symbol,))

    def _agree(self, a: Sequence[Dim], b: Sequence[Dim]) -> None:
        if len(a) == len(b):
            for x, y in zip(a, b, strict=True):
                self._unify(x, y)

    def _now(self, dim: Dim) -> Dim:
        """``dim`` in symbols that nothing fixes so far."""
        while any(s in self._is for s in dim.symbols):
            dim = size([Dim(dim.factor), *(self._is.get(s, Dim(1, (s,))) for s in dim.symbols)])
        return dim

    def _unify(self, a: Dim, b: Dim) -> None:
        """Make two sizes equal by solving for a symbol of one of them; what cannot be solved is left as it is."""
        a, b = self._now(a), self._now(b)
        common = gcd(a.factor, b.factor) or 1
        left, right = Counter(a.symbols), Counter(b.symbols)
        a = Dim(a.factor // common, tuple((left - right).elements()))
        b = Dim(b.factor // common, tuple((right - left).elements()))
        for one, other in ((a, b), (b, a)):
            free = [s for s in one.symbols if s not in self._made and not self._reads(other, s)]
            if len(one.symbols) == 1 and one.factor == 1 and free:
                self._set(free[0], other)
                return
        symbols = [s for s in a.symbols if s not in self._made], [s for s in b.symbols if s not in self._made]
        if len(a.symbols) == len(b.symbols) == len(symbols[0]) == len(symbols[1]) == 1:  # 2 a = 3 b: a = 3 b', b = 2 b'
            part = Dim(1, (f"{symbols[1][0]}/{a.factor}",))
            self._set(symbols[0][0], Dim(b.factor) * part)
            self._set(symbols[1][0], Dim(a.factor) * part)

    def _set(self, symbol: str, dim: Dim) -> None:
        self._is[symbol] = dim
        if symbol in self.least and len(dim.symbols) == 1:
            (other,) = dim.symbols
            self.least[other] = max(self.least[other], -(-self.least[symbol] // dim.factor))

    def _reads(self, dim: Dim, symbol: str) -> bool:
        """Whether ``dim`` is computed from ``symbol``."""
        parts = [part for s in dim.symbols if s in self._made for part in self._made[s][1]]
        return symbol in self._now(dim).symbols or any(self._reads(self._now(part), symbol) for part in parts)

"""Affine expressions: the tiny language in which every rewrite is written.

An expression is an immutable graph of a few kinds of node over arrays of float64, of any library (`arrays`).
It knows neither torch nor ONNX. Nodes are compared by identity, so "the same object" means "the same value".

A value's *channel axis* is counted from the right, as NumPy does: -3 for images [N, C, H, W], -1 for
tokens [N, L, C]. That makes batched and unbatched values one case, and keeps axes apart whose sizes
agree by chance.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import field
from math import prod
from operator import is_
from typing import TYPE_CHECKING, TypeAlias

import numpy as np

from reparamc.algebra.arrays import Array, Parameter, always, is_all
from reparamc.algebra.records import entity, lazy, record, replace
from reparamc.algebra.shape import Shape, axis_through_reshape, sizes_after

if TYPE_CHECKING:
    from fractions import Fraction

Ints: TypeAlias = tuple[int, ...]

ONE, ZERO = np.ones(()), np.zeros(())
EQUAL = 2.0**-48
"""Relative difference up to which the taps of an average count as equal: what a product of two averages rounds."""


@entity
class Source:
    """A value computed outside the expression.

    ``channels`` and ``axis`` are None when the host graph does not tell; ``shape`` is needed only
    where layout operators are to be evaluated.

    ``taps``: its channels are what an operator of the host graph multiplies by its weight at each position. They
    exist only inside that operator, so that nothing but a pointwise convolution can read them.
    """

    key: Hashable
    channels: int | None = None
    axis: int | None = None
    shape: Shape | None = None
    taps: bool = False

    @property
    def children(self) -> tuple[Expr, ...]:
        return ()


@entity
class Conv:
    """``y[o, p] = bias[o] + sum over i in group(o), taps t: weight[o, i, t] * x[i, stride*p + offset + dilation*t]``

    with x zero outside its size. ``weight`` is (out, in / groups, *kernel); ``bias`` is (out,) or
    None. The other tuples hold one number per axis of the kernel, of which there are ``spatial``:
    none for a linear layer. ``offset`` is where the first tap lands (-1 for a leading padding of 1), and
    ``delta`` is how much the size shrinks: ``out = floor((size - 1 - delta) / stride) + 1``.

    A ``transposed`` convolution writes where the other reads: ``weight[o, i, t] * x[i, p]`` is added to
    ``y[o, stride*p + offset + dilation*t]``, and ``out = stride * (size - 1) + 1 + delta``.
    """

    x: Expr
    weight: Array
    bias: Array | None
    stride: Ints = ()
    dilation: Ints = ()
    offset: Ints = ()
    delta: Ints = ()
    groups: int = 1
    transposed: bool = False

    @staticmethod
    def padded(
        x: Expr,
        weight: Array,
        bias: Array | None,
        stride: Ints,
        dilation: Ints,
        begin: Ints,
        end: Ints,
        groups: int = 1,
    ) -> Conv:
        """The convolution that reads ``begin`` zeros before and ``end`` zeros after the size, per axis."""
        kernel = weight.shape[2:]
        delta = tuple(d * (k - 1) - b - e for d, k, b, e in zip(dilation, kernel, begin, end, strict=True))
        return Conv(x, weight, bias, stride, dilation, tuple(-b for b in begin), delta, groups)

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)

    @property
    def kernel(self) -> Ints:
        return tuple(self.weight.shape[2:])

    @property
    def spatial(self) -> int:
        """The number of axes that the kernel moves along."""
        return self.weight.ndim - 2

    @property
    def axis(self) -> int:
        return -1 - self.spatial

    @property
    def out_channels(self) -> int:
        return self.weight.shape[0]

    @property
    def in_channels(self) -> int:
        return self.weight.shape[1] * self.groups

    @lazy
    def reach(self) -> Ints:
        """Offset of the last tap, per axis."""
        return tuple(a + d * (k - 1) for a, d, k in zip(self.offset, self.dilation, self.kernel, strict=True))

    @lazy
    def padding(self) -> tuple[Ints, Ints]:
        """Zeros read before and after the size, per axis (negative: values skipped).

        Of a transposed convolution: results dropped (negative: zeros added).
        """
        return tuple(-a for a in self.offset), tuple(r - d for r, d in zip(self.reach, self.delta, strict=True))

    @property
    def skips_border(self) -> bool:
        """Whether some padding is negative where no operator of a host graph can say so.

        A transposed convolution may add zeros after, fewer than its stride or dilation (output padding).
        """
        begin, end = self.padding
        if not self.transposed:
            return any(p < 0 for p in (*begin, *end))
        most = [max(s, d) for s, d in zip(self.stride, self.dilation, strict=True)]
        return any(b < 0 for b in begin) or any(-e >= m for e, m in zip(end, most, strict=True))

    @property
    def reads_padding(self) -> bool:
        """Whether a constant added to ``x`` changes the result by different amounts in different places."""
        return self.transposed or any(p > 0 for side in self.padding for p in side)

    @property
    def is_pointwise(self) -> bool:
        """One tap at offset 0, stride one, the size kept: nothing but a matrix of channels."""
        return self.keeps_grid and not any(self.offset) and all(k == 1 for k in self.kernel)

    @property
    def reads_taps(self) -> bool:
        """Whether it is the weight of an operator of the host graph; see `Source`."""
        return isinstance(self.x, Source) and self.x.taps

    @property
    def is_per_channel(self) -> bool:
        """Whether it has one group for each channel, and gives as many as it reads."""
        return self.groups == self.in_channels == self.out_channels

    @property
    def is_weightless(self) -> bool:
        """Whether it averages windows of each channel: a pooling, or for one tap a padding, a crop, a stride.

        Host graphs have operators for these that hold no weights. An identity is not one of them.
        """
        if self.transposed or self.bias is not None or not self.is_per_channel or self.is_pointwise or self.reads_taps:
            return False
        return always(_is_average, self.weight)

    @property
    def keeps_grid(self) -> bool:
        """Stride one and equal sizes for every input size: an identity may be beside it."""
        return all(s == 1 for s in self.stride) and not any(self.delta)

    def size_after(self, axis: int, size: int) -> int:
        """The size of the result along an axis of the kernel, where the operand has this one; below 1 if none fits."""
        stride, delta = self.stride[axis], self.delta[axis]
        return stride * (size - 1) + 1 + delta if self.transposed else (size - 1 - delta) // stride + 1

    @property
    def bias_or_zero(self) -> Array:
        return np.zeros(self.out_channels) if self.bias is None else self.bias


def _is_average(taps: Array) -> bool:
    share = 1 / prod(taps.shape[2:])
    first = taps[(0,) * taps.ndim]
    return abs(first - share) <= EQUAL * share and bool(np.all(np.abs(taps - share) <= EQUAL * share))


@entity
class Scale:
    """``y = scale * x + shift`` per channel: each is (channels,), or () for the same in every channel.

    ``axis`` is None for a `is_scalar` scale, which needs no channel axis.
    """

    x: Expr
    scale: Array
    shift: Array
    axis: int | None = None

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)

    @property
    def is_scalar(self) -> bool:
        """Whether one factor and one shift apply to all elements, so that it commutes with every layout."""
        return self.axis is None


@entity
class BatchNorm:
    """``y = (x - mean) / sqrt(var + eps) * gamma + beta`` per channel; all arrays are (channels,)."""

    x: Expr
    gamma: Array
    beta: Array
    mean: Array
    var: Array
    eps: float
    axis: int

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@entity
class Sum:
    """``y = terms[0] + terms[1] + ...``; at least two terms."""

    terms: tuple[Expr, ...]

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.terms


@entity
class Concat:
    """The channels of all terms, one after the other; ``sizes`` says how many each has."""

    terms: tuple[Expr, ...]
    sizes: Ints
    axis: int

    @property
    def children(self) -> tuple[Expr, ...]:
        return self.terms


@entity
class Select:
    """``y[o] = x[index[o]]``: some of the ``width`` channels of x, in any order (a slice, a shuffle)."""

    x: Expr
    index: Ints
    width: int
    axis: int

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


@record
class Permute:
    """Axes in a new order; ``axes`` is a permutation of ``range(rank)``."""

    axes: Ints


@record
class Reshape:
    """The same elements, in row-major order, under another shape.

    ``native`` names the operator of the host graph that reshapes just so. It serves where the shapes leave a size to
    run time, and tells nothing that the shapes do not. Along the axes ``free`` of the result the host can make it for
    any other size as well.
    """

    before: Shape
    after: Shape
    native: Hashable = field(default=None, compare=False)
    free: frozenset[int] = field(default=frozenset(), compare=False)

    def takes_any(self, axis: int) -> bool:
        """Whether it can be made where ``axis`` of the result, counted from the right, has another size."""
        return sizes_after(self.before, self.after) is not None or axis + len(self.after) in self.free


@record
class Mean:
    """The mean over some of ``rank`` axes, the channel axis not among them; kept with size one, or dropped."""

    rank: int
    axes: Ints
    keep: bool = False


@record
class Take:
    """The position ``at`` along one of ``rank`` axes, counted from the left, which goes."""

    rank: int
    axis: int
    at: int


@record
class Resize:
    """The last axes of ``rank`` made larger or smaller, one by each of ``scales``; see `reparamc.algebra.resample`.

    Every result is a sum of positions with weights that sum to 1, the same ones in each channel. ``native`` as for a
    `Reshape`.
    """

    rank: int
    scales: tuple[Fraction, ...]
    mode: str
    place: str = "half_pixel"
    rounding: str = "floor"
    cubic: float = -0.75
    native: Hashable = field(default=None, compare=False)

    @property
    def axes(self) -> Ints:
        return tuple(range(self.rank - len(self.scales), self.rank))

    @property
    def growth(self) -> Fraction | int:
        """By how much the number of positions grows."""
        return prod(self.scales)


@record
class Spread:
    """Channels as positions (pixel shuffle): ``block * block`` channels become one, ``block`` times as high and wide.

    The channels are the third axis from the right. Those of one position lie side by side, or as far apart as there
    are positions of a block (``outer``). ``back``: positions as channels, of a map whose height and width are multiples
    of ``block``. ``native`` as for a `Reshape`.
    """

    rank: int
    block: int
    outer: bool = False
    back: bool = False
    native: Hashable = field(default=None, compare=False)


LayoutOp: TypeAlias = Permute | Reshape | Mean | Take | Resize | Spread


def ranks(op: LayoutOp) -> tuple[int, int]:
    """The rank of what ``op`` moves, and of its result."""
    match op:
        case Permute():
            return len(op.axes), len(op.axes)
        case Reshape():
            return len(op.before), len(op.after)
        case Mean():
            return op.rank, op.rank - (0 if op.keep else len(op.axes))
        case Take():
            return op.rank, op.rank - 1
        case Resize() | Spread():
            return op.rank, op.rank


def axis_through(op: LayoutOp, axis: int) -> int | None:
    """Where ``axis`` is after ``op``, both counted from the left; None where it does not stay whole."""
    match op:
        case Permute():
            return op.axes.index(axis)
        case Reshape():
            return axis_through_reshape(op.before, op.after, axis)
        case Mean():
            return None if axis in op.axes else axis - (0 if op.keep else sum(a < axis for a in op.axes))
        case Take():
            return None if axis == op.axis else axis - (op.axis < axis)
        case Resize():
            return None if axis in op.axes else axis
        case Spread():
            return None if axis >= op.rank - 3 else axis


@entity
class Layout:
    """Elements moved, taken, averaged or resized within their channel: axis ``axis_in`` becomes ``axis``.

    It commutes with everything that is done to each channel separately. If it `splits_channels`, only a scalar
    commutes with it.
    """

    x: Expr
    op: LayoutOp
    axis_in: int | None

    @lazy
    def axis(self) -> int | None:
        if self.axis_in is None:
            return None
        rank, rank_out = ranks(self.op)
        found = axis_through(self.op, rank + self.axis_in)
        return None if found is None else found - rank_out

    @property
    def splits_channels(self) -> bool:
        """Whether no axis of the result holds the channels: they are split or merged here (into heads), or before."""
        return self.axis is None

    @property
    def children(self) -> tuple[Expr, ...]:
        return (self.x,)


Expr: TypeAlias = Source | Conv | Scale | BatchNorm | Sum | Concat | Select | Layout


def acts_on(e: Scale | BatchNorm, axis: int | None) -> bool:
    """Whether ``e`` has a factor for each position of ``axis``, or one for all elements."""
    return e.axis in (None, axis)


def rebuild(e: Expr, children: Sequence[Expr]) -> Expr:
    """The same operator over other operands; the same object when the operands are the same."""
    held = e.children
    if len(held) == 1:
        if held[0] is children[0]:
            return e
    elif all(map(is_, held, children)):
        return e
    if isinstance(e, Sum | Concat):
        return replace(e, terms=tuple(children))
    return replace(e, x=children[0])


def walk(root: Expr, stop: Callable[[Expr], bool] | None = None) -> Iterator[Expr]:
    """Each node once, operands first; nodes for which ``stop`` holds are yielded, not entered."""
    if stop is not None:
        return iter(_ordered(root, stop))
    found: tuple[Expr, ...] | None = vars(root).get(_BELOW)
    if found is None:
        found = _below(root)
        if len(found) <= _MOST_KEPT:
            vars(root)[_BELOW] = found
    return iter((*found, root))


_BELOW, _MOST_KEPT = "_below", 64
"""Where a node that is walked over keeps what is below it, and how much: all of a chain would be quadratic."""


def _below(root: Expr) -> tuple[Expr, ...]:
    parts: list[Expr] = []
    for e in root.children:
        if e.children:
            if (below := vars(e).get(_BELOW)) is None:
                return tuple(_ordered(root)[:-1])
            parts += below
        parts.append(e)
    return tuple(parts if len(parts) < 2 else dict.fromkeys(parts))


def _ordered(root: Expr, stop: Callable[[Expr], bool] | None = None) -> list[Expr]:
    order: list[Expr] = []
    seen: set[Expr] = set()
    stack: list[tuple[Expr, bool]] = [(root, False)]
    while stack:
        e, entered = stack.pop()
        if entered:
            order.append(e)
        elif e not in seen:
            seen.add(e)
            stack.append((e, True))
            if stop is None or not stop(e):
                stack += [(c, False) for c in reversed(e.children) if c not in seen]
    return order


def flatten(root: Expr) -> Expr:
    """``((a + b) + c)`` as ``a + b + c``, wherever the inner sum has no other user."""
    order = list(walk(root))
    if not any(isinstance(t, Sum) for e in order if isinstance(e, Sum) for t in e.terms):
        return root
    users = Counter(c for e in order for c in e.children)
    inner = {t for e in order if isinstance(e, Sum) for t in e.terms if isinstance(t, Sum) and users[t] == 1}
    done: dict[Expr, Expr] = {}
    for e in order:
        if e in inner:
            continue
        if isinstance(e, Sum) and inner.intersection(e.terms):
            addends: list[Expr] = []
            stack: list[Expr] = [e]
            while stack:
                term = stack.pop()
                if term is e or term in inner:
                    stack.extend(reversed(term.children))
                else:
                    addends.append(done[term])
            done[e] = Sum(tuple(addends))
        else:
            done[e] = rebuild(e, [done[c] for c in e.children])
    return done[root]


def replaced(roots: Sequence[Expr], old: Expr, new: Expr) -> dict[Expr, Expr]:
    """What every node under ``roots`` becomes when ``new`` replaces ``old``."""
    found: dict[Expr, Expr] = {old: new}
    for root in roots:
        for e in walk(root, stop=found.__contains__):
            if e not in found:
                found[e] = rebuild(e, [found[c] for c in e.children])
    return found


def total(addends: Sequence[Expr]) -> Expr:
    """The sum of one or more addends."""
    return addends[0] if len(addends) == 1 else Sum(tuple(addends))


def is_negation(e: Expr) -> bool:
    """Whether ``e`` is ``-x``. Sums subtract, so that it needs no operator of its own there."""
    return isinstance(e, Scale) and not e.scale.ndim and is_all(e.scale, -1) and is_all(e.shift, 0)


_HELD: dict[type, tuple[str, ...]] = {
    Conv: ("weight", "bias"),
    Scale: ("scale", "shift"),
    BatchNorm: ("gamma", "beta", "mean", "var"),
}


def array_fields(e: Expr) -> dict[str, Array]:
    """The parameters that ``e`` itself holds, by the names of its fields."""
    return {name: a for name in _HELD.get(type(e), ()) if (a := getattr(e, name)) is not None}


def release(root: Expr) -> None:
    """Forget the values of the parameters under ``root`` that can be loaded again."""
    for e in walk(root):
        for a in arrays(e):
            if isinstance(a, Parameter):
                a.release()


def arrays(e: Expr) -> tuple[Array, ...]:
    """The parameters that ``e`` itself holds."""
    names = _HELD.get(type(e))
    return () if names is None else tuple([a for name in names if (a := getattr(e, name)) is not None])

"""Maps smaller than a kernel: a rewritten form has to run wherever its region runs.

A convolution refuses a map from which it makes nothing. A slice, a padding and, in some runtimes, a pooling do not:
they return an empty map, or one element. So what is composed of them may run where a convolution in their place does
not.
"""

from __future__ import annotations

from collections.abc import Collection

from reparamc.algebra.expr import Concat, Conv, Expr, Layout, Source, Sum, walk
from reparamc.algebra.places import result_size

REFUSED = "the rewritten form would refuse maps that are smaller than its kernel, which the region takes"

MOST_TRIED = 2**9
"""Sizes that are tried. Where kernels reach further, some may be refused."""


def refuses_more(before: Expr, after: Expr, made: Collection[Expr], pools_clamp: bool) -> bool:
    """Whether a convolution among ``made``, the new operators of ``after``, refuses a map that ``before`` takes.

    Args:
        pools_clamp: whether a pooling whose window is larger than the map makes one element of it.
    """
    spatial = max((e.spatial for e in made if isinstance(e, Conv) and not e.is_weightless), default=0)
    if not spatial or not any(isinstance(e, Conv) and e.is_weightless for e in walk(before)):
        return False
    if any(isinstance(e, Layout) for root in (before, after) for e in walk(root)):
        return False  # their sizes are not those of their operands
    tried = [_sizes(before, axis, spatial) for axis in range(spatial)]
    return any(len(sizes) > MOST_TRIED for sizes in tried) or any(
        _size(before, axis, spatial, n, pools_clamp) is not None and _size(after, axis, spatial, n, pools_clamp) is None
        for axis, sizes in enumerate(tried)
        for n in sizes
    )


def _sizes(root: Expr, axis: int, spatial: int) -> Collection[int]:
    """Sizes of the operands along an axis: the one that is known, or all small ones."""
    shapes = [e.shape for e in walk(root) if isinstance(e, Source) and e.shape is not None]
    known = {shape[axis - spatial].known for shape in shapes if len(shape) > spatial} - {None}
    if known:
        return {n for n in known if n is not None}
    spans = (r - min(a, 0) for e in walk(root) if isinstance(e, Conv) for a, r in zip(e.offset, e.reach, strict=True))
    return range(max(spans, default=0) + 3)


def _size(root: Expr, axis: int, spatial: int, operand: int, pools_clamp: bool) -> int | None:
    """The size of ``root`` where its operands have the size ``operand``; None where an operator refuses its own."""
    found: dict[Expr, int] = {}
    for e in walk(root):
        sizes = {found[x] for x in e.children}
        if isinstance(e, Source):
            found[e] = operand
        elif isinstance(e, Sum | Concat) and len(sizes) > 1:
            return None
        elif isinstance(e, Conv) and e.spatial == spatial:
            size = result_size(e, (found[e.x],) * spatial)[axis]
            moves = e.is_weightless and max(e.kernel) == 1  # a slice or a padding
            if size == 0 and not moves:
                if not e.is_weightless or not pools_clamp or not found[e.x]:
                    return None
                size = 1
            found[e] = size
        else:
            (found[e],) = sizes
    return found[root]
